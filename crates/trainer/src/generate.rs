//! Greedy continuations.

use tch::{Kind, Tensor};

use crate::adapter::Adapter;
use crate::model::Model;

/// Extends each prompt by its most likely token, again and again, until one of `stop_ids` or `max_tokens`. The stop token is
/// part of the answer.
///
/// All prompts go through the model together, padded on the right; each row's next token is read at its own last position.
/// Every step reads whole rows again.
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
    tch::no_grad(|| {
        let width = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let mut ids = vec![0_i64; rows.len() * width];
        let mut last = Vec::with_capacity(rows.len());
        for (at, row) in rows.iter().enumerate() {
            for (time, &id) in row.iter().enumerate() {
                ids[at * width + time] = id.into();
            }
            last.push((at * width + row.len() - 1) as i64);
        }
        let ids = Tensor::from_slice(&ids).view([rows.len() as i64, width as i64]).to_device(model.device);
        let hidden = model.hidden(&ids, adapter, false).flatten(0, 1); // [rows * time, hidden]
        let hidden = hidden.index_select(0, &Tensor::from_slice(&last).to_device(model.device)); // [rows, hidden]
        let tokens = model.head.logits(&hidden).argmax(-1, false).to_kind(Kind::Int64);
        let tokens = Vec::<i64>::try_from(&tokens).unwrap_or_default();
        tokens.into_iter().filter_map(|token| u32::try_from(token).ok()).collect()
    })
}
