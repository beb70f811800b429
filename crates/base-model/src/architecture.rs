//! The architecture of a base model, read from a Hugging Face `config.json`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A Llama-family decoder: pre-norm blocks of grouped-query attention with rotary positions and a gated SiLU feed-forward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Architecture {
    /// Token ids the embedding knows.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Positions the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square before its root is taken.
    pub rms_norm_eps: f64,
    /// The base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
}

/// How rotary frequencies are stretched for contexts longer than the first training's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All divided by `factor`.
    Linear {
        /// By how much.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, the band between blended.
    Llama3 {
        /// By how much low frequencies are divided.
        factor: f64,
        /// Wavelengths longer than the original context over this are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths shorter than the original context over this are high frequencies.
        high_freq_factor: f64,
        /// Positions of the first training.
        original_max_position_embeddings: f64,
    },
}

/// Why a model cannot be used: what it has that is not supported, or lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config.json: {0}")]
pub struct Unsupported(pub String);

fn unsupported<T>(reason: impl Into<String>) -> Result<T, Unsupported> {
    Err(Unsupported(reason.into()))
}

/// A tensor an architecture needs: its name in Hugging Face's checkpoints, and its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// As `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[out, in]` for linear maps, `[width]` for norms.
    pub shape: Vec<usize>,
}

/// The largest value any size may have: keeps every product of two of them far from overflow.
const MAX_SIZE: u64 = 1 << 24;

impl Architecture {
    /// Reads the parsed `config.json`.
    ///
    /// # Errors
    /// When the model is of another family, uses something the trainer does not compute, or a number is missing or absurd.
    pub fn from_config(config: &Value) -> Result<Self, Unsupported> {
        match config.get("model_type").and_then(Value::as_str) {
            Some("llama") => {}
            Some(other) => return unsupported(format!("model_type {other:?} is not supported; supported: \"llama\"")),
            None => return unsupported("model_type is missing"),
        }
        for flag in ["attention_bias", "mlp_bias"] {
            if config.get(flag).and_then(Value::as_bool) == Some(true) {
                return unsupported(format!("{flag} is not supported"));
            }
        }
        if let Some(activation) = config.get("hidden_act").and_then(Value::as_str)
            && activation != "silu"
        {
            return unsupported(format!("hidden_act {activation:?} is not supported; supported: \"silu\""));
        }
        let hidden_size = size(config, "hidden_size")?;
        let num_attention_heads = size(config, "num_attention_heads")?;
        let num_key_value_heads = optional_size(config, "num_key_value_heads")?.unwrap_or(num_attention_heads);
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return unsupported(format!(
                "{num_attention_heads} attention heads do not divide among {num_key_value_heads} key/value heads"
            ));
        }
        let head_dim = match optional_size(config, "head_dim")? {
            Some(width) => width,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => return unsupported("hidden_size does not divide among the attention heads, and head_dim is missing"),
        };
        if !head_dim.is_multiple_of(2) {
            return unsupported(format!("head_dim {head_dim} is odd; rotary positions need pairs"));
        }
        let (rope_theta, rope_scaling) = rope(config)?;
        Ok(Self {
            vocab_size: size(config, "vocab_size")?,
            hidden_size,
            intermediate_size: size(config, "intermediate_size")?,
            num_hidden_layers: size(config, "num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings: optional_size(config, "max_position_embeddings")?.unwrap_or(2048),
            rms_norm_eps: number(config, "rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
        })
    }

    /// Every tensor the model must have, in the order they are used.
    #[must_use]
    pub fn tensors(&self) -> Vec<ExpectedTensor> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let mut tensors = Vec::new();
        let mut expect = |name: String, shape: &[usize]| tensors.push(ExpectedTensor { name, shape: shape.to_vec() });
        expect("model.embed_tokens.weight".into(), &[self.vocab_size, hidden]);
        for layer in 0..self.num_hidden_layers {
            let mut within = |name: &str, shape: &[usize]| expect(format!("model.layers.{layer}.{name}.weight"), shape);
            within("input_layernorm", &[hidden]);
            within("self_attn.q_proj", &[queries, hidden]);
            within("self_attn.k_proj", &[keys, hidden]);
            within("self_attn.v_proj", &[keys, hidden]);
            within("self_attn.o_proj", &[hidden, queries]);
            within("post_attention_layernorm", &[hidden]);
            within("mlp.gate_proj", &[inner, hidden]);
            within("mlp.up_proj", &[inner, hidden]);
            within("mlp.down_proj", &[hidden, inner]);
        }
        expect("model.norm.weight".into(), &[hidden]);
        if !self.tie_word_embeddings {
            expect("lm_head.weight".into(), &[self.vocab_size, hidden]);
        }
        tensors
    }

    /// The `config.json` that [`Self::from_config`] reads back, for models that come without one.
    #[must_use]
    pub fn to_config(&self) -> Value {
        let mut rope = serde_json::to_value(self.rope_scaling).unwrap_or(Value::Null);
        rope["rope_theta"] = self.rope_theta.into();
        serde_json::json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": rope,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "tie_word_embeddings": self.tie_word_embeddings,
        })
    }
}

fn optional_size(config: &Value, key: &str) -> Result<Option<usize>, Unsupported> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(n @ 1..=MAX_SIZE) => Ok(usize::try_from(n).ok()),
            _ => unsupported(format!("{key} must be a whole number from 1 to {MAX_SIZE}; it is {value}")),
        },
    }
}

fn size(config: &Value, key: &str) -> Result<usize, Unsupported> {
    optional_size(config, key)?.map_or_else(|| unsupported(format!("{key} is missing")), Ok)
}

fn number(config: &Value, key: &str) -> Result<Option<f64>, Unsupported> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(n) if n.is_finite() && n > 0.0 => Ok(Some(n)),
            _ => unsupported(format!("{key} must be a positive number; it is {value}")),
        },
    }
}

/// Reads both spellings: `rope_theta` beside `rope_scaling`, and the newer `rope_parameters` that holds both.
fn rope(config: &Value) -> Result<(f64, RopeScaling), Unsupported> {
    let scaling = ["rope_parameters", "rope_scaling"].into_iter().filter_map(|key| config.get(key)).find(|v| v.is_object());
    let theta = match scaling.map(|s| number(s, "rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => number(config, "rope_theta")?.unwrap_or(10_000.0),
    };
    let Some(scaling) = scaling else { return Ok((theta, RopeScaling::Default)) };
    let word = |key: &str| scaling.get(key).and_then(Value::as_str);
    let needed = |key: &str| number(scaling, key)?.map_or_else(|| unsupported(format!("rope_scaling lacks {key}")), Ok);
    let kind = match word("rope_type").or_else(|| word("type")).unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: needed("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: needed("factor")?,
            low_freq_factor: needed("low_freq_factor")?,
            high_freq_factor: needed("high_freq_factor")?,
            original_max_position_embeddings: needed("original_max_position_embeddings")?,
        },
        other => return unsupported(format!("rope_type {other:?} is not supported; supported: default, linear, llama3")),
    };
    Ok((theta, kind))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config() -> Value {
        json!({"model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
               "num_attention_heads": 4, "num_key_value_heads": 2})
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = config();
        config[key] = value;
        config
    }

    #[test]
    fn a_config_written_for_a_model_reads_back() -> Result<(), Unsupported> {
        let llama3 = json!({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
        for config in [config(), with("rope_parameters", llama3)] {
            let architecture = Architecture::from_config(&config)?;
            assert_eq!(Architecture::from_config(&architecture.to_config())?, architecture);
        }
        Ok(())
    }

    #[test]
    fn both_spellings_of_rope_mean_the_same() -> Result<(), Unsupported> {
        let mut old = with("rope_scaling", json!({"type": "linear", "factor": 2.0}));
        old["rope_theta"] = json!(5000.0);
        let new = with("rope_parameters", json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}));
        assert_eq!(Architecture::from_config(&old)?, Architecture::from_config(&new)?);
        Ok(())
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let cases = [
            (with("model_type", json!("rwkv")), "model_type \"rwkv\""),
            (with("attention_bias", json!(true)), "attention_bias"),
            (with("hidden_act", json!("relu")), "hidden_act \"relu\""),
            (with("num_key_value_heads", json!(3)), "do not divide"),
            (with("head_dim", json!(3)), "head_dim 3 is odd"),
            (with("hidden_size", json!(0)), "hidden_size"),
            (with("vocab_size", json!(1_u64 << 60)), "vocab_size"),
            (with("rms_norm_eps", json!(-1.0)), "rms_norm_eps"),
            (with("rope_scaling", json!({"rope_type": "yarn"})), "rope_type \"yarn\""),
            (with("rope_scaling", json!({"rope_type": "linear"})), "lacks factor"),
        ];
        for (config, named) in cases {
            let message = Architecture::from_config(&config).map_or_else(|e| e.to_string(), |_| "accepted".into());
            assert!(message.contains(named), "{message}");
        }
    }
}
