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
    epoch: Option<(u64, Vec<usize>)>,
}

impl RowOrder {
    /// An order of `rows` rows; `rows_per_step` beyond their number means all of them.
    ///
    /// # Panics
    /// When either number is zero: an empty set has no order.
    #[must_use]
    pub fn new(seed: u64, rows: usize, rows_per_step: usize) -> Self {
        assert!(rows > 0 && rows_per_step > 0, "an order needs rows");
        Self { seed, rows, rows_per_step, epoch: None }
    }

    /// Steps in one epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.rows.div_ceil(self.rows_per_step) as u64
    }

    /// The rows of step `step`, counted from 0 over all epochs.
    pub fn step(&mut self, step: u64) -> Vec<usize> {
        let (epoch, within) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let (seed, rows) = (self.seed, self.rows);
        let order = match &self.epoch {
            Some((current, order)) if *current == epoch => order,
            _ => &self.epoch.insert((epoch, shuffled(seed, epoch, rows))).1,
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

    #[test]
    fn epochs_and_seeds_differ() {
        let mut order = RowOrder::new(1, 100, 100);
        assert_ne!(order.step(0), order.step(1));
        assert_ne!(order.step(0), RowOrder::new(2, 100, 100).step(0));
    }
}
