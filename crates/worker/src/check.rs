//! The check of a job's files against its model's template and tokenizer.

use std::path::{Path, PathBuf};

use holdfast_dataset::check::encode_file;
use holdfast_dataset::encode::EncodeOptions;
use holdfast_dataset::{ChatTokenizer, Report};
use holdfast_domain::job::JobError;
use holdfast_domain::plan::paths;
use holdfast_store::queue::Claim;

use crate::job_folder::JobFolder;

/// Checks the files in `folder`. The inner error is the job's: its files cannot be used.
pub(crate) async fn check(claim: &Claim, folder: &JobFolder, base: &Path) -> std::io::Result<Result<String, JobError>> {
    let h = &claim.job.hyperparameters;
    let options = EncodeOptions { max_length: h.max_length as usize, long_rows: h.long_rows };
    let files = [("training_file", paths::TRAIN, true), ("validation_file", paths::VALIDATION, claim.validation.is_some())];
    let files: Vec<(&str, PathBuf)> =
        files.into_iter().filter(|(.., present)| *present).map(|(param, name, _)| (param, folder.path().join(name))).collect();
    let base = base.to_owned();
    tokio::task::spawn_blocking(move || check_files(&files, &base, options)).await.map_err(std::io::Error::other)?
}

fn check_files(files: &[(&str, PathBuf)], base: &Path, options: EncodeOptions) -> std::io::Result<Result<String, JobError>> {
    let tokenizer = ChatTokenizer::load(base).map_err(std::io::Error::other)?;
    let mut summaries = Vec::new();
    for (param, path) in files {
        let report = encode_file(std::fs::File::open(path)?, &tokenizer, options, |_, _| {})?;
        if report.error_count > 0 {
            let error = JobError::new(format!("invalid_{param}"), format!("{param}: {}", report.summary()));
            return Ok(Err(error.about(*param).with_lines(report.errors)));
        }
        summaries.push(summary(param, &report));
    }
    Ok(Ok(summaries.join("; ")))
}

fn summary(param: &str, report: &Report) -> String {
    format!("{param}: {} rows, {} tokens, {} of them trained on", report.rows, report.tokens, report.supervised_tokens)
}
