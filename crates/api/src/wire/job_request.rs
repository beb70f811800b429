//! A request for a job as the wire has it.

use std::collections::BTreeMap;

use holdfast_domain::Invalid;
use holdfast_domain::hyperparameters::{LongRows, LrSchedule, Precision, Recompute, Requested};
use holdfast_domain::limits::{MAX_METADATA_KEY_CHARS, MAX_METADATA_PAIRS, MAX_METADATA_VALUE_CHARS};
use holdfast_domain::safety::{AlignmentPoint, Defense, KlPositions, ProjectionOf, ProjectionSpace, RequestedSafety};
use serde::{Deserialize, Deserializer, de};
use utoipa::ToSchema;

/// A request for a job.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CreateJob {
    /// The base model's name, see `GET /v1/models`.
    #[schema(example = "SmolLM2-135M-Instruct")]
    pub(crate) model: String,
    /// The id of an uploaded file.
    #[schema(example = "file-0192f3a4000070008000000000000001")]
    pub(crate) training_file: String,
    /// The id of an uploaded file to measure the model on, before and after.
    pub(crate) validation_file: Option<String>,
    /// A part of the model's name, 1 to 64 characters.
    #[schema(example = "reviews")]
    pub(crate) suffix: Option<String>,
    /// Decides every random choice of the run; 42 when absent.
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    pub(crate) seed: Option<u64>,
    /// At most 16 pairs.
    pub(crate) metadata: Option<BTreeMap<String, String>>,
    /// The older place of `method.supervised.hyperparameters`.
    pub(crate) hyperparameters: Option<RequestedHyperparameters>,
    /// How to train.
    pub(crate) method: Option<Method>,
    /// Extension: what to hold to. Never weaker than the operator's floor.
    pub(crate) safety: Option<SafetyRequest>,
}

/// How to train.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Method {
    /// `supervised` is what this service does.
    #[schema(example = "supervised")]
    r#type: String,
    supervised: Option<Supervised>,
}

/// Supervised fine-tuning.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Supervised {
    hyperparameters: Option<RequestedHyperparameters>,
}

/// A value, or `"auto"` to leave it to the service.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Auto<T> {
    Auto,
    Value(T),
}

impl<T: Copy> Auto<T> {
    fn value(self) -> Option<T> {
        match self {
            Self::Auto => None,
            Self::Value(value) => Some(value),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Auto<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either<T> {
            Value(T),
            Word(String),
        }
        match Either::deserialize(deserializer) {
            Ok(Either::Value(value)) => Ok(Self::Value(value)),
            Ok(Either::Word(word)) if word == "auto" => Ok(Self::Auto),
            _ => Err(de::Error::custom("expected a number in bounds, or \"auto\"")),
        }
    }
}

/// A whole number, or `"auto"`.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes Auto<u32>, which no derived schema can")]
pub(crate) enum AutoInteger {
    Word(AutoWord),
    Value(u32),
}

/// A number, or `"auto"`.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes Auto<f64>, which no derived schema can")]
pub(crate) enum AutoNumber {
    Word(AutoWord),
    Value(f64),
}

/// Leaves a value to the service.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AutoWord {
    Auto,
}

/// Hyperparameters; what is absent is decided by the service.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RequestedHyperparameters {
    /// Passes over the training file, 1 to 50.
    #[schema(value_type = Option<AutoInteger>)]
    n_epochs: Option<Auto<u32>>,
    /// Rows in one forward pass, 1 to 256.
    #[schema(value_type = Option<AutoInteger>)]
    batch_size: Option<Auto<u32>>,
    /// Times the usual learning rate of 2e-4.
    #[schema(value_type = Option<AutoNumber>)]
    learning_rate_multiplier: Option<Auto<f64>>,
    /// Extension: the peak learning rate itself.
    learning_rate: Option<f64>,
    /// Extension: forward passes whose gradients make one step, 1 to 256.
    gradient_accumulation_steps: Option<u32>,
    /// Extension: `constant`, `linear` or `cosine`.
    #[schema(value_type = Option<String>, example = "linear")]
    lr_schedule: Option<LrSchedule>,
    /// Extension: the share of the steps over which the learning rate rises, 0 to 1.
    warmup_ratio: Option<f64>,
    /// Extension: 0 to 1.
    weight_decay: Option<f64>,
    /// Extension: the norm the gradient is clipped to; 0 for none.
    max_grad_norm: Option<f64>,
    /// Extension: the most tokens a row may have, 16 to 131,072.
    max_length: Option<u32>,
    /// Extension: `error` refuses a file with longer rows, `truncate` cuts their ends off.
    #[schema(value_type = Option<String>, example = "error")]
    long_rows: Option<LongRows>,
    /// Extension: `f32` or `bf16`.
    #[schema(value_type = Option<String>, example = "bf16")]
    precision: Option<Precision>,
    /// Extension: the adapter's rank, 1 to 256.
    lora_rank: Option<u32>,
    /// Extension: the adapter's scale.
    lora_alpha: Option<f64>,
    /// Extension: 0 to 0.9.
    lora_dropout: Option<f64>,
    /// Extension: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`.
    target_modules: Option<Vec<String>>,
    /// Extension: what the backward pass computes again instead of keeping it: `nothing`, `feed_forward` or `layers`.
    #[schema(value_type = Option<String>, example = "nothing")]
    activation_checkpointing: Option<Recompute>,
    /// Extension: whether rows of like length share a step.
    length_grouping: Option<bool>,
    /// Extension: steps between measurements on the validation file; 0 for the end of every epoch.
    evaluate_steps: Option<u64>,
    /// Extension: measurements without a better validation loss after which training ends with the best adapter; 0 for never.
    early_stopping_patience: Option<u32>,
    /// Extension: whether each row is scored by how hard it pushes against the alignment.
    row_conflicts: Option<bool>,
}

impl From<RequestedHyperparameters> for Requested {
    fn from(h: RequestedHyperparameters) -> Self {
        Self {
            n_epochs: h.n_epochs.and_then(Auto::value),
            batch_size: h.batch_size.and_then(Auto::value),
            learning_rate_multiplier: h.learning_rate_multiplier.and_then(Auto::value),
            learning_rate: h.learning_rate,
            gradient_accumulation_steps: h.gradient_accumulation_steps,
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

/// Extension: what a job should hold to.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SafetyRequest {
    /// `none`, `safe_mix`, `lisa`, `kl_penalty`, `sbr`, `pcgrad`, `safegrad` or `held`.
    #[schema(value_type = Option<String>, example = "safegrad")]
    defense: Option<Defense>,
    /// The method's strength, 0 to 100.
    rho: Option<f64>,
    /// `response` or `all`.
    #[schema(value_type = Option<String>, example = "response")]
    kl_positions: Option<KlPositions>,
    /// `batch` or `per_row`: whose gradient is projected.
    #[schema(value_type = Option<String>, example = "batch")]
    projection: Option<ProjectionOf>,
    /// `gradient` or `update`: where the projection takes place.
    #[schema(value_type = Option<String>, example = "gradient")]
    projection_space: Option<ProjectionSpace>,
    /// `current` or `lookahead`: at which weights the alignment gradient is taken.
    #[schema(value_type = Option<String>, example = "current")]
    alignment_point: Option<AlignmentPoint>,
    /// The budget of mean KL in nats, under `held`.
    budget: Option<f64>,
    /// The operator's alignment set by its name.
    alignment_set: Option<String>,
}

impl From<SafetyRequest> for RequestedSafety {
    fn from(s: SafetyRequest) -> Self {
        Self {
            defense: s.defense,
            rho: s.rho,
            kl_positions: s.kl_positions,
            projection: s.projection,
            projection_space: s.projection_space,
            alignment_point: s.alignment_point,
            budget: s.budget,
            alignment_set: s.alignment_set,
        }
    }
}

impl CreateJob {
    /// The hyperparameters, from whichever of the two places they stand in, and that place's path for errors.
    pub(crate) fn take_hyperparameters(&mut self) -> Result<(Requested, &'static str), Invalid> {
        const OLD: &str = "hyperparameters";
        const NEW: &str = "method.supervised.hyperparameters";
        if let Some(method) = &self.method
            && method.r#type != "supervised"
        {
            let message = format!("method.type {:?} is not supported; supported: \"supervised\"", method.r#type);
            return Err(Invalid::new("method.type", "unsupported_method", message));
        }
        let new = self.method.as_mut().and_then(|m| m.supervised.as_mut()).and_then(|s| s.hyperparameters.take());
        match (self.hyperparameters.take(), new) {
            (Some(_), Some(_)) => {
                Err(Invalid::new(OLD, "contradiction", format!("give the hyperparameters in {NEW} alone, not also in {OLD}")))
            }
            (Some(old), None) => Ok((old.into(), OLD)),
            (None, new) => Ok((new.unwrap_or_default().into(), NEW)),
        }
    }

    /// The metadata, within its limits.
    pub(crate) fn metadata(&self) -> Result<serde_json::Value, Invalid> {
        let pairs = self.metadata.clone().unwrap_or_default();
        if pairs.len() > MAX_METADATA_PAIRS {
            return Err(Invalid::new("metadata", "out_of_bounds", format!("metadata takes at most {MAX_METADATA_PAIRS} pairs")));
        }
        for (key, value) in &pairs {
            if key.chars().count() > MAX_METADATA_KEY_CHARS || value.chars().count() > MAX_METADATA_VALUE_CHARS {
                let message = format!(
                    "a metadata key has at most {MAX_METADATA_KEY_CHARS} characters and its value at most {MAX_METADATA_VALUE_CHARS}"
                );
                return Err(Invalid::new("metadata", "out_of_bounds", message));
            }
            if key.contains('\0') || value.contains('\0') {
                return Err(Invalid::new("metadata", "invalid_text", "metadata must not hold the character U+0000"));
            }
        }
        Ok(serde_json::json!(pairs))
    }
}
