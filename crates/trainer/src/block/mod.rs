//! One decoder block, forward and backward, for every family (see `holdfast_base_model::family` for how they differ):
//!
//! ```text
//! h = x + attention(norm(x))          (Gemma norms what attention and feed-forward put out as well)
//! y = h + feed_forward(norm(h))
//! ```
//!
//! The backward pass is written out rather than left to autograd: what is kept between the two passes is then a choice, each
//! factor's gradient falls out separately for the user's rows and the alignment rows of one pass, and what is cheap to make
//! again (norms, gates, softmaxes) is never stored.

use std::ops::Range;

use holdfast_base_model::Architecture;
use holdfast_base_model::architecture::LayerKind;
use holdfast_domain::hyperparameters::Recompute;
use tch::{Kind, Tensor};

use crate::adapter::Adapter;
use crate::attention::{Heads, Sight};
use crate::gradient::Gradient;
use crate::kernels::{self, HeadShape, Rows};
use crate::linear::{Dropout, Linear, Stack, Weight};
use crate::rotary::Rotary;

mod cached;

pub(crate) use cached::{Cache, Visible};

/// A block's frozen weights. Norms are float32.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) index: usize,
    pub(crate) kind: LayerKind,
    /// In the order of [`Stack::ALL`].
    pub(crate) weights: [Weight; 4],
    /// Of a head of queries and one of keys, each `[head_dim]`.
    pub(crate) head_norms: Option<[Tensor; 2]>,
    pub(crate) attention_norm: Tensor,    // [hidden]
    pub(crate) feed_forward_norm: Tensor, // [hidden]
    /// Of what attention and feed-forward put out, each `[hidden]`.
    pub(crate) output_norms: Option<[Tensor; 2]>,
}

/// What all blocks of a pass share.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    pub(crate) architecture: &'a Architecture,
    pub(crate) kind: Kind,
    pub(crate) rows: &'a Rows,
    pub(crate) tokens: i64,
    /// The rotary positions of layers that see everything before them, and of those with a window.
    pub(crate) rotary: [Rotary; 2],
    pub(crate) adapter: Option<&'a Adapter>,
    pub(crate) dropout: Option<Dropout<'a>>,
    pub(crate) recompute: Recompute,
}

/// What a block keeps for its backward pass.
#[derive(Debug)]
pub(crate) struct Saved {
    x: Tensor, // [tokens, hidden]
    /// The tokens that go on after attention, where not all do.
    keep: Option<Tensor>,
    inside: Option<Inside>,
}

#[derive(Debug)]
struct Inside {
    /// What heads were made from, where they are normed.
    qkv: Option<Tensor>, // [tokens, (heads + 2 shared) head_dim]
    qkv_low: Option<Tensor>,
    heads: Heads,
    mixed: Tensor, // [kept, heads · head_dim]
    mixed_low: Option<Tensor>,
    /// What attention put out, where that is normed.
    attended: Option<Tensor>, // [kept, hidden]
    after_attention: Tensor, // [kept, hidden]
    fed: Option<FeedForward>,
}

#[derive(Debug)]
struct FeedForward {
    gate_up: Tensor, // [kept, 2 inner]
    gate_up_low: Option<Tensor>,
    /// Made again from what the gate puts out where it is missing.
    down_low: Option<Tensor>,
    /// What it put out, where that is normed.
    out: Option<Tensor>, // [kept, hidden]
}

/// The derivatives of a pass: ranges of its tokens, a gradient for each.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    /// As tokens of the pass.
    pub(crate) tokens: Vec<Range<i64>>,
    /// As those among them that go on after the last attention.
    pub(crate) kept: Vec<Range<i64>>,
    pub(crate) gradients: &'a mut [Gradient],
}

impl Layer {
    fn linear<'a>(&'a self, stack: Stack, pass: &Pass<'a>) -> Linear<'a> {
        let patch = pass.adapter.and_then(|adapter| adapter.patch(self.index, stack, pass.kind));
        Linear { weight: &self.weights[stack as usize], patch, dropout: pass.dropout }
    }

    fn shape(&self, architecture: &Architecture) -> HeadShape<'_> {
        HeadShape {
            heads: architecture.num_attention_heads as i64,
            shared: architecture.num_key_value_heads as i64,
            head_dim: architecture.head_dim as i64,
            norms: self.head_norms.as_ref().map(|[q, k]| [q, k]),
            epsilon: architecture.rms_norm_eps,
        }
    }

    fn sight(&self, architecture: &Architecture) -> Sight {
        let window = match self.kind {
            LayerKind::Full => i64::MAX,
            LayerKind::Window(window) => window as i64,
        };
        Sight { window, scale: architecture.attention_scale }
    }

    fn rotary<'a>(&self, pass: &'a Pass<'_>) -> &'a Rotary {
        let [full, windowed] = &pass.rotary;
        if self.kind == LayerKind::Full { full } else { windowed }
    }

    /// The block's output `[kept, hidden]` for `x: [tokens, hidden]`, and what a backward pass needs. With `keep`, indices of
    /// tokens, only they go on after attention.
    pub(crate) fn forward(&self, x: Tensor, keep: Option<Tensor>, pass: &Pass<'_>) -> (Tensor, Saved) {
        let inside = self.attend(&x, keep.as_ref(), pass);
        let (out, fed) = self.feed_forward(&inside.after_attention, pass);
        let inside = match pass.recompute {
            Recompute::Nothing => Some(Inside { fed: Some(fed), ..inside }),
            Recompute::FeedForward => Some(inside),
            Recompute::Layers => None,
        };
        (out, Saved { x, keep, inside })
    }

    /// The block's first half.
    fn attend(&self, x: &Tensor, keep: Option<&Tensor>, pass: &Pass<'_>) -> Inside {
        let shape = self.shape(pass.architecture);
        let (heads, qkv, qkv_low) = self.heads(x, pass);
        let mixed = heads.attend(pass.rows, shape, self.sight(pass.architecture));
        let mixed = kept(kernels::join_heads(&mixed, pass.rows, shape, pass.tokens), keep);
        let (after_attention, mixed_low, attended) = self.onto(Stack::Output, &mixed, &kept(x.shallow_clone(), keep), 0, pass); // [kept, hidden]
        let qkv = self.head_norms.is_some().then_some(qkv);
        Inside { qkv, qkv_low, heads, mixed, mixed_low, attended, after_attention, fed: None }
    }

    /// What attention works with; what it was made from, `[tokens, (heads + 2 shared) head_dim]`, and the LoRA's low product.
    fn heads(&self, x: &Tensor, pass: &Pass<'_>) -> (Heads, Tensor, Option<Tensor>) {
        let normed = kernels::rms_norm(x, &self.attention_norm, pass.architecture.rms_norm_eps).0;
        let (qkv, qkv_low) = self.linear(Stack::Qkv, pass).forward(&normed, None);
        let [q, k, v] = kernels::split_heads(&qkv, pass.rows, self.rotary(pass), self.shape(pass.architecture));
        (Heads { q, k, v }, qkv, qkv_low)
    }

    /// The block's second half.
    fn feed_forward(&self, h: &Tensor, pass: &Pass<'_>) -> (Tensor, FeedForward) {
        let (gate_up, gate_up_low) = self.gate_up(h, pass);
        let gated = kernels::gated(&gate_up, pass.architecture.family.traits().activation);
        let (y, down_low, out) = self.onto(Stack::Down, &gated, h, 1, pass);
        (y, FeedForward { gate_up, gate_up_low, down_low, out })
    }

    /// What the way back needs of it. Without a norm behind it, its output is not among that.
    fn feed_forward_again(&self, h: &Tensor, pass: &Pass<'_>) -> FeedForward {
        if self.output_norms.is_some() {
            return self.feed_forward(h, pass).1;
        }
        let (gate_up, gate_up_low) = self.gate_up(h, pass);
        FeedForward { gate_up, gate_up_low, down_low: None, out: None }
    }

    fn gate_up(&self, h: &Tensor, pass: &Pass<'_>) -> (Tensor, Option<Tensor>) {
        let normed = kernels::rms_norm(h, &self.feed_forward_norm, pass.architecture.rms_norm_eps).0;
        self.linear(Stack::GateUp, pass).forward(&normed, None) // [kept, 2 inner]
    }

    /// `stream + W x`, or `stream + norm(W x)` where what a part puts out is normed; with the LoRA's low product, and `W x`
    /// where it is normed.
    fn onto(
        &self,
        stack: Stack,
        x: &Tensor,
        stream: &Tensor,
        norm: usize,
        pass: &Pass<'_>,
    ) -> (Tensor, Option<Tensor>, Option<Tensor>) {
        let linear = self.linear(stack, pass);
        let Some(norms) = &self.output_norms else {
            let (y, low) = linear.forward(x, Some(stream));
            return (y, low, None);
        };
        let (out, low) = linear.forward(x, None);
        let normed = kernels::rms_norm(&out, &norms[norm], pass.architecture.rms_norm_eps).0;
        (stream + normed, low, Some(out))
    }

    /// The derivative by what [`Self::onto`] was given as `out`, from that by its result.
    fn through_output_norm(&self, by_y: &Tensor, out: Option<&Tensor>, norm: usize, pass: &Pass<'_>) -> Tensor {
        match (&self.output_norms, out) {
            (Some(norms), Some(out)) => {
                let inverse = kernels::rms_norm(out, &norms[norm], pass.architecture.rms_norm_eps).1;
                kernels::rms_norm_backward(by_y, out, &inverse, &norms[norm], None)
            }
            _ => by_y.shallow_clone(),
        }
    }

    /// The derivative by the block's input, `None` for the first block, from the one by its output; the factors' derivatives
    /// go to `parts`.
    pub(crate) fn backward(&self, by_y: Tensor, saved: Saved, pass: &Pass<'_>, parts: &mut Parts<'_>) -> Option<Tensor> {
        let epsilon = pass.architecture.rms_norm_eps;
        let Saved { x, keep, inside } = saved;
        let inside = inside.unwrap_or_else(|| self.attend(&x, keep.as_ref(), pass));
        let after_ranges = if keep.is_some() { parts.kept.clone() } else { parts.tokens.clone() };

        // The feed-forward.
        let h = inside.after_attention;
        let (normed, inverse) = kernels::rms_norm(&h, &self.feed_forward_norm, epsilon);
        let fed = inside.fed.unwrap_or_else(|| self.feed_forward_again(&h, pass));
        let by_out = self.through_output_norm(&by_y, fed.out.as_ref(), 1, pass);
        let down = self.linear(Stack::Down, pass);
        let (by_gated, by_low) = down.backward(&by_out, true);
        let by_gated = by_gated.unwrap_or_else(|| by_out.zeros_like());
        let [by_gate_up, gated] = kernels::gated_backward(&fed.gate_up, &by_gated, pass.architecture.family.traits().activation);
        let down_low = fed.down_low.or_else(|| down.low(&gated));
        down.accumulate(&gated, down_low.as_ref(), &by_out, by_low.as_ref(), &after_ranges, parts.gradients);
        drop((fed.gate_up, by_gated, gated));
        let gate_up = self.linear(Stack::GateUp, pass);
        let (by_normed, by_low) = gate_up.backward(&by_gate_up, true);
        gate_up.accumulate(&normed, fed.gate_up_low.as_ref(), &by_gate_up, by_low.as_ref(), &after_ranges, parts.gradients);
        drop(by_gate_up);
        let by_normed = by_normed.unwrap_or_else(|| normed.zeros_like());
        let by_h = kernels::rms_norm_backward(&by_normed, &h, &inverse, &self.feed_forward_norm, Some(&by_y));
        drop((by_y, normed));

        // Attention.
        let shape = self.shape(pass.architecture);
        let by_attended = self.through_output_norm(&by_h, inside.attended.as_ref(), 0, pass);
        let output = self.linear(Stack::Output, pass);
        let (by_mixed, by_low) = output.backward(&by_attended, true);
        output.accumulate(
            &inside.mixed,
            inside.mixed_low.as_ref(),
            &by_attended,
            by_low.as_ref(),
            &after_ranges,
            parts.gradients,
        );
        let by_mixed = spread(by_mixed.unwrap_or_else(|| inside.mixed.zeros_like()), keep.as_ref(), pass.tokens);
        let by_heads = kernels::join_heads_backward(&by_mixed, pass.rows, shape);
        let [by_q, by_k, by_v] = inside.heads.attend_backward(&by_heads, pass.rows, shape, self.sight(pass.architecture));
        let by = [&by_q, &by_k, &by_v];
        let by_qkv = kernels::split_heads_backward(by, inside.qkv.as_ref(), pass.rows, self.rotary(pass), shape, pass.tokens);
        let (normed, inverse) = kernels::rms_norm(&x, &self.attention_norm, epsilon);
        let qkv = self.linear(Stack::Qkv, pass);
        let (by_normed, by_low) = qkv.backward(&by_qkv, self.index > 0);
        qkv.accumulate(&normed, inside.qkv_low.as_ref(), &by_qkv, by_low.as_ref(), &parts.tokens, parts.gradients);
        let by_h = spread(by_h, keep.as_ref(), pass.tokens);
        by_normed.map(|by| kernels::rms_norm_backward(&by, &x, &inverse, &self.attention_norm, Some(&by_h)))
    }
}

/// The tokens that go on.
fn kept(x: Tensor, keep: Option<&Tensor>) -> Tensor {
    match keep {
        Some(keep) => x.index_select(0, keep),
        None => x,
    }
}

/// The way back: zero where a token did not go on.
fn spread(by_kept: Tensor, keep: Option<&Tensor>, tokens: i64) -> Tensor {
    let Some(keep) = keep else { return by_kept };
    let width = by_kept.size().last().copied().unwrap_or(0);
    Tensor::zeros([tokens, width], (by_kept.kind(), by_kept.device())).index_copy(0, keep, &by_kept)
}
