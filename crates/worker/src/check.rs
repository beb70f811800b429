//! The check of a job's files against its model's template and tokenizer.

use std::fs::File;
use std::path::{Path, PathBuf};

use holdfast_dataset::ChatTokenizer;
use holdfast_dataset::encode::EncodeOptions;
use holdfast_dataset::files::check_files;
use holdfast_domain::job::JobError;
use holdfast_domain::plan::paths;
use holdfast_store::jobs::Dataset;
use holdfast_store::queue::{Checked, Claim};

use crate::job_folder::JobFolder;

/// Checks the files in `folder`. The inner error is the job's: its files cannot be used.
pub(crate) async fn check(claim: &Claim, folder: &JobFolder, base: &Path) -> std::io::Result<Result<Checked, JobError>> {
    let h = &claim.job.hyperparameters;
    let options = EncodeOptions { max_length: h.max_length as usize, long_rows: h.long_rows };
    let training = folder.path().join(paths::TRAIN);
    let validation = claim.validation.is_some().then(|| folder.path().join(paths::VALIDATION));
    let base = base.to_owned();
    let check = move || check_in(&training, validation, &base, options);
    tokio::task::spawn_blocking(check).await.map_err(std::io::Error::other)?
}

fn check_in(
    training: &Path,
    validation: Option<PathBuf>,
    base: &Path,
    options: EncodeOptions,
) -> std::io::Result<Result<Checked, JobError>> {
    let tokenizer = ChatTokenizer::load(base).map_err(std::io::Error::other)?;
    let found = check_files(File::open(training)?, validation.map(File::open).transpose()?, &tokenizer, options)?;
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
