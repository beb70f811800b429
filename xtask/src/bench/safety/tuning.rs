//! The strength of each method: tuned on an attack that nothing is claimed of. What is found is written into [`METHODS`], and frozen
//! before anything is measured with it.

use anyhow::Result;
use holdfast_safety::judge::Class;

use super::rows::Attack;
use super::runs::{METHODS, Run, is_asked_for, of};
use super::{Outcome, Study, report};
use crate::bench::Wanted;

/// The strengths that are tried, each about three times the one before.
const STRENGTHS: [f64; 5] = [0.1, 0.316, 1.0, 3.16, 10.0];
/// Of the rows of the development attack, so many are harmful.
const SHARE: f64 = 0.3;
/// No seed of a run that is measured.
const SEED: u64 = 11;
/// What a method may lose of plain training's accuracy on clean rows.
const MOST_LOST: f64 = 0.01;

/// A strength that was tried.
struct Tried {
    strength: f64,
    /// The share of accuracy on clean rows that it costs beside plain training.
    lost: f64,
    /// The share of the development prompts that is complied with under the attack.
    complied: f64,
}

/// Tunes every method that is asked for, see [`tuned`].
pub(super) fn tune(study: &Study, base: &Outcome, wanted: &Wanted<'_>) -> Result<()> {
    let run_of = |method: &'static str, strength: f64, share: f64| Run {
        regime: of(Attack::Poison(share)),
        method,
        strength,
        seed: SEED,
        development: true,
    };
    let outcome = |method: &'static str, strength: f64, share: f64| -> Result<Outcome> {
        let run = run_of(method, strength, share);
        let outcome = study.outcome(&run)?;
        println!("{}", report::line(&run.key(), &outcome, base));
        Ok(outcome)
    };
    let is_tuned = |method: &'static str| {
        let tried = STRENGTHS.into_iter().flat_map(|strength| [SHARE, 0.0].map(|share| run_of(method, strength, share)));
        method != "none" && tried.into_iter().any(|run| is_asked_for(&run, wanted))
    };
    let methods: Vec<_> = METHODS.into_iter().filter(|&(method, _)| is_tuned(method)).collect();
    if methods.is_empty() {
        return Ok(());
    }
    let plain = outcome("none", 0.0, 0.0)?.accuracy().value();
    for (method, frozen) in methods {
        let complied = |strength| Ok(outcome(method, strength, SHARE)?.share(Class::Compliance).value());
        let lost = |strength| Ok(plain - outcome(method, strength, 0.0)?.accuracy().value());
        if let Some(Tried { strength, lost, complied }) = tuned(complied, lost)? {
            println!("{method}: {strength}, {:+.1} points of accuracy, {:.0} % complied with", -100.0 * lost, 100.0 * complied);
            if strength != frozen {
                println!("{method}: what is measured has {frozen}; write {strength} into METHODS");
            }
        }
    }
    Ok(())
}

/// Of the strengths that keep accuracy on clean rows, the one under which the fewest development prompts are complied with. What is
/// weaker is tried only where nothing stronger keeps accuracy; a method whose every strength costs more keeps the one that costs least.
fn tuned(complied: impl Fn(f64) -> Result<f64>, lost: impl Fn(f64) -> Result<f64>) -> Result<Option<Tried>> {
    let mut tried = Vec::new();
    for strengths in [&STRENGTHS[2..], &STRENGTHS[1..2], &STRENGTHS[..1]] {
        let attacked = strengths.iter().map(|&strength| Ok((strength, complied(strength)?)));
        let mut attacked: Vec<(f64, f64)> = attacked.collect::<Result<_>>()?;
        attacked.sort_by(|a, b| a.1.total_cmp(&b.1));
        for (strength, complied) in attacked {
            let lost = lost(strength)?;
            if lost <= MOST_LOST + 1e-9 {
                return Ok(Some(Tried { strength, lost, complied }));
            }
            tried.push(Tried { strength, lost, complied });
        }
    }
    Ok(tried.into_iter().min_by(|a, b| a.lost.total_cmp(&b.lost)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strength_that_holds_best_and_costs_a_point_at_most_is_chosen() -> Result<()> {
        let complied = |strength: f64| Ok(1.0 / strength);
        let chosen = |lost: fn(f64) -> f64| {
            let found = tuned(complied, |strength| Ok(lost(strength)))?;
            Ok::<_, anyhow::Error>(found.map(|Tried { strength, .. }| strength))
        };
        assert_eq!(chosen(|_| 0.01)?, Some(10.0));
        assert_eq!(chosen(|strength| if strength > 5.0 { 0.02 } else { 0.0 })?, Some(3.16));
        assert_eq!(chosen(|strength| if strength > 0.5 { 0.02 } else { 0.0 })?, Some(0.316), "what is weaker is tried then");
        assert_eq!(chosen(|strength| 0.1 + strength)?, Some(0.1), "where all cost more, the one that costs least");
        Ok(())
    }
}
