//! What the end of a trainer means for its job, in words the job's owner can act on.

use holdfast_domain::exit::{self, ExitRecord, reason};
use holdfast_domain::job::JobError;

use crate::process::Ended;

const KILLED: i32 = 9;

/// The tokens a finished run read, or why there is no adapter. The record counts before the exit code, which a launcher may
/// have masked; without a record the trainer did not end in order, whatever its code.
pub(crate) fn judge(ended: Ended, record: Option<ExitRecord>) -> Result<u64, JobError> {
    match (record, ended) {
        (Some(record), _) => judge_record(record),
        (None, Ended::Signal(KILLED)) => Err(JobError::new(
            "out_of_memory",
            format!(
                "The trainer was killed from outside (signal 9), most often because the machine ran out of memory. {}",
                exit::LESS_MEMORY
            ),
        )),
        (None, Ended::Signal(signal)) => Err(JobError::new(
            "trainer_crashed",
            format!(
                "The trainer crashed (signal {signal}). Nothing of your data is lost; create the job again, and tell the operator if it happens twice."
            ),
        )),
        (None, Ended::Code(code)) => Err(JobError::new(
            "trainer_crashed",
            format!(
                "The trainer ended with code {code} and left no record. Create the job again, and tell the operator if it happens twice."
            ),
        )),
    }
}

fn judge_record(record: ExitRecord) -> Result<u64, JobError> {
    match record.code {
        exit::DONE => Ok(record.trained_tokens),
        exit::BAD_DATA if record.reason == reason::BAD_SETUP => Err(JobError::new(
            "operator_error",
            format!("The service's own set-up is at fault, not your data; the operator must mend it: {}", record.message),
        )),
        exit::BAD_DATA if record.reason == reason::OUT_OF_MEMORY => Err(JobError::new("out_of_memory", record.message)),
        exit::BAD_DATA if record.reason == reason::DIVERGED => Err(JobError::new("training_diverged", record.message)),
        exit::BAD_DATA => Err(JobError::new("invalid_training_data", record.message)),
        exit::STOPPED => Err(JobError::new("trainer_stopped", "The trainer was stopped from outside. Create the job again.")),
        _ if record.reason == reason::OUT_OF_MEMORY => Err(JobError::new("out_of_memory", record.message)),
        _ => Err(JobError::new("trainer_failed", format!("The trainer failed: {}", record.message))),
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
        assert_eq!(judge(Ended::Code(0), record(exit::DONE, "done")), Ok(7));
    }

    #[test]
    fn every_other_end_names_what_to_do() {
        let cases = [
            (Ended::Signal(9), None, "out_of_memory"),
            (Ended::Signal(11), None, "trainer_crashed"),
            (Ended::Code(0), None, "trainer_crashed"),
            (Ended::Code(70), record(exit::INTERNAL, reason::OUT_OF_MEMORY), "out_of_memory"),
            (Ended::Code(70), record(exit::INTERNAL, reason::INTERNAL), "trainer_failed"),
            (Ended::Code(65), record(exit::BAD_DATA, reason::BAD_DATA), "invalid_training_data"),
            (Ended::Code(65), record(exit::BAD_DATA, reason::BAD_SETUP), "operator_error"),
            (Ended::Code(65), record(exit::BAD_DATA, reason::OUT_OF_MEMORY), "out_of_memory"),
            (Ended::Code(65), record(exit::BAD_DATA, reason::DIVERGED), "training_diverged"),
        ];
        for (ended, record, code) in cases {
            assert_eq!(judge(ended, record).map_err(|e| e.code), Err(code.to_owned()));
        }
    }
}
