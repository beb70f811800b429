//! One job folder, from plan to exit record.

use std::any::Any;
use std::fs::File;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use holdfast_dataset::check::encode_file;
use holdfast_dataset::encode::EncodeOptions;
use holdfast_dataset::{ChatTokenizer, Example};
use holdfast_domain::exit::{self, ExitRecord};
use holdfast_domain::hyperparameters::LongRows;
use holdfast_domain::plan::{self, Plan, paths};
use holdfast_domain::progress::{Phase, Progress};

use crate::adapter::{Adapter, AdapterConfig};
use crate::checkpoint::Checkpoints;
use crate::evaluate::evaluate;
use crate::model::Model;
use crate::progress::ProgressLog;
use crate::reference::Reference;
use crate::train::Run;
use crate::{adapter_files, device};

/// Input that cannot be used, as opposed to a fault of the trainer. Trying again will not help.
#[derive(Debug, thiserror::Error)]
enum BadInput {
    /// Of the tenant: rows.
    #[error("{0}")]
    Data(String),
    /// Of the operator: the plan, the base model, the alignment set.
    #[error("{0}")]
    Setup(String),
}

fn bad_data(message: String) -> anyhow::Error {
    BadInput::Data(message).into()
}

fn bad_setup(message: String) -> anyhow::Error {
    BadInput::Setup(message).into()
}

/// How a run ended in order.
enum Ended {
    /// The adapter is written.
    Done { trained_tokens: u64 },
    /// It was asked to stop, and left a checkpoint.
    Stopped { step: u64, trained_tokens: u64 },
}

/// Runs the job in `folder` and leaves its exit record there. What libtorch throws in the middle of a formula is caught here.
#[must_use]
pub fn run(folder: &Path) -> ExitRecord {
    let record = match catch_unwind(AssertUnwindSafe(|| train(folder))) {
        Ok(Ok(Ended::Done { trained_tokens })) => {
            ExitRecord { code: exit::DONE, message: "done".into(), reason: exit::reason::DONE.into(), trained_tokens }
        }
        Ok(Ok(Ended::Stopped { step, trained_tokens })) => ExitRecord {
            code: exit::STOPPED,
            message: format!("stopped after step {step}, with a checkpoint"),
            reason: exit::reason::STOPPED.into(),
            trained_tokens,
        },
        Ok(Err(error)) => failed(&error),
        Err(panic) => fault(&panic_message(panic.as_ref())),
    };
    // The exit code still tells the outcome when the record cannot be written, as on a full disk.
    if let Err(error) = write_record(folder, &record) {
        eprintln!("cannot write {}: {error:#}", paths::EXIT);
    }
    record
}

fn write_record(folder: &Path, record: &ExitRecord) -> Result<()> {
    let path = folder.join(paths::EXIT);
    std::fs::create_dir_all(folder.join(paths::OUT))?;
    let unfinished = path.with_extension("partial");
    std::fs::write(&unfinished, serde_json::to_vec_pretty(record)?)?;
    std::fs::rename(&unfinished, &path)?;
    Ok(())
}

fn failed(error: &anyhow::Error) -> ExitRecord {
    if let Some(input) = error.downcast_ref::<BadInput>() {
        let reason = match input {
            BadInput::Data(_) => exit::reason::BAD_DATA,
            BadInput::Setup(_) => exit::reason::BAD_SETUP,
        };
        return ExitRecord { code: exit::BAD_DATA, message: format!("{error:#}"), reason: reason.into(), trained_tokens: 0 };
    }
    fault(&format!("{error:#}"))
}

fn fault(message: &str) -> ExitRecord {
    let first_line = message.lines().next().unwrap_or_default();
    let out_of_memory = ["can't allocate memory", "out of memory", "bad_alloc", "CUDA_ERROR_OUT_OF_MEMORY"];
    let (reason, message) = if out_of_memory.iter().any(|words| message.contains(words)) {
        (exit::reason::OUT_OF_MEMORY, format!("The trainer ran out of memory. {}", exit::LESS_MEMORY))
    } else {
        (exit::reason::INTERNAL, first_line.to_owned())
    };
    ExitRecord { code: exit::INTERNAL, message, reason: reason.into(), trained_tokens: 0 }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("the trainer stopped without a reason").to_owned()
}

/// Reads a job's plan.
///
/// # Errors
/// When it is missing, malformed, or of another version.
pub fn read_plan(folder: &Path) -> Result<Plan> {
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

fn train(folder: &Path) -> Result<Ended> {
    // From here on a SIGTERM ends the run at a step's end instead of at once.
    let stopping = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::clone(&stopping)).context("cannot watch for signals")?;
    let plan = read_plan(folder)?;
    let h = &plan.hyperparameters;
    std::fs::create_dir_all(folder.join(paths::OUT)).context("cannot make the job's out folder")?;
    let mut log = ProgressLog::open(folder)?;
    log.phase(Phase::LoadingModel)?;
    let base = folder.join(paths::BASE);
    let tokenizer = ChatTokenizer::load(&base).map_err(|e| bad_setup(format!("{}/{e}", paths::BASE)))?;
    let max_length = h.max_length as usize;
    let rows = |name: &str, options, fault: fn(String) -> anyhow::Error| read_rows(folder, name, &tokenizer, options, fault);
    let tenants = EncodeOptions { max_length, long_rows: h.long_rows };
    let examples = rows(paths::TRAIN, tenants, bad_data)?;
    let validation = if plan.validation { rows(paths::VALIDATION, tenants, bad_data)? } else { Vec::new() };
    // The operator's rows are not the tenant's to shorten: a small max_length would cut refusals to nothing.
    let operators = EncodeOptions { max_length: usize::MAX, long_rows: LongRows::Error };
    let alignment =
        if plan.safety.defense.needs_alignment() { rows(paths::ALIGNMENT, operators, bad_setup)? } else { Vec::new() };

    let device = device::parse(&plan.device)?;
    let model =
        Model::load(&base, device::kind(h.precision), device).map_err(|e| bad_setup(format!("{}: {e:#}", paths::BASE)))?;
    if tokenizer.vocabulary_size() > model.architecture.vocab_size {
        return Err(bad_setup("the tokenizer has ids the embedding has no row for".into()));
    }
    let adapter = Adapter::init(&model, AdapterConfig::from(h), plan.seed);
    let reference = if plan.safety.defense.needs_alignment() {
        log.phase(Phase::AlignmentReference)?;
        Some(Reference::new(&model, alignment, plan.safety.kl_positions))
    } else {
        None
    };

    let run = Run { model: &model, adapter: &adapter, examples: &examples, reference: reference.as_ref(), plan: &plan };
    log.phase(Phase::Training)?;
    let checkpoints = Checkpoints::new(folder.join(paths::CHECKPOINTS), serde_json::to_vec(&plan)?);
    let restored = checkpoints.restore(&adapter, h.weight_decay, |reason| eprintln!("{reason}"))?;
    let mut state = restored.unwrap_or_else(|| run.start());
    log.start(
        &Progress::Started {
            total_steps: run.total_steps(),
            rows: examples.len() as u64,
            alignment_rows: reference.as_ref().map_or(0, |r| r.rows() as u64),
            trainable_parameters: adapter.parameters(),
        },
        state.cursor,
    )?;
    let validate = |log: &mut ProgressLog, step: u64| -> Result<()> {
        if validation.is_empty() {
            return Ok(());
        }
        let adapter = (step > 0).then_some(&adapter);
        let found = evaluate(&model, adapter, &validation, h.batch_size as usize);
        log.write(&Progress::Validation { step, loss: found.loss, token_accuracy: found.token_accuracy })
    };
    if state.cursor.step == 0 {
        validate(&mut log, 0)?;
    }
    let done = run.train(&mut state, |step, state| {
        log.step(step)?;
        let stop = stopping.load(Ordering::Relaxed);
        if stop || state.cursor.step.is_multiple_of(plan.checkpoint_steps.max(1)) {
            checkpoints.save(&adapter, state)?;
        }
        Ok(if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    let trained_tokens = state.cursor.tokens;
    if !done {
        return Ok(Ended::Stopped { step: state.cursor.step, trained_tokens });
    }
    validate(&mut log, run.total_steps())?;
    log.phase(Phase::Exporting)?;
    adapter_files::write(&folder.join(paths::ADAPTER), &adapter, &plan.base_model)?;
    log.finish();
    Ok(Ended::Done { trained_tokens })
}

/// The examples of one of the job's files; a line that cannot be used is a `fault`, named by its number.
fn read_rows(
    folder: &Path,
    name: &str,
    tokenizer: &ChatTokenizer,
    options: EncodeOptions,
    fault: fn(String) -> anyhow::Error,
) -> Result<Vec<Example>> {
    let file = File::open(folder.join(name)).map_err(|e| fault(format!("{name}: {e}")))?;
    let mut examples = Vec::new();
    let report = encode_file(file, tokenizer, options, |_, example| examples.push(example))
        .with_context(|| format!("cannot read {name}"))?;
    if report.error_count > 0 {
        return Err(fault(format!("{name}: {}", report.summary())));
    }
    if examples.is_empty() {
        return Err(fault(format!("{name} holds no rows")));
    }
    Ok(examples)
}
