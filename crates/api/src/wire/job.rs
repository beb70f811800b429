//! Jobs as the wire has them.

use std::time::Duration;

use holdfast_domain::hyperparameters::{LongRows, LrSchedule, Precision, Recompute};
use holdfast_domain::ids::{FileId, JobId};
use holdfast_domain::invalid::LineError;
use holdfast_domain::job::{JobState, Status};
use holdfast_domain::safety::{AlignmentPoint, Defense, KlPositions, ProjectionOf, ProjectionSpace};
use holdfast_domain::{Hyperparameters, Safety};
use holdfast_store::attempts::Attempt;
use holdfast_store::jobs::{Job as Row, Progress as RowProgress, Quarantine, Waiting};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::list::Listed;
use super::policy::SafetyPolicy;
use super::words::{
    ActivationCheckpointingName, AlignmentPointName, AttemptOutcome, DefenseName, JobPhase, JobStatus, JobWork, KlPositionsName,
    LongRowsName, LrScheduleName, PrecisionName, ProjectionName, ProjectionSpaceName, TargetModule,
};

/// A fine-tuning job.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Job {
    #[schema(value_type = String, example = "ftjob-0192f3a4000070008000000000000001")]
    id: JobId,
    #[schema(example = "fine_tuning.job")]
    object: &'static str,
    /// The base model, or the model the job goes on from.
    #[schema(example = "SmolLM2-135M-Instruct")]
    model: String,
    /// In Unix seconds.
    created_at: i64,
    /// In Unix seconds, once it has ended.
    finished_at: Option<i64>,
    /// The name of what it made, once it has succeeded or the operator has released it.
    fine_tuned_model: Option<String>,
    #[schema(example = "holdfast")]
    organization_id: String,
    /// A CSV file with the figures of every step, once it has succeeded.
    #[schema(value_type = Vec<String>)]
    result_files: Vec<FileId>,
    #[schema(value_type = JobStatus)]
    status: Status,
    #[schema(value_type = String, example = "file-0192f3a4000070008000000000000001")]
    training_file: FileId,
    #[schema(value_type = Option<String>)]
    validation_file: Option<FileId>,
    /// Tokens of the training file that were read, once it has succeeded.
    trained_tokens: Option<i64>,
    /// Why it failed.
    error: Option<JobError>,
    hyperparameters: ShownHyperparameters,
    seed: u64,
    /// When it will probably end, in Unix seconds, while it trains.
    estimated_finish: Option<i64>,
    method: ShownMethod,
    #[schema(value_type = BTreeMap<String, String>)]
    metadata: serde_json::Value,
    /// Extension: what it trains under.
    safety: ShownSafety,
    /// Extension: the operator's policy, as it was when the job was created.
    safety_policy: Option<SafetyPolicy>,
    /// Extension: what the safety gate kept back of it: an adapter that did not pass, or checkpoints, once they are released.
    quarantine: Option<JobQuarantine>,
    /// Extension: what the trainer does now.
    #[schema(value_type = Option<JobPhase>)]
    phase: Option<String>,
    /// Extension: how far it is.
    progress: Option<JobProgress>,
    /// Extension: what the check of its files found.
    dataset: Option<JobDataset>,
    /// Extension: jobs that workers will take before it, while it waits.
    queue_position: Option<u64>,
    /// Extension: what it waits for, while it waits.
    #[schema(example = "4 jobs are before it")]
    waiting_reason: Option<String>,
    /// Extension: how often a worker has taken it up.
    attempt: Option<i32>,
    /// Extension: each of these times, and what became of it.
    attempts: Vec<JobAttempt>,
}

/// What the safety gate kept back of a job: an adapter that did not pass, or the checkpoints of one that did.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct JobQuarantine {
    /// What the model is called once the operator releases it.
    model: String,
    /// When that was, in Unix seconds.
    released_at: Option<i64>,
    /// Why.
    release_reason: Option<String>,
    /// When the operator discarded its files instead, in Unix seconds.
    discarded_at: Option<i64>,
}

impl From<Quarantine> for JobQuarantine {
    fn from(quarantine: Quarantine) -> Self {
        let Quarantine { model, released, discarded_at, .. } = quarantine;
        Self {
            model,
            released_at: released.as_ref().map(|release| release.at.unix_timestamp()),
            release_reason: released.map(|release| release.reason),
            discarded_at: discarded_at.map(OffsetDateTime::unix_timestamp),
        }
    }
}

/// A time a worker took a job up.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct JobAttempt {
    /// Counts from 1, the check of the files among them.
    attempt: i32,
    #[schema(value_type = JobWork)]
    work: String,
    /// In Unix seconds.
    started_at: i64,
    /// In Unix seconds, once it has ended.
    ended_at: Option<i64>,
    /// How it ended, once it has.
    #[schema(value_type = Option<AttemptOutcome>)]
    outcome: Option<String>,
    /// Why it ended so, where that needs words.
    #[schema(example = "The object store could not be used")]
    reason: Option<String>,
}

impl From<Attempt> for JobAttempt {
    fn from(attempt: Attempt) -> Self {
        let Attempt { attempt, work, started_at, ended_at, outcome, reason } = attempt;
        let ended_at = ended_at.map(OffsetDateTime::unix_timestamp);
        Self { attempt, work, started_at: started_at.unix_timestamp(), ended_at, outcome, reason }
    }
}

/// What the check of a job's files found.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct JobDataset {
    /// Rows of the training file.
    rows: u64,
    /// Their tokens.
    tokens: u64,
    /// Those of them that count towards the loss.
    supervised_tokens: u64,
}

/// Why a job failed.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct JobError {
    /// A stable word for programs.
    #[schema(example = "invalid_training_file")]
    code: String,
    /// What happened and what to do.
    message: String,
    /// The field of the request it comes from.
    param: Option<String>,
    /// Extension: the bad lines of the file, at most 1,000.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<crate::error::BadLine>)]
    errors: Vec<LineError>,
}

/// The three values of the public contract, decided.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ShownHyperparameters {
    n_epochs: u32,
    batch_size: u32,
    learning_rate_multiplier: f64,
}

/// How the job trains.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ShownMethod {
    #[schema(example = "supervised")]
    r#type: &'static str,
    supervised: ShownSupervised,
}

/// Supervised fine-tuning.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ShownSupervised {
    hyperparameters: ResolvedHyperparameters,
}

/// Every hyperparameter, decided.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ResolvedHyperparameters {
    n_epochs: u32,
    batch_size: u32,
    learning_rate_multiplier: f64,
    gradient_accumulation_steps: u32,
    learning_rate: f64,
    #[schema(value_type = LrScheduleName)]
    lr_schedule: LrSchedule,
    warmup_ratio: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    max_length: u32,
    #[schema(value_type = LongRowsName)]
    long_rows: LongRows,
    #[schema(value_type = PrecisionName)]
    precision: Precision,
    lora_rank: u32,
    lora_alpha: f64,
    lora_dropout: f64,
    #[schema(value_type = Vec<TargetModule>)]
    target_modules: Vec<holdfast_domain::hyperparameters::Projection>,
    #[schema(value_type = ActivationCheckpointingName)]
    activation_checkpointing: Recompute,
    length_grouping: bool,
    evaluate_steps: u64,
    early_stopping_patience: u32,
    row_conflicts: bool,
}

/// What a job trains under.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ShownSafety {
    #[schema(value_type = DefenseName)]
    defense: Defense,
    rho: f64,
    #[schema(value_type = KlPositionsName)]
    kl_positions: KlPositions,
    #[schema(value_type = ProjectionName)]
    projection: ProjectionOf,
    #[schema(value_type = ProjectionSpaceName)]
    projection_space: ProjectionSpace,
    #[schema(value_type = AlignmentPointName)]
    alignment_point: AlignmentPoint,
    /// The budget of mean KL in nats, under `held`.
    budget: Option<f64>,
    alignment_set: Option<String>,
    /// Which version of it; absent in an estimate.
    #[serde(skip_serializing_if = "Option::is_none")]
    alignment_set_version: Option<u32>,
    /// Alignment rows of a step, where they are not as many as of the job's own.
    alignment_batch_size: Option<u32>,
}

/// How far a job is.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct JobProgress {
    step: u64,
    total_steps: u64,
    tokens: u64,
    tokens_per_second: f64,
    percent: f64,
    eta_seconds: f64,
}

impl From<RowProgress> for JobProgress {
    fn from(p: RowProgress) -> Self {
        Self {
            step: p.step,
            total_steps: p.total_steps,
            tokens: p.tokens,
            tokens_per_second: p.tokens_per_second,
            percent: 100.0 * p.step as f64 / p.total_steps.max(1) as f64,
            eta_seconds: p.eta_seconds,
        }
    }
}

impl From<Safety> for ShownSafety {
    fn from(s: Safety) -> Self {
        Self {
            defense: s.defense,
            rho: s.rho,
            kl_positions: s.kl_positions,
            projection: s.projection,
            projection_space: s.projection_space,
            alignment_point: s.alignment_point,
            budget: (s.defense == Defense::Held).then_some(s.budget),
            alignment_set: s.alignment_set,
            alignment_set_version: None,
            alignment_batch_size: s.alignment_batch_size,
        }
    }
}

impl From<Hyperparameters> for ResolvedHyperparameters {
    fn from(h: Hyperparameters) -> Self {
        Self {
            n_epochs: h.n_epochs,
            batch_size: h.batch_size,
            learning_rate_multiplier: h.learning_rate / holdfast_domain::hyperparameters::BASE_LEARNING_RATE,
            gradient_accumulation_steps: h.gradient_accumulation_steps,
            learning_rate: h.learning_rate,
            lr_schedule: h.lr_schedule,
            warmup_ratio: h.warmup_ratio,
            weight_decay: h.weight_decay,
            max_grad_norm: h.max_grad_norm,
            max_length: h.max_length,
            long_rows: h.long_rows,
            precision: h.precision,
            lora_rank: h.lora_rank,
            lora_alpha: h.lora_alpha,
            lora_dropout: h.lora_dropout,
            target_modules: h.target_modules,
            activation_checkpointing: h.activation_checkpointing,
            length_grouping: h.length_grouping,
            evaluate_steps: h.evaluate_steps,
            early_stopping_patience: h.early_stopping_patience,
            row_conflicts: h.row_conflicts,
        }
    }
}

impl Job {
    /// A row as the wire shows it; what it waits for is known only of one job by itself.
    pub(crate) fn new(row: Row, waiting: Option<Waiting>) -> Self {
        let status = row.state.status();
        let attempt = row.state.attempt();
        let estimated_finish = row.progress.as_ref().filter(|_| status == Status::Running).map(|progress| {
            // A run of more than some centuries is no estimate.
            let rest = Duration::from_secs_f64(progress.eta_seconds.clamp(0.0, 1e10));
            row.read_at.unix_timestamp().saturating_add_unsigned(rest.as_secs() + 1)
        });
        let waiting_reason = waiting_reason(&row, waiting.as_ref());
        let released = row.quarantine.as_ref().filter(|q| q.is_published).map(|q| q.model.clone());
        let (fine_tuned_model, trained_tokens, error) = match row.state {
            JobState::Succeeded { fine_tuned_model, trained_tokens } => (Some(fine_tuned_model), Some(trained_tokens), None),
            JobState::Failed { error } => (
                released,
                None,
                Some(JobError { code: error.code, message: error.message, param: error.param, errors: error.errors }),
            ),
            _ => (None, None, None),
        };
        let hyperparameters = ResolvedHyperparameters::from(row.hyperparameters);
        Self {
            id: row.id,
            object: "fine_tuning.job",
            model: row.model,
            created_at: row.created_at.unix_timestamp(),
            finished_at: row.finished_at.map(|t| t.unix_timestamp()),
            fine_tuned_model,
            organization_id: row.organization,
            result_files: row.result_file.into_iter().collect(),
            status,
            training_file: row.training_file,
            validation_file: row.validation_file,
            trained_tokens,
            error,
            hyperparameters: ShownHyperparameters {
                n_epochs: hyperparameters.n_epochs,
                batch_size: hyperparameters.batch_size,
                learning_rate_multiplier: hyperparameters.learning_rate_multiplier,
            },
            seed: row.seed,
            estimated_finish,
            method: ShownMethod { r#type: "supervised", supervised: ShownSupervised { hyperparameters } },
            metadata: row.metadata,
            safety: ShownSafety { alignment_set_version: row.alignment_set_version, ..row.safety.into() },
            safety_policy: row.policy.map(Into::into),
            quarantine: row.quarantine.map(Into::into),
            phase: row.phase,
            progress: row.progress.map(Into::into),
            dataset: row.dataset.map(|d| JobDataset { rows: d.rows, tokens: d.tokens, supervised_tokens: d.supervised_tokens }),
            queue_position: waiting.map(|waiting| waiting.ahead),
            waiting_reason,
            attempt,
            attempts: row.attempts.into_iter().map(Into::into).collect(),
        }
    }
}

/// What a job waits for, in words.
fn waiting_reason(row: &Row, waiting: Option<&Waiting>) -> Option<String> {
    let status = row.state.status();
    if status == Status::Paused {
        return Some("it is paused; resume it to go on".into());
    }
    let waiting = waiting?;
    if let Some(seconds) = row.rests_until.map(|until| (until - row.read_at).whole_seconds()).filter(|seconds| *seconds > 0) {
        let reason =
            row.attempts.last().and_then(|attempt| attempt.reason.as_deref()).unwrap_or("its last attempt came to nothing");
        return Some(format!("it is tried again in {seconds} seconds, because of this: {reason}"));
    }
    if waiting.workers == 0 {
        return Some("no worker was heard of in the last minute; the operator must start one".into());
    }
    if let Some(most) = waiting.may_run_in_project.filter(|most| status == Status::Queued && waiting.running_in_project >= *most)
    {
        return Some(format!("{} jobs of this project train, and its quota allows {most}", waiting.running_in_project));
    }
    Some(match waiting.ahead {
        0 => "it is next; the workers are busy with other jobs, or about to take it".into(),
        1 => "one job is before it".into(),
        jobs => format!("{jobs} jobs are before it"),
    })
}

impl Listed for Job {
    fn id(&self) -> String {
        self.id.to_string()
    }
}
