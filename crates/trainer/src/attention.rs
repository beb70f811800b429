//! Grouped-query attention over the padded rectangle of a pass, forward and backward.
//!
//! The scores of a few rows and queries exist at a time, and only against the keys those queries may see; the backward pass
//! makes them again. Two products and a softmax over blocks that stay in a CPU's cache are faster there than libtorch's own
//! fused attention, most of all in bfloat16 (measured in `bench/RESULTS.md`).

use tch::{Kind, Tensor};

use crate::kernels::{self, Block, HeadShape, Rows};

/// Scores of one block, in numbers: 16 MiB of them in float32.
const SCORES_AT_ONCE: i64 = 1 << 22;
/// Queries of one block; a row with no more than twice as many is one block.
const QUERIES_AT_ONCE: i64 = 256;

/// What heads attend with.
#[derive(Debug)]
pub(crate) struct Heads {
    pub(crate) q: Tensor, // [rows, shared, width, group, head_dim]
    pub(crate) k: Tensor, // [rows, shared, width, head_dim]
    pub(crate) v: Tensor, // [rows, shared, width, head_dim]
}

/// How far a layer looks and how it weighs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sight {
    /// Keys a query sees at most, itself among them.
    pub(crate) window: i64,
    pub(crate) scale: f64,
}

/// One block's place: its rows, queries and keys.
struct Piece {
    rows: (i64, i64),
    queries: (i64, i64),
    keys: (i64, i64),
    block: Block,
}

impl Heads {
    /// The blocks, row by row. With `window`, keys that no query of a block sees are left out.
    fn pieces(&self, rows: &Rows, shape: HeadShape<'_>, sight: Sight) -> Vec<Piece> {
        let (width, group) = (rows.width(), shape.heads / shape.shared);
        let queries = if width <= 2 * QUERIES_AT_ONCE { width } else { QUERIES_AT_ONCE };
        let rows_at_once = (SCORES_AT_ONCE / (shape.heads * queries * width).max(1)).clamp(1, rows.count());
        let mut pieces = Vec::new();
        for first_row in (0..rows.count()).step_by(steps_of(rows_at_once)) {
            let row_count = rows_at_once.min(rows.count() - first_row);
            for first_query in (0..width).step_by(steps_of(queries)) {
                let query_count = queries.min(width - first_query);
                let first_key = (first_query + 1).saturating_sub(sight.window).max(0);
                pieces.push(Piece {
                    rows: (first_row, row_count),
                    queries: (first_query, query_count),
                    keys: (first_key, first_query + query_count - first_key),
                    block: Block {
                        group,
                        first_query,
                        first_key,
                        window: sight.window,
                        scale: sight.scale,
                        first_row,
                        rows: row_count,
                    },
                });
            }
        }
        pieces
    }

    /// `softmax(q kᵀ · scale) v` over the keys each query sees, `[rows, shared, width, group, head_dim]`.
    pub(crate) fn attend(&self, rows: &Rows, shape: HeadShape<'_>, sight: Sight) -> Tensor {
        let out = self.q.empty_like();
        for piece in self.pieces(rows, shape, sight) {
            let scores = self.scores(&piece);
            let p = kernels::attention_softmax(&scores, rows, piece.block, self.v.kind());
            piece.of_queries(&out).copy_(&p.bmm(&piece.of_keys(&self.v)));
        }
        out
    }

    /// The derivatives by `q`, `k` and `v` from the one by [`Self::attend`]'s result.
    pub(crate) fn attend_backward(&self, by_out: &Tensor, rows: &Rows, shape: HeadShape<'_>, sight: Sight) -> [Tensor; 3] {
        let by_q = self.q.empty_like();
        let (by_k, by_v) = (self.k.zeros_like(), self.v.zeros_like());
        for piece in self.pieces(rows, shape, sight) {
            let (q, k, v) = (piece.of_queries(&self.q), piece.of_keys(&self.k), piece.of_keys(&self.v));
            let by_block = piece.of_queries(by_out);
            let by_p = by_block.bmm(&v.transpose(1, 2));
            let [p, by_scores] = kernels::attention_softmax_backward(by_p, &self.scores(&piece), rows, piece.block);
            piece.of_queries(&by_q).copy_(&by_scores.bmm(&k));
            let _ = piece.of_keys(&by_k).baddbmm_(&by_scores.transpose(1, 2), &q);
            let _ = piece.of_keys(&by_v).baddbmm_(&p.transpose(1, 2), &by_block);
        }
        [by_q, by_k, by_v]
    }

    /// Products of queries and keys, `[rows · shared, queries · group, keys]`. In float32 always: rounded to bfloat16, a score
    /// of 20 would be off by up to 0.06, and its probability by as many hundredths.
    fn scores(&self, piece: &Piece) -> Tensor {
        let (q, k) = (piece.of_queries(&self.q), piece.of_keys(&self.k));
        q.to_kind(Kind::Float).bmm(&k.to_kind(Kind::Float).transpose(1, 2))
    }
}

/// A distance as `step_by` takes it.
fn steps_of(distance: i64) -> usize {
    usize::try_from(distance).unwrap_or(1).max(1)
}

impl Piece {
    /// `[rows, shared, width, group, head_dim]` to this block's `[rows · shared, queries · group, head_dim]`; a view.
    fn of_queries(&self, x: &Tensor) -> Tensor {
        let part = x.narrow(0, self.rows.0, self.rows.1).narrow(2, self.queries.0, self.queries.1);
        part.flatten(0, 1).flatten(1, 2)
    }

    /// `[rows, shared, width, head_dim]` to this block's `[rows · shared, keys, head_dim]`; a view.
    fn of_keys(&self, x: &Tensor) -> Tensor {
        x.narrow(0, self.rows.0, self.rows.1).narrow(2, self.keys.0, self.keys.1).flatten(0, 1)
    }
}
