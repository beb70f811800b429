//! What a trainer reports, put into the store: its progress, and its checkpoints once they are whole.

use std::path::Path;

use holdfast_domain::plan::{CheckpointFiles, paths};
use holdfast_domain::progress::Progress;
use holdfast_store::queue::{AdapterFile, Claim};
use holdfast_store::{Store, StoreError};

use crate::agent::{self, Checkpoint, ReportFailed, Reports};
use crate::finish::{discard, stage};

/// Where the reports of a claim's trainer go.
pub(crate) struct ToStore<'a> {
    pub(crate) store: &'a Store,
    pub(crate) claim: &'a Claim,
}

impl ToStore<'_> {
    async fn keep(&self, checkpoints: &Path, checkpoint: Checkpoint) -> Result<(), StoreError> {
        let Self { store, claim } = self;
        let key = Store::checkpoint_keys(claim.job.project, claim.job.id, claim.attempt, checkpoint.step);
        let own = checkpoints.join(format!("{}{}", paths::CHECKPOINT_PREFIX, checkpoint.step));
        let mut files = stage(store, &agent::files_in(&own).await?, &key).await?;
        let kept = async {
            check_whole(&own, &files)
                .await
                .map_err(|what| StoreError::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, what)))?;
            if let Some(step) = checkpoint.best {
                let folder = format!("{}{step}", paths::BEST_PREFIX);
                let best = agent::files_in(&checkpoints.join(&folder)).await?;
                for file in stage(store, &best, |name| key(&format!("{folder}/{name}"))).await? {
                    files.push(AdapterFile { name: format!("{folder}/{}", file.name), ..file });
                }
            }
            store.keep_checkpoint(claim.job.id, claim.attempt, checkpoint.step, checkpoint.settled, &files).await
        }
        .await;
        if kept.is_err() {
            // It is staged anew when it is tried again.
            discard(store, &files).await;
        }
        kept
    }
}

/// Holds what was staged of a checkpoint to what the trainer wrote: one that is torn must not take the place of a whole one.
async fn check_whole(checkpoint: &Path, staged: &[AdapterFile]) -> Result<(), String> {
    let manifest = tokio::fs::read(checkpoint.join(paths::CHECKPOINT_MANIFEST)).await.map_err(|e| e.to_string())?;
    let CheckpointFiles { files } = serde_json::from_slice(&manifest).map_err(|e| e.to_string())?;
    let is_there = |(name, sha256): (&String, &String)| {
        staged.iter().any(|file| file.name == *name && hex::encode(file.object.sha256) == *sha256)
    };
    if files.iter().all(is_there) { Ok(()) } else { Err("the checkpoint is torn".into()) }
}

impl Reports for ToStore<'_> {
    async fn progress(&self, lines: &[Progress]) -> Result<(), ReportFailed> {
        self.store.report(self.claim.job.id, self.claim.attempt, lines).await.map_err(|error| {
            tracing::warn!(%error, "progress could not be written down");
            ReportFailed
        })
    }

    async fn checkpoint(&self, checkpoints: &Path, checkpoint: Checkpoint) -> Result<(), ReportFailed> {
        let Err(error) = self.keep(checkpoints, checkpoint).await else { return Ok(()) };
        if error.is_unavailable() {
            tracing::warn!(%error, step = checkpoint.step, "a checkpoint could not be kept; trying again");
            return Err(ReportFailed);
        }
        tracing::warn!(%error, step = checkpoint.step, "a checkpoint cannot be kept");
        Ok(())
    }
}
