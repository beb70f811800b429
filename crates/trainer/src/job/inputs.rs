//! What a job folder holds, read and checked.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use holdfast_base_model::{Architecture, files};
use holdfast_dataset::check::encode_file;
use holdfast_dataset::encode::EncodeOptions;
use holdfast_dataset::{ChatTokenizer, Example};
use holdfast_domain::hyperparameters::LongRows;
use holdfast_domain::plan::{self, Plan, paths};

use super::failure::{bad_data, bad_setup};
use crate::model::read_architecture;
use crate::stop::Stop;

/// Reads a job's plan.
pub(super) fn read_plan(folder: &Path) -> Result<Plan> {
    let bytes = std::fs::read(folder.join(paths::PLAN)).map_err(|e| bad_setup(format!("{}: {e}", paths::PLAN)))?;
    let plan: Plan = serde_json::from_slice(&bytes).map_err(|e| bad_setup(format!("{}: {e}", paths::PLAN)))?;
    if plan.format != plan::FORMAT {
        return Err(bad_setup(format!(
            "{}: format {} is not {}; use the trainer of the worker's version",
            paths::PLAN,
            plan.format,
            plan::FORMAT
        )));
    }
    Ok(plan)
}

/// The rows and the model's sizes.
pub(super) struct Inputs {
    pub(super) architecture: Architecture,
    pub(super) examples: Vec<Example>,
    /// Each example's line in the tenant's file.
    pub(super) lines: Vec<u64>,
    pub(super) validation: Vec<Example>,
    pub(super) alignment: Vec<Example>,
}

impl Inputs {
    pub(super) fn read(folder: &Path, plan: &Plan, stop: &Stop) -> Result<Self> {
        let h = &plan.hyperparameters;
        let checked = h.check().and_then(|()| plan.safety.check()).and_then(|()| h.check_with(&plan.safety));
        checked.map_err(|e| bad_setup(format!("{}: {}", paths::PLAN, e.message)))?;
        let base = folder.join(paths::BASE);
        let in_base = |e: &dyn std::fmt::Display| bad_setup(format!("{}/{e}", paths::BASE));
        let tokenizer = ChatTokenizer::load(&base).map_err(|e| in_base(&e))?;
        let architecture =
            read_architecture(&base.join(files::CONFIG)).map_err(|e| bad_setup(format!("{}: {e:#}", paths::BASE)))?;
        if tokenizer.vocabulary_size() > architecture.vocab_size {
            return Err(bad_setup(format!(
                "{}/tokenizer.json has ids up to {}, but the embedding has only {} rows",
                paths::BASE,
                tokenizer.vocabulary_size().saturating_sub(1),
                architecture.vocab_size
            )));
        }
        let rows =
            |name: &str, options, fault: fn(String) -> anyhow::Error| read_rows(folder, name, &tokenizer, options, fault, stop);
        let tenants = EncodeOptions { max_length: h.max_length as usize, long_rows: h.long_rows };
        // The operator's rows are not the tenant's to shorten: a small max_length would cut refusals to nothing.
        let operators = EncodeOptions { max_length: usize::MAX, long_rows: LongRows::Error };
        let (lines, examples) = rows(paths::TRAIN, tenants, bad_data)?;
        let validation = if plan.validation { rows(paths::VALIDATION, tenants, bad_data)?.1 } else { Vec::new() };
        let needs_alignment = plan.safety.defense.needs_alignment();
        let alignment = if needs_alignment { rows(paths::ALIGNMENT, operators, bad_setup)?.1 } else { Vec::new() };
        Ok(Self { architecture, examples, lines, validation, alignment })
    }
}

/// A file that cannot be read any further once the run is asked to stop.
struct UntilStopped<'a> {
    file: File,
    stop: &'a Stop,
}

impl Read for UntilStopped<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.stop.check().map_err(std::io::Error::other)?;
        self.file.read(buffer)
    }
}

/// The examples of one of the job's files with their lines; a line that cannot be used is a `fault`, named by its number.
fn read_rows(
    folder: &Path,
    name: &str,
    tokenizer: &ChatTokenizer,
    options: EncodeOptions,
    fault: fn(String) -> anyhow::Error,
    stop: &Stop,
) -> Result<(Vec<u64>, Vec<Example>)> {
    let file = File::open(folder.join(name)).map_err(|e| bad_setup(format!("{name}: {e}")))?;
    let (mut lines, mut examples) = (Vec::new(), Vec::new());
    let report = encode_file(UntilStopped { file, stop }, tokenizer, options, |line, example| {
        lines.push(line);
        examples.push(example);
    });
    stop.check()?;
    let report = report.with_context(|| format!("cannot read {name}"))?;
    if report.error_count > 0 {
        return Err(fault(format!("{name}: {}", report.summary())));
    }
    if examples.is_empty() {
        return Err(fault(format!("{name} holds no rows")));
    }
    Ok((lines, examples))
}
