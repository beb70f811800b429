//! How a trainer ended: its exit code, and the record it leaves because a launcher may lose or mask the code.

use serde::{Deserialize, Serialize};

/// The adapter is written.
pub const DONE: u8 = 0;
/// The data or the plan cannot be used; trying again will not help.
pub const BAD_DATA: u8 = 65;
/// A fault of the trainer or its machine.
pub const INTERNAL: u8 = 70;
/// Stopped at a step's end because it was asked to.
pub const STOPPED: u8 = 75;

/// `out/exit.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// One of the codes above.
    pub code: u8,
    /// One sentence for the job's owner; never quotes a row.
    pub message: String,
    /// A stable word for programs, as `out_of_memory`.
    pub reason: String,
    /// Tokens of the training file that were read.
    pub trained_tokens: u64,
}
