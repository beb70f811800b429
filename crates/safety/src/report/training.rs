//! What the training did, summed up from its steps.

use holdfast_domain::progress::Step;
use serde::{Deserialize, Serialize};

/// Points of a curve at most.
const MOST_POINTS: usize = 500;

/// What the training did.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = TrainingSummary))]
pub struct Training {
    /// Steps taken.
    pub steps: u64,
    /// Of which so many projected something away.
    pub projected_steps: u64,
    /// The mean of what was projected away, as a share of ‖u‖, over the steps that projected.
    pub mean_removed: Option<f64>,
    /// The mean of ⟨u, a⟩ / (‖u‖ ‖a‖) over all steps.
    pub mean_cosine: Option<f64>,
    /// The mean alignment loss over the last tenth of the steps, as in the curve.
    pub final_kl: Option<f64>,
    /// How often a method with a budget looked whether it was within it; absent under methods without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reviews: Option<Reviews>,
    /// Figures over the run.
    pub curve: Vec<Point>,
    /// Measurements on the validation file; the one of step 0 is what the run began with.
    pub validation: Vec<Validation>,
}

/// Looks of `held` at the alignment loss on rows that no gradient was taken on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = BudgetReviews))]
pub struct Reviews {
    /// Those that took place.
    pub made: u64,
    /// Of which so many found more than is kept, and took the steps since the one before back.
    pub taken_back: u64,
    /// The largest loss of what was kept, in nats; absent where nothing was.
    pub largest_kept: Option<f64>,
}

/// Some steps of a run, one after the other: the mean of each figure over them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = TrainingPoint))]
pub struct Point {
    /// The last of them.
    pub step: u64,
    /// In nats.
    pub task_loss: Option<f64>,
    /// Mean KL(base ‖ adapted) on alignment rows, in nats; under a method with another alignment loss, that loss.
    pub align_kl: Option<f64>,
    /// ⟨u, a⟩ / (‖u‖ ‖a‖).
    pub cosine: Option<f64>,
    /// The share of them in which the gradients conflicted.
    pub conflict_rate: Option<f64>,
    /// What was projected away, as a share of ‖u‖; 0 in steps that did not project.
    pub removed: Option<f64>,
}

/// A measurement on the validation file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = ValidationPoint))]
pub struct Validation {
    /// Steps taken before it.
    pub step: u64,
    /// In nats.
    pub loss: f64,
    /// The share of supervised tokens that the model ranks first.
    pub token_accuracy: f64,
}

impl Reviews {
    fn of(steps: &[Step]) -> Option<Self> {
        let reviews: Vec<_> = steps.iter().flat_map(|step| &step.reviews).collect();
        let kept = reviews.iter().filter(|review| !review.taken_back).filter_map(|review| review.probe_loss);
        let taken_back = reviews.iter().filter(|review| review.taken_back).count() as u64;
        let made = reviews.len() as u64;
        (made > 0).then(|| Self { made, taken_back, largest_kept: kept.max_by(f64::total_cmp) })
    }
}

impl Training {
    /// Sums up the steps of a run, in order, and what was measured on the validation file.
    #[must_use]
    pub fn of(steps: &[Step], validations: &[(u64, f64, f64)]) -> Self {
        let facts: Vec<_> = steps.iter().filter_map(|step| step.alignment.as_ref()).collect();
        let removed: Vec<f64> = facts.iter().map(|f| f.removed_fraction).filter(|removed| *removed > 0.0).collect();
        let last_tenth = facts.get(facts.len() - facts.len().div_ceil(10).min(facts.len())..).unwrap_or_default();
        let per_point = steps.len().div_ceil(MOST_POINTS).max(1);
        Self {
            steps: steps.last().map_or(0, |step| step.step),
            projected_steps: removed.len() as u64,
            mean_removed: mean(removed),
            mean_cosine: mean(facts.iter().map(|f| f.cosine)),
            final_kl: mean(last_tenth.iter().map(|f| f.align_kl)),
            reviews: Reviews::of(steps),
            curve: steps.chunks(per_point).map(point).collect(),
            validation: validations
                .iter()
                .filter(|(_, loss, accuracy)| loss.is_finite() && accuracy.is_finite())
                .map(|&(step, loss, token_accuracy)| Validation { step, loss, token_accuracy })
                .collect(),
        }
    }
}

fn point(steps: &[Step]) -> Point {
    let of = |figure: fn(&holdfast_domain::progress::AlignmentFacts) -> f64| {
        mean(steps.iter().filter_map(|step| step.alignment.as_ref()).map(figure))
    };
    Point {
        step: steps.last().map_or(0, |step| step.step),
        task_loss: mean(steps.iter().map(|step| step.task_loss)),
        align_kl: of(|f| f.align_kl),
        cosine: of(|f| f.cosine),
        conflict_rate: of(|f| f64::from(u8::from(f.conflict))),
        removed: of(|f| f.removed_fraction),
    }
}

/// The mean of the numbers that are some; `None` of none.
fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (sum, count) =
        values.into_iter().filter(|value| value.is_finite()).fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
mod tests {
    use holdfast_domain::progress::{AlignmentFacts, Review};

    use super::*;

    fn step(number: u64, conflict: bool) -> Step {
        let removed_fraction = if conflict { 0.5 } else { 0.0 };
        Step {
            step: number,
            total_steps: 1000,
            task_loss: 1.0 / number as f64,
            token_accuracy: 0.5,
            alignment: Some(AlignmentFacts {
                align_kl: 0.01 * number as f64,
                dot: 0.0,
                cosine: if conflict { -0.5 } else { 0.5 },
                norm_align: 1.0,
                coefficient: 1.0,
                conflict,
                conflict_rate: 0.5,
                removed_fraction,
                alignment_change: 0.0,
            }),
            norm_user: 1.0,
            gradient_norm: 1.0,
            learning_rate: 1e-4,
            tokens: 1,
            tokens_per_second: 1.0,
            eta_seconds: 0.0,
            reviews: Vec::new(),
        }
    }

    #[test]
    fn a_long_run_is_summed_up_in_as_many_points_as_a_plot_has_room_for() {
        let steps: Vec<Step> = (1..=1000).map(|number| step(number, number % 4 == 0)).collect();
        let training = Training::of(&steps, &[(0, 2.0, 0.1), (1000, f64::NAN, 0.5)]);
        assert_eq!((training.steps, training.projected_steps, training.curve.len()), (1000, 250, 500));
        assert_eq!(training.mean_removed, Some(0.5));
        assert!(training.final_kl.is_some_and(|kl| (9.0..10.0).contains(&kl)), "{:?}", training.final_kl);
        assert_eq!(training.curve.last().map(|point| (point.step, point.conflict_rate)), Some((1000, Some(0.5))));
        assert_eq!(training.validation.len(), 1, "what is no number cannot be plotted");
    }

    #[test]
    fn what_was_taken_back_is_not_among_what_was_kept() {
        let reviewed = |number, probe_loss, taken_back| Step {
            reviews: vec![Review { step: number, probe_loss: Some(probe_loss), taken_back }],
            ..step(number, false)
        };
        let steps = [step(1, false), reviewed(2, 0.02, false), reviewed(3, 0.3, true), reviewed(4, 0.01, false)];
        assert_eq!(Training::of(&steps, &[]).reviews, Some(Reviews { made: 3, taken_back: 1, largest_kept: Some(0.02) }));
        assert_eq!(Training::of(&steps[..1], &[]).reviews, None);
    }

    #[test]
    fn a_run_without_steps_or_without_alignment_has_a_report_all_the_same() {
        assert_eq!(Training::of(&[], &[]), Training::default());
        let plain = Step { alignment: None, ..step(1, false) };
        let training = Training::of(&[plain], &[]);
        assert_eq!((training.steps, training.final_kl, training.projected_steps), (1, None, 0));
    }
}
