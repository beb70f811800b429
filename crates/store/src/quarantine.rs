//! Adapters that did not pass the gate: kept from everybody until an operator releases them.

use holdfast_domain::Invalid;
use holdfast_domain::ids::{JobId, ProjectId};
use holdfast_domain::job::{AttemptEnd, JobError};
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::events::{self, Level};
use crate::queue::{AdapterFile, Published};
use crate::{Page, PageRequest, Store, StoreError, attempts, checkpoints, evidence, fine_tuned_models, jobs, objects, queue};

/// What is known of an adapter that was kept apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantined {
    /// The job that made it.
    pub job: JobId,
    /// The job's owner.
    pub project: ProjectId,
    /// The owner's organisation.
    pub organization: String,
    /// What the model is called once it is released.
    pub model: String,
    /// Why it is kept apart, as its job's error says; absent where only checkpoints were.
    pub reason: Option<String>,
    /// Since when.
    pub created_at: OffsetDateTime,
    /// When it was released, and why.
    pub released: Option<Release>,
    /// When its files were discarded.
    pub discarded_at: Option<OffsetDateTime>,
}

/// An operator's word that an adapter may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// When.
    pub at: OffsetDateTime,
    /// Why, for its owner.
    pub reason: String,
}

/// The longest reason of a release, in characters.
pub const MAX_REASON_CHARS: usize = 1000;

struct Row {
    job_id: Uuid,
    project_id: Uuid,
    organization: String,
    name: String,
    reason: Option<String>,
    created_at: OffsetDateTime,
    released_at: Option<OffsetDateTime>,
    release_reason: Option<String>,
    discarded_at: Option<OffsetDateTime>,
}

impl From<Row> for Quarantined {
    fn from(row: Row) -> Self {
        Self {
            job: JobId(row.job_id),
            project: ProjectId(row.project_id),
            organization: row.organization,
            model: row.name,
            reason: row.reason,
            created_at: row.created_at,
            released: row.released_at.zip(row.release_reason).map(|(at, reason)| Release { at, reason }),
            discarded_at: row.discarded_at,
        }
    }
}

impl Store {
    /// The job ends without a model because what it made did not pass; the adapter is kept apart, the evidence is its owner's.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job; nothing has then changed.
    pub async fn quarantine(&self, id: JobId, attempt: i32, made: &Published, error: JobError) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        let message = error.message.clone();
        let next = job.state.clone().fail(error)?;
        jobs::write_state(&mut transaction, &job, &next).await?;
        queue::claim_objects(&mut transaction, &job, made).await?;
        sqlx::query!("insert into quarantined_adapters (job_id, name) values ($1, $2)", id.0, job.model_name())
            .execute(&mut *transaction)
            .await?;
        for AdapterFile { name, object } in &made.adapter {
            sqlx::query!(
                "insert into quarantined_files (job_id, name, object_key, bytes, sha256) values ($1, $2, $3, $4, $5)",
                id.0,
                name,
                object.key,
                object.bytes.cast_signed(),
                &object.sha256[..]
            )
            .execute(&mut *transaction)
            .await?;
        }
        evidence::insert(&mut transaction, id, made).await?;
        attempts::end(&mut transaction, id, AttemptEnd::Failed, Some(&message)).await?;
        events::message(&mut transaction, id, Level::Error, &message).await?;
        Ok(transaction.commit().await?)
    }

    /// Adapters that are or were kept apart, the newest first; with `held`, those alone that still are.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn quarantined(&self, held: bool, page: PageRequest) -> Result<Page<Quarantined>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            "select q.job_id, j.project_id, p.organization, q.name, j.error->>'message' as reason, q.created_at, q.released_at,
                    q.release_reason, q.discarded_at
             from quarantined_adapters q join jobs j on j.id = q.job_id join projects p on p.id = j.project_id
             where (not $1 or q.released_at is null and q.discarded_at is null) and ($2::uuid is null or q.job_id < $2) order by q.job_id desc limit $3",
            held,
            page.after,
            page.fetch()
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(Page::new(rows.into_iter().map(Quarantined::from).collect(), &page))
    }

    /// Gives what the gate keeps back to its owner: the model appears under its name, and checkpoints can be had, also of a job that
    /// passed, or ended otherwise. The job stays as it ended: what was found stays found.
    ///
    /// # Errors
    /// When the job has not ended, nothing of it is kept back, the reason is empty or too long, or the database fails.
    pub async fn release(&self, id: JobId, reason: &str) -> Result<Quarantined, StoreError> {
        let length = reason.trim().chars().count();
        if !(1..=MAX_REASON_CHARS).contains(&length) || reason.contains('\0') {
            let message = format!("a release needs a reason of 1 to {MAX_REASON_CHARS} characters, which the owner reads");
            return Err(Invalid::new("reason", "invalid_text", message).into());
        }
        let mut transaction = self.pool.begin().await?;
        let job = jobs::lock(&mut transaction, id, None).await?;
        let not_now = |message: String| Err(Invalid::new("fine_tuning_job_id", "invalid_state", message).into());
        if !job.holds_back_checkpoints() {
            return not_now(format!("nothing of {id} is kept back"));
        }
        // What is not made yet is released by nobody: its gate has still to decide.
        if !job.state.status().is_terminal() {
            return not_now(format!("{id} has not ended; what it made can be released once its gate has decided"));
        }
        let is_discarded = match fetch(&mut transaction, id).await {
            Ok(kept) => kept.discarded_at.is_some(),
            // Of a job that passed, checkpoints alone are kept back.
            Err(StoreError::NotFound) => false,
            Err(error) => return Err(error),
        };
        if is_discarded {
            return not_now(format!("the adapter of {id} was discarded; there is nothing to release"));
        }
        sqlx::query!(
            "insert into quarantined_adapters (job_id, name, released_at, release_reason) values ($1, $2, now(), $3)
             on conflict (job_id) do update set released_at = excluded.released_at, release_reason = excluded.release_reason",
            id.0,
            job.model_name(),
            reason.trim()
        )
        .execute(&mut *transaction)
        .await?;
        let moved = sqlx::query!(
            "with moved as (delete from quarantined_files where job_id = $1 returning job_id, name, object_key, bytes, sha256)
             insert into adapter_files (job_id, name, object_key, bytes, sha256) select * from moved",
            id.0
        )
        .execute(&mut *transaction)
        .await?;
        if moved.rows_affected() > 0 {
            fine_tuned_models::insert(&mut transaction, id, &job.model_name()).await?;
        }
        let message = format!("The operator released what the safety gate kept back: {}", reason.trim());
        events::message(&mut transaction, id, Level::Warn, &message).await?;
        let released = fetch(&mut transaction, id).await?;
        transaction.commit().await?;
        Ok(released)
    }

    /// Removes the files of an adapter that is kept apart, and its job's checkpoints, which are kept back with it. The job stays as it
    /// ended, with its report and manifest.
    ///
    /// # Errors
    /// When none of the job's is kept apart, it was released or discarded, or the database fails.
    pub async fn discard_quarantined(&self, id: JobId) -> Result<Quarantined, StoreError> {
        let mut transaction = self.pool.begin().await?;
        jobs::lock(&mut transaction, id, None).await?;
        let keys = sqlx::query_scalar!("delete from quarantined_files where job_id = $1 returning object_key", id.0)
            .fetch_all(&mut *transaction)
            .await?;
        if keys.is_empty() {
            let message = format!("no adapter of {id} is kept apart");
            return Err(Invalid::new("fine_tuning_job_id", "invalid_state", message).into());
        }
        objects::disown(&mut transaction, &keys).await?;
        checkpoints::remove_all(&mut transaction, id).await?;
        sqlx::query!("update quarantined_adapters set discarded_at = now() where job_id = $1", id.0)
            .execute(&mut *transaction)
            .await?;
        events::message(&mut transaction, id, Level::Warn, "The operator discarded the adapter that the safety gate kept back")
            .await?;
        let discarded = fetch(&mut transaction, id).await?;
        transaction.commit().await?;
        Ok(discarded)
    }
}

async fn fetch(connection: &mut PgConnection, job: JobId) -> Result<Quarantined, StoreError> {
    let row = sqlx::query_as!(
        Row,
        "select q.job_id, j.project_id, p.organization, q.name, j.error->>'message' as reason, q.created_at, q.released_at,
                q.release_reason, q.discarded_at
         from quarantined_adapters q join jobs j on j.id = q.job_id join projects p on p.id = j.project_id where q.job_id = $1",
        job.0
    )
    .fetch_optional(connection)
    .await?;
    row.map(Quarantined::from).ok_or(StoreError::NotFound)
}
