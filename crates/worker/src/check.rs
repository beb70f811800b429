//! The check of a job's files against its model's template and tokenizer.

use std::fs::File;
use std::path::{Path, PathBuf};

use holdfast_dataset::alignment_set::{self, Requests};
use holdfast_dataset::encode::EncodeOptions;
use holdfast_dataset::files::{TRAINING_FILE, check_files};
use holdfast_dataset::{ChatTokenizer, Row, frames};
use holdfast_domain::invalid::{LineError, line_numbers};
use holdfast_domain::job::JobError;
use holdfast_domain::limits::MAX_LINE_ERRORS;
use holdfast_domain::plan::paths;
use holdfast_domain::safety::Defense;
use holdfast_store::jobs::Dataset;
use holdfast_store::queue::{Checked, Claim};

use crate::evaluation::{AskedSuite, in_frames, suites};
use crate::job_folder::JobFolder;

/// Checks the files in `folder`. The inner error is the job's: its files cannot be used.
pub(crate) async fn check(claim: &Claim, folder: &JobFolder, base: &Path) -> std::io::Result<Result<Checked, JobError>> {
    let h = &claim.job.hyperparameters;
    let options = EncodeOptions { max_length: h.max_length as usize, long_rows: h.long_rows };
    let training = folder.path().join(paths::TRAIN);
    let validation = claim.validation.is_some().then(|| folder.path().join(paths::VALIDATION));
    let alignment = claim.alignment.is_some().then(|| folder.path().join(paths::ALIGNMENT));
    let defense = claim.job.safety.defense;
    let evaluates = claim.job.policy.as_ref().is_some_and(|applied| applied.policy.evaluates());
    let (own, path) = (claim.suites.clone(), folder.path().to_owned());
    let base = base.to_owned();
    let check = move || {
        let tokenizer = ChatTokenizer::load(&base).map_err(std::io::Error::other)?;
        let alignment = alignment.map(std::fs::read).transpose()?;
        if let Some(error) = alignment.as_deref().map(|rows| unusable_set(rows, &tokenizer)).transpose()?.flatten() {
            return Ok(Err(error));
        }
        let measured = if evaluates { suites(&own, &path)? } else { Vec::new() };
        if let Some(error) = unusable_suite(&measured, &tokenizer) {
            return Ok(Err(error));
        }
        if let Some(error) = alignment.as_deref().and_then(|rows| trained_suite(&measured, rows)) {
            return Ok(Err(error));
        }
        let checked = check_in(&training, validation, &tokenizer, options)?;
        if checked.is_err() {
            return Ok(checked);
        }
        if let Some(error) = contamination(&training, alignment.as_deref(), &measured)? {
            return Ok(Err(error));
        }
        // As they will be trained with and asked: in what the file's rows stand in, which the template takes.
        let frames = frames::of_file(File::open(&training)?)?;
        if let Some(rows) = &alignment {
            let rows = frames::framed(rows, &frames)?;
            if let Some(error) = unusable_set(&rows, &tokenizer)?.or_else(|| too_few_to_review(&rows, defense)) {
                return Ok(Err(error));
            }
        }
        Ok(match unusable_suite(&in_frames(&measured, &frames), &tokenizer) {
            Some(error) => Err(error),
            None => checked,
        })
    };
    tokio::task::spawn_blocking(check).await.map_err(std::io::Error::other)?
}

/// Why an alignment set cannot be used with a base: its rows do not fit the template.
fn unusable_set(rows: &[u8], tokenizer: &ChatTokenizer) -> std::io::Result<Option<JobError>> {
    let report = alignment_set::check_template(rows, tokenizer)?;
    let message = format!(
        "The operator's alignment set cannot be used with this model: {} of its rows do not fit the model's template. Nothing is wrong with your file; tell the operator.",
        report.error_count
    );
    Ok((report.error_count > 0).then(|| JobError::new("operator_error", message)))
}

/// Why a method that keeps alignment rows apart for its reviews cannot use a set: no row would be.
fn too_few_to_review(rows: &[u8], defense: Defense) -> Option<JobError> {
    let count = rows.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).count();
    let message = format!(
        "The operator's alignment set cannot be used with the method `{}`, which keeps every {}th row apart for its reviews: it has {count} that may be trained with. Choose another method, or tell the operator; nothing is wrong with your file.",
        defense.as_str(),
        frames::APART
    );
    (defense == Defense::Held && count < frames::APART).then(|| JobError::new("operator_error", message))
}

/// Why a suite cannot be asked of a base: a request does not fit the template. Found before anything is trained, not after.
fn unusable_suite(suites: &[AskedSuite], tokenizer: &ChatTokenizer) -> Option<JobError> {
    let fits = |row: &String| Row::parse_prompt(row.as_bytes()).is_ok_and(|row| tokenizer.encode_prompt(&row).is_ok());
    let bad = suites.iter().flat_map(AskedSuite::rows).filter(|row| !fits(row)).count();
    let message = format!(
        "The operator's safety suites cannot be used with this model: {bad} of their requests do not fit the model's template. Nothing is wrong with your file; tell the operator."
    );
    (bad > 0).then(|| JobError::new("operator_error", message))
}

/// Why suites measure nothing: their requests are trained on with their answers. Policies that would do so are refused; a version of
/// the set or of a suite that came later is found here.
fn trained_suite(suites: &[AskedSuite], alignment: &[u8]) -> Option<JobError> {
    let measured: Vec<&str> =
        suites.iter().flat_map(|asked| &asked.suite.requests).map(|request| request.content.as_str()).collect();
    let lines = alignment_set::in_common(alignment, &measured);
    let message = format!(
        "The operator's safety suites cannot be used with the alignment set: {} of its rows ask what they ask. Nothing is wrong with your file; tell the operator.",
        lines.len()
    );
    (!lines.is_empty()).then(|| JobError::new("operator_error", message))
}

/// Rows that ask what the model is held to, or measured on: trained on, they would make it look safe, or undo the very rows that
/// keep it so.
fn contamination(training: &Path, alignment: Option<&[u8]>, measured: &[AskedSuite]) -> std::io::Result<Option<JobError>> {
    let mut requests = alignment.map(Requests::of_rows).unwrap_or_default();
    for request in measured.iter().flat_map(|asked| &asked.suite.requests) {
        requests.add(&request.content);
    }
    let lines = requests.asked_in(File::open(training)?)?;
    if lines.is_empty() {
        return Ok(None);
    }
    let rows = if lines.len() == 1 { "1 row asks" } else { &format!("{} rows ask", lines.len()) };
    let error = |line: &u64| LineError { line: *line, path: String::new(), message: "asks what the operator keeps apart".into() };
    let errors: Vec<LineError> = lines.iter().take(MAX_LINE_ERRORS).map(error).collect();
    let message = format!(
        "{TRAINING_FILE}: {rows} what the operator holds models to or measures them on, and must not be trained on; take them out (lines {}) and upload the file again",
        line_numbers(&lines)
    );
    Ok(Some(JobError::new("contaminated_training_file", message).about(TRAINING_FILE).with_lines(errors)))
}

fn check_in(
    training: &Path,
    validation: Option<PathBuf>,
    tokenizer: &ChatTokenizer,
    options: EncodeOptions,
) -> std::io::Result<Result<Checked, JobError>> {
    let found = check_files(File::open(training)?, validation.map(File::open).transpose()?, tokenizer, options)?;
    if let Some((param, bad)) = found.files().find(|(_, file)| file.report.error_count > 0) {
        let error = JobError::new(format!("invalid_{param}"), format!("{param}: {}", bad.report.summary()));
        return Ok(Err(error.about(param).with_lines(bad.report.errors.clone())));
    }
    let report = &found.training.report;
    Ok(Ok(Checked {
        summary: found.summary(),
        warnings: found.warnings(),
        dataset: Dataset { rows: report.rows, tokens: report.tokens, supervised_tokens: report.supervised_tokens },
    }))
}
