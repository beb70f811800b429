//! LoRA (arXiv 2106.09685): `y = W x + (α / r) · B A x`, with `W` frozen.
//!
//! All factors of all modules live in one long vector, which is what the surgery and the optimiser see; the forward pass
//! sees each factor as a matrix over its part of that vector.

use holdfast_domain::Hyperparameters;
use holdfast_domain::hyperparameters::Projection;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tch::{Kind, Tensor};

use crate::model::Model;

/// What shape an adapter has.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The rank `r`.
    pub rank: i64,
    /// The scale `α`.
    pub alpha: f64,
    /// The share of its inputs that is dropped in training.
    pub dropout: f64,
    /// The linear maps it adapts, in the order of [`Projection::ALL`].
    pub targets: Vec<Projection>,
}

impl From<&Hyperparameters> for AdapterConfig {
    fn from(h: &Hyperparameters) -> Self {
        Self { rank: h.lora_rank.into(), alpha: h.lora_alpha, dropout: h.lora_dropout, targets: h.target_modules.clone() }
    }
}

/// The trainable weights.
#[derive(Debug)]
pub struct Adapter {
    /// Its shape.
    pub config: AdapterConfig,
    /// All factors, float32, one after the other: layer by layer, projection by projection, A before B.
    flat: Tensor, // [parameters]
    modules: Vec<Module>,
}

/// One adapted linear map.
#[derive(Debug)]
struct Module {
    layer: usize,
    projection: Projection,
    down: Tensor, // A: [rank, in], a leaf over `flat`
    up: Tensor,   // B: [out, rank], a leaf over `flat`
}

/// Which of its two factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factor {
    /// `A`, `[rank, in]`.
    Down,
    /// `B`, `[out, rank]`.
    Up,
}

/// One factor's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FactorName {
    /// The decoder layer.
    pub layer: usize,
    /// The linear map.
    pub projection: Projection,
    /// Which factor.
    pub factor: Factor,
}

impl FactorName {
    /// The name PEFT gives it in `adapter_model.safetensors`.
    #[must_use]
    pub fn peft(self) -> String {
        let letter = match self.factor {
            Factor::Down => 'A',
            Factor::Up => 'B',
        };
        let (block, projection) = (self.projection.block(), self.projection.as_str());
        format!("base_model.model.model.layers.{}.{block}.{projection}.lora_{letter}.weight", self.layer)
    }
}

impl Adapter {
    /// An adapter whose every factor is zero.
    #[must_use]
    pub fn zeros(model: &Model, config: AdapterConfig) -> Self {
        let layers = model.architecture.layers.len();
        let places: Vec<(usize, Projection)> =
            (0..layers).flat_map(|layer| config.targets.iter().map(move |&projection| (layer, projection))).collect();
        let parameters = places.iter().map(|&(layer, projection)| {
            let (input, output) = model.projection_size(layer, projection);
            config.rank * (input + output)
        });
        let flat = Tensor::zeros([parameters.sum::<i64>()], (Kind::Float, model.device));
        let mut offset = 0;
        let mut leaf = |rows: i64, columns: i64| {
            let view = flat.narrow(0, offset, rows * columns).view([rows, columns]).detach().set_requires_grad(true);
            offset += rows * columns;
            view
        };
        let modules = places
            .into_iter()
            .map(|(layer, projection)| {
                let (input, output) = model.projection_size(layer, projection);
                Module { layer, projection, down: leaf(config.rank, input), up: leaf(output, config.rank) }
            })
            .collect();
        Self { config, flat, modules }
    }

    /// The usual start: `A` uniform within `±1/√in` (what PEFT draws), `B` zero, so that the adapted model is the base.
    ///
    /// Drawn by a generator of our own, so that a seed means the same numbers on every device and version of libtorch.
    #[must_use]
    pub fn init(model: &Model, config: AdapterConfig, seed: u64) -> Self {
        let adapter = Self::zeros(model, config);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(INIT_STREAM);
        for module in &adapter.modules {
            let size = module.down.size();
            let bound = 1.0 / (size[1] as f32).sqrt();
            let numbers: Vec<f32> = (0..module.down.numel()).map(|_| rng.random_range(-bound..bound)).collect();
            set(&module.down, &Tensor::from_slice(&numbers).view([size[0], size[1]]));
        }
        adapter
    }

    /// All weights as one vector, `[parameters]`; changing it changes the factors.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Numbers that are trained.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.flat.numel() as u64
    }

    /// What autograd differentiates by, in the order of [`Self::flat`].
    #[must_use]
    pub fn leaves(&self) -> Vec<&Tensor> {
        self.modules.iter().flat_map(|module| [&module.down, &module.up]).collect()
    }

    /// Every factor with its name, in the order of [`Self::flat`].
    pub fn factors(&self) -> impl Iterator<Item = (FactorName, &Tensor)> {
        self.modules.iter().flat_map(|module| {
            let name = |factor| FactorName { layer: module.layer, projection: module.projection, factor };
            [(name(Factor::Down), &module.down), (name(Factor::Up), &module.up)]
        })
    }

    /// Overwrites a factor.
    pub fn set_factor(factor: &Tensor, value: &Tensor) {
        set(factor, value);
    }

    /// `(α / r) · B A x`, `[.., out]`, of `x: [.., in]`; `None` where the map is not adapted.
    pub fn delta(&self, layer: usize, projection: Projection, x: &Tensor, train: bool) -> Option<Tensor> {
        let at = self.config.targets.binary_search(&projection).ok()?;
        let module = self.modules.get(layer * self.config.targets.len() + at)?;
        let x = if train && self.config.dropout > 0.0 { &x.dropout(self.config.dropout, true) } else { x };
        let low = x.linear(&module.down.to_kind(x.kind()), None::<&Tensor>); // [.., rank]
        let scale = self.config.alpha / self.config.rank as f64;
        Some((low * scale).linear(&module.up.to_kind(x.kind()), None::<&Tensor>))
    }
}

/// Keeps the adapter's random numbers apart from those of the row order, which uses the epochs' streams of the same seed.
const INIT_STREAM: u64 = u64::MAX;

fn set(leaf: &Tensor, value: &Tensor) {
    tch::no_grad(|| leaf.shallow_clone().copy_(value));
}
