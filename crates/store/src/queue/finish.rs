//! How a claim ends: with files accepted, a model, a failure, or the job back where it waits.

use holdfast_domain::ids::JobId;
use holdfast_domain::job::{AttemptEnd, JobError, JobState, Status};
use sqlx::PgConnection;

use super::{AdapterFile, notify};
use crate::error::to_json;
use crate::events::{self, Level};
use crate::files::{self, NewFile};
use crate::jobs::{self, Dataset, Job};
use crate::objects::{self, ObjectRef, keys};
use crate::projects::{lock_quotas, usage};
use crate::{Store, StoreError, attempts, evidence, fine_tuned_models, new_id, speeds};

/// What the check of a job's files found.
#[derive(Debug, Clone)]
pub struct Checked {
    /// In words.
    pub summary: String,
    /// What its owner should look at, though it keeps nothing from going on.
    pub warnings: Vec<String>,
    /// In numbers.
    pub dataset: Dataset,
}

/// What a finished run leaves to be published, all of it staged.
#[derive(Debug, Clone, Default)]
pub struct Published {
    /// The adapter's files.
    pub adapter: Vec<AdapterFile>,
    /// The figures of every step, as CSV.
    pub results: Option<ObjectRef>,
    /// The report and the manifest.
    pub evidence: Vec<AdapterFile>,
    /// How many suites of the operator's own the report is about.
    pub own_suites: usize,
    /// What its owner should know of it.
    pub note: Option<String>,
    /// Tokens of the training file that were read.
    pub trained_tokens: u64,
    /// Where it was trained.
    pub device: String,
}

impl Store {
    /// The check passed: the job waits to be trained. A job that would read more tokens than its project may in this month
    /// fails here, before it costs anything.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn accept_files(&self, id: JobId, attempt: i32, checked: &Checked) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        let most = lock_quotas(&mut transaction, job.project).await?.max_trained_tokens_per_month;
        let wanted = checked.dataset.tokens * u64::from(job.hyperparameters.n_epochs);
        let used = match most {
            Some(_) => usage(&mut transaction, job.project).await?.trained_tokens_this_month,
            None => 0,
        };
        if let Some(most) = most.filter(|most| used.saturating_add(wanted) > *most) {
            let message = format!(
                "The job would train on {wanted} tokens; the project has trained on {used} this month and may on {most}. Train fewer epochs or rows, wait for the next month (UTC), or ask the operator for more."
            );
            transaction.rollback().await?;
            return self.fail(id, attempt, JobError::new("insufficient_quota", message)).await;
        }
        let next = job.state.clone().accept_files()?;
        jobs::write_state(&mut transaction, &job, &next).await?;
        sqlx::query!("update jobs set dataset = $2, lost_workers = 0 where id = $1", id.0, to_json(&checked.dataset)?)
            .execute(&mut *transaction)
            .await?;
        attempts::end(&mut transaction, id, AttemptEnd::FilesAccepted, None).await?;
        events::message(&mut transaction, id, Level::Info, &checked.summary).await?;
        for warning in &checked.warnings {
            events::message(&mut transaction, id, Level::Warn, warning).await?;
        }
        events::message(&mut transaction, id, Level::Info, "Files validated, moving job to queued state").await?;
        notify(&mut transaction).await?;
        Ok(transaction.commit().await?)
    }

    /// The job ends without a model.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn fail(&self, id: JobId, attempt: i32, error: JobError) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        let message = error.message.clone();
        let next = job.state.clone().fail(error)?;
        jobs::write_state(&mut transaction, &job, &next).await?;
        attempts::end(&mut transaction, id, AttemptEnd::Failed, Some(&message)).await?;
        events::message(&mut transaction, id, Level::Error, &message).await?;
        Ok(transaction.commit().await?)
    }

    /// The worker gives the job back, because it stops.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn give_back(&self, id: JobId, attempt: i32) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        let next = job.state.clone().give_back()?;
        jobs::write_state(&mut transaction, &job, &next).await?;
        let (end, message) = match next.status() {
            Status::Paused => (AttemptEnd::Paused, "The job is paused; it goes on from its last checkpoint once it is resumed"),
            _ => (AttemptEnd::Returned, "The worker was stopped; the job waits for another"),
        };
        attempts::end(&mut transaction, id, end, Some(message)).await?;
        events::message(&mut transaction, id, Level::Info, message).await?;
        notify(&mut transaction).await?;
        Ok(transaction.commit().await?)
    }

    /// The attempt came to nothing, for a reason that another may not meet: as if its worker were lost, but at once.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn set_back(&self, id: JobId, attempt: i32, error: JobError) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        set_back(&mut transaction, &job, error).await?;
        Ok(transaction.commit().await?)
    }

    /// Something that every worker needs is not to be had; the job waits for it. `reason` is for its owner.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn delay(&self, id: JobId, attempt: i32, reason: &str) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        let next = job.state.clone().give_back()?;
        jobs::write_state(&mut transaction, &job, &next).await?;
        attempts::end(&mut transaction, id, AttemptEnd::Delayed, Some(reason)).await?;
        events::message(&mut transaction, id, Level::Warn, &format!("{reason}; the job is tried again by itself")).await?;
        Ok(transaction.commit().await?)
    }

    /// Where an adapter's files go: each call is another place, which gives each name its key.
    pub fn adapter_keys(job: &Job, attempt: i32) -> impl Fn(&str) -> String {
        let (project, job, time) = (job.project, job.id, new_id());
        move |name| keys::adapter(project, job, attempt, time, name)
    }

    /// Where the figures of a job's steps go: each call is another place.
    #[must_use]
    pub fn results_key(job: &Job, attempt: i32) -> String {
        keys::results(job.project, job.id, attempt, new_id())
    }

    /// Where a job's evidence goes: each call is another place.
    pub fn evidence_keys(job: &Job, attempt: i32) -> impl Fn(&str) -> String {
        let (project, job, time) = (job.project, job.id, new_id());
        move |name| keys::evidence(project, job, attempt, time, name)
    }

    /// The job has made its model: rows for it and its files appear, and the job succeeds, in one transaction.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job; nothing has then changed, and the staged objects are
    /// swept.
    pub async fn publish(&self, id: JobId, attempt: i32, published: &Published) -> Result<String, StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        let model = job.model_name();
        let next = job.state.clone().succeed(model.clone(), published.trained_tokens.cast_signed())?;
        jobs::write_state(&mut transaction, &job, &next).await?;
        claim_objects(&mut transaction, &job, published).await?;
        evidence::insert(&mut transaction, id, published).await?;
        for file in &published.adapter {
            sqlx::query!(
                "insert into adapter_files (job_id, name, object_key, bytes, sha256) values ($1, $2, $3, $4, $5)",
                id.0,
                file.name,
                file.object.key,
                file.object.bytes.cast_signed(),
                &file.object.sha256[..]
            )
            .execute(&mut *transaction)
            .await?;
        }
        let base_model = fine_tuned_models::insert(&mut transaction, id, &model).await?;
        speeds::keep(&mut transaction, &job, base_model, &published.device).await?;
        attempts::end(&mut transaction, id, AttemptEnd::Succeeded, None).await?;
        if let Some(note) = &published.note {
            events::message(&mut transaction, id, Level::Warn, note).await?;
        }
        events::message(&mut transaction, id, Level::Info, &format!("New fine-tuned model created: {model}")).await?;
        events::message(&mut transaction, id, Level::Info, "The job has successfully completed").await?;
        transaction.commit().await?;
        Ok(model)
    }

    /// Gives jobs whose lease has expired back to the queue, or fails them when their attempts are spent. Returns how many. One
    /// that cannot be given back does not keep the others from it.
    ///
    /// # Errors
    /// When the database cannot be asked.
    pub async fn reap(&self) -> Result<u64, StoreError> {
        let expired = sqlx::query_scalar!("select job_id from job_leases where expires_at < now() order by random() limit 100")
            .fetch_all(&self.pool)
            .await?;
        let mut reaped = 0;
        for id in expired.into_iter().map(JobId) {
            match self.reap_one(id).await {
                Ok(is_reaped) => reaped += u64::from(is_reaped),
                Err(error) if error.is_unavailable() => return Err(error),
                Err(error) => tracing::error!(%error, job = %id, "a lost worker's job cannot be returned to the queue"),
            }
        }
        Ok(reaped)
    }

    async fn reap_one(&self, id: JobId) -> Result<bool, StoreError> {
        let mut transaction = self.pool.begin().await?;
        // A process that stands still with the job's row is not waited for: its session ends, and the next look finds the row free.
        let free = sqlx::query_scalar!("select 1 as one from jobs where id = $1 for update skip locked", id.0)
            .fetch_optional(&mut *transaction)
            .await?;
        if free.is_none() {
            return Ok(false);
        }
        let job = jobs::fetch(&mut transaction, id, None).await?;
        // Its worker may have renewed or finished in between.
        let gone = sqlx::query!("delete from job_leases where job_id = $1 and expires_at < now()", id.0)
            .execute(&mut *transaction)
            .await?;
        if gone.rows_affected() == 0 {
            transaction.rollback().await?;
            return Ok(false);
        }
        let lost = "The worker was lost: it died, or was out of touch for longer than its lease. Nothing of your data is lost; if the job fails for this, create it again, or ask the operator why its workers stop.";
        set_back(&mut transaction, &job, JobError::new("worker_lost", lost)).await?;
        transaction.commit().await?;
        Ok(true)
    }
}

/// Takes what a run left into the transaction's keeping, and gives its step table the row of a file.
pub(crate) async fn claim_objects(connection: &mut PgConnection, job: &Job, made: &Published) -> Result<(), StoreError> {
    let files = made.adapter.iter().chain(&made.evidence).map(|file| &file.object);
    let keys: Vec<String> = files.chain(&made.results).map(|object| object.key.clone()).collect();
    objects::claim(connection, &keys).await?;
    let Some(results) = &made.results else { return Ok(()) };
    let file = NewFile {
        id: Store::new_file_id(),
        filename: "step_metrics.csv".into(),
        purpose: "fine-tune-results".into(),
        row_count: 0,
        errors: None,
        lifetime: None,
    };
    files::insert(connection, job.project, &file, &results.clone().into()).await?;
    sqlx::query!("update jobs set result_file_id = $2 where id = $1", job.id.0, file.id.0).execute(connection).await?;
    Ok(())
}

/// Counts a setback, and returns the job to where it waits or fails it.
async fn set_back(connection: &mut PgConnection, job: &Job, error: JobError) -> Result<(), StoreError> {
    let setbacks =
        sqlx::query_scalar!("update jobs set lost_workers = lost_workers + 1 where id = $1 returning lost_workers", job.id.0)
            .fetch_one(&mut *connection)
            .await?;
    let reason = error.message.clone();
    let next = job.state.clone().set_back(setbacks, error)?;
    jobs::write_state(connection, job, &next).await?;
    attempts::end(connection, job.id, AttemptEnd::SetBack, Some(&reason)).await?;
    let (level, message) = match &next {
        JobState::Failed { error } => (Level::Error, error.message.clone()),
        JobState::Paused { .. } => {
            (Level::Warn, format!("{reason} The job is paused; it goes on from its last checkpoint once it is resumed"))
        }
        _ => (Level::Warn, format!("{reason} The job waits for another attempt")),
    };
    events::message(connection, job.id, level, &message).await?;
    notify(connection).await
}
