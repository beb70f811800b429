//! Grouped-query attention over the padded rectangle of a pass, forward and backward.
//!
//! The scores of a few rows, heads and queries exist at a time, and only against the keys those queries may see; the backward
//! pass makes them again. Two products and a softmax over blocks that stay in a CPU's cache are faster there than libtorch's
//! own fused attention, most of all in bfloat16 (measured in `bench/RESULTS.md`).

use tch::{Kind, Tensor};

use crate::kernels::{self, Block, HeadShape, Rows};
use crate::product;

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

/// One block's place: its rows, heads of keys, queries and keys, each a first and a count.
struct Piece {
    rows: (i64, i64),
    heads: (i64, i64),
    queries: (i64, i64),
    keys: (i64, i64),
    block: Block,
}

impl Heads {
    /// The blocks, row by row. With a window, keys that no query of a block sees are left out.
    fn pieces(&self, rows: &Rows, shape: HeadShape<'_>, sight: Sight) -> Vec<Piece> {
        let (width, group) = (rows.width(), shape.heads / shape.shared);
        let fits = SCORES_AT_ONCE / (group * width).max(1);
        let queries = if width <= 2 * QUERIES_AT_ONCE { width } else { QUERIES_AT_ONCE.min(fits).max(1) };
        // Products this large are faster one by one than as a batch.
        let by_head = product::is_large(&self.q, group * queries, width, shape.head_dim);
        let heads_at_once = if by_head { 1 } else { shape.shared };
        let rows_at_once = if by_head { 1 } else { (fits / (shape.shared * queries)).clamp(1, rows.count()) };
        let mut pieces = Vec::new();
        for (of_rows, of_heads) in
            parts(rows.count(), rows_at_once).flat_map(|of_rows| parts(shape.shared, heads_at_once).map(move |h| (of_rows, h)))
        {
            for of_queries in parts(width, queries) {
                let (first_query, query_count) = of_queries;
                let first_key = (first_query + 1).saturating_sub(sight.window).max(0);
                pieces.push(Piece {
                    rows: of_rows,
                    heads: of_heads,
                    queries: of_queries,
                    keys: (first_key, first_query + query_count - first_key),
                    block: Block {
                        group,
                        first_query,
                        first_key,
                        window: sight.window,
                        scale: sight.scale,
                        first_row: of_rows.0,
                        rows: of_rows.1,
                    },
                });
            }
        }
        pieces
    }

    /// `softmax(q kᵀ · scale) v` over the keys each query sees, `[rows, shared, width, group, head_dim]`.
    pub(crate) fn attend(&self, rows: &Rows, shape: HeadShape<'_>, sight: Sight) -> Tensor {
        let (out, scored) = (self.q.empty_like(), self.scored());
        for piece in self.pieces(rows, shape, sight) {
            let scores = piece.scores(&scored);
            let p = kernels::attention_softmax(&scores, rows, piece.block, self.v.kind());
            piece.of_queries(&out).copy_(&product::each(&p, &piece.of_keys(&self.v)));
        }
        out
    }

    /// The derivatives by `q`, `k` and `v` from the one by [`Self::attend`]'s result.
    pub(crate) fn attend_backward(&self, by_out: &Tensor, rows: &Rows, shape: HeadShape<'_>, sight: Sight) -> [Tensor; 3] {
        let (by_q, scored) = (self.q.empty_like(), self.scored());
        // Sums over blocks, whose parts must not be rounded to the model's numbers one by one.
        let sums = || Tensor::zeros(self.k.size(), (Kind::Float, self.k.device()));
        let (by_k, by_v) = (sums(), sums());
        for piece in self.pieces(rows, shape, sight) {
            let (q, k, v) = (piece.of_queries(&self.q), piece.of_keys(&self.k), piece.of_keys(&self.v));
            let by_block = piece.of_queries(by_out);
            let by_p = product::each_transposed(&by_block, &v);
            let [p, by_scores] = kernels::attention_softmax_backward(by_p, &piece.scores(&scored), rows, piece.block);
            piece.of_queries(&by_q).copy_(&product::each(&by_scores, &k));
            product::each_outer_onto(&piece.of_keys(&by_k), &by_scores, &q);
            product::each_outer_onto(&piece.of_keys(&by_v), &p, &by_block);
        }
        [by_q, by_k.to_kind(self.k.kind()), by_v.to_kind(self.v.kind())]
    }

    /// Queries and keys as scores are computed from them. In float32 always: rounded to bfloat16, a score of 20 would be off by up
    /// to 0.06, and its probability by as many hundredths.
    fn scored(&self) -> [Tensor; 2] {
        [&self.q, &self.k].map(|x| x.to_kind(Kind::Float))
    }
}

/// `0..whole` in parts of at most `most`, each its first and its count.
fn parts(whole: i64, most: i64) -> impl Iterator<Item = (i64, i64)> {
    let most = most.max(1);
    (0..).map(move |part| part * most).take_while(move |first| *first < whole).map(move |first| (first, most.min(whole - first)))
}

impl Piece {
    /// `[rows, shared, width, group, head_dim]` to this block's `[rows · shared, queries · group, head_dim]`; a view.
    fn of_queries(&self, x: &Tensor) -> Tensor {
        self.of_heads(x).narrow(2, self.queries.0, self.queries.1).flatten(0, 1).flatten(1, 2)
    }

    /// `[rows, shared, width, head_dim]` to this block's `[rows · shared, keys, head_dim]`; a view.
    fn of_keys(&self, x: &Tensor) -> Tensor {
        self.of_heads(x).narrow(2, self.keys.0, self.keys.1).flatten(0, 1)
    }

    /// Products of queries and keys, `[rows · shared, queries · group, keys]`.
    fn scores(&self, [q, k]: &[Tensor; 2]) -> Tensor {
        product::each_transposed(&self.of_queries(q), &self.of_keys(k))
    }

    fn of_heads(&self, x: &Tensor) -> Tensor {
        x.narrow(0, self.rows.0, self.rows.1).narrow(1, self.heads.0, self.heads.1)
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Two rows long enough for blocks of their own, the second one shorter, with three heads of queries to each of two heads of
    /// keys: against softmax and autograd over the whole rectangle.
    #[test]
    fn long_rows_attend_block_by_block_as_they_would_at_once() {
        let (rows, lengths, [shared, width, group, head_dim]) = (2, [700_usize, 450], [2, 700, 3, 64]);
        let shape = HeadShape { heads: 6, shared, head_dim, norms: None, epsilon: 1e-6 };
        let within = Tensor::arange(width, (Kind::Int64, Device::Cpu));
        let distance = within.unsqueeze(1) - within.unsqueeze(0); // [queries, keys]
        let real = Tensor::from_slice(&lengths.map(|length| length as i64))
            .unsqueeze(1)
            .gt_tensor(&within.unsqueeze(0))
            .view([rows, 1, width, 1, 1]);
        let random = |sizes: &[i64]| Tensor::randn(sizes, (Kind::Float, Device::Cpu)) * 0.3;
        for window in [i64::MAX, 200] {
            let sight = Sight { window, scale: 0.5 };
            let q = random(&[rows, shared, width, group, head_dim]).set_requires_grad(true);
            let [k, v] = [(); 2].map(|()| random(&[rows, shared, width, head_dim]).set_requires_grad(true));
            let by_out = random(&[rows, shared, width, group, head_dim]) * real.to_kind(Kind::Float);

            let unseen = distance.lt(0).logical_or(&distance.ge(window)).unsqueeze(1); // [queries, 1, keys]
            let scores = Tensor::einsum("bhqgd,bhkd->bhqgk", &[&q, &k], None::<i64>) * sight.scale;
            let p = scores.masked_fill(&unseen, f64::NEG_INFINITY).softmax(-1, Kind::Float) * real.to_kind(Kind::Float);
            let expected = Tensor::einsum("bhqgk,bhkd->bhqgd", &[&p, &v], None::<i64>);
            let by = Tensor::run_backward(&[(&expected * &by_out).sum(Kind::Float)], &[&q, &k, &v], false, false);

            let heads = Heads { q: q.detach(), k: k.detach(), v: v.detach() };
            let layout = Rows::new(&lengths, Device::Cpu);
            let got = heads.attend(&layout, shape, sight);
            let got_by = heads.attend_backward(&by_out, &layout, shape, sight);
            let near = |got: &Tensor, expected: &Tensor| {
                (got - expected).abs().max().double_value(&[]) / expected.abs().max().double_value(&[]) < 1e-5
            };
            assert!(near(&got, &expected));
            for (got, expected) in got_by.iter().zip(&by) {
                assert!(near(got, expected));
            }
        }
    }
}
