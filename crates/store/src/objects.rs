//! Bytes under keys: staged before they are written, claimed by the transaction that gives them a row, swept when no row
//! claims them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use holdfast_domain::ids::{FileId, JobId, ProjectId};
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart};
use sha2::{Digest, Sha256};
use sqlx::{PgConnection, PgPool};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::StoreError;

/// Bytes handed to the object store at a time; the least S3 takes for a part but the last.
const PART_BYTES: usize = 5 * 1024 * 1024;
/// Parts that may be under way at once: with their size, what an upload holds in memory at most.
const PARTS_IN_FLIGHT: usize = 4;

/// Where an object is and what it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectRef {
    /// Its key.
    pub key: String,
    /// Its length.
    pub bytes: u64,
    /// The hash of its bytes.
    pub sha256: [u8; 32],
}

/// The object store.
#[derive(Debug, Clone)]
pub struct Objects {
    pool: PgPool,
    inner: Arc<dyn ObjectStore>,
    folder: PathBuf,
}

/// The keys, in one place.
pub(crate) mod keys {
    use super::{FileId, JobId, ProjectId};

    pub(crate) fn file(project: ProjectId, file: FileId) -> String {
        format!("projects/{project}/files/{file}")
    }

    pub(crate) fn adapter(project: ProjectId, job: JobId, attempt: i32, name: &str) -> String {
        format!("projects/{project}/jobs/{job}/attempt-{attempt}/adapter/{name}")
    }

    pub(crate) fn base_model(content: &[u8; 32], name: &str) -> String {
        format!("base-models/{}/{name}", hex::encode(content))
    }

    pub(crate) fn alignment_reference(content: &[u8; 32]) -> String {
        format!("alignment-references/{}.safetensors", hex::encode(content))
    }

    pub(crate) fn alignment_set(content: &[u8; 32]) -> String {
        format!("alignment-sets/{}.jsonl", hex::encode(content))
    }
}

impl Objects {
    pub(crate) fn open(pool: PgPool, folder: &Path) -> Result<Self, StoreError> {
        // A row must not outlive its bytes when the power goes.
        let inner = Arc::new(LocalFileSystem::new_with_prefix(folder)?.with_fsync(true));
        Ok(Self { pool, inner, folder: folder.to_owned() })
    }

    /// Begins to write an object that no row names yet.
    ///
    /// # Errors
    /// When the database or the object store fails.
    pub async fn stage(&self, key: String) -> Result<ObjectWriter, StoreError> {
        sqlx::query!("insert into staged_objects (key) values ($1) on conflict (key) do update set staged_at = now()", key)
            .execute(&self.pool)
            .await?;
        let upload = self.inner.put_multipart(&Key::from(key.clone())).await?;
        let write = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        Ok(ObjectWriter { key, write, bytes: 0, hash: Sha256::new() })
    }

    /// Writes a local file as an object that no row names yet.
    ///
    /// # Errors
    /// When the file cannot be read, or the database or the object store fails.
    pub async fn stage_file(&self, key: String, path: &Path) -> Result<ObjectRef, StoreError> {
        let mut file = tokio::fs::File::open(path).await?;
        let mut writer = self.stage(key).await?;
        let mut buffer = vec![0; 1024 * 1024];
        loop {
            match file.read(&mut buffer).await {
                Ok(0) => return writer.finish().await,
                Ok(read) => writer.write(&buffer[..read]).await?,
                Err(error) => {
                    writer.abort().await;
                    return Err(error.into());
                }
            }
        }
    }

    /// The object's bytes as a stream.
    ///
    /// # Errors
    /// When there is no such object, or the store fails.
    pub async fn read(&self, key: &str) -> Result<BoxStream<'static, Result<Bytes, object_store::Error>>, StoreError> {
        Ok(self.inner.get(&Key::from(key)).await?.into_stream())
    }

    /// Copies an object to a local file, checking its hash on the way; the file appears whole or not at all.
    ///
    /// # Errors
    /// When the object is missing or not what its row says, or the file cannot be written.
    pub async fn fetch(&self, object: &ObjectRef, to: &Path) -> Result<(), StoreError> {
        let partial = to.with_extension("partial");
        let mut file = tokio::fs::File::create(&partial).await?;
        let mut hash = Sha256::new();
        let mut stream = self.read(&object.key).await?;
        while let Some(chunk) = stream.next().await {
            let chunk = chunk?;
            hash.update(&chunk);
            file.write_all(&chunk).await?;
        }
        file.flush().await?;
        drop(file);
        if <[u8; 32]>::from(hash.finalize()) != object.sha256 {
            tokio::fs::remove_file(&partial).await?;
            return Err(StoreError::Checksum { key: object.key.clone() });
        }
        tokio::fs::rename(&partial, to).await?;
        Ok(())
    }

    /// Removes a staged object that will get no row. What cannot be removed now, the sweeper removes.
    pub async fn discard(&self, object: &ObjectRef) {
        let removed = async {
            self.inner.delete(&Key::from(object.key.as_str())).await?;
            sqlx::query!("delete from staged_objects where key = $1", object.key).execute(&self.pool).await?;
            Ok::<_, StoreError>(())
        };
        if let Err(error) = removed.await {
            tracing::warn!(%error, key = object.key, "a refused upload could not be removed yet");
        }
    }

    /// Removes objects that were staged longer than `grace` ago and that no row claims. Returns how many.
    ///
    /// # Errors
    /// When the database or the object store fails; what is left is removed by the next sweep.
    pub async fn sweep(&self, grace: Duration) -> Result<u64, StoreError> {
        let mut swept = 0;
        loop {
            // The row stays locked until the object is gone: whoever stages the same key again waits, and then writes it anew.
            let mut transaction = self.pool.begin().await?;
            let stale = sqlx::query_scalar!(
                "delete from staged_objects where key = (
                     select key from staged_objects where staged_at < now() - make_interval(secs => $1)
                     order by staged_at limit 1 for update skip locked)
                 returning key",
                grace.as_secs_f64()
            )
            .fetch_optional(&mut *transaction)
            .await?;
            let Some(key) = stale else { return Ok(swept) };
            match self.inner.delete(&Key::from(key.as_str())).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            remove_unfinished(&self.folder.join(&key)).await?;
            transaction.commit().await?;
            swept += 1;
        }
    }

    /// Writes a small object whole, to learn whether the store can be written at all.
    ///
    /// # Errors
    /// When it cannot.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let key = Key::from("probe");
        self.inner.put(&key, PutPayload::from_static(b"holdfast")).await?;
        Ok(self.inner.delete(&key).await?)
    }
}

/// Removes what a killed process left of an upload to a local store, which writes `object#1`, `object#2` … beside the object
/// and renames the one that is whole.
async fn remove_unfinished(object: &Path) -> Result<(), StoreError> {
    let (Some(folder), Some(name)) = (object.parent(), object.file_name()) else { return Ok(()) };
    let mut entries = match tokio::fs::read_dir(folder).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    while let Some(entry) = entries.next_entry().await? {
        let found = entry.file_name();
        let suffix = found.as_encoded_bytes().strip_prefix(name.as_encoded_bytes());
        if suffix.is_some_and(|suffix| suffix.first() == Some(&b'#')) {
            tokio::fs::remove_file(entry.path()).await?;
        }
    }
    Ok(())
}

/// Takes objects off the staged list, in the transaction that gives them a row.
pub(crate) async fn claim(connection: &mut PgConnection, keys: &[String]) -> Result<(), StoreError> {
    let claimed = sqlx::query!("delete from staged_objects where key = any($1)", keys).execute(connection).await?;
    if claimed.rows_affected() == keys.len() as u64 {
        return Ok(());
    }
    // The sweeper was faster: the bytes are gone, so the row must not appear.
    Err(StoreError::Corrupt("a staged object was removed before it was claimed; try again".into()))
}

/// Puts an object whose row goes on the staged list, for the sweeper to remove.
pub(crate) async fn disown(connection: &mut PgConnection, key: &str) -> Result<(), StoreError> {
    sqlx::query!("insert into staged_objects (key, staged_at) values ($1, '-infinity') on conflict (key) do nothing", key)
        .execute(connection)
        .await?;
    Ok(())
}

/// An object being written.
#[derive(Debug)]
pub struct ObjectWriter {
    key: String,
    write: WriteMultipart,
    bytes: u64,
    hash: Sha256,
}

impl ObjectWriter {
    /// Takes the next bytes, waiting while too many are under way.
    ///
    /// # Errors
    /// When the object store fails.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.write.wait_for_capacity(PARTS_IN_FLIGHT).await?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        self.write.write(bytes);
        Ok(())
    }

    /// Completes the object.
    ///
    /// # Errors
    /// When the object store fails.
    pub async fn finish(self) -> Result<ObjectRef, StoreError> {
        self.write.finish().await?;
        Ok(ObjectRef { key: self.key, bytes: self.bytes, sha256: self.hash.finalize().into() })
    }

    /// Gives the object up; what the store cannot remove now, the sweeper does.
    pub async fn abort(self) {
        if let Err(error) = self.write.abort().await {
            tracing::debug!(%error, key = self.key, "an upload could not be aborted");
        }
    }
}
