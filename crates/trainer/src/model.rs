//! A base model with its adapter: loading, the forward pass, and the way back through it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use holdfast_base_model::architecture::{ExpectedTensor, LayerKind};
use holdfast_base_model::family::Traits;
use holdfast_base_model::weights::TensorBytes;
use holdfast_base_model::{Architecture, Shards, files};
use holdfast_domain::hyperparameters::{Projection, Recompute};
use tch::{Device, Kind, Tensor};

use crate::adapter::Adapter;
use crate::block::{Cache, Layer, Parts, Pass, Saved, Visible};
use crate::device;
use crate::gradient::{Gradient, numbers};
use crate::head::Head;
use crate::kernels::{self, Rows};
use crate::linear::{Dropout, Stack, Weight};
use crate::packed::Packed;
use crate::rotary::{self, Rotary};
use crate::stop::Stop;

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
    norm: Tensor,               // [hidden] float32
    frequencies: Tensor,        // [head_dim / 2]
    window_frequencies: Tensor, // [head_dim / 2]
}

/// What a pass computes, beside its rows.
#[derive(Debug, Clone, Copy, Default)]
pub struct PassOptions<'a> {
    /// The adapter that is on; without one, the base.
    pub adapter: Option<&'a Adapter>,
    /// The key of the adapter's dropout, which decides what is dropped; without one, nothing is.
    pub dropout_key: Option<u64>,
    /// What the backward pass makes again instead of keeping it.
    pub recompute: Recompute,
}

/// A forward pass that can be gone back through.
#[derive(Debug)]
pub struct Trace<'a> {
    model: &'a Model,
    pass: Pass<'a>,
    saved: Vec<Saved>,
    stream: Tensor,  // [positions, hidden]: before the last norm
    inverse: Tensor, // [positions]: the last norm's factor
    positions: &'a Tensor,
    trimmed: bool,
    /// Final hidden states at the positions asked for, after the last norm, `[positions, hidden]`.
    pub hidden: Tensor,
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
    shards: &'a Shards,
    expected: BTreeMap<String, ExpectedTensor>,
    kind: Kind,
    device: Device,
    /// Norms scale by one plus their weight.
    norm_plus_one: bool,
}

impl Weights<'_> {
    fn read(&self, name: &str) -> Result<TensorBytes<'_>> {
        let expected = self.expected.get(name).with_context(|| format!("the architecture has no tensor {name}"))?;
        Ok(self.shards.expect(expected)?)
    }

    fn get(&self, name: &str) -> Result<Tensor> {
        to_tensor(name, self.read(name)?, self.kind, self.device)
    }

    /// A norm's factors; float32, as all norms are computed.
    fn norm(&self, name: &str) -> Result<Tensor> {
        let weight = to_tensor(name, self.read(name)?, Kind::Float, self.device)?;
        Ok(if self.norm_plus_one { weight + 1.0 } else { weight })
    }

    fn stack(&self, layer: usize, stack: Stack, biased: bool) -> Result<Weight> {
        let of = |what: &str| -> Result<Tensor> {
            let parts = stack
                .projections()
                .iter()
                .map(|p| self.get(&format!("model.layers.{layer}.{}.{}.{what}", p.block(), p.as_str())));
            let parts = parts.collect::<Result<Vec<_>>>()?;
            Ok(if let [one] = parts.as_slice() { one.shallow_clone() } else { Tensor::cat(&parts, 0) })
        };
        Ok(Weight { matrix: of("weight")?, bias: if biased { Some(of("bias")?) } else { None } })
    }
}

fn load_layer(weights: &Weights<'_>, index: usize, kind: LayerKind, traits: Traits) -> Result<Layer> {
    let norm = |name: &str| weights.norm(&format!("model.layers.{index}.{name}.weight"));
    let feed_forward_norm = if traits.output_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
    Ok(Layer {
        index,
        kind,
        weights: [
            weights.stack(index, Stack::Qkv, traits.qkv_bias)?,
            weights.stack(index, Stack::Output, false)?,
            weights.stack(index, Stack::GateUp, false)?,
            weights.stack(index, Stack::Down, false)?,
        ],
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

impl Model {
    /// Reads a base model's folder, turning its weights into `kind` on `device`.
    ///
    /// # Errors
    /// When a file is missing or not what the architecture needs, or a weight is not a finite number.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let architecture = read_architecture(&folder.join(files::CONFIG))?;
        Self::load_as(architecture, folder, kind, device, &Stop::default())
    }

    /// The same for a folder's weights whose architecture is known from elsewhere.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape or other numbers than the architecture needs, or is not finite; or when it is
    /// asked to stop between two layers.
    pub fn load_as(architecture: Architecture, folder: &Path, kind: Kind, device: Device, stop: &Stop) -> Result<Self> {
        let shards = Shards::open(folder)?;
        let traits = architecture.family.traits();
        let expected = architecture.tensors().into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        let weights = Weights { shards: &shards, expected, kind, device, norm_plus_one: traits.norm_plus_one };
        let embedding = weights.get("model.embed_tokens.weight")?;
        let layers = architecture.layers.iter().enumerate();
        let layers = layers.map(|(index, &kind)| {
            stop.check()?;
            load_layer(&weights, index, kind, traits)
        });
        let layers = layers.collect::<Result<_>>()?;
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
    pub fn projection_size(&self, projection: Projection) -> (i64, i64) {
        let (input, output) = self.architecture.projection_size(projection);
        (input as i64, output as i64)
    }

    /// Final hidden states at the positions `packed` asks for, after the last norm, `[positions, hidden]`, with `adapter` on
    /// and no dropout.
    pub fn hidden(&self, packed: &Packed, adapter: Option<&Adapter>) -> Tensor {
        let pass = self.pass(packed, PassOptions { adapter, ..PassOptions::default() });
        let (stream, trimmed) = self.run(packed, &pass, |_| {});
        let stream = if trimmed { stream } else { stream.index_select(0, &packed.positions) };
        self.last_norm(&stream)
    }

    /// The same, keeping what a backward pass needs.
    pub fn trace<'a>(&'a self, packed: &'a Packed, options: PassOptions<'a>) -> Trace<'a> {
        let pass = self.pass(packed, options);
        let mut saved = Vec::with_capacity(self.layers.len());
        let (stream, trimmed) = self.run(packed, &pass, |block| saved.push(block));
        let stream = if trimmed { stream } else { stream.index_select(0, &packed.positions) };
        let (hidden, inverse) = kernels::rms_norm(&stream, &self.norm, self.architecture.rms_norm_eps);
        Trace { model: self, pass, saved, stream, inverse, positions: &packed.positions, trimmed, hidden }
    }

    /// Reads prompts, whose last positions `packed` asks for: what comes after the last norm there, `[rows, hidden]`, and what
    /// [`Self::follow`] needs to go on from them for at most `following` tokens each.
    pub(crate) fn prefill(&self, packed: &Packed, adapter: Option<&Adapter>, following: i64) -> (Tensor, Vec<Cache>) {
        let pass = self.pass(packed, PassOptions { adapter, ..PassOptions::default() });
        let mut x = self.embed(&packed.ids);
        let mut caches = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let keep = (layer.index + 1 == self.layers.len()).then_some(&packed.positions);
            let (out, cache) = layer.prefill(&x, keep, following, &pass);
            caches.push(cache);
            x = out;
        }
        (self.last_norm(&x), caches)
    }

    /// Reads one token more of each row, `ids: [rows]`, at `positions: [rows]`: what comes after the last norm, `[rows, hidden]`.
    pub(crate) fn follow(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        caches: &mut [Cache],
        visible: &Visible,
        adapter: Option<&Adapter>,
    ) -> Tensor {
        let count = ids.numel();
        let positions = positions.to_kind(Kind::Float);
        let rows = Rows::new(&[count], self.device);
        let pass = Pass {
            architecture: &self.architecture,
            kind: self.kind,
            rows: &rows,
            tokens: count as i64,
            rotary: [&self.frequencies, &self.window_frequencies].map(|frequencies| Rotary::at(frequencies, &positions)),
            adapter,
            dropout: None,
            recompute: Recompute::Nothing,
        };
        let mut x = self.embed(ids);
        for (layer, cache) in self.layers.iter().zip(caches) {
            x = layer.step(&x, cache, visible, &pass);
        }
        self.last_norm(&x)
    }

    fn last_norm(&self, stream: &Tensor) -> Tensor {
        kernels::rms_norm(stream, &self.norm, self.architecture.rms_norm_eps).0
    }

    /// Token ids as the first block takes them, `[tokens, hidden]`.
    fn embed(&self, ids: &Tensor) -> Tensor {
        let x = Tensor::embedding(&self.embedding, ids, -1, false, false);
        if !self.architecture.family.traits().scaled_embedding {
            return x;
        }
        // Rounded to the model's numbers first, as the models were trained.
        &x * Tensor::from((self.architecture.hidden_size as f64).sqrt()).to_kind(self.kind).to_device(self.device)
    }

    fn pass<'a>(&'a self, packed: &'a Packed, options: PassOptions<'a>) -> Pass<'a> {
        let share = options.adapter.map_or(0.0, |adapter| adapter.config.dropout);
        let dropout = options.dropout_key.filter(|_| share > 0.0);
        Pass {
            architecture: &self.architecture,
            kind: self.kind,
            rows: &packed.rows,
            tokens: packed.ids.numel() as i64,
            rotary: [&self.frequencies, &self.window_frequencies]
                .map(|frequencies| Rotary::new(frequencies, packed.rows.width())),
            adapter: options.adapter,
            dropout: dropout.map(|key| Dropout { share, key, places: &packed.places }),
            recompute: options.recompute,
        }
    }

    /// The stream after the last block, `[tokens, hidden]`, or `[positions, hidden]` where the last block let only them go on,
    /// which the second value says.
    fn run(&self, packed: &Packed, pass: &Pass<'_>, mut save: impl FnMut(Saved)) -> (Tensor, bool) {
        let mut x = self.embed(&packed.ids);
        // After the last attention a position that nobody asks for has nothing left to give. Dropout's places are those of all
        // tokens.
        let trimmed = pass.dropout.is_none() && packed.positions.numel() < packed.ids.numel();
        for layer in &self.layers {
            let last = layer.index + 1 == self.layers.len();
            let keep = (last && trimmed).then(|| packed.positions.shallow_clone());
            let (out, saved) = layer.forward(x, keep, pass);
            save(saved);
            x = out;
        }
        (x, trimmed)
    }
}

impl Trace<'_> {
    /// Goes back from the derivative by the hidden states, `[positions, hidden]`, adding the gradient of each of `parts`, ranges
    /// of the pass's tokens, to its own of `gradients`.
    pub fn backward(self, by_hidden: &Tensor, parts: &[Range<i64>], gradients: &mut [Gradient]) {
        let model = self.model;
        let by_stream = kernels::rms_norm_backward(by_hidden, &self.stream, &self.inverse, &model.norm, None);
        let mut by_x = if self.trimmed {
            by_stream
        } else {
            let whole = [self.pass.tokens, model.architecture.hidden_size as i64];
            Tensor::zeros(whole, (model.kind, model.device)).index_copy(0, self.positions, &by_stream)
        };
        let positions = numbers::<i64>(self.positions);
        let kept_before = |token: i64| positions.partition_point(|position| *position < token) as i64;
        let mut parts = Parts {
            tokens: parts.to_vec(),
            kept: parts.iter().map(|part| kept_before(part.start)..kept_before(part.end)).collect(),
            gradients,
        };
        for (layer, saved) in model.layers.iter().zip(self.saved).rev() {
            match layer.backward(by_x, saved, &self.pass, &mut parts) {
                Some(by_input) => by_x = by_input,
                None => break,
            }
        }
    }
}

pub(crate) fn to_tensor(name: &str, stored: TensorBytes<'_>, kind: Kind, device: Device) -> Result<Tensor> {
    let stored_kind = device::kind_of(stored.dtype).with_context(|| format!("tensor {name} is stored as {:?}", stored.dtype))?;
    let shape: Vec<i64> = stored.shape.iter().map(|&n| n as i64).collect();
    let tensor = Tensor::from_data_size(stored.bytes, &shape, stored_kind).to_kind(kind).to_device(device);
    // In float64 no sum of such numbers overflows, so it is finite exactly where all of them are.
    let finite = tensor.sum(Kind::Double).double_value(&[]).is_finite();
    anyhow::ensure!(finite, "tensor {name} holds NaN or infinite numbers");
    Ok(tensor)
}
