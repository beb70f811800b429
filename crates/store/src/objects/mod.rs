//! Bytes under keys: staged before they are written, claimed by the transaction that gives them a row, swept when no row
//! claims them.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use holdfast_domain::ids::{FileId, JobId, PartId, ProjectId, UploadId};
use object_store::path::Path as Key;
use object_store::signer::Signer;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutPayload};
use sha2::{Digest, Sha256};
use sqlx::{PgConnection, PgPool};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;

use crate::StoreError;

mod location;
mod writer;

pub use location::ObjectLocation;
use location::{Opened, RemoteStore};
pub use writer::ObjectWriter;

/// Bytes of a folder's file that are read at a time.
const LOCAL_READ_BYTES: u64 = 512 * 1024;

/// How long a signed URL leads to its object.
const SIGNED_FOR: Duration = Duration::from_secs(15 * 60);

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

/// Bytes that stand in one or more objects, one behind the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Their keys, in order.
    pub keys: Vec<String>,
    /// The length of all of it.
    pub bytes: u64,
    /// The hash of all of it.
    pub sha256: [u8; 32],
}

impl From<ObjectRef> for Content {
    fn from(object: ObjectRef) -> Self {
        Self { keys: vec![object.key], bytes: object.bytes, sha256: object.sha256 }
    }
}

/// Stands in every store that a program has used.
pub const MARK: &str = "holdfast-store";

/// The object store.
#[derive(Debug, Clone)]
pub struct Objects {
    pool: PgPool,
    inner: Arc<dyn ObjectStore>,
    /// The same, where it takes parts; a folder does that otherwise.
    remote: Option<Arc<dyn RemoteStore>>,
    /// Stands before every key.
    prefix: Key,
    /// Makes URLs that lead past this service to an object, where the store has such.
    signer: Option<Arc<dyn Signer>>,
    /// Where a local store keeps its files.
    folder: Option<PathBuf>,
}

/// The keys, in one place.
pub(crate) mod keys {
    use super::{FileId, JobId, PartId, ProjectId, UploadId, Uuid};

    pub(crate) fn file(project: ProjectId, file: FileId) -> String {
        format!("projects/{project}/files/{file}")
    }

    pub(crate) fn part(project: ProjectId, upload: UploadId, part: PartId) -> String {
        format!("projects/{project}/uploads/{upload}/{part}")
    }

    /// An attempt that does not learn whether its model was published tries again: `time` keeps what it then writes from what has
    /// its rows already.
    pub(crate) fn results(project: ProjectId, job: JobId, attempt: i32, time: Uuid) -> String {
        format!("projects/{project}/jobs/{job}/attempt-{attempt}/{}/step_metrics.csv", time.simple())
    }

    /// A run that went back comes to a step again: `time` tells what it then leaves from what it left before.
    pub(crate) fn checkpoint(project: ProjectId, job: JobId, attempt: i32, step: u64, time: Uuid, name: &str) -> String {
        format!("projects/{project}/jobs/{job}/attempt-{attempt}/step-{step}/{}/{name}", time.simple())
    }

    /// See [`results`].
    pub(crate) fn adapter(project: ProjectId, job: JobId, attempt: i32, time: Uuid, name: &str) -> String {
        format!("projects/{project}/jobs/{job}/attempt-{attempt}/{}/adapter/{name}", time.simple())
    }

    pub(crate) fn base_model(content: &[u8; 32], name: &str) -> String {
        format!("base-models/{}/{name}", hex::encode(content))
    }

    pub(crate) fn alignment_reference(content: &[u8; 32]) -> String {
        format!("alignment-references/{}.safetensors", hex::encode(content))
    }

    /// Each call is another place: who comes second must not write over what is there.
    pub(crate) fn base_answers(name: &str) -> String {
        format!("base-answers/{name}/{}.jsonl", crate::new_id().simple())
    }

    /// See [`results`].
    pub(crate) fn evidence(project: ProjectId, job: JobId, attempt: i32, time: Uuid, name: &str) -> String {
        format!("projects/{project}/jobs/{job}/attempt-{attempt}/{}/evidence/{name}", time.simple())
    }

    pub(crate) fn suite(content: &[u8; 32]) -> String {
        format!("suites/{}.jsonl", hex::encode(content))
    }

    pub(crate) fn alignment_set(content: &[u8; 32]) -> String {
        format!("alignment-sets/{}.jsonl", hex::encode(content))
    }
}

impl Objects {
    /// Opens the store at `location`.
    pub(crate) fn open(pool: PgPool, location: &ObjectLocation) -> Result<Self, StoreError> {
        let Opened { inner, remote, prefix, signer, folder } = location.open()?;
        Ok(Self { pool, inner, remote, prefix, signer, folder })
    }

    fn at(&self, key: &str) -> Key {
        self.prefix.parts().chain(Key::from(key).parts()).collect()
    }

    /// A URL that leads to an object for some minutes; `None` where the store has none, or signs nothing with the credentials it was
    /// given.
    pub async fn signed_url(&self, key: &str) -> Option<String> {
        let signed = self.signer.as_ref()?.signed_url(http::Method::GET, &self.at(key), SIGNED_FOR).await;
        signed.map(|url| url.to_string()).inspect_err(|error| tracing::debug!(%error, "the store does not sign")).ok()
    }

    /// Begins to write an object that no row names yet.
    ///
    /// # Errors
    /// When the database or the object store fails.
    pub async fn stage(&self, key: String) -> Result<ObjectWriter, StoreError> {
        let before = sqlx::query_scalar!(
            "insert into staged_objects (key) values ($1) on conflict (key) do update set staged_at = now() returning multipart_id",
            key
        )
        .fetch_one(&self.pool)
        .await?;
        let at = self.at(&key);
        if let (Some(store), Some(id)) = (&self.remote, before) {
            // The row will name another upload, and nobody would know of this one any more.
            aborted(store.abort_multipart(&at, &id).await)?;
        }
        match &self.remote {
            Some(store) => Ok(ObjectWriter::to_store(self.pool.clone(), Arc::clone(store), at, key)),
            None => ObjectWriter::to_folder(self.inner.as_ref(), &at, key).await,
        }
    }

    /// Writes a local file as an object that no row names yet.
    ///
    /// # Errors
    /// When the file cannot be read, or the database or the object store fails.
    pub async fn stage_file(&self, key: String, path: &Path) -> Result<ObjectRef, StoreError> {
        let mut file = tokio::fs::File::open(path).await?;
        let mut writer = self.stage(key).await?;
        writer.expect_bytes(file.metadata().await?.len());
        let mut buffer = vec![0; 1024 * 1024];
        let copied = async {
            loop {
                match file.read(&mut buffer).await? {
                    0 => return Ok::<(), StoreError>(()),
                    read => writer.write(&buffer[..read]).await?,
                }
            }
        };
        match copied.await {
            Ok(()) => writer.finish().await,
            Err(error) => {
                writer.abort().await;
                Err(error)
            }
        }
    }

    /// The object's bytes as a stream.
    ///
    /// # Errors
    /// When there is no such object, or the store fails.
    pub async fn read(&self, key: &str) -> Result<BoxStream<'static, Result<Bytes, object_store::Error>>, StoreError> {
        match self.pieces(key.to_owned(), None).await {
            Ok(stream) => Ok(stream),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// The bytes `range` of an object as a stream.
    ///
    /// # Errors
    /// When there is no such object, or the store fails.
    pub async fn read_range(
        &self,
        key: &str,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, object_store::Error>>, StoreError> {
        match self.pieces(key.to_owned(), Some(range)).await {
            Ok(stream) => Ok(stream),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// An object's bytes, or a range of them, as a stream. A folder's files are read in pieces of a useful size; its own stream
    /// changes threads every eight KiB.
    async fn pieces(
        &self,
        key: String,
        range: Option<Range<u64>>,
    ) -> Result<BoxStream<'static, Result<Bytes, object_store::Error>>, object_store::Error> {
        let path = self.at(&key);
        if self.folder.is_none() {
            let options = GetOptions { range: range.map(GetRange::Bounded), ..GetOptions::default() };
            return Ok(self.inner.get_opts(&path, options).await?.into_stream());
        }
        let size = self.inner.head(&path).await?.size;
        let Range { start, end } = range.unwrap_or(0..size);
        let end = end.min(size);
        let inner = Arc::clone(&self.inner);
        let read = futures::stream::try_unfold(start, move |at| {
            let (inner, path) = (Arc::clone(&inner), path.clone());
            async move {
                if at >= end {
                    return Ok(None);
                }
                let next = end.min(at + LOCAL_READ_BYTES);
                Ok(Some((inner.get_range(&path, at..next).await?, next)))
            }
        });
        Ok(read.boxed())
    }

    /// The bytes of several objects, one behind the other, each opened when the one before it has ended.
    #[must_use]
    pub fn read_all(&self, keys: Vec<String>) -> BoxStream<'static, Result<Bytes, object_store::Error>> {
        let objects = self.clone();
        let open = move |key: String| {
            let objects = objects.clone();
            async move { objects.pieces(key, None).await }
        };
        futures::stream::iter(keys).then(open).try_flatten().boxed()
    }

    /// A small object's bytes, checked against its hash.
    ///
    /// # Errors
    /// When there is no such object, it is not what its row says, or the store fails.
    pub async fn read_whole(&self, object: &ObjectRef) -> Result<Vec<u8>, StoreError> {
        let mut pieces = self.read(&object.key).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = pieces.try_next().await? {
            bytes.extend_from_slice(&piece);
        }
        if <[u8; 32]>::from(Sha256::digest(&bytes)) == object.sha256 {
            Ok(bytes)
        } else {
            Err(StoreError::Checksum { key: object.key.clone() })
        }
    }

    /// Copies an object to a local file, checking its hash on the way; the file appears whole or not at all.
    ///
    /// # Errors
    /// When the object is missing or not what its row says, or the file cannot be written.
    pub async fn fetch(&self, object: &ObjectRef, to: &Path) -> Result<(), StoreError> {
        self.fetch_content(&object.clone().into(), to).await
    }

    /// Copies what may stand in several objects to a local file, as [`Self::fetch`].
    ///
    /// # Errors
    /// As [`Self::fetch`].
    pub async fn fetch_content(&self, content: &Content, to: &Path) -> Result<(), StoreError> {
        let partial = to.with_extension("partial");
        let mut file = tokio::fs::File::create(&partial).await?;
        let mut hash = Sha256::new();
        let mut stream = self.read_all(content.keys.clone());
        while let Some(chunk) = stream.next().await {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => return Err(self.explain(error).await),
            };
            hash.update(&chunk);
            file.write_all(&chunk).await?;
        }
        file.flush().await?;
        drop(file);
        if <[u8; 32]>::from(hash.finalize()) != content.sha256 {
            tokio::fs::remove_file(&partial).await?;
            return Err(StoreError::Checksum { key: content.keys.join(", ") });
        }
        tokio::fs::rename(&partial, to).await?;
        Ok(())
    }

    /// Writes bytes as an object that no row names yet.
    ///
    /// # Errors
    /// When the database or the object store fails.
    pub async fn stage_bytes(&self, key: String, bytes: &[u8]) -> Result<ObjectRef, StoreError> {
        let mut writer = self.stage(key).await?;
        writer.write(bytes).await?;
        writer.finish().await
    }

    /// Removes a staged object that will get no row. What cannot be removed now, the sweeper removes.
    pub async fn discard(&self, object: &ObjectRef) {
        let removed = async {
            // One that is no longer listed has got its row, though its caller may not have heard of it.
            let mut transaction = self.pool.begin().await?;
            let staged = sqlx::query!("delete from staged_objects where key = $1", object.key).execute(&mut *transaction).await?;
            if staged.rows_affected() > 0 {
                self.inner.delete(&self.at(&object.key)).await?;
            }
            transaction.commit().await?;
            Ok::<_, StoreError>(())
        };
        if let Err(error) = removed.await {
            tracing::warn!(%error, key = object.key, "a refused upload could not be removed yet");
        }
    }

    /// Removes objects that were staged longer than `grace` ago and that no row claims. Returns how many. One that the store does
    /// not let go of is passed over until the next sweep.
    ///
    /// # Errors
    /// When the database or the object store cannot be reached; what is left is removed by the next sweep.
    pub async fn sweep(&self, grace: Duration) -> Result<u64, StoreError> {
        let (mut swept, mut kept) = (0, Vec::new());
        loop {
            match self.sweep_one(grace, &mut kept).await {
                Ok(Swept::Nothing) => return Ok(swept),
                Ok(Swept::Named) => {}
                Ok(Swept::Object) => swept += 1,
                Err(error @ (StoreError::Database(_) | StoreError::Objects(object_store::Error::Generic { .. }))) => {
                    return Err(error);
                }
                Err(error) => tracing::error!(%error, key = kept.last(), "the object store does not let go of an object"),
            }
        }
    }

    /// Removes one object that is not among `kept`. Where it cannot be removed its key is added there.
    async fn sweep_one(&self, grace: Duration, kept: &mut Vec<String>) -> Result<Swept, StoreError> {
        // The row stays locked until the object is gone: whoever stages the same key again waits, and then writes it anew.
        let mut transaction = self.pool.begin().await?;
        let stale = sqlx::query!(
            "delete from staged_objects where key = (
                 select key from staged_objects where staged_at < now() - make_interval(secs => $1) and key <> all($2)
                 order by staged_at limit 1 for update skip locked)
             returning key, multipart_id",
            grace.as_secs_f64(),
            kept.as_slice()
        )
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(stale) = stale else { return Ok(Swept::Nothing) };
        let key = stale.key;
        kept.push(key.clone());
        if let (Some(store), Some(id)) = (&self.remote, &stale.multipart_id) {
            aborted(store.abort_multipart(&self.at(&key), id).await)?;
        }
        // What is named by its content may have got its row by another's hand.
        let is_named = sqlx::query_scalar!(
            "select exists (select 1 from base_model_files where object_key = $1)
                 or exists (select 1 from alignment_sets where object_key = $1)
                 or exists (select 1 from suites where object_key = $1)
                 or exists (select 1 from alignment_references where object_key = $1) as \"named!\"",
            key
        )
        .fetch_one(&mut *transaction)
        .await?;
        if is_named {
            transaction.commit().await?;
            kept.pop();
            return Ok(Swept::Named);
        }
        match self.inner.delete(&self.at(&key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(folder) = &self.folder {
            remove_unfinished(&folder.join(&key)).await?;
        }
        transaction.commit().await?;
        kept.pop();
        Ok(Swept::Object)
    }

    /// Learns whether this is the database's store, and can be written: its [`MARK`] is there.
    ///
    /// # Errors
    /// When it is not, or cannot be written.
    pub async fn probe(&self) -> Result<(), StoreError> {
        if let Err(error) = self.inner.head(&self.at(MARK)).await {
            return Err(self.explain(error).await);
        }
        self.mark().await
    }

    async fn mark(&self) -> Result<(), StoreError> {
        self.inner.put(&self.at(MARK), PutPayload::from_static(b"holdfast\n")).await?;
        Ok(())
    }

    /// Takes the store into use: marks it, unless it has none of the objects that the database names, and so is another one, or one
    /// that is not mounted.
    ///
    /// # Errors
    /// When it is another one, or cannot be written.
    pub async fn take(&self) -> Result<(), StoreError> {
        let named = sqlx::query_scalar!(
            "(select object_key from alignment_sets order by created_at desc limit 1)
             union all (select object_key from base_model_files limit 1)
             union all (select object_keys[1] from files order by created_at desc limit 1)"
        )
        .fetch_all(&self.pool)
        .await?;
        // A new database: whether anything is there need not be asked, which takes rights that writing does not.
        let mut is_there = named.is_empty() || self.has(MARK).await?;
        for key in named.into_iter().flatten() {
            is_there = is_there || self.has(&key).await?;
        }
        if !is_there {
            let message = "it has none of the objects that the database names: it is another store, not mounted, or not there";
            return Err(StoreError::Io(std::io::Error::new(std::io::ErrorKind::NotFound, message)));
        }
        self.mark().await
    }

    async fn has(&self, key: &str) -> Result<bool, StoreError> {
        match self.inner.head(&self.at(key)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Tells an object that is missing from a store that is: an unmounted folder or a bucket that is away holds nothing, the mark
    /// neither. Only the first is a fault of whoever asked.
    async fn explain(&self, error: object_store::Error) -> StoreError {
        if !matches!(error, object_store::Error::NotFound { .. }) || self.inner.head(&self.at(MARK)).await.is_ok() {
            return error.into();
        }
        let source = format!("nothing of this store is there, not even {MARK}: {error}").into();
        object_store::Error::Generic { store: "whole", source }.into()
    }
}

/// What one turn of a sweep came to.
enum Swept {
    /// There was nothing to do.
    Nothing,
    /// What had been staged has got its row by another's hand.
    Named,
    /// An object is gone.
    Object,
}

/// An upload that is not there was completed, or aborted in order.
fn aborted(outcome: Result<(), object_store::Error>) -> Result<(), object_store::Error> {
    match outcome {
        Err(object_store::Error::NotFound { .. }) => Ok(()),
        other => other,
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

/// Puts objects whose row goes on the staged list, for the sweeper to remove.
pub(crate) async fn disown(connection: &mut PgConnection, keys: &[String]) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into staged_objects (key, staged_at) select key, '-infinity' from unnest($1::text[]) as key on conflict (key) do nothing",
        keys
    )
    .execute(connection)
    .await?;
    Ok(())
}
