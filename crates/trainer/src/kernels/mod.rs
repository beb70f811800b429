//! The memory-bound parts of a step, each in one pass over its data on a CPU.
//!
//! Matrix products are libtorch's. What stands between them (norms, rotary positions, softmaxes, gates, losses) reads and
//! writes more than it computes, so on a CPU each is one fused loop (`cpu.cpp`); on other devices it is a formula of libtorch
//! operations (`composed.rs`). The tests hold the two against each other.

mod composed;
mod cpu;

use std::cell::OnceCell;

use holdfast_base_model::family::Activation;
use tch::{Device, Kind, Tensor};

use crate::gradient::numbers;
use crate::rotary::Rotary;

/// A setting as the kernels take it.
#[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is what it is for")]
pub(crate) fn single(x: f64) -> f32 {
    x as f32
}

fn on_cpu(x: &Tensor) -> bool {
    x.device() == Device::Cpu
}

/// The rows of a forward pass: packed one behind the other for everything that looks at tokens singly, and a padded
/// rectangle for attention.
#[derive(Debug)]
pub struct Rows {
    starts: Tensor, // [rows + 1] int64, on the CPU
    rows: i64,
    width: i64,
    device: Device,
    places: OnceCell<[Tensor; 2]>,
}

impl Rows {
    /// Rows of these lengths.
    #[must_use]
    pub(crate) fn new(lengths: &[usize], device: Device) -> Self {
        let mut starts = vec![0_i64];
        let mut end = 0;
        for &length in lengths {
            end += length as i64;
            starts.push(end);
        }
        let width = lengths.iter().max().copied().unwrap_or(0) as i64;
        Self { starts: Tensor::from_slice(&starts), rows: lengths.len() as i64, width, device, places: OnceCell::new() }
    }

    /// How many.
    #[must_use]
    pub(crate) fn count(&self) -> i64 {
        self.rows
    }

    /// Tokens of the longest.
    #[must_use]
    pub(crate) fn width(&self) -> i64 {
        self.width
    }

    /// For each place of the rectangle its packed token, or the number of tokens where it is padded, `[rows · width]`; and for
    /// each packed token its place, `[tokens]`.
    fn places(&self) -> &[Tensor; 2] {
        self.places.get_or_init(|| {
            let starts = numbers::<i64>(&self.starts);
            let tokens = starts.last().copied().unwrap_or(0);
            let (mut packed, mut place) = (Vec::new(), Vec::new());
            for (row, ends) in (0_i64..).zip(starts.windows(2)) {
                let &[start, end] = ends else { continue };
                packed.extend((0..self.width).map(|time| if start + time < end { start + time } else { tokens }));
                place.extend((0..end - start).map(|time| row * self.width + time));
            }
            [packed, place].map(|indices| Tensor::from_slice(&indices).to_device(self.device))
        })
    }
}

/// How attention's heads are made from a projection's output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadShape<'a> {
    /// Query heads.
    pub(crate) heads: i64,
    /// Key and value heads.
    pub(crate) shared: i64,
    /// Width of a head.
    pub(crate) head_dim: i64,
    /// Norms of a query and a key head, `[head_dim]` float32, where the family has them.
    pub(crate) norms: Option<[&'a Tensor; 2]>,
    /// The norms' ε.
    pub(crate) epsilon: f64,
}

/// Which keys a block of queries sees, and how its scores are made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    /// Query heads that share a key head.
    pub(crate) group: i64,
    /// The time of the first query.
    pub(crate) first_query: i64,
    /// The time of the first key.
    pub(crate) first_key: i64,
    /// Keys a query sees at most, itself among them.
    pub(crate) window: i64,
    /// What products are multiplied by.
    pub(crate) scale: f64,
    /// The first of the pass's rows that the block is of.
    pub(crate) first_row: i64,
    /// How many it is of.
    pub(crate) rows: i64,
}

/// `y = w · x / √(mean(x²) + ε)` over the last dimension, and `1 / √(…)` of each row, float32. `x: [rows, width]`, `w` float32.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> (Tensor, Tensor) {
    if !on_cpu(x) {
        return composed::rms_norm(x, weight, epsilon);
    }
    let (x, [rows, width]) = (x.contiguous(), size(x));
    let (y, inverse) = (x.empty_like(), Tensor::empty([rows], (Kind::Float, Device::Cpu)));
    cpu::rms_norm(&y, &inverse, &x, weight, [rows, width], epsilon);
    (y, inverse)
}

/// The derivative by `x`, with `also` added: that of the path beside the norm.
pub(crate) fn rms_norm_backward(by_y: &Tensor, x: &Tensor, inverse: &Tensor, weight: &Tensor, also: Option<&Tensor>) -> Tensor {
    if !on_cpu(x) {
        return composed::rms_norm_backward(by_y, x, inverse, weight, also);
    }
    let by_x = x.empty_like();
    cpu::rms_norm_backward(&by_x, &by_y.contiguous(), x, inverse, weight, also, size(x));
    by_x
}

/// Queries `[rows, shared, width, group, head_dim]`, keys and values `[rows, shared, width, head_dim]` of the projections'
/// output `[tokens, (heads + 2 shared) head_dim]`: queries and keys normed where the family does, and turned by their
/// positions. Padding is zero.
pub(crate) fn split_heads(qkv: &Tensor, rows: &Rows, rotary: &Rotary, shape: HeadShape<'_>) -> [Tensor; 3] {
    if !on_cpu(qkv) {
        return composed::split_heads(qkv, rows, rotary, shape);
    }
    let [q, k, v] = empty_heads(rows, shape, qkv);
    cpu::split_heads([&q, &k, &v], qkv, rows, rotary, shape);
    [q, k, v]
}

/// The derivative by the projections' output, from those by queries, keys and values. `qkv` is needed where heads are normed.
pub(crate) fn split_heads_backward(
    by: [&Tensor; 3],
    qkv: Option<&Tensor>,
    rows: &Rows,
    rotary: &Rotary,
    shape: HeadShape<'_>,
    tokens: i64,
) -> Tensor {
    if !on_cpu(by[0]) {
        return composed::split_heads_backward(by, qkv, rows, rotary, shape);
    }
    let width = (shape.heads + 2 * shape.shared) * shape.head_dim;
    let by_qkv = Tensor::empty([tokens, width], (by[0].kind(), Device::Cpu));
    let by = by.map(Tensor::contiguous);
    cpu::split_heads_backward(&by_qkv, [&by[0], &by[1], &by[2]], qkv, rows, rotary, shape);
    by_qkv
}

/// What attention puts out, `[rows, shared, width, group, head_dim]`, token by token: `[tokens, heads · head_dim]`.
pub(crate) fn join_heads(heads: &Tensor, rows: &Rows, shape: HeadShape<'_>, tokens: i64) -> Tensor {
    if !on_cpu(heads) {
        return composed::join_heads(heads, rows, shape);
    }
    let packed = Tensor::empty([tokens, shape.heads * shape.head_dim], (heads.kind(), Device::Cpu));
    cpu::join_heads(&packed, &heads.contiguous(), false, rows, shape);
    packed
}

/// The way back, with zeros where padded.
pub(crate) fn join_heads_backward(by_packed: &Tensor, rows: &Rows, shape: HeadShape<'_>) -> Tensor {
    if !on_cpu(by_packed) {
        return composed::join_heads_backward(by_packed, rows, shape);
    }
    let [by_heads, ..] = empty_heads(rows, shape, by_packed);
    cpu::join_heads(&by_packed.contiguous(), &by_heads, true, rows, shape);
    by_heads
}

/// Probabilities of `kind`, of float32 scores `[rows · shared, queries · group, keys]`; rows of padded queries are zero.
pub(crate) fn attention_softmax(scores: &Tensor, rows: &Rows, block: Block, kind: Kind) -> Tensor {
    if !on_cpu(scores) {
        return composed::attention_softmax(scores, rows, block, kind);
    }
    let probabilities = Tensor::empty(scores.size(), (kind, Device::Cpu));
    cpu::attention_softmax(&probabilities, scores, rows, block);
    probabilities
}

/// The probabilities again, and the derivative by the scores from the one by the probabilities.
pub(crate) fn attention_softmax_backward(by_probabilities: Tensor, scores: &Tensor, rows: &Rows, block: Block) -> [Tensor; 2] {
    if !on_cpu(scores) {
        return composed::attention_softmax_backward(&by_probabilities, scores, rows, block);
    }
    let probabilities = by_probabilities.empty_like();
    cpu::attention_softmax_backward(&probabilities, &by_probabilities, scores, rows, block);
    [probabilities, by_probabilities]
}

/// `f(gate) · up`, `[tokens, inner]`, of `[tokens, 2 inner]`.
pub(crate) fn gated(gate_up: &Tensor, activation: Activation) -> Tensor {
    if !on_cpu(gate_up) {
        return composed::gated(gate_up, activation);
    }
    let [tokens, width] = size(gate_up);
    let out = Tensor::empty([tokens, width / 2], (gate_up.kind(), Device::Cpu));
    cpu::gated(&out, gate_up, activation);
    out
}

/// The derivative by `gate_up`, and `f(gate) · up` again.
pub(crate) fn gated_backward(gate_up: &Tensor, by_out: &Tensor, activation: Activation) -> [Tensor; 2] {
    if !on_cpu(gate_up) {
        return composed::gated_backward(gate_up, by_out, activation);
    }
    let (by_gate_up, out) = (gate_up.empty_like(), by_out.empty_like());
    cpu::gated_backward(&by_gate_up, &out, gate_up, &by_out.contiguous(), activation);
    [by_gate_up, out]
}

/// What a loss makes of some logits.
#[derive(Debug)]
pub(crate) struct ByLogits {
    /// The loss at each position, in nats, float32.
    pub(crate) loss: Tensor,
    /// Its derivative by that position's logits, `[positions, vocabulary]`.
    pub(crate) derivative: Tensor,
    /// Whether the target ranks first, int64; without meaning for a divergence.
    pub(crate) correct: Tensor,
}

/// `−log p(target)` and `softmax − onehot`. Takes the logits `[positions, vocabulary]`, which it may overwrite.
pub(crate) fn cross_entropy(logits: Tensor, targets: &Tensor, cap: Option<f64>) -> ByLogits {
    if !on_cpu(&logits) {
        return composed::cross_entropy(&logits, targets, cap);
    }
    let rows = size(&logits)[0];
    let (loss, correct) = per_position(rows);
    cpu::cross_entropy(&logits, targets, &loss, &correct, cap);
    ByLogits { loss, derivative: logits, correct }
}

/// `KL(base ‖ adapted)` and `softmax(adapted) − softmax(base)`. Takes both logits `[positions, vocabulary]`.
pub(crate) fn divergence(logits: Tensor, base: &Tensor, cap: Option<f64>) -> ByLogits {
    if !on_cpu(&logits) {
        return composed::divergence(&logits, base, cap);
    }
    let (loss, correct) = per_position(size(&logits)[0]);
    cpu::divergence(&logits, base, &loss, cap);
    ByLogits { loss, derivative: logits, correct }
}

fn per_position(rows: i64) -> (Tensor, Tensor) {
    (Tensor::zeros([rows], (Kind::Float, Device::Cpu)), Tensor::zeros([rows], (Kind::Int64, Device::Cpu)))
}

/// `x / (1 − share)` or zero. What becomes of an element is decided by `key`, by its token's place (`places: [tokens]`) and its
/// column, so the same again gives the same.
pub(crate) fn dropout(x: &Tensor, key: u64, places: &Tensor, share: f64) -> Tensor {
    if !on_cpu(x) {
        return composed::dropout(x, key, places, share);
    }
    let x = x.contiguous();
    let out = x.empty_like();
    cpu::dropout(&out, &x, key, places, share);
    out
}

/// `lowᵀ wide`, summed in float32: `[rank, width]` of `low: [tokens, rank]` and `wide: [tokens, width]`.
pub(crate) fn outer_sum(low: &Tensor, wide: &Tensor) -> Tensor {
    if !on_cpu(low) {
        return composed::outer_sum(low, wide);
    }
    let out = Tensor::zeros([size(low)[1], size(wide)[1]], (Kind::Float, Device::Cpu));
    cpu::outer_sum(&out, low, wide);
    out
}

/// The same added onto `out: [rank, width]`, float32.
pub(crate) fn add_outer_sum(out: &Tensor, low: &Tensor, wide: &Tensor) {
    if on_cpu(low) {
        cpu::outer_sum(out, low, wide);
    } else {
        let _ = out.shallow_clone().g_add_(&composed::outer_sum(low, wide));
    }
}

/// ⟨x, y⟩ of two float32 vectors, summed in float64.
pub(crate) fn inner_product(x: &Tensor, y: &Tensor) -> f64 {
    if !on_cpu(x) {
        return composed::inner_product(x, y);
    }
    cpu::inner_product(&x.contiguous(), &y.contiguous())
}

fn size(x: &Tensor) -> [i64; 2] {
    let width = x.size().last().copied().unwrap_or(1);
    [x.numel() as i64 / width.max(1), width]
}

fn empty_heads(rows: &Rows, shape: HeadShape<'_>, like: &Tensor) -> [Tensor; 3] {
    let options = (like.kind(), like.device());
    let shared = [rows.rows, shape.shared, rows.width, shape.head_dim];
    let queries = [rows.rows, shape.shared, rows.width, shape.heads / shape.shared, shape.head_dim];
    [Tensor::empty(queries, options), Tensor::empty(shared, options), Tensor::empty(shared, options)]
}

#[cfg(test)]
mod tests;
