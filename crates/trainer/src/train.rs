//! The training loop, which reads like the paper.

use std::ops::ControlFlow;

use anyhow::Result;
use holdfast_dataset::Example;
use holdfast_dataset::batch::Batch;
use holdfast_dataset::order::RowOrder;
use holdfast_domain::progress::{AlignmentFacts, Review, Step};
use holdfast_domain::{Plan, steps};
use tch::{Kind, Tensor};

use crate::adapter::Adapter;
use crate::checkpoint::{Cursor, LastGood, Owed, State};
use crate::conflicts::RowConflicts;
use crate::divergence::{Diverged, LossWatch};
use crate::evaluate;
use crate::gradient::{self, Gradient};
use crate::methods::{self, Asks, Side, Sides, Verdict};
use crate::model::Model;
use crate::objective::{AlignmentRows, Engine, Task, supervised};
use crate::optimizer::AdamW;
use crate::reference::Reference;
use crate::schedule::Schedule;
use crate::stop::{Stop, Stopped};
use crate::surgery::Facts;

/// Keeps the order of the alignment rows apart from that of the user's rows.
const ALIGNMENT_ORDER: u64 = 0x616c_6967_6e6d_656e;

/// What a run needs.
#[derive(Debug)]
pub struct Run<'a> {
    /// The frozen base.
    pub model: &'a Model,
    /// What is trained.
    pub adapter: &'a Adapter,
    /// The tenant's rows.
    pub examples: &'a [Example],
    /// The alignment rows; `None` where the method needs none.
    pub reference: Option<&'a Reference>,
    /// Alignment rows that no gradient is taken on, where the method reviews its steps.
    pub probe: Option<&'a Reference>,
    /// How to train.
    pub plan: &'a Plan,
    /// What asks it to stop.
    pub stop: &'a Stop,
}

/// The two sides of a step as they were computed.
struct Gradients {
    task: Option<Task>,
    align: Option<Side>,
    row_dots: Vec<f64>,
}

impl Run<'_> {
    /// Steps of the whole run.
    #[must_use]
    pub fn total_steps(&self) -> u64 {
        steps::total(&self.plan.hyperparameters, &self.plan.safety, self.examples.len() as u64)
    }

    /// Where a run begins.
    #[must_use]
    pub fn start(&self) -> State {
        let h = &self.plan.hyperparameters;
        State {
            cursor: Cursor::default(),
            optimizer: AdamW::new(self.adapter, h.weight_decay),
            method: methods::of(&self.plan.safety, h.precision),
            conflicts: h.row_conflicts.then(|| RowConflicts::new(self.adapter, self.examples.len())),
            last_good: None,
            reviews: Vec::new(),
            told: None,
            watch: LossWatch::default(),
        }
    }

    /// Trains the adapter from where `state` stands, which must owe at most a validation, and calls `observe` after every step with what
    /// happened in it; times are left for it to fill in. `observe` may break the run off, and must while something is owed that
    /// [`Self::settle`] gives. Returns whether the run is done.
    ///
    /// # Errors
    /// [`Diverged`], or whatever `observe` fails with.
    pub fn train(&self, state: &mut State, mut observe: impl FnMut(Step, &mut State) -> Result<ControlFlow<()>>) -> Result<bool> {
        let h = &self.plan.hyperparameters;
        let total_steps = self.total_steps();
        let schedule = Schedule::new(h, total_steps);
        let mut user_rows = self.user_order();
        let mut align_rows = self.align_order();
        if state.method.review_steps().is_some() && state.last_good.is_none() {
            state.last_good = Some(self.snapshot(state));
        }
        let setback_scale = 0.5_f64.powi(state.cursor.setbacks as i32);
        for step in state.cursor.step..total_steps {
            let asks = state.method.asks(step);
            let rows = asks.user_step.map(|at| user_rows.step(at)).unwrap_or_default();
            let learning_rate = schedule.at(step) * state.method.learning_rate_scale() * setback_scale;

            let Gradients { task, align, row_dots } = self.gradients(state, &asks, step, &rows, &mut align_rows, learning_rate); // u and a
            let (loss, token_accuracy) = match (&task, &align) {
                (Some(task), _) => (task.side.loss, task.token_accuracy),
                (None, Some(align)) => (align.loss, 0.0),
                (None, None) => (0.0, 0.0),
            };
            let norm_user = task.as_ref().map_or(0.0, |task| task.side.gradient.norm());
            let user = task.map(|task| task.side);
            let sides = Sides { user, align: align.as_ref(), row_dots: &row_dots, weights: self.adapter.flat() };
            let mut merged = state.method.merge(sides); // g
            let gradient_norm = merged.gradient.clip(h.max_grad_norm);
            if !(loss.is_finite() && gradient_norm.is_finite()) {
                return Err(Diverged::NotANumber { step: step + 1 }.into());
            }
            // Phases on other rows have losses of their own.
            if asks.user_step.is_some() {
                state.watch.see(step + 1, loss)?;
            }
            let change = state.optimizer.update(self.adapter, &merged.gradient, learning_rate);
            let (change, taken_away) = state.method.correct(change, align.as_ref().map(|align| &align.gradient));
            if let Some(facts) = &mut merged.facts {
                facts.removed += taken_away; // a method takes away here or in `merge`
            }
            if !gradient::dot(&change, &change).is_finite() {
                return Err(Diverged::NotANumber { step: step + 1 }.into());
            }
            self.adapter.shift(&change);

            state.cursor.step = step + 1;
            state.cursor.conflicts += u64::from(merged.facts.as_ref().is_some_and(|facts| facts.conflict));
            state.cursor.tokens += rows.iter().map(|&row| self.examples[row].ids.len() as u64).sum::<u64>();
            state.cursor.owed = Some(Owed::Scores);
            self.settle(state);
            let conflict_rate = state.cursor.conflicts as f64 / (step + 1) as f64;
            let report = Step {
                step: step + 1,
                total_steps,
                task_loss: loss,
                token_accuracy,
                alignment: align.zip(merged.facts).map(|(align, facts)| report(&align, &facts, &change, conflict_rate)),
                norm_user,
                gradient_norm,
                learning_rate,
                tokens: state.cursor.tokens,
                tokens_per_second: 0.0,
                eta_seconds: 0.0,
                reviews: std::mem::take(&mut state.reviews),
            };
            if observe(report, state)?.is_break() {
                return Ok(step + 1 == total_steps);
            }
        }
        Ok(true)
    }

    /// Gives what the last step is owed, but for the validation; what a stop breaks off stays owed.
    pub fn settle(&self, state: &mut State) {
        if state.cursor.owed == Some(Owed::Scores) && self.score_rows(state).is_ok() {
            state.cursor.owed = Some(Owed::Review);
        }
        if state.cursor.owed == Some(Owed::Review) && self.review(state).is_ok() {
            state.cursor.owed = Some(Owed::Validation);
        }
    }

    fn gradients(
        &self,
        state: &mut State,
        asks: &Asks,
        step: u64,
        rows: &[usize],
        align_rows: &mut Option<RowOrder>,
        learning_rate: f64,
    ) -> Gradients {
        let h = &self.plan.hyperparameters;
        let engine = self.engine(step);
        let batches = self.batches(rows);
        let passes: Option<Vec<Vec<usize>>> = asks
            .alignment
            .zip(align_rows.as_mut())
            .map(|((_, at), order)| order.step(at).chunks(h.batch_size as usize).map(<[usize]>::to_vec).collect());
        let alignment = self.reference.zip(passes.as_deref()).zip(asks.alignment);
        let alignment = alignment.map(|((reference, passes), (objective, _))| AlignmentRows { reference, objective, passes });
        if asks.lookahead {
            let task = engine.task(&batches);
            let align = alignment.map(|rows| self.ahead(state, &task.side.gradient, learning_rate, || engine.alignment(rows)));
            return Gradients { task: Some(task), align, row_dots: Vec::new() };
        }
        if batches.is_empty() {
            return Gradients { task: None, align: alignment.map(|rows| engine.alignment(rows)), row_dots: Vec::new() };
        }
        let scores_rows = state.conflicts.as_ref().is_some_and(|conflicts| conflicts.direction(step).is_some());
        let (task, align, row_dots) = if asks.each_row || scores_rows {
            // Each row's own gradient is asked for, so `a` is computed first.
            let align = alignment.map(|rows| engine.alignment(rows));
            let against = align.as_ref().filter(|_| asks.each_row);
            let mut scored = state.conflicts.as_mut().filter(|_| scores_rows);
            let (mut row_dots, tokens) = (Vec::new(), supervised(&batches));
            let task = engine.task_by_row(&batches, |row, gradient| {
                row_dots.extend(against.map(|align| gradient.dot(&align.gradient)));
                if let Some(conflicts) = &mut scored {
                    conflicts.score(rows[row], gradient, tokens, step);
                }
            });
            (task, align, row_dots)
        } else {
            let (task, align) = engine.gradients(&batches, alignment);
            (task, align, Vec::new())
        };
        if let (Some(conflicts), Some(align)) = (&mut state.conflicts, &align) {
            conflicts.learn(&align.gradient);
        }
        Gradients { task: Some(task), align, row_dots }
    }

    /// Runs `compute` at the weights that the user's gradient alone would lead to.
    fn ahead(&self, state: &State, user: &Gradient, learning_rate: f64, compute: impl FnOnce() -> Side) -> Side {
        let here = self.adapter.flat().copy();
        let mut alone = Gradient(user.0.copy());
        alone.clip(self.plan.hyperparameters.max_grad_norm);
        self.adapter.shift(&state.optimizer.preview(self.adapter, &alone, learning_rate));
        let found = compute();
        self.adapter.set(&here);
        found
    }

    /// What computes the gradients of a step. Dropout's key is a function of seed and step, so that a step is the same whether or
    /// not others ran before it.
    fn engine(&self, step: u64) -> Engine<'_> {
        let dropout_key = Some(self.plan.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(step));
        let recompute = self.plan.hyperparameters.activation_checkpointing;
        Engine { model: self.model, adapter: self.adapter, dropout_key, recompute }
    }

    fn user_order(&self) -> RowOrder {
        let h = &self.plan.hyperparameters;
        let rows_per_step = rows_per_step(self.plan);
        if h.length_grouping {
            let lengths = self.examples.iter().map(|example| example.ids.len()).collect();
            return RowOrder::grouped(self.plan.seed, lengths, rows_per_step);
        }
        RowOrder::new(self.plan.seed, self.examples.len(), rows_per_step)
    }

    fn align_order(&self) -> Option<RowOrder> {
        let rows_per_step = self.plan.safety.alignment_rows_per_step(self.plan.hyperparameters.rows_per_step());
        let rows_per_step = usize::try_from(rows_per_step).unwrap_or(usize::MAX);
        self.reference.map(|reference| RowOrder::new(self.plan.seed ^ ALIGNMENT_ORDER, reference.rows(), rows_per_step))
    }

    /// The forward passes of one step.
    fn batches(&self, rows: &[usize]) -> Vec<Batch> {
        rows.chunks(self.plan.hyperparameters.batch_size as usize)
            .map(|rows| Batch::new(rows.iter().map(|&row| &self.examples[row])))
            .collect()
    }

    fn score_rows(&self, state: &mut State) -> Result<(), Stopped> {
        if !self.ends_epoch(state) {
            return Ok(());
        }
        // In bfloat16 so small a step is lost in the rounding of the weights.
        let Some(conflicts) = state.conflicts.as_mut().filter(|_| self.model.kind == Kind::Float) else { return Ok(()) };
        let rows_per_pass = self.plan.hyperparameters.batch_size as usize;
        conflicts.score_by_forward(self.adapter, state.cursor.step.saturating_sub(1), || {
            evaluate::row_losses(self.model, Some(self.adapter), self.examples, rows_per_pass, self.stop)
        })
    }

    fn snapshot(&self, state: &State) -> LastGood {
        LastGood { weights: self.adapter.flat().copy(), optimizer: state.optimizer.clone() }
    }

    /// Whether the method reviews its steps now: every so many, at the end, and before anything is kept of the run.
    fn review_is_due(&self, state: &State) -> bool {
        let step = state.cursor.step;
        let kept = self.evaluation_is_due(state) || step.is_multiple_of(self.plan.checkpoint_steps.max(1));
        state.method.review_steps().is_some_and(|every| kept || step.is_multiple_of(every))
    }

    /// Whether the last step was an epoch's last on the user's rows; some methods take steps on other rows in between.
    fn ends_epoch(&self, state: &State) -> bool {
        let user_step = state.method.asks(state.cursor.step.saturating_sub(1)).user_step;
        RowOrder::new(self.plan.seed, self.examples.len(), rows_per_step(self.plan)).ends_epoch(user_step)
    }

    /// Whether the validation file is to be looked at now: every so many steps, or after each pass over the user's rows; and at
    /// the end.
    #[must_use]
    pub fn evaluation_is_due(&self, state: &State) -> bool {
        let step = state.cursor.step;
        step == self.total_steps()
            || match self.plan.hyperparameters.evaluate_steps {
                0 => self.ends_epoch(state),
                every => step.is_multiple_of(every),
            }
    }

    /// Judges the steps since the last review where it is time, and takes them back where they left the budget.
    fn review(&self, state: &mut State) -> Result<(), Stopped> {
        if !self.review_is_due(state) {
            return Ok(());
        }
        let Some(loss) = self.probe_loss(state)? else { return Ok(()) };
        let verdict = state.method.review(loss);
        match (verdict, &state.last_good) {
            (Verdict::RollBack, Some(LastGood { weights, optimizer })) => {
                self.adapter.set(weights);
                state.optimizer = optimizer.clone();
            }
            _ => state.last_good = Some(self.snapshot(state)),
        }
        let probe_loss = Some(loss).filter(|loss| loss.is_finite());
        state.reviews.push(Review { step: state.cursor.step, probe_loss, taken_back: verdict == Verdict::RollBack });
        Ok(())
    }

    /// The alignment loss on probe rows of the adapter that is to be trained, if it is more than the method keeps: nothing good exists to go
    /// back to then.
    ///
    /// # Errors
    /// When the run is stopped.
    pub fn outside_budget(&self) -> Result<Option<f64>, Stopped> {
        let state = self.start();
        Ok(self.probe_loss(&state)?.filter(|loss| !state.method.keeps(*loss)))
    }

    /// The alignment loss on the rows that are kept apart, where there are some.
    fn probe_loss(&self, state: &State) -> Result<Option<f64>, Stopped> {
        let (Some(probe), Some((objective, _))) = (self.probe, state.method.asks(state.cursor.step).alignment) else {
            return Ok(None);
        };
        let all: Vec<usize> = (0..probe.rows()).collect();
        let passes: Vec<Vec<usize>> = all.chunks(self.plan.hyperparameters.batch_size as usize).map(<[usize]>::to_vec).collect();
        let engine = Engine { dropout_key: None, ..self.engine(0) };
        engine.alignment_loss(AlignmentRows { reference: probe, objective, passes: &passes }, self.stop).map(Some)
    }
}

fn rows_per_step(plan: &Plan) -> usize {
    usize::try_from(plan.hyperparameters.rows_per_step()).unwrap_or(usize::MAX)
}

fn report(align: &Side, facts: &Facts, change: &Tensor, conflict_rate: f64) -> AlignmentFacts {
    AlignmentFacts {
        align_kl: align.loss,
        dot: facts.dot,
        cosine: facts.cosine,
        norm_align: facts.norm_align,
        coefficient: facts.coefficient,
        conflict: facts.conflict,
        conflict_rate,
        removed_fraction: facts.removed,
        alignment_change: gradient::dot(&align.gradient.0, change),
    }
}
