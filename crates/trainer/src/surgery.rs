//! The surgery: how two gradients stand to each other, and their weighted sums.

use holdfast_domain::hyperparameters::Precision;
use tch::Tensor;

use crate::gradient::Gradient;
use crate::methods::Sides;

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
    /// The facts to report; `None` where a step has but one gradient.
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
    /// What `a` is multiplied by in `g`; under `held` this is λ, and a multiple of `ā` is added beside it.
    pub coefficient: f64,
    /// Whether `a` is large enough against `u` to be a direction and not noise.
    pub is_direction: bool,
    /// Whether they worked against each other, under a method that projects.
    pub conflict: bool,
    /// The length of what a projection took away of `u`, as a share of `‖u‖`; of rows that are projected one by one the sum of their
    /// parts, which may be more than all of a `u` whose rows cancel.
    pub removed: f64,
}

impl Facts {
    /// How `user` and `align` stand to each other.
    #[must_use]
    pub fn of(user: &Gradient, align: &Gradient, precision: Precision) -> Self {
        let (dot, norm_user, norm_align) = (user.dot(align), user.norm(), align.norm());
        let is_direction = norm_align > relative_floor(precision) * norm_user;
        let cosine = if norm_user > 0.0 && norm_align > 0.0 { dot / (norm_user * norm_align) } else { 0.0 };
        Self {
            dot,
            norm_user,
            norm_align,
            cosine,
            coefficient: 0.0,
            is_direction,
            conflict: is_direction && dot < 0.0,
            removed: 0.0,
        }
    }

    /// Takes away what works against `a`: `against = Σ max(0, −⟨u_i, a⟩)` over whatever is projected by itself. Returns the multiple of
    /// `a` that does it, `against / ‖a‖²`.
    pub fn take_away(&mut self, against: f64) -> f64 {
        self.removed = share_of(self.norm_user, against / self.norm_align);
        against / self.norm_align.powi(2)
    }
}

/// `part / whole`, and nothing of nothing.
pub(crate) fn share_of(whole: f64, part: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// `g = w_u u + w_a a`, with the two weights chosen by how the gradients stand to each other; whoever chooses them says what is removed.
#[must_use]
pub fn combine(sides: Sides<'_>, precision: Precision, weights: impl FnOnce(&mut Facts) -> [f64; 2]) -> Merged {
    let (Some(user), Some(align)) = (&sides.user, sides.align) else { return taken_alone(sides) };
    let mut facts = Facts::of(&user.gradient, &align.gradient, precision);
    let [of_user, of_align] = weights(&mut facts);
    facts.coefficient = of_align;
    // A weight of one costs no pass over the vector.
    let gradient = if (of_user - 1.0).abs() < f64::EPSILON {
        &user.gradient.0 + &align.gradient.0 * of_align
    } else {
        &user.gradient.0 * of_user + &align.gradient.0 * of_align
    };
    Merged { gradient: Gradient(gradient), facts: Some(facts) }
}

/// `g = w_u u + w_a a` without any projection.
#[must_use]
pub fn weigh(sides: Sides<'_>, weights: [f64; 2]) -> Merged {
    let mut merged = combine(sides, Precision::F32, |_| weights);
    if let Some(facts) = &mut merged.facts {
        facts.conflict = false;
    }
    merged
}

/// `g = u + w a` without any projection.
#[must_use]
pub fn add(sides: Sides<'_>, weight: f64) -> Merged {
    weigh(sides, [1.0, weight])
}

/// The one gradient a step has.
#[must_use]
pub fn taken_alone(sides: Sides<'_>) -> Merged {
    let gradient = match (sides.user, sides.align) {
        (Some(user), _) => user.gradient,
        (None, Some(align)) => Gradient(align.gradient.0.copy()),
        (None, None) => Gradient(sides.weights.zeros_like()),
    };
    Merged { gradient, facts: None }
}

/// `Δ − (⟨Δ,a⟩ / ‖a‖²) a` if `⟨Δ,a⟩ > 0`, else `Δ`: an update that raises the alignment loss to first order loses that part. With it comes
/// the share of `‖Δ‖` that was lost.
pub fn without_increase(change: Tensor, align: &Gradient) -> (Tensor, f64) {
    let change = Gradient(change);
    let (dot, square) = (change.dot(align), align.dot(align));
    if dot <= 0.0 || square <= 0.0 {
        return (change.0, 0.0);
    }
    let removed = share_of(change.norm(), dot / square.sqrt());
    (change.0 - &align.0 * (dot / square), removed)
}

#[cfg(test)]
mod tests {
    use holdfast_domain::Safety;
    use holdfast_domain::safety::Defense;
    use proptest::prelude::*;
    use tch::Tensor;

    use super::*;
    use crate::methods::{self, Side};

    fn gradient(values: &[f32]) -> Gradient {
        Gradient(Tensor::from_slice(values))
    }

    fn merge(u: &[f32], a: &[f32], defense: Defense, rho: f64) -> Merged {
        let side = |values: &[f32]| Side { loss: 1.0, tokens: 1.0, gradient: gradient(values) };
        let (user, align, weights) = (Some(side(u)), side(a), gradient(u));
        let sides = Sides { user, align: Some(&align), row_dots: &[], weights: &weights.0 };
        methods::of(&Safety::new(defense, rho), Precision::F32).merge(sides)
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
            let merged = merge(&u, &a, Defense::Safegrad, rho);
            for (got, expected) in numbers(&merged.gradient).iter().zip(long_hand(&u, &a, rho)) {
                prop_assert!((got - expected).abs() < 1e-3 * (1.0 + expected.abs()), "{got} {expected}");
            }
        }

        #[test]
        fn the_result_never_works_against_the_alignment((u, a) in vectors(), rho in 0.0_f64..4.0) {
            let merged = merge(&u, &a, Defense::Safegrad, rho);
            let align = gradient(&a);
            // Of parallel vectors all that is left may be what rounding leaves of them.
            let scale = (merged.gradient.norm() + gradient(&u).norm()) * align.norm();
            prop_assert!(merged.gradient.dot(&align) >= -1e-6 * scale - 1e-6);
        }

        #[test]
        fn without_conflict_the_user_gradient_keeps_all_of_itself((u, a) in vectors()) {
            let merged = merge(&u, &a, Defense::Safegrad, 0.0);
            let facts = merged.facts.expect("facts");
            if facts.dot >= 0.0 {
                prop_assert!(!facts.conflict);
                prop_assert_eq!(numbers(&merged.gradient), numbers(&gradient(&u)));
            }
        }

        #[test]
        fn the_part_removed_is_never_longer_than_the_user_gradient((u, a) in vectors()) {
            let merged = merge(&u, &a, Defense::Safegrad, 0.0);
            prop_assert!(merged.gradient.norm() <= gradient(&u).norm() * (1.0 + 1e-5) + 1e-6);
            prop_assert!(merged.facts.is_none_or(|facts| (0.0..=1.0 + 1e-5).contains(&facts.removed)));
        }

        #[test]
        fn a_penalty_never_projects((u, a) in vectors(), rho in 0.0_f64..4.0) {
            prop_assert_eq!(merge(&u, &a, Defense::KlPenalty, rho).facts.map(|f| f.coefficient), Some(rho));
        }

        #[test]
        fn a_corrected_update_never_raises_the_alignment_loss((change, a) in vectors()) {
            let align = gradient(&a);
            let (corrected, removed) = without_increase(Tensor::from_slice(&change), &align);
            let corrected = Gradient(corrected);
            // Of parallel vectors all that is left is what rounding leaves of them.
            prop_assert!(corrected.dot(&align) <= 1e-6 * gradient(&change).norm() * align.norm() + 1e-6);
            let lost = gradient(&change).norm() * removed;
            prop_assert!((lost.powi(2) + corrected.norm().powi(2) - gradient(&change).norm().powi(2)).abs() < 1e-3 * (1.0 + lost.powi(2)));
        }
    }

    #[test]
    fn a_zero_alignment_gradient_changes_nothing() {
        let merged = merge(&[1.0, -2.0], &[0.0, 0.0], Defense::Safegrad, 1.0);
        assert_eq!(numbers(&merged.gradient), [1.0, -2.0]);
        assert_eq!(merged.facts.map(|f| (f.conflict, f.coefficient, f.cosine)), Some((false, 1.0, 0.0)));
    }

    #[test]
    fn rounding_noise_sets_no_direction() {
        let merged = merge(&[1.0, 1.0], &[-1e-7, 0.0], Defense::Safegrad, 1.0);
        assert_eq!(merged.facts.map(|f| (f.conflict, f.coefficient)), Some((false, 1.0)));
    }
}
