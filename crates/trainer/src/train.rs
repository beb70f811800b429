//! The training loop, which reads like the paper.

use std::ops::ControlFlow;

use anyhow::{Result, ensure};
use holdfast_dataset::Example;
use holdfast_dataset::batch::Batch;
use holdfast_dataset::order::RowOrder;
use holdfast_domain::Plan;
use holdfast_domain::progress::{AlignmentFacts, Step};
use tch::Tensor;

use crate::adapter::Adapter;
use crate::checkpoint::{Cursor, State};
use crate::gradient::{self, Gradient};
use crate::loss;
use crate::model::Model;
use crate::optimizer::AdamW;
use crate::reference::{self, Reference};
use crate::schedule::Schedule;
use crate::surgery;

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
    /// How to train.
    pub plan: &'a Plan,
}

/// The task side of a step.
#[derive(Debug)]
pub struct Task {
    /// Mean loss of the supervised tokens, in nats.
    pub loss: f64,
    /// The share of them the model ranked first.
    pub token_accuracy: f64,
    /// Its gradient, `u`.
    pub gradient: Gradient,
}

impl Run<'_> {
    /// Steps of the whole run.
    #[must_use]
    pub fn total_steps(&self) -> u64 {
        self.plan.hyperparameters.total_steps(self.examples.len() as u64)
    }

    /// Where a run begins.
    #[must_use]
    pub fn start(&self) -> State {
        State { cursor: Cursor::default(), optimizer: AdamW::new(self.adapter, self.plan.hyperparameters.weight_decay) }
    }

    /// Trains the adapter from where `state` stands, calling `observe` after every step with what happened in it; times are
    /// left for it to fill in. It may break the run off. Returns whether the run is done.
    ///
    /// # Errors
    /// When a loss or gradient is no longer a number, or `observe` fails.
    pub fn train(&self, state: &mut State, mut observe: impl FnMut(Step, &State) -> Result<ControlFlow<()>>) -> Result<bool> {
        let (h, safety) = (&self.plan.hyperparameters, &self.plan.safety);
        let total_steps = self.total_steps();
        let schedule = Schedule::new(h, total_steps);
        let rows_per_step = usize::try_from(h.rows_per_step())?;
        let mut user_rows = RowOrder::new(self.plan.seed, self.examples.len(), rows_per_step);
        let mut align_rows =
            self.reference.map(|reference| RowOrder::new(self.plan.seed ^ ALIGNMENT_ORDER, reference.rows(), rows_per_step));
        for step in state.cursor.step..total_steps {
            // Dropout draws from libtorch's generator; seeded by the step, a step is the same whether or not others ran before it.
            tch::manual_seed(self.plan.seed.wrapping_add(step) as i64);

            let batches = self.batches(&user_rows.step(step));
            let user = task_gradient(self.model, self.adapter, &batches, true); // u
            let align = self.reference.zip(align_rows.as_mut()).map(|(reference, order)| {
                let passes: Vec<Vec<usize>> = order.step(step).chunks(h.batch_size as usize).map(<[usize]>::to_vec).collect();
                alignment_gradient(self.model, self.adapter, reference, &passes, true) // a
            });
            let norm_user = user.gradient.norm();
            let mut merged = surgery::merge(user.gradient, align.as_ref().map(|(_, a)| a), safety, h.precision); // g
            let gradient_norm = merged.gradient.clip(h.max_grad_norm);
            ensure!(
                user.loss.is_finite() && gradient_norm.is_finite(),
                "the loss or its gradient is no longer a number at step {}; lower the learning rate",
                step + 1
            );
            let learning_rate = schedule.at(step);
            let change = state.optimizer.step(self.adapter, &merged.gradient, learning_rate);

            state.cursor.step = step + 1;
            state.cursor.conflicts += u64::from(merged.facts.as_ref().is_some_and(|facts| facts.conflict));
            state.cursor.tokens += batches.iter().map(|batch| batch.tokens as u64).sum::<u64>();
            let conflict_rate = state.cursor.conflicts as f64 / (step + 1) as f64;
            let report = Step {
                step: step + 1,
                total_steps,
                task_loss: user.loss,
                token_accuracy: user.token_accuracy,
                alignment: align.zip(merged.facts).map(|((kl, a), facts)| report(kl, &a, &facts, &change, conflict_rate)),
                norm_user,
                gradient_norm,
                learning_rate,
                tokens: state.cursor.tokens,
                tokens_per_second: 0.0,
                eta_seconds: 0.0,
            };
            if observe(report, state)?.is_break() {
                return Ok(step + 1 == total_steps);
            }
        }
        Ok(true)
    }

    /// The forward passes of one step.
    fn batches(&self, rows: &[usize]) -> Vec<Batch> {
        rows.chunks(self.plan.hyperparameters.batch_size as usize)
            .map(|rows| Batch::new(rows.iter().map(|&row| &self.examples[row])))
            .collect()
    }
}

fn report(align_kl: f64, align: &Gradient, facts: &surgery::Facts, change: &Tensor, conflict_rate: f64) -> AlignmentFacts {
    AlignmentFacts {
        align_kl,
        dot: facts.dot,
        cosine: facts.cosine,
        norm_align: facts.norm_align,
        coefficient: facts.coefficient,
        conflict: facts.conflict,
        conflict_rate,
        removed_fraction: facts.removed_fraction(),
        alignment_change: gradient::dot(&align.0, change),
    }
}

/// `u = ∇ mean over supervised tokens of −log p(next token)`, over all passes of a step: sums of token losses, divided once by
/// the number of all their tokens, so that how a step is cut into passes makes no difference.
#[must_use]
pub fn task_gradient(model: &Model, adapter: &Adapter, batches: &[Batch], train: bool) -> Task {
    let supervised = batches.iter().map(|batch| batch.targets.len()).sum::<usize>() as f64;
    let mut gradient = Gradient::zeros(adapter);
    let (mut sum, mut correct) = (0.0, 0);
    for batch in batches {
        let hidden = model.hidden(&reference::ids(batch, model), Some(adapter), train); // [rows, time, hidden]
        let positions = Tensor::from_slice(&batch.positions).to_device(model.device);
        let targets = Tensor::from_slice(&batch.targets).to_device(model.device);
        let hidden = reference::at_positions(&hidden, &positions); // [positions, hidden]
        let loss = loss::task(&hidden, &model.head, &targets, supervised);
        gradient.accumulate(adapter, &hidden, &loss.by_hidden);
        sum += loss.sum;
        correct += loss.correct;
    }
    Task { loss: sum / supervised, token_accuracy: correct as f64 / supervised, gradient }
}

/// `a = ∇ mean over supervised tokens of KL(base ‖ adapted)`, over all passes of a step, with the mean itself.
#[must_use]
pub fn alignment_gradient(
    model: &Model,
    adapter: &Adapter,
    reference: &Reference,
    passes: &[Vec<usize>],
    train: bool,
) -> (f64, Gradient) {
    let supervised = passes.iter().map(|rows| reference.supervised(rows)).sum::<usize>() as f64;
    let mut gradient = Gradient::zeros(adapter);
    let mut sum = 0.0;
    for rows in passes {
        let batch = reference.batch(model, rows);
        let hidden = reference::at_positions(&model.hidden(&batch.ids, Some(adapter), train), &batch.positions);
        let loss = loss::kl(&hidden, &model.head, &batch.hidden, supervised);
        gradient.accumulate(adapter, &hidden, &loss.by_hidden);
        sum += loss.sum;
    }
    (sum / supervised, gradient)
}
