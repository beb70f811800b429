//! The forward pass of every family (see `holdfast_base_model::family` for how they differ): pre-norm blocks of grouped-query
//! attention with rotary positions and a gated feed-forward, each linear map optionally adapted by LoRA.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use holdfast_base_model::architecture::{ExpectedTensor, LayerKind};
use holdfast_base_model::family::{Activation, Traits};
use holdfast_base_model::weights::TensorBytes;
use holdfast_base_model::{Architecture, WeightFile, files};
use holdfast_domain::hyperparameters::Projection;
use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use crate::adapter::Adapter;
use crate::head::Head;
use crate::rotary::{self, Rotary};

/// A frozen base model on a device.
#[derive(Debug)]
pub struct Model {
    /// Its sizes.
    pub architecture: Architecture,
    /// The numbers it computes in.
    pub kind: Kind,
    /// Where it computes.
    pub device: Device,
    /// What turns hidden states into logits; its matrix is the embedding where they are tied.
    pub head: Head,
    embedding: Tensor, // [vocabulary, hidden]
    layers: Vec<Layer>,
    norm: Tensor,               // [hidden]
    frequencies: Tensor,        // [head_dim / 2]
    window_frequencies: Tensor, // [head_dim / 2]
}

#[derive(Debug)]
struct Layer {
    kind: LayerKind,
    /// In the order of [`Projection::ALL`], each `[out, in]`.
    projections: [Tensor; 7],
    /// Of queries, keys and values, each `[out]`.
    biases: Option<[Tensor; 3]>,
    /// Of a head of queries and one of keys, each `[head_dim]`.
    head_norms: Option<[Tensor; 2]>,
    attention_norm: Tensor,    // [hidden]
    feed_forward_norm: Tensor, // [hidden]
    /// Of what attention and feed-forward put out, each `[hidden]`.
    output_norms: Option<[Tensor; 2]>,
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

/// The weights an architecture needs, by name.
struct Weights<'a> {
    file: &'a WeightFile,
    expected: BTreeMap<String, ExpectedTensor>,
    kind: Kind,
    device: Device,
    /// Norms scale by one plus their weight, and do so in float32.
    norm_plus_one: bool,
}

impl Weights<'_> {
    fn read(&self, name: &str) -> Result<TensorBytes<'_>> {
        let expected = self.expected.get(name).with_context(|| format!("the architecture has no tensor {name}"))?;
        Ok(self.file.expect(expected)?)
    }

    fn get(&self, name: &str) -> Result<Tensor> {
        to_tensor(name, self.read(name)?, self.kind, self.device)
    }

    fn norm(&self, name: &str) -> Result<Tensor> {
        if self.norm_plus_one {
            return Ok(to_tensor(name, self.read(name)?, Kind::Float, self.device)? + 1.0);
        }
        self.get(name)
    }
}

impl Layer {
    fn load(weights: &Weights<'_>, index: usize, kind: LayerKind, traits: Traits) -> Result<Self> {
        let named = |name: &str| format!("model.layers.{index}.{name}");
        let projection = |p: Projection| weights.get(&named(&format!("{}.{}.weight", p.block(), p.as_str())));
        let bias = |p: Projection| weights.get(&named(&format!("{}.{}.bias", p.block(), p.as_str())));
        let norm = |name: &str| weights.norm(&named(&format!("{name}.weight")));
        let [q, k, v, o, gate, up, down] = Projection::ALL;
        let feed_forward_norm = if traits.output_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        Ok(Self {
            kind,
            projections: [
                projection(q)?,
                projection(k)?,
                projection(v)?,
                projection(o)?,
                projection(gate)?,
                projection(up)?,
                projection(down)?,
            ],
            biases: if traits.qkv_bias { Some([bias(q)?, bias(k)?, bias(v)?]) } else { None },
            head_norms: if traits.head_norms { Some([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]) } else { None },
            attention_norm: norm("input_layernorm")?,
            feed_forward_norm: norm(feed_forward_norm)?,
            output_norms: if traits.output_norms {
                Some([norm("post_attention_layernorm")?, norm("post_feedforward_layernorm")?])
            } else {
                None
            },
        })
    }
}

impl Model {
    /// Reads a base model's folder, turning its weights into `kind` on `device`.
    ///
    /// # Errors
    /// When a file is missing or not what the architecture needs, or a weight is not a finite number.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let architecture = read_architecture(&folder.join(files::CONFIG))?;
        Self::load_as(architecture, &folder.join(files::WEIGHTS), kind, device)
    }

    /// The same for weights whose architecture is known from elsewhere.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape or other numbers than the architecture needs, or is not finite.
    pub fn load_as(architecture: Architecture, weights: &Path, kind: Kind, device: Device) -> Result<Self> {
        let file = WeightFile::open(weights)?;
        let traits = architecture.family.traits();
        let expected = architecture.tensors().into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        let weights = Weights { file: &file, expected, kind, device, norm_plus_one: traits.norm_plus_one };
        let embedding = weights.get("model.embed_tokens.weight")?;
        let layers = architecture.layers.iter().enumerate();
        let layers = layers.map(|(index, &kind)| Layer::load(&weights, index, kind, traits)).collect::<Result<_>>()?;
        let matrix = if architecture.tie_word_embeddings { embedding.shallow_clone() } else { weights.get("lm_head.weight")? };
        Ok(Self {
            kind,
            device,
            head: Head { matrix, softcap: architecture.logit_softcap },
            embedding,
            layers,
            norm: weights.norm("model.norm.weight")?,
            frequencies: rotary::frequencies(&architecture.rope, architecture.head_dim).to_device(device),
            window_frequencies: rotary::frequencies(&architecture.window_rope, architecture.head_dim).to_device(device),
            architecture,
        })
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
        let time = ids.size()[1];
        let full = View { rotary: Rotary::new(&self.frequencies, time, self.kind), mask: None };
        let windowed: BTreeMap<i64, View> = self.windows().map(|window| (window, self.view(time, window))).collect();
        let mut x = Tensor::embedding(&self.embedding, ids, -1, false, false); // [rows, time, hidden]
        if self.architecture.family.traits().scaled_embedding {
            // Rounded to the model's numbers first, as the models were trained.
            x = &x * Tensor::from((self.architecture.hidden_size as f64).sqrt()).to_kind(self.kind).to_device(self.device);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let view = match layer.kind {
                LayerKind::Full => &full,
                LayerKind::Window(window) => windowed.get(&(window as i64)).unwrap_or(&full),
            };
            let apply = |projection: Projection, x: &Tensor| {
                let bias = layer.biases.as_ref().and_then(|biases| biases.get(projection as usize));
                let base = x.linear(&layer.projections[projection as usize], bias);
                match adapter.and_then(|adapter| adapter.delta(index, projection, x, train)) {
                    Some(delta) => base + delta,
                    None => base,
                }
            };
            let mut mixed = self.attention(&self.normed(&x, &layer.attention_norm), layer, view, &apply);
            if let Some([after_attention, _]) = &layer.output_norms {
                mixed = self.normed(&mixed, after_attention);
            }
            x = &x + mixed;
            let mut fed = self.feed_forward(&self.normed(&x, &layer.feed_forward_norm), &apply);
            if let Some([_, after_feed_forward]) = &layer.output_norms {
                fed = self.normed(&fed, after_feed_forward);
            }
            x = &x + fed;
        }
        self.normed(&x, &self.norm)
    }

    /// `weight · x / √(mean(x²) + ε)` over the last dimension.
    fn normed(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        let normed = |x: &Tensor| x.rms_norm(weight.size(), Some(weight), self.architecture.rms_norm_eps);
        if weight.kind() == x.kind() { normed(x) } else { normed(&x.to_kind(weight.kind())).to_kind(x.kind()) }
    }

    fn attention(&self, x: &Tensor, layer: &Layer, view: &View, apply: &impl Fn(Projection, &Tensor) -> Tensor) -> Tensor {
        let (rows, time) = (x.size()[0], x.size()[1]);
        let heads = self.architecture.num_attention_heads as i64;
        let shared = self.architecture.num_key_value_heads as i64;
        let width = self.architecture.head_dim as i64;
        let split = |t: Tensor, heads: i64| t.view([rows, time, heads, width]).transpose(1, 2); // [rows, heads, time, head_dim]
        let mut q = split(apply(Projection::QProj, x), heads);
        let mut k = split(apply(Projection::KProj, x), shared);
        if let Some([of_queries, of_keys]) = &layer.head_norms {
            (q, k) = (self.normed(&q, of_queries), self.normed(&k, of_keys));
        }
        let (q, k) = (view.rotary.turn(&q), view.rotary.turn(&k));
        let v = split(apply(Projection::VProj, x), shared);
        // Query heads that share keys stand next to each other, so each key head is repeated in place.
        let spread = |t: Tensor| match heads / shared {
            1 => t,
            group => t.unsqueeze(2).expand([rows, shared, group, time, width], false).reshape([rows, heads, time, width]),
        };
        let mixed = self.mix(&q, &spread(k), &spread(v), view.mask.as_ref());
        apply(Projection::OProj, &mixed.transpose(1, 2).reshape([rows, time, heads * width]))
    }

    /// `softmax(q kᵀ · scale + mask) v`, causal; all `[rows, heads, time, head_dim]`.
    fn mix(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Tensor {
        let scale = self.architecture.attention_scale;
        let Some(cap) = self.architecture.attention_softcap else {
            return Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, mask.is_none(), scale, false);
        };
        // No kernel caps scores, so these exist, `[rows, heads, time, time]`.
        let scores = (q.matmul(&k.transpose(2, 3)) * scale / cap).tanh() * cap;
        let mask = mask.map_or_else(|| self.causal_mask(q.size()[2], i64::MAX), Tensor::shallow_clone);
        (scores + mask).softmax(-1, Kind::Float).to_kind(self.kind).matmul(v)
    }

    fn feed_forward(&self, x: &Tensor, apply: &impl Fn(Projection, &Tensor) -> Tensor) -> Tensor {
        let gate = apply(Projection::GateProj, x); // [rows, time, intermediate]
        let gate = match self.architecture.family.traits().activation {
            Activation::Silu => gate.silu(),
            Activation::GeluTanh => gate.gelu("tanh"),
        };
        apply(Projection::DownProj, &(gate * apply(Projection::UpProj, x)))
    }

    /// The windows its layers have.
    fn windows(&self) -> impl Iterator<Item = i64> {
        self.layers.iter().filter_map(|layer| match layer.kind {
            LayerKind::Window(window) => Some(window as i64),
            LayerKind::Full => None,
        })
    }

    fn view(&self, time: i64, window: i64) -> View {
        View {
            rotary: Rotary::new(&self.window_frequencies, time, self.kind),
            // A window that no row is longer than hides nothing.
            mask: (time > window).then(|| self.causal_mask(time, window)),
        }
    }

    /// 0 where position `i` sees position `j`, `i − window < j ≤ i`, else −∞; `[time, time]`.
    fn causal_mask(&self, time: i64, window: i64) -> Tensor {
        let positions = Tensor::arange(time, (Kind::Int64, self.device));
        let distance = positions.unsqueeze(1) - positions.unsqueeze(0);
        let hidden = distance.lt(0).logical_or(&distance.ge(window));
        Tensor::zeros([time, time], (self.kind, self.device)).masked_fill(&hidden, f64::NEG_INFINITY)
    }
}

/// What positions a kind of layer sees, and where it takes them to be.
#[derive(Debug)]
struct View {
    rotary: Rotary,
    /// `[time, time]`; without one, all that came before.
    mask: Option<Tensor>,
}

fn to_tensor(name: &str, stored: TensorBytes<'_>, kind: Kind, device: Device) -> Result<Tensor> {
    let stored_kind = match stored.dtype {
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        _ => Kind::Float, // `WeightFile::expect` gives no other
    };
    let shape: Vec<i64> = stored.shape.iter().map(|&n| n as i64).collect();
    let tensor = Tensor::from_data_size(stored.bytes, &shape, stored_kind).to_kind(kind).to_device(device);
    // In float64 no sum of such numbers overflows, so it is finite exactly where all of them are.
    let finite = tensor.sum(Kind::Double).double_value(&[]).is_finite();
    anyhow::ensure!(finite, "tensor {name} holds NaN or infinite numbers");
    Ok(tensor)
}
