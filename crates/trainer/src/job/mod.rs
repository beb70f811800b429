//! One job folder, from plan to exit record.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use anyhow::{Context, Result};
use holdfast_dataset::{Example, frames};
use holdfast_domain::exit::{self, ExitRecord};
use holdfast_domain::plan::{Plan, paths};
use holdfast_domain::progress::Phase;

use crate::checkpoint::Checkpoints;
use crate::model::Model;
use crate::progress::ProgressLog;
use crate::reference::Reference;
use crate::stop::{Stop, Stopped};
use crate::train::Run;
use crate::{adapter_files, device, methods, reference_files, whole_file};

mod evaluate;
mod failure;
mod inputs;
mod memory;
mod session;
mod start;

pub(crate) use failure::bad_setup;
use failure::{BadInput, failed, fault, panic_message};
use inputs::{Inputs, read_plan};
use session::{RunEnd, Session};

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
    record(folder, || train(folder))
}

/// Asks the adapter of the job in `folder` what its `evaluation.json` names, and leaves an exit record there as [`run`] does.
#[must_use]
pub fn evaluate(folder: &Path) -> ExitRecord {
    record(folder, || evaluate::evaluate(folder).map(|()| Ended::Done { trained_tokens: 0 }))
}

fn record(folder: &Path, work: impl FnOnce() -> Result<Ended>) -> ExitRecord {
    if !folder.is_dir() {
        // A mistyped path must not become a folder with nothing but a record in it.
        return failed(&bad_setup(format!(
            "{} is no folder; a job's folder holds {} and the rows",
            folder.display(),
            paths::PLAN
        )));
    }
    let record = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(Ended::Done { trained_tokens })) => {
            ExitRecord { code: exit::DONE, message: "done".into(), reason: exit::reason::DONE.into(), trained_tokens }
        }
        Ok(Ok(Ended::Stopped { step, trained_tokens })) => {
            stopped(format!("stopped after step {step}, with a checkpoint"), trained_tokens)
        }
        Ok(Err(error)) if error.is::<Stopped>() => stopped("stopped before its first step, without a new checkpoint".into(), 0),
        Ok(Err(error)) => failed(&error),
        Err(panic) => fault(&panic_message(panic.as_ref())),
    };
    // The exit code still tells the outcome when the record cannot be written, as on a full disk.
    if let Err(error) = write_record(folder, &record) {
        eprintln!("cannot write {}: {error:#}", paths::EXIT);
    }
    record
}

fn stopped(message: String, trained_tokens: u64) -> ExitRecord {
    ExitRecord { code: exit::STOPPED, message, reason: exit::reason::STOPPED.into(), trained_tokens }
}

fn write_record(folder: &Path, record: &ExitRecord) -> Result<()> {
    std::fs::create_dir_all(folder.join(paths::OUT))?;
    whole_file::write(&folder.join(paths::EXIT), &serde_json::to_vec_pretty(record)?)
}

fn train(folder: &Path) -> Result<Ended> {
    let stop = Stop::on_sigterm()?;
    let plan = read_plan(folder)?;
    std::fs::create_dir_all(folder.join(paths::OUT)).context("cannot make the job's out folder")?;
    let mut log = ProgressLog::open(folder)?;
    log.phase(Phase::LoadingModel)?;
    let inputs = Inputs::read(folder, &plan, &stop)?;
    let device = device::parse(&plan.device).map_err(|e| bad_setup(format!("{}: {e}", paths::PLAN)))?;
    memory::check(&inputs, &plan, Some(&mut log))?;
    let kind = device::kind(plan.hyperparameters.precision);
    let model = Model::load_as(inputs.architecture.clone(), &folder.join(paths::BASE), kind, device, &stop);
    stop.check()?;
    let model = model.map_err(|e| bad_setup(format!("{}: {e:#}", paths::BASE)))?;
    let adapter = start::adapter(folder, &plan, &model)?;
    let (reference, probe) = references(folder, &plan, &model, &inputs.alignment, &stop, &mut log)?;
    let run = Run {
        model: &model,
        adapter: &adapter,
        examples: &inputs.examples,
        reference: reference.as_ref(),
        probe: probe.as_ref(),
        plan: &plan,
        stop: &stop,
    };
    if plan.start.is_some()
        && let Some(loss) = run.outside_budget()?
    {
        let (method, budget) = (plan.safety.defense.as_str(), plan.safety.budget);
        return Err(BadInput::OutsideBudget(format!(
            "On held-out alignment rows, some of them framed like this training file, the KL of the adapter to go on from is {loss:.4} nats to its base; `{method}` keeps every adapter within twice its budget of {budget}. Start from the base model, or ask for a larger budget where that is allowed"
        ))
        .into());
    }
    let identity = serde_json::to_vec(&plan.identity())?;
    let checkpoints = Checkpoints::new(folder.join(paths::CHECKPOINTS), identity, &plan.base_model, plan.checkpoint_steps);
    let mut session = Session { folder, run: &run, checkpoints: &checkpoints, log: &mut log, validation: &inputs.validation };
    let (state, ended) = session.train_to_the_end()?;
    let trained_tokens = state.cursor.tokens;
    if ended == RunEnd::Stopped {
        return Ok(Ended::Stopped { step: state.cursor.step, trained_tokens });
    }
    log.phase(Phase::Exporting)?;
    let best = match state.cursor.best.filter(|_| ended == RunEnd::StoppedEarly) {
        Some(best) => Some(checkpoints.read_best(&model, &best)?),
        None => None,
    };
    adapter_files::write(&folder.join(paths::ADAPTER), best.as_ref().unwrap_or(&adapter), &plan.base_model)?;
    if let Some(conflicts) = &state.conflicts {
        conflicts.write(&folder.join(paths::ROW_CONFLICTS), &inputs.lines)?;
    }
    log.finish();
    Ok(Ended::Done { trained_tokens })
}

/// The alignment rows that gradients are taken on, and those that are kept apart for reviews.
fn references(
    folder: &Path,
    plan: &Plan,
    model: &Model,
    alignment: &[Example],
    stop: &Stop,
    log: &mut ProgressLog,
) -> Result<(Option<Reference>, Option<Reference>)> {
    if !plan.safety.defense.needs_alignment() {
        return Ok((None, None));
    }
    log.phase(Phase::AlignmentReference)?;
    let whole = reference_files::get(folder, plan, model, alignment, stop)?;
    if methods::of(&plan.safety, plan.hyperparameters.precision).review_steps().is_none() {
        return Ok((Some(whole), None));
    }
    let Some((training, probe)) = whole.split(PROBE_EVERY) else {
        return Err(bad_setup(format!(
            "{}: `{}` keeps every {PROBE_EVERY}th row apart for its reviews, and there are only {}",
            paths::ALIGNMENT,
            plan.safety.defense.as_str(),
            alignment.len()
        )));
    };
    Ok((Some(training), Some(probe)))
}

/// Of so many alignment rows one is kept apart for reviews.
const PROBE_EVERY: usize = frames::APART;
