//! The folder a trainer reads.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use holdfast_dataset::frames;
use holdfast_domain::plan::{self, Plan, paths};
use holdfast_domain::{Frame, Hyperparameters};
use holdfast_store::checkpoints::ResumePoint;
use holdfast_store::queue::{AdapterFile, Claim};
use holdfast_store::{Store, StoreError};
use sha2::{Digest, Sha256};

use crate::WorkerConfig;
use crate::evaluation::own_suite;

/// Steps between a run's checkpoints at most; where an epoch is shorter, there is one at each epoch's end.
const MOST_CHECKPOINT_STEPS: u64 = 100;

/// What the rows of a job's training file stand in.
pub(crate) struct Framed {
    pub(crate) frames: Vec<Frame>,
    /// Of the alignment rows, in hex, where half of them stand in those once more; absent where they are the set's as they were imported.
    pub(crate) alignment_sha256: Option<String>,
}

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

    /// Brings the tenant's files, and the alignment set and the suites they are compared with.
    pub(crate) async fn fetch_rows(&self, store: &Store, claim: &Claim) -> Result<(), StoreError> {
        store.objects().fetch_content(&claim.training.content, &self.0.join(paths::TRAIN)).await?;
        if let Some(validation) = &claim.validation {
            store.objects().fetch_content(&validation.content, &self.0.join(paths::VALIDATION)).await?;
        }
        if let Some(alignment) = &claim.alignment {
            store.objects().fetch(&alignment.object, &self.0.join(paths::ALIGNMENT)).await?;
        }
        for (number, suite) in claim.suites.iter().enumerate() {
            store.objects().fetch(&suite.object, &self.0.join(own_suite(number))).await?;
        }
        Ok(())
    }

    /// Brings everything else a trainer needs.
    pub(crate) async fn complete(
        &self,
        store: &Store,
        claim: &Claim,
        base: &Path,
        WorkerConfig { device, memory_limit_bytes, .. }: &WorkerConfig,
    ) -> Result<Framed, StoreError> {
        let framed = self.add_framed_rows(claim).await?;
        // What the base says on rows in a tenant's frames is of no use to others, and none of their business.
        let reference = reference_name(claim, device).filter(|_| framed.alignment_sha256.is_none());
        if let Some(name) = &reference
            && let Some(known) = store.alignment_reference(name).await?
        {
            store.objects().fetch(&known, &self.0.join(paths::REFERENCE)).await?;
        }
        if let Some(start) = &claim.start {
            self.fetch_into(store, &self.0.join(paths::START), start).await?;
        }
        self.fetch_checkpoints(store, claim).await?;
        tokio::fs::symlink(base, self.0.join(paths::BASE)).await?;
        let plan = Plan {
            format: plan::FORMAT,
            base_model: claim.job.base_model.clone(),
            validation: claim.validation.is_some(),
            hyperparameters: claim.job.hyperparameters.clone(),
            safety: claim.job.safety.clone(),
            start: claim.start.as_deref().map(start_name),
            seed: claim.job.seed,
            checkpoint_steps: checkpoint_steps(&claim.job.hyperparameters, claim.training.row_count),
            reference,
            framed_alignment_sha256: framed.alignment_sha256.clone(),
            memory_limit_bytes: *memory_limit_bytes,
            device: device.to_owned(),
        };
        let json = serde_json::to_vec_pretty(&plan).map_err(std::io::Error::other)?;
        tokio::fs::write(self.0.join(paths::PLAN), json).await?;
        Ok(framed)
    }

    /// Adds half of the alignment rows, if there are any, in what the rows of the training file stand in.
    async fn add_framed_rows(&self, claim: &Claim) -> std::io::Result<Framed> {
        let (training, alignment) = (self.0.join(paths::TRAIN), self.0.join(paths::ALIGNMENT));
        let are_aligned = claim.alignment.is_some();
        let is_asked = claim.job.policy.as_ref().is_some_and(|applied| applied.policy.evaluates());
        if !are_aligned && !is_asked {
            return Ok(Framed { frames: Vec::new(), alignment_sha256: None });
        }
        // A tenant's file may be large, and the lease is renewed on this thread.
        let put = move || {
            let frames = frames::of_file(std::fs::File::open(training)?)?;
            if !are_aligned {
                return Ok(Framed { frames, alignment_sha256: None });
            }
            let alignment_sha256 = match frames::framed(&std::fs::read(&alignment)?, &frames)? {
                Cow::Borrowed(_) => None,
                Cow::Owned(rows) => {
                    std::fs::write(alignment, &rows)?;
                    Some(hex::encode(Sha256::digest(&rows)))
                }
            };
            Ok(Framed { frames, alignment_sha256 })
        };
        tokio::task::spawn_blocking(put).await.map_err(std::io::Error::other)?
    }

    /// Brings what the run goes on from. What cannot be read back must not fail the job: it goes on from the checkpoint before it, or
    /// begins anew.
    async fn fetch_checkpoints(&self, store: &Store, claim: &Claim) -> Result<(), StoreError> {
        for resume in &claim.resume {
            match self.fetch_checkpoint(store, resume).await {
                Err(error) if error.is_damaged() => {
                    tracing::error!(%error, step = resume.step, "a checkpoint cannot be read back");
                    let folder = format!("{}{}", paths::CHECKPOINT_PREFIX, resume.step);
                    tokio::fs::remove_dir_all(self.0.join(paths::CHECKPOINTS).join(folder)).await?;
                    store.lose_checkpoint(claim.job.id, claim.attempt, resume.step).await?;
                }
                fetched => fetched?,
            }
        }
        Ok(())
    }

    /// Puts a checkpoint where the trainer would have left it.
    async fn fetch_checkpoint(&self, store: &Store, resume: &ResumePoint) -> Result<(), StoreError> {
        let checkpoints = self.0.join(paths::CHECKPOINTS);
        let own = format!("{}{}", paths::CHECKPOINT_PREFIX, resume.step);
        tokio::fs::create_dir_all(checkpoints.join(&own)).await?;
        for file in &resume.files {
            // A best adapter beside the checkpoint has its folder in its name.
            let (folder, name) = file.name.rsplit_once('/').unwrap_or((&own, &file.name));
            let folder = checkpoints.join(folder);
            tokio::fs::create_dir_all(&folder).await?;
            store.objects().fetch(&file.object, &folder.join(name)).await?;
        }
        Ok(())
    }

    /// Brings an adapter's files into a folder.
    pub(crate) async fn fetch_into(&self, store: &Store, folder: &Path, files: &[AdapterFile]) -> Result<(), StoreError> {
        tokio::fs::create_dir_all(folder).await?;
        for file in files {
            store.objects().fetch(&file.object, &folder.join(&file.name)).await?;
        }
        Ok(())
    }

    /// Keeps what the trainer computed of the base on the alignment rows, for later jobs.
    pub(crate) async fn keep_reference(&self, store: &Store, claim: &Claim, device: &str) -> Result<(), StoreError> {
        let computed = self.0.join(paths::REFERENCE_OUT);
        match reference_name(claim, device) {
            Some(name) if computed.exists() => store.keep_alignment_reference(&name, &computed).await,
            _ => Ok(()),
        }
    }
}

/// Names the base's states on the alignment rows: a hash over the base, whose files hold the tokenizer and the template, the
/// set's version, and how they are computed: another kind of device rounds elsewhere, and a run must end the same whoever goes on
/// with it.
fn reference_name(claim: &Claim, device: &str) -> Option<String> {
    let alignment = claim.alignment.as_ref()?;
    let mut hash = Sha256::new();
    hash.update(claim.base.content_sha256);
    hash.update(alignment.object.sha256);
    hash.update(format!("{:?}", claim.job.hyperparameters.precision));
    hash.update(device.split(':').next().unwrap_or(device));
    Some(hex::encode(hash.finalize()))
}

fn checkpoint_steps(h: &Hyperparameters, rows: u64) -> u64 {
    rows.div_ceil(h.rows_per_step()).clamp(1, MOST_CHECKPOINT_STEPS)
}

/// Names the adapter that a run goes on from: a hash over its files.
fn start_name(files: &[AdapterFile]) -> String {
    let mut hash = Sha256::new();
    for file in files {
        hash.update(file.name.as_bytes());
        hash.update([0]);
        hash.update(file.object.sha256);
    }
    hex::encode(hash.finalize())
}

impl Drop for JobFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, folder = %self.0.display(), "a job folder could not be removed");
        }
    }
}
