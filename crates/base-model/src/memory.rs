//! The memory plan: what a training run will need, before its first step. The trainer holds its passes to what stands here.
//!
//! Everything large is counted by its shape; what is small, or libtorch's own, is one constant. The prediction is of the peak of
//! resident memory on a CPU, and of the device's memory on a GPU.

use holdfast_domain::hyperparameters::{Hyperparameters, Precision, Recompute};
use holdfast_domain::progress::MemoryPlan;
use holdfast_domain::safety::{Defense, KlPositions, ProjectionOf, Safety};

use crate::Architecture;

/// Tokens up to which the user's rows and the alignment rows share a pass: one reading of the weights serves both. Beyond it the
/// weights' share is small, and memory counts more.
pub const SHARED_PASS_TOKENS: u64 = 4096;
/// Logits that exist at one time, in numbers: 128 MiB of them in float32.
const LOGITS_AT_ONCE: u64 = 1 << 25;
/// The program, libtorch's code and tables, and what its allocator keeps.
const PROGRAM_BYTES: u64 = 300 << 20;
/// Scores, probabilities and their derivatives of one block of attention.
const ATTENTION_BYTES: u64 = 3 * 4 * (1 << 22);
/// Vectors as long as the adapter that exist at the same time: weights, two moments and their successors, two gradients, the
/// merged one, the update, and two intermediate results.
const ADAPTER_VECTORS: u64 = 11;

/// Positions whose logits exist at one time.
#[must_use]
pub fn positions_at_once(vocabulary: u64) -> u64 {
    (LOGITS_AT_ONCE / vocabulary.max(1)).clamp(32, 1024)
}

/// What a run of `architecture` needs.
///
/// A row is its tokens and how many of them are supervised. `training` has at least the `batch_size` longest rows of the training
/// file, in any order; `alignment` has all alignment rows, of which none count where the method needs none.
#[must_use]
pub fn predict(
    architecture: &Architecture,
    h: &Hyperparameters,
    safety: &Safety,
    training: &[(u64, u64)],
    alignment: &[(u64, u64)],
) -> MemoryPlan {
    let alignment = if safety.defense.needs_alignment() { alignment } else { &[] };
    let reference_positions: u64 = alignment.iter().map(|row| row.1).sum();
    let pass = LargestPass::new(h, safety, training, alignment);
    // A step that asks for each row's gradient has those of a whole pass at once; a method may remember vectors of its own.
    let by_row = h.row_conflicts || safety.projection == ProjectionOf::PerRow;
    let more_vectors = u64::from(by_row) * u64::from(h.batch_size)
        + u64::from(h.row_conflicts)
        + match safety.defense {
            Defense::Held => 4,
            Defense::Lisa => 1,
            _ => 0,
        };
    let bytes = match h.precision {
        Precision::F32 => 4,
        Precision::Bf16 => 2,
    };
    let a = architecture;
    let (hidden, inner) = (a.hidden_size as u64, a.intermediate_size as u64);
    let parameters: u64 = a.tensors().iter().map(|tensor| tensor.shape.iter().product::<usize>() as u64).sum();
    let layers = a.layers.len() as u64;
    let kept = kept_by_layer(a, h, Recompute::Nothing);
    let of_layers = match h.activation_checkpointing {
        Recompute::Nothing => layers * kept,
        // One layer at a time is whole again on the way back.
        other => layers * kept_by_layer(a, h, other) + kept,
    };
    let heads = ((a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim) as u64;
    let padded = pass.rectangle.saturating_sub(pass.tokens)
        * heads
        * if h.activation_checkpointing == Recompute::Layers { 1 } else { layers };
    // On the way back through a layer: the derivatives of its widest parts beside what is made again.
    let on_the_way_back = 5 * inner + 6 * hidden;
    let logits = positions_at_once(a.vocab_size as u64).min(pass.positions) * a.vocab_size as u64;
    MemoryPlan {
        weights_bytes: parameters * bytes,
        optimizer_bytes: adapter_parameters(a, h) * 4 * (ADAPTER_VECTORS + more_vectors),
        activations_bytes: (pass.tokens * (of_layers + on_the_way_back) + padded) * bytes
            + 4 * pass.positions * hidden * bytes
            + ATTENTION_BYTES,
        logits_bytes: logits * bytes * if pass.two_logits { 2 } else { 1 },
        reference_bytes: reference_positions * hidden * bytes,
        program_bytes: PROGRAM_BYTES,
    }
}

/// The largest pass that the order of rows could make: the longest rows together.
#[derive(Debug, Clone, Copy)]
struct LargestPass {
    tokens: u64,
    /// Places of attention's rectangle, padding counted.
    rectangle: u64,
    /// Positions whose logits it needs.
    positions: u64,
    /// Whether two sets of logits exist at a time, as for a KL.
    two_logits: bool,
}

impl LargestPass {
    fn new(h: &Hyperparameters, safety: &Safety, training: &[(u64, u64)], alignment: &[(u64, u64)]) -> Self {
        /// The longest rows of a batch: how many, their tokens and positions, and the longest.
        fn largest(rows: &[(u64, u64)], batch_size: usize) -> [u64; 4] {
            let mut rows = rows.to_vec();
            rows.sort_unstable_by(|x, y| y.cmp(x));
            rows.truncate(batch_size);
            let sum = |of: fn(&(u64, u64)) -> u64| rows.iter().map(of).sum();
            [rows.len() as u64, sum(|row| row.0), sum(|row| row.1), rows.first().map_or(0, |row| row.0)]
        }
        let batch_size = h.batch_size as usize;
        let (user, align) = (largest(training, batch_size), largest(alignment, batch_size));
        let shared = user[1] + align[1] <= SHARED_PASS_TOKENS;
        let both = |of: usize| if shared { user[of] + align[of] } else { user[of].max(align[of]) };
        Self {
            tokens: both(1),
            // Attention pads every row to the longest of its pass.
            rectangle: both(0) * user[3].max(align[3]),
            positions: if safety.kl_positions == KlPositions::All { both(1) } else { both(2) },
            two_logits: !alignment.is_empty(),
        }
    }
}

/// Numbers that are trained.
fn adapter_parameters(a: &Architecture, h: &Hyperparameters) -> u64 {
    let widths = h.target_modules.iter().map(|&projection| {
        let (input, output) = a.projection_size(projection);
        (input + output) as u64
    });
    widths.sum::<u64>() * u64::from(h.lora_rank) * a.layers.len() as u64
}

/// Numbers a layer keeps for each token until the way back.
fn kept_by_layer(a: &Architecture, h: &Hyperparameters, recompute: Recompute) -> u64 {
    let traits = a.family.traits();
    let (hidden, inner) = (a.hidden_size as u64, a.intermediate_size as u64);
    let (queries, keys) = ((a.num_attention_heads * a.head_dim) as u64, (a.num_key_value_heads * a.head_dim) as u64);
    if recompute == Recompute::Layers {
        return hidden;
    }
    let low = u64::from(h.lora_rank) * h.target_modules.len() as u64;
    let normed_heads = if traits.head_norms { queries + 2 * keys } else { 0 };
    let output_norms = if traits.output_norms { hidden } else { 0 };
    let attention = hidden + (queries + 2 * keys) + normed_heads + queries + output_norms + hidden + low;
    match recompute {
        Recompute::FeedForward => attention,
        _ => attention + 2 * inner + output_norms,
    }
}

/// A change that makes a run smaller, the least first.
#[derive(Debug, Clone, PartialEq)]
pub struct SmallerRun {
    /// In words for the job's owner.
    pub change: String,
    /// What it needs then.
    pub plan: MemoryPlan,
}

/// The smallest change to `h` with which `needs` fits into `limit_bytes`.
#[must_use]
pub fn smallest_change(
    h: &Hyperparameters,
    limit_bytes: u64,
    needs: impl Fn(&Hyperparameters) -> MemoryPlan,
) -> Option<SmallerRun> {
    let mut changes: Vec<(String, Hyperparameters)> = Vec::new();
    for (word, recompute) in [("feed_forward", Recompute::FeedForward), ("layers", Recompute::Layers)] {
        let changed = Hyperparameters { activation_checkpointing: recompute, ..h.clone() };
        changes.push((format!("activation_checkpointing \"{word}\""), changed));
    }
    // Sizes that divide the batch, so that a step keeps its rows.
    for batch_size in (1..h.batch_size).rev().filter(|size| h.batch_size.is_multiple_of(*size)) {
        for (word, recompute) in
            [("", h.activation_checkpointing), (" and activation_checkpointing \"layers\"", Recompute::Layers)]
        {
            let steps = h.gradient_accumulation_steps * (h.batch_size / batch_size);
            let changed = Hyperparameters {
                batch_size,
                gradient_accumulation_steps: steps,
                activation_checkpointing: recompute,
                ..h.clone()
            };
            if changed.check().is_err() {
                continue;
            }
            changes.push((format!("batch_size {batch_size} with gradient_accumulation_steps {steps}{word}"), changed));
        }
    }
    if h.precision == Precision::F32 {
        let changed = Hyperparameters { precision: Precision::Bf16, ..h.clone() };
        changes.push(("precision \"bf16\"".into(), changed));
        let least = Hyperparameters {
            precision: Precision::Bf16,
            batch_size: 1,
            activation_checkpointing: Recompute::Layers,
            ..h.clone()
        };
        changes.push(("precision \"bf16\", batch_size 1 and activation_checkpointing \"layers\"".into(), least));
    }
    changes
        .into_iter()
        .map(|(change, changed)| SmallerRun { change, plan: needs(&changed) })
        .find(|smaller| smaller.plan.total_bytes() <= limit_bytes)
}

#[cfg(test)]
mod tests {
    use holdfast_domain::hyperparameters::Requested;
    use serde_json::json;

    use super::*;

    fn smollm2() -> Architecture {
        let config = json!({"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": true});
        Architecture::from_config(&config).expect("supported")
    }

    fn needs(h: &Hyperparameters) -> MemoryPlan {
        predict(&smollm2(), h, &Safety::new(Defense::None, 1.0), &[(1024, 512); 4], &[])
    }

    fn hyperparameters() -> Hyperparameters {
        let requested = Requested { batch_size: Some(4), precision: Some(Precision::F32), ..Default::default() };
        requested.resolve(100, None).expect("in bounds")
    }

    #[test]
    fn every_change_that_is_offered_needs_less_and_the_smallest_that_fits_is_named() {
        let h = hyperparameters();
        let whole = needs(&h).total_bytes();
        let smaller = smallest_change(&h, whole - 1, needs).expect("a change");
        assert_eq!(smaller.change, "activation_checkpointing \"feed_forward\"");
        let smallest = smallest_change(&h, whole / 4, needs).expect("a change");
        assert!(smallest.change.contains("layers") || smallest.change.contains("batch_size"), "{}", smallest.change);
        assert_eq!(smallest_change(&h, 1 << 20, needs), None);
    }

    #[test]
    fn only_the_longest_rows_count_and_alignment_rows_only_where_the_method_needs_them() {
        let h = hyperparameters();
        let of = |defense, training: &[(u64, u64)]| {
            predict(&smollm2(), &h, &Safety::new(defense, 1.0), training, &[(70, 20), (60, 10)])
        };
        let plain = of(Defense::None, &[(1024, 512); 4]);
        assert_eq!(plain, needs(&h));
        assert_eq!(plain, of(Defense::None, &[&[(9, 3); 50][..], &[(1024, 512); 4]].concat()));
        let held = of(Defense::Held, &[(1024, 512); 4]);
        assert_eq!((plain.reference_bytes, held.reference_bytes), (0, 30 * 576 * 4));
        // Eleven vectors of 2,442,240 float32s, and four that the method remembers.
        assert_eq!(plain.optimizer_bytes, 11 * 4 * 2_442_240);
        assert_eq!(held.optimizer_bytes, 15 * 4 * 2_442_240);
    }
}
