//! The forward pass of the Llama family: pre-norm blocks of grouped-query attention with rotary positions and a gated SiLU
//! feed-forward, each linear map optionally adapted by LoRA.

use std::path::Path;

use anyhow::{Context, Result};
use holdfast_base_model::architecture::{ExpectedTensor, RopeScaling};
use holdfast_base_model::weights::TensorBytes;
use holdfast_base_model::{Architecture, WeightFile, files};
use holdfast_domain::hyperparameters::Projection;
use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use crate::adapter::Adapter;

/// A frozen base model on a device.
#[derive(Debug)]
pub struct Model {
    /// Its sizes.
    pub architecture: Architecture,
    /// The numbers it computes in.
    pub kind: Kind,
    /// Where it computes.
    pub device: Device,
    embedding: Tensor, // [vocabulary, hidden]
    layers: Vec<Layer>,
    norm: Tensor,               // [hidden]
    head: Tensor,               // [vocabulary, hidden]; the embedding itself where they are tied
    rotary_frequencies: Tensor, // [head_dim / 2]
}

#[derive(Debug)]
struct Layer {
    input_norm: Tensor,          // [hidden]
    post_attention_norm: Tensor, // [hidden]
    /// In the order of [`Projection::ALL`], each `[out, in]`.
    projections: [Tensor; 7],
}

/// Reads a JSON file into the architecture it describes.
///
/// # Errors
/// When the file cannot be read, is no JSON, or describes a model that is not supported.
pub fn read_architecture(config: &Path) -> Result<Architecture> {
    let bytes = std::fs::read(config).with_context(|| format!("cannot read {}", config.display()))?;
    let config: serde_json::Value = serde_json::from_slice(&bytes).with_context(|| format!("{} is no JSON", config.display()))?;
    Ok(Architecture::from_config(&config)?)
}

impl Model {
    /// Reads a base model's folder, turning its weights into `kind` on `device`.
    ///
    /// # Errors
    /// When a file is missing or not what the architecture needs.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let architecture = read_architecture(&folder.join(files::CONFIG))?;
        Self::load_as(architecture, &folder.join(files::WEIGHTS), kind, device)
    }

    /// The same for weights whose architecture is known from elsewhere.
    ///
    /// # Errors
    /// When a tensor is missing, or has another shape or other numbers than the architecture needs.
    pub fn load_as(architecture: Architecture, weights: &Path, kind: Kind, device: Device) -> Result<Self> {
        let file = WeightFile::open(weights)?;
        let read = |expected: &ExpectedTensor| -> Result<Tensor> { Ok(to_tensor(file.expect(expected)?, kind, device)) };
        let mut tensors = architecture.tensors().into_iter();
        let mut next = || -> Result<Tensor> {
            let expected = tensors.next().context("the architecture lists fewer tensors than its layers use")?;
            read(&expected)
        };
        let embedding = next()?;
        let mut layers = Vec::with_capacity(architecture.num_hidden_layers);
        for _ in 0..architecture.num_hidden_layers {
            let input_norm = next()?;
            let (q, k, v, o) = (next()?, next()?, next()?, next()?);
            let post_attention_norm = next()?;
            layers.push(Layer { input_norm, post_attention_norm, projections: [q, k, v, o, next()?, next()?, next()?] });
        }
        let norm = next()?;
        let head = if architecture.tie_word_embeddings { embedding.shallow_clone() } else { next()? };
        let rotary_frequencies = rotary_frequencies(&architecture).to_device(device);
        Ok(Self { architecture, kind, device, embedding, layers, norm, head, rotary_frequencies })
    }

    /// The output matrix, `[vocabulary, hidden]`.
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// The width of what a projection reads and writes, `(in, out)`.
    #[must_use]
    pub fn projection_size(&self, layer: usize, projection: Projection) -> (i64, i64) {
        let size = self.layers[layer].projections[projection as usize].size();
        (size[1], size[0])
    }

    /// Final hidden states, after the last norm, `[rows, time, hidden]`, of token ids `[rows, time]`.
    ///
    /// Rows are padded on the right and attention is causal, so a padded position reaches no real one and needs no mask.
    /// With `train`, the adapter's dropout is on.
    pub fn hidden(&self, ids: &Tensor, adapter: Option<&Adapter>, train: bool) -> Tensor {
        let rotary = self.rotary(ids.size()[1]);
        let mut x = Tensor::embedding(&self.embedding, ids, -1, false, false); // [rows, time, hidden]
        for (index, layer) in self.layers.iter().enumerate() {
            let apply = |projection: Projection, x: &Tensor| {
                let weight = &layer.projections[projection as usize];
                let base = x.linear(weight, None::<&Tensor>);
                match adapter.and_then(|adapter| adapter.delta(index, projection, x, train)) {
                    Some(delta) => base + delta,
                    None => base,
                }
            };
            x = &x + self.attention(&self.normed(&x, &layer.input_norm), &rotary, &apply);
            x = &x + feed_forward(&self.normed(&x, &layer.post_attention_norm), &apply);
        }
        self.normed(&x, &self.norm)
    }

    /// Logits in float32, `[.., vocabulary]`, of final hidden states `[.., hidden]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        hidden.linear(&self.head, None::<&Tensor>).to_kind(Kind::Float)
    }

    fn normed(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        x.rms_norm(weight.size(), Some(weight), self.architecture.rms_norm_eps)
    }

    fn attention(&self, x: &Tensor, rotary: &Rotary, apply: &impl Fn(Projection, &Tensor) -> Tensor) -> Tensor {
        let (rows, time) = (x.size()[0], x.size()[1]);
        let heads = self.architecture.num_attention_heads as i64;
        let shared = self.architecture.num_key_value_heads as i64;
        let width = self.architecture.head_dim as i64;
        let split = |t: Tensor, heads: i64| t.view([rows, time, heads, width]).transpose(1, 2); // [rows, heads, time, head_dim]
        let q = rotary.turn(&split(apply(Projection::QProj, x), heads));
        let k = rotary.turn(&split(apply(Projection::KProj, x), shared));
        let v = split(apply(Projection::VProj, x), shared);
        // Query heads that share keys stand next to each other, so each key head is repeated in place.
        let spread = |t: Tensor| match heads / shared {
            1 => t,
            group => t.unsqueeze(2).expand([rows, shared, group, time, width], false).reshape([rows, heads, time, width]),
        };
        let mixed = Tensor::scaled_dot_product_attention(&q, &spread(k), &spread(v), None::<&Tensor>, 0.0, true, None, false);
        apply(Projection::OProj, &mixed.transpose(1, 2).reshape([rows, time, heads * width]))
    }

    fn rotary(&self, time: i64) -> Rotary {
        let positions = Tensor::arange(time, (Kind::Float, self.device));
        let angles = positions.outer(&self.rotary_frequencies); // [time, head_dim / 2]
        let angles = Tensor::cat(&[&angles, &angles], 1);
        Rotary { cos: angles.cos().to_kind(self.kind), sin: angles.sin().to_kind(self.kind) }
    }
}

fn feed_forward(x: &Tensor, apply: &impl Fn(Projection, &Tensor) -> Tensor) -> Tensor {
    let gated = apply(Projection::GateProj, x).silu() * apply(Projection::UpProj, x); // [rows, time, intermediate]
    apply(Projection::DownProj, &gated)
}

struct Rotary {
    cos: Tensor, // [time, head_dim]
    sin: Tensor, // [time, head_dim]
}

impl Rotary {
    /// Turns each pair of coordinates, half a head apart, by its position's angle (`RoFormer`, arXiv 2104.09864, eq. 34).
    fn turn(&self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let turned = Tensor::cat(&[&-&halves[1], &halves[0]], -1);
        x * &self.cos + turned * &self.sin
    }
}

/// `θ^(-2i / head_dim)` for each pair `i`, stretched as the architecture says. In float32 throughout, as the models were
/// trained.
fn rotary_frequencies(architecture: &Architecture) -> Tensor {
    let width = architecture.head_dim as i64;
    let exponents = Tensor::arange_start_step(0, width, 2, (Kind::Float, Device::Cpu)) / width as f64;
    let plain = (exponents * -architecture.rope_theta.ln()).exp();
    match architecture.rope_scaling {
        RopeScaling::Default => plain,
        RopeScaling::Linear { factor } => plain / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let wavelength = plain.reciprocal() * std::f64::consts::TAU;
            // 0 where the wavelength is that of a low frequency, 1 where of a high one, straight between.
            let share = ((wavelength.reciprocal() * original_max_position_embeddings - low_freq_factor)
                / (high_freq_factor - low_freq_factor))
                .clamp(0.0, 1.0);
            &plain * &share + (1.0 - share) * &plain / factor
        }
    }
}

fn to_tensor(stored: TensorBytes<'_>, kind: Kind, device: Device) -> Tensor {
    let stored_kind = match stored.dtype {
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        _ => Kind::Float, // `WeightFile::expect` gives no other
    };
    let shape: Vec<i64> = stored.shape.iter().map(|&n| n as i64).collect();
    Tensor::from_data_size(stored.bytes, &shape, stored_kind).to_kind(kind).to_device(device)
}
