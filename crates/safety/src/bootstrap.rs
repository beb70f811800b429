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
    Some(redrawn(&differences, scored(&over_seeds(first), &over_seeds(second)), seed))
}

/// The mean of `[seed][prompt]` of values between 0 and 1, with seeds and prompts drawn anew as in [`paired`] and never narrower than
/// Wilson's interval over as many prompts. `None` unless every seed has as many of them, and some.
#[must_use]
pub fn mean(values: &[Vec<f64>], seed: u64) -> Option<Difference> {
    let prompts = values.first()?.len();
    if prompts == 0 || values.iter().any(|row| row.len() != prompts) {
        return None;
    }
    let mean = values.iter().flatten().sum::<f64>() / (values.len() * prompts) as f64;
    Some(redrawn(values, wilson(mean, prompts as f64), seed))
}

/// The mean over seeds and prompts, neither of which is none, and its interval by redraws, at least as wide as `narrowest`.
fn redrawn(values: &[Vec<f64>], narrowest: [f64; 2], seed: u64) -> Difference {
    let prompts = values[0].len();
    let count = (values.len() * prompts) as f64;
    let mean = values.iter().flatten().sum::<f64>() / count;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut draws: Vec<f64> = (0..DRAWS)
        .map(|_| {
            let drawn: Vec<usize> = (0..prompts).map(|_| random.random_range(0..prompts)).collect();
            let sum: f64 = (0..values.len())
                .map(|_| {
                    let row = &values[random.random_range(0..values.len())];
                    drawn.iter().map(|&prompt| row[prompt]).sum::<f64>()
                })
                .sum();
            sum / count
        })
        .collect();
    draws.sort_by(f64::total_cmp);
    // A fortieth is left out at each end.
    let left_out = DRAWS / 40;
    let [low, high] = narrowest;
    Difference { mean, interval: [draws[left_out].min(low), draws[DRAWS - 1 - left_out].max(high)] }
}

/// The mean of each prompt.
fn over_seeds(of: &[Vec<f64>]) -> Vec<f64> {
    let prompts = of.first().map_or(0, Vec::len);
    (0..prompts).map(|prompt| of.iter().map(|row| row[prompt]).sum::<f64>() / of.len() as f64).collect()
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
    fn a_mean_of_one_seed_has_about_the_interval_of_its_share() {
        let three = [(0..100).map(|i| f64::from(u8::from(i < 3))).collect::<Vec<_>>()];
        let found = mean(&three, 1).expect("a mean");
        assert!((found.mean - 0.03).abs() < 1e-12);
        assert!(found.interval[0] <= 0.0104 && (0.0845..0.09).contains(&found.interval[1]), "{found:?}");
    }

    #[test]
    fn seeds_that_differ_widen_the_interval_of_a_mean() {
        let (alike, apart) = ([vec![0.5; 400], vec![0.5; 400]], [vec![0.2; 400], vec![0.8; 400]]);
        let width = |values: &[Vec<f64>]| mean(values, 1).map(|found| found.interval[1] - found.interval[0]);
        assert!(width(&alike) < Some(0.11) && width(&apart) > Some(0.5), "{:?} {:?}", width(&alike), width(&apart));
        assert_eq!(mean(&[vec![1.0], vec![1.0, 0.0]], 1), None);
    }

    #[test]
    fn what_cannot_be_paired_has_no_difference() {
        assert_eq!(paired(&[vec![1.0]], &[vec![1.0, 0.0]], 1), None);
        assert_eq!(paired(&[], &[], 1), None);
    }
}
