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
    /// Adds a good row.
    pub(crate) fn count(&mut self, example: &Example) {
        self.rows += 1;
        self.tokens += example.ids.len() as u64;
        self.supervised_tokens += example.supervised_count() as u64;
    }

    /// Adds a bad line.
    pub fn record(&mut self, error: LineError) {
        self.error_count += 1;
        if self.errors.len() < MAX_LINE_ERRORS {
            self.errors.push(error);
        }
    }

    /// A file without a single line is a mistake too.
    pub(crate) fn refuse_empty(&mut self) {
        if self.rows == 0 && self.error_count == 0 {
            self.record(LineError { line: 1, path: String::new(), message: "the file holds no rows".into() });
        }
    }

    /// The findings in one paragraph for a person: how many lines, and the first few of them.
    #[must_use]
    pub fn summary(&self) -> String {
        const SHOWN: usize = 10;
        let lines = if self.error_count == 1 { "1 line cannot" } else { &format!("{} lines cannot", self.error_count) };
        let mut text = format!("{lines} be used");
        for error in self.errors.iter().take(SHOWN) {
            text.push_str(&format!("; {error}"));
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
    file: impl std::io::Read,
    tokenizer: &ChatTokenizer,
    options: EncodeOptions,
    mut each: impl FnMut(u64, Example),
) -> std::io::Result<Report> {
    let mut report = Report::default();
    each_line(file, |number, line| {
        let row = Row::parse_line(line).map_err(|e| e.at(number));
        match row.and_then(|row| tokenizer.encode(&row, options).map_err(|e| e.at(number))) {
            Ok(example) => {
                report.count(&example);
                each(number, example);
            }
            Err(error) => report.record(error),
        }
    })?;
    Ok(report)
}

/// Calls `visit` with every line of a file and its number.
pub(crate) fn each_line(mut file: impl std::io::Read, mut visit: impl FnMut(u64, Line<'_>)) -> std::io::Result<()> {
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
    Ok(())
}
