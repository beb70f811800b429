//! Files: what tenants upload, and what jobs write for them.

use std::time::Duration;

use holdfast_domain::Invalid;
use holdfast_domain::ids::{FileId, JobId, ProjectId};
use holdfast_domain::invalid::LineError;
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::error::{from_json, to_json};
use crate::objects::{self, Content, ObjectRef, ObjectWriter, keys};
use crate::once::{self, Once};
use crate::projects::{lock_quotas, usage};
use crate::{Page, PageRequest, Store, StoreError, evidence, new_id};

/// A file that expires is kept beyond its end while a job needs it; so many are removed at a time.
const EXPIRED_AT_ONCE: i64 = 200;

/// A file's row.
#[derive(Debug, Clone)]
pub struct File {
    /// Its id.
    pub id: FileId,
    /// The name it was uploaded under.
    pub filename: String,
    /// What it is for.
    pub purpose: String,
    /// Its bytes.
    pub content: Content,
    /// Its good rows.
    pub row_count: u64,
    /// Its bad lines, where it has any: no job takes it then.
    pub errors: Option<BadLines>,
    /// When it was uploaded.
    pub created_at: OffsetDateTime,
    /// When it ends.
    pub expires_at: Option<OffsetDateTime>,
}

/// The bad lines of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadLines {
    /// How many there are.
    pub count: u64,
    /// The first of them, at most [`holdfast_domain::limits::MAX_LINE_ERRORS`].
    pub lines: Vec<LineError>,
}

/// A file to be created; its shape has been checked.
#[derive(Debug, Clone)]
pub struct NewFile {
    /// Its id, which its object's key holds.
    pub id: FileId,
    /// The name it was uploaded under.
    pub filename: String,
    /// What it is for.
    pub purpose: String,
    /// Its good rows.
    pub row_count: u64,
    /// Its bad lines, where it has any.
    pub errors: Option<BadLines>,
    /// How long it is kept; `None` until it is deleted.
    pub lifetime: Option<Duration>,
}

struct Row {
    id: Uuid,
    filename: String,
    purpose: String,
    bytes: i64,
    sha256: Vec<u8>,
    object_keys: Vec<String>,
    row_count: i64,
    errors: Option<serde_json::Value>,
    created_at: OffsetDateTime,
    expires_at: Option<OffsetDateTime>,
}

impl TryFrom<Row> for File {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let id = FileId(row.id);
        Ok(Self {
            id,
            filename: row.filename,
            purpose: row.purpose,
            content: Content { keys: row.object_keys, bytes: row.bytes.unsigned_abs(), sha256: sha256(&row.sha256, &id)? },
            row_count: row.row_count.unsigned_abs(),
            errors: row.errors.map(from_json).transpose()?,
            created_at: row.created_at,
            expires_at: row.expires_at,
        })
    }
}

fn sha256(column: &[u8], of: &dyn std::fmt::Display) -> Result<[u8; 32], StoreError> {
    column.try_into().map_err(|_| StoreError::Corrupt(format!("the SHA-256 of {of}")))
}

/// Puts together an object's columns.
pub(crate) fn object_ref(key: String, bytes: i64, column: &[u8]) -> Result<ObjectRef, StoreError> {
    let sha256 = sha256(column, &key)?;
    Ok(ObjectRef { key, bytes: bytes.unsigned_abs(), sha256 })
}

impl Store {
    /// An id for a file that is yet to be created.
    #[must_use]
    pub fn new_file_id() -> FileId {
        FileId(new_id())
    }

    /// Begins an upload: its id, and where its bytes go.
    ///
    /// # Errors
    /// When the database or the object store fails.
    pub async fn stage_upload(&self, project: ProjectId) -> Result<(FileId, ObjectWriter), StoreError> {
        let id = Self::new_file_id();
        Ok((id, self.objects.stage(keys::file(project, id)).await?))
    }

    /// Bytes that the project may still store; `None` for as many as it likes.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn room(&self, project: ProjectId) -> Result<Option<u64>, StoreError> {
        match self.project(project).await?.quotas.max_stored_bytes {
            None => Ok(None),
            Some(most) => Ok(Some(most.saturating_sub(self.usage(project).await?.stored_bytes))),
        }
    }

    /// Ends an upload: the file exists from here on. Of a request that was served before, the file it made then comes back,
    /// and the object is left to the sweeper.
    ///
    /// # Errors
    /// When it is more than the project may store, or the database fails.
    pub async fn create_file(
        &self,
        project: ProjectId,
        file: &NewFile,
        content: &Content,
        once: Option<&Once>,
    ) -> Result<File, StoreError> {
        let mut connection = self.tenant(project).await?;
        let mut transaction = connection.begin().await?;
        if let Some(made) = once::admit(&mut transaction, once, file.id.0).await? {
            transaction.rollback().await?;
            drop(connection);
            return self.file(project, FileId(made)).await;
        }
        check_room(&mut transaction, project, content.bytes).await?;
        let row = insert(&mut transaction, project, file, content).await?;
        objects::claim(&mut transaction, &content.keys).await?;
        transaction.commit().await?;
        Ok(row)
    }

    /// One file.
    ///
    /// # Errors
    /// When the project has no such file, or the database fails.
    pub async fn file(&self, project: ProjectId, id: FileId) -> Result<File, StoreError> {
        let mut connection = self.tenant(project).await?;
        sqlx::query_as!(
            Row,
            "select id, filename, purpose, bytes, sha256, object_keys, row_count, errors, created_at, expires_at
             from files where project_id = $1 and id = $2 and (expires_at is null or expires_at > now())",
            project.0,
            id.0
        )
        .fetch_optional(&mut *connection)
        .await?
        .ok_or(StoreError::NotFound)?
        .try_into()
    }

    /// A file that a job of its project holds on to, even when it has expired meanwhile.
    pub(crate) async fn file_of_job(&self, project: ProjectId, id: FileId) -> Result<File, StoreError> {
        sqlx::query_as!(
            Row,
            "select id, filename, purpose, bytes, sha256, object_keys, row_count, errors, created_at, expires_at
             from files where project_id = $1 and id = $2",
            project.0,
            id.0
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::NotFound)?
        .try_into()
    }

    /// Files, by time, of one purpose or all.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn files(&self, project: ProjectId, purpose: Option<&str>, page: PageRequest) -> Result<Page<File>, StoreError> {
        let mut connection = self.tenant(project).await?;
        let rows = if page.ascending {
            sqlx::query_as!(
                Row,
                "select id, filename, purpose, bytes, sha256, object_keys, row_count, errors, created_at, expires_at
                 from files where project_id = $1 and ($2::text is null or purpose = $2) and ($3::uuid is null or id > $3)
                   and (expires_at is null or expires_at > now())
                 order by id limit $4",
                project.0,
                purpose,
                page.after,
                page.fetch()
            )
            .fetch_all(&mut *connection)
            .await?
        } else {
            sqlx::query_as!(
                Row,
                "select id, filename, purpose, bytes, sha256, object_keys, row_count, errors, created_at, expires_at
                 from files where project_id = $1 and ($2::text is null or purpose = $2) and ($3::uuid is null or id < $3)
                   and (expires_at is null or expires_at > now())
                 order by id desc limit $4",
                project.0,
                purpose,
                page.after,
                page.fetch()
            )
            .fetch_all(&mut *connection)
            .await?
        };
        Ok(Page::new(rows.into_iter().map(File::try_from).collect::<Result<_, _>>()?, &page))
    }

    /// Deletes a file that no open job needs.
    ///
    /// # Errors
    /// When the project has no such file, a job still needs it, or the database fails.
    pub async fn delete_file(&self, project: ProjectId, id: FileId) -> Result<(), StoreError> {
        let mut connection = self.tenant(project).await?;
        let mut transaction = connection.begin().await?;
        // The lock keeps a job from being created with the file in between.
        let keys = sqlx::query_scalar!(
            "select object_keys from files where project_id = $1 and id = $2 and (expires_at is null or expires_at > now()) for update",
            project.0,
            id.0
        )
        .fetch_optional(&mut *transaction)
        .await?
        .ok_or(StoreError::NotFound)?;
        let needed_by = sqlx::query_scalar!(
            "select id from jobs where project_id = $1 and status in ('validating_files', 'queued', 'running', 'pausing', 'paused')
             and (training_file_id = $2 or validation_file_id = $2) limit 1",
            project.0,
            id.0
        )
        .fetch_optional(&mut *transaction)
        .await?;
        if let Some(job) = needed_by {
            let message = format!("{id} is needed by {}, which has not ended; cancel the job or wait for it", JobId(job));
            return Err(Invalid::new("file_id", "file_in_use", message).into());
        }
        objects::disown(&mut transaction, &keys).await?;
        evidence::forget_texts(&mut transaction, &[id.0]).await?;
        sqlx::query!("delete from files where project_id = $1 and id = $2", project.0, id.0).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Removes files that have expired and that no open job needs. Returns how many.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn remove_expired_files(&self) -> Result<u64, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let expired = sqlx::query!(
            "select f.id, f.object_keys from files f
             where f.expires_at < now() and not exists (
                 select 1 from jobs j where j.project_id = f.project_id and (j.training_file_id = f.id or j.validation_file_id = f.id)
                   and j.status in ('validating_files', 'queued', 'running', 'pausing', 'paused'))
             order by f.expires_at limit $1 for update of f skip locked",
            EXPIRED_AT_ONCE
        )
        .fetch_all(&mut *transaction)
        .await?;
        let ids: Vec<Uuid> = expired.iter().map(|f| f.id).collect();
        let keys: Vec<String> = expired.into_iter().flat_map(|f| f.object_keys).collect();
        objects::disown(&mut transaction, &keys).await?;
        evidence::forget_texts(&mut transaction, &ids).await?;
        sqlx::query!("delete from files where id = any($1)", &ids).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(ids.len() as u64)
    }
}

/// Refuses what would be more than the project may store.
pub(crate) async fn check_room(connection: &mut PgConnection, project: ProjectId, bytes: u64) -> Result<(), StoreError> {
    let Some(most) = lock_quotas(connection, project).await?.max_stored_bytes else { return Ok(()) };
    let stored = usage(connection, project).await?.stored_bytes;
    if stored.saturating_add(bytes) <= most {
        return Ok(());
    }
    Err(StoreError::Quota(format!(
        "the project stores {stored} of the {most} bytes it may, and this would be {bytes} more; delete files that are no longer needed, or ask the operator for more room"
    )))
}

/// Writes a file's row.
pub(crate) async fn insert(
    connection: &mut PgConnection,
    project: ProjectId,
    file: &NewFile,
    content: &Content,
) -> Result<File, StoreError> {
    sqlx::query_as!(
        Row,
        "insert into files (id, project_id, filename, purpose, bytes, sha256, object_keys, row_count, status, errors, expires_at)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, now() + make_interval(secs => $11))
         returning id, filename, purpose, bytes, sha256, object_keys, row_count, errors, created_at, expires_at",
        file.id.0,
        project.0,
        file.filename,
        file.purpose,
        content.bytes.cast_signed(),
        &content.sha256[..],
        &content.keys,
        file.row_count.cast_signed(),
        if file.errors.is_some() { "error" } else { "processed" },
        file.errors.as_ref().map(to_json).transpose()?,
        file.lifetime.map(|l| l.as_secs_f64())
    )
    .fetch_one(connection)
    .await?
    .try_into()
}
