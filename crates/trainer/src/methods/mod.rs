//! The methods that share the two gradients, behind one small interface: what a step asks for, how `u` and `a` become the
//! gradient that is applied, and what a method remembers from step to step.
//!
//! `u` is the gradient of the task's loss on the user's rows, `a` that of the method's alignment loss on the operator's. Each
//! file has one method's formula and its test against numbers worked by hand.

mod held;
mod kl_penalty;
mod lisa;
mod none;
mod pcgrad;
mod safe_mix;
mod safegrad;
mod sbr;

use std::collections::BTreeMap;

use holdfast_domain::Safety;
use holdfast_domain::hyperparameters::Precision;
use holdfast_domain::safety::{Defense, KlPositions};
use tch::Tensor;

use crate::gradient::Gradient;
use crate::surgery::Merged;

pub use held::Held;
pub use kl_penalty::KlPenalty;
pub use lisa::Lisa;
pub use none::Plain;
pub use pcgrad::Pcgrad;
pub use safe_mix::SafeMix;
pub use safegrad::Safegrad;
pub use sbr::Sbr;

/// What the alignment rows are held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    /// Mean over positions of `KL(base ‖ adapted)`.
    Kl,
    /// The same, weighted towards a response's beginning, over the worse half of the rows.
    WeightedKl,
    /// The mean squared error of the final hidden state at the last prompt position against the base's.
    Hidden,
    /// The task's own loss: the rows are learned.
    Task,
}

impl Objective {
    /// The KL over the positions that a job asks for.
    #[must_use]
    pub const fn kl(positions: KlPositions) -> Self {
        match positions {
            KlPositions::Response | KlPositions::All => Self::Kl,
            KlPositions::Deciding => Self::WeightedKl,
        }
    }
}

/// What a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asks {
    /// Whether it takes the user's rows, and which of the user's steps it is.
    pub user_step: Option<u64>,
    /// What the alignment rows are held to, and which of their steps it is.
    pub alignment: Option<(Objective, u64)>,
    /// Whether each row's ⟨u_i, a⟩ is asked for.
    pub each_row: bool,
    /// Whether `a` is taken where `u` alone would lead.
    pub lookahead: bool,
}

impl Asks {
    /// The user's rows, and the alignment rows where an objective is given.
    #[must_use]
    pub const fn both(step: u64, objective: Option<Objective>) -> Self {
        let alignment = match objective {
            Some(objective) => Some((objective, step)),
            None => None,
        };
        Self { user_step: Some(step), alignment, each_row: false, lookahead: false }
    }
}

/// A side of a step: a mean over its tokens, and the gradient of that mean.
#[derive(Debug)]
pub struct Side {
    /// The mean loss, in nats (under [`Objective::Hidden`] a mean square).
    pub loss: f64,
    /// The tokens it is a mean over.
    pub tokens: f64,
    /// Its gradient.
    pub gradient: Gradient,
}

/// What a method merges.
#[derive(Debug)]
pub struct Sides<'a> {
    /// The user's rows; `None` in a step on alignment rows alone.
    pub user: Option<Side>,
    /// The alignment rows.
    pub align: Option<&'a Side>,
    /// ⟨u_i, a⟩ of each of the user's rows, where asked for.
    pub row_dots: &'a [f64],
    /// The trainable weights before the step, `[parameters]`.
    pub weights: &'a Tensor,
}

/// What is to become of the steps since the last review.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// They stand.
    Keep,
    /// The adapter and the optimiser go back to where they were.
    RollBack,
}

/// What a method remembers: goes into checkpoints.
#[derive(Debug, Default)]
pub struct Memory {
    /// Numbers by name.
    pub numbers: BTreeMap<String, f64>,
    /// Vectors by name, each `[parameters]` float32.
    pub vectors: BTreeMap<String, Tensor>,
}

/// A way to fine-tune.
pub trait Method: std::fmt::Debug {
    /// What step `step`, counted from 0, computes.
    fn asks(&self, step: u64) -> Asks;

    /// The gradient to apply, and the facts to report.
    fn merge(&mut self, sides: Sides<'_>) -> Merged;

    /// Changes the update the optimiser made of it, `[parameters]`. With it comes the share of its length that was taken away.
    fn correct(&self, change: Tensor, _align: Option<&Gradient>) -> (Tensor, f64) {
        (change, 0.0)
    }

    /// Steps between reviews on probe rows; `None` where there are none.
    fn review_steps(&self) -> Option<u64> {
        None
    }

    /// Whether an adapter with this alignment loss on probe rows may be kept.
    fn keeps(&self, _probe_loss: f64) -> bool {
        true
    }

    /// Judges the alignment loss on probe rows.
    fn review(&mut self, _probe_loss: f64) -> Verdict {
        Verdict::Keep
    }

    /// What the learning rate is multiplied by.
    fn learning_rate_scale(&self) -> f64 {
        1.0
    }

    /// What it remembers.
    fn memory(&self) -> Memory {
        Memory::default()
    }

    /// Goes on with what it remembered.
    fn recall(&mut self, _memory: Memory) {}
}

/// The method a job trains under.
#[must_use]
pub fn of(safety: &Safety, precision: Precision) -> Box<dyn Method> {
    let (rho, objective) = (safety.rho, Objective::kl(safety.kl_positions));
    match safety.defense {
        Defense::None => Box::new(Plain),
        Defense::SafeMix => Box::new(SafeMix { rho }),
        Defense::Lisa => Box::new(Lisa::new(rho)),
        Defense::KlPenalty => Box::new(KlPenalty { rho, objective }),
        Defense::Sbr => Box::new(Sbr { rho }),
        Defense::Pcgrad => Box::new(Pcgrad { rho, objective, precision }),
        Defense::Safegrad => Box::new(Safegrad::new(safety, precision)),
        Defense::Held => Box::new(Held::new(rho, safety.budget, precision)),
    }
}

#[cfg(test)]
mod by_hand {
    //! Vectors for the methods' tests.

    use tch::Tensor;

    use super::{Side, Sides};
    use crate::gradient::Gradient;
    use crate::surgery::Merged;

    pub(super) fn side(loss: f64, tokens: f64, gradient: &[f32]) -> Side {
        Side { loss, tokens, gradient: Gradient(Tensor::from_slice(gradient)) }
    }

    pub(super) fn sides<'a>(user: &[f32], align: &'a Side, weights: &'a Tensor) -> Sides<'a> {
        Sides { user: Some(side(1.0, 1.0, user)), align: Some(align), row_dots: &[], weights }
    }

    pub(super) fn numbers(merged: &Merged) -> Vec<f32> {
        Vec::try_from(&merged.gradient.0).expect("a vector")
    }
}
