//! Base models on this machine's disk: fetched once, checked against their hashes, the least recently used removed when
//! they take too much room.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use holdfast_safety::hash;
use holdfast_store::base_models::BaseModelFiles;
use holdfast_store::{Store, StoreError};

/// What a folder's name ends with while it is fetched.
const PARTIAL: &str = ".partial";
/// Touched at each use.
const USED: &str = ".used";

/// Those that this process has read and found to be what they should be: a disk may lose what it said it had.
static FOUND_WHOLE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// The folder of a base model, fetched when it is not there, or not what it should be.
pub(crate) async fn ensure(store: &Store, folder: &Path, base: &BaseModelFiles, max_bytes: u64) -> Result<PathBuf, StoreError> {
    let name = hex::encode(base.content_sha256);
    let ready = folder.join(&name);
    if tokio::fs::try_exists(&ready).await? && !is_whole(&ready, base).await? {
        tracing::warn!(folder = %ready.display(), "a base model on this disk is damaged; it is fetched again");
        tokio::fs::remove_dir_all(&ready).await?;
    }
    if !tokio::fs::try_exists(&ready).await? {
        let bytes = base.files.iter().map(|(_, object)| object.bytes).sum();
        // Room first: what is fetched must not fill the disk that others are only kept on.
        evict(folder, &ready, max_bytes.saturating_sub(bytes)).await?;
        // Built aside and renamed, so that a folder that is there is whole.
        let partial = folder.join(format!("{name}{PARTIAL}"));
        if let Err(error) = fetch(store, &partial, base).await {
            let _ = tokio::fs::remove_dir_all(&partial).await;
            return Err(error);
        }
        tokio::fs::rename(&partial, &ready).await?;
        tokio::fs::File::open(folder).await?.sync_all().await?;
        found_whole().insert(ready.clone());
    }
    tokio::fs::write(ready.join(USED), b"").await?;
    evict(folder, &ready, max_bytes).await?;
    Ok(ready)
}

/// Removes what a killed process left half-fetched.
pub(crate) async fn clean(folder: &Path) {
    let Ok(mut entries) = tokio::fs::read_dir(folder).await else { return };
    while let Ok(Some(entry)) = entries.next_entry().await {
        if entry.file_name().to_string_lossy().ends_with(PARTIAL) {
            let _ = tokio::fs::remove_dir_all(entry.path()).await;
        }
    }
}

async fn fetch(store: &Store, partial: &Path, base: &BaseModelFiles) -> Result<(), StoreError> {
    let _ = tokio::fs::remove_dir_all(partial).await;
    tokio::fs::create_dir_all(partial).await?;
    for (file, object) in &base.files {
        let path = partial.join(file);
        store.objects().fetch(object, &path).await?;
        tokio::fs::File::open(&path).await?.sync_all().await?;
    }
    Ok(tokio::fs::File::open(partial).await?.sync_all().await?)
}

fn found_whole() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    FOUND_WHOLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the files are those of the base. Each folder is read once by a process.
async fn is_whole(folder: &Path, base: &BaseModelFiles) -> Result<bool, StoreError> {
    if found_whole().contains(folder) {
        return Ok(true);
    }
    for (name, object) in &base.files {
        let path = folder.join(name);
        let hash = tokio::task::spawn_blocking(move || hash::of_file(&path));
        match hash.await.map_err(std::io::Error::other)? {
            Ok(hash) if hash == object.sha256 => {}
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    found_whole().insert(folder.to_owned());
    Ok(true)
}

struct Cached {
    folder: PathBuf,
    bytes: u64,
    used: SystemTime,
}

async fn evict(folder: &Path, keep: &Path, max_bytes: u64) -> Result<(), StoreError> {
    let mut cached = Vec::new();
    let mut entries = tokio::fs::read_dir(folder).await?;
    while let Some(entry) = entries.next_entry().await? {
        cached.push(measure(entry.path()).await?);
    }
    cached.sort_by_key(|c| c.used);
    let mut total: u64 = cached.iter().map(|c| c.bytes).sum();
    for old in cached.iter().filter(|c| c.folder != keep) {
        if total <= max_bytes {
            break;
        }
        found_whole().remove(&old.folder);
        tokio::fs::remove_dir_all(&old.folder).await?;
        total -= old.bytes;
    }
    Ok(())
}

async fn measure(folder: PathBuf) -> Result<Cached, StoreError> {
    let mut bytes = 0;
    let mut entries = tokio::fs::read_dir(&folder).await?;
    while let Some(entry) = entries.next_entry().await? {
        bytes += entry.metadata().await?.len();
    }
    let used = tokio::fs::metadata(folder.join(USED)).await.and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    Ok(Cached { folder, bytes, used })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_least_recently_used_goes_first_and_the_one_in_use_stays() -> Result<(), Box<dyn std::error::Error>> {
        let cache = tempfile::tempdir()?;
        for name in ["a", "b", "c"] {
            let folder = cache.path().join(name);
            std::fs::create_dir(&folder)?;
            std::fs::write(folder.join("model"), [0; 100])?;
            std::fs::write(folder.join(USED), b"")?;
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        evict(cache.path(), &cache.path().join("a"), 200).await?;
        let left: Vec<bool> = ["a", "b", "c"].map(|name| cache.path().join(name).exists()).to_vec();
        assert_eq!(left, [true, false, true]);
        Ok(())
    }
}
