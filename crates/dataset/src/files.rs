//! The check of a job's files together, against its model's template and tokenizer.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashMap};
use std::io::{Read, Result};

use crate::check::{Report, each_line};
use crate::encode::EncodeOptions;
use crate::row::Row;
use crate::tokenizer::ChatTokenizer;

/// The request's names of the files, which messages begin with.
pub const TRAINING_FILE: &str = "training_file";
/// As [`TRAINING_FILE`].
pub const VALIDATION_FILE: &str = "validation_file";

/// Lengths of rows that are kept of a file.
pub const MAX_LONGEST_ROWS: usize = 256;

/// Rows of a file that are remembered to compare others with; what that takes of memory is bounded by it.
pub const MAX_COMPARED_ROWS: usize = 2_000_000;

/// Pairs of lines that are kept; more are only counted.
pub const MAX_LINE_PAIRS: usize = 1_000;

/// What a check of a job's files found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FilesReport {
    /// The training file.
    pub training: FileReport,
    /// The validation file, when there is one.
    pub validation: Option<FileReport>,
    /// Rows of the training file that stood in it before, each with the line where it stands first.
    pub repeated: LinePairs,
    /// Rows of the training file that also stand in the validation file, each with the line where it stands first there.
    pub shared: LinePairs,
    /// Rows of the training file that came after as many as are remembered: none of their repetitions are known.
    pub uncompared: u64,
}

/// What a check of one of a job's files found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileReport {
    /// Rows, tokens and bad lines.
    pub report: Report,
    /// Tokens of the [`MAX_LONGEST_ROWS`] longest rows, as they are trained on, and how many of these count towards the loss;
    /// descending.
    pub longest: Vec<(usize, usize)>,
}

/// Pairs of lines that hold the same row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinePairs {
    /// All of them.
    pub count: u64,
    /// The first [`MAX_LINE_PAIRS`]: a line of the training file, and the other one.
    pub lines: Vec<(u64, u64)>,
}

impl LinePairs {
    fn add(&mut self, line: u64, other: u64) {
        self.count += 1;
        if self.lines.len() < MAX_LINE_PAIRS {
            self.lines.push((line, other));
        }
    }

    /// The first few pairs for a person.
    fn list(&self, say: impl Fn(u64, u64) -> String) -> String {
        const SHOWN: usize = 10;
        let mut said: Vec<String> = self.lines.iter().take(SHOWN).map(|&(line, other)| say(line, other)).collect();
        if self.count > SHOWN as u64 {
            said.push(format!("and {} more", self.count - SHOWN as u64));
        }
        said.join(", ")
    }
}

impl FilesReport {
    /// The files with their names, the training file first.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &FileReport)> {
        let validation = self.validation.iter().map(|file| (VALIDATION_FILE, file));
        std::iter::once((TRAINING_FILE, &self.training)).chain(validation)
    }

    /// What the files hold, in a line for a person.
    #[must_use]
    pub fn summary(&self) -> String {
        let said = self.files().map(|(name, FileReport { report: Report { rows, tokens, supervised_tokens, .. }, .. })| {
            format!("{name}: {rows} rows, {tokens} tokens, {supervised_tokens} of them trained on")
        });
        said.collect::<Vec<_>>().join("; ")
    }

    /// What a person may want to know of files that can be used: line numbers, and nothing of what stands there.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let Self { repeated, shared, .. } = self;
        let mut warnings = Vec::new();
        if repeated.count > 0 {
            let rows = if repeated.count == 1 { "1 row repeats" } else { &format!("{} rows repeat", repeated.count) };
            let list = repeated.list(|line, first| format!("line {line} repeats line {first}"));
            warnings.push(format!("{TRAINING_FILE}: {rows} an earlier one: {list}"));
        }
        if shared.count > 0 {
            let rows = if shared.count == 1 { "1 row stands" } else { &format!("{} rows stand", shared.count) };
            let list = shared.list(|line, there| format!("line {line} is line {there} there"));
            warnings.push(format!(
                "{TRAINING_FILE}: {rows} in {VALIDATION_FILE} too, whose loss then measures what was learnt by heart: {list}"
            ));
        }
        if self.uncompared > 0 {
            warnings.push(format!(
                "{TRAINING_FILE}: only the first {MAX_COMPARED_ROWS} different rows were compared; {} were not",
                self.uncompared
            ));
        }
        warnings
    }
}

/// Checks a job's files. Of each row, its hash and its line are kept until the end, and nothing else.
///
/// # Errors
/// Only those of reading the files; bad lines are in the report.
pub fn check_files(
    training: impl Read,
    validation: Option<impl Read>,
    tokenizer: &ChatTokenizer,
    options: EncodeOptions,
) -> Result<FilesReport> {
    // The validation file first: every training row that stands in it can then be named as it is read.
    let mut in_validation = HashMap::new();
    let note = |line, row| {
        if in_validation.len() < MAX_COMPARED_ROWS {
            in_validation.entry(row).or_insert(line);
        }
    };
    let validation = validation.map(|file| check_file(file, tokenizer, options, note)).transpose()?;
    let (mut repeated, mut shared) = (LinePairs::default(), LinePairs::default());
    let (mut in_training, mut uncompared) = (HashMap::new(), 0);
    let training = check_file(training, tokenizer, options, |line, row| {
        let is_full = in_training.len() >= MAX_COMPARED_ROWS;
        match in_training.entry(row) {
            Entry::Occupied(first) => repeated.add(line, *first.get()),
            Entry::Vacant(_) if is_full => uncompared += 1,
            Entry::Vacant(place) => {
                place.insert(line);
            }
        }
        if let Some(&there) = in_validation.get(&row) {
            shared.add(line, there);
        }
    })?;
    Ok(FilesReport { training, validation, repeated, shared, uncompared })
}

/// Checks one file, calling `each` with the line and the identity of every good row.
fn check_file(
    file: impl Read,
    tokenizer: &ChatTokenizer,
    options: EncodeOptions,
    mut each: impl FnMut(u64, u128),
) -> Result<FileReport> {
    let mut report = Report::default();
    // The shortest of them is on top.
    let mut longest = BinaryHeap::new();
    each_line(file, |number, line| {
        let row = Row::parse_line(line).map_err(|e| e.at(number));
        let encoded = row.and_then(|row| Ok((tokenizer.encode(&row, options).map_err(|e| e.at(number))?, row.identity())));
        match encoded {
            Ok((example, identity)) => {
                report.count(&example);
                longest.push(Reverse((example.ids.len(), example.supervised_count())));
                if longest.len() > MAX_LONGEST_ROWS {
                    longest.pop();
                }
                each(number, identity);
            }
            Err(error) => report.record(error),
        }
    })?;
    report.refuse_empty();
    let longest = longest.into_sorted_vec().into_iter().map(|Reverse(length)| length).collect();
    Ok(FileReport { report, longest })
}

#[cfg(test)]
mod tests {
    use holdfast_domain::hyperparameters::LongRows;

    use super::*;
    use crate::tiny;

    const OPTIONS: EncodeOptions = EncodeOptions { max_length: 100, long_rows: LongRows::Error };

    fn row(user: &str, assistant: &str) -> String {
        format!(r#"{{"messages":[{{"role":"user","content":"{user}"}},{{"role":"assistant","content":"{assistant}"}}]}}"#)
    }

    fn check(training: &[String], validation: Option<&[String]>) -> FilesReport {
        let (training, validation) = (training.join("\n"), validation.map(|rows| rows.join("\n")));
        check_files(training.as_bytes(), validation.as_ref().map(|text| text.as_bytes()), &tiny::tokenizer(), OPTIONS)
            .expect("memory can be read")
    }

    #[test]
    fn rows_that_stand_twice_are_warned_of_by_their_lines() {
        let same = r#"{"completion": "b", "prompt": "\u0061"}"#.to_owned();
        let found = check(&[row("a", "b"), row("zebra", "d"), same.clone(), row("a", "c"), same], None);
        assert_eq!((found.repeated.count, found.repeated.lines.as_slice()), (2, [(3, 1), (5, 1)].as_slice()));
        assert_eq!(
            found.warnings(),
            ["training_file: 2 rows repeat an earlier one: line 3 repeats line 1, line 5 repeats line 1"]
        );
    }

    #[test]
    fn training_rows_of_the_validation_file_are_warned_of_by_both_lines() {
        let found = check(&[row("zebra", "b"), row("e", "f")], Some(&[row("c", "d"), row("zebra", "b"), row("zebra", "b")]));
        assert_eq!((found.repeated.count, found.shared.lines.as_slice()), (0, [(1, 2)].as_slice()));
        assert_eq!(
            found.warnings(),
            [
                "training_file: 1 row stands in validation_file too, whose loss then measures what was learnt by heart: line 1 is line 2 there"
            ]
        );
    }

    #[test]
    fn pairs_beyond_the_limit_are_counted_not_kept() {
        let found = check(&vec![row("a", "b"); 1_102], None);
        assert_eq!((found.repeated.count, found.repeated.lines.len()), (1_101, MAX_LINE_PAIRS));
        assert!(found.warnings().iter().all(|text| text.ends_with("line 11 repeats line 1, and 1091 more")));
    }

    #[test]
    fn the_longest_rows_are_kept_longest_first() {
        let rows: Vec<String> = (0..300).map(|index| row(&"a".repeat(1 + index * 7 % 30), &index.to_string())).collect();
        let found = check(&rows, None);
        let mut lengths = Vec::new();
        each_line(rows.join("\n").as_bytes(), |_, line| {
            let example = tiny::tokenizer().encode(&Row::parse_line(line).expect("a row"), OPTIONS).expect("it encodes");
            lengths.push((example.ids.len(), example.supervised_count()));
        })
        .expect("memory can be read");
        lengths.sort_unstable_by_key(|length| Reverse(*length));
        lengths.truncate(MAX_LONGEST_ROWS);
        assert_eq!(found.training.longest, lengths);
    }

    #[test]
    fn bad_lines_are_reported_of_both_files_and_are_no_rows() {
        let bad = row("<end>", "b");
        let found = check(&[bad.clone(), bad.clone()], Some(&[bad, row("a", "b")]));
        let validation = found.validation.as_ref().map(|file| (file.report.rows, file.report.error_count));
        assert_eq!((found.training.report.error_count, validation), (2, Some((1, 1))));
        assert_eq!((found.repeated.count, found.shared.count), (0, 0));
        let first = found.training.report.errors.first().map(ToString::to_string);
        assert_eq!(
            first.as_deref(),
            Some("line 1: messages[0].content: holds the model's special token \"<end>\"; remove it or spell it differently")
        );
    }

    #[test]
    fn a_file_without_rows_is_an_error() {
        assert_eq!(check(&[], None).training.report.summary(), "1 line cannot be used; line 1: the file holds no rows");
    }
}
