//! The trainable weights of LoRA (arXiv 2106.09685): `y = W x + (α / r) · B A x`, with `W` frozen.
//!
//! All factors of all modules live in one long vector, which is what the surgery and the optimiser see; the forward pass
//! sees each factor as a matrix over its part of that vector. Within a stack (see [`Stack`]) the `A`s stand together, so that
//! one product computes them.

use std::ops::Range;

use holdfast_domain::Hyperparameters;
use holdfast_domain::hyperparameters::Projection;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tch::{Kind, Tensor};

use crate::linear::Stack;
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
    /// All factors, float32: layer by layer, stack by stack, the `A`s of a stack before its `B`s.
    flat: Tensor, // [parameters]
    /// By layer, then in the order of [`Stack::ALL`].
    layers: Vec<[Option<Modules>; 4]>,
}

/// The adapted maps of one stack.
#[derive(Debug)]
struct Modules {
    input: i64,
    members: Vec<Member>,
}

/// One adapted map, by the places of its factors.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) projection: Projection,
    /// Where its output begins in that of the stack.
    pub(crate) first_column: i64,
    /// The width of its output.
    pub(crate) columns: i64,
    /// Where `A`, `[rank, in]`, lies in the long vector.
    pub(crate) down: Range<i64>,
    /// Where `B`, `[out, rank]`, lies there.
    pub(crate) up: Range<i64>,
}

/// Which of its two factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factor {
    /// `A`, `[rank, in]`.
    Down,
    /// `B`, `[out, rank]`.
    Up,
}

/// One factor's place in the model.
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
    /// The linear map's name in Hugging Face's checkpoints.
    #[must_use]
    pub fn module(self) -> String {
        format!("model.layers.{}.{}.{}", self.layer, self.projection.block(), self.projection.as_str())
    }

    /// The name PEFT gives it in `adapter_model.safetensors`.
    #[must_use]
    pub fn peft(self) -> String {
        let letter = match self.factor {
            Factor::Down => 'A',
            Factor::Up => 'B',
        };
        format!("base_model.model.{}.lora_{letter}.weight", self.module())
    }
}

/// A factor: its name, where it lies in the long vector, and its shape there.
#[derive(Debug, Clone)]
pub struct FactorPlace {
    /// Its name.
    pub name: FactorName,
    /// Where it lies.
    pub range: Range<i64>,
    /// Its shape, row-major.
    pub shape: [i64; 2],
}

impl FactorPlace {
    /// The factor's part of a vector that is laid out like [`Adapter::flat`]; a view.
    pub fn of(&self, vector: &Tensor) -> Tensor {
        vector.narrow(0, self.range.start, self.range.end - self.range.start).view(self.shape)
    }
}

/// A stack's factors in the numbers a pass computes in.
#[derive(Debug)]
pub(crate) struct Patch<'a> {
    pub(crate) layer: usize,
    modules: &'a Modules,
    rank: i64,
    scale: f64,
    /// The `A`s one below the other, `[Σ r, in]`.
    pub(crate) down: Tensor,
    ups: Vec<Tensor>, // [out, r] each
}

impl Patch<'_> {
    /// Each adapted map with its `B`, `[out, r]`.
    pub(crate) fn members(&self) -> impl Iterator<Item = (&Member, &Tensor)> {
        self.modules.members.iter().zip(&self.ups)
    }

    /// `α / r`.
    pub(crate) fn scale(&self) -> f64 {
        self.scale
    }

    /// A member's columns of `[tokens, Σ r]`.
    pub(crate) fn of_member(&self, low: &Tensor, member: &Member) -> Tensor {
        low.narrow(1, self.first_rank(member), self.rank)
    }

    /// A member's `A`, `[r, in]`.
    pub(crate) fn down_of(&self, member: &Member) -> Tensor {
        self.down.narrow(0, self.first_rank(member), self.rank)
    }

    /// Where all `A`s lie in the long vector.
    pub(crate) fn down_range(&self) -> Range<i64> {
        let members = &self.modules.members;
        members.first().map_or(0, |m| m.down.start)..members.last().map_or(0, |m| m.down.end)
    }

    fn first_rank(&self, member: &Member) -> i64 {
        let first = self.modules.members.first().map_or(0, |m| m.down.start);
        (member.down.start - first) / self.modules.input
    }
}

impl Adapter {
    /// An adapter whose every factor is zero.
    #[must_use]
    pub fn zeros(model: &Model, config: AdapterConfig) -> Self {
        let mut end = 0;
        let mut place = |length: i64| {
            let start = end;
            end += length;
            start..end
        };
        let rank = config.rank;
        let layers = (0..model.architecture.layers.len())
            .map(|_| {
                Stack::ALL.map(|stack| {
                    let mut first_column = 0;
                    let mut members = Vec::new();
                    let mut input = 0;
                    for &projection in stack.projections() {
                        let (width, columns) = model.projection_size(projection);
                        if config.targets.contains(&projection) {
                            input = width;
                            members.push(Member { projection, first_column, columns, down: place(rank * width), up: 0..0 });
                        }
                        first_column += columns;
                    }
                    for member in &mut members {
                        member.up = place(member.columns * rank);
                    }
                    (!members.is_empty()).then_some(Modules { input, members })
                })
            })
            .collect();
        Self { config, flat: Tensor::zeros([end], (Kind::Float, model.device)), layers }
    }

    /// The usual start: `A` uniform within `±1/√in` (what PEFT draws), `B` zero, so that the adapted model is the base.
    ///
    /// Drawn by a generator of our own, so that a seed means the same numbers on every device and version of libtorch.
    #[must_use]
    pub fn init(model: &Model, config: AdapterConfig, seed: u64) -> Self {
        let adapter = Self::zeros(model, config);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(INIT_STREAM);
        for place in adapter.places().filter(|place| place.name.factor == Factor::Down) {
            let bound = 1.0 / (place.shape[1] as f32).sqrt();
            let numbers: Vec<f32> = place.range.clone().map(|_| rng.random_range(-bound..bound)).collect();
            place.of(&adapter.flat).copy_(&Tensor::from_slice(&numbers).view(place.shape));
        }
        adapter
    }

    /// All weights as one vector, `[parameters]`; changing it changes the factors.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Overwrites all weights.
    pub fn set(&self, flat: &Tensor) {
        self.flat.shallow_clone().copy_(flat);
    }

    /// Adds an update to all weights.
    pub fn shift(&self, change: &Tensor) {
        let mut flat = self.flat.shallow_clone();
        flat += change;
    }

    /// Numbers that are trained.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.flat.numel() as u64
    }

    /// Every factor's name and place, in the order of [`Self::flat`].
    pub fn places(&self) -> impl Iterator<Item = FactorPlace> {
        let rank = self.config.rank;
        self.layers.iter().enumerate().flat_map(move |(layer, stacks)| {
            stacks.iter().flatten().flat_map(move |modules| {
                let place = move |member: &Member, factor: Factor| {
                    let name = FactorName { layer, projection: member.projection, factor };
                    match factor {
                        Factor::Down => FactorPlace { name, range: member.down.clone(), shape: [rank, modules.input] },
                        Factor::Up => FactorPlace { name, range: member.up.clone(), shape: [member.columns, rank] },
                    }
                };
                let downs = modules.members.iter().map(move |member| place(member, Factor::Down));
                downs.chain(modules.members.iter().map(move |member| place(member, Factor::Up)))
            })
        })
    }

    /// Every factor with its name, in the order of [`Self::flat`]; views.
    pub fn factors(&self) -> impl Iterator<Item = (FactorName, Tensor)> {
        self.places().map(|place| (place.name, place.of(&self.flat)))
    }

    /// The factors of a stack in `kind`; `None` where it is not adapted.
    pub(crate) fn patch(&self, layer: usize, stack: Stack, kind: Kind) -> Option<Patch<'_>> {
        let modules = self.layers.get(layer)?[stack as usize].as_ref()?;
        let rank = self.config.rank;
        let cut = |range: &Range<i64>, shape: [i64; 2]| {
            self.flat.narrow(0, range.start, range.end - range.start).view(shape).to_kind(kind)
        };
        let (first, last) = (modules.members.first()?, modules.members.last()?);
        let down = cut(&(first.down.start..last.down.end), [rank * modules.members.len() as i64, modules.input]);
        let ups = modules.members.iter().map(|member| cut(&member.up, [member.columns, rank])).collect();
        Some(Patch { layer, modules, rank, scale: self.config.alpha / rank as f64, down, ups })
    }
}

/// Keeps the adapter's random numbers apart from those of the row order, which uses the epochs' streams of the same seed.
const INIT_STREAM: u64 = u64::MAX;
