//! The folder a trainer reads.

use std::path::{Path, PathBuf};

use holdfast_domain::plan::{self, Plan, paths};
use holdfast_store::queue::Claim;
use holdfast_store::{Store, StoreError};

/// Steps between a run's checkpoints.
const CHECKPOINT_STEPS: u64 = 100;

/// A job's folder; removed with all the tenant's rows when dropped.
#[derive(Debug)]
pub(crate) struct JobFolder(PathBuf);

impl JobFolder {
    pub(crate) async fn create(jobs: &Path, claim: &Claim) -> Result<Self, StoreError> {
        let path = jobs.join(format!("{}-{}", claim.job.id, claim.attempt));
        // What a killed worker left of the same attempt.
        let _ = tokio::fs::remove_dir_all(&path).await;
        tokio::fs::create_dir_all(path.join(paths::OUT)).await?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Brings the tenant's files.
    pub(crate) async fn fetch_rows(&self, store: &Store, claim: &Claim) -> Result<(), StoreError> {
        store.objects().fetch(&claim.training.object, &self.0.join(paths::TRAIN)).await?;
        if let Some(validation) = &claim.validation {
            store.objects().fetch(&validation.object, &self.0.join(paths::VALIDATION)).await?;
        }
        Ok(())
    }

    /// Brings everything else a trainer needs.
    pub(crate) async fn complete(&self, store: &Store, claim: &Claim, base: &Path, device: &str) -> Result<(), StoreError> {
        if let Some(alignment) = &claim.alignment {
            store.objects().fetch(alignment, &self.0.join(paths::ALIGNMENT)).await?;
        }
        tokio::fs::symlink(base, self.0.join(paths::BASE)).await?;
        let plan = Plan {
            format: plan::FORMAT,
            base_model: claim.job.base_model.clone(),
            validation: claim.validation.is_some(),
            hyperparameters: claim.job.hyperparameters.clone(),
            safety: claim.job.safety.clone(),
            seed: claim.job.seed,
            checkpoint_steps: CHECKPOINT_STEPS,
            reference: None,
            memory_limit_bytes: None,
            device: device.to_owned(),
        };
        let json = serde_json::to_vec_pretty(&plan).map_err(std::io::Error::other)?;
        Ok(tokio::fs::write(self.0.join(paths::PLAN), json).await?)
    }
}

impl Drop for JobFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, folder = %self.0.display(), "a job folder could not be removed");
        }
    }
}
