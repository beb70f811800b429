//! Greedy continuations, with the keys and values of what was read kept.

use holdfast_dataset::batch::Batch;
use tch::{Kind, Tensor};

use crate::adapter::Adapter;
use crate::block::{Cache, Visible};
use crate::gradient::numbers;
use crate::model::Model;
use crate::packed::Packed;
use crate::stop::{Stop, Stopped};

/// Places of the cache at a time, rows times their longest length: what bounds its memory.
const PLACES_AT_ONCE: usize = 8192;

/// Extends each prompt by its most likely token, again and again, until one of `stop_ids` or `max_tokens`. The stop token is
/// part of the answer; an empty prompt has none.
///
/// Prompts of like length go through the model together.
///
/// # Errors
/// [`Stopped`], between two tokens.
pub fn greedy(
    model: &Model,
    adapter: Option<&Adapter>,
    prompts: &[Vec<u32>],
    stop_ids: &[u32],
    max_tokens: usize,
    stop: &Stop,
) -> Result<Vec<Vec<u32>>, Stopped> {
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut by_length: Vec<usize> = (0..prompts.len()).filter(|&row| !prompts[row].is_empty()).collect();
    by_length.sort_by_key(|&row| prompts[row].len());
    let mut left = by_length.as_slice();
    while let Some(longest) = left.last() {
        let most = (PLACES_AT_ONCE / (prompts[*longest].len() + max_tokens)).clamp(1, left.len());
        let (rest, together) = left.split_at(left.len() - most);
        left = rest;
        let rows: Vec<&[u32]> = together.iter().map(|&row| prompts[row].as_slice()).collect();
        for (&row, answer) in together.iter().zip(extend(model, adapter, &rows, stop_ids, max_tokens, stop)?) {
            answers[row] = answer;
        }
    }
    Ok(answers)
}

/// Rows that are extended together.
struct Open {
    /// Their numbers among all.
    rows: Vec<usize>,
    /// Tokens of their prompts, `[rows]`.
    lengths: Tensor,
    caches: Vec<Cache>,
}

impl Open {
    /// Goes on with those of which `stays` says so. Caches are only copied once a quarter of them is of no use.
    fn keep(&mut self, newest: &mut Vec<i64>, stays: impl Fn(usize) -> bool) {
        let staying: Vec<usize> = (0..self.rows.len()).filter(|&place| stays(self.rows[place])).collect();
        if staying.len() * 4 > self.rows.len() * 3 {
            return;
        }
        let places: Vec<i64> = staying.iter().map(|&place| place as i64).collect();
        let places = Tensor::from_slice(&places).to_device(self.lengths.device());
        self.lengths = self.lengths.index_select(0, &places);
        self.caches = self.caches.iter().map(|cache| cache.of_rows(&places)).collect();
        *newest = staying.iter().map(|&place| newest[place]).collect();
        self.rows = staying.iter().map(|&place| self.rows[place]).collect();
    }

    /// What the newest token sees, the `following`th after its prompt, counted from 1, with prompts padded to `width`.
    fn visible(&self, width: i64, following: i64) -> Visible {
        let places = width + following;
        let place = Tensor::arange(places, (Kind::Int64, self.lengths.device())).unsqueeze(0); // [1, places]
        let lengths = self.lengths.unsqueeze(1); // [rows, 1]
        let of_prompt = place.lt(width);
        // A token that follows stands behind its own row's prompt, wherever its place is.
        let position = place.where_self(&of_prompt, &(&place - width + &lengths)); // [rows, places]
        let distance = &lengths + (following - 1) - position;
        let everything = place.lt_tensor(&lengths).logical_or(&of_prompt.logical_not()); // [rows, places]
        Visible { places, everything: everything.unsqueeze(1).unsqueeze(1), distance }
    }
}

fn extend(
    model: &Model,
    adapter: Option<&Adapter>,
    prompts: &[&[u32]],
    stop_ids: &[u32],
    max_tokens: usize,
    stop: &Stop,
) -> Result<Vec<Vec<u32>>, Stopped> {
    let is_open = |answer: &[u32]| !answer.last().is_some_and(|last| stop_ids.contains(last));
    let mut answers = vec![Vec::new(); prompts.len()];
    if max_tokens == 0 {
        return Ok(answers);
    }
    let (hidden, mut open) = read(model, adapter, prompts, max_tokens);
    let width = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0) as i64;
    let mut newest = most_likely(model, &hidden);
    for following in 1..=max_tokens {
        stop.check()?;
        for (&row, &token) in open.rows.iter().zip(&newest) {
            if let (true, Ok(token)) = (is_open(&answers[row]), u32::try_from(token)) {
                answers[row].push(token);
            }
        }
        if following == max_tokens || !open.rows.iter().any(|&row| is_open(&answers[row])) {
            break;
        }
        open.keep(&mut newest, |row| is_open(&answers[row]));
        let visible = open.visible(width, following as i64);
        let ids = Tensor::from_slice(&newest).to_device(model.device);
        let positions = &open.lengths + (following as i64 - 1);
        let hidden = model.follow(&ids, &positions, &mut open.caches, &visible, adapter);
        newest = most_likely(model, &hidden);
    }
    Ok(answers)
}

/// Reads the prompts: their last hidden states, `[rows, hidden]`.
fn read(model: &Model, adapter: Option<&Adapter>, prompts: &[&[u32]], max_tokens: usize) -> (Tensor, Open) {
    let (mut ids, mut lengths, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    for prompt in prompts {
        ids.extend(prompt.iter().map(|&id| i64::from(id)));
        lengths.push(prompt.len());
        positions.push(ids.len() as i64 - 1);
    }
    let in_tokens: Vec<i64> = lengths.iter().map(|&length| length as i64).collect();
    let batch = Batch { lengths, ids, positions, targets: Vec::new() };
    let packed = Packed::new(&[(&batch, 0)], model.device);
    let (hidden, caches) = model.prefill(&packed, adapter, max_tokens as i64);
    let lengths = Tensor::from_slice(&in_tokens).to_device(model.device);
    (hidden, Open { rows: (0..prompts.len()).collect(), lengths, caches })
}

fn most_likely(model: &Model, hidden: &Tensor) -> Vec<i64> {
    let tokens = model.head.logits(hidden).argmax(-1, false).to_kind(Kind::Int64);
    numbers(&tokens)
}
