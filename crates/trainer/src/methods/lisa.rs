//! Lazy safety alignment (Huang et al., arXiv 2405.18641).

use holdfast_domain::steps::{ALIGNMENT_PHASE, USER_PHASE};
use tch::Tensor;

use super::{Asks, Memory, Method, Objective, Sides};
use crate::gradient::Gradient;
use crate::surgery::{Merged, taken_alone};

/// Training alternates between [`ALIGNMENT_PHASE`] steps on alignment rows and [`USER_PHASE`] on the user's, and either phase is
/// held to where the other ended (algorithm 1):
///
/// ```text
/// L = task loss of the phase's rows + ρ/2 ‖w − w_other‖²,      g = ∇ task loss + ρ (w − w_other)
/// ```
///
/// A run begins with an alignment phase; the user's rows are all seen, so alignment steps come on top of the user's.
#[derive(Debug)]
pub struct Lisa {
    rho: f64,
    /// Where the other phase ended; nothing holds before one has.
    other: Option<Tensor>,
    /// Whether the last step was on the user's rows.
    last_was_user: Option<bool>,
}

const CYCLE: u64 = ALIGNMENT_PHASE + USER_PHASE;

impl Lisa {
    /// Phases held together with `rho`.
    #[must_use]
    pub fn new(rho: f64) -> Self {
        Self { rho, other: None, last_was_user: None }
    }
}

impl Method for Lisa {
    fn asks(&self, step: u64) -> Asks {
        let (cycle, within) = (step / CYCLE, step % CYCLE);
        let (user_step, alignment) = if within < ALIGNMENT_PHASE {
            (None, Some((Objective::Task, cycle * ALIGNMENT_PHASE + within)))
        } else {
            (Some(cycle * USER_PHASE + within - ALIGNMENT_PHASE), None)
        };
        Asks { user_step, alignment, each_row: false, lookahead: false }
    }

    fn merge(&mut self, sides: Sides<'_>) -> Merged {
        let on_user = sides.user.is_some();
        if self.last_was_user.is_some_and(|last| last != on_user) {
            self.other = Some(sides.weights.copy());
        }
        self.last_was_user = Some(on_user);
        let pull = self.other.as_ref().map(|other| (sides.weights - other) * self.rho);
        let mut merged = taken_alone(sides);
        if let Some(pull) = pull {
            merged.gradient = Gradient(merged.gradient.0 + pull);
        }
        merged
    }

    fn memory(&self) -> Memory {
        let mut memory = Memory::default();
        if let Some(last) = self.last_was_user {
            memory.numbers.insert("last_was_user".into(), f64::from(u8::from(last)));
        }
        if let Some(other) = &self.other {
            memory.vectors.insert("other".into(), other.shallow_clone());
        }
        memory
    }

    fn recall(&mut self, mut memory: Memory) {
        self.last_was_user = memory.numbers.get("last_was_user").map(|last| *last > 0.5);
        self.other = memory.vectors.remove("other");
    }
}

#[cfg(test)]
mod tests {
    use super::super::by_hand::{numbers, side};
    use super::*;

    #[test]
    fn phases_alternate_and_every_step_of_the_user_is_taken() {
        let lisa = Lisa::new(1.0);
        assert_eq!(lisa.asks(99).alignment, Some((Objective::Task, 99)));
        assert_eq!(lisa.asks(100).user_step, Some(0));
        assert_eq!(lisa.asks(999).user_step, Some(899));
        assert_eq!(lisa.asks(1000).alignment, Some((Objective::Task, 100)));
        assert_eq!(lisa.asks(1100).user_step, Some(900));
    }

    #[test]
    fn a_phase_is_held_to_where_the_other_ended() {
        let mut lisa = Lisa::new(0.5);
        let mut step = |on_user: bool, gradient: &[f32], weights: &[f32]| {
            let (taken, weights) = (side(1.0, 1.0, gradient), Tensor::from_slice(weights));
            let (user, align) = if on_user { (Some(taken), None) } else { (None, Some(&taken)) };
            numbers(&lisa.merge(Sides { user, align, row_dots: &[], weights: &weights }))
        };
        assert_eq!(step(false, &[1.0, 0.0], &[0.0, 0.0]), [1.0, 0.0]); // nothing to be held to yet
        assert_eq!(step(true, &[0.0, 1.0], &[2.0, 0.0]), [0.0, 1.0]); // the alignment phase ended here: no distance
        assert_eq!(step(true, &[0.0, 1.0], &[2.0, 4.0]), [0.0, 3.0]); // 1 + ½·(4 − 0)
    }
}
