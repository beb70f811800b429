//! The kernels as formulas of libtorch operations, for devices that have no fused loop of ours.

use holdfast_base_model::family::Activation;
use tch::{Kind, Tensor};

use super::{Block, ByLogits, HeadShape, Rows};
use crate::rotary::Rotary;

fn float(x: &Tensor) -> Tensor {
    x.to_kind(Kind::Float)
}

fn mean(x: &Tensor) -> Tensor {
    x.mean_dim(-1_i64, true, Kind::Float)
}

fn inverse_root(x: &Tensor, epsilon: f64) -> Tensor {
    (mean(&x.square()) + epsilon).rsqrt()
}

pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> (Tensor, Tensor) {
    let wide = float(x);
    let inverse = inverse_root(&wide, epsilon);
    ((&wide * &inverse * weight).to_kind(x.kind()), inverse.reshape(-1))
}

pub(super) fn rms_norm_backward(by_y: &Tensor, x: &Tensor, inverse: &Tensor, weight: &Tensor, also: Option<&Tensor>) -> Tensor {
    let normed_shape = &x.size()[..x.dim() - 1];
    let inverse = inverse.view(normed_shape).unsqueeze(-1);
    let by_x = norm_backward(&float(by_y), &float(x), &inverse, weight);
    also.map_or_else(|| by_x.shallow_clone(), |also| &by_x + float(also)).to_kind(x.kind())
}

/// With `x̂ = s·x`: `s·(w·dy − x̂·mean(w·dy·x̂))`.
fn norm_backward(by_y: &Tensor, x: &Tensor, inverse: &Tensor, weight: &Tensor) -> Tensor {
    let (scaled, by) = (x * inverse, by_y * weight);
    inverse * (&by - &scaled * mean(&(&by * &scaled)))
}

/// `[tokens, width]` to attention's rectangle, `[rows, width, ..]`, zero where padded.
fn to_rectangle(packed: &Tensor, rows: &Rows) -> Tensor {
    let padded = Tensor::cat(&[packed, &packed.narrow(0, 0, 1).zeros_like()], 0);
    padded.index_select(0, &rows.places()[0]).view([rows.rows, rows.width, -1])
}

/// `[rows, width, ..]` to `[tokens, ..]`.
fn to_packed(rectangle: &Tensor, rows: &Rows) -> Tensor {
    rectangle.flatten(0, 1).flatten(1, -1).index_select(0, &rows.places()[1])
}

/// Turns `x: [rows, width, heads, head_dim]`, or back with `sign` −1.
fn turn(x: &Tensor, rotary: &Rotary, sign: f64) -> Tensor {
    let halves = x.chunk(2, -1);
    let (cos, sin) = (rotary.cos.unsqueeze(1), rotary.sin.unsqueeze(1) * sign); // [width, 1, head_dim / 2]
    Tensor::cat(&[&halves[0] * &cos - &halves[1] * &sin, &halves[1] * &cos + &halves[0] * &sin], -1)
}

/// The three parts of `[rows, width, (heads + 2 shared) head_dim]`, each `[rows, width, its heads, head_dim]`.
fn parts(rectangle: &Tensor, rows: &Rows, shape: HeadShape<'_>) -> [Tensor; 3] {
    let (heads, shared, width) = (shape.heads, shape.shared, shape.head_dim);
    [(0, heads), (heads, shared), (heads + shared, shared)]
        .map(|(first, count)| rectangle.narrow(2, first * width, count * width).reshape([rows.rows, rows.width, count, width]))
}

/// `[rows, width, heads, head_dim]` to `[rows, shared, width, group, head_dim]`.
fn grouped(x: &Tensor, shape: HeadShape<'_>) -> Tensor {
    let size = x.size();
    x.view([size[0], size[1], shape.shared, shape.heads / shape.shared, shape.head_dim]).transpose(1, 2).contiguous()
}

pub(super) fn split_heads(qkv: &Tensor, rows: &Rows, rotary: &Rotary, shape: HeadShape<'_>) -> [Tensor; 3] {
    let kind = qkv.kind();
    let [q, k, v] = parts(&to_rectangle(qkv, rows), rows, shape);
    let made = |x: &Tensor, norm: Option<&Tensor>| {
        let x = float(x);
        let x = norm.map_or_else(|| x.shallow_clone(), |weight| &x * inverse_root(&x, shape.epsilon) * weight);
        turn(&x, rotary, 1.0).to_kind(kind)
    };
    let [of_q, of_k] = shape.norms.map_or([None; 2], |norms| norms.map(Some));
    let over_time = |x: &Tensor| x.transpose(1, 2).contiguous();
    [grouped(&made(&q, of_q), shape), over_time(&made(&k, of_k)), over_time(&v)]
}

pub(super) fn split_heads_backward(
    by: [&Tensor; 3],
    qkv: Option<&Tensor>,
    rows: &Rows,
    rotary: &Rotary,
    shape: HeadShape<'_>,
) -> Tensor {
    let kind = by[0].kind();
    let [by_q, by_k, by_v] = by;
    let flat_queries = by_q.transpose(1, 2).reshape([rows.rows, rows.width, shape.heads, shape.head_dim]);
    let mut by = [flat_queries, by_k.transpose(1, 2), by_v.transpose(1, 2)].map(|x| float(&x));
    for part in by.iter_mut().take(2) {
        *part = turn(part, rotary, -1.0);
    }
    if let (Some(norms), Some(qkv)) = (shape.norms, qkv) {
        let inputs = parts(&to_rectangle(qkv, rows), rows, shape);
        for ((part, input), norm) in by.iter_mut().zip(&inputs).zip(norms) {
            let input = float(input);
            *part = norm_backward(part, &input, &inverse_root(&input, shape.epsilon), norm);
        }
    }
    let by = by.map(|part| to_packed(&part.to_kind(kind), rows));
    Tensor::cat(&by, 1)
}

pub(super) fn join_heads(heads: &Tensor, rows: &Rows, shape: HeadShape<'_>) -> Tensor {
    let rectangle = heads.transpose(1, 2).reshape([rows.rows, rows.width, shape.heads * shape.head_dim]);
    to_packed(&rectangle, rows)
}

pub(super) fn join_heads_backward(by_packed: &Tensor, rows: &Rows, shape: HeadShape<'_>) -> Tensor {
    let rectangle = to_rectangle(by_packed, rows);
    grouped(&rectangle.view([rows.rows, rows.width, shape.heads, shape.head_dim]), shape)
}

/// Scaled scores, −∞ where a query does not see a key; with whether it sees it. `[rows · shared, queries · group, keys]`.
fn seen(scores: &Tensor, rows: &Rows, block: Block) -> (Tensor, Tensor) {
    let size = scores.size();
    let (heads, queries, keys) = (size[0], size[1] / block.group, size[2]);
    let options = (Kind::Int64, scores.device());
    let query = Tensor::arange(queries, options).repeat_interleave_self_int(block.group, 0, None) + block.first_query;
    let distance = query.unsqueeze(1) - (Tensor::arange(keys, options) + block.first_key).unsqueeze(0); // [lines, keys]
    let within = distance.ge(0).logical_and(&distance.lt(block.window));
    let starts = rows.starts.narrow(0, block.first_row, block.rows + 1).to_device(scores.device());
    let lengths = starts.narrow(0, 1, block.rows) - starts.narrow(0, 0, block.rows);
    let lengths = lengths.repeat_interleave_self_int(heads / block.rows, 0, None).view([heads, 1, 1]);
    let sees = within.unsqueeze(0).logical_and(&query.view([1, -1, 1]).lt_tensor(&lengths));
    ((scores * block.scale).masked_fill(&sees.logical_not(), f64::NEG_INFINITY), sees)
}

fn probabilities(masked: &Tensor, sees: &Tensor) -> Tensor {
    // A padded query sees nothing; its softmax is NaN until it is set to zero.
    masked.softmax(-1, Kind::Float).masked_fill(&sees.logical_not(), 0.0)
}

pub(super) fn attention_softmax(scores: &Tensor, rows: &Rows, block: Block, kind: Kind) -> Tensor {
    let (masked, sees) = seen(scores, rows, block);
    probabilities(&masked, &sees).to_kind(kind)
}

pub(super) fn attention_softmax_backward(by: &Tensor, scores: &Tensor, rows: &Rows, block: Block) -> [Tensor; 2] {
    let kind = by.kind();
    let (masked, sees) = seen(scores, rows, block);
    let p = probabilities(&masked, &sees);
    let by = float(by);
    let dot = (&p * &by).sum_dim_intlist(-1_i64, true, Kind::Float);
    let by_scores = &p * (by - dot) * block.scale;
    [p.to_kind(kind), by_scores.to_kind(kind)]
}

fn activated(gate: &Tensor, activation: Activation) -> Tensor {
    match activation {
        Activation::Silu => gate.silu(),
        Activation::GeluTanh => gate.gelu("tanh"),
    }
}

pub(super) fn gated(gate_up: &Tensor, activation: Activation) -> Tensor {
    let halves = float(gate_up).chunk(2, -1);
    (activated(&halves[0], activation) * &halves[1]).to_kind(gate_up.kind())
}

pub(super) fn gated_backward(gate_up: &Tensor, by_out: &Tensor, activation: Activation) -> [Tensor; 2] {
    let (halves, by) = (float(gate_up).chunk(2, -1), float(by_out));
    let value = activated(&halves[0], activation);
    let by_value = &by * &halves[1];
    let by_gate = match activation {
        Activation::Silu => halves[0].silu_backward(&by_value),
        Activation::GeluTanh => halves[0].gelu_backward(&by_value, "tanh"),
    };
    let by_gate_up = Tensor::cat(&[by_gate, by * &value], -1);
    [by_gate_up.to_kind(gate_up.kind()), (value * &halves[1]).to_kind(gate_up.kind())]
}

fn capped(logits: &Tensor, cap: Option<f64>) -> Tensor {
    cap.map_or_else(|| float(logits), |cap| (float(logits) / cap).tanh() * cap)
}

/// `derivative` by capped logits, to the one by the logits themselves.
fn uncapped(derivative: &Tensor, capped: &Tensor, cap: Option<f64>) -> Tensor {
    cap.map_or_else(|| derivative.shallow_clone(), |cap| derivative * (1.0 - (capped / cap).square()))
}

pub(super) fn cross_entropy(logits: &Tensor, targets: &Tensor, cap: Option<f64>) -> ByLogits {
    let (values, targets) = (capped(logits, cap), targets.unsqueeze(1));
    let log_p = values.log_softmax(-1, Kind::Float);
    let minus_one = Tensor::full_like(&float(&targets), -1.0);
    let derivative = uncapped(&log_p.exp().scatter_add(1, &targets, &minus_one), &values, cap);
    ByLogits {
        loss: -log_p.gather(1, &targets, false).squeeze_dim(1),
        derivative: derivative.to_kind(logits.kind()),
        correct: log_p.argmax(1, true).eq_tensor(&targets).squeeze_dim(1).to_kind(Kind::Int64),
    }
}

pub(super) fn divergence(logits: &Tensor, base: &Tensor, cap: Option<f64>) -> ByLogits {
    let values = capped(logits, cap);
    let (log_p, log_base) = (values.log_softmax(-1, Kind::Float), capped(base, cap).log_softmax(-1, Kind::Float));
    let base_p = log_base.exp();
    let loss = (&base_p * (log_base - &log_p)).sum_dim_intlist(1, false, Kind::Float);
    let derivative = uncapped(&(log_p.exp() - base_p), &values, cap).to_kind(logits.kind());
    let correct = loss.zeros_like().to_kind(Kind::Int64);
    ByLogits { loss, derivative, correct }
}

/// The finaliser of `cpu.cpp`, over unsigned 32-bit numbers kept in int64.
fn mix(x: &Tensor) -> Tensor {
    const WORD: i64 = 0xffff_ffff;
    let shifted = |x: &Tensor, by: i64| x.bitwise_xor_tensor(&x.bitwise_right_shift_tensor_scalar(by));
    let times = |x: &Tensor, by: i64| (x * by).bitwise_and(WORD);
    shifted(&times(&shifted(&times(&shifted(x, 16), 0x7feb_352d), 15), 0x846c_a68b), 16)
}

pub(super) fn dropout(x: &Tensor, key: u64, places: &Tensor, share: f64) -> Tensor {
    const WORD: i64 = 0xffff_ffff;
    let places = places.to_device(x.device());
    let words = [
        Tensor::full_like(&places, (key >> 32) as i64),
        places.bitwise_and(WORD),
        places.bitwise_right_shift_tensor_scalar(32).bitwise_and(WORD),
    ];
    let mut line = Tensor::full_like(&places, key as i64).bitwise_and(WORD);
    for word in &words {
        line = mix(&line.bitwise_xor_tensor(word));
    }
    let width = x.size().last().copied().unwrap_or(1);
    let column = Tensor::arange(width, (Kind::Int64, x.device())) * 0x9e37_79b9_i64;
    let hash = mix(&(line.unsqueeze(1) + column.unsqueeze(0)).bitwise_and(WORD)); // [tokens, width]
    let bound = (f64::from(super::single(share)) * 4_294_967_295.0).trunc();
    let kept = hash.to_kind(Kind::Double).ge(bound).to_kind(Kind::Float) / (1.0 - share);
    (float(x) * kept).to_kind(x.kind())
}

pub(super) fn outer_sum(low: &Tensor, wide: &Tensor) -> Tensor {
    float(low).tr().mm(&float(wide))
}

pub(super) fn inner_product(x: &Tensor, y: &Tensor) -> f64 {
    x.to_kind(Kind::Double).dot(&y.to_kind(Kind::Double)).double_value(&[])
}
