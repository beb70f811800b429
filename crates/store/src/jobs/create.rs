//! How a job comes to be.

use holdfast_domain::ids::{FileId, JobId, ProjectId};
use holdfast_domain::policy::AppliedPolicy;
use holdfast_domain::{Hyperparameters, Invalid, Safety};
use serde_json::Value;
use sqlx::{Connection, PgConnection};

use super::{Job, Start, fetch};
use crate::error::to_json;
use crate::events::{self, Level};
use crate::once::{self, Once, Repetition};
use crate::projects::{lock_quotas, usage};
use crate::suites::Suite;
use crate::{Store, StoreError, new_id, queue};

/// A job to be created: every value decided.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// The base model's name.
    pub base_model: String,
    /// What the client asked for: the base, or the model the job goes on from.
    pub model: String,
    /// The adapter it goes on from.
    pub start: Option<Start>,
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
    /// The operator's policy.
    pub policy: AppliedPolicy,
}

impl Store {
    /// The job that a request made when it was served before, whatever has changed since; none of one that says it is new.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn job_made_before(&self, project: ProjectId, once: &Once) -> Result<Option<Job>, StoreError> {
        if once.repetition == Repetition::First {
            return Ok(None);
        }
        let mut connection = self.tenant(project).await?;
        let Some(made) = once::made_before(&mut connection, once).await? else { return Ok(None) };
        match fetch(&mut connection, JobId(made), Some(project)).await {
            Err(StoreError::NotFound) => Ok(None),
            job => job.map(Some),
        }
    }

    /// Creates a job: it waits for a worker to check its files. Of a request that was served before, the job it made then
    /// comes back.
    ///
    /// # Errors
    /// When a file, the model or the alignment set is not there (the refusal names which), the project has as many jobs as it
    /// may, or the database fails.
    pub async fn create_job(&self, project: ProjectId, job: &NewJob, once: Option<&Once>) -> Result<Job, StoreError> {
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
        // The versions that are newest now: what is imported later changes no job.
        let mut policy = job.policy.clone();
        policy.policy.suites = self.suites_of(&policy.policy).await?.iter().map(Suite::pinned).collect();
        let mut connection = self.tenant(project).await?;
        let mut transaction = connection.begin().await?;
        if let Some(made) = once::admit(&mut transaction, once, id.0).await? {
            return fetch(&mut transaction, JobId(made), Some(project)).await;
        }
        check_quotas(&mut transaction, project).await?;
        for (param, file) in [("training_file", Some(job.training_file)), ("validation_file", job.validation_file)] {
            let Some(file) = file else { continue };
            // The lock keeps the file from being deleted before the job that needs it exists.
            sqlx::query_scalar!(
                "select 1 as one from files where project_id = $1 and id = $2 and (expires_at is null or expires_at > now()) for share",
                project.0,
                file.0
            )
            .fetch_optional(&mut *transaction)
            .await?
            .ok_or_else(|| missing(StoreError::NotFound, param, "file_not_found", &file.to_string()))?;
        }
        if let Some(start) = job.start {
            // Found before; retention or a delete may have come in between.
            let still_there = match start.step {
                Some(step) => {
                    sqlx::query_scalar!(
                        "select 1 as \"one!\" from job_checkpoints where job_id = $1 and step = $2 and settled for share",
                        start.job.0,
                        step.cast_signed()
                    )
                    .fetch_optional(&mut *transaction)
                    .await?
                }
                None => {
                    sqlx::query_scalar!("select 1 as \"one!\" from fine_tuned_models where job_id = $1 for share", start.job.0)
                        .fetch_optional(&mut *transaction)
                        .await?
                }
            };
            still_there.ok_or_else(|| missing(StoreError::NotFound, "model", "model_not_found", &job.model))?;
        }
        sqlx::query!(
            "insert into jobs (id, project_id, base_model_id, training_file_id, validation_file_id, alignment_set_id, suffix, seed,
                               metadata, hyperparameters, safety, policy, model, start_job_id, start_step, status)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, 'validating_files')",
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
            to_json(&job.safety)?,
            to_json(&policy)?,
            job.model,
            job.start.map(|start| start.job.0),
            job.start.and_then(|start| start.step).map(u64::cast_signed)
        )
        .execute(&mut *transaction)
        .await?;
        events::message(&mut transaction, id, Level::Info, &format!("Created fine-tuning job: {id}")).await?;
        events::message(&mut transaction, id, Level::Info, "Validating the files against the model's template and tokenizer")
            .await?;
        queue::notify(&mut transaction).await?;
        let created = fetch(&mut transaction, id, Some(project)).await?;
        transaction.commit().await?;
        Ok(created)
    }
}

/// Refuses a job more than the project may have.
async fn check_quotas(connection: &mut PgConnection, project: ProjectId) -> Result<(), StoreError> {
    let quotas = lock_quotas(connection, project).await?;
    if quotas.max_queued_jobs.is_none() && quotas.max_trained_tokens_per_month.is_none() {
        return Ok(());
    }
    let used = usage(connection, project).await?;
    if let Some(most) = quotas.max_queued_jobs.filter(|most| used.queued_jobs >= *most) {
        return Err(StoreError::Quota(format!(
            "the project has {} jobs waiting, and may have {most}; wait for one to start, or cancel one",
            used.queued_jobs
        )));
    }
    if let Some(most) = quotas.max_trained_tokens_per_month.filter(|most| used.trained_tokens_this_month >= *most) {
        return Err(StoreError::Quota(format!(
            "the project has trained on {} tokens this month, and may on {most}; wait for the next month (UTC), or ask the operator for more",
            used.trained_tokens_this_month
        )));
    }
    Ok(())
}

fn missing(error: StoreError, param: &str, code: &'static str, name: &str) -> StoreError {
    match error {
        StoreError::NotFound => {
            Invalid::new(param, code, format!("there is no {param} {name:?}, or it belongs to another project")).into()
        }
        other => other,
    }
}
