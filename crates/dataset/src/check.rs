//! What a check of a file finds, and the check against a model's template and tokenizer.

use holdfast_domain::invalid::LineError;
use holdfast_domain::limits::MAX_LINE_ERRORS;

use crate::encode::{EncodeOptions, Example};
use crate::lines::{Line, LineSplitter};
use crate::row::Row;
use crate::tokenizer::ChatTokenizer;

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Good rows.
    pub rows: u64,
    /// Bad lines, also those that `errors` has no room for.
    pub error_count: u64,
    /// The first [`MAX_LINE_ERRORS`] of them.
    pub errors: Vec<LineError>,
    /// Tokens of the good rows; 0 when the check did not tokenise.
    pub tokens: u64,
    /// Tokens of the good rows that count towards the loss; 0 when the check did not tokenise.
    pub supervised_tokens: u64,
}

impl Report {
    /// Adds a bad line.
    pub fn record(&mut self, error: LineError) {
        self.error_count += 1;
        if self.errors.len() < MAX_LINE_ERRORS {
            self.errors.push(error);
        }
    }

    /// The findings in one paragraph for a person: how many lines, and the first few of them.
    #[must_use]
    pub fn summary(&self) -> String {
        const SHOWN: usize = 10;
        let lines = if self.error_count == 1 { "1 line cannot" } else { &format!("{} lines cannot", self.error_count) };
        let mut text = format!("{lines} be used");
        for error in self.errors.iter().take(SHOWN) {
            text.push_str(&format!("; line {}: {}", error.line, error.message));
        }
        if self.error_count > SHOWN as u64 {
            text.push_str(&format!("; and {} more", self.error_count - SHOWN as u64));
        }
        text
    }
}

/// Encodes every line of a file, calling `each` with the line's number and example, and reports what could not be encoded.
///
/// # Errors
/// Only those of reading `file`; bad lines are in the report.
pub fn encode_file(
    mut file: impl std::io::Read,
    tokenizer: &ChatTokenizer,
    options: EncodeOptions,
    mut each: impl FnMut(u64, Example),
) -> std::io::Result<Report> {
    let mut report = Report::default();
    let mut visit = |number: u64, line: Line<'_>| {
        let row = Row::parse_line(line).map_err(|e| e.to_string());
        let outcome = row.and_then(|row| tokenizer.encode(&row, options).map_err(|e| e.to_string()));
        match outcome {
            Ok(example) => {
                report.rows += 1;
                report.tokens += example.ids.len() as u64;
                report.supervised_tokens += example.supervised_count() as u64;
                each(number, example);
            }
            Err(message) => report.record(LineError { line: number, message }),
        }
    };
    let mut splitter = LineSplitter::default();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        splitter.push(&buffer[..read], &mut visit);
    }
    splitter.finish(&mut visit);
    Ok(report)
}
