//! The result file of a job: the figures of every step, as clients of the public contract read them, with ours after them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use holdfast_domain::progress::{Review, Step};

/// The first five are the public contract's.
const COLUMNS: &str = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,learning_rate,gradient_norm,norm_user,\
align_kl,norm_align,dot,cosine,coefficient,conflict,removed_fraction,alignment_change,tokens,probe_loss,taken_back";

/// The table, one row a step; what was not measured at a step is empty. `validations` are step, loss and token accuracy.
pub(crate) fn csv(steps: &[Step], validations: &[(u64, f64, f64)]) -> String {
    let taken: BTreeMap<u64, &Step> = steps.iter().map(|step| (step.step, step)).collect();
    let measured: BTreeMap<u64, (f64, f64)> =
        validations.iter().map(|&(step, loss, accuracy)| (step, (loss, accuracy))).collect();
    let reviewed: BTreeMap<u64, Review> =
        steps.iter().flat_map(|step| &step.reviews).map(|review| (review.step, *review)).collect();
    let numbers: BTreeSet<u64> = taken.keys().chain(measured.keys()).copied().collect();
    let mut table = format!("{COLUMNS}\n");
    for number in numbers {
        let (step, validation) = (taken.get(&number), measured.get(&number).copied());
        let alignment = step.and_then(|step| step.alignment.as_ref());
        let review = reviewed.get(&number);
        let (loss, accuracy) = validation.unzip();
        let cells = [
            step.map(|s| s.task_loss),
            step.map(|s| s.token_accuracy),
            loss,
            accuracy,
            step.map(|s| s.learning_rate),
            step.map(|s| s.gradient_norm),
            step.map(|s| s.norm_user),
            alignment.map(|a| a.align_kl),
            alignment.map(|a| a.norm_align),
            alignment.map(|a| a.dot),
            alignment.map(|a| a.cosine),
            alignment.map(|a| a.coefficient),
            alignment.map(|a| f64::from(u8::from(a.conflict))),
            alignment.map(|a| a.removed_fraction),
            alignment.map(|a| a.alignment_change),
            step.map(|s| s.tokens as f64),
            review.and_then(|r| r.probe_loss),
            review.map(|r| f64::from(u8::from(r.taken_back))),
        ];
        let _ = write!(table, "{number}");
        for cell in cells {
            table.push(',');
            // A number that is none has no place in a table that others calculate with.
            if let Some(value) = cell.filter(|value| value.is_finite()) {
                let _ = write!(table, "{value}");
            }
        }
        table.push('\n');
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_what_was_measured_at_its_step_and_the_base_has_a_row_of_its_own() {
        let step = Step {
            step: 1,
            total_steps: 1,
            task_loss: 0.5,
            token_accuracy: 0.25,
            alignment: None,
            norm_user: 1.0,
            gradient_norm: f64::NAN,
            learning_rate: 2e-4,
            tokens: 7,
            tokens_per_second: 1.0,
            eta_seconds: 0.0,
            reviews: vec![Review { step: 1, probe_loss: Some(0.125), taken_back: true }],
        };
        let table = csv(&[step], &[(0, 2.0, 0.1), (1, 1.5, 0.2)]);
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[0].starts_with("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,"));
        assert_eq!(lines[1], "0,,,2,0.1,,,,,,,,,,,,,,");
        assert_eq!(lines[2], "1,0.5,0.25,1.5,0.2,0.0002,,1,,,,,,,,,7,0.125,1");
    }
}
