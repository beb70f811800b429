//! When a run no longer converges.

/// Why a run cannot go on as it is.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Diverged {
    /// The loss or a gradient is NaN or infinite.
    #[error("the loss or its gradient is no longer a number at step {step}")]
    NotANumber {
        /// From 1.
        step: u64,
    },
    /// The loss has left where it was.
    #[error("the loss at step {step} is {loss:.3} on average, far above the {lowest:.3} it had reached")]
    RanAway {
        /// From 1.
        step: u64,
        /// Its moving mean, in nats.
        loss: f64,
        /// The lowest its moving mean was.
        lowest: f64,
    },
}

/// The moving mean of a run's loss, which tells when it runs away.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossWatch {
    mean: Option<f64>,
    lowest: f64,
}

impl LossWatch {
    /// How far the mean may rise above its lowest, in nats: beyond what batches differ by.
    const MOST_RISE: f64 = 4.0;

    /// Takes a step's loss into the mean.
    ///
    /// # Errors
    /// When the mean has risen too far.
    pub fn see(&mut self, step: u64, loss: f64) -> Result<(), Diverged> {
        let mean = self.mean.map_or(loss, |mean| mean + 0.1 * (loss - mean));
        self.lowest = if self.mean.is_none() { mean } else { self.lowest.min(mean) };
        self.mean = Some(mean);
        if mean > self.lowest + Self::MOST_RISE {
            return Err(Diverged::RanAway { step, loss: mean, lowest: self.lowest });
        }
        Ok(())
    }

    /// Whether the mean is on its way to where a run counts as running away: a quarter of it, more than batches move it.
    #[must_use]
    pub fn is_rising(&self) -> bool {
        self.mean.is_some_and(|mean| mean > self.lowest + Self::MOST_RISE / 4.0)
    }

    /// The bits of its mean and of its lowest, float64s: what a checkpoint keeps.
    #[must_use]
    pub fn bits(&self) -> Option<[u64; 2]> {
        Some([self.mean?.to_bits(), self.lowest.to_bits()])
    }

    /// Goes on from [`Self::bits`].
    #[must_use]
    pub fn from_bits(bits: Option<[u64; 2]>) -> Self {
        match bits {
            Some([mean, lowest]) => Self { mean: Some(f64::from_bits(mean)), lowest: f64::from_bits(lowest) },
            None => Self::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_that_runs_away_is_noticed_and_one_bad_batch_is_not() {
        let mut watch = LossWatch::default();
        for step in 1..50 {
            assert_eq!(watch.see(step, 1.0), Ok(()));
        }
        assert!(!watch.is_rising());
        assert_eq!(watch.see(50, 20.0), Ok(()), "one batch");
        let run_away = (51..200).find_map(|step| watch.see(step, 20.0).err());
        assert!(matches!(run_away, Some(Diverged::RanAway { step: 51..60, .. })), "{run_away:?}");
        assert!(watch.is_rising());
    }
}
