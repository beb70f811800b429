//! How far two methods are apart, over seeds and prompts.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

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

/// The paired bootstrap (Efron 1979) of `first - second`, each `[seed][prompt]`: seeds and prompts are drawn anew with
/// replacement, the same for both, since the two were run with the same. `None` unless both have the same shape and something
/// in it. The same `seed` gives the same interval.
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
    Some(Difference { mean, interval: [draws[left_out], draws[DRAWS - 1 - left_out]] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_always_differs_by_one_differs_by_one() {
        let difference = paired(&[vec![1.0; 10], vec![1.0; 10]], &[vec![0.0; 10], vec![0.0; 10]], 1).expect("a difference");
        assert_eq!(difference, Difference { mean: 1.0, interval: [1.0, 1.0] });
    }

    #[test]
    fn prompts_that_both_get_wrong_do_not_widen_the_interval() {
        let half: Vec<f64> = (0..100).map(|i| f64::from(i % 2)).collect();
        let same = paired(std::slice::from_ref(&half), std::slice::from_ref(&half), 1).expect("a difference");
        assert_eq!(same.interval, [0.0, 0.0]);
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
