//! How far two methods are apart, over seeds and prompts.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use crate::share::wilson;

/// Redraws of an interval.
const DRAWS: usize = 10_000;

/// A difference of two means and its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// The mean of the first less that of the second.
    pub mean: f64,
    /// From and to.
    pub interval: [f64; 2],
}

/// The paired bootstrap (Efron 1979) of `first - second`, each `[seed][prompt]` of values between 0 and 1: seeds and prompts are drawn
/// anew with replacement, the same for both, since the two were run with the same. Where hardly a prompt differs, redraws hardly do
/// either, and none at all would be certain; so the interval is never narrower than [`scored`]'s. `None` unless both have the same
/// shape and something in it. The same `seed` gives the same interval.
#[must_use]
pub fn paired(first: &[Vec<f64>], second: &[Vec<f64>], seed: u64) -> Option<Difference> {
    let prompts = first.first()?.len();
    let same = first.len() == second.len() && first.iter().chain(second).all(|row| row.len() == prompts);
    if !same || prompts == 0 {
        return None;
    }
    let differences: Vec<Vec<f64>> =
        first.iter().zip(second).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a - b).collect()).collect();
    let count = (differences.len() * prompts) as f64;
    let mean = differences.iter().flatten().sum::<f64>() / count;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut draws: Vec<f64> = (0..DRAWS)
        .map(|_| {
            let drawn: Vec<usize> = (0..prompts).map(|_| random.random_range(0..prompts)).collect();
            let sum: f64 = (0..differences.len())
                .map(|_| {
                    let row = &differences[random.random_range(0..differences.len())];
                    drawn.iter().map(|&prompt| row[prompt]).sum::<f64>()
                })
                .sum();
            sum / count
        })
        .collect();
    draws.sort_by(f64::total_cmp);
    // A fortieth is left out at each end.
    let left_out = DRAWS / 40;
    let over_seeds = |of: &[Vec<f64>]| -> Vec<f64> {
        (0..prompts).map(|prompt| of.iter().map(|row| row[prompt]).sum::<f64>() / of.len() as f64).collect()
    };
    let [low, high] = scored(&over_seeds(first), &over_seeds(second));
    Some(Difference { mean, interval: [draws[left_out].min(low), draws[DRAWS - 1 - left_out].max(high)] })
}

/// The 95 % interval of the difference of two paired shares by their scores (Newcombe 1998, method 8): those of the shares, put together
/// by how the two go along.
fn scored(first: &[f64], second: &[f64]) -> [f64; 2] {
    let n = first.len() as f64;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / n;
    let [p, q] = [first, second].map(mean);
    let covariance: f64 = first.iter().zip(second).map(|(a, b)| (a - p) * (b - q)).sum();
    let spread = |values: &[f64], mean: f64| values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    let both = (spread(first, p) * spread(second, q)).sqrt();
    let correlation = if both > 0.0 { covariance / both } else { 0.0 };
    let ([p_low, p_high], [q_low, q_high]) = (wilson(p, n), wilson(q, n));
    let apart = |a: f64, b: f64| (a * a + b * b - 2.0 * correlation * a * b).max(0.0).sqrt();
    [p - q - apart(p - p_low, q_high - q), p - q + apart(p_high - p, q - q_low)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_always_differs_by_one_differs_by_one() {
        let difference = paired(&[vec![1.0; 10], vec![1.0; 10]], &[vec![0.0; 10], vec![0.0; 10]], 1).expect("a difference");
        assert!(difference.mean == 1.0 && difference.interval[1] == 1.0, "{difference:?}");
    }

    #[test]
    fn what_never_differed_may_still_differ_now_and_then() {
        let never = [vec![0.0; 100]];
        let [low, high] = paired(&never, &never, 1).expect("a difference").interval;
        // None of a hundred is up to 3.7 %.
        assert!((low + 0.037).abs() < 1e-3 && (high - 0.037).abs() < 1e-3, "{low} {high}");
    }

    /// Newcombe, Statistics in Medicine 17 (1998), 2635-2650, table II, method 8: 36 pairs alike, 12 and 2 unlike, none neither.
    #[test]
    fn the_scores_interval_is_the_published_one() {
        let pairs = [(36, 1.0, 1.0), (12, 1.0, 0.0), (2, 0.0, 1.0)];
        let of = |pick: fn(f64, f64) -> f64| -> Vec<f64> {
            pairs.iter().flat_map(|&(count, a, b)| std::iter::repeat_n(pick(a, b), count)).collect()
        };
        let [low, high] = scored(&of(|a, _| a), &of(|_, b| b));
        assert!((low - 0.0569).abs() < 1e-3 && (high - 0.3404).abs() < 1e-3, "{low} {high}");
    }

    #[test]
    fn prompts_that_both_get_wrong_do_not_widen_the_interval() {
        let half: Vec<f64> = (0..100).map(|i| f64::from(i % 2)).collect();
        let same = paired(std::slice::from_ref(&half), std::slice::from_ref(&half), 1).expect("a difference");
        assert!(same.interval.iter().all(|end| end.abs() < 0.01), "{same:?}");
        let unlike: Vec<f64> = half.iter().map(|value| 1.0 - value).collect();
        let [low, high] = paired(&[half], &[unlike], 1).expect("a difference").interval;
        assert!(low < -0.1 && high > 0.1, "{low} {high}");
    }

    #[test]
    fn what_cannot_be_paired_has_no_difference() {
        assert_eq!(paired(&[vec![1.0]], &[vec![1.0, 0.0]], 1), None);
        assert_eq!(paired(&[], &[], 1), None);
    }
}
