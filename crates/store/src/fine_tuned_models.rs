//! What jobs make: models under public names, and the adapters that are their files.

use holdfast_domain::ids::{JobId, ProjectId};
use holdfast_domain::policy::AppliedPolicy;
use holdfast_domain::safety::Safety;
use holdfast_domain::{Hyperparameters, Invalid, model_name};
use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;

use crate::checkpoints;
use crate::error::from_json;
use crate::files::object_ref;
use crate::jobs::{self, Job, Start};
use crate::objects;
use crate::queue::AdapterFile;
use crate::{Store, StoreError};

/// A fine-tuned model's row.
#[derive(Debug, Clone)]
pub struct FineTunedModel {
    /// Its public name.
    pub name: String,
    /// When it was published.
    pub created_at: OffsetDateTime,
    /// Its owner's organisation.
    pub organization: String,
}

/// An adapter that a job can go on from.
#[derive(Debug, Clone)]
pub struct StartingPoint {
    /// Which.
    pub start: Start,
    /// The base under it.
    pub base_model: String,
    /// What its job trained with: rank, scale and modules are the adapter's.
    pub hyperparameters: Hyperparameters,
    /// How it was trained, and how those before it were that it goes on from.
    pub line: Vec<Trained>,
}

/// How a model was trained.
#[derive(Debug, Clone)]
pub struct Trained {
    /// What it was held to.
    pub safety: Safety,
    /// Rows of a step.
    pub rows_per_step: u64,
    /// Whether it had to pass a safety gate.
    pub gated: bool,
}

impl Store {
    /// One fine-tuned model, or one of a job's checkpoints by its model name.
    ///
    /// # Errors
    /// When the project has no such model, or the database fails.
    pub async fn fine_tuned_model(&self, project: ProjectId, name: &str) -> Result<FineTunedModel, StoreError> {
        let mut connection = self.tenant(project).await?;
        if let Some((model, step)) = model_name::checkpoint(name) {
            let job = job_of_checkpoint(&mut connection, project, model).await?;
            let created_at = sqlx::query_scalar!(
                "select created_at from job_checkpoints where job_id = $1 and step = $2 and settled",
                job.id.0,
                step.cast_signed()
            )
            .fetch_optional(&mut *connection)
            .await?
            .ok_or(StoreError::NotFound)?;
            return Ok(FineTunedModel { name: name.to_owned(), created_at, organization: job.organization });
        }
        sqlx::query_as!(
            FineTunedModel,
            "select f.name, f.created_at, p.organization from fine_tuned_models f join projects p on p.id = f.project_id
             where f.project_id = $1 and f.name = $2",
            project.0,
            name
        )
        .fetch_optional(&mut *connection)
        .await?
        .ok_or(StoreError::NotFound)
    }

    /// A project's fine-tuned models, by name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn fine_tuned_models(&self, project: ProjectId) -> Result<Vec<FineTunedModel>, StoreError> {
        let mut connection = self.tenant(project).await?;
        Ok(sqlx::query_as!(
            FineTunedModel,
            "select f.name, f.created_at, p.organization from fine_tuned_models f join projects p on p.id = f.project_id
             where f.project_id = $1 order by f.name",
            project.0
        )
        .fetch_all(&mut *connection)
        .await?)
    }

    /// The adapter of a fine-tuned model or a checkpoint, as something a job can go on from.
    ///
    /// # Errors
    /// When the project has no such model, or the database fails.
    pub async fn starting_point(&self, project: ProjectId, name: &str) -> Result<StartingPoint, StoreError> {
        let (job, step) = self.made(project, name).await?;
        if step.is_some() && job.holds_back_checkpoints() {
            let message = format!("{name} is kept back: only what has passed the safety gate can be gone on from");
            return Err(Invalid::new("model", "held_back", message).into());
        }
        let line = sqlx::query!(
            "with recursive line (id, safety, hyperparameters, policy, start_job_id) as (
                 select id, safety, hyperparameters, policy, start_job_id from jobs where id = $1
                 union select j.id, j.safety, j.hyperparameters, j.policy, j.start_job_id
                 from jobs j join line on j.id = line.start_job_id)
             select safety as \"safety!\", hyperparameters as \"hyperparameters!\", policy from line",
            job.id.0
        )
        .fetch_all(&mut *self.tenant(project).await?)
        .await?;
        let trained = line.into_iter().map(|row| {
            let hyperparameters: Hyperparameters = from_json(row.hyperparameters)?;
            let policy: Option<AppliedPolicy> = row.policy.map(from_json).transpose()?;
            Ok(Trained {
                safety: from_json(row.safety)?,
                rows_per_step: hyperparameters.rows_per_step(),
                gated: policy.is_some_and(|applied| applied.policy.gate.enabled),
            })
        });
        let line = trained.collect::<Result<_, StoreError>>()?;
        let Job { base_model, hyperparameters, .. } = job;
        Ok(StartingPoint { start: Start { job: job.id, step }, base_model, hyperparameters, line })
    }

    /// The job that made a model or a checkpoint, and the checkpoint's step.
    async fn made(&self, project: ProjectId, name: &str) -> Result<(jobs::Job, Option<u64>), StoreError> {
        Ok({
            let mut connection = self.tenant(project).await?;
            match model_name::checkpoint(name) {
                Some((model, step)) => {
                    let job = job_of_checkpoint(&mut connection, project, model).await?;
                    if checkpoints::settled_files_of(&mut connection, job.id, step).await?.is_empty() {
                        return Err(StoreError::NotFound);
                    }
                    (job, Some(step))
                }
                None => {
                    let id = sqlx::query_scalar!(
                        "select job_id from fine_tuned_models where project_id = $1 and name = $2",
                        project.0,
                        name
                    )
                    .fetch_optional(&mut *connection)
                    .await?
                    .ok_or(StoreError::NotFound)?;
                    (jobs::fetch(&mut connection, JobId(id), Some(project)).await?, None)
                }
            }
        })
    }

    /// The files of a job's adapter, by name; empty until the job has succeeded, and once its model was deleted.
    ///
    /// # Errors
    /// When the project has no such job, or the database fails.
    pub async fn adapter_files(&self, project: ProjectId, job: JobId) -> Result<Vec<AdapterFile>, StoreError> {
        let mut connection = self.tenant(project).await?;
        adapter_files(&mut connection, job).await
    }

    /// Deletes a fine-tuned model or a checkpoint with its adapter; the job that made it stays.
    ///
    /// # Errors
    /// When the project has no such model, an open job goes on from it, or the database fails.
    pub async fn delete_model(&self, project: ProjectId, name: &str) -> Result<(), StoreError> {
        let (made, step) = self.made(project, name).await?;
        let mut connection = self.tenant(project).await?;
        let mut transaction = connection.begin().await?;
        // The lock keeps a job from being created that goes on from it.
        let job = jobs::lock(&mut transaction, made.id, Some(project)).await?;
        let needed_by = sqlx::query_scalar!(
            "select id from jobs where project_id = $1 and start_job_id = $2 and start_step is not distinct from $3
               and status in ('validating_files', 'queued', 'running', 'pausing', 'paused') limit 1",
            project.0,
            job.id.0,
            step.map(u64::cast_signed)
        )
        .fetch_optional(&mut *transaction)
        .await?;
        if let Some(by) = needed_by {
            let message = format!("{name} is what {} goes on from, which has not ended", JobId(by));
            return Err(Invalid::new("model", "model_in_use", message).into());
        }
        if step.is_some() && !job.state.status().is_terminal() {
            let message = format!("{name} is what {} may go on from, which has not ended", job.id);
            return Err(Invalid::new("model", "model_in_use", message).into());
        }
        let keys = match step {
            Some(step) => {
                let files = checkpoints::settled_files_of(&mut transaction, job.id, step).await?;
                sqlx::query!("delete from job_checkpoints where job_id = $1 and step = $2", job.id.0, step.cast_signed())
                    .execute(&mut *transaction)
                    .await?;
                files.into_iter().map(|file| file.object.key).collect()
            }
            None => {
                let deleted = sqlx::query!("delete from fine_tuned_models where project_id = $1 and name = $2", project.0, name)
                    .execute(&mut *transaction)
                    .await?;
                if deleted.rows_affected() == 0 {
                    return Err(StoreError::NotFound);
                }
                sqlx::query_scalar!("delete from adapter_files where job_id = $1 returning object_key", job.id.0)
                    .fetch_all(&mut *transaction)
                    .await?
            }
        };
        objects::disown(&mut transaction, &keys).await?;
        Ok(transaction.commit().await?)
    }
}

/// Gives a job's model its name; its base's id comes back.
pub(crate) async fn insert(connection: &mut PgConnection, job: JobId, name: &str) -> Result<uuid::Uuid, StoreError> {
    Ok(sqlx::query_scalar!(
        "insert into fine_tuned_models (name, project_id, job_id, base_model_id)
         select $1, project_id, id, base_model_id from jobs where id = $2 returning base_model_id",
        name,
        job.0
    )
    .fetch_one(connection)
    .await?)
}

pub(crate) async fn adapter_files(connection: &mut PgConnection, job: JobId) -> Result<Vec<AdapterFile>, StoreError> {
    let rows = sqlx::query!("select name, object_key, bytes, sha256 from adapter_files where job_id = $1 order by name", job.0)
        .fetch_all(connection)
        .await?;
    rows.into_iter().map(|r| Ok(AdapterFile { name: r.name, object: object_ref(r.object_key, r.bytes, &r.sha256)? })).collect()
}

/// The job whose model, made or yet to be made, has this name.
async fn job_of_checkpoint(connection: &mut PgConnection, project: ProjectId, model: &str) -> Result<jobs::Job, StoreError> {
    let id = model_name::job_of(model).ok_or(StoreError::NotFound)?;
    let job = jobs::fetch(connection, id, Some(project)).await?;
    if job.model_name() == model { Ok(job) } else { Err(StoreError::NotFound) }
}
