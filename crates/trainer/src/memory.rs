//! The memory plan: what a run will need, before its first step.
//!
//! Everything large is counted by its shape; what is small, or libtorch's own, is one constant. The prediction is of the peak of
//! resident memory on a CPU, and of the device's memory on a GPU.

use holdfast_base_model::Architecture;
use holdfast_domain::hyperparameters::{Hyperparameters, Precision, Recompute};
use holdfast_domain::progress::MemoryPlan;

use crate::loss;

/// The program, libtorch's code and tables, and what its allocator keeps.
const PROGRAM_BYTES: u64 = 300 << 20;
/// Scores, probabilities and their derivatives of one block of attention.
const ATTENTION_BYTES: u64 = 3 * 4 * (1 << 22);
/// Vectors as long as the adapter that exist at the same time: weights, two moments and their successors, two gradients, the
/// merged one, the update, and two intermediate results.
const ADAPTER_VECTORS: u64 = 11;

/// The largest pass of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LargestPass {
    /// Tokens that are in it.
    pub tokens: u64,
    /// Places of attention's rectangle, padding counted.
    pub rectangle: u64,
    /// Positions whose logits it needs.
    pub positions: u64,
    /// Whether two sets of logits exist at a time, as for a KL.
    pub two_logits: bool,
}

/// What a run of `architecture` needs; `more_vectors` as long as the adapter exist beside what every run has.
#[must_use]
pub fn plan(
    architecture: &Architecture,
    h: &Hyperparameters,
    adapter_parameters: u64,
    more_vectors: u64,
    pass: LargestPass,
    reference_positions: u64,
) -> MemoryPlan {
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
    let logits = loss::positions_at_once(a.vocab_size as i64).cast_unsigned().min(pass.positions) * a.vocab_size as u64;
    MemoryPlan {
        weights_bytes: parameters * bytes,
        optimizer_bytes: adapter_parameters * 4 * (ADAPTER_VECTORS + more_vectors),
        activations_bytes: (pass.tokens * (of_layers + on_the_way_back) + padded) * bytes
            + 4 * pass.positions * hidden * bytes
            + ATTENTION_BYTES,
        logits_bytes: logits * bytes * if pass.two_logits { 2 } else { 1 },
        reference_bytes: reference_positions * hidden * bytes,
        program_bytes: PROGRAM_BYTES,
    }
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

/// Memory this process may use: what the machine has left and what its control group allows, whichever is less. `None` where
/// neither says.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(kib * 1024)
    });
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    let group = number("/sys/fs/cgroup/memory.max")
        .map(|limit| limit.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or(0)));
    [machine, group].into_iter().flatten().min()
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
        let tokens = u64::from(h.batch_size) * 1024;
        let pass = LargestPass { tokens, rectangle: tokens, positions: tokens / 2, two_logits: false };
        plan(&smollm2(), h, 2_442_240, 0, pass, 0)
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
}
