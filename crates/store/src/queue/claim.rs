//! Who gets which job, and what a worker needs for it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use holdfast_domain::ids::JobId;
use holdfast_domain::job::{JobError, JobState, Status};
use sqlx::PgConnection;
use uuid::Uuid;

use super::AdapterFile;
use crate::alignment_sets::AlignmentSet;
use crate::base_models::BaseModelFiles;
use crate::checkpoints::{self, ResumePoint};
use crate::events::{self, Level};
use crate::files::File;
use crate::jobs::{self, Job, Start};
use crate::projects::lock_quotas;
use crate::suites::Suite;
use crate::{Store, StoreError, attempts, fine_tuned_models};

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

/// What a claim is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Check the files against the model's template and tokenizer.
    Check,
    /// Train.
    Train,
}

/// What a job's owner is told where its records cannot be read.
const UNREADABLE: &str = "The service could not read what it keeps of this job, or of what it needs; its log says more. Nothing of your data is lost; tell the operator if the job fails for this.";
/// For how long this process leaves a job alone that it cannot read.
const UNREADABLE_REST: Duration = Duration::from_secs(60);

/// The jobs that this process cannot read, and since when. Of a newer version, perhaps, whose workers can: nothing of them is changed.
#[derive(Debug, Default)]
pub(crate) struct Unreadable(Mutex<HashMap<JobId, Instant>>);

impl Unreadable {
    fn add(&self, job: JobId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(job, Instant::now());
    }

    /// Those that are still left alone.
    fn ids(&self) -> Vec<Uuid> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, since| since.elapsed() < UNREADABLE_REST);
        known.keys().map(|id| id.0).collect()
    }
}

/// What came of looking for a job.
enum Taken {
    /// None can be taken.
    Nothing,
    /// The one that was found had just been taken, or cannot be read; another may be there.
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
                    // Nobody would hold what is claimed until its lease is over.
                    let _ = match &equipped {
                        Ok(_) => Ok(()),
                        Err(error) if error.is_unavailable() => self.delay(id, attempt, "The database could not be used").await,
                        Err(_) => self.set_back(id, attempt, JobError::new("operator_error", UNREADABLE)).await,
                    };
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
                   and w.id <> all($1)
                   and not exists (select 1 from job_leases l where l.job_id = w.id)
                 order by w.files_checked, w.id limit 1 for update skip locked) j
             limit 1",
            &self.unreadable.ids()
        )
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(found) = found else { return Ok(Taken::Nothing) };
        let id = JobId(found.id);
        let job = match jobs::fetch(&mut transaction, id, None).await {
            Err(StoreError::Corrupt(what)) => {
                // It must not keep this worker from all others.
                tracing::error!(job = %id, what, "a job cannot be read by this version, which leaves it alone for a minute");
                self.unreadable.add(id);
                return Ok(Taken::ByAnother);
            }
            job => job?,
        };
        if found.max_running_jobs.is_some() && job.state.status() == Status::Queued && !may_run(&mut transaction, &job).await? {
            // Another worker took the last place of this project meanwhile, which the next look knows.
            return Ok(Taken::ByAnother);
        }
        let next = job.state.clone().claim()?;
        let attempt = next.attempt().unwrap_or_default();
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
