//! What a client is told when a value it sent cannot be used.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One bad line of a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineError {
    /// Its number in the uploaded file, from 1.
    pub line: u64,
    /// Where in it, as `messages[2].role`; empty for the line as a whole, and in rows that were stored before there was a path.
    #[serde(default)]
    pub path: String,
    /// What is wrong there and what was expected; never quotes it.
    pub message: String,
}

impl fmt::Display for LineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, path, message } = self;
        write!(f, "line {line}: ")?;
        if !path.is_empty() {
            write!(f, "{path}: ")?;
        }
        f.write_str(message)
    }
}

/// Numbers of lines for a message, the first ten where they are more.
#[must_use]
pub fn line_numbers(lines: &[u64]) -> String {
    const SHOWN: usize = 10;
    let shown: Vec<String> = lines.iter().take(SHOWN).map(u64::to_string).collect();
    shown.join(", ") + if lines.len() > SHOWN { ", …" } else { "" }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_says_its_number_its_place_and_what_is_wrong() {
        let mut error = LineError { line: 7, path: "messages[0].role".into(), message: "missing".into() };
        assert_eq!(error.to_string(), "line 7: messages[0].role: missing");
        error.path.clear();
        assert_eq!(error.to_string(), "line 7: missing");
    }

    #[test]
    fn ten_lines_are_named_and_that_there_are_more() {
        let lines: Vec<u64> = (1..=11).collect();
        assert_eq!(line_numbers(&lines[..10]), "1, 2, 3, 4, 5, 6, 7, 8, 9, 10");
        assert_eq!(line_numbers(&lines), "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …");
    }

    #[test]
    fn a_bad_line_that_was_stored_without_a_place_is_read() -> Result<(), serde_json::Error> {
        let error: LineError = serde_json::from_str(r#"{"line":7,"message":"missing"}"#)?;
        assert_eq!(error, LineError { line: 7, path: String::new(), message: "missing".into() });
        Ok(())
    }
}
