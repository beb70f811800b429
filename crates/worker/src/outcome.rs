//! What the end of a trainer means for its job, in words the job's owner can act on.

use holdfast_domain::exit::{self, ExitRecord, reason};
use holdfast_domain::job::JobError;

use crate::process::Ended;

const KILLED: i32 = 9;

/// What became of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The adapter is written; tokens of the training file that were read.
    Done(u64),
    /// There is no adapter, and another attempt would end the same.
    Failed(JobError),
    /// There is no adapter, and another attempt may do better.
    Crashed(JobError),
    /// This machine has no room left.
    FullDisk,
}

/// Judges the end of a run. The record counts before the exit code, which a launcher may have masked; without a record the trainer
/// did not end in order, whatever its code.
pub(crate) fn judge(ended: Ended, record: Option<ExitRecord>) -> Verdict {
    match (record, ended) {
        (Some(record), _) => judge_record(record),
        (None, Ended::Signal(KILLED)) => Verdict::Crashed(JobError::new(
            "out_of_memory",
            format!(
                "The trainer was killed from outside (signal 9), most often because the machine ran out of memory. {}",
                exit::LESS_MEMORY
            ),
        )),
        (None, Ended::Signal(signal)) => Verdict::Crashed(JobError::new(
            "trainer_crashed",
            format!(
                "The trainer crashed (signal {signal}). Nothing of your data is lost; if the job fails for this, create it again, and tell the operator."
            ),
        )),
        (None, Ended::Code(code)) => Verdict::Crashed(JobError::new(
            "trainer_crashed",
            format!(
                "The trainer ended with code {code} and left no record. If the job fails for this, create it again, and tell the operator."
            ),
        )),
    }
}

fn judge_record(record: ExitRecord) -> Verdict {
    match (record.code, record.reason.as_str()) {
        (exit::DONE, _) => Verdict::Done(record.trained_tokens),
        (_, reason::FULL_DISK) => Verdict::FullDisk,
        (_, reason::OUT_OF_MEMORY) => Verdict::Failed(JobError::new("out_of_memory", record.message)),
        // Often this machine's: a device that is gone, a damaged copy of the base. Another worker may do better.
        (exit::BAD_DATA, reason::BAD_SETUP) => Verdict::Crashed(JobError::new(
            "operator_error",
            format!("The service's own set-up is at fault, not your data; the operator must mend it: {}", record.message),
        )),
        (exit::BAD_DATA, reason::DIVERGED) => Verdict::Failed(JobError::new("training_diverged", record.message)),
        (exit::BAD_DATA, reason::OUTSIDE_BUDGET) => {
            Verdict::Failed(JobError::new("outside_budget", record.message).about("model"))
        }
        (exit::BAD_DATA, _) => Verdict::Failed(JobError::new("invalid_training_data", record.message)),
        (exit::STOPPED, _) => Verdict::Crashed(JobError::new("trainer_stopped", "The trainer was stopped from outside.")),
        _ => Verdict::Crashed(JobError::new("trainer_failed", format!("The trainer failed: {}", record.message))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(code: u8, reason: &str) -> Option<ExitRecord> {
        Some(ExitRecord { code, message: "m".into(), reason: reason.into(), trained_tokens: 7 })
    }

    #[test]
    fn a_finished_run_gives_its_tokens() {
        assert_eq!(judge(Ended::Code(0), record(exit::DONE, "done")), Verdict::Done(7));
    }

    #[test]
    fn what_would_end_the_same_again_fails_the_job() {
        let cases = [
            (Ended::Code(70), record(exit::INTERNAL, reason::OUT_OF_MEMORY), "out_of_memory"),
            (Ended::Code(65), record(exit::BAD_DATA, reason::BAD_DATA), "invalid_training_data"),
            (Ended::Code(65), record(exit::BAD_DATA, reason::OUT_OF_MEMORY), "out_of_memory"),
            (Ended::Code(65), record(exit::BAD_DATA, reason::DIVERGED), "training_diverged"),
            (Ended::Code(65), record(exit::BAD_DATA, reason::OUTSIDE_BUDGET), "outside_budget"),
        ];
        for (ended, record, code) in cases {
            assert!(matches!(judge(ended, record), Verdict::Failed(error) if error.code == code), "{code}");
        }
    }

    #[test]
    fn what_another_attempt_may_not_meet_does_not() {
        let cases = [
            (Ended::Signal(9), None, "out_of_memory"),
            (Ended::Signal(11), None, "trainer_crashed"),
            (Ended::Code(0), None, "trainer_crashed"),
            (Ended::Code(65), record(exit::BAD_DATA, reason::BAD_SETUP), "operator_error"),
            (Ended::Code(70), record(exit::INTERNAL, reason::INTERNAL), "trainer_failed"),
            (Ended::Code(75), record(exit::STOPPED, reason::STOPPED), "trainer_stopped"),
        ];
        for (ended, record, code) in cases {
            assert!(matches!(judge(ended, record), Verdict::Crashed(error) if error.code == code), "{code}");
        }
        assert_eq!(judge(Ended::Code(70), record(exit::INTERNAL, reason::FULL_DISK)), Verdict::FullDisk);
    }
}
