//! The check of a file's shape while it streams in: encoding, JSON, roles, sizes. What needs a model's tokenizer comes later.

use crate::check::Report;
use crate::lines::{Line, LineSplitter};
use crate::row::Row;

/// Checks a stream of bytes that should be JSON Lines. Memory does not grow with the file.
#[derive(Debug, Default)]
pub struct StructureCheck {
    lines: LineSplitter,
    report: Report,
}

impl StructureCheck {
    /// Takes the next bytes of the file.
    pub fn push(&mut self, bytes: &[u8]) {
        let Self { lines, report } = self;
        lines.push(bytes, |number, line| check_line(report, number, line));
    }

    /// The file has ended.
    #[must_use]
    pub fn finish(self) -> Report {
        let Self { lines, mut report } = self;
        lines.finish(|number, line| check_line(&mut report, number, line));
        report.refuse_empty();
        report
    }
}

fn check_line(report: &mut Report, number: u64, line: Line<'_>) {
    match Row::check_line(line) {
        Ok(()) => report.rows += 1,
        Err(error) => report.record(error.at(number)),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_domain::invalid::LineError;

    use super::*;

    const GOOD: &str = r#"{"prompt":"p","completion":"c"}"#;

    fn check(text: &str) -> Report {
        let mut check = StructureCheck::default();
        check.push(text.as_bytes());
        check.finish()
    }

    #[test]
    fn every_bad_line_is_reported_with_its_number() {
        let report = check(&format!("{GOOD}\nnot json\n{GOOD}\n{{}}\n"));
        assert_eq!(report.rows, 2);
        assert_eq!(report.errors.iter().map(|e| e.line).collect::<Vec<_>>(), [2, 4]);
    }

    #[test]
    fn a_file_without_rows_is_an_error() {
        assert_eq!(check("").errors, [LineError { line: 1, path: String::new(), message: "the file holds no rows".into() }]);
    }

    #[test]
    fn errors_beyond_the_limit_are_counted_not_kept() {
        let report = check(&"x\n".repeat(1_500));
        assert_eq!((report.error_count, report.errors.len()), (1_500, 1_000));
    }
}
