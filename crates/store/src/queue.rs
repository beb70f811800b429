//! What workers do to jobs: claim, renew, report, finish. A claim commits at once; everything after it happens under a lease
//! that the database's clock ends, and every write names the attempt that makes it, so that a worker that lost its lease
//! changes nothing.

use std::time::Duration;

use holdfast_domain::ids::JobId;
use holdfast_domain::job::{AttemptEnd, JobError, JobState, Status};
use holdfast_domain::progress::{Progress as Line, Step};
use sqlx::{PgConnection, Postgres, Transaction};

use crate::alignment_sets::AlignmentSet;
use crate::attempts;
use crate::base_models::BaseModelFiles;
use crate::checkpoints::{self, ResumePoint};
use crate::error::{from_json, to_json};
use crate::events::{self, Level};
use crate::files::{self, File, NewFile};
use crate::jobs::{self, Dataset, Job, Progress, Start};
use crate::objects::{self, ObjectRef, keys};
use crate::projects::{lock_quotas, usage};
use crate::suites::Suite;
use crate::{Store, StoreError, conflict_levels, evidence, fine_tuned_models, new_id, speeds};

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
    /// The alignment set.
    pub alignment: Option<AlignmentSet>,
    /// The operator's own suites that its adapter is asked.
    pub suites: Vec<Suite>,
    /// The adapter the job goes on from.
    pub start: Option<Vec<AdapterFile>>,
    /// Where an earlier attempt of the same job left it.
    pub resume: Vec<ResumePoint>,
}

/// What its owner wants of a job that a worker holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// That it goes on.
    Continue,
    /// That it stops with a checkpoint.
    Pause,
}

impl Wish {
    fn of(status: &str) -> Self {
        if status == Status::Pausing.as_str() { Self::Pause } else { Self::Continue }
    }
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

/// What a claim is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Check the files against the model's template and tokenizer.
    Check,
    /// Train.
    Train,
}

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

/// An adapter's file that has been written to the object store.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    /// Its name, as `adapter_model.safetensors`.
    pub name: String,
    /// Its bytes.
    pub object: ObjectRef,
}

/// What came of looking for a job.
enum Taken {
    /// None can be taken.
    Nothing,
    /// The one that was found had just been taken; another may be there.
    ByAnother,
    /// A job, by the number of its claim.
    Job(Box<Job>, i32, Work),
}

impl Store {
    /// Takes a job that waits, for `lease` from now: of the project with the fewest jobs in training, and among those of the one
    /// whose last claim is longest ago, the oldest; one that is to be checked before one that is to be trained. A project gets no
    /// more jobs to train than its quota allows. `None` when none can be taken.
    ///
    /// # Errors
    /// When the database fails. A claim whose files are gone fails the job and returns `None`.
    pub async fn claim(&self, worker: &str, lease: Duration) -> Result<Option<Claim>, StoreError> {
        loop {
            match self.take(worker, lease).await? {
                Taken::Nothing => return Ok(None),
                Taken::ByAnother => {}
                Taken::Job(job, attempt, work) => {
                    let id = job.id;
                    let equipped = self.equip(*job, attempt, work).await;
                    if equipped.is_err() {
                        // Nobody would hold what is claimed until its lease is over.
                        let _ = self.delay(id, attempt, "The database could not be used").await;
                    }
                    return equipped;
                }
            }
        }
    }

    async fn take(&self, worker: &str, lease: Duration) -> Result<Taken, StoreError> {
        let mut transaction = self.pool.begin().await?;
        // Project by project, those that have waiting jobs alone, until one has a job that nobody else is just taking.
        let found = sqlx::query!(
            "with recursive waiting as (
                 (select project_id from jobs where status in ('validating_files', 'queued') order by project_id limit 1)
                 union all
                 select (select j.project_id from jobs j where j.status in ('validating_files', 'queued') and j.project_id > w.project_id
                         order by j.project_id limit 1)
                 from waiting w where w.project_id is not null),
             running as (
                 select j.project_id, count(*) as jobs from job_leases l join jobs j on j.id = l.job_id
                 where j.status in ('running', 'pausing') group by j.project_id)
             select j.id, p.max_running_jobs
             from (select p.id, p.max_running_jobs, coalesce(r.jobs, 0) as running
                   from waiting w join projects p on p.id = w.project_id left join running r on r.project_id = p.id
                   order by coalesce(r.jobs, 0), p.last_claim_at nulls first, p.id) p
             cross join lateral (
                 select w.id from jobs w
                 where w.project_id = p.id and w.status in ('validating_files', 'queued')
                   and (w.status = 'validating_files' or p.max_running_jobs is null or p.running < p.max_running_jobs)
                   and (w.rests_until is null or w.rests_until <= now())
                   and not exists (select 1 from job_leases l where l.job_id = w.id)
                 order by w.files_checked, w.id limit 1 for update skip locked) j
             limit 1"
        )
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(found) = found else { return Ok(Taken::Nothing) };
        let id = JobId(found.id);
        let job = jobs::fetch(&mut transaction, id, None).await?;
        if found.max_running_jobs.is_some() && job.state.status() == Status::Queued && !may_run(&mut transaction, &job).await? {
            return Ok(Taken::Nothing);
        }
        let next = job.state.clone().claim()?;
        let attempt = jobs::attempt_of(&next);
        let leased = sqlx::query!(
            "insert into job_leases (job_id, attempt, worker, expires_at) values ($1, $2, $3, now() + make_interval(secs => $4))
             on conflict (job_id) do nothing",
            id.0,
            attempt,
            worker,
            lease.as_secs_f64()
        )
        .execute(&mut *transaction)
        .await?;
        if leased.rows_affected() == 0 {
            // It was taken for its check after this search had begun.
            return Ok(Taken::ByAnother);
        }
        jobs::write_state(&mut transaction, &job, &next).await?;
        // Whoever claims for the same project at this moment writes the same: nobody waits for the row.
        sqlx::query!(
            "update projects set last_claim_at = clock_timestamp() where id = (
                 select id from projects where id = $1 for no key update skip locked)",
            job.project.0
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
        attempts::begin(&mut transaction, id, attempt, work, worker).await?;
        transaction.commit().await?;
        Ok(Taken::Job(Box::new(Job { state: next, ..job }), attempt, work))
    }

    /// Finds what a worker needs for a job that it has taken.
    async fn equip(&self, job: Job, attempt: i32, work: Work) -> Result<Option<Claim>, StoreError> {
        let id = job.id;
        match self.inputs(&job, attempt, work).await {
            Ok(claim) => Ok(Some(claim)),
            Err(StoreError::NotFound) => {
                let error = JobError::new(
                    "file_not_found",
                    "A file of this job, or the model it goes on from, was deleted. Upload it again and create the job anew.",
                )
                .about("training_file");
                self.fail(id, attempt, error).await?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn inputs(&self, job: &Job, attempt: i32, work: Work) -> Result<Claim, StoreError> {
        let base = self.base_model_files(&job.base_model).await?;
        let training = self.file_of_job(job.project, job.training_file).await?;
        let validation = match job.validation_file {
            Some(file) => Some(self.file_of_job(job.project, file).await?),
            None => None,
        };
        let alignment = match job.alignment_set_id {
            Some(id) => Some(self.alignment_set_by_id(id).await?),
            None => None,
        };
        let suites = match &job.policy {
            Some(applied) if applied.policy.evaluates() => self.suites_of(&applied.policy).await?,
            _ => Vec::new(),
        };
        let mut connection = self.pool.acquire().await?;
        let start = match job.start {
            None => None,
            Some(Start { job, step: None }) => Some(fine_tuned_models::adapter_files(&mut connection, job).await?),
            Some(Start { job, step: Some(step) }) => Some(checkpoints::settled_files_of(&mut connection, job, step).await?),
        };
        let start = start.map(|mut files| {
            files.retain(|file| checkpoints::ADAPTER_FILES.contains(&file.name.as_str()));
            files
        });
        if start.as_ref().is_some_and(Vec::is_empty) {
            return Err(StoreError::NotFound);
        }
        let resume = checkpoints::resume_points(&mut connection, job.id).await?;
        Ok(Claim { job: job.clone(), work, attempt, base, training, validation, alignment, suites, start, resume })
    }

    /// Renews a lease for `lease` from now, and returns what the job's owner wants.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job: it must stop.
    pub async fn heartbeat(&self, job: JobId, attempt: i32, lease: Duration) -> Result<Wish, StoreError> {
        let status = sqlx::query_scalar!(
            "update job_leases l set expires_at = now() + make_interval(secs => $3) from jobs j
             where l.job_id = $1 and l.attempt = $2 and l.expires_at > now() and j.id = l.job_id returning j.status",
            job.0,
            attempt,
            lease.as_secs_f64()
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::Fenced)?;
        Ok(Wish::of(&status))
    }

    /// What the job's owner wants of it, without renewing the lease: reads alone, so that it may be asked often.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn wish(&self, job: JobId, attempt: i32) -> Result<Wish, StoreError> {
        let status = sqlx::query_scalar!(
            "select j.status from job_leases l join jobs j on j.id = l.job_id
             where l.job_id = $1 and l.attempt = $2 and l.expires_at > now()",
            job.0,
            attempt
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::Fenced)?;
        Ok(Wish::of(&status))
    }

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

    /// Writes lines a trainer reported: the phase and progress of the job, its metrics, and events for its owner.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn report(&self, id: JobId, attempt: i32, lines: &[Line]) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
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
                    sqlx::query!(
                        "insert into job_validations (job_id, step, loss, token_accuracy) values ($1, $2, $3, $4)
                         on conflict (job_id, step) do update set loss = excluded.loss, token_accuracy = excluded.token_accuracy",
                        id.0,
                        step.cast_signed(),
                        loss,
                        token_accuracy
                    )
                    .execute(&mut *transaction)
                    .await?;
                    let data = serde_json::json!({"step": step, "valid_loss": loss, "valid_mean_token_accuracy": token_accuracy});
                    events::metrics(&mut transaction, id, &format!("Step {step}: validation loss={loss:.4}"), data).await?;
                }
                Line::Memory(plan) => {
                    let message = format!("The run needs about {} MiB of memory", plan.total_bytes().div_ceil(1 << 20));
                    events::message(&mut transaction, id, Level::Info, &message).await?;
                }
                Line::Note { message, .. } => events::message(&mut transaction, id, Level::Warn, message).await?,
                Line::Step(step) => steps.push(step),
                // It is kept apart, once its files are.
                Line::Checkpoint { .. } => {}
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
            if let Some(facts) = &last.alignment {
                conflict_levels::watch(&mut transaction, &job, last.step, facts.conflict_rate).await?;
            }
        }
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

    /// Every step of a job that was kept, in order, each as the last attempt that took it reported it; and its measurements on
    /// the validation file: step, loss, token accuracy.
    ///
    /// # Errors
    /// When the database fails, or a row is unreadable.
    pub async fn steps(&self, id: JobId) -> Result<(Vec<Step>, Vec<(u64, f64, f64)>), StoreError> {
        let chunks = sqlx::query_scalar!("select steps from job_metrics where job_id = $1 order by attempt, first_step", id.0)
            .fetch_all(&self.pool)
            .await?;
        let mut steps = std::collections::BTreeMap::new();
        for chunk in chunks {
            steps.extend(from_json::<Vec<Step>>(chunk)?.into_iter().map(|step| (step.step, step)));
        }
        let validations =
            sqlx::query!("select step, loss, token_accuracy from job_validations where job_id = $1 order by step", id.0)
                .fetch_all(&self.pool)
                .await?;
        let validations = validations.into_iter().map(|r| (r.step.unsigned_abs(), r.loss, r.token_accuracy)).collect();
        Ok((steps.into_values().collect(), validations))
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
            return Ok(false);
        }
        let lost = "The worker was lost: it died, or was out of touch for longer than its lease. Nothing of your data is lost; if the job fails for this, create it again, or ask the operator why its workers stop.";
        set_back(&mut transaction, &job, JobError::new("worker_lost", lost)).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// Opens a transaction in which the worker's lease is known to hold and the job cannot change under it.
    pub(crate) async fn hold(&self, id: JobId, attempt: i32) -> Result<(Transaction<'static, Postgres>, Job), StoreError> {
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

/// Whether the project may train one job more. Claims of one project take turns here, so that two do not both take the last
/// place.
async fn may_run(connection: &mut PgConnection, job: &Job) -> Result<bool, StoreError> {
    let most = lock_quotas(connection, job.project).await?.max_running_jobs;
    let running = sqlx::query_scalar!(
        "select count(*) as \"count!\" from jobs where project_id = $1 and status in ('running', 'pausing')",
        job.project.0
    )
    .fetch_one(connection)
    .await?;
    Ok(most.is_none_or(|most| running.unsigned_abs() < most))
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
