//! The model families, their differences as data.

use serde::{Deserialize, Serialize};

/// A family of decoders that the trainer computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Llama 2 and 3, and what is built like them (`SmolLM2`).
    Llama,
    /// Mistral: every layer may look back through a window only.
    Mistral,
    /// Qwen 2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: queries and keys are normed head by head.
    Qwen3,
    /// The text model of Gemma 3.
    Gemma3,
}

/// What a family does differently from a Llama.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traits {
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Queries and keys are normed, each head by itself, before they are turned.
    pub head_norms: bool,
    /// What attention and feed-forward put out is normed as well, before it is added to the stream.
    pub output_norms: bool,
    /// Norms scale by `1 + weight` instead of `weight`, in float32.
    pub norm_plus_one: bool,
    /// Embeddings are multiplied by the root of their width.
    pub scaled_embedding: bool,
    /// The feed-forward's gate.
    pub activation: Activation,
}

/// The nonlinearity of the feed-forward's gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · σ(x)`.
    Silu,
    /// The Gaussian error linear unit in its tanh approximation (arXiv 1606.08415).
    GeluTanh,
}

impl Activation {
    /// The name `config.json` has for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::GeluTanh => "gelu_pytorch_tanh",
        }
    }
}

impl Family {
    /// Every family.
    pub const ALL: [Self; 5] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Gemma3];

    /// The `model_type` of its `config.json`.
    #[must_use]
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3_text",
        }
    }

    /// What it does differently.
    #[must_use]
    pub const fn traits(self) -> Traits {
        let llama = Traits {
            qkv_bias: false,
            head_norms: false,
            output_norms: false,
            norm_plus_one: false,
            scaled_embedding: false,
            activation: Activation::Silu,
        };
        match self {
            Self::Llama | Self::Mistral => llama,
            Self::Qwen2 => Traits { qkv_bias: true, ..llama },
            Self::Qwen3 => Traits { head_norms: true, ..llama },
            Self::Gemma3 => Traits {
                head_norms: true,
                output_norms: true,
                norm_plus_one: true,
                scaled_embedding: true,
                activation: Activation::GeluTanh,
                ..llama
            },
        }
    }
}
