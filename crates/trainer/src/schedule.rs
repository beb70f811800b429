//! The learning rate of each step.

use holdfast_domain::Hyperparameters;
use holdfast_domain::hyperparameters::LrSchedule;

/// A learning rate that rises over the warm-up and then follows its schedule.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    peak: f64,
    shape: LrSchedule,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// The schedule of a run of `total_steps`.
    #[must_use]
    pub fn new(hyperparameters: &Hyperparameters, total_steps: u64) -> Self {
        let share = hyperparameters.warmup_ratio * total_steps as f64;
        // The share lies in 0..=total_steps, so the conversion is exact.
        let warmup_steps = (0..=total_steps).find(|n| *n as f64 >= share).unwrap_or(total_steps);
        Self { peak: hyperparameters.learning_rate, shape: hyperparameters.lr_schedule, warmup_steps, total_steps }
    }

    /// The learning rate of step `step`, counted from 0. The first step already learns; the rate would reach zero right
    /// after the last one.
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let progress = (step - self.warmup_steps) as f64 / (self.total_steps - self.warmup_steps).max(1) as f64;
        self.peak
            * match self.shape {
                LrSchedule::Constant => 1.0,
                LrSchedule::Linear => 1.0 - progress,
                LrSchedule::Cosine => f64::midpoint(1.0, (std::f64::consts::PI * progress).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use holdfast_domain::hyperparameters::Requested;

    use super::*;

    fn schedule(shape: LrSchedule, warmup: f64, steps: u64) -> Vec<f64> {
        let requested =
            Requested { learning_rate: Some(1.0), lr_schedule: Some(shape), warmup_ratio: Some(warmup), ..Default::default() };
        let schedule = Schedule::new(&requested.resolve(10, None).expect("in bounds"), steps);
        (0..steps).map(|step| schedule.at(step)).collect()
    }

    #[test]
    fn each_shape_starts_at_its_peak_after_the_warm_up() {
        assert_eq!(schedule(LrSchedule::Constant, 0.5, 4), [0.5, 1.0, 1.0, 1.0]);
        assert_eq!(schedule(LrSchedule::Linear, 0.0, 4), [1.0, 0.75, 0.5, 0.25]);
        let cosine = schedule(LrSchedule::Cosine, 0.0, 4);
        assert!((cosine[0] - 1.0).abs() < 1e-12 && (cosine[2] - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_run_that_is_all_warm_up_still_ends_at_its_peak() {
        assert_eq!(schedule(LrSchedule::Linear, 1.0, 2), [0.5, 1.0]);
    }
}
