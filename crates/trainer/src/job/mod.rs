//! One job folder, from plan to exit record.

use std::any::Any;
use std::fs::File;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use holdfast_base_model::{Architecture, files};
use holdfast_dataset::check::encode_file;
use holdfast_dataset::encode::EncodeOptions;
use holdfast_dataset::{ChatTokenizer, Example};
use holdfast_domain::Hyperparameters;
use holdfast_domain::exit::{self, ExitRecord};
use holdfast_domain::hyperparameters::LongRows;
use holdfast_domain::plan::{self, Plan, paths};
use holdfast_domain::progress::{Phase, Progress};
use holdfast_domain::safety::{Defense, KlPositions, ProjectionOf};

use crate::adapter::{Adapter, AdapterConfig};
use crate::checkpoint::{Best, Checkpoints, State};
use crate::divergence::{Diverged, LossWatch};
use crate::evaluate::evaluate;
use crate::memory::{self, LargestPass};
use crate::model::{self, Model, read_architecture};
use crate::progress::ProgressLog;
use crate::reference::Reference;
use crate::train::Run;
use crate::{adapter_files, device, methods, objective, reference_files};

/// Input that cannot be used, as opposed to a fault of the trainer. Trying again will not help.
#[derive(Debug, thiserror::Error)]
enum BadInput {
    /// Of the tenant: rows.
    #[error("{0}")]
    Data(String),
    /// Of the operator: the plan, the base model, the alignment set.
    #[error("{0}")]
    Setup(String),
    /// The run does not fit into memory.
    #[error("{0}")]
    Memory(String),
    /// The loss left the numbers or ran away, whatever was tried.
    #[error("{0}")]
    Diverged(String),
}

fn bad_data(message: String) -> anyhow::Error {
    BadInput::Data(message).into()
}

pub(crate) fn bad_setup(message: String) -> anyhow::Error {
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
            BadInput::Memory(_) => exit::reason::OUT_OF_MEMORY,
            BadInput::Diverged(_) => exit::reason::DIVERGED,
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
    std::fs::create_dir_all(folder.join(paths::OUT)).context("cannot make the job's out folder")?;
    let mut log = ProgressLog::open(folder)?;
    log.phase(Phase::LoadingModel)?;
    let inputs = Inputs::read(folder, &plan)?;
    let device = device::parse(&plan.device).map_err(|e| bad_setup(format!("{}: {e}", paths::PLAN)))?;
    memory_plan(&inputs, &plan, &mut log)?;
    let base = folder.join(paths::BASE);
    let model = Model::load_as(
        inputs.architecture.clone(),
        &base.join(files::WEIGHTS),
        device::kind(plan.hyperparameters.precision),
        device,
    )
    .map_err(|e| bad_setup(format!("{}: {e:#}", paths::BASE)))?;
    let h = &plan.hyperparameters;
    let adapter = Adapter::init(&model, AdapterConfig::from(h), plan.seed);
    let (reference, probe) = references(folder, &plan, &model, &inputs.alignment, &mut log)?;
    let run = Run {
        model: &model,
        adapter: &adapter,
        examples: &inputs.examples,
        reference: reference.as_ref(),
        probe: probe.as_ref(),
        plan: &plan,
    };
    let checkpoints = Checkpoints::new(folder.join(paths::CHECKPOINTS), serde_json::to_vec(&plan)?, &plan.base_model);
    let mut session =
        Session { run: &run, checkpoints: &checkpoints, log: &mut log, validation: &inputs.validation, stopping: &stopping };
    let (state, ended) = session.train_to_the_end()?;
    let trained_tokens = state.cursor.tokens;
    if ended == RunEnd::Stopped {
        return Ok(Ended::Stopped { step: state.cursor.step, trained_tokens });
    }
    log.phase(Phase::Exporting)?;
    let best = match state.cursor.best.filter(|_| ended == RunEnd::StoppedEarly) {
        Some(best) => Some(checkpoints.read_best(&model, best.step)?),
        None => None,
    };
    adapter_files::write(&folder.join(paths::ADAPTER), best.as_ref().unwrap_or(&adapter), &plan.base_model)?;
    if let Some(conflicts) = &state.conflicts {
        conflicts.write(&folder.join(paths::ROW_CONFLICTS), &inputs.lines)?;
    }
    log.finish();
    Ok(Ended::Done { trained_tokens })
}

/// What a job folder holds, read and checked.
struct Inputs {
    architecture: Architecture,
    examples: Vec<Example>,
    /// Each example's line in the tenant's file.
    lines: Vec<u64>,
    validation: Vec<Example>,
    alignment: Vec<Example>,
}

impl Inputs {
    fn read(folder: &Path, plan: &Plan) -> Result<Self> {
        let h = &plan.hyperparameters;
        h.check().and_then(|()| h.check_with(&plan.safety)).map_err(|e| bad_setup(format!("{}: {}", paths::PLAN, e.message)))?;
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
        let rows = |name: &str, options, fault: fn(String) -> anyhow::Error| read_rows(folder, name, &tokenizer, options, fault);
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

/// Says what the run will need, and refuses one that cannot fit.
fn memory_plan(inputs: &Inputs, plan: &Plan, log: &mut ProgressLog) -> Result<()> {
    let parameters = |h: &Hyperparameters| -> u64 {
        let sizes = h.target_modules.iter().map(|&projection| {
            let (input, output) = model::projection_size(&inputs.architecture, projection);
            (input + output).cast_unsigned() * u64::from(h.lora_rank)
        });
        sizes.sum::<u64>() * inputs.architecture.layers.len() as u64
    };
    let needs = |h: &Hyperparameters| {
        let pass = largest_pass(inputs, h, plan.safety.kl_positions == KlPositions::All);
        let positions = inputs.alignment.iter().map(|row| row.supervised_count() as u64).sum();
        // A step that asks for each row's gradient has those of a whole pass at once; a method may remember vectors of its own.
        let by_row = h.row_conflicts || plan.safety.projection == ProjectionOf::PerRow;
        let vectors = u64::from(by_row) * u64::from(h.batch_size)
            + u64::from(h.row_conflicts)
            + match plan.safety.defense {
                Defense::Held => 4,
                Defense::Lisa => 1,
                _ => 0,
            };
        memory::plan(&inputs.architecture, h, parameters(h), vectors, pass, positions)
    };
    let needed = needs(&plan.hyperparameters);
    log.write(&Progress::Memory(needed))?;
    // A GPU's memory is not the machine's; there only a limit of the plan's own counts.
    let machine = if plan.device == "cpu" { memory::available_bytes() } else { None };
    let Some(limit) = [plan.memory_limit_bytes, machine].into_iter().flatten().min() else { return Ok(()) };
    if needed.total_bytes() <= limit {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let advice = match memory::smallest_change(&plan.hyperparameters, limit, needs) {
        Some(smaller) => format!("it would fit with {} ({} MiB)", smaller.change, mib(smaller.plan.total_bytes())),
        None => "no smaller setting of this model fits; it needs a larger machine or a smaller model".into(),
    };
    Err(BadInput::Memory(format!(
        "the run needs {} MiB and {} MiB are there: weights {}, activations {}, logits {}, adapter and optimiser {}, alignment states {}, program {}; {advice}",
        mib(needed.total_bytes()),
        mib(limit),
        mib(needed.weights_bytes),
        mib(needed.activations_bytes),
        mib(needed.logits_bytes),
        mib(needed.optimizer_bytes),
        mib(needed.reference_bytes),
        mib(needed.program_bytes),
    ))
    .into())
}

/// The largest pass that the order of rows could make: the longest rows together.
fn largest_pass(inputs: &Inputs, h: &Hyperparameters, all_positions: bool) -> LargestPass {
    /// The longest rows of a batch: how many, their tokens and positions, and the longest.
    fn largest(rows: &[Example], batch_size: usize) -> [u64; 4] {
        let mut rows: Vec<(u64, u64)> = rows.iter().map(|row| (row.ids.len() as u64, row.supervised_count() as u64)).collect();
        rows.sort_unstable_by(|x, y| y.cmp(x));
        rows.truncate(batch_size);
        let sum = |of: fn(&(u64, u64)) -> u64| rows.iter().map(of).sum();
        [rows.len() as u64, sum(|row| row.0), sum(|row| row.1), rows.first().map_or(0, |row| row.0)]
    }
    let batch_size = h.batch_size as usize;
    let (user, align) = (largest(&inputs.examples, batch_size), largest(&inputs.alignment, batch_size));
    let shared = user[1] + align[1] <= objective::SHARED_PASS_TOKENS;
    let both = |of: usize| if shared { user[of] + align[of] } else { user[of].max(align[of]) };
    LargestPass {
        tokens: both(1),
        // Attention pads every row to the longest of its pass.
        rectangle: both(0) * user[3].max(align[3]),
        positions: if all_positions { both(1) } else { both(2) },
        two_logits: !inputs.alignment.is_empty(),
    }
}

/// The alignment rows that gradients are taken on, and those that are kept apart for reviews.
fn references(
    folder: &Path,
    plan: &Plan,
    model: &Model,
    alignment: &[Example],
    log: &mut ProgressLog,
) -> Result<(Option<Reference>, Option<Reference>)> {
    if !plan.safety.defense.needs_alignment() {
        return Ok((None, None));
    }
    log.phase(Phase::AlignmentReference)?;
    let whole = reference_files::get(folder, plan, model, alignment)?;
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
const PROBE_EVERY: usize = 5;

/// How the steps of a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RunEnd {
    /// All were taken.
    Done,
    /// The validation loss no longer got better; the best adapter is what counts.
    StoppedEarly,
    /// It was asked to stop.
    Stopped,
}

/// A run with what stands around its steps: checkpoints, validation, progress, signals.
struct Session<'a> {
    run: &'a Run<'a>,
    checkpoints: &'a Checkpoints,
    log: &'a mut ProgressLog,
    validation: &'a [Example],
    stopping: &'a AtomicBool,
}

/// How often a run that diverges goes back and tries with half the learning rate.
const MOST_SETBACKS: u32 = 2;

impl Session<'_> {
    /// Takes the steps, going back to the last checkpoint with half the learning rate where they diverge.
    fn train_to_the_end(&mut self) -> Result<(State, RunEnd)> {
        let (run, h) = (self.run, &self.run.plan.hyperparameters);
        self.log.phase(Phase::Training)?;
        let mut setbacks = 0;
        loop {
            let mut state = run.start();
            let restored = self.checkpoints.restore(run.model, run.adapter, &mut state, |reason| eprintln!("{reason}"))?;
            if !restored {
                run.adapter.set(Adapter::init(run.model, AdapterConfig::from(h), run.plan.seed).flat());
            }
            if setbacks > state.cursor.setbacks {
                // What led to the setback must not count against what follows it.
                state.cursor.setbacks = setbacks;
                state.watch = LossWatch::default();
            }
            setbacks = state.cursor.setbacks;
            let from = state.cursor.step;
            match self.take_steps(&mut state) {
                Ok(ended) => return Ok((state, ended)),
                Err(error) => {
                    let Some(diverged) = error.downcast_ref::<Diverged>() else { return Err(error) };
                    if setbacks == MOST_SETBACKS {
                        return Err(BadInput::Diverged(format!(
                            "{diverged}; tried from step {from} with the learning rate {} and then {MOST_SETBACKS} times with half of the last; lower learning_rate or look at the rows",
                            h.learning_rate
                        ))
                        .into());
                    }
                    setbacks += 1;
                    if state.cursor.step <= from && from > 0 {
                        // Not one step could be taken from it: it is no good place to go back to.
                        self.checkpoints.discard(from)?;
                    }
                    let message = format!("{diverged}; going back to step {from} with half the learning rate");
                    self.log.write(&Progress::Note { step: from, message })?;
                }
            }
        }
    }

    fn take_steps(&mut self, state: &mut State) -> Result<RunEnd> {
        let (run, h) = (self.run, &self.run.plan.hyperparameters);
        let total_steps = run.total_steps();
        self.log.start(
            &Progress::Started {
                total_steps,
                rows: run.examples.len() as u64,
                alignment_rows: run.reference.map_or(0, |r| r.rows() as u64),
                trainable_parameters: run.adapter.parameters(),
            },
            state.cursor,
        )?;
        if state.cursor.step == 0 {
            self.validate(state, total_steps)?;
        }
        let evaluate_steps = run.evaluate_steps();
        let mut ended = RunEnd::Done;
        let done = run.train(state, |step, state| {
            self.log.step(step)?;
            let at = state.cursor.step;
            if at.is_multiple_of(evaluate_steps) || at == total_steps {
                self.validate(state, total_steps)?;
            }
            let patience = h.early_stopping_patience;
            if patience > 0 && at < total_steps && state.cursor.best.is_some_and(|best| best.since >= patience) {
                ended = RunEnd::StoppedEarly;
                return Ok(ControlFlow::Break(()));
            }
            let stop = self.stopping.load(Ordering::Relaxed);
            if stop || at.is_multiple_of(run.plan.checkpoint_steps.max(1)) {
                self.checkpoints.save(run.adapter, state)?;
            }
            if stop && at < total_steps {
                ended = RunEnd::Stopped;
                return Ok(ControlFlow::Break(()));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        // A patience that never ran out still means that the best is wanted.
        let wants_best = h.early_stopping_patience > 0 && state.cursor.best.is_some_and(|best| best.step > 0);
        Ok(if done && wants_best { RunEnd::StoppedEarly } else { ended })
    }

    /// Measures the adapter on the validation file, and keeps it where it is the best so far.
    fn validate(&mut self, state: &mut State, total_steps: u64) -> Result<()> {
        if self.validation.is_empty() {
            return Ok(());
        }
        let step = state.cursor.step;
        let adapter = (step > 0).then_some(self.run.adapter);
        let rows_per_pass = self.run.plan.hyperparameters.batch_size as usize;
        let found = evaluate(self.run.model, adapter, self.validation, rows_per_pass);
        self.log.write(&Progress::Validation { step, loss: found.loss, token_accuracy: found.token_accuracy })?;
        if !found.loss.is_finite() {
            return Err(Diverged::NotANumber { step }.into());
        }
        if step == 0 || step > total_steps {
            return Ok(());
        }
        match &mut state.cursor.best {
            Some(best) if found.loss >= best.loss() => best.since += 1,
            best => {
                *best = Some(Best::new(step, found.loss));
                self.checkpoints.save_best(self.run.adapter, step)?;
            }
        }
        Ok(())
    }
}

/// The examples of one of the job's files with their lines; a line that cannot be used is a `fault`, named by its number.
fn read_rows(
    folder: &Path,
    name: &str,
    tokenizer: &ChatTokenizer,
    options: EncodeOptions,
    fault: fn(String) -> anyhow::Error,
) -> Result<(Vec<u64>, Vec<Example>)> {
    let file = File::open(folder.join(name)).map_err(|e| fault(format!("{name}: {e}")))?;
    let (mut lines, mut examples) = (Vec::new(), Vec::new());
    let report = encode_file(file, tokenizer, options, |line, example| {
        lines.push(line);
        examples.push(example);
    })
    .with_context(|| format!("cannot read {name}"))?;
    if report.error_count > 0 {
        return Err(fault(format!("{name}: {}", report.summary())));
    }
    if examples.is_empty() {
        return Err(fault(format!("{name} holds no rows")));
    }
    Ok((lines, examples))
}
