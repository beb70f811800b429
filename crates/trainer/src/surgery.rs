//! The surgery of `SafeGrad` (Yi et al., arXiv 2508.07172): removes from the user's gradient what works against the
//! alignment.

use holdfast_domain::Safety;
use holdfast_domain::hyperparameters::Precision;
use holdfast_domain::safety::Defense;

use crate::gradient::Gradient;

/// The share of the user's norm below which an alignment gradient is no direction but noise.
///
/// At the first step LoRA's `B` is zero, so the KL is exactly zero and what is left of `a` is rounding, which must not decide
/// what is projected away. On a 135M model that rounding measured 3e-4 of ‖u‖ in bfloat16.
#[must_use]
pub const fn relative_floor(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 1e-6,
        Precision::Bf16 => 5e-4,
    }
}

/// What is applied, and how the two gradients stood to each other.
#[derive(Debug)]
pub struct Merged {
    /// `g`.
    pub gradient: Gradient,
    /// The facts to report; `None` under plain fine-tuning.
    pub facts: Option<Facts>,
}

/// How a step's two gradients stood to each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Facts {
    /// ⟨u, a⟩.
    pub dot: f64,
    /// ‖u‖.
    pub norm_user: f64,
    /// ‖a‖.
    pub norm_align: f64,
    /// ⟨u, a⟩ / (‖u‖ ‖a‖); 0 where either is zero.
    pub cosine: f64,
    /// `c` in `g = u + c·a`.
    pub coefficient: f64,
    /// Whether a part of `u` was projected away.
    pub conflict: bool,
}

impl Facts {
    /// The share of `u` that was projected away: `|⟨u, a⟩| / (‖u‖ ‖a‖)` where they conflict, else 0.
    #[must_use]
    pub fn removed_fraction(&self) -> f64 {
        if self.conflict { self.cosine.abs() } else { 0.0 }
    }
}

/// Joins the user's gradient `u` and the alignment gradient `a`:
///
/// ```text
/// none         g = u
/// kl_penalty   g = u + ρ a
/// safegrad     u' = u − (⟨u,a⟩ / ‖a‖²) a   if ⟨u,a⟩ < 0, else u      (eq. 5)
///              g  = u' + ρ a                                          (eq. 6)
/// ```
///
/// Both are `g = u + c·a` with `c = ρ + max(0, −⟨u,a⟩) / ‖a‖²` under `safegrad` and `c = ρ` under `kl_penalty`, so one
/// stored gradient and two scalars are enough. `c` has no upper bound, because the part removed is never longer than `u`.
#[must_use]
pub fn merge(user: Gradient, align: Option<&Gradient>, safety: &Safety, precision: Precision) -> Merged {
    let Some(align) = align.filter(|_| safety.defense != Defense::None) else {
        return Merged { gradient: user, facts: None };
    };
    let (dot, norm_user, norm_align) = (user.dot(align), user.norm(), align.norm());
    let is_direction = norm_align > relative_floor(precision) * norm_user;
    let conflict = safety.defense == Defense::Safegrad && is_direction && dot < 0.0;
    let projection = if conflict { -dot / (norm_align * norm_align) } else { 0.0 };
    let coefficient = safety.rho + projection;
    let cosine = if norm_user > 0.0 && norm_align > 0.0 { dot / (norm_user * norm_align) } else { 0.0 };
    let gradient = Gradient(&user.0 + &align.0 * coefficient);
    Merged { gradient, facts: Some(Facts { dot, norm_user, norm_align, cosine, coefficient, conflict }) }
}

#[cfg(test)]
mod tests {
    use holdfast_domain::safety::KlPositions;
    use proptest::prelude::*;
    use tch::Tensor;

    use super::*;

    fn safety(defense: Defense, rho: f64) -> Safety {
        Safety { defense, rho, kl_positions: KlPositions::Response, alignment_set: None }
    }

    fn gradient(values: &[f32]) -> Gradient {
        Gradient(Tensor::from_slice(values))
    }

    fn numbers(gradient: &Gradient) -> Vec<f64> {
        Vec::<f32>::try_from(&gradient.0).expect("a vector").into_iter().map(f64::from).collect()
    }

    /// The method as the paper writes it, on plain numbers.
    fn long_hand(u: &[f32], a: &[f32], rho: f64) -> Vec<f64> {
        let (u, a): (Vec<f64>, Vec<f64>) = (u.iter().map(|x| f64::from(*x)).collect(), a.iter().map(|x| f64::from(*x)).collect());
        let dot: f64 = u.iter().zip(&a).map(|(x, y)| x * y).sum();
        let square: f64 = a.iter().map(|y| y * y).sum();
        let removed = if dot < 0.0 && square > 0.0 { dot / square } else { 0.0 };
        u.iter().zip(&a).map(|(x, y)| x - removed * y + rho * y).collect()
    }

    fn vectors() -> impl Strategy<Value = (Vec<f32>, Vec<f32>)> {
        (1_usize..40).prop_flat_map(|n| {
            let vector = || proptest::collection::vec(-10.0_f32..10.0, n);
            (vector(), vector())
        })
    }

    proptest! {
        #[test]
        fn the_result_equals_the_long_hand_formula((u, a) in vectors(), rho in 0.0_f64..4.0) {
            let merged = merge(gradient(&u), Some(&gradient(&a)), &safety(Defense::Safegrad, rho), Precision::F32);
            for (got, expected) in numbers(&merged.gradient).iter().zip(long_hand(&u, &a, rho)) {
                prop_assert!((got - expected).abs() < 1e-3 * (1.0 + expected.abs()), "{got} {expected}");
            }
        }

        #[test]
        fn the_result_never_works_against_the_alignment((u, a) in vectors(), rho in 0.0_f64..4.0) {
            let align = gradient(&a);
            let merged = merge(gradient(&u), Some(&align), &safety(Defense::Safegrad, rho), Precision::F32);
            let scale = merged.gradient.norm() * align.norm();
            prop_assert!(merged.gradient.dot(&align) >= -1e-5 * scale);
        }

        #[test]
        fn without_conflict_the_user_gradient_keeps_all_of_itself((u, a) in vectors()) {
            let align = gradient(&a);
            let merged = merge(gradient(&u), Some(&align), &safety(Defense::Safegrad, 0.0), Precision::F32);
            let facts = merged.facts.expect("facts");
            if facts.dot >= 0.0 {
                prop_assert!(!facts.conflict);
                prop_assert_eq!(numbers(&merged.gradient), numbers(&gradient(&u)));
            }
        }

        #[test]
        fn the_part_removed_is_never_longer_than_the_user_gradient((u, a) in vectors()) {
            let merged = merge(gradient(&u), Some(&gradient(&a)), &safety(Defense::Safegrad, 0.0), Precision::F32);
            prop_assert!(merged.gradient.norm() <= gradient(&u).norm() * (1.0 + 1e-5) + 1e-6);
        }

        #[test]
        fn a_penalty_never_projects((u, a) in vectors(), rho in 0.0_f64..4.0) {
            let merged = merge(gradient(&u), Some(&gradient(&a)), &safety(Defense::KlPenalty, rho), Precision::F32);
            prop_assert_eq!(merged.facts.map(|f| f.coefficient), Some(rho));
        }
    }

    #[test]
    fn a_zero_alignment_gradient_changes_nothing() {
        let merged = merge(gradient(&[1.0, -2.0]), Some(&gradient(&[0.0, 0.0])), &safety(Defense::Safegrad, 1.0), Precision::F32);
        assert_eq!(numbers(&merged.gradient), [1.0, -2.0]);
        assert_eq!(merged.facts.map(|f| (f.conflict, f.coefficient, f.cosine)), Some((false, 1.0, 0.0)));
    }

    #[test]
    fn rounding_noise_sets_no_direction() {
        let merged =
            merge(gradient(&[1.0, 1.0]), Some(&gradient(&[-1e-7, 0.0])), &safety(Defense::Safegrad, 1.0), Precision::F32);
        assert_eq!(merged.facts.map(|f| (f.conflict, f.coefficient)), Some((false, 1.0)));
    }

    #[test]
    fn plain_fine_tuning_ignores_the_alignment() {
        let merged = merge(gradient(&[1.0]), Some(&gradient(&[-1.0])), &safety(Defense::None, 1.0), Precision::F32);
        assert_eq!((numbers(&merged.gradient), merged.facts), (vec![1.0], None));
    }
}
