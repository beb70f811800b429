//! Base models on this machine's disk: fetched once, checked against their hashes, the least recently used removed when
//! they take too much room.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use holdfast_store::base_models::BaseModelFiles;
use holdfast_store::{Store, StoreError};

/// Touched at each use.
const USED: &str = ".used";

/// The folder of a base model, fetched when it is not there.
pub(crate) async fn ensure(store: &Store, folder: &Path, base: &BaseModelFiles, max_bytes: u64) -> Result<PathBuf, StoreError> {
    let name = hex::encode(base.content_sha256);
    let ready = folder.join(&name);
    if !tokio::fs::try_exists(&ready).await? {
        // Built aside and renamed, so that a folder that is there is whole.
        let partial = folder.join(format!("{name}.partial"));
        let _ = tokio::fs::remove_dir_all(&partial).await;
        tokio::fs::create_dir_all(&partial).await?;
        for (file, object) in &base.files {
            store.objects().fetch(object, &partial.join(file)).await?;
        }
        tokio::fs::rename(&partial, &ready).await?;
    }
    tokio::fs::write(ready.join(USED), b"").await?;
    evict(folder, &ready, max_bytes).await?;
    Ok(ready)
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
