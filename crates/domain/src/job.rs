//! The life of a job.
//!
//! ```text
//! validating_files ── checked ──► queued ── claimed ──► running ── published ──► succeeded
//!        │                          ▲ │                   │  │
//!        │                          │ └──── cancelled ◄───┘  │
//!        └── bad data ──► failed ◄──┼────────────────────────┤
//!                                   └──── lease expired ─────┘
//!
//! validating_files, queued ── pause ──► paused ── resume ──► where it was
//! running ── pause ──► pausing ── checkpoint written ──► paused
//! ```
//!
//! A state holds what is true only in it, and a transition consumes it: what is not written here cannot happen.

use serde::{Deserialize, Serialize};

use crate::invalid::LineError;
use crate::limits::MAX_SETBACKS;

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
    /// A worker that trains it has been asked to stop, and is writing a checkpoint.
    Pausing,
    /// It waits for its owner.
    Paused,
    /// Its model can be used.
    Succeeded,
    /// It ended without a model; the error says why.
    Failed,
    /// Its owner ended it.
    Cancelled,
}

impl Status {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::ValidatingFiles,
        Self::Queued,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The word the wire and the database use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ValidatingFiles => "validating_files",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
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
        Self::ALL.into_iter().find(|status| status.as_str() == word)
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
    /// See [`Status::Pausing`].
    Pausing {
        /// The claim that is ending.
        attempt: i32,
    },
    /// See [`Status::Paused`].
    Paused {
        /// Claims so far.
        attempt: i32,
        /// Whether its files have passed their check.
        files_checked: bool,
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
            Self::Pausing { .. } => Status::Pausing,
            Self::Paused { .. } => Status::Paused,
            Self::Succeeded { .. } => Status::Succeeded,
            Self::Failed { .. } => Status::Failed,
            Self::Cancelled => Status::Cancelled,
        }
    }

    /// The claims so far; `None` once it has ended.
    #[must_use]
    pub const fn attempt(&self) -> Option<i32> {
        match self {
            Self::ValidatingFiles { attempt }
            | Self::Queued { attempt }
            | Self::Running { attempt }
            | Self::Pausing { attempt }
            | Self::Paused { attempt, .. } => Some(*attempt),
            Self::Succeeded { .. } | Self::Failed { .. } | Self::Cancelled => None,
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

    /// Its adapter is published. A run that was asked to pause may have been done before it heard of it.
    ///
    /// # Errors
    /// When the job is not running.
    pub fn succeed(self, fine_tuned_model: String, trained_tokens: i64) -> Result<Self, InvalidTransition> {
        match self {
            Self::Running { .. } | Self::Pausing { .. } => Ok(Self::Succeeded { fine_tuned_model, trained_tokens }),
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

    /// Its owner wants it to wait. One that trains goes on until its worker has written a checkpoint.
    ///
    /// # Errors
    /// When the job has ended, or waits for its owner already.
    pub fn pause(self) -> Result<Self, InvalidTransition> {
        match self {
            Self::ValidatingFiles { attempt } => Ok(Self::Paused { attempt, files_checked: false }),
            Self::Queued { attempt } => Ok(Self::Paused { attempt, files_checked: true }),
            Self::Running { attempt } => Ok(Self::Pausing { attempt }),
            other => other.refuse("paused"),
        }
    }

    /// Its owner wants it to go on: it waits for a worker again.
    ///
    /// # Errors
    /// When the job is not paused.
    pub fn resume(self) -> Result<Self, InvalidTransition> {
        match self {
            Self::Paused { attempt, files_checked: false } => Ok(Self::ValidatingFiles { attempt }),
            Self::Paused { attempt, files_checked: true } => Ok(Self::Queued { attempt }),
            other => other.refuse("resumed"),
        }
    }

    /// Its worker gives it back: it waits again, for its owner when that was the wish.
    ///
    /// # Errors
    /// When no worker could have held the job.
    pub fn give_back(self) -> Result<Self, InvalidTransition> {
        match self {
            Self::Running { attempt } => Ok(Self::Queued { attempt }),
            Self::Pausing { attempt } => Ok(Self::Paused { attempt, files_checked: true }),
            Self::ValidatingFiles { attempt } => Ok(Self::ValidatingFiles { attempt }),
            other => other.refuse("released"),
        }
    }

    /// An attempt ended in a setback, the `setbacks`th since the job last made progress: it waits again, or fails with `error`
    /// once that is too many.
    ///
    /// # Errors
    /// When no worker could have held the job.
    pub fn set_back(self, setbacks: i32, mut error: JobError) -> Result<Self, InvalidTransition> {
        let next = self.give_back()?;
        if setbacks < MAX_SETBACKS {
            return Ok(next);
        }
        error.message = format!("{setbacks} attempts in a row made no progress; the last one: {}", error.message);
        Ok(Self::Failed { error })
    }
}

/// How a worker's attempt at a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptEnd {
    /// It checked the files, and they are sound.
    FilesAccepted,
    /// It made the job's model.
    Succeeded,
    /// The job ended without a model.
    Failed,
    /// The job's owner ended it.
    Cancelled,
    /// The job's owner paused it.
    Paused,
    /// The worker gave the job back because it stops.
    Returned,
    /// The worker or its trainer was lost: another attempt may do better, but not for ever.
    SetBack,
    /// Something that every worker needs was not to be had: the job waits for it, however long.
    Delayed,
}

impl AttemptEnd {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::FilesAccepted,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
        Self::Paused,
        Self::Returned,
        Self::SetBack,
        Self::Delayed,
    ];

    /// The word the wire and the database use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::FilesAccepted => "files_accepted",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Paused => "paused",
            Self::Returned => "returned",
            Self::SetBack => "set_back",
            Self::Delayed => "delayed",
        }
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
            assert!(end.clone().set_back(1, JobError::new("x", "y")).is_err());
            assert!(end.succeed("ft:y".into(), 1).is_err());
        }
    }

    #[test]
    fn a_setback_gives_the_job_back_until_there_are_too_many() -> Result<(), InvalidTransition> {
        let lost = || JobError::new("worker_lost", "The worker was lost.");
        assert_eq!(JobState::Running { attempt: 9 }.set_back(1, lost())?, JobState::Queued { attempt: 9 });
        assert_eq!(JobState::ValidatingFiles { attempt: 1 }.set_back(1, lost())?, JobState::ValidatingFiles { attempt: 1 });
        assert_eq!(JobState::Running { attempt: 9 }.set_back(MAX_SETBACKS, lost())?.status(), Status::Failed);
        Ok(())
    }

    #[test]
    fn a_pause_returns_to_where_it_was() -> Result<(), InvalidTransition> {
        assert_eq!(JobState::NEW.pause()?.resume()?, JobState::NEW);
        assert_eq!(JobState::Queued { attempt: 1 }.pause()?.resume()?, JobState::Queued { attempt: 1 });
        let pausing = JobState::Running { attempt: 2 }.pause()?;
        assert_eq!(pausing.clone().give_back()?.resume()?, JobState::Queued { attempt: 2 });
        assert!(pausing.clone().pause().is_err());
        assert_eq!(pausing.succeed("ft:x".into(), 1)?.status(), Status::Succeeded, "it was done before it heard of the pause");
        Ok(())
    }

    #[test]
    fn a_job_that_is_still_being_checked_cannot_finish() {
        assert!(JobState::NEW.succeed("ft:x".into(), 1).is_err());
    }
}
