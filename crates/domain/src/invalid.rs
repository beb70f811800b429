//! What a client is told when a value it sent cannot be used.

use serde::{Deserialize, Serialize};

/// One bad line of a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineError {
    /// Its number in the uploaded file, from 1.
    pub line: u64,
    /// What is wrong with it; never quotes it.
    pub message: String,
}

/// A value that was refused: which one, why, and a word for programs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Invalid {
    /// The path of the value in the request, as `method.supervised.hyperparameters.n_epochs`.
    pub param: String,
    /// A stable word for programs, as `out_of_bounds`.
    pub code: &'static str,
    /// One sentence for a person: what is wrong and what would be right.
    pub message: String,
}

impl Invalid {
    /// A refused value.
    pub fn new(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self { param: param.into(), code, message: message.into() }
    }

    /// The same refusal with `prefix.` before its parameter, for a value that stands inside another.
    #[must_use]
    pub fn within(mut self, prefix: &str) -> Self {
        self.param = format!("{prefix}.{}", self.param);
        self
    }
}
