//! An architecture read from a Hugging Face `config.json`, in its older and its newer spelling.

use serde_json::Value;

use crate::architecture::{Architecture, LayerKind, Rope, RopeScaling, Unsupported};
use crate::family::Family;

fn unsupported<T>(reason: impl Into<String>) -> Result<T, Unsupported> {
    Err(Unsupported(reason.into()))
}

/// The largest value any size may have: keeps every product of two of them far from overflow.
const MAX_SIZE: u64 = 1 << 24;

/// The most decoder blocks a model may have.
const MAX_LAYERS: usize = 4096;

/// What a Gemma leaves out of its `config.json` because transformers has it as a default.
const GEMMA3_DEFAULTS: [(&str, u64); 10] = [
    ("vocab_size", 262_208),
    ("hidden_size", 2304),
    ("intermediate_size", 9216),
    ("num_hidden_layers", 26),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("head_dim", 256),
    ("max_position_embeddings", 131_072),
    ("query_pre_attn_scalar", 256),
    ("sliding_window", 4096),
];

impl Architecture {
    /// Reads the parsed `config.json`.
    ///
    /// # Errors
    /// When the model is of another family, uses something the trainer does not compute, or a number is missing or absurd.
    pub fn from_config(config: &Value) -> Result<Self, Unsupported> {
        match config.get("model_type").and_then(Value::as_str) {
            // A Gemma that also sees images: its text part stands inside, and may leave out what it ties.
            Some("gemma3") => {
                let Some(text) = config.get("text_config").filter(|text| text.is_object()) else {
                    return unsupported("model_type \"gemma3\" needs a text_config");
                };
                let mut text = text.clone();
                if text.get("tie_word_embeddings").is_none()
                    && let Some(tied) = config.get("tie_word_embeddings")
                {
                    text["tie_word_embeddings"] = tied.clone();
                }
                text["model_type"] = Family::Gemma3.model_type().into();
                Self::from_config(&text)
            }
            Some(model_type) => match Family::ALL.into_iter().find(|family| family.model_type() == model_type) {
                Some(Family::Gemma3) => Self::read(Family::Gemma3, &with_defaults(config, &GEMMA3_DEFAULTS)),
                Some(family) => Self::read(family, config),
                None => {
                    let known = Family::ALL.map(Family::model_type).join(", ");
                    unsupported(format!("model_type {model_type:?} is not supported; supported: {known}, gemma3"))
                }
            },
            None => unsupported("model_type is missing"),
        }
    }

    fn read(family: Family, config: &Value) -> Result<Self, Unsupported> {
        let traits = family.traits();
        for flag in ["attention_bias", "mlp_bias", "use_bidirectional_attention"] {
            if config.get(flag).and_then(Value::as_bool) == Some(true) {
                return unsupported(format!("{flag} is not supported"));
            }
        }
        for key in ["hidden_act", "hidden_activation"] {
            let supported = traits.activation.as_str();
            if let Some(activation) = config.get(key).and_then(Value::as_str)
                && activation != supported
            {
                return unsupported(format!("{key} {activation:?} is not supported; supported: {supported:?}"));
            }
        }
        whole_heads_turn(config)?;
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
            None if family == Family::Qwen3 => 128,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => return unsupported("hidden_size does not divide among the attention heads, and head_dim is missing"),
        };
        if !head_dim.is_multiple_of(2) {
            return unsupported(format!("head_dim {head_dim} is odd; rotary positions need pairs"));
        }
        let scalar = number(config, "query_pre_attn_scalar")?.filter(|_| family == Family::Gemma3);
        let (rope, window_rope) = ropes(family, config)?;
        Ok(Self {
            family,
            vocab_size: size(config, "vocab_size")?,
            hidden_size,
            intermediate_size: size(config, "intermediate_size")?,
            layers: layers(family, config)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            attention_scale: scalar.unwrap_or(head_dim as f64).powf(-0.5),
            // A Gemma 3 may also set `attn_logit_softcapping`, a leftover of Gemma 2: what trains and serves it (transformers)
            // never applies it, so neither does this.
            logit_softcap: number(config, "final_logit_softcapping")?,
            max_position_embeddings: optional_size(config, "max_position_embeddings")?.unwrap_or(2048),
            rms_norm_eps: number(config, "rms_norm_eps")?.unwrap_or(1e-6),
            rope,
            window_rope,
            tie_word_embeddings: flag(config, "tie_word_embeddings").unwrap_or(family == Family::Gemma3),
        })
    }
}

fn with_defaults(config: &Value, defaults: &[(&str, u64)]) -> Value {
    let mut config = config.clone();
    for (key, value) in defaults {
        if config.get(key).is_none() {
            config[*key] = (*value).into();
        }
    }
    config
}

fn flag(config: &Value, key: &str) -> Option<bool> {
    config.get(key).and_then(Value::as_bool)
}

/// How far back each layer looks: by `layer_types` where they are listed, else by the family's older rule.
fn layers(family: Family, config: &Value) -> Result<Vec<LayerKind>, Unsupported> {
    let count = size(config, "num_hidden_layers")?;
    if count > MAX_LAYERS {
        return unsupported(format!("num_hidden_layers is {count}; at most {MAX_LAYERS} are supported"));
    }
    let window = match family {
        Family::Llama => None,
        Family::Mistral if config.get("sliding_window").is_none() => Some(4096),
        Family::Qwen2 | Family::Qwen3 if flag(config, "use_sliding_window") != Some(true) => None,
        Family::Mistral | Family::Qwen2 | Family::Qwen3 | Family::Gemma3 => optional_size(config, "sliding_window")?,
    };
    if let Some(listed) = config.get("layer_types").and_then(Value::as_array) {
        if listed.len() != count {
            return unsupported(format!("layer_types lists {} layers, and num_hidden_layers is {count}", listed.len()));
        }
        return listed
            .iter()
            .map(|kind| match (kind.as_str(), window) {
                (Some("full_attention"), _) => Ok(LayerKind::Full),
                (Some("sliding_attention"), Some(window)) => Ok(LayerKind::Window(window)),
                (Some("sliding_attention"), None) => {
                    unsupported("layer_types has sliding_attention, and sliding_window is not set")
                }
                _ => unsupported(format!("layer_types: {kind} is not supported; supported: full_attention, sliding_attention")),
            })
            .collect();
    }
    let Some(window) = window else { return Ok(vec![LayerKind::Full; count]) };
    let windowed_from = optional_size(config, "max_window_layers")?.unwrap_or(28);
    let pattern = match optional_size(config, "sliding_window_pattern")? {
        Some(pattern) => pattern,
        None => optional_size(config, "_sliding_window_pattern")?.unwrap_or(6),
    };
    let has_window = |layer: usize| match family {
        Family::Gemma3 => !(layer + 1).is_multiple_of(pattern),
        Family::Qwen2 | Family::Qwen3 => layer >= windowed_from,
        Family::Llama | Family::Mistral => true,
    };
    Ok((0..count).map(|layer| if has_window(layer) { LayerKind::Window(window) } else { LayerKind::Full }).collect())
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

/// The rotary positions of full layers and of those with a window. `rope_parameters`, the newer spelling, holds everything, for
/// a Gemma by kind of layer; the older one has `rope_theta` beside `rope_scaling`, and a Gemma's `rope_local_base_freq`.
fn ropes(family: Family, config: &Value) -> Result<(Rope, Rope), Unsupported> {
    let gemma = family == Family::Gemma3;
    let default_theta = if gemma { 1_000_000.0 } else { 10_000.0 };
    if let Some(by_kind) = config.get("rope_parameters").filter(|v| v.get("full_attention").is_some()) {
        let of = |kind: &str, theta: f64| match by_kind.get(kind).filter(|v| v.is_object()) {
            Some(parameters) => rope(parameters, theta),
            None => unsupported(format!("rope_parameters lacks {kind}")),
        };
        return Ok((of("full_attention", default_theta)?, of("sliding_attention", 10_000.0)?));
    }
    let theta = number(config, "rope_theta")?.unwrap_or(default_theta);
    let parameters = ["rope_parameters", "rope_scaling"].into_iter().filter_map(|key| config.get(key)).find(|v| v.is_object());
    let full = parameters.map_or(Ok(Rope { theta, scaling: RopeScaling::Default }), |parameters| rope(parameters, theta))?;
    let windowed = if gemma {
        Rope { theta: number(config, "rope_local_base_freq")?.unwrap_or(10_000.0), scaling: RopeScaling::Default }
    } else {
        full
    };
    Ok((full, windowed))
}

/// Some models turn only a part of each head.
fn whole_heads_turn(parameters: &Value) -> Result<(), Unsupported> {
    match number(parameters, "partial_rotary_factor")? {
        Some(share) if share < 1.0 => unsupported(format!("partial_rotary_factor {share} is not supported")),
        _ => Ok(()),
    }
}

fn rope(parameters: &Value, theta: f64) -> Result<Rope, Unsupported> {
    let word = |key: &str| parameters.get(key).and_then(Value::as_str);
    let needed = |key: &str| number(parameters, key)?.map_or_else(|| unsupported(format!("rope_scaling lacks {key}")), Ok);
    whole_heads_turn(parameters)?;
    let scaling = match word("rope_type").or_else(|| word("type")).unwrap_or("default") {
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
    Ok(Rope { theta: number(parameters, "rope_theta")?.unwrap_or(theta), scaling })
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
            (with("partial_rotary_factor", json!(0.5)), "partial_rotary_factor 0.5"),
            (
                with("rope_parameters", json!({"rope_type": "default", "partial_rotary_factor": 0.25})),
                "partial_rotary_factor 0.25",
            ),
        ];
        for (config, named) in cases {
            let message = Architecture::from_config(&config).map_or_else(|e| e.to_string(), |_| "accepted".into());
            assert!(message.contains(named), "{message}");
        }
    }

    #[test]
    fn the_older_rules_for_windows_are_those_of_transformers() -> Result<(), Unsupported> {
        let family = |model_type: &str, more: Value| {
            let mut config = with("model_type", json!(model_type));
            config["num_hidden_layers"] = json!(3);
            for (key, value) in more.as_object().into_iter().flatten() {
                config[key.as_str()] = value.clone();
            }
            Ok::<_, Unsupported>(Architecture::from_config(&config)?.layers)
        };
        let (full, window) = (LayerKind::Full, LayerKind::Window(4));
        assert_eq!(family("mistral", json!({"sliding_window": 4}))?, [window; 3]);
        assert_eq!(family("mistral", json!({"sliding_window": null}))?, [full; 3]);
        assert_eq!(family("qwen2", json!({"sliding_window": 4, "use_sliding_window": false}))?, [full; 3]);
        let some = json!({"sliding_window": 4, "use_sliding_window": true, "max_window_layers": 2});
        assert_eq!(family("qwen2", some)?, [full, full, window]);
        assert_eq!(family("gemma3_text", json!({"sliding_window": 4, "sliding_window_pattern": 2}))?, [window, full, window]);
        Ok(())
    }

    #[test]
    fn a_gemma_that_sees_images_gives_its_text_part_with_what_it_leaves_out() -> Result<(), Unsupported> {
        let config = json!({"model_type": "gemma3", "vision_config": {}, "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 1024}});
        let gemma = Architecture::from_config(&config)?;
        assert_eq!((gemma.num_attention_heads, gemma.num_key_value_heads, gemma.head_dim), (8, 4, 256));
        assert_eq!((gemma.rope.theta, gemma.rope.scaling), (1e6, RopeScaling::Linear { factor: 8.0 }));
        assert_eq!((gemma.window_rope.theta, gemma.window_rope.scaling), (1e4, RopeScaling::Default));
        assert_eq!((gemma.layers[4], gemma.layers[5]), (LayerKind::Window(1024), LayerKind::Full));
        assert!(gemma.tie_word_embeddings);
        Ok(())
    }
}
