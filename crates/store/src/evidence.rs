//! The evidence of jobs: safety reports and signed manifests; and the public keys they are checked with.

use holdfast_domain::ids::{JobId, ProjectId};
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::files::object_ref;
use crate::objects::{self, ObjectRef};
use crate::queue::Published;
use crate::{Store, StoreError};

/// The public half of a key that workers sign with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SigningKey {
    /// What signatures name it by.
    pub id: String,
    /// In PEM.
    pub pem: String,
    /// When a worker first had it.
    pub created_at: OffsetDateTime,
}

impl Store {
    /// A piece of a job's evidence.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when the project has no such job, or it no such evidence; or when the database fails.
    pub async fn evidence(&self, project: ProjectId, job: JobId, name: &str) -> Result<ObjectRef, StoreError> {
        let mut connection = self.tenant(project).await?;
        find(&mut connection, job, name).await
    }

    /// The same for the operator, of any project's job.
    ///
    /// # Errors
    /// As [`Self::evidence`].
    pub async fn evidence_for_operator(&self, job: JobId, name: &str) -> Result<ObjectRef, StoreError> {
        find(&mut *self.pool.acquire().await?, job, name).await
    }

    /// Makes the public half of a worker's key known.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn know_signing_key(&self, id: &str, pem: &str) -> Result<(), StoreError> {
        sqlx::query!("insert into signing_keys (id, pem) values ($1, $2) on conflict do nothing", id, pem)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Every key that a worker has signed with, the newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn signing_keys(&self) -> Result<Vec<SigningKey>, StoreError> {
        Ok(sqlx::query_as!(SigningKey, "select id, pem, created_at from signing_keys order by created_at desc, id")
            .fetch_all(&self.pool)
            .await?)
    }
}

async fn find(connection: &mut PgConnection, job: JobId, name: &str) -> Result<ObjectRef, StoreError> {
    let row = sqlx::query!("select object_key, bytes, sha256 from job_evidence where job_id = $1 and name = $2", job.0, name)
        .fetch_optional(connection)
        .await?
        .ok_or(StoreError::NotFound)?;
    object_ref(row.object_key, row.bytes, &row.sha256)
}

pub(crate) async fn insert(connection: &mut PgConnection, job: JobId, published: &Published) -> Result<(), StoreError> {
    for file in &published.evidence {
        sqlx::query!(
            "insert into job_evidence (job_id, name, object_key, bytes, sha256, own_suites) values ($1, $2, $3, $4, $5, $6)",
            job.0,
            file.name,
            file.object.key,
            file.object.bytes.cast_signed(),
            &file.object.sha256[..],
            i32::try_from(published.own_suites).unwrap_or(i32::MAX)
        )
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// What a report quotes of its owner's rows, by the name it is kept under.
pub const TEXTS: &str = "worst_rows.jsonl";

/// Gives up what reports quote of files that go.
pub(crate) async fn forget_texts(connection: &mut PgConnection, files: &[Uuid]) -> Result<(), StoreError> {
    if files.is_empty() {
        return Ok(());
    }
    let keys = sqlx::query_scalar!(
        "delete from job_evidence e using jobs j where j.id = e.job_id and j.training_file_id = any($1) and e.name = $2
         returning e.object_key",
        files,
        TEXTS
    )
    .fetch_all(&mut *connection)
    .await?;
    objects::disown(connection, &keys).await
}
