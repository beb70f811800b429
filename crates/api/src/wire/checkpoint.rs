//! Checkpoints of a job.

use holdfast_domain::ids::{CheckpointId, JobId};
use holdfast_domain::model_name;
use holdfast_store::checkpoints::Checkpoint as Row;
use holdfast_store::jobs::Job;
use serde::Serialize;
use utoipa::ToSchema;

use super::list::Listed;

/// What a job had learned after some of its steps. Its model's name can be given as the `model` of a new job.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Checkpoint {
    #[schema(value_type = String, example = "ftckpt_0192f3a4000070008000000000000001")]
    id: CheckpointId,
    #[schema(example = "fine_tuning.job.checkpoint")]
    object: &'static str,
    /// In Unix seconds.
    created_at: i64,
    #[schema(example = "ft:SmolLM2-135M-Instruct:holdfast:reviews:0192f3a4000070008000000000000001:ckpt-step-100")]
    fine_tuned_model_checkpoint: String,
    #[schema(value_type = String, example = "ftjob-0192f3a4000070008000000000000001")]
    fine_tuning_job_id: JobId,
    step_number: u64,
    metrics: CheckpointMetrics,
}

/// The figures at a checkpoint.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CheckpointMetrics {
    step: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    train_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    train_mean_token_accuracy: Option<f64>,
    /// The last measurement on the validation file up to this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    valid_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    valid_mean_token_accuracy: Option<f64>,
}

impl Checkpoint {
    pub(crate) fn new(row: &Row, job: &Job) -> Self {
        let (train_loss, train_mean_token_accuracy) = row.train.unzip();
        let (valid_loss, valid_mean_token_accuracy) = row.validation.unzip();
        Self {
            id: row.id,
            object: "fine_tuning.job.checkpoint",
            created_at: row.created_at.unix_timestamp(),
            fine_tuned_model_checkpoint: model_name::of_checkpoint(&job.model_name(), row.step),
            fine_tuning_job_id: job.id,
            step_number: row.step,
            metrics: CheckpointMetrics {
                step: row.step,
                train_loss,
                train_mean_token_accuracy,
                valid_loss,
                valid_mean_token_accuracy,
            },
        }
    }
}

impl Listed for Checkpoint {
    fn id(&self) -> String {
        self.id.to_string()
    }
}
