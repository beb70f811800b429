//! `SafeGrad` (Yi et al., arXiv 2508.07172) and its variants.

use holdfast_domain::Safety;
use holdfast_domain::hyperparameters::Precision;
use holdfast_domain::safety::{AlignmentPoint, ProjectionOf, ProjectionSpace};
use tch::Tensor;

use super::{Asks, Method, Objective, Sides};
use crate::gradient::Gradient;
use crate::surgery::{self, Merged};

/// The part of the user's gradient that works against the alignment is removed, then the alignment gradient is added:
///
/// ```text
/// batch     u' = u − (⟨u,a⟩ / ‖a‖²) a        if ⟨u,a⟩ < 0, else u        (eq. 5)
///           g  = u' + ρ a                                                (eq. 6)
/// per_row   u' = Σ_i u_i'                     each row's u_i by itself
/// update    g  = u + ρ a;  Δ' = Δ − (⟨Δ,a⟩ / ‖a‖²) a   if ⟨Δ,a⟩ > 0     of the optimiser's update Δ
/// lookahead a is taken at θ + Δ_u, where Δ_u is the update that u alone would make
/// ```
///
/// Both projections only ever add a multiple of `a`: `g = u + c·a` with `c = ρ + max(0, −⟨u,a⟩) / ‖a‖²`, and by rows
/// `c = ρ + Σ_i max(0, −⟨u_i,a⟩) / ‖a‖²`. `c` has no upper bound: a part that is removed is never longer than the gradient it is taken from.
#[derive(Debug)]
pub struct Safegrad {
    rho: f64,
    objective: Objective,
    per_row: bool,
    in_update: bool,
    lookahead: bool,
    precision: Precision,
    /// Whether the last step's `a` was a direction and not noise.
    is_direction: bool,
}

impl Safegrad {
    /// The variant a job asks for.
    #[must_use]
    pub fn new(safety: &Safety, precision: Precision) -> Self {
        Self {
            rho: safety.rho,
            objective: Objective::kl(safety.kl_positions),
            per_row: safety.projection == ProjectionOf::PerRow,
            in_update: safety.projection_space == ProjectionSpace::Update,
            lookahead: safety.alignment_point == AlignmentPoint::Lookahead,
            precision,
            is_direction: false,
        }
    }
}

impl Method for Safegrad {
    fn asks(&self, step: u64) -> Asks {
        Asks { each_row: self.per_row, lookahead: self.lookahead, ..Asks::both(step, Some(self.objective)) }
    }

    fn merge(&mut self, sides: Sides<'_>) -> Merged {
        let (rho, per_row, in_update, row_dots) = (self.rho, self.per_row, self.in_update, sides.row_dots);
        let merged = surgery::combine(sides, self.precision, |facts| {
            if in_update || !facts.is_direction {
                return [1.0, rho];
            }
            let dots = if per_row { row_dots } else { std::slice::from_ref(&facts.dot) };
            let against = dots.iter().map(|dot| (-dot).max(0.0)).sum();
            [1.0, rho + facts.take_away(against)]
        });
        self.is_direction = merged.facts.as_ref().is_some_and(|facts| facts.is_direction);
        merged
    }

    fn correct(&self, change: Tensor, align: Option<&Gradient>) -> (Tensor, f64) {
        match align {
            Some(align) if self.in_update && self.is_direction => surgery::without_increase(change, align),
            _ => (change, 0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use holdfast_domain::safety::Defense;

    use super::super::by_hand::{numbers, side, sides};
    use super::*;

    fn safegrad(change: impl FnOnce(&mut Safety)) -> Safegrad {
        let mut safety = Safety::new(Defense::Safegrad, 1.0);
        change(&mut safety);
        Safegrad::new(&safety, Precision::F32)
    }

    #[test]
    fn what_works_against_the_alignment_is_removed_and_rho_times_it_added() {
        let (align, weights) = (side(0.1, 4.0, &[-1.0, 1.0]), Tensor::from_slice(&[0.0_f32; 2]));
        // ⟨u,a⟩ = −2, ‖a‖² = 2: u' = (2,0) + (−1,1) = (1,1); g = u' + a = (0,2).
        let merged = safegrad(|_| {}).merge(sides(&[2.0, 0.0], &align, &weights));
        assert_eq!(numbers(&merged), [0.0, 2.0]);
        let facts = merged.facts.expect("facts");
        assert!((facts.coefficient - 2.0).abs() < 1e-12 && facts.conflict);
        // What is gone of u is (1,−1), √2 of its length 2.
        assert!((facts.removed - 0.5_f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn by_rows_a_harmless_row_keeps_all_of_its_gradient() {
        let (align, weights) = (side(0.1, 4.0, &[0.0, 2.0]), Tensor::from_slice(&[0.0_f32; 2]));
        // Rows (1,3) and (1,−3): the step's own ⟨u,a⟩ is 0, but the second row's is −6, of which −6/4 · (0,2) is removed:
        // u' = (1,3) + (1,0) = (2,3); g = u' + (0,2) = (2,5).
        let mut both = sides(&[2.0, 0.0], &align, &weights);
        both.row_dots = &[6.0, -6.0];
        let merged = safegrad(|s| s.projection = ProjectionOf::PerRow).merge(both);
        assert_eq!(numbers(&merged), [2.0, 5.0]);
        // The second row loses (0,−3), of a u whose length is 2.
        let facts = merged.facts.expect("facts");
        assert!(!facts.conflict && (facts.removed - 1.5).abs() < 1e-12, "rows are projected where the step does not conflict");
        let batch = safegrad(|_| {}).merge(sides(&[2.0, 0.0], &align, &weights));
        assert_eq!(numbers(&batch), [2.0, 2.0]);
    }

    #[test]
    fn in_update_space_the_step_and_not_the_gradient_loses_what_raises_the_alignment_loss() {
        let (align, weights) = (side(0.1, 4.0, &[-1.0, 1.0]), Tensor::from_slice(&[0.0_f32; 2]));
        let mut method = safegrad(|s| s.projection_space = ProjectionSpace::Update);
        let merged = method.merge(sides(&[2.0, 0.0], &align, &weights));
        assert_eq!(numbers(&merged), [1.0, 1.0]);
        assert!(merged.facts.is_some_and(|facts| facts.conflict && facts.removed == 0.0), "the gradient keeps all of itself");
        // ⟨Δ,a⟩ = 2 > 0: Δ' = (−1,1) − (−1,1) = (0,0). And ⟨Δ,a⟩ = −1 < 0 lowers the loss: it stays.
        let corrected = |change: &[f32]| {
            let (change, removed) = method.correct(Tensor::from_slice(change), Some(&align.gradient));
            (Vec::<f32>::try_from(&change).expect("a vector"), removed.round())
        };
        assert_eq!(corrected(&[-1.0, 1.0]), (vec![0.0, 0.0], 1.0));
        assert_eq!(corrected(&[0.0, -1.0]), (vec![0.0, -1.0], 0.0));
    }
}
