//! Jobs, as their owners see and change them. What workers do to them is in `queue`.

use holdfast_domain::ids::{FileId, JobId, ProjectId};
use holdfast_domain::job::{JobError, JobState, Status};
use holdfast_domain::policy::AppliedPolicy;
use holdfast_domain::{Hyperparameters, Safety, model_name};
use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::attempts::Attempt;
use crate::error::{changed_one, from_json, to_json};
use crate::quarantine::Release;
use crate::{Page, PageRequest, Store, StoreError, checkpoints, webhooks};

mod create;
mod wait;
mod wishes;

pub use create::NewJob;
pub use wait::Waiting;

/// A job's row.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// Its owner.
    pub project: ProjectId,
    /// The owner's organisation.
    pub organization: String,
    /// The base model's name.
    pub base_model: String,
    /// What the client asked for: the base, or the model the job goes on from.
    pub model: String,
    /// The adapter the job goes on from.
    pub start: Option<Start>,
    /// The training file.
    pub training_file: FileId,
    /// The validation file.
    pub validation_file: Option<FileId>,
    pub(crate) alignment_set_id: Option<Uuid>,
    /// Which version of its alignment set it is held to.
    pub alignment_set_version: Option<u32>,
    /// The client's part of the model's name.
    pub suffix: Option<String>,
    /// The seed.
    pub seed: u64,
    /// The client's pairs.
    pub metadata: Value,
    /// How it trains.
    pub hyperparameters: Hyperparameters,
    /// What it trains under.
    pub safety: Safety,
    /// The operator's policy, as it was when the job was created; `None` for jobs of before there were any.
    pub policy: Option<AppliedPolicy>,
    /// Whether and why its adapter is or was kept apart.
    pub quarantine: Option<Quarantine>,
    /// Where in its life it is.
    pub state: JobState,
    /// What the trainer does now.
    pub phase: Option<String>,
    /// How far it is, see [`Progress`].
    pub progress: Option<Progress>,
    /// What the check of its files found.
    pub dataset: Option<Dataset>,
    /// The file with the figures of every step, once it has succeeded.
    pub result_file: Option<FileId>,
    /// The times a worker took it up, in order.
    pub attempts: Vec<Attempt>,
    /// Until when it rests after a setback.
    pub rests_until: Option<OffsetDateTime>,
    /// When it was created.
    pub created_at: OffsetDateTime,
    /// When it ended.
    pub finished_at: Option<OffsetDateTime>,
    /// When all this was so.
    pub read_at: OffsetDateTime,
}

/// An adapter that did not pass the gate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantine {
    /// What the model is called once it is released.
    pub model: String,
    /// When it was released, and why.
    pub released: Option<Release>,
    /// When its files were discarded.
    pub discarded_at: Option<OffsetDateTime>,
    /// Whether its owner can have it: it is released, and there. Of a run that made no adapter, checkpoints alone are released.
    pub is_published: bool,
}

/// An adapter that a job goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// The job that made it.
    pub job: JobId,
    /// After which of its steps; `None` for its last adapter.
    pub step: Option<u64>,
}

/// What the check of a job's files found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Dataset {
    /// Rows of the training file.
    pub rows: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Those of them that count towards the loss.
    pub supervised_tokens: u64,
}

/// How far a running job is.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Progress {
    /// Steps taken.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Tokens of the training file read.
    pub tokens: u64,
    /// At the last step.
    pub tokens_per_second: f64,
    /// Seconds the rest will take.
    pub eta_seconds: f64,
}

struct Row {
    id: Uuid,
    project_id: Uuid,
    organization: String,
    base_model: String,
    model: String,
    start_job_id: Option<Uuid>,
    start_step: Option<i64>,
    training_file_id: Uuid,
    validation_file_id: Option<Uuid>,
    alignment_set_id: Option<Uuid>,
    alignment_set_version: Option<i32>,
    suffix: Option<String>,
    seed: i64,
    metadata: Value,
    hyperparameters: Value,
    safety: Value,
    policy: Option<Value>,
    quarantined: Option<String>,
    released_at: Option<OffsetDateTime>,
    release_reason: Option<String>,
    discarded_at: Option<OffsetDateTime>,
    is_published: bool,
    status: String,
    attempt: i32,
    files_checked: bool,
    phase: Option<String>,
    progress: Option<Value>,
    dataset: Option<Value>,
    result_file_id: Option<Uuid>,
    attempts: Option<Value>,
    rests_until: Option<OffsetDateTime>,
    error: Option<Value>,
    fine_tuned_model: Option<String>,
    trained_tokens: Option<i64>,
    created_at: OffsetDateTime,
    finished_at: Option<OffsetDateTime>,
    read_at: OffsetDateTime,
}

impl TryFrom<Row> for Job {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let corrupt = |what: &str| StoreError::Corrupt(format!("{what} of job {}", JobId(row.id)));
        let attempt = row.attempt;
        let state = match Status::parse(&row.status).ok_or_else(|| corrupt("status"))? {
            Status::ValidatingFiles => JobState::ValidatingFiles { attempt },
            Status::Queued => JobState::Queued { attempt },
            Status::Running => JobState::Running { attempt },
            Status::Pausing => JobState::Pausing { attempt },
            Status::Paused => JobState::Paused { attempt, files_checked: row.files_checked },
            Status::Succeeded => JobState::Succeeded {
                fine_tuned_model: row.fine_tuned_model.ok_or_else(|| corrupt("model"))?,
                trained_tokens: row.trained_tokens.ok_or_else(|| corrupt("tokens"))?,
            },
            Status::Failed => JobState::Failed { error: from_json(row.error.ok_or_else(|| corrupt("error"))?)? },
            Status::Cancelled => JobState::Cancelled,
        };
        Ok(Self {
            id: JobId(row.id),
            project: ProjectId(row.project_id),
            organization: row.organization,
            base_model: row.base_model,
            model: row.model,
            start: row.start_job_id.map(|job| Start { job: JobId(job), step: row.start_step.map(i64::unsigned_abs) }),
            training_file: FileId(row.training_file_id),
            validation_file: row.validation_file_id.map(FileId),
            alignment_set_id: row.alignment_set_id,
            alignment_set_version: row.alignment_set_version.map(i32::unsigned_abs),
            suffix: row.suffix,
            seed: row.seed.unsigned_abs(),
            metadata: row.metadata,
            hyperparameters: from_json(row.hyperparameters)?,
            safety: from_json(row.safety)?,
            policy: row.policy.map(from_json).transpose()?,
            quarantine: row.quarantined.map(|model| Quarantine {
                model,
                released: row.released_at.zip(row.release_reason).map(|(at, reason)| Release { at, reason }),
                discarded_at: row.discarded_at,
                is_published: row.is_published,
            }),
            state,
            phase: row.phase,
            progress: row.progress.map(from_json).transpose()?,
            dataset: row.dataset.map(from_json).transpose()?,
            result_file: row.result_file_id.map(FileId),
            attempts: row.attempts.map_or(Ok(Vec::new()), from_json)?,
            rests_until: row.rests_until,
            created_at: row.created_at,
            finished_at: row.finished_at,
            read_at: row.read_at,
        })
    }
}

impl Job {
    /// What its model is called, made or yet to be made.
    #[must_use]
    pub fn model_name(&self) -> String {
        model_name::fine_tuned(&self.base_model, &self.organization, self.suffix.as_deref(), self.id)
    }

    /// Whether an operator has released what it learned.
    #[must_use]
    pub fn is_released(&self) -> bool {
        self.quarantine.as_ref().is_some_and(|quarantine| quarantine.released.is_some())
    }

    /// Whether an operator has discarded what it learned.
    #[must_use]
    pub fn is_discarded(&self) -> bool {
        self.quarantine.as_ref().is_some_and(|quarantine| quarantine.discarded_at.is_some())
    }

    /// Whether its checkpoints are kept back: where a gate must be passed, only what was asked has passed it, and that is the adapter
    /// that was published.
    #[must_use]
    pub fn holds_back_checkpoints(&self) -> bool {
        let is_gated = self.policy.as_ref().is_some_and(|applied| applied.policy.gate.enabled) || self.quarantine.is_some();
        is_gated && !self.is_released()
    }
}

impl Store {
    /// One job.
    ///
    /// # Errors
    /// When the project has no such job, or the database fails.
    pub async fn job(&self, project: ProjectId, id: JobId) -> Result<Job, StoreError> {
        let mut connection = self.tenant(project).await?;
        fetch(&mut connection, id, Some(project)).await
    }

    /// Any project's job, for the operator.
    ///
    /// # Errors
    /// When there is no such job, or the database fails.
    pub async fn job_for_operator(&self, id: JobId) -> Result<Job, StoreError> {
        fetch(&mut *self.pool.acquire().await?, id, None).await
    }

    /// A project's jobs, newest first; with `metadata`, those whose metadata holds all its pairs.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn jobs(&self, project: ProjectId, metadata: Option<&Value>, page: PageRequest) -> Result<Page<Job>, StoreError> {
        let mut connection = self.tenant(project).await?;
        // The bound is one whether or not there is a page before, so that every plan of it begins at the right place of the index.
        let after = page.after.unwrap_or(Uuid::max());
        let ids = match metadata {
            None => {
                sqlx::query_scalar!(
                    "select id from jobs where project_id = $1 and id < $2 order by id desc limit $3",
                    project.0,
                    after,
                    page.fetch()
                )
                .fetch_all(&mut *connection)
                .await?
            }
            Some(pairs) => {
                sqlx::query_scalar!(
                    "select id from jobs where project_id = $1 and id < $2 and metadata @> $3 order by id desc limit $4",
                    project.0,
                    after,
                    pairs,
                    page.fetch()
                )
                .fetch_all(&mut *connection)
                .await?
            }
        };
        Ok(Page::new(fetch_all(&mut connection, &ids, Some(project)).await?, &page))
    }
}

/// Reads a job: of `owner`, when it is read for a tenant; a worker may read any.
pub(crate) async fn fetch(connection: &mut PgConnection, id: JobId, owner: Option<ProjectId>) -> Result<Job, StoreError> {
    fetch_all(connection, &[id.0], owner).await?.pop().ok_or(StoreError::NotFound)
}

/// Reads those of the jobs that are there, newest first, as [`fetch`] does.
async fn fetch_all(connection: &mut PgConnection, ids: &[Uuid], owner: Option<ProjectId>) -> Result<Vec<Job>, StoreError> {
    let rows = sqlx::query_as!(
        Row,
        "select j.id, j.project_id, p.organization, m.name as base_model, j.model, j.start_job_id, j.start_step, j.training_file_id,
                j.validation_file_id, j.alignment_set_id, s.version as \"alignment_set_version?\", j.suffix, j.seed, j.metadata, j.hyperparameters, j.safety, j.policy, q.name as \"quarantined?\",
                q.released_at as \"released_at?\", q.release_reason as \"release_reason?\",
                q.discarded_at as \"discarded_at?\",
                exists (select 1 from adapter_files f where f.job_id = j.id) as \"is_published!\", j.status,
                j.attempt, j.files_checked, j.phase, j.progress, j.dataset, j.result_file_id, j.error, j.fine_tuned_model,
                j.trained_tokens, j.created_at, j.finished_at, j.rests_until, now() as \"read_at!\",
                (select jsonb_agg(jsonb_build_object(
                     'attempt', a.attempt, 'work', a.work, 'outcome', a.outcome, 'reason', a.reason,
                     'started_at', extract(epoch from a.started_at)::bigint, 'ended_at', extract(epoch from a.ended_at)::bigint)
                     order by a.attempt)
                 from job_attempts a where a.job_id = j.id) as attempts
         from jobs j join projects p on p.id = j.project_id join base_models m on m.id = j.base_model_id
         left join quarantined_adapters q on q.job_id = j.id left join alignment_sets s on s.id = j.alignment_set_id
         where j.id = any($1) and ($2::uuid is null or j.project_id = $2) order by j.id desc",
        ids,
        owner.map(|project| project.0)
    )
    .fetch_all(connection)
    .await?;
    rows.into_iter().map(Job::try_from).collect()
}

/// Reads a job as [`fetch`] does and keeps others from changing it until the transaction ends.
pub(crate) async fn lock(connection: &mut PgConnection, id: JobId, owner: Option<ProjectId>) -> Result<Job, StoreError> {
    sqlx::query_scalar!(
        "select 1 as one from jobs where id = $1 and ($2::uuid is null or project_id = $2) for update",
        id.0,
        owner.map(|project| project.0)
    )
    .fetch_optional(&mut *connection)
    .await?
    .ok_or(StoreError::NotFound)?;
    fetch(connection, id, owner).await
}

/// Writes the state that follows `job`'s, if it is still in that one.
pub(crate) async fn write_state(connection: &mut PgConnection, job: &Job, next: &JobState) -> Result<(), StoreError> {
    // One that ends keeps the number of its last claim.
    let attempt = next.attempt().or_else(|| job.state.attempt()).unwrap_or_default();
    let (error, model, tokens): (Option<&JobError>, Option<&str>, Option<i64>) = match next {
        JobState::Succeeded { fine_tuned_model, trained_tokens } => (None, Some(fine_tuned_model), Some(*trained_tokens)),
        JobState::Failed { error } => (Some(error), None, None),
        _ => (None, None, None),
    };
    let files_checked = match next {
        JobState::ValidatingFiles { .. } => Some(false),
        JobState::Queued { .. } | JobState::Running { .. } | JobState::Pausing { .. } => Some(true),
        JobState::Paused { files_checked, .. } => Some(*files_checked),
        JobState::Succeeded { .. } | JobState::Failed { .. } | JobState::Cancelled => None,
    };
    let status = next.status();
    let changed = sqlx::query!(
        "update jobs set status = $3, attempt = $4, error = $5, fine_tuned_model = $6, trained_tokens = $7,
                         finished_at = case when $8 then now() end,
                         phase = case when $3 in ('running', 'pausing') then phase end,
                         files_checked = coalesce($9, files_checked)
         where id = $1 and status = $2",
        job.id.0,
        job.state.status().as_str(),
        status.as_str(),
        attempt,
        error.map(to_json).transpose()?,
        model,
        tokens,
        status.is_terminal(),
        files_checked
    )
    .execute(&mut *connection)
    .await?;
    changed_one(&changed)?;
    if status.is_terminal() {
        checkpoints::drop_state(connection, job.id, None).await?;
        checkpoints::drop_unsettled(connection, job.id, None).await?;
        webhooks::job_ended(connection, job, status).await?;
    }
    Ok(())
}
