//! Greedy continuations.

use holdfast_dataset::batch::Batch;
use tch::Kind;

use crate::adapter::Adapter;
use crate::model::Model;
use crate::packed::Packed;

/// Extends each prompt by its most likely token, again and again, until one of `stop_ids` or `max_tokens`. The stop token is
/// part of the answer.
///
/// All prompts go through the model together; each row's next token is read at its own last position. Every step reads whole
/// rows again.
#[must_use]
pub fn greedy(
    model: &Model,
    adapter: Option<&Adapter>,
    prompts: &[Vec<u32>],
    stop_ids: &[u32],
    max_tokens: usize,
) -> Vec<Vec<u32>> {
    let mut rows: Vec<Vec<u32>> = prompts.to_vec();
    let mut open: Vec<usize> = (0..rows.len()).filter(|&row| !rows[row].is_empty()).collect();
    for _ in 0..max_tokens {
        if open.is_empty() {
            break;
        }
        let next = next_tokens(model, adapter, &open.iter().map(|&row| rows[row].as_slice()).collect::<Vec<_>>());
        for (&row, &token) in open.iter().zip(&next) {
            rows[row].push(token);
        }
        open.retain(|&row| !rows[row].last().is_some_and(|token| stop_ids.contains(token)));
    }
    rows.into_iter().zip(prompts).map(|(row, prompt)| row[prompt.len()..].to_vec()).collect()
}

fn next_tokens(model: &Model, adapter: Option<&Adapter>, rows: &[&[u32]]) -> Vec<u32> {
    let (mut ids, mut lengths, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        ids.extend(row.iter().map(|&id| i64::from(id)));
        lengths.push(row.len());
        positions.push(ids.len() as i64 - 1);
    }
    let batch = Batch { lengths, ids, positions, targets: Vec::new() };
    let hidden = model.hidden(&Packed::new(&[(&batch, 0)], model.device), adapter); // [rows, hidden]
    let tokens = model.head.logits(&hidden).argmax(-1, false).to_kind(Kind::Int64);
    let tokens = Vec::<i64>::try_from(&tokens).unwrap_or_default();
    tokens.into_iter().filter_map(|token| u32::try_from(token).ok()).collect()
}
