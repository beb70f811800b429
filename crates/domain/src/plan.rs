//! The plan: what the worker writes into a job folder and the trainer obeys.
//!
//! ```text
//! JOB_DIR/plan.json           this
//! JOB_DIR/base/               the base model: config.json, model.safetensors, tokenizer.json, chat_template.jinja
//! JOB_DIR/train.jsonl         the tenant's rows; validation.jsonl beside it when there is one
//! JOB_DIR/alignment.jsonl     requests and refusals
//! JOB_DIR/start/              the adapter to go on from, in PEFT's format, when there is one
//! JOB_DIR/out/                what the trainer writes: progress.jsonl, checkpoints/, adapter/, exit.json
//! ```

use serde::{Deserialize, Serialize};

use crate::{Hyperparameters, Safety};

/// The form of the plan; a trainer refuses another.
pub const FORMAT: u32 = 5;

/// Names inside a job folder, one place for both sides.
pub mod paths {
    /// The plan.
    pub const PLAN: &str = "plan.json";
    /// The base model's folder.
    pub const BASE: &str = "base";
    /// The training rows.
    pub const TRAIN: &str = "train.jsonl";
    /// The validation rows.
    pub const VALIDATION: &str = "validation.jsonl";
    /// The alignment rows.
    pub const ALIGNMENT: &str = "alignment.jsonl";
    /// The folder of the adapter that the run goes on from.
    pub const START: &str = "start";
    /// What the trainer writes.
    pub const OUT: &str = "out";
    /// Progress lines, one JSON object each, only ever appended to.
    pub const PROGRESS: &str = "out/progress.jsonl";
    /// The adapter in PEFT's format.
    pub const ADAPTER: &str = "out/adapter";
    /// Where the run stood after some of its steps, a folder each.
    pub const CHECKPOINTS: &str = "out/checkpoints";
    /// A checkpoint's folder begins with it, and ends with its step. An adapter's two files stand in it, and beside them what only
    /// the run itself needs to go on.
    pub const CHECKPOINT_PREFIX: &str = "step-";
    /// What a checkpoint holds besides: see [`super::CheckpointFiles`].
    pub const CHECKPOINT_MANIFEST: &str = "checkpoint.json";
    /// The folder of a best adapter beside the checkpoints begins with it, and ends with its step.
    pub const BEST_PREFIX: &str = "best-";
    /// An adapter's configuration in PEFT's format, in each of its folders.
    pub const ADAPTER_CONFIG: &str = "adapter_config.json";
    /// An adapter's weights in PEFT's format, in each of its folders.
    pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
    /// How hard each training row pushes against the alignment, one JSON object a line, where it is asked for.
    pub const ROW_CONFLICTS: &str = "out/row_conflicts.jsonl";
    /// The base's final hidden states on the alignment rows: known from an earlier job.
    pub const REFERENCE: &str = "reference.safetensors";
    /// The same, as this job computed them because it was given none.
    pub const REFERENCE_OUT: &str = "out/reference.safetensors";
    /// How the trainer ended.
    pub const EXIT: &str = "out/exit.json";
}

/// One run of the trainer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// [`FORMAT`].
    pub format: u32,
    /// The public name of the base model, written into the adapter's configuration.
    pub base_model: String,
    /// Whether the folder holds validation rows.
    pub validation: bool,
    /// How to train.
    pub hyperparameters: Hyperparameters,
    /// What to hold to.
    pub safety: Safety,
    /// Names the adapter in [`paths::START`] that the run goes on from, by a hash over its files; absent: a fresh one.
    #[serde(default)]
    pub start: Option<String>,
    /// Decides a fresh adapter, the order of the rows and the dropout.
    pub seed: u64,
    /// Steps between checkpoints; one is also written when the run is stopped.
    pub checkpoint_steps: u64,
    /// Names the base's states on the alignment rows; states of another name are not used.
    #[serde(default)]
    pub reference: Option<String>,
    /// SHA-256 of the alignment rows, in hex, where half of them stand in frames of the tenant's once more: a checkpoint of a run on others
    /// does not fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub framed_alignment_sha256: Option<String>,
    /// The most memory the run may need; absent: what the machine has.
    #[serde(default)]
    pub memory_limit_bytes: Option<u64>,
    /// Where to compute: `cpu`, `cuda` or `cuda:N`.
    pub device: String,
}

impl Plan {
    /// The plan without what only says where it runs and what is known already: checkpoints of one run fit every plan that is
    /// equal in this.
    #[must_use]
    pub fn identity(&self) -> Self {
        Self { reference: None, memory_limit_bytes: None, device: String::new(), ..self.clone() }
    }
}

/// What a checkpoint's manifest says to whoever carries it elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFiles {
    /// SHA-256 of each other file, in hex, by its name.
    pub files: std::collections::BTreeMap<String, String>,
}
