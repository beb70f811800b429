//! Where a run stands between two steps, and how it is kept on disk.
//!
//! The order of the rows and the dropout are functions of seed and step, so a run goes on from its adapter, its optimiser, what
//! its method remembers and a few numbers. A checkpoint holds the adapter in PEFT's format; it is written beside its place and
//! renamed, and bound by hashes: one that is torn or was edited is passed over for the one before it.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use holdfast_base_model::WeightFile;
use holdfast_domain::plan::paths::{self, BEST_PREFIX, CHECKPOINT_MANIFEST as MANIFEST, CHECKPOINT_PREFIX};
use holdfast_domain::progress::{Review, Step};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::Tensor;

use crate::adapter::Adapter;
use crate::adapter_files;
use crate::conflicts::RowConflicts;
use crate::divergence::LossWatch;
use crate::methods::{Memory, Method};
use crate::model::Model;
use crate::optimizer::AdamW;

/// Checkpoints on schedule that are kept: the newest, and the one before it.
const KEPT: usize = 2;
const STATE: &str = "state.safetensors";

/// How far a run is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Steps taken.
    pub step: u64,
    /// Tokens of the training rows that were read.
    pub tokens: u64,
    /// Steps in which the gradients conflicted.
    pub conflicts: u64,
    /// Times the run went back because it diverged, and halved its learning rate.
    pub setbacks: u32,
    /// The best measurement on the validation file so far.
    pub best: Option<Best>,
    /// What still has to follow the last step.
    pub owed: Option<Owed>,
}

/// What follows a step before the next one, in this order. Each goes over many rows, so that a run that is asked to stop breaks
/// it off, and makes up for it when it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owed {
    /// Rows are scored, a review takes place and the validation file is measured, where it is time for them.
    Scores,
    /// The same without the scores.
    Review,
    /// The validation file alone.
    Validation,
}

/// The best measurement on the validation file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Best {
    /// After which step.
    pub step: u64,
    /// The bits of its loss, a float64: exact in every format.
    loss_bits: u64,
    /// Measurements since.
    pub since: u32,
    /// Of its adapter's files.
    sha256: [u8; 32],
}

impl Best {
    /// Its loss, in nats.
    #[must_use]
    pub fn loss(&self) -> f64 {
        f64::from_bits(self.loss_bits)
    }
}

/// What changes from step to step, beside the adapter.
#[derive(Debug)]
pub struct State {
    /// How far the run is.
    pub cursor: Cursor,
    /// The optimiser and its moments.
    pub optimizer: AdamW,
    /// The method and what it remembers.
    pub method: Box<dyn Method>,
    /// The rows' conflict scores, where they are asked for.
    pub conflicts: Option<RowConflicts>,
    /// Where the last review left the run, under a method that reviews its steps.
    pub last_good: Option<LastGood>,
    /// What reviews found that no step has told of yet.
    pub reviews: Vec<Review>,
    /// The last step as it was told of, where its review is still to come.
    pub told: Option<Step>,
    /// What tells when the loss runs away.
    pub watch: LossWatch,
}

/// Weights and optimiser that passed a review: what a run goes back to.
#[derive(Debug)]
pub struct LastGood {
    /// The trainable weights, `[parameters]`.
    pub weights: Tensor,
    /// The optimiser.
    pub optimizer: AdamW,
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    cursor: Cursor,
    optimizer_steps: i32,
    /// Of the optimiser at the last review, where there are reviews.
    last_good_steps: Option<i32>,
    /// See [`LossWatch::bits`].
    watch: Option<[u64; 2]>,
    /// What the method remembers, as the bits of float64s.
    method: BTreeMap<String, u64>,
    /// The last step as it was told of, where its review is still to come. It decides nothing, and so is not sealed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    told: Option<Step>,
    /// SHA-256 of each other file.
    files: BTreeMap<String, String>,
    /// SHA-256 over the run's own name and all of the above.
    #[serde(default)]
    seal: String,
}

/// The checkpoints of one run, under one folder.
#[derive(Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    /// What the run is: a checkpoint of another plan is not one of this run.
    run: Vec<u8>,
    /// The name an adapter's configuration gives for the base.
    base_model: String,
    /// Steps between those on schedule.
    every: u64,
}

impl Checkpoints {
    /// Those under `folder`, of the run that `run` describes and that leaves one every so many steps.
    #[must_use]
    pub fn new(folder: PathBuf, run: Vec<u8>, base_model: &str, every: u64) -> Self {
        Self { folder, run, base_model: base_model.to_owned(), every: every.max(1) }
    }

    /// Whether an undisturbed run leaves a checkpoint after so many steps.
    #[must_use]
    pub const fn is_scheduled(&self, step: u64) -> bool {
        step.is_multiple_of(self.every)
    }

    /// Writes a checkpoint, and removes those that are no longer needed.
    ///
    /// # Errors
    /// When it cannot be written; those before it stay.
    pub fn save(&self, adapter: &Adapter, state: &State) -> Result<()> {
        self.place(&format!("{CHECKPOINT_PREFIX}{}", state.cursor.step), |folder| {
            adapter_files::write(folder, adapter, &self.base_model)?;
            let memory = state.method.memory();
            write_vectors(&folder.join(STATE), state, &memory)?;
            let mut manifest = Manifest {
                cursor: state.cursor,
                optimizer_steps: state.optimizer.steps(),
                last_good_steps: state.last_good.as_ref().map(|good| good.optimizer.steps()),
                watch: state.watch.bits(),
                told: state.told.clone(),
                method: memory.numbers.iter().map(|(name, number)| (name.clone(), number.to_bits())).collect(),
                files: [paths::ADAPTER_CONFIG, paths::ADAPTER_WEIGHTS, STATE]
                    .into_iter()
                    .map(|name| Ok((name.to_owned(), hash_file(&folder.join(name))?)))
                    .collect::<Result<_>>()?,
                seal: String::new(),
            };
            manifest.seal = self.seal(&manifest)?;
            Ok(std::fs::write(folder.join(MANIFEST), serde_json::to_vec_pretty(&manifest)?)?)
        })?;
        let mut scheduled = 0;
        for (step, folder) in self.named(CHECKPOINT_PREFIX)? {
            scheduled += usize::from(self.is_scheduled(step));
            // One that was left for a stop is there to go on from, and not to go back to.
            let stays = step == state.cursor.step || (self.is_scheduled(step) && scheduled <= KEPT);
            if !stays {
                std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
            }
        }
        Ok(())
    }

    /// Keeps `adapter`, after `step` and with that validation `loss` in nats, as the best so far. The best ones that the
    /// checkpoints name stay beside it: a run that goes back goes back to theirs.
    ///
    /// # Errors
    /// When it cannot be written; the best before it stays.
    pub fn save_best(&self, adapter: &Adapter, step: u64, loss: f64) -> Result<Best> {
        self.place(&format!("{BEST_PREFIX}{step}"), |folder| adapter_files::write(folder, adapter, &self.base_model))?;
        let sha256 = hash_adapter(&self.best(step))?;
        let mut wanted = vec![step];
        for (_, checkpoint) in self.named(CHECKPOINT_PREFIX)? {
            wanted.extend(read_manifest(&checkpoint).ok().and_then(|manifest| manifest.cursor.best).map(|best| best.step));
        }
        for (step, folder) in self.named(BEST_PREFIX)? {
            if !wanted.contains(&step) {
                remove_if_there(&folder)?;
            }
        }
        Ok(Best { step, loss_bits: loss.to_bits(), since: 0, sha256 })
    }

    /// The adapter of the `best` measurement.
    ///
    /// # Errors
    /// When it is gone, torn, or was edited.
    pub fn read_best(&self, model: &Model, best: &Best) -> Result<Adapter> {
        self.check_best(best)?;
        adapter_files::read(&self.best(best.step), model)
    }

    fn check_best(&self, best: &Best) -> Result<()> {
        let folder = self.best(best.step);
        let is_sound = hash_adapter(&folder)? == best.sha256;
        ensure!(is_sound, "the best adapter, {}, is torn or was edited", folder.display());
        Ok(())
    }

    fn best(&self, step: u64) -> PathBuf {
        self.folder.join(format!("{BEST_PREFIX}{step}"))
    }

    /// Removes the checkpoint after `step`.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn discard(&self, step: u64) -> Result<()> {
        Ok(remove_if_there(&self.folder.join(format!("{CHECKPOINT_PREFIX}{step}")))?)
    }

    /// Fills a folder beside its place, makes it durable, and puts it there.
    fn place(&self, name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (unfinished, path) = (self.folder.join(format!("{name}.partial")), self.folder.join(name));
        let placed = || -> Result<()> {
            remove_if_there(&unfinished)?;
            std::fs::create_dir_all(&unfinished)?;
            fill(&unfinished)?;
            for entry in std::fs::read_dir(&unfinished)? {
                File::open(entry?.path())?.sync_all()?;
            }
            remove_if_there(&path)?;
            std::fs::rename(&unfinished, &path)?;
            // The rename itself must outlive a power cut.
            Ok(File::open(&self.folder)?.sync_all()?)
        };
        placed().with_context(|| {
            // On a full disk, what is left of it would take the place of the record that says so.
            let _ = remove_if_there(&unfinished);
            format!("cannot write the checkpoint {}", path.display())
        })
    }

    /// Puts the newest sound checkpoint into `adapter` and `state`, and returns whether there was one. Whatever is not sound is
    /// named in `passed_over`.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn restore(
        &self,
        model: &Model,
        adapter: &Adapter,
        state: &mut State,
        mut passed_over: impl FnMut(String),
    ) -> Result<bool> {
        for (_, path) in self.named(CHECKPOINT_PREFIX)? {
            match self.read(&path, model, adapter, state) {
                Ok(()) => return Ok(true),
                Err(error) => passed_over(format!("{}: {error:#}; going on from the one before it", path.display())),
            }
        }
        Ok(false)
    }

    fn read(&self, path: &Path, model: &Model, adapter: &Adapter, state: &mut State) -> Result<()> {
        let manifest = read_manifest(path)?;
        ensure!(self.seal(&manifest)? == manifest.seal, "its seal does not match: it was edited, or is of another plan");
        for (name, expected) in &manifest.files {
            ensure!(hash_file(&path.join(name))? == *expected, "{name} is torn or was edited");
        }
        manifest.cursor.best.as_ref().map_or(Ok(()), |best| self.check_best(best))?;
        let kept = adapter_files::read(path, model)?;
        ensure!(kept.flat().size() == adapter.flat().size(), "it does not fit the adapter");
        let mut vectors = read_vectors(&path.join(STATE))?;
        let mut moment =
            |name: &str| vectors.remove(name).with_context(|| format!("{STATE} lacks {name}")).map(|v| v.to_device(model.device));
        let (first, second) = (moment(FIRST)?, moment(SECOND)?);
        let last_good = match manifest.last_good_steps {
            Some(steps) => {
                let [weights, first, second] = [moment(GOOD_WEIGHTS)?, moment(GOOD_FIRST)?, moment(GOOD_SECOND)?];
                Some(LastGood { weights, optimizer: state.optimizer.resumed(first, second, steps) })
            }
            None => None,
        };
        let (of_conflicts, of_method): (BTreeMap<_, _>, BTreeMap<_, _>) =
            vectors.into_iter().partition(|(name, _)| name.starts_with(CONFLICTS));
        adapter.set(kept.flat());
        state.cursor = manifest.cursor;
        state.told = manifest.told;
        state.last_good = last_good;
        state.watch = LossWatch::from_bits(manifest.watch);
        state.optimizer = state.optimizer.resumed(first, second, manifest.optimizer_steps);
        state.method.recall(Memory {
            numbers: manifest.method.into_iter().map(|(name, bits)| (name, f64::from_bits(bits))).collect(),
            vectors: without_prefix(of_method, METHOD).map(|(name, vector)| (name, vector.to_device(model.device))).collect(),
        });
        if let Some(conflicts) = &mut state.conflicts {
            conflicts.recall(without_prefix(of_conflicts, CONFLICTS).collect());
        }
        Ok(())
    }

    fn seal(&self, manifest: &Manifest) -> Result<String> {
        let unsealed = serde_json::to_vec(&(
            &manifest.cursor,
            manifest.optimizer_steps,
            manifest.last_good_steps,
            manifest.watch,
            &manifest.method,
            &manifest.files,
        ))?;
        let mut hash = Sha256::new();
        for part in [&self.run, &unsealed] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Ok(hex::encode(hash.finalize()))
    }

    /// Finished folders of that name with their steps, newest first.
    fn named(&self, prefix: &str) -> Result<Vec<(u64, PathBuf)>> {
        let entries = match std::fs::read_dir(&self.folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("cannot read {}", self.folder.display()))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            if let Some(step) = entry.file_name().to_str().and_then(|name| name.strip_prefix(prefix)?.parse().ok()) {
                found.push((step, entry.path()));
            }
        }
        found.sort_unstable_by(|x, y| y.cmp(x));
        Ok(found)
    }
}

const FIRST: &str = "optimizer.first";
const SECOND: &str = "optimizer.second";
const GOOD_WEIGHTS: &str = "last_good.weights";
const GOOD_FIRST: &str = "last_good.first";
const GOOD_SECOND: &str = "last_good.second";
const METHOD: &str = "method.";
const CONFLICTS: &str = "conflicts.";

fn write_vectors(path: &Path, state: &State, memory: &Memory) -> Result<()> {
    let [first, second] = state.optimizer.moments();
    let mut vectors = vec![(FIRST.to_owned(), first.shallow_clone()), (SECOND.to_owned(), second.shallow_clone())];
    if let Some(LastGood { weights, optimizer }) = &state.last_good {
        let [first, second] = optimizer.moments();
        let named = [(GOOD_WEIGHTS, weights), (GOOD_FIRST, first), (GOOD_SECOND, second)];
        vectors.extend(named.map(|(name, vector)| (name.to_owned(), vector.shallow_clone())));
    }
    vectors.extend(memory.vectors.iter().map(|(name, vector)| (format!("{METHOD}{name}"), vector.shallow_clone())));
    if let Some(conflicts) = &state.conflicts {
        vectors.extend(conflicts.memory().into_iter().map(|(name, vector)| (format!("{CONFLICTS}{name}"), vector)));
    }
    let mut stored = Vec::new();
    for (name, vector) in vectors {
        let numbers = Vec::<f32>::try_from(&vector.reshape(-1)).with_context(|| format!("{name} is no vector"))?;
        stored.push((name, numbers.len(), numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>()));
    }
    let views = stored
        .iter()
        .map(|(name, length, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, vec![*length], bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    Ok(safetensors::serialize_to_file(views, None, path)?)
}

fn read_vectors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let file = WeightFile::open(path)?;
    let vector = |name: String| {
        let stored = file.get(&name).filter(|stored| stored.dtype == Dtype::F32);
        let bytes = stored.with_context(|| format!("{name} is not float32"))?.bytes;
        let numbers: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Ok((name, Tensor::from_slice(&numbers)))
    };
    file.names().into_iter().map(vector).collect()
}

fn without_prefix(vectors: BTreeMap<String, Tensor>, prefix: &'static str) -> impl Iterator<Item = (String, Tensor)> {
    vectors.into_iter().filter_map(move |(name, vector)| Some((name.strip_prefix(prefix)?.to_owned(), vector)))
}

fn read_manifest(checkpoint: &Path) -> Result<Manifest> {
    let path = checkpoint.join(MANIFEST);
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{MANIFEST} is torn or was edited"))
}

fn hash_file(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex::encode(Sha256::digest(bytes)))
}

/// Of both files of an adapter's folder.
fn hash_adapter(folder: &Path) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    for name in [paths::ADAPTER_CONFIG, paths::ADAPTER_WEIGHTS] {
        hash.update(hash_file(&folder.join(name))?);
    }
    Ok(hash.finalize().into())
}

fn remove_if_there(folder: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
