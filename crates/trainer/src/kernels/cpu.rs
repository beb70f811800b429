//! The table of `cpu.cpp`'s functions for this machine's instructions.

#![expect(
    unsafe_code,
    reason = "calls C++; every pointer comes from a contiguous tensor of the kind asked for, whose length `mod.rs` gives"
)]

use std::ffi::c_void;
use std::sync::OnceLock;

use holdfast_base_model::family::Activation;
use tch::{Kind, Tensor};

use super::{Block, HeadShape, Rows, single, size};
use crate::rotary::Rotary;

/// Where a pass's tokens lie: `Layout` in `cpu.cpp`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Layout {
    starts: *const i64,
    rows: i64,
    width: i64,
    heads: i64,
    shared: i64,
    head_dim: i64,
}

/// A block of attention scores: `Block` in `cpu.cpp`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ScoreBlock {
    starts: *const i64,
    rows: i64,
    shared: i64,
    group: i64,
    queries: i64,
    keys: i64,
    first_query: i64,
    first_key: i64,
    window: i64,
    scale: f32,
}

/// Numbers of whichever kind the table is for.
type Data = *mut c_void;

/// The functions over one kind of numbers: `Of` in `cpu.cpp`, in its order.
#[repr(C)]
struct Of {
    rms_norm: unsafe extern "C" fn(Data, *mut f32, Data, *const f32, i64, i64, f32),
    rms_norm_backward: unsafe extern "C" fn(Data, Data, Data, *const f32, *const f32, Data, i64, i64),
    split_heads: unsafe extern "C" fn(Data, Data, Data, Data, *const f32, *const f32, *const f32, *const f32, f32, Layout),
    split_heads_backward:
        unsafe extern "C" fn(Data, Data, Data, Data, Data, *const f32, *const f32, *const f32, *const f32, f32, Layout),
    join_heads: unsafe extern "C" fn(Data, Data, bool, Layout),
    attention_softmax: unsafe extern "C" fn(Data, *const f32, ScoreBlock),
    attention_softmax_backward: unsafe extern "C" fn(Data, Data, *const f32, ScoreBlock),
    gated: unsafe extern "C" fn(Data, Data, i64, i64, bool),
    gated_backward: unsafe extern "C" fn(Data, Data, Data, Data, i64, i64, bool),
    cross_entropy: unsafe extern "C" fn(Data, *const i64, *mut f32, *mut i64, i64, i64, f32),
    divergence: unsafe extern "C" fn(Data, Data, *mut f32, i64, i64, f32),
    dropout: unsafe extern "C" fn(Data, Data, u64, *const i64, i64, i64, f32),
    outer_sum: unsafe extern "C" fn(*mut f32, Data, i64, Data, i64, i64, i64, i64),
}

#[repr(C)]
struct Table {
    of_float: Of,
    of_bfloat16: Of,
    inner_product: unsafe extern "C" fn(*mut f64, *const f32, *const f32, i64),
}

unsafe extern "C" {
    fn holdfast_kernels_baseline() -> *const c_void;
    #[cfg(target_arch = "x86_64")]
    fn holdfast_kernels_avx2() -> *const c_void;
    #[cfg(target_arch = "x86_64")]
    fn holdfast_kernels_avx512() -> *const c_void;
}

fn table() -> &'static Table {
    static TABLE: OnceLock<&'static Table> = OnceLock::new();
    TABLE.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        let found = unsafe {
            // All that the compiler may use at the levels x86-64-v3 and x86-64-v4 (see `build.rs`).
            let v3 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("movbe");
            let v4 = v3
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512cd")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            match (v3, v4) {
                (_, true) => holdfast_kernels_avx512(),
                (true, false) => holdfast_kernels_avx2(),
                (false, false) => holdfast_kernels_baseline(),
            }
        };
        #[cfg(not(target_arch = "x86_64"))]
        let found = unsafe { holdfast_kernels_baseline() };
        // A constant of the program, laid out as `Table`.
        unsafe { &*found.cast::<Table>() }
    })
}

/// The functions for tensors like `x`.
fn of(x: &Tensor) -> &'static Of {
    match x.kind() {
        Kind::BFloat16 => &table().of_bfloat16,
        _ => &table().of_float,
    }
}

/// The numbers of a contiguous tensor.
fn data(x: &Tensor) -> Data {
    assert!(x.is_contiguous() && matches!(x.kind(), Kind::Float | Kind::BFloat16), "a kernel needs plain numbers");
    x.data_ptr()
}

fn floats(x: &Tensor) -> *mut f32 {
    assert!(x.is_contiguous() && x.kind() == Kind::Float, "a kernel needs float32");
    x.data_ptr().cast()
}

fn integers(x: &Tensor) -> *mut i64 {
    assert!(x.is_contiguous() && x.kind() == Kind::Int64, "a kernel needs int64");
    x.data_ptr().cast()
}

/// The numbers of a tensor that must be like `like`.
fn alike(x: &Tensor, like: &Tensor) -> Data {
    assert!(x.kind() == like.kind() && x.numel() == like.numel(), "a kernel needs tensors of one kind and length");
    data(x)
}

fn optional(x: Option<&Tensor>) -> Data {
    x.map_or(std::ptr::null_mut(), data)
}

fn norms(shape: HeadShape<'_>) -> [*const f32; 2] {
    shape.norms.map_or([std::ptr::null(); 2], |norms| norms.map(|norm| floats(norm).cast_const()))
}

fn layout(rows: &Rows, shape: HeadShape<'_>) -> Layout {
    Layout {
        starts: integers(&rows.starts),
        rows: rows.rows,
        width: rows.width,
        heads: shape.heads,
        shared: shape.shared,
        head_dim: shape.head_dim,
    }
}

fn score_block(scores: &Tensor, rows: &Rows, block: Block) -> ScoreBlock {
    let (heads, lines, keys) = scores.size3().unwrap_or_default();
    // The rows of a block are a range of the pass's, so their starts begin further on.
    let starts = rows.starts.narrow(0, block.first_row, rows.rows + 1 - block.first_row);
    ScoreBlock {
        starts: integers(&starts),
        rows: block.rows,
        shared: heads / block.rows,
        group: block.group,
        queries: lines / block.group,
        keys,
        first_query: block.first_query,
        first_key: block.first_key,
        window: block.window,
        scale: single(block.scale),
    }
}

fn cap(cap: Option<f64>) -> f32 {
    single(cap.unwrap_or(0.0))
}

pub(super) fn rms_norm(y: &Tensor, inverse: &Tensor, x: &Tensor, weight: &Tensor, [rows, width]: [i64; 2], epsilon: f64) {
    unsafe { (of(x).rms_norm)(data(y), floats(inverse), data(x), floats(weight), rows, width, single(epsilon)) }
}

pub(super) fn rms_norm_backward(
    by_x: &Tensor,
    by_y: &Tensor,
    x: &Tensor,
    inverse: &Tensor,
    weight: &Tensor,
    also: Option<&Tensor>,
    [rows, width]: [i64; 2],
) {
    let function = of(x).rms_norm_backward;
    let (by_y, also) = (alike(by_y, x), also.map_or(std::ptr::null_mut(), |also| alike(also, x)));
    unsafe { function(data(by_x), by_y, data(x), floats(inverse), floats(weight), also, rows, width) }
}

pub(super) fn split_heads([q, k, v]: [&Tensor; 3], qkv: &Tensor, rows: &Rows, rotary: &Rotary, shape: HeadShape<'_>) {
    let ([of_q, of_k], epsilon) = (norms(shape), single(shape.epsilon));
    let (cos, sin, at) = (floats(&rotary.cos), floats(&rotary.sin), layout(rows, shape));
    unsafe { (of(qkv).split_heads)(data(q), data(k), data(v), data(qkv), cos, sin, of_q, of_k, epsilon, at) }
}

pub(super) fn split_heads_backward(
    by_qkv: &Tensor,
    [q, k, v]: [&Tensor; 3],
    qkv: Option<&Tensor>,
    rows: &Rows,
    rotary: &Rotary,
    shape: HeadShape<'_>,
) {
    let ([of_q, of_k], epsilon) = (norms(shape), single(shape.epsilon));
    assert!(shape.norms.is_none() || qkv.is_some(), "normed heads need what they were made from");
    let (cos, sin, at) = (floats(&rotary.cos), floats(&rotary.sin), layout(rows, shape));
    let function = of(by_qkv).split_heads_backward;
    unsafe { function(data(by_qkv), data(q), data(k), data(v), optional(qkv), cos, sin, of_q, of_k, epsilon, at) }
}

pub(super) fn join_heads(packed: &Tensor, heads: &Tensor, back: bool, rows: &Rows, shape: HeadShape<'_>) {
    unsafe { (of(packed).join_heads)(data(packed), data(heads), back, layout(rows, shape)) }
}

pub(super) fn attention_softmax(probabilities: &Tensor, scores: &Tensor, rows: &Rows, block: Block) {
    let block = score_block(scores, rows, block);
    unsafe { (of(probabilities).attention_softmax)(data(probabilities), floats(scores), block) }
}

pub(super) fn attention_softmax_backward(probabilities: &Tensor, by: &Tensor, scores: &Tensor, rows: &Rows, block: Block) {
    let block = score_block(scores, rows, block);
    unsafe { (of(by).attention_softmax_backward)(data(probabilities), data(by), floats(scores), block) }
}

pub(super) fn gated(out: &Tensor, gate_up: &Tensor, activation: Activation) {
    let ([tokens, inner], gelu) = (size(out), activation == Activation::GeluTanh);
    unsafe { (of(out).gated)(data(out), data(gate_up), tokens, inner, gelu) }
}

pub(super) fn gated_backward(by_gate_up: &Tensor, out: &Tensor, gate_up: &Tensor, by_out: &Tensor, activation: Activation) {
    let ([tokens, inner], gelu) = (size(out), activation == Activation::GeluTanh);
    unsafe { (of(out).gated_backward)(data(by_gate_up), data(out), data(gate_up), data(by_out), tokens, inner, gelu) }
}

pub(super) fn cross_entropy(logits: &Tensor, targets: &Tensor, loss: &Tensor, correct: &Tensor, softcap: Option<f64>) {
    let [rows, vocabulary] = size(logits);
    let function = of(logits).cross_entropy;
    unsafe { function(data(logits), integers(targets), floats(loss), integers(correct), rows, vocabulary, cap(softcap)) }
}

pub(super) fn divergence(logits: &Tensor, base: &Tensor, loss: &Tensor, softcap: Option<f64>) {
    let [rows, vocabulary] = size(logits);
    unsafe { (of(logits).divergence)(data(logits), alike(base, logits), floats(loss), rows, vocabulary, cap(softcap)) }
}

pub(super) fn dropout(out: &Tensor, x: &Tensor, key: u64, places: &Tensor, share: f64) {
    let [rows, width] = size(x);
    unsafe { (of(x).dropout)(data(out), data(x), key, integers(places), rows, width, single(share)) }
}

/// Rows may be parts of longer ones, so each comes with the distance to the next.
pub(super) fn outer_sum(out: &Tensor, low: &Tensor, wide: &Tensor) {
    let ([tokens, rank], width) = (size(low), size(wide)[1]);
    let strided = |x: &Tensor| {
        let stride = x.stride();
        assert!(matches!(x.kind(), Kind::Float | Kind::BFloat16) && stride.get(1) == Some(&1), "a kernel needs whole rows");
        (x.data_ptr(), stride.first().copied().unwrap_or(0))
    };
    assert!(low.kind() == wide.kind() && out.size() == [rank, width], "a sum of outer products");
    let ((low_at, low_stride), (wide_at, wide_stride)) = (strided(low), strided(wide));
    unsafe { (of(low).outer_sum)(floats(out), low_at, low_stride, wide_at, wide_stride, tokens, rank, width) }
}

/// ⟨x, y⟩, both float32 and contiguous.
pub(super) fn inner_product(x: &Tensor, y: &Tensor) -> f64 {
    let mut sum = 0.0;
    assert_eq!(x.numel(), y.numel(), "vectors of one length");
    unsafe { (table().inner_product)(&raw mut sum, floats(x), floats(y), x.numel() as i64) };
    sum
}
