//! The steps of a job with what stands around them: checkpoints, validation, progress, signals, setbacks.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Result;
use holdfast_dataset::Example;
use holdfast_domain::progress::{Phase, Progress};

use super::failure::BadInput;
use super::start;
use crate::checkpoint::{Checkpoints, Owed, State};
use crate::divergence::Diverged;
use crate::evaluate::evaluate;
use crate::progress::ProgressLog;
use crate::stop::Stopped;
use crate::train::Run;

/// How the steps of a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunEnd {
    /// All were taken.
    Done,
    /// The validation loss no longer got better; the best adapter is what counts.
    StoppedEarly,
    /// It was asked to stop.
    Stopped,
}

/// A run with what stands around its steps: checkpoints, validation, progress, signals.
pub(super) struct Session<'a> {
    pub(super) folder: &'a Path,
    pub(super) run: &'a Run<'a>,
    pub(super) checkpoints: &'a Checkpoints,
    pub(super) log: &'a mut ProgressLog,
    pub(super) validation: &'a [Example],
}

/// How often a run that diverges goes back and tries with half the learning rate.
const MOST_SETBACKS: u32 = 2;

impl Session<'_> {
    /// Takes the steps, going back to the last good checkpoint with half the learning rate where they diverge.
    pub(super) fn train_to_the_end(&mut self) -> Result<(State, RunEnd)> {
        self.log.phase(Phase::Training)?;
        let mut state = self.restore()?;
        self.run.stop.check()?;
        loop {
            let (from, setbacks) = (state.cursor.step, state.cursor.setbacks);
            let diverged = match self.take_steps(&mut state) {
                Ok(ended) => return Ok((state, ended)),
                Err(error) => error.downcast::<Diverged>()?,
            };
            if setbacks == MOST_SETBACKS {
                let highest = self.run.plan.hyperparameters.learning_rate;
                let tried: Vec<String> =
                    (0..=setbacks).map(|halved| format!("{}", highest * 0.5_f64.powi(halved as i32))).collect();
                return Err(BadInput::Diverged(format!(
                    "{diverged}; tried with learning_rate {}, the last time from step {from}; lower it, or look at the rows",
                    tried.join(", then ")
                ))
                .into());
            }
            // No step could be taken from here: this is no place to go back to.
            self.checkpoints.discard(state.cursor.step)?;
            state = self.restore()?;
            while state.watch.is_rising() || !self.checkpoints.is_scheduled(state.cursor.step) {
                // Nor is one that was taken while the loss was rising, or only for a stop: an undisturbed run has none there.
                self.checkpoints.discard(state.cursor.step)?;
                state = self.restore()?;
            }
            state.cursor.setbacks = setbacks + 1;
            let step = state.cursor.step;
            let message = format!("{diverged}; going back to step {step} with half the learning rate");
            self.log.write(&Progress::Note { step, message })?;
        }
    }

    /// Where the newest sound checkpoint stands, or the beginning, with the adapter as it was there.
    fn restore(&self) -> Result<State> {
        let run = self.run;
        let mut state = run.start();
        if !self.checkpoints.restore(run.model, run.adapter, &mut state, |reason| eprintln!("{reason}"))? {
            run.adapter.set(start::adapter(self.folder, run.plan, run.model)?.flat());
        }
        Ok(state)
    }

    fn take_steps(&mut self, state: &mut State) -> Result<RunEnd> {
        let run = self.run;
        self.log.start(
            &Progress::Started {
                total_steps: run.total_steps(),
                rows: run.examples.len() as u64,
                alignment_rows: run.reference.map_or(0, |r| r.rows() as u64),
                trainable_parameters: run.adapter.parameters(),
            },
            state.cursor,
        )?;
        if state.cursor.step == 0 && !self.validate(state)? {
            return Err(Stopped.into());
        }
        if state.cursor.owed.is_some() {
            run.settle(state);
            self.tell_of_reviews(state)?;
            if let ControlFlow::Break(ended) = self.after_step(state)? {
                return Ok(ended);
            }
        }
        let mut ended = RunEnd::Done;
        let done = run.train(state, |step, state| {
            let told = self.log.step(step)?;
            state.told = Some(told).filter(|_| state.cursor.owed.is_some_and(|owed| owed != Owed::Validation));
            Ok(match self.after_step(state)? {
                ControlFlow::Break(early) => {
                    ended = early;
                    ControlFlow::Break(())
                }
                ControlFlow::Continue(()) => ControlFlow::Continue(()),
            })
        })?;
        // A patience that never ran out still means that the best is wanted, once it is known.
        let wants_best =
            run.plan.hyperparameters.early_stopping_patience > 0 && state.cursor.best.is_some_and(|best| best.step > 0);
        Ok(if done && wants_best && ended == RunEnd::Done { RunEnd::StoppedEarly } else { ended })
    }

    /// Tells of the last step again, with the reviews that a stop had put off.
    fn tell_of_reviews(&mut self, state: &mut State) -> Result<()> {
        if state.reviews.is_empty() {
            return Ok(());
        }
        let Some(mut told) = state.told.take() else { return Ok(()) };
        told.reviews = std::mem::take(&mut state.reviews);
        self.log.write(&Progress::Step(Box::new(told)))
    }

    /// Measures, leaves a checkpoint and ends the run, each where it is time for it.
    fn after_step(&mut self, state: &mut State) -> Result<ControlFlow<RunEnd>> {
        let (run, at) = (self.run, state.cursor.step);
        if state.cursor.owed == Some(Owed::Validation) && (!run.evaluation_is_due(state) || self.validate(state)?) {
            state.cursor.owed = None;
        }
        let is_last = at == run.total_steps();
        let patience = run.plan.hyperparameters.early_stopping_patience;
        if patience > 0 && !is_last && state.cursor.best.is_some_and(|best| best.since >= patience) {
            return Ok(ControlFlow::Break(RunEnd::StoppedEarly));
        }
        let stop = run.stop.is_asked();
        let is_scheduled = self.checkpoints.is_scheduled(at);
        // One that is taken while the loss is rising is no place to go back to, and must not replace one that is.
        if stop || (is_scheduled && !state.watch.is_rising()) {
            self.checkpoints.save(run.adapter, state)?;
            if !state.watch.is_rising() {
                let best = state.cursor.best.map(|best| best.step);
                let settled = is_scheduled && state.cursor.owed.is_none();
                self.log.write(&Progress::Checkpoint { step: at, best, settled })?;
            }
        }
        let is_done = is_last && state.cursor.owed.is_none();
        Ok(if stop && !is_done { ControlFlow::Break(RunEnd::Stopped) } else { ControlFlow::Continue(()) })
    }

    /// Measures the adapter on the validation file, and keeps it where it is the best so far. Returns whether it was done before
    /// the run was asked to stop.
    fn validate(&mut self, state: &mut State) -> Result<bool> {
        if self.validation.is_empty() {
            return Ok(true);
        }
        let step = state.cursor.step;
        // A fresh adapter is the base still.
        let adapter = (step > 0 || self.run.plan.start.is_some()).then_some(self.run.adapter);
        let rows_per_pass = self.run.plan.hyperparameters.batch_size as usize;
        let Ok(found) = evaluate(self.run.model, adapter, self.validation, rows_per_pass, self.run.stop) else {
            return Ok(false);
        };
        self.log.write(&Progress::Validation { step, loss: found.loss, token_accuracy: found.token_accuracy })?;
        if !found.loss.is_finite() {
            return Err(Diverged::NotANumber { step }.into());
        }
        if step == 0 {
            return Ok(true);
        }
        match &mut state.cursor.best {
            Some(best) if found.loss >= best.loss() => best.since += 1,
            best => *best = Some(self.checkpoints.save_best(self.run.adapter, step, found.loss)?),
        }
        Ok(true)
    }
}
