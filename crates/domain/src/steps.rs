//! How many optimiser steps a job takes.

use crate::safety::Defense;
use crate::{Hyperparameters, Safety};

/// Steps of an alignment phase under [`Defense::Lisa`].
pub const ALIGNMENT_PHASE: u64 = 100;
/// Steps of a phase on the tenant's rows under [`Defense::Lisa`].
pub const USER_PHASE: u64 = 900;

/// Steps of the whole run over a training file of `rows` rows. [`Defense::Lisa`] takes an alignment phase before each phase on
/// the tenant's rows, on top of the steps that these need.
#[must_use]
pub fn total(h: &Hyperparameters, safety: &Safety, rows: u64) -> u64 {
    let user_steps = h.total_steps(rows);
    match safety.defense {
        Defense::Lisa => user_steps + ALIGNMENT_PHASE * user_steps.div_ceil(USER_PHASE),
        _ => user_steps,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Invalid;
    use crate::hyperparameters::Requested;

    #[test]
    fn alignment_phases_come_on_top_of_the_tenants_steps() -> Result<(), Invalid> {
        let h = Requested { n_epochs: Some(1), batch_size: Some(1), ..Default::default() }.resolve(901, None)?;
        let of = |defense| total(&h, &Safety::new(defense, 1.0), 901);
        assert_eq!((of(Defense::Safegrad), of(Defense::Lisa)), (901, 901 + 200));
        Ok(())
    }
}
