//! The life of a job.
//!
//! ```text
//! validating_files ── checked ──► queued ── claimed ──► running ── published ──► succeeded
//!        │                          ▲ │                   │  │
//!        │                          │ └──── cancelled ◄───┘  │
//!        └── bad data ──► failed ◄──┼────────────────────────┤
//!                                   └──── lease expired ─────┘
//! ```
//!
//! A state holds what is true only in it, and a transition consumes it: what is not written here cannot happen.

use serde::{Deserialize, Serialize};

use crate::invalid::LineError;
use crate::limits::MAX_LOST_WORKERS;

/// What the public contract calls a job's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Its files wait for, or undergo, the check against the model's tokenizer and template.
    ValidatingFiles,
    /// It waits for a worker.
    Queued,
    /// A worker trains it.
    Running,
    /// Its model can be used.
    Succeeded,
    /// It ended without a model; the error says why.
    Failed,
    /// Its owner ended it.
    Cancelled,
}

impl Status {
    /// The word the wire and the database use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ValidatingFiles => "validating_files",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing follows this state.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Reads [`Self::as_str`] back.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::ValidatingFiles, Self::Queued, Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled]
            .into_iter()
            .find(|status| status.as_str() == word)
    }
}

/// Why a job ended without a model, in words its owner can act on. Never quotes a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobError {
    /// A stable word for programs, as `invalid_training_file`.
    pub code: String,
    /// What happened and what to do.
    pub message: String,
    /// The field of the request it comes from, when one does.
    pub param: Option<String>,
    /// The bad lines of the file, when lines of a file are at fault; at most [`crate::limits::MAX_LINE_ERRORS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<LineError>,
}

impl JobError {
    /// An error that no single field of the request causes.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), param: None, errors: Vec::new() }
    }

    /// The same error, laid at one field of the request.
    #[must_use]
    pub fn about(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The same error, with the lines at fault.
    #[must_use]
    pub fn with_lines(mut self, errors: Vec<LineError>) -> Self {
        self.errors = errors;
        self
    }
}

/// A job's state with what is true only in it. `attempt` counts claims; a worker's writes name theirs, so that a worker
/// that lost its lease cannot change a job that has moved on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobState {
    /// See [`Status::ValidatingFiles`]; the check is claimed like a training run and counts its attempts alike.
    ValidatingFiles {
        /// Claims so far.
        attempt: i32,
    },
    /// See [`Status::Queued`].
    Queued {
        /// Claims so far.
        attempt: i32,
    },
    /// See [`Status::Running`].
    Running {
        /// This claim's number, from 1.
        attempt: i32,
    },
    /// See [`Status::Succeeded`].
    Succeeded {
        /// The model's public name.
        fine_tuned_model: String,
        /// Tokens the trainer read, alignment rows not counted.
        trained_tokens: i64,
    },
    /// See [`Status::Failed`].
    Failed {
        /// Why.
        error: JobError,
    },
    /// See [`Status::Cancelled`].
    Cancelled,
}

/// A change the life of a job does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a job that is {} cannot be {wanted}", .from.as_str())]
pub struct InvalidTransition {
    /// The state it is in.
    pub from: Status,
    /// What was asked of it.
    pub wanted: &'static str,
}

impl JobState {
    /// The state every job begins in.
    pub const NEW: Self = Self::ValidatingFiles { attempt: 0 };

    /// The state without what it holds.
    #[must_use]
    pub const fn status(&self) -> Status {
        match self {
            Self::ValidatingFiles { .. } => Status::ValidatingFiles,
            Self::Queued { .. } => Status::Queued,
            Self::Running { .. } => Status::Running,
            Self::Succeeded { .. } => Status::Succeeded,
            Self::Failed { .. } => Status::Failed,
            Self::Cancelled => Status::Cancelled,
        }
    }

    fn refuse<T>(&self, wanted: &'static str) -> Result<T, InvalidTransition> {
        Err(InvalidTransition { from: self.status(), wanted })
    }

    /// A worker takes the job: the check of its files, or its training.
    ///
    /// # Errors
    /// When the job neither waits to be checked nor to be trained.
    pub fn claim(self) -> Result<Self, InvalidTransition> {
        match self {
            Self::ValidatingFiles { attempt } => Ok(Self::ValidatingFiles { attempt: attempt + 1 }),
            Self::Queued { attempt } => Ok(Self::Running { attempt: attempt + 1 }),
            other => other.refuse("claimed"),
        }
    }

    /// Its files are sound: it waits for a worker to train it.
    ///
    /// # Errors
    /// When the job is not being checked.
    pub fn accept_files(self) -> Result<Self, InvalidTransition> {
        match self {
            Self::ValidatingFiles { attempt } => Ok(Self::Queued { attempt }),
            other => other.refuse("queued"),
        }
    }

    /// Its adapter is published.
    ///
    /// # Errors
    /// When the job is not running.
    pub fn succeed(self, fine_tuned_model: String, trained_tokens: i64) -> Result<Self, InvalidTransition> {
        match self {
            Self::Running { .. } => Ok(Self::Succeeded { fine_tuned_model, trained_tokens }),
            other => other.refuse("finished"),
        }
    }

    /// It ends without a model.
    ///
    /// # Errors
    /// When the job has ended already.
    pub fn fail(self, error: JobError) -> Result<Self, InvalidTransition> {
        if self.status().is_terminal() {
            return self.refuse("failed");
        }
        Ok(Self::Failed { error })
    }

    /// Its owner ends it.
    ///
    /// # Errors
    /// When the job has ended already.
    pub fn cancel(self) -> Result<Self, InvalidTransition> {
        if self.status().is_terminal() {
            return self.refuse("cancelled");
        }
        Ok(Self::Cancelled)
    }

    /// Its worker gives it back: it waits again.
    ///
    /// # Errors
    /// When no worker could have held the job.
    pub fn give_back(self) -> Result<Self, InvalidTransition> {
        match self {
            Self::Running { attempt } => Ok(Self::Queued { attempt }),
            Self::ValidatingFiles { attempt } => Ok(Self::ValidatingFiles { attempt }),
            other => other.refuse("released"),
        }
    }

    /// Its worker was lost, as the `lost_workers`th of this job: it waits again, or fails once that is too many.
    ///
    /// # Errors
    /// When no worker could have held the job.
    pub fn lose_worker(self, lost_workers: i32) -> Result<Self, InvalidTransition> {
        let next = self.give_back()?;
        if lost_workers >= MAX_LOST_WORKERS {
            return Ok(Self::Failed {
                error: JobError::new(
                    "worker_lost",
                    format!(
                        "{lost_workers} workers were lost while they ran this job. Nothing of your data is lost: create the job again, or ask the operator why its workers stop."
                    ),
                ),
            });
        }
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_straight_way_leads_from_upload_to_model() -> Result<(), InvalidTransition> {
        let state = JobState::NEW.claim()?.accept_files()?.claim()?;
        assert_eq!(state, JobState::Running { attempt: 2 }, "no two claims share a number");
        assert_eq!(state.succeed("ft:x".into(), 10)?.status(), Status::Succeeded);
        Ok(())
    }

    #[test]
    fn nothing_follows_an_end() {
        let ends = [
            JobState::Cancelled,
            JobState::Failed { error: JobError::new("x", "y") },
            JobState::Succeeded { fine_tuned_model: "ft:x".into(), trained_tokens: 1 },
        ];
        for end in ends {
            assert!(end.status().is_terminal());
            assert!(end.clone().claim().is_err());
            assert!(end.clone().cancel().is_err());
            assert!(end.clone().fail(JobError::new("x", "y")).is_err());
            assert!(end.clone().lose_worker(1).is_err());
            assert!(end.succeed("ft:y".into(), 1).is_err());
        }
    }

    #[test]
    fn a_lost_worker_gives_the_job_back_until_too_many_are_lost() -> Result<(), InvalidTransition> {
        assert_eq!(JobState::Running { attempt: 9 }.lose_worker(1)?, JobState::Queued { attempt: 9 });
        assert_eq!(JobState::Running { attempt: 9 }.lose_worker(MAX_LOST_WORKERS)?.status(), Status::Failed);
        assert_eq!(JobState::ValidatingFiles { attempt: 1 }.lose_worker(1)?, JobState::ValidatingFiles { attempt: 1 });
        Ok(())
    }

    #[test]
    fn a_job_that_is_still_being_checked_cannot_finish() {
        assert!(JobState::NEW.succeed("ft:x".into(), 1).is_err());
    }
}
