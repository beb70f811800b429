//! Uploaded files.

use holdfast_domain::ids::{FileId, ProjectId};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::objects::{self, ObjectRef, ObjectWriter, keys};
use crate::{Page, PageRequest, Store, StoreError, new_id};

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
    pub object: ObjectRef,
    /// Its rows.
    pub row_count: u64,
    /// When it was uploaded.
    pub created_at: OffsetDateTime,
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
    /// Its rows.
    pub row_count: u64,
}

struct Row {
    id: Uuid,
    filename: String,
    purpose: String,
    bytes: i64,
    sha256: Vec<u8>,
    object_key: String,
    row_count: i64,
    created_at: OffsetDateTime,
}

impl TryFrom<Row> for File {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        Ok(Self {
            id: FileId(row.id),
            filename: row.filename,
            purpose: row.purpose,
            object: object_ref(row.object_key, row.bytes, &row.sha256)?,
            row_count: row.row_count.unsigned_abs(),
            created_at: row.created_at,
        })
    }
}

/// Puts together an object's columns.
pub(crate) fn object_ref(key: String, bytes: i64, sha256: &[u8]) -> Result<ObjectRef, StoreError> {
    let sha256 = sha256.try_into().map_err(|_| StoreError::Corrupt(format!("the SHA-256 of {key}")))?;
    Ok(ObjectRef { key, bytes: bytes.unsigned_abs(), sha256 })
}

impl Store {
    /// Begins an upload: its id, and where its bytes go.
    ///
    /// # Errors
    /// When the database or the object store fails.
    pub async fn stage_upload(&self, project: ProjectId) -> Result<(FileId, ObjectWriter), StoreError> {
        let id = FileId(new_id());
        Ok((id, self.objects.stage(keys::file(project, id)).await?))
    }

    /// Ends an upload: the file exists from here on.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn create_file(&self, project: ProjectId, file: &NewFile, object: &ObjectRef) -> Result<File, StoreError> {
        let mut transaction = self.pool.begin().await?;
        objects::claim(&mut transaction, std::slice::from_ref(&object.key)).await?;
        let row = sqlx::query_as!(
            Row,
            "insert into files (id, project_id, filename, purpose, bytes, sha256, object_key, row_count)
             values ($1, $2, $3, $4, $5, $6, $7, $8)
             returning id, filename, purpose, bytes, sha256, object_key, row_count, created_at",
            file.id.0,
            project.0,
            file.filename,
            file.purpose,
            object.bytes.cast_signed(),
            &object.sha256[..],
            object.key,
            file.row_count.cast_signed()
        )
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        row.try_into()
    }

    /// One file.
    ///
    /// # Errors
    /// When the project has no such file, or the database fails.
    pub async fn file(&self, project: ProjectId, id: FileId) -> Result<File, StoreError> {
        sqlx::query_as!(
            Row,
            "select id, filename, purpose, bytes, sha256, object_key, row_count, created_at
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
        let rows = if page.ascending {
            sqlx::query_as!(
                Row,
                "select id, filename, purpose, bytes, sha256, object_key, row_count, created_at
                 from files where project_id = $1 and ($2::text is null or purpose = $2) and ($3::uuid is null or id > $3)
                 order by id limit $4",
                project.0,
                purpose,
                page.after,
                page.fetch()
            )
            .fetch_all(&self.pool)
            .await?
        } else {
            sqlx::query_as!(
                Row,
                "select id, filename, purpose, bytes, sha256, object_key, row_count, created_at
                 from files where project_id = $1 and ($2::text is null or purpose = $2) and ($3::uuid is null or id < $3)
                 order by id desc limit $4",
                project.0,
                purpose,
                page.after,
                page.fetch()
            )
            .fetch_all(&self.pool)
            .await?
        };
        Ok(Page::new(rows.into_iter().map(File::try_from).collect::<Result<_, _>>()?, &page))
    }

    /// Removes a file that no open job needs. Its object goes with the next sweep.
    ///
    /// # Errors
    /// When the project has no such file, a job that has not ended needs it, or the database fails.
    pub async fn delete_file(&self, project: ProjectId, id: FileId) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin().await?;
        // The lock keeps a job from being created with the file in between.
        let key =
            sqlx::query_scalar!("select object_key from files where project_id = $1 and id = $2 for update", project.0, id.0)
                .fetch_optional(&mut *transaction)
                .await?
                .ok_or(StoreError::NotFound)?;
        let needed_by = sqlx::query_scalar!(
            "select id from jobs where project_id = $1 and status in ('validating_files', 'queued', 'running')
             and (training_file_id = $2 or validation_file_id = $2) limit 1",
            project.0,
            id.0
        )
        .fetch_optional(&mut *transaction)
        .await?;
        if let Some(job) = needed_by {
            let job = holdfast_domain::ids::JobId(job);
            return Err(holdfast_domain::Invalid::new(
                "file_id",
                "file_in_use",
                format!("{id} is needed by {job}, which has not ended; cancel the job or wait for it"),
            )
            .into());
        }
        objects::disown(&mut transaction, &key).await?;
        sqlx::query!("delete from files where project_id = $1 and id = $2", project.0, id.0).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(())
    }
}
