//! The KL to the base as a penalty.

use super::{Asks, Method, Objective, Sides};
use crate::surgery::{self, Merged};

/// `L = L_user + ρ · KL(base ‖ adapted)`, so `g = u + ρ a`: `SafeGrad` without its projection.
#[derive(Debug)]
pub struct KlPenalty {
    /// The penalty's weight `ρ`.
    pub rho: f64,
    /// The KL.
    pub objective: Objective,
}

impl Method for KlPenalty {
    fn asks(&self, step: u64) -> Asks {
        Asks::both(step, Some(self.objective))
    }

    fn merge(&mut self, sides: Sides<'_>) -> Merged {
        surgery::add(sides, self.rho)
    }
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::super::by_hand::{numbers, side, sides};
    use super::*;

    #[test]
    fn the_alignment_gradient_is_added_and_nothing_is_projected() {
        let (align, weights) = (side(0.1, 4.0, &[-1.0, 2.0]), Tensor::from_slice(&[0.0_f32; 2]));
        let merged = KlPenalty { rho: 0.5, objective: Objective::Kl }.merge(sides(&[3.0, 1.0], &align, &weights));
        assert_eq!(numbers(&merged), [2.5, 2.0]);
        let facts = merged.facts.expect("facts");
        assert_eq!((facts.dot, facts.coefficient, facts.conflict), (-1.0, 0.5, false));
    }
}
