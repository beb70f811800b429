//! The poison gauge: how often the gradients of a run conflict, against how often they do on clean rows.
//!
//! On clean rows the task's gradient works against the alignment's about as often as not; rows that undo the alignment make it do
//! so in most steps. The share of a run's steps in which they conflict therefore tracks the share of such rows. How often it is on clean
//! rows differs by base and by method, so each has a level of its own.

/// Steps before which a run's rate says nothing: chance alone may take a clean run's to 1.
pub const LEAST_STEPS: u64 = 16;

/// Steps of a run on clean rows before which its rate says too little to hold longer runs against.
pub const LEAST_CLEAN_STEPS: u64 = 50;

/// Runs on clean rows by which it can be told how far runs are apart.
const LEAST_RUNS: usize = 3;

/// How often gradients conflict on clean rows, under one method.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clean {
    /// The share of steps.
    pub mean: f64,
    /// How far runs are apart in it beyond what chance does: a standard deviation.
    pub spread: f64,
    /// The steps that it was measured on.
    pub steps: u64,
}

/// The least margin above the mean.
const LEAST_MARGIN: f64 = 0.05;
/// The highest threshold: one that nothing can pass warns of nothing.
const HIGHEST: f64 = 0.98;
/// Standard deviations from the mean to the threshold.
const REACH: f64 = 3.0;

impl Clean {
    /// Where nothing was measured. On small models runs on clean rows had 0.46 to 0.65, and with a tenth of harmful ones 0.57 to 0.88.
    pub const UNMEASURED: Self = Self { mean: 0.54, spread: 0.03, steps: 1000 };

    /// What runs on clean rows had, each by its rate and its steps; `None` of none. Fewer than [`LEAST_RUNS`] say too little of how far runs
    /// are apart, which is then taken to be no less than where nothing was measured.
    #[must_use]
    pub fn of(runs: &[(f64, u64)]) -> Option<Self> {
        let steps: u64 = runs.iter().map(|(_, steps)| steps).sum();
        if steps == 0 {
            return None;
        }
        let mean = runs.iter().map(|(rate, steps)| rate * *steps as f64).sum::<f64>() / steps as f64;
        let count = runs.len() as f64;
        let apart = runs.iter().map(|(rate, _)| (rate - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
        let chance = runs.iter().map(|(_, steps)| mean * (1.0 - mean) / (*steps).max(1) as f64).sum::<f64>() / count;
        let least = if runs.len() < LEAST_RUNS { Self::UNMEASURED.spread } else { 0.0 };
        let spread = (apart - chance).max(0.0).sqrt().max(least);
        Some(Self { mean, spread, steps })
    }

    /// Above what rate a run of so many steps is not like one on clean rows: three standard deviations above the mean, of how runs are
    /// apart, of what chance does to so few steps, and of what it did to those that were measured; a twentieth at least.
    #[must_use]
    pub fn threshold(&self, steps: u64) -> f64 {
        let chance = self.mean * (1.0 - self.mean);
        let variance = self.spread.powi(2) + chance / steps.max(1) as f64 + chance / self.steps.max(1) as f64;
        (self.mean + (REACH * variance.sqrt()).max(LEAST_MARGIN)).min(HIGHEST)
    }

    /// The threshold of a run without end.
    #[must_use]
    pub fn level(&self) -> f64 {
        self.threshold(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clean_runs_are_apart_by_chance_is_no_spread_of_theirs() {
        assert_eq!(Clean::of(&[]), None);
        assert!(Clean::of(&[(0.48, 100), (0.52, 100), (0.5, 100)]).is_some_and(|clean| clean.spread == 0.0));
        assert!(Clean::of(&[(0.4, 10_000), (0.6, 10_000)]).is_some_and(|clean| (clean.spread - 0.141).abs() < 1e-3));
    }

    #[test]
    fn one_run_says_nothing_of_how_far_runs_are_apart() {
        assert_eq!(Clean::of(&[(0.5, 100)]), Some(Clean { mean: 0.5, spread: Clean::UNMEASURED.spread, steps: 100 }));
    }

    #[test]
    fn a_short_run_is_given_what_chance_does_to_it_and_a_long_one_a_twentieth_at_least() {
        let clean = Clean { mean: 0.5, spread: 0.0, steps: 1_000_000 };
        assert!((clean.threshold(100) - 0.65).abs() < 1e-3);
        assert!((clean.level() - 0.55).abs() < 1e-9);
        assert!((Clean { mean: 0.97, ..clean }.threshold(30) - HIGHEST).abs() < 1e-9);
        assert!(Clean::UNMEASURED.threshold(LEAST_STEPS) < HIGHEST, "what conflicts in every step is told from chance");
    }

    #[test]
    fn of_a_reference_s_two_runs_one_alarms() {
        let threshold = Clean::UNMEASURED.threshold(150);
        assert!(0.53 < threshold && 0.85 > threshold, "{threshold}");
    }
}
