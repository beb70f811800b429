//! Hyperparameters: what a client may ask for, its bounds, and what every absent or `auto` value becomes.

use serde::{Deserialize, Serialize};

use crate::safety::AlignmentPoint;
use crate::{Invalid, Safety};

/// How the learning rate moves after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    /// It stays.
    Constant,
    /// It falls in a straight line to zero at the last step.
    Linear,
    /// It falls along half a cosine to zero at the last step.
    Cosine,
}

/// In what numbers the frozen base computes. LoRA weights, their gradients and the optimiser are float32 in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// float32: exact, and the reference.
    F32,
    /// bfloat16: half the memory, and faster on hardware that has it.
    Bf16,
}

/// What becomes of a row with more tokens than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongRows {
    /// The job is refused, and the error says how many there are.
    Error,
    /// The row's end is cut away, because the client asked for it.
    Truncate,
}

/// Activation checkpointing: what the backward pass computes again instead of keeping it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Nothing: the fastest.
    #[default]
    Nothing,
    /// The feed-forward's inside, which is more than half of what is kept: about a quarter more time.
    FeedForward,
    /// Every layer, of which only the input is kept: the least memory, about half more time.
    Layers,
}

/// One of the seven linear maps of a decoder layer that LoRA can adapt, by its name in Hugging Face's checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// Attention queries.
    QProj,
    /// Attention keys.
    KProj,
    /// Attention values.
    VProj,
    /// Attention output.
    OProj,
    /// Gate of the feed-forward block.
    GateProj,
    /// Up-projection of the feed-forward block.
    UpProj,
    /// Down-projection of the feed-forward block.
    DownProj,
}

impl Projection {
    /// All seven, in the order a layer applies them.
    pub const ALL: [Self; 7] = [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// The name in checkpoints and in PEFT's configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// The block of the layer it belongs to, `self_attn` or `mlp`, as checkpoints name it.
    #[must_use]
    pub const fn block(self) -> &'static str {
        match self {
            Self::QProj | Self::KProj | Self::VProj | Self::OProj => "self_attn",
            Self::GateProj | Self::UpProj | Self::DownProj => "mlp",
        }
    }

    /// Reads [`Self::as_str`] back.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|projection| projection.as_str() == name)
    }
}

/// What a client asked for; `None` stands for absent and for `"auto"`.
#[derive(Debug, Clone, Default, PartialEq)]
#[expect(missing_docs, reason = "each field is documented where it is resolved, on `Hyperparameters`")]
pub struct Requested {
    pub n_epochs: Option<u32>,
    pub batch_size: Option<u32>,
    pub gradient_accumulation_steps: Option<u32>,
    pub learning_rate_multiplier: Option<f64>,
    pub learning_rate: Option<f64>,
    pub lr_schedule: Option<LrSchedule>,
    pub warmup_ratio: Option<f64>,
    pub weight_decay: Option<f64>,
    pub max_grad_norm: Option<f64>,
    pub max_length: Option<u32>,
    pub long_rows: Option<LongRows>,
    pub precision: Option<Precision>,
    pub lora_rank: Option<u32>,
    pub lora_alpha: Option<f64>,
    pub lora_dropout: Option<f64>,
    pub target_modules: Option<Vec<String>>,
    pub activation_checkpointing: Option<Recompute>,
    pub length_grouping: Option<bool>,
    pub evaluate_steps: Option<u64>,
    pub early_stopping_patience: Option<u32>,
    pub row_conflicts: Option<bool>,
}

/// What a job trains with: every value decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hyperparameters {
    /// Passes over the training file, 1 to 50. Auto: as many as make 300 rows, at least 3, at most 10.
    pub n_epochs: u32,
    /// Rows in one forward pass, 1 to 256. Auto: a sixteenth of the rows, at least 1, at most 8.
    pub batch_size: u32,
    /// Forward passes whose gradients make one step, 1 to 256. A step sees `batch_size` times this many rows.
    pub gradient_accumulation_steps: u32,
    /// The peak learning rate: [`BASE_LEARNING_RATE`] times `learning_rate_multiplier`, unless given itself.
    pub learning_rate: f64,
    /// How it moves after the warm-up.
    pub lr_schedule: LrSchedule,
    /// The share of all steps during which the learning rate rises from zero, 0 to 1.
    pub warmup_ratio: f64,
    /// Decoupled weight decay of `AdamW`, 0 to 1.
    pub weight_decay: f64,
    /// The norm that the merged gradient is clipped to; 0 switches clipping off.
    pub max_grad_norm: f64,
    /// The most tokens a row may have, 16 to 131,072.
    pub max_length: u32,
    /// What becomes of a longer row.
    pub long_rows: LongRows,
    /// In what numbers the base computes.
    pub precision: Precision,
    /// The rank `r` of the adapter, 1 to 256.
    pub lora_rank: u32,
    /// The scale `α`; the adapter's output is multiplied by `α / r`.
    pub lora_alpha: f64,
    /// The share of the adapter's inputs that is dropped in training, 0 to 0.9.
    pub lora_dropout: f64,
    /// The linear maps that are adapted.
    pub target_modules: Vec<Projection>,
    /// What the backward pass computes again instead of keeping it.
    #[serde(default)]
    pub activation_checkpointing: Recompute,
    /// Whether rows of like length share a step; the order stays random otherwise.
    #[serde(default)]
    pub length_grouping: bool,
    /// Steps between measurements on the validation file; 0: at the end of every epoch.
    #[serde(default)]
    pub evaluate_steps: u64,
    /// Measurements without a better validation loss after which training ends with the best adapter; 0: never.
    #[serde(default)]
    pub early_stopping_patience: u32,
    /// Whether each row is scored by how hard it pushes against the alignment.
    #[serde(default)]
    pub row_conflicts: bool,
}

/// A value that was left open, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    /// Its name.
    pub param: &'static str,
    /// What it is now.
    pub value: String,
    /// Why.
    pub why: String,
}

/// The learning rate a `learning_rate_multiplier` of 1 means: the usual one for LoRA.
pub const BASE_LEARNING_RATE: f64 = 2e-4;

/// The most tokens a row may have, whatever the model.
const MAX_LENGTH: u32 = 131_072;

fn bounded<T: PartialOrd + std::fmt::Display + Copy>(param: &str, value: T, least: T, most: T) -> Result<T, Invalid> {
    // Written so that NaN, which compares with nothing, is refused as well.
    if value >= least && value <= most {
        return Ok(value);
    }
    Err(Invalid::new(param, "out_of_bounds", format!("{param} must lie between {least} and {most}; it is {value}")))
}

impl Requested {
    /// Decides every value for a training file of `rows` rows and a base model that sees at most `context_length` tokens.
    ///
    /// # Errors
    /// When a value is out of its bounds, a target module does not exist, or two values contradict each other.
    pub fn resolve(&self, rows: u64, context_length: Option<u32>) -> Result<Hyperparameters, Invalid> {
        if self.learning_rate.is_some() && self.learning_rate_multiplier.is_some() {
            return Err(Invalid::new(
                "learning_rate",
                "contradiction",
                "give learning_rate or learning_rate_multiplier, not both",
            ));
        }
        let multiplier = bounded("learning_rate_multiplier", self.learning_rate_multiplier.unwrap_or(1.0), 1e-6, 1e4)?;
        let learning_rate = self.learning_rate.unwrap_or(BASE_LEARNING_RATE * multiplier);
        let lora_rank = bounded("lora_rank", self.lora_rank.unwrap_or(8), 1, 256)?;
        let most_tokens = context_length.unwrap_or(MAX_LENGTH).min(MAX_LENGTH);
        let auto_epochs = clamp_u32(300_u64.div_ceil(rows.max(1)), 3, 10);
        let auto_batch = clamp_u32(rows / 16, 1, 8);
        Ok(Hyperparameters {
            n_epochs: bounded("n_epochs", self.n_epochs.unwrap_or(auto_epochs), 1, 50)?,
            batch_size: bounded("batch_size", self.batch_size.unwrap_or(auto_batch), 1, 256)?,
            gradient_accumulation_steps: bounded(
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps.unwrap_or(1),
                1,
                256,
            )?,
            learning_rate: bounded("learning_rate", learning_rate, 1e-9, 1.0)?,
            lr_schedule: self.lr_schedule.unwrap_or(LrSchedule::Linear),
            warmup_ratio: bounded("warmup_ratio", self.warmup_ratio.unwrap_or(0.03), 0.0, 1.0)?,
            weight_decay: bounded("weight_decay", self.weight_decay.unwrap_or(0.0), 0.0, 1.0)?,
            max_grad_norm: bounded("max_grad_norm", self.max_grad_norm.unwrap_or(1.0), 0.0, 1e6)?,
            max_length: bounded("max_length", self.max_length.unwrap_or(most_tokens.min(1024)), 16, most_tokens)?,
            long_rows: self.long_rows.unwrap_or(LongRows::Error),
            precision: self.precision.unwrap_or(Precision::Bf16),
            lora_rank,
            lora_alpha: bounded("lora_alpha", self.lora_alpha.unwrap_or(2.0 * f64::from(lora_rank)), 1e-3, 1e4)?,
            lora_dropout: bounded("lora_dropout", self.lora_dropout.unwrap_or(0.0), 0.0, 0.9)?,
            target_modules: self.target_modules()?,
            activation_checkpointing: self.activation_checkpointing.unwrap_or_default(),
            length_grouping: self.length_grouping.unwrap_or(false),
            evaluate_steps: bounded("evaluate_steps", self.evaluate_steps.unwrap_or(0), 0, 1_000_000)?,
            early_stopping_patience: bounded("early_stopping_patience", self.early_stopping_patience.unwrap_or(0), 0, 1000)?,
            row_conflicts: self.row_conflicts.unwrap_or(false),
        })
    }

    /// Leaves to the adapter that a run goes on from what is the adapter's: rank, scale and modules.
    ///
    /// # Errors
    /// When the client asked for others.
    pub fn take_adapter_from(&mut self, earlier: &Hyperparameters) -> Result<(), Invalid> {
        let differs = |param: &str, theirs: String| {
            let message =
                format!("the adapter this job goes on from has {param} {theirs}, which cannot be changed; leave {param} out");
            Invalid::new(param, "adapter_mismatch", message)
        };
        if self.lora_rank.is_some_and(|rank| rank != earlier.lora_rank) {
            return Err(differs("lora_rank", earlier.lora_rank.to_string()));
        }
        if self.lora_alpha.is_some_and(|alpha| alpha != earlier.lora_alpha) {
            return Err(differs("lora_alpha", earlier.lora_alpha.to_string()));
        }
        let modules: Vec<String> = earlier.target_modules.iter().map(|module| module.as_str().to_owned()).collect();
        let same = |names: &Vec<String>| modules.iter().all(|m| names.contains(m)) && names.iter().all(|n| modules.contains(n));
        if self.target_modules.as_ref().is_some_and(|names| !same(names)) {
            return Err(differs("target_modules", modules.join(", ")));
        }
        self.lora_rank = Some(earlier.lora_rank);
        self.lora_alpha = Some(earlier.lora_alpha);
        self.target_modules = Some(modules);
        Ok(())
    }

    /// What [`Self::resolve`] decided because it was left open, and why, for values that depend on the request.
    #[must_use]
    pub fn decided(&self, resolved: &Hyperparameters, rows: u64, context_length: Option<u32>) -> Vec<Decided> {
        let mut decided = Vec::new();
        let mut note = |is_open: bool, param: &'static str, value: String, why: String| {
            if is_open {
                decided.push(Decided { param, value, why });
            }
        };
        let h = resolved;
        note(
            self.n_epochs.is_none(),
            "n_epochs",
            h.n_epochs.to_string(),
            format!("as many passes over the {rows} rows as make 300 rows, at least 3 and at most 10"),
        );
        note(
            self.batch_size.is_none(),
            "batch_size",
            h.batch_size.to_string(),
            format!("a sixteenth of the {rows} rows, at least 1 and at most 8"),
        );
        note(
            self.learning_rate.is_none() && self.learning_rate_multiplier.is_none(),
            "learning_rate",
            h.learning_rate.to_string(),
            "the usual one for LoRA".into(),
        );
        note(
            self.learning_rate.is_none() && self.learning_rate_multiplier.is_none(),
            "learning_rate_multiplier",
            "1".into(),
            "the learning rate as it stands".into(),
        );
        note(
            self.max_length.is_none(),
            "max_length",
            h.max_length.to_string(),
            match context_length {
                Some(tokens) if tokens < 1024 => format!("the model sees at most {tokens} tokens"),
                _ => "enough for most conversations; longer rows are refused unless it is raised".into(),
            },
        );
        note(self.precision.is_none(), "precision", "bf16".into(), "half the memory of f32, and faster".into());
        note(
            self.lora_rank.is_none(),
            "lora_rank",
            h.lora_rank.to_string(),
            "the paper's; more is seldom better for a few thousand rows".into(),
        );
        note(self.lora_alpha.is_none(), "lora_alpha", h.lora_alpha.to_string(), "twice the rank".into());
        note(
            self.target_modules.is_none(),
            "target_modules",
            h.target_modules.iter().map(|m| m.as_str()).collect::<Vec<_>>().join(", "),
            "all linear maps of a layer".into(),
        );
        let usual = [
            (
                self.gradient_accumulation_steps.is_none(),
                "gradient_accumulation_steps",
                h.gradient_accumulation_steps.to_string(),
                "a batch is a step",
            ),
            (self.lr_schedule.is_none(), "lr_schedule", word(&h.lr_schedule), "falls to zero by the last step"),
            (
                self.warmup_ratio.is_none(),
                "warmup_ratio",
                h.warmup_ratio.to_string(),
                "a few small steps first keep the start steady",
            ),
            (self.weight_decay.is_none(), "weight_decay", h.weight_decay.to_string(), "the low rank restrains enough"),
            (self.max_grad_norm.is_none(), "max_grad_norm", h.max_grad_norm.to_string(), "one odd batch moves little"),
            (self.lora_dropout.is_none(), "lora_dropout", h.lora_dropout.to_string(), "raise it where few rows are seen often"),
            (self.long_rows.is_none(), "long_rows", word(&h.long_rows), "nothing is cut off unasked"),
            (
                self.activation_checkpointing.is_none(),
                "activation_checkpointing",
                word(&h.activation_checkpointing),
                "fastest where memory is enough",
            ),
            (
                self.length_grouping.is_none(),
                "length_grouping",
                h.length_grouping.to_string(),
                "rows come in an order that only the seed decides",
            ),
            (
                self.evaluate_steps.is_none(),
                "evaluate_steps",
                h.evaluate_steps.to_string(),
                "the validation file is measured at each epoch's end",
            ),
            (
                self.early_stopping_patience.is_none(),
                "early_stopping_patience",
                h.early_stopping_patience.to_string(),
                "every epoch is trained",
            ),
            (
                self.row_conflicts.is_none(),
                "row_conflicts",
                h.row_conflicts.to_string(),
                "on where a safety report is made, which names the rows that push hardest against the alignment",
            ),
        ];
        for (is_open, param, value, why) in usual {
            note(is_open, param, value, why.into());
        }
        decided
    }

    fn target_modules(&self) -> Result<Vec<Projection>, Invalid> {
        let Some(names) = &self.target_modules else { return Ok(Projection::ALL.to_vec()) };
        let known = Projection::ALL.map(Projection::as_str).join(", ");
        let mut modules = names
            .iter()
            .enumerate()
            .map(|(i, name)| {
                Projection::parse(name).ok_or_else(|| {
                    Invalid::new(
                        format!("target_modules[{i}]"),
                        "unknown_target_module",
                        format!("{name:?} is no target module; there are {known}"),
                    )
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        modules.sort_unstable();
        modules.dedup();
        if modules.is_empty() {
            return Err(Invalid::new("target_modules", "out_of_bounds", format!("name at least one of {known}")));
        }
        Ok(modules)
    }
}

/// The word that stands for a choice.
fn word(choice: &impl Serialize) -> String {
    serde_json::to_value(choice).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn clamp_u32(value: u64, least: u32, most: u32) -> u32 {
    u32::try_from(value).unwrap_or(most).clamp(least, most)
}

impl Hyperparameters {
    /// Rows a step sees.
    #[must_use]
    pub fn rows_per_step(&self) -> u64 {
        u64::from(self.batch_size) * u64::from(self.gradient_accumulation_steps)
    }

    /// Makes sure that a plan that was not made by [`Requested::resolve`] is one that could have been.
    ///
    /// # Errors
    /// When a number is out of its bounds.
    pub fn check(&self) -> Result<(), Invalid> {
        bounded("n_epochs", self.n_epochs, 1, 50)?;
        bounded("batch_size", self.batch_size, 1, 256)?;
        bounded("gradient_accumulation_steps", self.gradient_accumulation_steps, 1, 256)?;
        bounded("learning_rate", self.learning_rate, 1e-9, 1.0)?;
        bounded("warmup_ratio", self.warmup_ratio, 0.0, 1.0)?;
        bounded("weight_decay", self.weight_decay, 0.0, 1.0)?;
        bounded("max_grad_norm", self.max_grad_norm, 0.0, 1e6)?;
        bounded("lora_rank", self.lora_rank, 1, 256)?;
        bounded("lora_alpha", self.lora_alpha, 1e-3, 1e4)?;
        bounded("lora_dropout", self.lora_dropout, 0.0, 0.9)?;
        bounded("max_length", self.max_length, 1, MAX_LENGTH)?;
        Ok(())
    }

    /// Makes sure that nothing is asked for that the method cannot give.
    ///
    /// # Errors
    /// When rows are to be scored against an alignment gradient that the method does not have.
    pub fn check_with(&self, safety: &Safety) -> Result<(), Invalid> {
        if self.row_conflicts && !safety.defense.compares_gradients() {
            let message = format!(
                "row_conflicts needs an alignment gradient to compare rows with, and `{}` has none",
                safety.defense.as_str()
            );
            return Err(Invalid::new("row_conflicts", "contradiction", message));
        }
        if self.row_conflicts && safety.alignment_point == AlignmentPoint::Lookahead {
            let message =
                "row_conflicts compares rows with the alignment gradient at the current weights; leave alignment_point out";
            return Err(Invalid::new("row_conflicts", "contradiction", message));
        }
        Ok(())
    }

    /// Steps on the training file's rows; an epoch's last step may hold fewer rows. See [`crate::steps`] for those of a run.
    #[must_use]
    pub fn total_steps(&self, rows: u64) -> u64 {
        rows.div_ceil(self.rows_per_step()) * u64::from(self.n_epochs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_values_follow_the_size_of_the_file() -> Result<(), Invalid> {
        let small = Requested::default().resolve(10, None)?;
        assert_eq!((small.n_epochs, small.batch_size), (10, 1));
        let large = Requested::default().resolve(10_000, None)?;
        assert_eq!((large.n_epochs, large.batch_size), (3, 8));
        assert_eq!(large.total_steps(10_000), 3 * 1250);
        Ok(())
    }

    #[test]
    fn a_value_out_of_bounds_is_named() {
        let cases = [
            (Requested { n_epochs: Some(0), ..Default::default() }, "n_epochs"),
            (Requested { batch_size: Some(257), ..Default::default() }, "batch_size"),
            (Requested { learning_rate: Some(f64::NAN), ..Default::default() }, "learning_rate"),
            (Requested { learning_rate_multiplier: Some(0.0), ..Default::default() }, "learning_rate_multiplier"),
            (Requested { lora_rank: Some(0), ..Default::default() }, "lora_rank"),
            (Requested { lora_dropout: Some(1.0), ..Default::default() }, "lora_dropout"),
            (Requested { max_length: Some(4), ..Default::default() }, "max_length"),
            (Requested { target_modules: Some(vec![]), ..Default::default() }, "target_modules"),
            (
                Requested { target_modules: Some(vec!["q_proj".into(), "lm_head".into()]), ..Default::default() },
                "target_modules[1]",
            ),
        ];
        for (request, param) in cases {
            assert_eq!(request.resolve(100, None).map_err(|e| e.param), Err(param.to_owned()));
        }
    }

    #[test]
    fn a_multiplier_scales_the_usual_learning_rate() -> Result<(), Invalid> {
        let resolved = Requested { learning_rate_multiplier: Some(2.0), ..Default::default() }.resolve(100, None)?;
        assert!((resolved.learning_rate - 4e-4).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn steps_cover_every_row_in_every_epoch() -> Result<(), Invalid> {
        let plan =
            Requested { n_epochs: Some(2), batch_size: Some(4), gradient_accumulation_steps: Some(2), ..Default::default() }
                .resolve(17, None)?;
        assert_eq!(plan.total_steps(17), 6);
        Ok(())
    }
}
