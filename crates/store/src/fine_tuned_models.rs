//! What jobs make: models under public names, and the adapters that are their files.

use holdfast_domain::ids::{JobId, ProjectId};
use time::OffsetDateTime;

use crate::files::object_ref;
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

impl Store {
    /// One fine-tuned model.
    ///
    /// # Errors
    /// When the project has no such model, or the database fails.
    pub async fn fine_tuned_model(&self, project: ProjectId, name: &str) -> Result<FineTunedModel, StoreError> {
        sqlx::query_as!(
            FineTunedModel,
            "select f.name, f.created_at, p.organization from fine_tuned_models f join projects p on p.id = f.project_id
             where f.project_id = $1 and f.name = $2",
            project.0,
            name
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::NotFound)
    }

    /// A project's fine-tuned models, by name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn fine_tuned_models(&self, project: ProjectId) -> Result<Vec<FineTunedModel>, StoreError> {
        Ok(sqlx::query_as!(
            FineTunedModel,
            "select f.name, f.created_at, p.organization from fine_tuned_models f join projects p on p.id = f.project_id
             where f.project_id = $1 order by f.name",
            project.0
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// The files of a job's adapter, by name; empty until the job has succeeded.
    ///
    /// # Errors
    /// When the project has no such job, or the database fails.
    pub async fn adapter_files(&self, project: ProjectId, job: JobId) -> Result<Vec<AdapterFile>, StoreError> {
        self.job(project, job).await?;
        let rows =
            sqlx::query!("select name, object_key, bytes, sha256 from adapter_files where job_id = $1 order by name", job.0)
                .fetch_all(&self.pool)
                .await?;
        rows.into_iter()
            .map(|r| Ok(AdapterFile { name: r.name, object: object_ref(r.object_key, r.bytes, &r.sha256)? }))
            .collect()
    }
}
