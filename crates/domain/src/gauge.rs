//! The poison gauge: how often the gradients of a run conflict, against how often they do on clean rows.
//!
//! On clean rows the task's gradient works against the alignment's about as often as not; rows that undo the alignment make it do
//! so in most steps. The share of a run's steps in which they conflict therefore tracks the share of such rows.

/// Steps before which a run's rate says little: chance alone may take a clean run's almost as high as a poisoned one's.
pub const LEAST_STEPS: u64 = 25;

/// Steps of a run on clean rows before which its rate says too little to hold longer runs against.
pub const LEAST_CLEAN_STEPS: u64 = 50;

/// The level of a base that was not measured. A reference run on a small model had 0.53 on clean rows and 0.85 with a tenth of
/// harmful ones.
pub const DEFAULT_LEVEL: f64 = 0.6;

/// Above what rate a run of so many steps is not like one on clean rows: the level, and what chance adds to a rate over so few steps,
/// three standard deviations of it.
#[must_use]
pub fn threshold(level: f64, steps: u64) -> f64 {
    let chance = 3.0 * (level * (1.0 - level) / steps.max(1) as f64).sqrt();
    (level + chance).min(HIGHEST_LEVEL)
}

/// The least that a level is above what clean runs had.
const LEAST_MARGIN: f64 = 0.05;
/// The highest level: one that nothing can pass warns of nothing.
const HIGHEST_LEVEL: f64 = 0.98;

/// The level of a base, from the rates of runs on clean rows: three standard deviations above their mean, and a twentieth at least.
/// `None` of none.
#[must_use]
pub fn level(clean_rates: &[f64]) -> Option<f64> {
    if clean_rates.is_empty() {
        return None;
    }
    let count = clean_rates.len() as f64;
    let mean = clean_rates.iter().sum::<f64>() / count;
    let variance = clean_rates.iter().map(|rate| (rate - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    Some((mean + (3.0 * variance.sqrt()).max(LEAST_MARGIN)).min(HIGHEST_LEVEL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_above_what_clean_runs_had_by_their_spread_and_a_twentieth_at_least() {
        assert_eq!(level(&[]), None);
        assert_eq!(level(&[0.5]), Some(0.55));
        assert!(level(&[0.5, 0.6]).is_some_and(|level| (level - 0.762).abs() < 1e-3));
        assert_eq!(level(&[0.97, 0.99]), Some(HIGHEST_LEVEL));
    }

    #[test]
    fn a_short_run_is_given_what_chance_does_to_it() {
        assert!((threshold(0.6, 50) - 0.808).abs() < 1e-3);
        assert!(threshold(DEFAULT_LEVEL, LEAST_STEPS) < 0.9);
        assert!((threshold(0.6, 10_000) - 0.615).abs() < 1e-3);
        // Of the reference's two runs one alarms.
        assert!(0.53 < threshold(DEFAULT_LEVEL, 150) && 0.85 > threshold(DEFAULT_LEVEL, 150));
    }
}
