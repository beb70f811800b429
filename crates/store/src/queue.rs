//! What workers do to jobs: claim, renew, report, finish. A claim commits at once; everything after it happens under a lease
//! that the database's clock ends, and every write names the attempt that makes it, so that a worker that lost its lease
//! changes nothing.

use std::time::Duration;

use holdfast_domain::ids::JobId;
use holdfast_domain::job::{JobError, JobState};
use holdfast_domain::model_name;
use holdfast_domain::progress::{Progress as Line, Step};
use sqlx::{PgConnection, Postgres, Transaction};

use crate::base_models::BaseModelFiles;
use crate::error::{changed_one, to_json};
use crate::events::{self, Level};
use crate::files::File;
use crate::jobs::{self, Job, Progress};
use crate::objects::{self, ObjectRef, keys};
use crate::{Store, StoreError};

/// Where a hint is sent that a job may be claimed.
pub(crate) const CHANNEL: &str = "holdfast_jobs";

/// A job that a worker holds, with what it needs to run it.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The job, in the state it was claimed into.
    pub job: Job,
    /// What is to be done.
    pub work: Work,
    /// The claim's number.
    pub attempt: i32,
    /// The base model's files.
    pub base: BaseModelFiles,
    /// The training file.
    pub training: File,
    /// The validation file.
    pub validation: Option<File>,
    /// The alignment rows.
    pub alignment: Option<ObjectRef>,
}

/// What a claim is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Check the files against the model's template and tokenizer.
    Check,
    /// Train.
    Train,
}

/// An adapter's file that has been written to the object store.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    /// Its name, as `adapter_model.safetensors`.
    pub name: String,
    /// Its bytes.
    pub object: ObjectRef,
}

impl Store {
    /// Takes the oldest job that waits, for `lease` from now. `None` when none waits.
    ///
    /// # Errors
    /// When the database fails. A claim whose files are gone fails the job and returns `None`.
    pub async fn claim(&self, worker: &str, lease: Duration) -> Result<Option<Claim>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let found = sqlx::query_scalar!(
            "select j.id from jobs j
             where j.status in ('validating_files', 'queued') and not exists (select 1 from job_leases l where l.job_id = j.id)
             order by j.id limit 1 for update of j skip locked"
        )
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(id) = found.map(JobId) else { return Ok(None) };
        let job = jobs::fetch(&mut transaction, id, None).await?;
        let next = job.state.clone().claim()?;
        let attempt = jobs::attempt_of(&next);
        jobs::write_state(&mut transaction, &job, &next).await?;
        sqlx::query!(
            "insert into job_leases (job_id, attempt, worker, expires_at) values ($1, $2, $3, now() + make_interval(secs => $4))",
            id.0,
            attempt,
            worker,
            lease.as_secs_f64()
        )
        .execute(&mut *transaction)
        .await?;
        let work = match next {
            JobState::Running { .. } => {
                events::message(&mut transaction, id, Level::Info, "Fine-tuning job started").await?;
                Work::Train
            }
            _ => Work::Check,
        };
        transaction.commit().await?;

        let job = Job { state: next, ..job };
        match self.inputs(&job).await {
            Ok((base, training, validation, alignment)) => {
                Ok(Some(Claim { job, work, attempt, base, training, validation, alignment }))
            }
            Err(StoreError::NotFound) => {
                let error =
                    JobError::new("file_not_found", "A file of this job was deleted. Upload it again and create the job anew.")
                        .about("training_file");
                self.fail(id, attempt, error).await?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn inputs(&self, job: &Job) -> Result<(BaseModelFiles, File, Option<File>, Option<ObjectRef>), StoreError> {
        let base = self.base_model_files(&job.base_model).await?;
        let training = self.file(job.project, job.training_file).await?;
        let validation = match job.validation_file {
            Some(file) => Some(self.file(job.project, file).await?),
            None => None,
        };
        let alignment = match job.alignment_set_id {
            Some(id) => Some(self.alignment_set_by_id(id).await?.object),
            None => None,
        };
        Ok((base, training, validation, alignment))
    }

    /// Renews a lease for `lease` from now.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job: it must stop.
    pub async fn heartbeat(&self, job: JobId, attempt: i32, lease: Duration) -> Result<(), StoreError> {
        let renewed = sqlx::query!(
            "update job_leases set expires_at = now() + make_interval(secs => $3) where job_id = $1 and attempt = $2 and expires_at > now()",
            job.0,
            attempt,
            lease.as_secs_f64()
        )
        .execute(&self.pool)
        .await?;
        changed_one(&renewed)
    }

    /// The check passed: the job waits to be trained.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn accept_files(&self, id: JobId, attempt: i32, summary: &str) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        let next = job.state.clone().accept_files()?;
        jobs::write_state(&mut transaction, &job, &next).await?;
        drop_lease(&mut transaction, id).await?;
        events::message(&mut transaction, id, Level::Info, summary).await?;
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
        drop_lease(&mut transaction, id).await?;
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
        drop_lease(&mut transaction, id).await?;
        events::message(&mut transaction, id, Level::Warn, "The worker was stopped; the job waits for another").await?;
        notify(&mut transaction).await?;
        Ok(transaction.commit().await?)
    }

    /// The worker could not go on, through no fault of the job: as if it were lost, but at once.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn give_up(&self, id: JobId, attempt: i32) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        drop_lease(&mut transaction, id).await?;
        lose_worker(&mut transaction, &job).await?;
        Ok(transaction.commit().await?)
    }

    /// Writes lines a trainer reported: the phase and progress of the job, its metrics, and events for its owner.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn report(&self, id: JobId, attempt: i32, lines: &[Line]) -> Result<(), StoreError> {
        let (mut transaction, _) = self.hold(id, attempt).await?;
        let mut steps: Vec<&Step> = Vec::new();
        for line in lines {
            match line {
                Line::Phase { phase } => {
                    sqlx::query!("update jobs set phase = $2 where id = $1", id.0, phase.as_str())
                        .execute(&mut *transaction)
                        .await?;
                }
                Line::Started { total_steps, rows, alignment_rows, trainable_parameters } => {
                    let message = format!(
                        "Training {trainable_parameters} parameters on {rows} rows and {alignment_rows} alignment rows in {total_steps} steps"
                    );
                    events::message(&mut transaction, id, Level::Info, &message).await?;
                }
                Line::Validation { step, loss, token_accuracy } => {
                    let data = serde_json::json!({"step": step, "valid_loss": loss, "valid_mean_token_accuracy": token_accuracy});
                    events::metrics(&mut transaction, id, &format!("Step {step}: validation loss={loss:.4}"), data).await?;
                }
                Line::Memory(plan) => {
                    let message = format!("The run needs about {} MiB of memory", plan.total_bytes().div_ceil(1 << 20));
                    events::message(&mut transaction, id, Level::Info, &message).await?;
                }
                Line::Note { message, .. } => events::message(&mut transaction, id, Level::Warn, message).await?,
                Line::Step(step) => steps.push(step),
            }
        }
        if let (Some(first), Some(last)) = (steps.first(), steps.last()) {
            let progress = Progress {
                step: last.step,
                total_steps: last.total_steps,
                tokens: last.tokens,
                tokens_per_second: last.tokens_per_second,
                eta_seconds: last.eta_seconds,
            };
            sqlx::query!("update jobs set progress = $2 where id = $1", id.0, to_json(&progress)?)
                .execute(&mut *transaction)
                .await?;
            sqlx::query!(
                "insert into job_metrics (job_id, attempt, first_step, steps) values ($1, $2, $3, $4)
                 on conflict (job_id, attempt, first_step) do update set steps = excluded.steps",
                id.0,
                attempt,
                first.step.cast_signed(),
                to_json(&steps)?
            )
            .execute(&mut *transaction)
            .await?;
            events::metrics(&mut transaction, id, &step_message(last), step_data(last)?).await?;
        }
        Ok(transaction.commit().await?)
    }

    /// Where an adapter's file goes.
    #[must_use]
    pub fn adapter_key(job: &Job, attempt: i32, name: &str) -> String {
        keys::adapter(job.project, job.id, attempt, name)
    }

    /// The job has made its model: rows for it and its files appear, and the job succeeds, in one transaction.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job; nothing has then changed, and the staged objects are
    /// swept.
    pub async fn publish(
        &self,
        id: JobId,
        attempt: i32,
        files: &[AdapterFile],
        trained_tokens: u64,
    ) -> Result<String, StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        let model = model_name::fine_tuned(&job.base_model, &job.organization, job.suffix.as_deref(), id);
        let next = job.state.clone().succeed(model.clone(), trained_tokens.cast_signed())?;
        jobs::write_state(&mut transaction, &job, &next).await?;
        let keys: Vec<String> = files.iter().map(|file| file.object.key.clone()).collect();
        objects::claim(&mut transaction, &keys).await?;
        for file in files {
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
        sqlx::query!(
            "insert into fine_tuned_models (name, project_id, job_id, base_model_id)
             select $1, project_id, id, base_model_id from jobs where id = $2",
            model,
            id.0
        )
        .execute(&mut *transaction)
        .await?;
        drop_lease(&mut transaction, id).await?;
        events::message(&mut transaction, id, Level::Info, &format!("New fine-tuned model created: {model}")).await?;
        events::message(&mut transaction, id, Level::Info, "The job has successfully completed").await?;
        transaction.commit().await?;
        Ok(model)
    }

    /// Gives jobs whose lease has expired back to the queue, or fails them when their attempts are spent. Returns how many.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn reap(&self) -> Result<u64, StoreError> {
        let expired =
            sqlx::query_scalar!("select job_id from job_leases where expires_at < now() limit 100").fetch_all(&self.pool).await?;
        let mut reaped = 0;
        for id in expired.into_iter().map(JobId) {
            let mut transaction = self.pool.begin().await?;
            let job = jobs::lock(&mut transaction, id, None).await?;
            // Its worker may have renewed or finished in between.
            let gone = sqlx::query!("delete from job_leases where job_id = $1 and expires_at < now()", id.0)
                .execute(&mut *transaction)
                .await?;
            if gone.rows_affected() == 0 {
                continue;
            }
            lose_worker(&mut transaction, &job).await?;
            transaction.commit().await?;
            reaped += 1;
        }
        Ok(reaped)
    }

    /// Opens a transaction in which the worker's lease is known to hold and the job cannot change under it.
    async fn hold(&self, id: JobId, attempt: i32) -> Result<(Transaction<'static, Postgres>, Job), StoreError> {
        let mut transaction = self.pool.begin().await?;
        let job = jobs::lock(&mut transaction, id, None).await?;
        let holds = sqlx::query_scalar!(
            "select 1 as one from job_leases where job_id = $1 and attempt = $2 and expires_at > now()",
            id.0,
            attempt
        )
        .fetch_optional(&mut *transaction)
        .await?;
        if holds.is_none() || jobs::attempt_of(&job.state) != attempt {
            return Err(StoreError::Fenced);
        }
        Ok((transaction, job))
    }
}

/// Counts a lost worker, and returns the job to the queue or fails it.
async fn lose_worker(connection: &mut PgConnection, job: &Job) -> Result<(), StoreError> {
    let lost =
        sqlx::query_scalar!("update jobs set lost_workers = lost_workers + 1 where id = $1 returning lost_workers", job.id.0)
            .fetch_one(&mut *connection)
            .await?;
    let next = job.state.clone().lose_worker(lost)?;
    jobs::write_state(connection, job, &next).await?;
    let (level, message) = match &next {
        JobState::Failed { error } => (Level::Error, error.message.as_str()),
        _ => (Level::Warn, "The worker was lost; the job waits for another"),
    };
    events::message(connection, job.id, level, message).await?;
    notify(connection).await
}

pub(crate) async fn drop_lease(connection: &mut PgConnection, job: JobId) -> Result<(), StoreError> {
    sqlx::query!("delete from job_leases where job_id = $1", job.0).execute(connection).await?;
    Ok(())
}

pub(crate) async fn notify(connection: &mut PgConnection) -> Result<(), StoreError> {
    sqlx::query!("select pg_notify($1, '')", CHANNEL).execute(connection).await?;
    Ok(())
}

fn step_message(step: &Step) -> String {
    let alignment = step.alignment.as_ref().map_or_else(String::new, |a| format!(", alignment KL={:.4}", a.align_kl));
    format!("Step {}/{}: training loss={:.4}{alignment}", step.step, step.total_steps, step.task_loss)
}

/// A step's figures under the names clients of the public contract read, with ours beside them.
fn step_data(step: &Step) -> Result<serde_json::Value, StoreError> {
    let mut data = to_json(step)?;
    data["train_loss"] = step.task_loss.into();
    data["train_mean_token_accuracy"] = step.token_accuracy.into();
    Ok(data)
}
