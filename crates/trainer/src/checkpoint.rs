//! Where a run stands between two steps, and how it is kept on disk.
//!
//! The order of the rows and the dropout are functions of seed and step, so a run goes on from its weights, its optimiser and
//! three numbers. A checkpoint is written beside its place and renamed, and bound by a hash: one that is torn or was edited is
//! passed over for the one before it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::Tensor;

use crate::adapter::Adapter;
use crate::optimizer::AdamW;

/// Checkpoints that are kept: the newest, and the one before it.
const KEPT: usize = 2;
const MANIFEST: &str = "checkpoint.json";
const STATE: &str = "state.f32";

/// How far a run is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Steps taken.
    pub step: u64,
    /// Tokens of the training rows that were read.
    pub tokens: u64,
    /// Steps in which the gradients conflicted.
    pub conflicts: u64,
}

/// What changes from step to step, beside the adapter.
#[derive(Debug)]
pub struct State {
    /// How far the run is.
    pub cursor: Cursor,
    /// The optimiser and its moments.
    pub optimizer: AdamW,
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    cursor: Cursor,
    /// SHA-256 over the run's own name, the cursor and the numbers.
    sha256: String,
}

/// The checkpoints of one run, under one folder.
#[derive(Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    /// What the run is: a checkpoint of another plan is not one of this run.
    run: Vec<u8>,
}

impl Checkpoints {
    /// Those under `folder`, of the run that `run` describes.
    #[must_use]
    pub fn new(folder: PathBuf, run: Vec<u8>) -> Self {
        Self { folder, run }
    }

    /// Writes a checkpoint, and removes those that are no longer needed.
    ///
    /// # Errors
    /// When it cannot be written; those before it stay.
    pub fn save(&self, adapter: &Adapter, state: &State) -> Result<()> {
        let name = format!("step-{}", state.cursor.step);
        let (unfinished, path) = (self.folder.join(format!("{name}.partial")), self.folder.join(&name));
        let written = || -> Result<()> {
            std::fs::create_dir_all(&unfinished)?;
            let mut numbers = Vec::new();
            for tensor in std::iter::once(adapter.flat()).chain(state.optimizer.moments()) {
                for number in Vec::<f32>::try_from(tensor)? {
                    numbers.extend_from_slice(&number.to_le_bytes());
                }
            }
            let manifest = Manifest { cursor: state.cursor, sha256: self.hash(state.cursor, &numbers)? };
            for (name, bytes) in [(STATE, &numbers), (MANIFEST, &serde_json::to_vec_pretty(&manifest)?)] {
                let mut file = File::create(unfinished.join(name))?;
                file.write_all(bytes)?;
                file.sync_all()?;
            }
            if path.exists() {
                std::fs::remove_dir_all(&path)?;
            }
            std::fs::rename(&unfinished, &path)?;
            // The rename itself must outlive a power cut.
            Ok(File::open(&self.folder)?.sync_all()?)
        };
        written().with_context(|| format!("cannot write the checkpoint {}", path.display()))?;
        for (_, old) in self.all()?.into_iter().skip(KEPT) {
            std::fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
        Ok(())
    }

    /// The newest sound checkpoint, its weights put into `adapter`; `None` where there is none. Whatever is not sound is named
    /// in `passed_over`.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn restore(&self, adapter: &Adapter, weight_decay: f64, mut passed_over: impl FnMut(String)) -> Result<Option<State>> {
        for (_, path) in self.all()? {
            match self.read(&path, adapter, weight_decay) {
                Ok(state) => return Ok(Some(state)),
                Err(error) => passed_over(format!("{}: {error:#}; going on from the one before it", path.display())),
            }
        }
        Ok(None)
    }

    fn read(&self, path: &Path, adapter: &Adapter, weight_decay: f64) -> Result<State> {
        let Manifest { cursor, sha256 } = serde_json::from_slice(&std::fs::read(path.join(MANIFEST))?)?;
        let numbers = std::fs::read(path.join(STATE))?;
        ensure!(self.hash(cursor, &numbers)? == sha256, "its hash does not match: it is torn, was edited, or is of another plan");
        let length = adapter.flat().numel();
        ensure!(numbers.len() == 3 * length * size_of::<f32>(), "it does not fit the adapter");
        let numbers: Vec<f32> = numbers.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let [weights, first, second] = [0, 1, 2].map(|at| {
            let part = numbers.get(at * length..(at + 1) * length).unwrap_or_default();
            Tensor::from_slice(part).to_device(adapter.flat().device())
        });
        tch::no_grad(|| adapter.flat().shallow_clone().copy_(&weights));
        let steps = i32::try_from(cursor.step).context("it has taken too many steps")?;
        Ok(State { cursor, optimizer: AdamW::resume(first, second, steps, weight_decay) })
    }

    fn hash(&self, cursor: Cursor, numbers: &[u8]) -> Result<String> {
        let mut hash = Sha256::new();
        for part in [&self.run, &serde_json::to_vec(&cursor)?, numbers] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Ok(hex::encode(hash.finalize()))
    }

    /// Finished checkpoints with their steps, newest first.
    fn all(&self) -> Result<Vec<(u64, PathBuf)>> {
        let entries = match std::fs::read_dir(&self.folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("cannot read {}", self.folder.display()))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            if let Some(step) = entry.file_name().to_str().and_then(|name| name.strip_prefix("step-")?.parse().ok()) {
                found.push((step, entry.path()));
            }
        }
        found.sort_unstable_by(|x, y| y.cmp(x));
        Ok(found)
    }
}
