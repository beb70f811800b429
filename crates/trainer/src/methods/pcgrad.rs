//! Both gradients projected (Yu et al., arXiv 2001.06782).

use holdfast_domain::hyperparameters::Precision;

use super::{Asks, Method, Objective, Sides};
use crate::surgery::{self, Merged};

/// Where they conflict, each loses the part that works against the other (algorithm 1, two tasks):
///
/// ```text
/// u' = u − (⟨u,a⟩ / ‖a‖²) a        a' = a − (⟨u,a⟩ / ‖u‖²) u        if ⟨u,a⟩ < 0
/// g  = u' + ρ a'
/// ```
///
/// which is `g = (1 + ρ κ_u) u + (ρ + κ_a) a` with `κ_u = max(0, −⟨u,a⟩) / ‖u‖²` and `κ_a = max(0, −⟨u,a⟩) / ‖a‖²`.
#[derive(Debug)]
pub struct Pcgrad {
    /// The weight `ρ` of the alignment gradient.
    pub rho: f64,
    /// The alignment loss.
    pub objective: Objective,
    /// Decides below which share of `u` an `a` is noise.
    pub precision: Precision,
}

impl Method for Pcgrad {
    fn asks(&self, step: u64) -> Asks {
        Asks::both(step, Some(self.objective))
    }

    fn merge(&mut self, sides: Sides<'_>) -> Merged {
        let rho = self.rho;
        surgery::combine(sides, self.precision, |facts| {
            if !facts.conflict {
                return [1.0, rho];
            }
            let of_user = -facts.dot / facts.norm_user.powi(2);
            [1.0 + rho * of_user, rho + facts.take_away(-facts.dot)]
        })
    }
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::super::by_hand::{numbers, side, sides};
    use super::*;

    fn merge(user: &[f32], align: &[f32]) -> Vec<f32> {
        let (align, weights) = (side(0.1, 4.0, align), Tensor::from_slice(&[0.0_f32; 2]));
        numbers(&Pcgrad { rho: 2.0, objective: Objective::Kl, precision: Precision::F32 }.merge(sides(user, &align, &weights)))
    }

    #[test]
    fn both_lose_what_works_against_the_other() {
        // ⟨u,a⟩ = −2, ‖u‖² = 4, ‖a‖² = 2: u' = (2,0) + (−1,1) = (1,1); a' = (−1,1) + ½·(2,0) = (0,1); g = u' + 2a' = (1,3).
        assert_eq!(merge(&[2.0, 0.0], &[-1.0, 1.0]), [1.0, 3.0]);
    }

    #[test]
    fn without_conflict_they_are_added() {
        assert_eq!(merge(&[2.0, 0.0], &[1.0, 1.0]), [4.0, 2.0]);
    }
}
