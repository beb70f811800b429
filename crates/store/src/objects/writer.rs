//! Writing an object, piece by piece.

use std::sync::Arc;

use object_store::multipart::PartId;
use object_store::path::Path as Key;
use object_store::{MultipartId, ObjectStore, ObjectStoreExt, PutPayload, PutPayloadMut, WriteMultipart};
use sha2::{Digest, Sha256};
use sqlx::PgPool;
use tokio::task::JoinSet;

use super::ObjectRef;
use super::location::RemoteStore;
use crate::StoreError;

/// Bytes that are sent to a store at a time, as a rule; the least S3 takes for a part but the last.
const PART_BYTES: usize = 5 * 1024 * 1024;
/// Parts that S3 makes an object of at most.
const MOST_PARTS: u64 = 10_000;
/// The same for a folder, which takes any: less memory for each of many uploads.
const LOCAL_PART_BYTES: usize = 256 * 1024;
/// Parts that may be under way at once: with their size, what an upload holds in memory at most.
const PARTS_IN_FLIGHT: usize = 2;

/// An object being written.
#[derive(Debug)]
pub struct ObjectWriter {
    key: String,
    target: Target,
    bytes: u64,
    hash: Sha256,
}

#[derive(Debug)]
enum Target {
    Folder(WriteMultipart),
    Remote(Remote),
}

impl ObjectWriter {
    /// A writer to a file of a folder.
    pub(super) async fn to_folder(inner: &dyn ObjectStore, at: &Key, key: String) -> Result<Self, StoreError> {
        let write = WriteMultipart::new_with_chunk_size(inner.put_multipart(at).await?, LOCAL_PART_BYTES);
        Ok(Self { key, target: Target::Folder(write), bytes: 0, hash: Sha256::new() })
    }

    /// A writer to a store.
    pub(super) fn to_store(pool: PgPool, store: Arc<dyn RemoteStore>, at: Key, key: String) -> Self {
        let remote = Remote {
            pool,
            store,
            at,
            key: key.clone(),
            id: None,
            part_bytes: PART_BYTES,
            buffer: PutPayloadMut::new(),
            begun: 0,
            under_way: JoinSet::new(),
            parts: Vec::new(),
        };
        Self { key, target: Target::Remote(remote), bytes: 0, hash: Sha256::new() }
    }

    /// Says before the first byte how many will come, so that what is large is sent in parts few enough.
    pub(super) fn expect_bytes(&mut self, bytes: u64) {
        if let Target::Remote(remote) = &mut self.target {
            remote.part_bytes = part_bytes(bytes);
        }
    }

    /// Takes the next bytes, waiting while too many are under way.
    ///
    /// # Errors
    /// When the object store fails.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        match &mut self.target {
            Target::Folder(write) => {
                write.wait_for_capacity(PARTS_IN_FLIGHT).await?;
                write.write(bytes);
                Ok(())
            }
            Target::Remote(remote) => remote.write(bytes).await,
        }
    }

    /// Completes the object.
    ///
    /// # Errors
    /// When the object store fails.
    pub async fn finish(self) -> Result<ObjectRef, StoreError> {
        match self.target {
            Target::Folder(write) => {
                write.finish().await?;
            }
            Target::Remote(remote) => remote.finish().await?,
        }
        Ok(ObjectRef { key: self.key, bytes: self.bytes, sha256: self.hash.finalize().into() })
    }

    /// Gives the object up; what the store cannot remove now, the sweeper does.
    pub async fn abort(self) {
        let key = self.key.clone();
        if let Err(error) = self.try_abort().await {
            tracing::debug!(%error, key, "an upload could not be aborted");
        }
    }

    /// Gives the object up.
    ///
    /// # Errors
    /// When the store does not let go of what it has of it.
    pub async fn try_abort(self) -> Result<(), StoreError> {
        match self.target {
            Target::Folder(write) => write.abort().await?,
            Target::Remote(remote) => remote.abort().await?,
        }
        Ok(())
    }
}

/// An object on its way to a store: in one request while it is small, else in parts, whose upload the staged row names, so that the
/// sweeper can abort what a killed process left.
#[derive(Debug)]
struct Remote {
    pool: PgPool,
    store: Arc<dyn RemoteStore>,
    at: Key,
    key: String,
    id: Option<MultipartId>,
    /// Bytes of each part but the last.
    part_bytes: usize,
    buffer: PutPayloadMut,
    /// Parts that were begun.
    begun: usize,
    under_way: JoinSet<Result<(usize, PartId), object_store::Error>>,
    /// Those that arrived, with their places.
    parts: Vec<(usize, PartId)>,
}

impl Remote {
    async fn write(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        while !bytes.is_empty() {
            // Full parts are sent when more comes: what ends here is one request.
            if self.buffer.content_length() == self.part_bytes {
                self.send().await?;
            }
            let room = self.part_bytes - self.buffer.content_length();
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.buffer.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    /// Begins to send what is in the buffer as a part, once few enough are under way.
    async fn send(&mut self) -> Result<(), StoreError> {
        while self.under_way.len() >= PARTS_IN_FLIGHT {
            self.arrive().await?;
        }
        let id = match &self.id {
            Some(id) => id.clone(),
            None => self.begin().await?,
        };
        let (store, at, part) = (Arc::clone(&self.store), self.at.clone(), self.begun);
        let payload: PutPayload = std::mem::take(&mut self.buffer).freeze();
        self.begun += 1;
        self.under_way.spawn(async move { Ok((part, store.put_part(&at, &id, part, payload).await?)) });
        Ok(())
    }

    async fn begin(&mut self) -> Result<MultipartId, StoreError> {
        let id = self.store.create_multipart(&self.at).await.map_err(absent)?;
        let written =
            sqlx::query!("update staged_objects set multipart_id = $2 where key = $1", self.key, id).execute(&self.pool);
        let written = written.await.map_err(StoreError::from).and_then(|result| crate::error::changed_one(&result));
        if let Err(error) = written {
            // The sweeper would never learn of it.
            let _ = self.store.abort_multipart(&self.at, &id).await;
            return Err(error);
        }
        self.id = Some(id.clone());
        Ok(id)
    }

    async fn arrive(&mut self) -> Result<(), StoreError> {
        match self.under_way.join_next().await {
            Some(Ok(part)) => self.parts.push(part.map_err(absent)?),
            Some(Err(error)) => return Err(StoreError::Io(std::io::Error::other(error))),
            None => {}
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(), StoreError> {
        if self.id.is_none() {
            self.store.put(&self.at, std::mem::take(&mut self.buffer).freeze()).await.map_err(absent)?;
            return Ok(());
        }
        let sent = async {
            self.send().await?;
            while !self.under_way.is_empty() {
                self.arrive().await?;
            }
            Ok::<_, StoreError>(())
        };
        sent.await?;
        self.parts.sort_unstable_by_key(|(place, _)| *place);
        let parts = std::mem::take(&mut self.parts).into_iter().map(|(_, part)| part).collect();
        if let Some(id) = &self.id {
            // One that is gone was lost by the store, or completed already and the answer was lost: the object is written anew.
            self.store.complete_multipart(&self.at, id, parts).await.map_err(absent)?;
        }
        Ok(())
    }

    async fn abort(mut self) -> Result<(), object_store::Error> {
        self.under_way.shutdown().await;
        match &self.id {
            Some(id) => self.store.abort_multipart(&self.at, id).await,
            None => Ok(()),
        }
    }
}

/// Whoever writes names nothing that could be missing, but the store itself or what it keeps of the upload: it may be there again.
fn absent(error: object_store::Error) -> object_store::Error {
    match error {
        object_store::Error::NotFound { source, .. } => object_store::Error::Generic { store: "written", source },
        other => other,
    }
}

/// Bytes of each part of an object of so many.
fn part_bytes(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(MOST_PARTS)).unwrap_or(usize::MAX).max(PART_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_of_any_size_is_few_enough_parts() {
        for bytes in [1_u64, 5 << 20, 48 << 30, 65 << 30, 5 << 40] {
            let parts = bytes.div_ceil(part_bytes(bytes) as u64);
            assert!((1..=MOST_PARTS).contains(&parts), "{bytes} bytes in {parts} parts");
        }
        assert_eq!(part_bytes(1 << 30), PART_BYTES);
    }
}
