//! Why a job ends without an adapter, and how its exit record says so.

use std::any::Any;
use std::io::ErrorKind;

use holdfast_domain::exit::{self, ExitRecord};

/// Input that cannot be used, as opposed to a fault of the trainer. Trying again will not help.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadInput {
    /// Of the tenant: rows.
    #[error("{0}")]
    Data(String),
    /// Of the operator: the plan, the base model, the alignment set.
    #[error("{0}")]
    Setup(String),
    /// The run does not fit into memory.
    #[error("{0}")]
    Memory(String),
    /// The loss left the numbers or ran away, whatever was tried.
    #[error("{0}")]
    Diverged(String),
    /// What it goes on from is no place that the method lets a run be in.
    #[error("{0}")]
    OutsideBudget(String),
}

pub(super) fn bad_data(message: String) -> anyhow::Error {
    BadInput::Data(message).into()
}

pub(crate) fn bad_setup(message: String) -> anyhow::Error {
    BadInput::Setup(message).into()
}

pub(super) fn failed(error: &anyhow::Error) -> ExitRecord {
    if let Some(input) = error.downcast_ref::<BadInput>() {
        let reason = match input {
            BadInput::Data(_) => exit::reason::BAD_DATA,
            BadInput::Setup(_) => exit::reason::BAD_SETUP,
            BadInput::Memory(_) => exit::reason::OUT_OF_MEMORY,
            BadInput::Diverged(_) => exit::reason::DIVERGED,
            BadInput::OutsideBudget(_) => exit::reason::OUTSIDE_BUDGET,
        };
        return ExitRecord { code: exit::BAD_DATA, message: format!("{error:#}"), reason: reason.into(), trained_tokens: 0 };
    }
    let is_full = |cause: &std::io::Error| matches!(cause.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    if error.chain().filter_map(|cause| cause.downcast_ref()).any(is_full) {
        return full_disk();
    }
    fault(&format!("{error:#}"))
}

fn full_disk() -> ExitRecord {
    let message = "The disk under the job's folder has no room left.".into();
    ExitRecord { code: exit::INTERNAL, message, reason: exit::reason::FULL_DISK.into(), trained_tokens: 0 }
}

pub(super) fn fault(message: &str) -> ExitRecord {
    // A library's error may be words alone.
    if message.contains("No space left on device") {
        return full_disk();
    }
    let first_line = message.lines().next().unwrap_or_default();
    let out_of_memory = ["can't allocate memory", "out of memory", "bad_alloc", "CUDA_ERROR_OUT_OF_MEMORY"];
    let (reason, message) = if out_of_memory.iter().any(|words| message.contains(words)) {
        (exit::reason::OUT_OF_MEMORY, format!("The trainer ran out of memory. {}", exit::LESS_MEMORY))
    } else {
        (exit::reason::INTERNAL, first_line.to_owned())
    };
    ExitRecord { code: exit::INTERNAL, message, reason: reason.into(), trained_tokens: 0 }
}

pub(super) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("the trainer stopped without a reason").to_owned()
}
