//! The names of models: what an operator gives a base, and what a job gives its result.

use crate::Invalid;
use crate::ids::JobId;

/// Checks a base model's or alignment set's name: letters, digits, `.`, `_`, `-` and `/` between them, at most 128.
///
/// # Errors
/// When the name is empty, too long or has another character. Colons are kept for fine-tuned models.
pub fn check(name: &str) -> Result<(), Invalid> {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    };
    if name.len() <= 128 && name.split('/').all(part) {
        return Ok(());
    }
    Err(Invalid::new(
        "name",
        "invalid_name",
        format!(
            "{name:?} is no name: use letters, digits, `.`, `_`, `-` and single slashes between parts, at most 128 characters"
        ),
    ))
}

/// Checks the suffix a client chose for its model.
///
/// # Errors
/// When it is empty, longer than 64 characters, or holds anything but letters, digits, `.`, `_` and `-`.
pub fn check_suffix(suffix: &str) -> Result<(), Invalid> {
    let fits = (1..=crate::limits::MAX_SUFFIX_CHARS).contains(&suffix.len());
    if fits && suffix.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
        return Ok(());
    }
    Err(Invalid::new("suffix", "invalid_suffix", "suffix takes 1 to 64 letters, digits, `.`, `_` or `-`"))
}

/// The name of a job's result: `ft:<base>:<organisation>:<suffix>:<id>`; an absent suffix leaves its place empty.
#[must_use]
pub fn fine_tuned(base: &str, organization: &str, suffix: Option<&str>, job: JobId) -> String {
    format!("ft:{base}:{organization}:{}:{}", suffix.unwrap_or_default(), job.0.simple())
}

/// The name of what a job had learned after `step`.
#[must_use]
pub fn of_checkpoint(model: &str, step: u64) -> String {
    format!("{model}{CHECKPOINT}{step}")
}

/// A checkpoint's name taken apart: the model's, and the step. `None` for the name of a model.
#[must_use]
pub fn checkpoint(name: &str) -> Option<(&str, u64)> {
    let (model, step) = name.rsplit_once(CHECKPOINT)?;
    Some((model, step.parse().ok()?))
}

/// The job that a fine-tuned model's name ends in.
#[must_use]
pub fn job_of(model: &str) -> Option<JobId> {
    let (_, digits) = model.rsplit_once(':')?;
    format!("{}{digits}", JobId::PREFIX).parse().ok()
}

/// What stands between a model's name and the step of one of its checkpoints.
const CHECKPOINT: &str = ":ckpt-step-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_s_name_names_its_job_and_step() {
        let job = JobId(uuid::Uuid::from_u128(7));
        let model = fine_tuned("org/base", "acme", Some("reviews"), job);
        let name = of_checkpoint(&model, 40);
        assert_eq!(checkpoint(&name), Some((model.as_str(), 40)));
        assert_eq!(checkpoint(&model), None);
        assert_eq!(job_of(&model), Some(job));
    }

    #[test]
    fn names_of_the_hub_are_names() {
        for name in ["SmolLM2-135M-Instruct", "org/model-1.5_b"] {
            assert_eq!(check(name), Ok(()));
        }
    }

    #[test]
    fn a_name_that_could_leave_its_folder_or_look_like_a_result_is_refused() {
        for name in ["", "../x", "a//b", "/a", "a/", "ft:x", "a b", "a/.hidden"] {
            assert!(check(name).is_err(), "{name}");
        }
    }
}
