//! A request for a job as the wire has it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use holdfast_domain::Invalid;
use holdfast_domain::hyperparameters::{LongRows, LrSchedule, Precision, Recompute, Requested};
use holdfast_domain::limits::{MAX_METADATA_KEY_CHARS, MAX_METADATA_PAIRS, MAX_METADATA_VALUE_CHARS};
use holdfast_domain::safety::{AlignmentPoint, Defense, KlPositions, ProjectionOf, ProjectionSpace, RequestedSafety};
use serde::{Deserialize, Deserializer, de};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

use crate::error::shortened;

use super::words::{
    ActivationCheckpointingName, AlignmentPointName, DefenseName, KlPositionsName, LongRowsName, LrScheduleName, PrecisionName,
    ProjectionName, ProjectionSpaceName, TargetModule,
};

/// A request for a job.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CreateJob {
    /// A base model's name, see `GET /v1/models`; or a fine-tuned model or a checkpoint of the project, whose adapter the job goes
    /// on training.
    #[schema(example = "SmolLM2-135M-Instruct")]
    pub(crate) model: String,
    /// The id of an uploaded file.
    #[schema(example = "file-0192f3a4000070008000000000000001")]
    pub(crate) training_file: String,
    /// The id of an uploaded file to measure the model on, before and after.
    pub(crate) validation_file: Option<String>,
    /// A part of the model's name.
    #[schema(example = "reviews", pattern = "^[A-Za-z0-9._-]{1,64}$")]
    pub(crate) suffix: Option<String>,
    /// Decides every random choice of the run; 42 when absent.
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    pub(crate) seed: Option<u64>,
    /// At most 16 pairs; keys of at most 64 characters, values of at most 512.
    #[schema(value_type = Option<BTreeMap<String, String>>, example = json!({"team": "reviews"}))]
    pub(crate) metadata: Option<BTreeMap<String, String>>,
    /// None is supported.
    #[schema(value_type = Option<Vec<Object>>, max_items = 0)]
    pub(crate) integrations: Option<Vec<serde::de::IgnoredAny>>,
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
    #[schema(example = "supervised", pattern = "^supervised$")]
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

/// Describes `Auto<T>`, which no derived schema can: a number within bounds, or `"auto"`.
macro_rules! auto_schema {
    ($name:ident, $of:ident, $least:expr, $most:expr) => {
        pub(crate) struct $name;

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let word = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["auto"]));
                let number = ObjectBuilder::new().schema_type(Type::$of).minimum(Some($least)).maximum(Some($most));
                let description = concat!("A value from ", stringify!($least), " to ", stringify!($most), ", or `auto`.");
                OneOfBuilder::new().item(word).item(number).description(Some(description)).into()
            }
        }

        impl ToSchema for $name {
            fn name() -> Cow<'static, str> {
                stringify!($name).into()
            }
        }
    };
}

auto_schema!(AutoEpochs, Integer, 1, 50);
auto_schema!(AutoRows, Integer, 1, 256);
auto_schema!(AutoFactor, Number, 0.000001, 10_000.0);

/// Hyperparameters; what is absent is decided by the service.
#[derive(Debug, Default, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RequestedHyperparameters {
    /// Passes over the training file, 1 to 50.
    #[schema(value_type = Option<AutoEpochs>)]
    n_epochs: Option<Auto<u32>>,
    /// Rows in one forward pass, 1 to 256.
    #[schema(value_type = Option<AutoRows>)]
    batch_size: Option<Auto<u32>>,
    /// Times the usual learning rate of 2e-4.
    #[schema(value_type = Option<AutoFactor>)]
    learning_rate_multiplier: Option<Auto<f64>>,
    /// Extension: the peak learning rate itself.
    #[schema(minimum = 0.000000001, maximum = 1.0)]
    learning_rate: Option<f64>,
    /// Extension: forward passes whose gradients make one step, 1 to 256.
    #[schema(minimum = 1, maximum = 256)]
    gradient_accumulation_steps: Option<u32>,
    /// Extension: `constant`, `linear` or `cosine`.
    #[schema(value_type = Option<LrScheduleName>)]
    lr_schedule: Option<LrSchedule>,
    /// Extension: the share of the steps over which the learning rate rises, 0 to 1.
    #[schema(minimum = 0.0, maximum = 1.0)]
    warmup_ratio: Option<f64>,
    /// Extension: 0 to 1.
    #[schema(minimum = 0.0, maximum = 1.0)]
    weight_decay: Option<f64>,
    /// Extension: the norm the gradient is clipped to; 0 for none.
    #[schema(minimum = 0.0, maximum = 1_000_000.0)]
    max_grad_norm: Option<f64>,
    /// Extension: the most tokens a row may have, 16 to 131,072.
    #[schema(minimum = 16, maximum = 131_072)]
    max_length: Option<u32>,
    /// Extension: `error` refuses a file with longer rows, `truncate` cuts their ends off.
    #[schema(value_type = Option<LongRowsName>)]
    long_rows: Option<LongRows>,
    /// Extension: `f32` or `bf16`.
    #[schema(value_type = Option<PrecisionName>)]
    precision: Option<Precision>,
    /// Extension: the adapter's rank, 1 to 256.
    #[schema(minimum = 1, maximum = 256)]
    lora_rank: Option<u32>,
    /// Extension: the adapter's scale.
    #[schema(minimum = 0.001, maximum = 10_000.0)]
    lora_alpha: Option<f64>,
    /// Extension: 0 to 0.9.
    #[schema(minimum = 0.0, maximum = 0.9)]
    lora_dropout: Option<f64>,
    /// Extension: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`.
    #[schema(value_type = Option<Vec<TargetModule>>, min_items = 1)]
    target_modules: Option<Vec<String>>,
    /// Extension: what the backward pass computes again instead of keeping it: `nothing`, `feed_forward` or `layers`.
    #[schema(value_type = Option<ActivationCheckpointingName>)]
    activation_checkpointing: Option<Recompute>,
    /// Extension: whether rows of like length share a step.
    length_grouping: Option<bool>,
    /// Extension: steps between measurements on the validation file; 0 for the end of every epoch.
    #[schema(minimum = 0, maximum = 1_000_000)]
    evaluate_steps: Option<u64>,
    /// Extension: measurements without a better validation loss after which training ends with the best adapter; 0 for never.
    #[schema(minimum = 0, maximum = 1000)]
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
    #[schema(value_type = Option<DefenseName>)]
    defense: Option<Defense>,
    /// The method's strength, 0 to 100. Left out it is the operator's least, and 10 where that is less under `safegrad` on `deciding`
    /// positions.
    #[schema(minimum = 0.0, maximum = 100.0)]
    rho: Option<f64>,
    /// `response`, `all` or `deciding` (the first tokens of a response and its end count five times as much, and of the rows the worse half).
    /// Left out it is `deciding` under `safegrad`, else `response`; `response` with a `rho` of 1 is the paper's.
    #[schema(value_type = Option<KlPositionsName>)]
    kl_positions: Option<KlPositions>,
    /// `batch` or `per_row`: whose gradient is projected.
    #[schema(value_type = Option<ProjectionName>)]
    projection: Option<ProjectionOf>,
    /// `gradient` or `update`: where the projection takes place.
    #[schema(value_type = Option<ProjectionSpaceName>)]
    projection_space: Option<ProjectionSpace>,
    /// `current` or `lookahead`: at which weights the alignment gradient is taken.
    #[schema(value_type = Option<AlignmentPointName>)]
    alignment_point: Option<AlignmentPoint>,
    /// The budget of mean KL in nats, under `held`.
    #[schema(minimum = 0.000001, maximum = 100.0)]
    budget: Option<f64>,
    /// The operator's alignment set by its name.
    alignment_set: Option<String>,
    /// Alignment rows of a step: at least those of the operator's policy, where it names a number.
    #[schema(minimum = 1, maximum = 4096)]
    alignment_batch_size: Option<u32>,
    /// Whether the adapter must pass the safety gate; it must all the same where the operator's policy says so.
    gate: Option<bool>,
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
            alignment_batch_size: s.alignment_batch_size,
            gate: s.gate,
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
            let message = format!("method.type {:?} is not supported; supported: \"supervised\"", shortened(&method.r#type));
            return Err(Invalid::new("method.type", "unsupported_method", message));
        }
        let new = self.method.as_mut().and_then(|m| m.supervised.as_mut()).and_then(|s| s.hyperparameters.take());
        // Some clients always send the older place, empty.
        match (self.hyperparameters.take().filter(|old| *old != RequestedHyperparameters::default()), new) {
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
