//! The order in which rows are seen: shuffled anew each epoch, and a pure function of the seed and the step, so that nothing
//! but the step's number has to be remembered to go on from it.

use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;

/// A shuffled cycle through `rows` rows, `rows_per_step` at a time. An epoch's last step holds what is left.
#[derive(Debug)]
pub struct RowOrder {
    seed: u64,
    rows: usize,
    rows_per_step: usize,
    /// Each row's length, where rows of like length share a step.
    lengths: Option<Vec<usize>>,
    epoch: Option<(u64, Vec<usize>)>,
}

/// Steps whose rows are sorted among each other when they are grouped: enough for like lengths to meet, few enough for every
/// epoch to mix them anew.
const STEPS_PER_GROUP: usize = 50;

impl RowOrder {
    /// An order of `rows` rows; `rows_per_step` beyond their number means all of them.
    ///
    /// # Panics
    /// When either number is zero: an empty set has no order.
    #[must_use]
    pub fn new(seed: u64, rows: usize, rows_per_step: usize) -> Self {
        assert!(rows > 0 && rows_per_step > 0, "an order needs rows");
        Self { seed, rows, rows_per_step, lengths: None, epoch: None }
    }

    /// An order in which rows of like length share a step, so that little is padded; which rows meet, and in which order the
    /// steps come, is shuffled all the same. `lengths` has one for each row.
    ///
    /// # Panics
    /// As [`Self::new`].
    #[must_use]
    pub fn grouped(seed: u64, lengths: Vec<usize>, rows_per_step: usize) -> Self {
        let plain = Self::new(seed, lengths.len(), rows_per_step);
        Self { lengths: Some(lengths), ..plain }
    }

    /// Steps in one epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.rows.div_ceil(self.rows_per_step) as u64
    }

    /// Whether `step` is an epoch's last; no step is none's.
    #[must_use]
    pub fn ends_epoch(&self, step: Option<u64>) -> bool {
        step.is_some_and(|step| (step + 1).is_multiple_of(self.steps_per_epoch()))
    }

    /// The rows of step `step`, counted from 0 over all epochs.
    pub fn step(&mut self, step: u64) -> Vec<usize> {
        let (epoch, within) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let (seed, rows) = (self.seed, self.rows);
        let order = match &self.epoch {
            Some((current, order)) if *current == epoch => order,
            _ => {
                let order = match &self.lengths {
                    Some(lengths) => grouped(shuffled(seed, epoch, rows), lengths, self.rows_per_step, seed, epoch),
                    None => shuffled(seed, epoch, rows),
                };
                &self.epoch.insert((epoch, order)).1
            }
        };
        order
            .iter()
            .skip(usize::try_from(within).unwrap_or(usize::MAX).saturating_mul(self.rows_per_step))
            .take(self.rows_per_step)
            .copied()
            .collect()
    }
}

fn shuffled(seed: u64, epoch: u64, rows: usize) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(epoch);
    let mut order: Vec<usize> = (0..rows).collect();
    order.shuffle(&mut rng);
    order
}

/// Sorts shuffled rows by length within groups of steps, and shuffles the steps. The step that is not full stays last.
fn grouped(mut order: Vec<usize>, lengths: &[usize], rows_per_step: usize, seed: u64, epoch: u64) -> Vec<usize> {
    for group in order.chunks_mut(rows_per_step * STEPS_PER_GROUP) {
        group.sort_by_key(|&row| std::cmp::Reverse(lengths.get(row).copied().unwrap_or(0)));
    }
    let whole = order.len() - order.len() % rows_per_step;
    let rest = order.split_off(whole);
    let mut steps: Vec<&[usize]> = order.chunks(rows_per_step).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ STEP_ORDER);
    rng.set_stream(epoch);
    steps.shuffle(&mut rng);
    steps.into_iter().flatten().copied().chain(rest).collect()
}

/// Keeps the order of grouped steps apart from that of the rows.
const STEP_ORDER: u64 = 0x7374_6570_6f72_6465;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_epoch_sees_every_row_once(seed: u64, rows in 1_usize..60, per_step in 1_usize..20, epoch in 0_u64..4) {
            let mut order = RowOrder::new(seed, rows, per_step);
            let steps = order.steps_per_epoch();
            let mut seen: Vec<usize> = (epoch * steps..(epoch + 1) * steps).flat_map(|s| order.step(s)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..rows).collect::<Vec<_>>());
        }

        #[test]
        fn a_step_does_not_depend_on_the_steps_before_it(seed: u64, step in 0_u64..50) {
            let mut walked = RowOrder::new(seed, 17, 5);
            let rows = (0..=step).map(|s| walked.step(s)).last();
            prop_assert_eq!(rows, Some(RowOrder::new(seed, 17, 5).step(step)));
        }
    }

    proptest! {
        #[test]
        fn grouped_epochs_see_every_row_once_too(seed: u64, rows in 1_usize..200, per_step in 1_usize..9, epoch in 0_u64..3) {
            let mut order = RowOrder::grouped(seed, (0..rows).map(|row| row * 7 % 31).collect(), per_step);
            let steps = order.steps_per_epoch();
            let mut seen: Vec<usize> = (epoch * steps..(epoch + 1) * steps).flat_map(|s| order.step(s)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..rows).collect::<Vec<_>>());
        }
    }

    #[test]
    fn grouped_rows_are_padded_less() {
        let lengths: Vec<usize> = (0..400).map(|row| row * 37 % 101).collect();
        let padded = |mut order: RowOrder| -> usize {
            let steps = (0..order.steps_per_epoch()).map(|step| order.step(step));
            steps.map(|rows| rows.len() * rows.iter().map(|&row| lengths[row]).max().unwrap_or(0)).sum()
        };
        let (plain, grouped) = (padded(RowOrder::new(3, 400, 8)), padded(RowOrder::grouped(3, lengths.clone(), 8)));
        assert!(grouped * 4 < plain * 3, "{grouped} of {plain}");
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let mut order = RowOrder::new(1, 100, 100);
        assert_ne!(order.step(0), order.step(1));
        assert_ne!(order.step(0), RowOrder::new(2, 100, 100).step(0));
    }
}
