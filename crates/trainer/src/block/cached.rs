//! A block over tokens that follow others whose keys and values are kept: one token a row at a time.

use tch::{Kind, Tensor};

use super::{Layer, Pass};
use crate::attention::Heads;
use crate::linear::Stack;

/// The keys and values of one layer, each `[rows, shared, places, head_dim]`: the prompts' padded rectangle, then a place for
/// each token that follows, the same for all rows.
#[derive(Debug)]
pub(crate) struct Cache {
    keys: Tensor,
    values: Tensor,
}

/// What the newest token of each row sees.
#[derive(Debug)]
pub(crate) struct Visible {
    /// The places that are in use.
    pub(crate) places: i64,
    /// Whether a row sees a place where its layer sees everything before it, and where the layer has a window of so many
    /// tokens; `[rows, 1, 1, places]`.
    pub(crate) everything: Tensor,
    /// Each token's distance to the row's newest, `[rows, places]`.
    pub(crate) distance: Tensor,
}

impl Cache {
    fn new(heads: &Heads, following: i64) -> Self {
        let room = |of_prompts: &Tensor| {
            let mut size = of_prompts.size();
            size[2] = following;
            Tensor::cat(&[of_prompts, &Tensor::zeros(size, (of_prompts.kind(), of_prompts.device()))], 2)
        };
        Self { keys: room(&heads.k), values: room(&heads.v) }
    }

    /// Those of some rows alone.
    pub(crate) fn of_rows(&self, rows: &Tensor) -> Self {
        Self { keys: self.keys.index_select(0, rows), values: self.values.index_select(0, rows) }
    }
}

impl Layer {
    /// As [`Layer::forward`], keeping keys and values with room for `following` tokens more.
    pub(crate) fn prefill(&self, x: &Tensor, keep: Option<&Tensor>, following: i64, pass: &Pass<'_>) -> (Tensor, Cache) {
        let inside = self.attend(x, keep, pass);
        let cache = Cache::new(&inside.heads, following);
        (self.feed_forward(&inside.after_attention, pass).0, cache)
    }

    /// The block's output `[rows, hidden]` for the newest token of each row, `x: [rows, hidden]`. The pass takes them as one row,
    /// with the rotary of each token's own position. Its keys and values go to the last place in use.
    pub(crate) fn step(&self, x: &Tensor, cache: &mut Cache, visible: &Visible, pass: &Pass<'_>) -> Tensor {
        let sight = self.sight(pass.architecture);
        let Heads { q, k, v } = self.heads(x, pass).0;
        let by_row = |x: &Tensor| x.squeeze_dim(0).transpose(0, 1).contiguous(); // [rows, shared, …]
        for (kept, new) in [(&mut cache.keys, by_row(&k)), (&mut cache.values, by_row(&v))] {
            kept.select(2, visible.places - 1).copy_(&new);
        }
        let seen = |kept: &Tensor| kept.narrow(2, 0, visible.places).to_kind(Kind::Float);
        let scores = by_row(&q).to_kind(Kind::Float).matmul(&seen(&cache.keys).transpose(2, 3)) * sight.scale; // [rows, shared, group, places]
        let mut hidden = visible.everything.logical_not();
        if sight.window != i64::MAX {
            hidden = hidden.logical_or(&visible.distance.ge(sight.window).unsqueeze(1).unsqueeze(1));
        }
        let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Float);
        let mixed = weights.matmul(&seen(&cache.values)).to_kind(pass.kind).flatten(1, 3); // [rows, heads · head_dim]
        let after_attention = self.onto(Stack::Output, &mixed, x, 0, pass).0;
        self.feed_forward(&after_attention, pass).0
    }
}
