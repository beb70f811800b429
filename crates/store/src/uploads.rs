//! Files that come in parts. Each part is an object; the file that they become is those objects one behind the other.

use std::collections::HashSet;
use std::time::Duration;

use holdfast_domain::Invalid;
use holdfast_domain::ids::{FileId, PartId, ProjectId, UploadId};
use holdfast_domain::limits::{MAX_PARTS_PER_UPLOAD, UPLOAD_LIFETIME_SECONDS};
use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::error::changed_one;
use crate::files::{self, File, NewFile, check_room};
use crate::objects::{self, Content, ObjectRef, ObjectWriter, keys};
use crate::once::{self, Once};
use crate::{Store, StoreError, new_id};

/// Where an upload is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UploadState {
    /// It takes parts.
    Pending,
    /// It has become a file.
    Completed(FileId),
    /// Its owner gave it up.
    Cancelled,
    /// Its time was over before it was completed.
    Expired,
}

impl UploadState {
    /// The word the wire uses.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Completed(_) => "completed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }
}

/// An upload's row.
#[derive(Debug, Clone)]
pub struct Upload {
    /// Its id.
    pub id: UploadId,
    /// The name of the file it becomes.
    pub filename: String,
    /// What that file is for.
    pub purpose: String,
    /// What the parts must come to.
    pub bytes: u64,
    /// Where it is in its life.
    pub state: UploadState,
    /// How long the file is kept.
    pub file_lifetime: Option<Duration>,
    /// When it was begun.
    pub created_at: OffsetDateTime,
    /// Until when it takes parts.
    pub expires_at: OffsetDateTime,
}

/// An upload to be begun.
#[derive(Debug, Clone)]
pub struct NewUpload {
    /// The name of the file it becomes.
    pub filename: String,
    /// What that file is for.
    pub purpose: String,
    /// Its media type.
    pub mime_type: String,
    /// What the parts must come to.
    pub bytes: u64,
    /// How long the file is kept.
    pub file_lifetime: Option<Duration>,
}

/// A part's row.
#[derive(Debug, Clone)]
pub struct Part {
    /// Its id.
    pub id: PartId,
    /// Its object.
    pub key: String,
    /// Its length.
    pub bytes: u64,
    /// When it came.
    pub created_at: OffsetDateTime,
}

struct Row {
    id: Uuid,
    filename: String,
    purpose: String,
    bytes: i64,
    status: String,
    file_id: Option<Uuid>,
    file_lifetime_seconds: Option<i64>,
    created_at: OffsetDateTime,
    expires_at: OffsetDateTime,
    is_over: bool,
}

impl TryFrom<Row> for Upload {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let id = UploadId(row.id);
        let state = match (row.status.as_str(), row.file_id) {
            ("pending", None) if row.is_over => UploadState::Expired,
            ("pending", None) => UploadState::Pending,
            ("completed", Some(file)) => UploadState::Completed(FileId(file)),
            ("cancelled", None) => UploadState::Cancelled,
            _ => return Err(StoreError::Corrupt(format!("status of {id}"))),
        };
        Ok(Self {
            id,
            filename: row.filename,
            purpose: row.purpose,
            bytes: row.bytes.unsigned_abs(),
            state,
            file_lifetime: row.file_lifetime_seconds.map(|s| Duration::from_secs(s.unsigned_abs())),
            created_at: row.created_at,
            expires_at: row.expires_at,
        })
    }
}

impl Upload {
    /// Makes sure that it takes parts, and can be completed and cancelled.
    ///
    /// # Errors
    /// When it has ended, in whatever way.
    pub fn must_be_pending(&self) -> Result<(), Invalid> {
        if self.state == UploadState::Pending {
            return Ok(());
        }
        let message = format!("this upload is {}; begin another", self.state.as_str());
        Err(Invalid::new("upload_id", "invalid_state", message))
    }
}

impl Store {
    /// Begins an upload.
    ///
    /// # Errors
    /// When it is more than the project may store, or the database fails.
    pub async fn create_upload(&self, project: ProjectId, new: &NewUpload, once: Option<&Once>) -> Result<Upload, StoreError> {
        let id = new_id();
        let mut connection = self.tenant(project).await?;
        let mut transaction = connection.begin().await?;
        if let Some(made) = once::admit(&mut transaction, once, id).await? {
            return read(&mut transaction, project, UploadId(made), false).await;
        }
        check_room(&mut transaction, project, new.bytes).await?;
        sqlx::query!(
            "insert into uploads (id, project_id, filename, purpose, mime_type, bytes, status, file_lifetime_seconds, expires_at)
             values ($1, $2, $3, $4, $5, $6, 'pending', $7, now() + make_interval(secs => $8))",
            id,
            project.0,
            new.filename,
            new.purpose,
            new.mime_type,
            new.bytes.cast_signed(),
            new.file_lifetime.map(|l| l.as_secs().cast_signed()),
            UPLOAD_LIFETIME_SECONDS as f64
        )
        .execute(&mut *transaction)
        .await?;
        let upload = read(&mut transaction, project, UploadId(id), false).await?;
        transaction.commit().await?;
        Ok(upload)
    }

    /// One upload.
    ///
    /// # Errors
    /// When the project has no such upload, or the database fails.
    pub async fn upload(&self, project: ProjectId, id: UploadId) -> Result<Upload, StoreError> {
        let mut connection = self.tenant(project).await?;
        read(&mut connection, project, id, false).await
    }

    /// Begins a part: its id, and where its bytes go.
    ///
    /// # Errors
    /// When the database or the object store fails.
    pub async fn stage_part(&self, project: ProjectId, upload: UploadId) -> Result<(PartId, ObjectWriter), StoreError> {
        let id = PartId(new_id());
        Ok((id, self.objects.stage(keys::part(project, upload, id)).await?))
    }

    /// Ends a part: it belongs to the upload from here on.
    ///
    /// # Errors
    /// When the upload takes no parts any more or would hold too many, or the database fails.
    pub async fn add_part(
        &self,
        project: ProjectId,
        upload: UploadId,
        id: PartId,
        object: &ObjectRef,
    ) -> Result<Part, StoreError> {
        let mut connection = self.tenant(project).await?;
        let mut transaction = connection.begin().await?;
        let row = read(&mut transaction, project, upload, true).await?;
        row.must_be_pending()?;
        let there = sqlx::query!(
            "select count(*) as \"count!\", coalesce(sum(bytes), 0)::bigint as \"bytes!\" from upload_parts where upload_id = $1",
            upload.0
        )
        .fetch_one(&mut *transaction)
        .await?;
        if there.count >= MAX_PARTS_PER_UPLOAD as i64 {
            let message = format!("an upload takes at most {MAX_PARTS_PER_UPLOAD} parts; make them larger");
            return Err(Invalid::new("data", "too_many_parts", message).into());
        }
        // A part that was sent twice may stay unused, but not without end.
        if there.bytes.unsigned_abs() + object.bytes > 2 * row.bytes {
            let message = format!("the parts hold far more than the {} bytes this upload was begun for", row.bytes);
            return Err(Invalid::new("data", "too_many_bytes", message).into());
        }
        objects::claim(&mut transaction, std::slice::from_ref(&object.key)).await?;
        let created_at = sqlx::query_scalar!(
            "insert into upload_parts (id, upload_id, object_key, bytes) values ($1, $2, $3, $4) returning created_at",
            id.0,
            upload.0,
            object.key,
            object.bytes.cast_signed()
        )
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(Part { id, key: object.key.clone(), bytes: object.bytes, created_at })
    }

    /// The parts of an upload in the order of `ids`.
    ///
    /// # Errors
    /// When one is not a part of the upload or stands twice, or the database fails.
    pub async fn parts(&self, project: ProjectId, upload: UploadId, ids: &[PartId]) -> Result<Vec<Part>, StoreError> {
        let mut connection = self.tenant(project).await?;
        let rows = sqlx::query!(
            "select p.id, p.object_key, p.bytes, p.created_at from upload_parts p join uploads u on u.id = p.upload_id
             where u.project_id = $1 and u.id = $2",
            project.0,
            upload.0
        )
        .fetch_all(&mut *connection)
        .await?;
        let mut known: std::collections::HashMap<Uuid, Part> = rows
            .into_iter()
            .map(|r| {
                let part = Part { id: PartId(r.id), key: r.object_key, bytes: r.bytes.unsigned_abs(), created_at: r.created_at };
                (r.id, part)
            })
            .collect();
        let part = |(i, id): (usize, &PartId)| {
            known.remove(&id.0).ok_or_else(|| {
                let message = format!("{id} is not a part of {upload}, or stands in the list twice");
                Invalid::new(format!("part_ids[{i}]"), "part_not_found", message).into()
            })
        };
        ids.iter().enumerate().map(part).collect()
    }

    /// An upload becomes a file of `parts`, one behind the other; parts it has beside these are given up.
    ///
    /// # Errors
    /// When the upload takes no parts any more, or the database fails.
    pub async fn complete_upload(
        &self,
        project: ProjectId,
        id: UploadId,
        file: &NewFile,
        content: &Content,
    ) -> Result<(Upload, File), StoreError> {
        let mut connection = self.tenant(project).await?;
        let mut transaction = connection.begin().await?;
        let upload = read(&mut transaction, project, id, true).await?;
        upload.must_be_pending()?;
        let held = sqlx::query_scalar!("delete from upload_parts where upload_id = $1 returning object_key", id.0)
            .fetch_all(&mut *transaction)
            .await?;
        let used: HashSet<&String> = content.keys.iter().collect();
        let unused: Vec<String> = held.into_iter().filter(|key| !used.contains(key)).collect();
        objects::disown(&mut transaction, &unused).await?;
        let file = files::insert(&mut transaction, project, file, content).await?;
        let changed = sqlx::query!(
            "update uploads set status = 'completed', file_id = $3 where project_id = $1 and id = $2 and status = 'pending'",
            project.0,
            id.0,
            file.id.0
        )
        .execute(&mut *transaction)
        .await?;
        changed_one(&changed)?;
        transaction.commit().await?;
        Ok((Upload { state: UploadState::Completed(file.id), ..upload }, file))
    }

    /// An upload is given up, with its parts. Of a request that was served before, what it left comes back.
    ///
    /// # Errors
    /// When it is no longer pending, or the database fails.
    pub async fn cancel_upload(&self, project: ProjectId, id: UploadId, once: Option<&Once>) -> Result<Upload, StoreError> {
        let mut connection = self.tenant(project).await?;
        let mut transaction = connection.begin().await?;
        let upload = read(&mut transaction, project, id, true).await?;
        if once::admit(&mut transaction, once, id.0).await?.is_some() {
            return Ok(upload);
        }
        upload.must_be_pending()?;
        give_up_parts(&mut transaction, id).await?;
        let changed = sqlx::query!(
            "update uploads set status = 'cancelled' where project_id = $1 and id = $2 and status = 'pending'",
            project.0,
            id.0
        )
        .execute(&mut *transaction)
        .await?;
        changed_one(&changed)?;
        transaction.commit().await?;
        Ok(Upload { state: UploadState::Cancelled, ..upload })
    }

    /// Gives up the parts of uploads whose time is over. Returns how many uploads.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn remove_expired_uploads(&self) -> Result<u64, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let expired = sqlx::query_scalar!(
            "select id from uploads u where status = 'pending' and expires_at < now()
               and exists (select 1 from upload_parts p where p.upload_id = u.id)
             order by expires_at limit 100 for update skip locked"
        )
        .fetch_all(&mut *transaction)
        .await?;
        for id in &expired {
            give_up_parts(&mut transaction, UploadId(*id)).await?;
        }
        transaction.commit().await?;
        Ok(expired.len() as u64)
    }
}

async fn read(connection: &mut PgConnection, project: ProjectId, id: UploadId, lock: bool) -> Result<Upload, StoreError> {
    if lock {
        sqlx::query_scalar!("select 1 as one from uploads where project_id = $1 and id = $2 for update", project.0, id.0)
            .fetch_optional(&mut *connection)
            .await?
            .ok_or(StoreError::NotFound)?;
    }
    sqlx::query_as!(
        Row,
        "select id, filename, purpose, bytes, status, file_id, file_lifetime_seconds, created_at, expires_at,
                expires_at <= now() as \"is_over!\"
         from uploads where project_id = $1 and id = $2",
        project.0,
        id.0
    )
    .fetch_optional(connection)
    .await?
    .ok_or(StoreError::NotFound)?
    .try_into()
}

async fn give_up_parts(connection: &mut PgConnection, upload: UploadId) -> Result<(), StoreError> {
    let keys = sqlx::query_scalar!("delete from upload_parts where upload_id = $1 returning object_key", upload.0)
        .fetch_all(&mut *connection)
        .await?;
    objects::disown(connection, &keys).await
}
