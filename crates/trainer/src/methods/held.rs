//! `SafeGrad` with feedback, a budget, and weight on the tokens that decide.

use holdfast_domain::hyperparameters::Precision;
use tch::Tensor;

use super::{Asks, Memory, Method, Objective, Sides, Verdict};
use crate::gradient::{self, Gradient};
use crate::surgery::{self, Merged};

/// Against what `SafeGrad` leaks: the noise of one batch's `a`, a fixed `ρ`, drift, and a mean in which the first refusal token
/// drowns.
///
/// ```text
/// L_align   Σ ω_t KL_t / Σ ω_t of each row, the mean over the worse half of the rows; ω = 5 on the last prompt position and
///           the first five response tokens and on the position that ends the response, else 1
/// ā, L̂      exponential means of a and L_align, of weight 0.1 on the newest
/// λ         λ ← clip(λ · (1 + 0.1 · clip((L̂ − ε)/ε, −0.2, 0.2)), ρ, 100 ρ)          beginning at ρ
/// g         u + λ a + max(0, −⟨u,ā⟩)/‖ā‖² · ā
/// review    every 10 steps, L_align on rows kept apart: above 2ε the last good adapter and optimiser come back, the learning
///           rate halves, λ doubles
/// ```
///
/// What a run goes on from is held to the same before its first step. λ never falls below `ρ`, so that a floor on `ρ` is a floor on it.
/// A checkpoint on schedule, a best adapter, and the run's end come after a review, so neither leaves the budget; one that is written
/// because the run is stopped holds the last good state beside its own.
#[derive(Debug)]
pub struct Held {
    rho: f64,
    budget: f64,
    precision: Precision,
    lambda: f64,
    learning_rate_scale: f64,
    mean_loss: Option<f64>,
    mean_align: Option<Tensor>,
}

const NEWEST: f64 = 0.1;
const GAIN: f64 = 0.1;
const MOST_CHANGE: f64 = 0.2;
const MOST_STRENGTH: f64 = 100.0;
const REVIEW_STEPS: u64 = 10;

impl Held {
    /// Beginning at strength `rho`, within `budget` nats.
    #[must_use]
    pub fn new(rho: f64, budget: f64, precision: Precision) -> Self {
        Self { rho, budget, precision, lambda: rho, learning_rate_scale: 1.0, mean_loss: None, mean_align: None }
    }

    fn clipped(&self, lambda: f64) -> f64 {
        lambda.clamp(self.rho, MOST_STRENGTH * self.rho)
    }
}

impl Method for Held {
    fn asks(&self, step: u64) -> Asks {
        Asks::both(step, Some(Objective::WeightedKl))
    }

    fn merge(&mut self, sides: Sides<'_>) -> Merged {
        let Some(align) = sides.align else { return surgery::taken_alone(sides) };
        let mean_loss = self.mean_loss.map_or(align.loss, |mean| mean + NEWEST * (align.loss - mean));
        let error = ((mean_loss - self.budget) / self.budget).clamp(-MOST_CHANGE, MOST_CHANGE);
        self.lambda = self.clipped(self.lambda * (1.0 + GAIN * error));
        self.mean_loss = Some(mean_loss);
        let mean_align = gradient::mean_with(self.mean_align.take(), &align.gradient, NEWEST);
        let mean = Gradient(mean_align.shallow_clone());
        self.mean_align = Some(mean_align);

        let lambda = self.lambda;
        let along_mean = sides.user.as_ref().map_or(0.0, |user| {
            let (dot, norm) = (user.gradient.dot(&mean), mean.norm());
            let is_direction = norm > surgery::relative_floor(self.precision) * user.gradient.norm();
            if is_direction { (-dot).max(0.0) / (norm * norm) } else { 0.0 }
        });
        let mut merged = surgery::combine(sides, self.precision, |facts| {
            facts.conflict = along_mean > 0.0;
            facts.removed = surgery::share_of(facts.norm_user, along_mean * mean.norm());
            [1.0, lambda]
        });
        if along_mean > 0.0 {
            merged.gradient = Gradient(merged.gradient.0 + mean.0 * along_mean);
        }
        merged
    }

    fn review_steps(&self) -> Option<u64> {
        Some(REVIEW_STEPS)
    }

    fn keeps(&self, probe_loss: f64) -> bool {
        // A loss that is no number is no good adapter either.
        probe_loss <= 2.0 * self.budget
    }

    fn review(&mut self, probe_loss: f64) -> Verdict {
        if self.keeps(probe_loss) {
            return Verdict::Keep;
        }
        self.learning_rate_scale *= 0.5;
        self.lambda = self.clipped(self.lambda * 2.0);
        Verdict::RollBack
    }

    fn learning_rate_scale(&self) -> f64 {
        self.learning_rate_scale
    }

    fn memory(&self) -> Memory {
        let mut memory = Memory::default();
        memory.numbers.insert("lambda".into(), self.lambda);
        memory.numbers.insert("learning_rate_scale".into(), self.learning_rate_scale);
        if let Some(mean_loss) = self.mean_loss {
            memory.numbers.insert("mean_loss".into(), mean_loss);
        }
        if let Some(mean_align) = &self.mean_align {
            memory.vectors.insert("mean_align".into(), mean_align.shallow_clone());
        }
        memory
    }

    fn recall(&mut self, mut memory: Memory) {
        let numbers = &memory.numbers;
        self.lambda = numbers.get("lambda").copied().unwrap_or(self.lambda);
        self.learning_rate_scale = numbers.get("learning_rate_scale").copied().unwrap_or(self.learning_rate_scale);
        self.mean_loss = numbers.get("mean_loss").copied();
        self.mean_align = memory.vectors.remove("mean_align");
    }
}

#[cfg(test)]
mod tests {
    use super::super::by_hand::{numbers, side, sides};
    use super::*;

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-9, "{got} is not {expected}");
    }

    #[test]
    fn strength_follows_the_budget_within_its_bounds() {
        let weights = Tensor::from_slice(&[0.0_f32; 2]);
        let mut held = Held::new(1.0, 0.1, Precision::F32);
        let mut step = |loss: f64| {
            let align = side(loss, 1.0, &[0.0, 1.0]);
            held.merge(sides(&[1.0, 0.0], &align, &weights));
            held.lambda
        };
        close(step(0.3), 1.02); // far above: 1 + 0.1·0.2
        close(step(0.3), 1.02 * 1.02);
        // L̂ = 0.3 + 0.1·(−1.9 − 0.3) = 0.08: (0.08 − 0.1)/0.1 = −0.2
        close(step(-1.9), 1.02 * 1.02 * 0.98);
        close(step(-9.0), 1.0); // never below ρ
    }

    #[test]
    fn the_projection_is_along_the_mean_of_the_alignment_gradients() {
        let weights = Tensor::from_slice(&[0.0_f32; 2]);
        let mut held = Held::new(1.0, 0.1, Precision::F32);
        let first = side(0.1, 1.0, &[0.0, 1.0]);
        held.merge(sides(&[1.0, 0.0], &first, &weights));
        // ā = 0.9·(0,1) + 0.1·(0,−9) = (0,0); nothing to project along, and g = u + λ a with λ = 1.
        let second = side(0.1, 1.0, &[0.0, -9.0]);
        assert_eq!(numbers(&held.merge(sides(&[1.0, 2.0], &second, &weights))), [1.0, -7.0]);
        // ā = 0.1·(0,10) = (0,1): ⟨u,ā⟩ = −2 is removed, g = (1,−2) + (0,10) + 2·(0,1).
        let third = side(0.1, 1.0, &[0.0, 10.0]);
        let merged = held.merge(sides(&[1.0, -2.0], &third, &weights));
        let got = numbers(&merged);
        assert!((got[0] - 1.0).abs() < 1e-5 && (got[1] - 10.0).abs() < 1e-4, "{got:?}");
        // (0,−2) of (1,−2).
        let removed = merged.facts.expect("facts").removed;
        assert!((removed - 2.0 / 5.0_f64.sqrt()).abs() < 1e-6, "{removed}");
    }

    #[test]
    fn a_review_above_twice_the_budget_rolls_back_slows_down_and_holds_harder() {
        let mut held = Held::new(1.0, 0.1, Precision::F32);
        assert_eq!(held.review(0.2), Verdict::Keep);
        assert_eq!(held.review(0.21), Verdict::RollBack);
        close(held.learning_rate_scale(), 0.5);
        close(held.lambda, 2.0);
        assert_eq!(held.review(f64::NAN), Verdict::RollBack);
    }

    #[test]
    fn it_goes_on_as_it_remembers() {
        let weights = Tensor::from_slice(&[0.0_f32; 2]);
        let (mut first, mut second) = (Held::new(1.0, 0.1, Precision::F32), Held::new(1.0, 0.1, Precision::F32));
        let align = side(0.3, 1.0, &[0.5, 1.0]);
        first.merge(sides(&[1.0, 0.0], &align, &weights));
        first.review(9.0);
        second.recall(first.memory());
        let next = |held: &mut Held| numbers(&held.merge(sides(&[1.0, -3.0], &align, &weights)));
        assert_eq!(next(&mut first), next(&mut second));
        close(first.learning_rate_scale(), second.learning_rate_scale());
    }
}
