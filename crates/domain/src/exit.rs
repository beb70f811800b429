//! How a trainer ended: its exit code, and the record it leaves because a launcher may lose or mask the code.

use serde::{Deserialize, Serialize};

/// The adapter is written.
pub const DONE: u8 = 0;
/// The data or the plan cannot be used; trying again will not help.
pub const BAD_DATA: u8 = 65;
/// A fault of the trainer or its machine.
pub const INTERNAL: u8 = 70;
/// Stopped because it was asked to. After a step there is a checkpoint.
pub const STOPPED: u8 = 75;

/// Stable words for what ended a run.
pub mod reason {
    /// The adapter is written.
    pub const DONE: &str = "done";
    /// It was asked to stop; where it took a step, it left a checkpoint.
    pub const STOPPED: &str = "stopped";
    /// A tenant's row cannot be used.
    pub const BAD_DATA: &str = "bad_data";
    /// The plan, the base model or the alignment set cannot be used.
    pub const BAD_SETUP: &str = "bad_setup";
    /// Memory ran out.
    pub const OUT_OF_MEMORY: &str = "out_of_memory";
    /// The disk under the job's folder has no room left.
    pub const FULL_DISK: &str = "full_disk";
    /// The loss left the numbers or ran away, also with a smaller learning rate.
    pub const DIVERGED: &str = "diverged";
    /// The adapter that the job goes on from is further from the base than its budget lets anything be.
    pub const OUTSIDE_BUDGET: &str = "outside_budget";
    /// Anything else.
    pub const INTERNAL: &str = "internal";
}

/// What a tenant can do about a run that needed more memory than there is.
pub const LESS_MEMORY: &str = "Lower batch_size or max_length, or choose precision bf16, and create the job again; gradient_accumulation_steps keeps the rows of a step.";

/// `out/exit.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// One of the codes above.
    pub code: u8,
    /// One sentence for the job's owner; never quotes a row.
    pub message: String,
    /// One of the words of [`reason`].
    pub reason: String,
    /// Tokens of the training file that were read.
    pub trained_tokens: u64,
}
