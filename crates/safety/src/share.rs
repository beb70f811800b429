//! Shares with what they are worth.

use serde::{Deserialize, Serialize};

/// The 97.5 % point of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// How many of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Those that are so.
    pub count: u32,
    /// All.
    pub of: u32,
}

impl Share {
    /// Counts what is so among `all`.
    pub fn among<T>(all: impl IntoIterator<Item = T>, is_so: impl Fn(T) -> bool) -> Self {
        let (mut count, mut of) = (0, 0);
        for one in all {
            of += 1;
            count += u32::from(is_so(one));
        }
        Self { count, of }
    }

    /// Between 0 and 1; 0 of nothing.
    #[must_use]
    pub fn value(self) -> f64 {
        if self.of == 0 { 0.0 } else { f64::from(self.count) / f64::from(self.of) }
    }

    /// The 95 % interval of Wilson (1927): where the true share lies, if the cases were drawn by chance. `[0, 1]` of nothing.
    #[must_use]
    pub fn interval(self) -> [f64; 2] {
        if self.of == 0 { [0.0, 1.0] } else { wilson(self.value(), f64::from(self.of)) }
    }
}

/// The 95 % interval of `after - before` by Newcombe's scores (1998, method 10), as of two sets of cases that were drawn apart: wider than the
/// truth where they are the same cases.
#[must_use]
pub fn difference(before: Share, after: Share) -> [f64; 2] {
    let ([low, high], [low_after, high_after]) = (before.interval(), after.interval());
    let (was, is) = (before.value(), after.value());
    [is - was - (is - low_after).hypot(high - was), is - was + (high_after - is).hypot(was - low)]
}

/// The 95 % interval of Wilson (1927) of a share `p` of `n` cases, more than none. A mean of values between 0 and 1 is no further from what
/// is behind it than such a share.
pub(crate) fn wilson(p: f64, n: f64) -> [f64; 2] {
    let middle = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    [middle - half, middle + half].map(|end| (end / (1.0 + Z * Z / n)).clamp(0.0, 1.0))
}

/// How well a judge knows a class: its recall and its specificity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Found, of those that are of the class.
    pub recall: Share,
    /// Left alone, of those that are not.
    pub specificity: Share,
}

impl Accuracy {
    /// The share that is likely behind a `judged` one (Rogan and Gladen 1978): `(q + specificity - 1) / (recall + specificity - 1)`.
    /// `None` for a judge that is no better than chance.
    #[must_use]
    pub fn corrected(self, judged: f64) -> Option<f64> {
        let (recall, specificity) = (self.recall.value(), self.specificity.value());
        let gain = recall + specificity - 1.0;
        (gain > 0.0).then(|| ((judged + specificity - 1.0) / gain).clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_of_a_hundred_is_one_to_eight_and_a_half_percent() {
        let [low, high] = Share { count: 3, of: 100 }.interval();
        assert!((low - 0.0103).abs() < 5e-5 && (high - 0.0845).abs() < 5e-5, "{low} {high}");
    }

    #[test]
    fn none_of_some_is_not_never() {
        let [low, high] = Share { count: 0, of: 20 }.interval();
        assert!(low == 0.0 && (0.15..0.17).contains(&high));
        assert_eq!(Share { count: 0, of: 0 }.interval(), [0.0, 1.0]);
    }

    #[test]
    fn a_difference_of_shares_has_the_interval_that_was_published() {
        // Newcombe (1998), method 10: 56 of 70 less 48 of 80.
        let [low, high] = difference(Share { count: 48, of: 80 }, Share { count: 56, of: 70 });
        assert!((low - 0.0524).abs() < 1e-4 && (high - 0.3339).abs() < 1e-4, "{low} {high}");
    }

    #[test]
    fn a_judge_that_misses_a_third_has_seen_two_thirds_of_them() {
        let judge = Accuracy { recall: Share { count: 2, of: 3 }, specificity: Share { count: 9, of: 9 } };
        assert_eq!(judge.corrected(0.5).map(|share| (share * 1e9).round() / 1e9), Some(0.75));
        let chance = Accuracy { recall: Share { count: 1, of: 2 }, specificity: Share { count: 1, of: 2 } };
        assert_eq!(chance.corrected(0.5), None);
    }
}
