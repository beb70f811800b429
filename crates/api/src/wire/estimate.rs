//! What a job would take.

use holdfast_dataset::files::FileReport;
use holdfast_domain::hyperparameters::Decided;
use holdfast_domain::ids::FileId;
use holdfast_domain::invalid::LineError;
use holdfast_domain::progress::MemoryPlan;
use serde::Serialize;
use utoipa::ToSchema;

use super::job::{ResolvedHyperparameters, ShownSafety};

/// What a job would take. Nothing was created.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Estimate {
    #[schema(example = "fine_tuning.job.estimate")]
    pub(crate) object: &'static str,
    #[schema(example = "SmolLM2-135M-Instruct")]
    pub(crate) model: String,
    /// The base under it.
    #[schema(example = "SmolLM2-135M-Instruct")]
    pub(crate) base_model: String,
    /// Whether a job of this request would pass the check of its files.
    pub(crate) files_can_be_used: bool,
    pub(crate) training_file: FileEstimate,
    pub(crate) validation_file: Option<FileEstimate>,
    /// What is worth a look although it keeps nothing from going on: rows that stand twice, or in both files.
    #[schema(example = json!(["training_file: 1 row repeats an earlier one: line 9 repeats line 2"]))]
    pub(crate) warnings: Vec<String>,
    /// Every hyperparameter, decided.
    pub(crate) hyperparameters: ResolvedHyperparameters,
    /// What the service decided because the request left it open, and why.
    pub(crate) decided: Vec<DecidedValue>,
    pub(crate) safety: ShownSafety,
    /// Optimiser steps.
    pub(crate) steps: u64,
    /// Tokens of the training file that are read over all epochs.
    pub(crate) trained_tokens: u64,
    pub(crate) memory: MemoryEstimate,
    /// Absent while no worker has finished a run to measure by.
    pub(crate) time: Option<TimeEstimate>,
}

/// What the check of a file found.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FileEstimate {
    #[schema(value_type = String, example = "file-0192f3a4000070008000000000000001")]
    id: FileId,
    /// Rows that can be used.
    rows: u64,
    tokens: u64,
    /// Tokens that count towards the loss.
    supervised_tokens: u64,
    /// Tokens of the longest row.
    longest_row: u64,
    /// How many lines cannot be used.
    error_count: u64,
    /// The bad lines, at most 1,000.
    #[schema(value_type = Vec<crate::error::BadLine>)]
    errors: Vec<LineError>,
}

impl FileEstimate {
    pub(crate) fn new(id: FileId, found: FileReport) -> Self {
        Self {
            id,
            rows: found.report.rows,
            tokens: found.report.tokens,
            supervised_tokens: found.report.supervised_tokens,
            longest_row: found.longest.first().map_or(0, |(tokens, _)| *tokens as u64),
            error_count: found.report.error_count,
            errors: found.report.errors,
        }
    }
}

/// A value that was left open, and what became of it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DecidedValue {
    #[schema(example = "n_epochs")]
    param: &'static str,
    #[schema(example = "3")]
    value: String,
    #[schema(example = "as many passes over the 600 rows as make 300 rows, at least 3 and at most 10")]
    why: String,
}

impl From<Decided> for DecidedValue {
    fn from(decided: Decided) -> Self {
        Self { param: decided.param, value: decided.value, why: decided.why }
    }
}

/// Memory the run would need, by what it is for.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct MemoryEstimate {
    total_bytes: u64,
    weights_bytes: u64,
    optimizer_bytes: u64,
    activations_bytes: u64,
    logits_bytes: u64,
    reference_bytes: u64,
    program_bytes: u64,
}

impl From<MemoryPlan> for MemoryEstimate {
    fn from(plan: MemoryPlan) -> Self {
        Self {
            total_bytes: plan.total_bytes(),
            weights_bytes: plan.weights_bytes,
            optimizer_bytes: plan.optimizer_bytes,
            activations_bytes: plan.activations_bytes,
            logits_bytes: plan.logits_bytes,
            reference_bytes: plan.reference_bytes,
            program_bytes: plan.program_bytes,
        }
    }
}

/// How long the training would take, by what workers measured.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TimeEstimate {
    /// Of the training alone: waiting, checking and measuring come on top.
    pub(crate) seconds: f64,
    pub(crate) tokens_per_second: f64,
    /// Which run it is taken from, and how it was carried over.
    #[schema(example = "measured on cuda:0 with SmolLM2-135M-Instruct in bf16 under safegrad")]
    pub(crate) basis: String,
}
