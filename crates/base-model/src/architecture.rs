//! The architecture of a base model: its sizes, and the tensors it must have.

use holdfast_domain::hyperparameters::Projection;

use crate::family::Family;

/// A decoder: pre-norm blocks of grouped-query attention with rotary positions and a gated feed-forward. What its family does
/// differently is in [`Family::traits`].
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// Its family.
    pub family: Family,
    /// Token ids the embedding knows.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub layers: Vec<LayerKind>,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// What the products of queries and keys are multiplied by.
    pub attention_scale: f64,
    /// Logits `l` become `c · tanh(l / c)`, where set.
    pub logit_softcap: Option<f64>,
    /// Positions the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square before its root is taken.
    pub rms_norm_eps: f64,
    /// The rotary positions of layers that see everything before them, and of all where there is one kind.
    pub rope: Rope,
    /// The rotary positions of layers with a window.
    pub window_rope: Rope,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
}

/// How far back a layer looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// To the beginning.
    Full,
    /// At this many positions, its own among them.
    Window(usize),
}

/// Rotary positions (`RoFormer`, arXiv 2104.09864).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched for contexts longer than the first training's.
#[derive(Debug, Clone, Copy, PartialEq)]
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

/// A tensor an architecture needs: its name in Hugging Face's checkpoints, and its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// As `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[out, in]` for linear maps, `[width]` for norms and biases.
    pub shape: Vec<usize>,
}

impl ExpectedTensor {
    /// The names it may have in a checkpoint: its own, and those of the text part of a model that also sees images, as the
    /// older and the newer checkpoints of such models spell it.
    #[must_use]
    pub fn spellings(&self) -> [String; 3] {
        let newer = match self.name.strip_prefix("model.") {
            Some(rest) => format!("model.language_model.{rest}"),
            None => self.name.clone(),
        };
        [self.name.clone(), format!("language_model.{}", self.name), newer]
    }
}

impl Architecture {
    /// Every tensor the model must have.
    #[must_use]
    pub fn tensors(&self) -> Vec<ExpectedTensor> {
        let traits = self.family.traits();
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let mut tensors = Vec::new();
        let mut expect = |name: String, shape: &[usize]| tensors.push(ExpectedTensor { name, shape: shape.to_vec() });
        expect("model.embed_tokens.weight".into(), &[self.vocab_size, hidden]);
        for layer in 0..self.layers.len() {
            let mut within = |name: &str, shape: &[usize]| expect(format!("model.layers.{layer}.{name}"), shape);
            within("input_layernorm.weight", &[hidden]);
            within("self_attn.q_proj.weight", &[queries, hidden]);
            within("self_attn.k_proj.weight", &[keys, hidden]);
            within("self_attn.v_proj.weight", &[keys, hidden]);
            within("self_attn.o_proj.weight", &[hidden, queries]);
            if traits.qkv_bias {
                within("self_attn.q_proj.bias", &[queries]);
                within("self_attn.k_proj.bias", &[keys]);
                within("self_attn.v_proj.bias", &[keys]);
            }
            if traits.head_norms {
                within("self_attn.q_norm.weight", &[self.head_dim]);
                within("self_attn.k_norm.weight", &[self.head_dim]);
            }
            within("post_attention_layernorm.weight", &[hidden]);
            if traits.output_norms {
                within("pre_feedforward_layernorm.weight", &[hidden]);
                within("post_feedforward_layernorm.weight", &[hidden]);
            }
            within("mlp.gate_proj.weight", &[inner, hidden]);
            within("mlp.up_proj.weight", &[inner, hidden]);
            within("mlp.down_proj.weight", &[hidden, inner]);
        }
        expect("model.norm.weight".into(), &[hidden]);
        if !self.tie_word_embeddings {
            expect("lm_head.weight".into(), &[self.vocab_size, hidden]);
        }
        tensors
    }

    /// The width of what a projection reads and writes, `(in, out)`.
    #[must_use]
    pub fn projection_size(&self, projection: Projection) -> (usize, usize) {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        match projection {
            Projection::QProj => (hidden, queries),
            Projection::KProj | Projection::VProj => (hidden, keys),
            Projection::OProj => (queries, hidden),
            Projection::GateProj | Projection::UpProj => (hidden, inner),
            Projection::DownProj => (inner, hidden),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_part_of_a_larger_model_goes_by_a_prefix() {
        let tensor = |name: &str| ExpectedTensor { name: name.into(), shape: Vec::new() };
        assert_eq!(
            tensor("model.norm.weight").spellings(),
            ["model.norm.weight", "language_model.model.norm.weight", "model.language_model.norm.weight"]
        );
        assert_eq!(tensor("lm_head.weight").spellings(), ["lm_head.weight", "language_model.lm_head.weight", "lm_head.weight"]);
    }
}
