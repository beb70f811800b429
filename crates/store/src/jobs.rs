//! Jobs, as their owners see and change them. What workers do to them is in `queue`.

use holdfast_domain::ids::{FileId, JobId, ProjectId};
use holdfast_domain::job::{JobError, JobState, Status};
use holdfast_domain::{Hyperparameters, Invalid, Safety};
use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::error::{changed_one, from_json, to_json};
use crate::events::{self, Level};
use crate::{Page, PageRequest, Store, StoreError, new_id, queue};

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
    /// The training file.
    pub training_file: FileId,
    /// The validation file.
    pub validation_file: Option<FileId>,
    pub(crate) alignment_set_id: Option<Uuid>,
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
    /// Where in its life it is.
    pub state: JobState,
    /// What the trainer does now.
    pub phase: Option<String>,
    /// How far it is, see [`Progress`].
    pub progress: Option<Progress>,
    /// When it was created.
    pub created_at: OffsetDateTime,
    /// When it ended.
    pub finished_at: Option<OffsetDateTime>,
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

/// A job to be created: every value decided.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// The base model's name.
    pub base_model: String,
    /// The training file.
    pub training_file: FileId,
    /// The validation file.
    pub validation_file: Option<FileId>,
    /// The client's part of the model's name.
    pub suffix: Option<String>,
    /// The seed.
    pub seed: u64,
    /// The client's pairs.
    pub metadata: Value,
    /// How to train.
    pub hyperparameters: Hyperparameters,
    /// What to train under.
    pub safety: Safety,
}

struct Row {
    id: Uuid,
    project_id: Uuid,
    organization: String,
    base_model: String,
    training_file_id: Uuid,
    validation_file_id: Option<Uuid>,
    alignment_set_id: Option<Uuid>,
    suffix: Option<String>,
    seed: i64,
    metadata: Value,
    hyperparameters: Value,
    safety: Value,
    status: String,
    attempt: i32,
    phase: Option<String>,
    progress: Option<Value>,
    error: Option<Value>,
    fine_tuned_model: Option<String>,
    trained_tokens: Option<i64>,
    created_at: OffsetDateTime,
    finished_at: Option<OffsetDateTime>,
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
            training_file: FileId(row.training_file_id),
            validation_file: row.validation_file_id.map(FileId),
            alignment_set_id: row.alignment_set_id,
            suffix: row.suffix,
            seed: row.seed.unsigned_abs(),
            metadata: row.metadata,
            hyperparameters: from_json(row.hyperparameters)?,
            safety: from_json(row.safety)?,
            state,
            phase: row.phase,
            progress: row.progress.map(from_json).transpose()?,
            created_at: row.created_at,
            finished_at: row.finished_at,
        })
    }
}

impl Store {
    /// Creates a job: it waits for a worker to check its files.
    ///
    /// # Errors
    /// When a file, the model or the alignment set is not there (the refusal names which), or the database fails.
    pub async fn create_job(&self, project: ProjectId, job: &NewJob) -> Result<Job, StoreError> {
        let id = JobId(new_id());
        let base = self.base_model(&job.base_model).await.map_err(|e| missing(e, "model", "model_not_found", &job.base_model))?;
        let alignment = match &job.safety.alignment_set {
            None => None,
            Some(name) => Some(
                self.alignment_set(name)
                    .await
                    .map_err(|e| missing(e, "safety.alignment_set", "alignment_set_not_found", name))?
                    .id,
            ),
        };
        let mut transaction = self.pool.begin().await?;
        for (param, file) in [("training_file", Some(job.training_file)), ("validation_file", job.validation_file)] {
            let Some(file) = file else { continue };
            // The lock keeps the file from being deleted before the job that needs it exists.
            sqlx::query_scalar!("select 1 as one from files where project_id = $1 and id = $2 for share", project.0, file.0)
                .fetch_optional(&mut *transaction)
                .await?
                .ok_or_else(|| missing(StoreError::NotFound, param, "file_not_found", &file.to_string()))?;
        }
        sqlx::query!(
            "insert into jobs (id, project_id, base_model_id, training_file_id, validation_file_id, alignment_set_id, suffix, seed,
                               metadata, hyperparameters, safety, status)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 'validating_files')",
            id.0,
            project.0,
            base.id,
            job.training_file.0,
            job.validation_file.map(|f| f.0),
            alignment,
            job.suffix,
            job.seed.cast_signed(),
            job.metadata,
            to_json(&job.hyperparameters)?,
            to_json(&job.safety)?
        )
        .execute(&mut *transaction)
        .await?;
        events::message(&mut transaction, id, Level::Info, &format!("Created fine-tuning job: {id}")).await?;
        events::message(&mut transaction, id, Level::Info, "Validating the files against the model's template and tokenizer")
            .await?;
        queue::notify(&mut transaction).await?;
        transaction.commit().await?;
        self.job(project, id).await
    }

    /// One job.
    ///
    /// # Errors
    /// When the project has no such job, or the database fails.
    pub async fn job(&self, project: ProjectId, id: JobId) -> Result<Job, StoreError> {
        let mut connection = self.pool.acquire().await?;
        fetch(&mut connection, id, Some(project)).await
    }

    /// A project's jobs, newest first; with `metadata`, those whose metadata holds all its pairs.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn jobs(&self, project: ProjectId, metadata: Option<&Value>, page: PageRequest) -> Result<Page<Job>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            "select j.id, j.project_id, p.organization, m.name as base_model, j.training_file_id, j.validation_file_id,
                    j.alignment_set_id, j.suffix, j.seed, j.metadata, j.hyperparameters, j.safety, j.status, j.attempt, j.phase,
                    j.progress, j.error, j.fine_tuned_model, j.trained_tokens, j.created_at, j.finished_at
             from jobs j join projects p on p.id = j.project_id join base_models m on m.id = j.base_model_id
             where j.project_id = $1 and ($2::uuid is null or j.id < $2) and ($3::jsonb is null or j.metadata @> $3)
             order by j.id desc limit $4",
            project.0,
            page.after,
            metadata,
            page.fetch()
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(Page::new(rows.into_iter().map(Job::try_from).collect::<Result<_, _>>()?, &page))
    }

    /// Ends a job at its owner's word. A worker that runs it finds its lease gone and stops.
    ///
    /// # Errors
    /// When the project has no such job, it has ended already, or the database fails.
    pub async fn cancel_job(&self, project: ProjectId, id: JobId) -> Result<Job, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let job = lock(&mut transaction, id, Some(project)).await?;
        let next = job.state.clone().cancel()?;
        write_state(&mut transaction, &job, &next).await?;
        queue::drop_lease(&mut transaction, id).await?;
        events::message(&mut transaction, id, Level::Info, "The job was cancelled").await?;
        transaction.commit().await?;
        self.job(project, id).await
    }

    /// Jobs that wait before this one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn queue_position(&self, id: JobId) -> Result<u64, StoreError> {
        let ahead = sqlx::query_scalar!(
            "select count(*) as \"count!\" from jobs where status in ('validating_files', 'queued') and id < $1",
            id.0
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(ahead.unsigned_abs())
    }
}

fn missing(error: StoreError, param: &str, code: &'static str, name: &str) -> StoreError {
    match error {
        StoreError::NotFound => {
            Invalid::new(param, code, format!("there is no {param} {name:?}, or it belongs to another project")).into()
        }
        other => other,
    }
}

/// Reads a job: of `owner`, when it is read for a tenant; a worker may read any.
pub(crate) async fn fetch(connection: &mut PgConnection, id: JobId, owner: Option<ProjectId>) -> Result<Job, StoreError> {
    sqlx::query_as!(
        Row,
        "select j.id, j.project_id, p.organization, m.name as base_model, j.training_file_id, j.validation_file_id,
                j.alignment_set_id, j.suffix, j.seed, j.metadata, j.hyperparameters, j.safety, j.status, j.attempt, j.phase,
                j.progress, j.error, j.fine_tuned_model, j.trained_tokens, j.created_at, j.finished_at
         from jobs j join projects p on p.id = j.project_id join base_models m on m.id = j.base_model_id
         where j.id = $1 and ($2::uuid is null or j.project_id = $2)",
        id.0,
        owner.map(|project| project.0)
    )
    .fetch_optional(connection)
    .await?
    .ok_or(StoreError::NotFound)?
    .try_into()
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
    let (attempt, error, model, tokens): (i32, Option<&JobError>, Option<&str>, Option<i64>) = match next {
        JobState::ValidatingFiles { attempt } | JobState::Queued { attempt } | JobState::Running { attempt } => {
            (*attempt, None, None, None)
        }
        JobState::Succeeded { fine_tuned_model, trained_tokens } => {
            (attempt_of(&job.state), None, Some(fine_tuned_model), Some(*trained_tokens))
        }
        JobState::Failed { error } => (attempt_of(&job.state), Some(error), None, None),
        JobState::Cancelled => (attempt_of(&job.state), None, None, None),
    };
    let status = next.status();
    let changed = sqlx::query!(
        "update jobs set status = $3, attempt = $4, error = $5, fine_tuned_model = $6, trained_tokens = $7,
                         finished_at = case when $8 then now() end,
                         phase = case when $3 = 'running' then phase end
         where id = $1 and status = $2",
        job.id.0,
        job.state.status().as_str(),
        status.as_str(),
        attempt,
        error.map(to_json).transpose()?,
        model,
        tokens,
        status.is_terminal()
    )
    .execute(connection)
    .await?;
    changed_one(&changed)
}

pub(crate) fn attempt_of(state: &JobState) -> i32 {
    match state {
        JobState::ValidatingFiles { attempt } | JobState::Queued { attempt } | JobState::Running { attempt } => *attempt,
        JobState::Succeeded { .. } | JobState::Failed { .. } | JobState::Cancelled => 0,
    }
}
