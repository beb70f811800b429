//! Losses of rows and their gradients: how a step's rows go through the model and back.

use std::ops::Range;

use holdfast_base_model::memory::SHARED_PASS_TOKENS;
use holdfast_dataset::batch::Batch;
use holdfast_domain::hyperparameters::Recompute;
use tch::{Kind, Tensor};

use crate::adapter::Adapter;
use crate::gradient::{self, Gradient};
use crate::kernels::single;
use crate::loss;
use crate::methods::{Objective, Side};
use crate::model::{Model, PassOptions};
use crate::packed::Packed;
use crate::reference::{self, Reference, ReferenceBatch};
use crate::stop::{Stop, Stopped};

/// Numbers the alignment rows of a step beyond any of the user's rows, so that their dropout differs.
const FIRST_ALIGNMENT_ROW: i64 = 1 << 24;

/// What the positions that decide a response weigh under [`Objective::WeightedKl`], and how many they are at its beginning: the last of the
/// prompt and the first five of the response. The one that ends it weighs as much: a refusal that goes on is none.
const DECIDING_WEIGHT: f64 = 5.0;
const DECIDING_POSITIONS: usize = 6;

/// What computes gradients.
#[derive(Debug, Clone, Copy)]
pub struct Engine<'a> {
    /// The frozen base.
    pub model: &'a Model,
    /// What is trained.
    pub adapter: &'a Adapter,
    /// The key of the step's dropout; without one, nothing is dropped.
    pub dropout_key: Option<u64>,
    /// What the backward pass makes again instead of keeping it.
    pub recompute: Recompute,
}

/// The task side of a step: `−log p(next token)`, a mean over supervised tokens.
#[derive(Debug)]
pub struct Task {
    /// Its loss and gradient, `u`.
    pub side: Side,
    /// The share of supervised tokens the model ranked first.
    pub token_accuracy: f64,
}

/// The alignment rows of a step.
#[derive(Debug, Clone, Copy)]
pub struct AlignmentRows<'a> {
    /// Where they are from.
    pub reference: &'a Reference,
    /// What they are held to.
    pub objective: Objective,
    /// Their numbers, pass by pass.
    pub passes: &'a [Vec<usize>],
}

/// What an objective makes of a segment's hidden states.
struct Scored {
    sum: f64,
    correct: i64,
    /// Of the sum over the step's divisor, `[positions, hidden]`.
    by_hidden: Tensor,
}

/// Rows of a pass that share a loss.
struct Segment<'a> {
    batch: &'a Batch,
    first_row: i64,
    score: &'a dyn Fn(&Tensor) -> Scored,
}

impl Engine<'_> {
    /// `u`, over all passes of a step: sums of token losses, divided once by the number of all their tokens, so that how a step is
    /// cut into passes makes no difference.
    #[must_use]
    pub fn task(&self, batches: &[Batch]) -> Task {
        self.gradients(batches, None).0
    }

    /// `a`, over all passes of a step.
    #[must_use]
    pub fn alignment(&self, rows: AlignmentRows<'_>) -> Side {
        let (_, alignment) = self.gradients(&[], Some(rows));
        alignment.unwrap_or_else(|| Side { loss: 0.0, tokens: 0.0, gradient: Gradient::zeros(self.adapter) })
    }

    /// Both, the user's rows and the alignment rows of a pass together where they are few.
    #[must_use]
    pub fn gradients(&self, user: &[Batch], alignment: Option<AlignmentRows<'_>>) -> (Task, Option<Side>) {
        let user_tokens = supervised(user);
        let align_tokens = alignment.map_or(0.0, |rows| rows.tokens());
        let chosen = alignment.and_then(|rows| self.choose(rows));
        let alignment = match (&chosen, alignment) {
            (Some(passes), Some(rows)) => Some(AlignmentRows { passes, ..rows }),
            (_, whole) => whole,
        };
        let counts = if chosen.is_some() { Counts::All } else { Counts::WorseHalf };
        let align_divisor = alignment.map_or(0.0, |rows| rows.divisor(counts));
        let mut gradients = [Gradient::zeros(self.adapter), Gradient::zeros(self.adapter)];
        let (mut task, mut correct, mut align) = (0.0, 0, 0.0);
        let align_passes = alignment.map_or(0, |rows| rows.passes.len());
        let (mut user_row, mut align_row) = (0, FIRST_ALIGNMENT_ROW);
        for at in 0..user.len().max(align_passes) {
            let held = alignment
                .and_then(|rows| Some((rows.objective, rows.reference.batch(self.model, rows.objective, rows.passes.get(at)?))));
            let score_task = |hidden: &Tensor| {
                user.get(at).map_or_else(|| nothing(hidden), |batch| self.score_task(hidden, &batch.targets, user_tokens))
            };
            let score_held = |hidden: &Tensor| {
                held.as_ref().map_or_else(
                    || nothing(hidden),
                    |(objective, held)| self.score_alignment(hidden, held, *objective, counts, align_divisor),
                )
            };
            let mut segments = Vec::new();
            if let Some(batch) = user.get(at) {
                segments.push((0, Segment { batch, first_row: user_row, score: &score_task }));
                user_row += batch.lengths.len() as i64;
            }
            if let Some((_, held)) = &held {
                segments.push((1, Segment { batch: &held.batch, first_row: align_row, score: &score_held }));
                align_row += held.batch.lengths.len() as i64;
            }
            let tokens: u64 = segments.iter().map(|(_, segment)| segment.batch.tokens()).sum();
            let together = if tokens <= SHARED_PASS_TOKENS { segments.len().max(1) } else { 1 };
            for pass in segments.chunks(together) {
                let (mut ranges, mut token) = ([0..0, 0..0], 0);
                for (which, segment) in pass {
                    ranges[*which] = token..token + segment.batch.tokens() as i64;
                    token = ranges[*which].end;
                }
                let scored = self.pass(pass.iter().map(|(_, segment)| segment), &ranges, &mut gradients);
                for ((which, _), (sum, count)) in pass.iter().zip(scored) {
                    if *which == 0 {
                        task += sum;
                        correct += count;
                    } else {
                        align += sum;
                    }
                }
            }
        }
        let [u, a] = gradients;
        let task = self.task_of(task, correct, user_tokens, u);
        (task, alignment.map(|_| Side { loss: align / align_divisor, tokens: align_tokens, gradient: a }))
    }

    /// Of rows that come in several passes and of which the worse half counts, that half, pass by pass: no pass knows by itself which
    /// rows are worse than those of another. Nothing is dropped in the look that decides, so that under dropout other rows may be chosen
    /// than by one pass, which sees its own losses. `None` where nothing has to be chosen.
    fn choose(&self, rows: AlignmentRows<'_>) -> Option<Vec<Vec<usize>>> {
        if rows.objective != Objective::WeightedKl || rows.passes.len() < 2 {
            return None;
        }
        let losses: Vec<Vec<f64>> = rows.passes.iter().map(|numbers| self.row_losses(rows, numbers)).collect();
        let mut all: Vec<(f64, usize, usize)> = Vec::new();
        for (pass, losses) in losses.iter().enumerate() {
            all.extend(losses.iter().enumerate().map(|(row, loss)| (*loss, pass, row)));
        }
        all.sort_by(|(x, ..), (y, ..)| y.total_cmp(x));
        all.truncate(reference::worse_half(all.len()));
        let mut chosen: Vec<(usize, usize)> = all.into_iter().map(|(_, pass, row)| (pass, row)).collect();
        chosen.sort_unstable();
        let passes = rows.passes.iter().enumerate().map(|(at, numbers)| {
            chosen.iter().filter(|(pass, _)| *pass == at).filter_map(|(_, row)| numbers.get(*row).copied()).collect::<Vec<_>>()
        });
        Some(passes.filter(|numbers| !numbers.is_empty()).collect())
    }

    /// The alignment rows of one pass, and the adapted model's states at their positions; nothing is dropped.
    fn held(&self, rows: AlignmentRows<'_>, numbers: &[usize]) -> (ReferenceBatch, Tensor) {
        let held = rows.reference.batch(self.model, rows.objective, numbers);
        let packed = Packed::new(&[(&held.batch, 0)], self.model.device);
        let hidden = self.model.hidden(&packed, Some(self.adapter));
        (held, hidden)
    }

    /// Each row's mean of the weighted KL.
    fn row_losses(&self, rows: AlignmentRows<'_>, numbers: &[usize]) -> Vec<f64> {
        let (held, hidden) = self.held(rows, numbers);
        let Some(base) = &held.hidden else { return Vec::new() };
        let at = gradient::numbers::<f32>(&loss::kl(&hidden, &self.model.head, base).at);
        deciding(&at, &held).0
    }

    /// `u`, with each row's own part of it: `each` gets the row's number within the step and its gradient, whose sum over all
    /// rows is `u`.
    pub fn task_by_row(&self, batches: &[Batch], mut each: impl FnMut(usize, &Gradient)) -> Task {
        let tokens = supervised(batches);
        let mut whole = Gradient::zeros(self.adapter);
        let (mut task, mut correct, mut first_row) = (0.0, 0, 0);
        for batch in batches {
            let mut token = 0;
            let ranges: Vec<Range<i64>> = batch
                .lengths
                .iter()
                .map(|&length| {
                    let start = token;
                    token += length as i64;
                    start..token
                })
                .collect();
            let mut gradients: Vec<Gradient> = ranges.iter().map(|_| Gradient::zeros(self.adapter)).collect();
            let score = |hidden: &Tensor| self.score_task(hidden, &batch.targets, tokens);
            let segment = Segment { batch, first_row: first_row as i64, score: &score };
            for (sum, count) in self.pass(std::iter::once(&segment), &ranges, &mut gradients) {
                task += sum;
                correct += count;
            }
            for (row, gradient) in gradients.iter().enumerate() {
                each(first_row + row, gradient);
                whole.0 += &gradient.0;
            }
            first_row += batch.lengths.len();
        }
        self.task_of(task, correct, tokens, whole)
    }

    /// The alignment loss alone.
    ///
    /// # Errors
    /// [`Stopped`], between two passes.
    pub fn alignment_loss(&self, rows: AlignmentRows<'_>, stop: &Stop) -> Result<f64, Stopped> {
        if rows.objective == Objective::WeightedKl {
            let mut losses = Vec::new();
            for numbers in rows.passes {
                stop.check()?;
                losses.extend(self.row_losses(rows, numbers));
            }
            losses.sort_by(|x, y| y.total_cmp(x));
            losses.truncate(reference::worse_half(losses.len()));
            return Ok(losses.iter().sum::<f64>() / losses.len() as f64);
        }
        let divisor = rows.divisor(Counts::All);
        let mut sum = 0.0;
        for numbers in rows.passes {
            stop.check()?;
            let (held, hidden) = self.held(rows, numbers);
            sum += self.score_alignment(&hidden, &held, rows.objective, Counts::All, divisor).sum;
        }
        Ok(sum / divisor)
    }

    fn task_of(&self, sum: f64, correct: i64, tokens: f64, gradient: Gradient) -> Task {
        let of_tokens = |x: f64| if tokens > 0.0 { x / tokens } else { 0.0 };
        Task { side: Side { loss: of_tokens(sum), tokens, gradient }, token_accuracy: of_tokens(correct as f64) }
    }

    fn score_task(&self, hidden: &Tensor, targets: &[i64], divisor: f64) -> Scored {
        let targets = Tensor::from_slice(targets).to_device(self.model.device);
        let loss = loss::task(hidden, &self.model.head, &targets);
        Scored { sum: loss.sum(), correct: loss.correct, by_hidden: loss.mean_by_hidden(divisor) }
    }

    fn score_alignment(
        &self,
        hidden: &Tensor,
        held: &ReferenceBatch,
        objective: Objective,
        counts: Counts,
        divisor: f64,
    ) -> Scored {
        let Some(base) = &held.hidden else { return self.score_task(hidden, &held.batch.targets, divisor) };
        match objective {
            Objective::Hidden => {
                let width = base.size().last().copied().unwrap_or(1) as f64;
                let distance = hidden.to_kind(Kind::Float) - base.to_kind(Kind::Float);
                let sum = distance.square().sum(Kind::Double).double_value(&[]) / width;
                let by_hidden = (distance * (2.0 / (width * divisor))).to_kind(hidden.kind());
                Scored { sum, correct: 0, by_hidden }
            }
            Objective::WeightedKl => {
                let mut loss = loss::kl(hidden, &self.model.head, base);
                let at = gradient::numbers::<f32>(&loss.at);
                let (losses, mut weights) = deciding(&at, held);
                let mut order: Vec<usize> = (0..losses.len()).collect();
                order.sort_by(|x, y| losses[*y].total_cmp(&losses[*x]));
                let better = order.split_off(counts.of(order.len()));
                for row in better {
                    weights[held.rows[row].clone()].fill(0.0);
                }
                let sum = order.iter().map(|row| losses[*row]).sum();
                let weights: Vec<f32> = weights.into_iter().map(|weight| single(weight / divisor)).collect();
                let weights = Tensor::from_slice(&weights).to_device(self.model.device).unsqueeze(1);
                loss.by_hidden *= weights.to_kind(hidden.kind());
                Scored { sum, correct: 0, by_hidden: loss.by_hidden }
            }
            Objective::Kl | Objective::Task => {
                let loss = loss::kl(hidden, &self.model.head, base);
                Scored { sum: loss.sum(), correct: 0, by_hidden: loss.mean_by_hidden(divisor) }
            }
        }
    }

    /// Runs segments through the model together and back; the tokens in each of `ranges` add to their own gradient. Returns each
    /// segment's sum of losses and its correct positions.
    fn pass<'s>(
        &self,
        segments: impl Iterator<Item = &'s Segment<'s>> + Clone,
        ranges: &[Range<i64>],
        gradients: &mut [Gradient],
    ) -> Vec<(f64, i64)> {
        let batches: Vec<(&Batch, i64)> = segments.clone().map(|segment| (segment.batch, segment.first_row)).collect();
        let packed = Packed::new(&batches, self.model.device);
        let options = PassOptions { adapter: Some(self.adapter), dropout_key: self.dropout_key, recompute: self.recompute };
        let trace = self.model.trace(&packed, options);
        let (mut by_hidden, mut sums, mut position) = (Vec::new(), Vec::new(), 0);
        for segment in segments {
            let positions = segment.batch.positions.len() as i64;
            let scored = (segment.score)(&trace.hidden.narrow(0, position, positions));
            position += positions;
            by_hidden.push(scored.by_hidden);
            sums.push((scored.sum, scored.correct));
        }
        trace.backward(&Tensor::cat(&by_hidden, 0), ranges, gradients);
        sums
    }
}

/// Which rows of a pass count under [`Objective::WeightedKl`].
#[derive(Debug, Clone, Copy)]
enum Counts {
    /// They were chosen before.
    All,
    /// They are all there are.
    WorseHalf,
}

impl Counts {
    fn of(self, rows: usize) -> usize {
        match self {
            Self::All => rows,
            Self::WorseHalf => reference::worse_half(rows),
        }
    }
}

impl AlignmentRows<'_> {
    fn divisor(&self, counts: Counts) -> f64 {
        if self.objective == Objective::WeightedKl {
            return counts.of(self.passes.iter().map(Vec::len).sum()) as f64;
        }
        self.passes.iter().map(|rows| self.reference.divisor(self.objective, rows)).sum()
    }

    fn tokens(&self) -> f64 {
        self.passes.iter().map(|rows| self.reference.divisor(Objective::Task, rows)).sum()
    }
}

/// The supervised tokens of all passes of a step.
pub(crate) fn supervised(batches: &[Batch]) -> f64 {
    batches.iter().map(|batch| batch.targets.len()).sum::<usize>() as f64
}

fn nothing(hidden: &Tensor) -> Scored {
    Scored { sum: 0.0, correct: 0, by_hidden: hidden.zeros_like() }
}

/// Each row's mean of the KL `at` its positions, weighted towards where each response begins and where it ends, and what each position
/// weighs in it.
fn deciding(at: &[f32], held: &ReferenceBatch) -> (Vec<f64>, Vec<f64>) {
    let mut weights = vec![0.0; at.len()];
    let mut losses = Vec::new();
    for row in &held.rows {
        for run in reference::runs(&held.batch.positions, row.clone()) {
            let last = run.len().saturating_sub(1);
            for (nth, position) in run.enumerate() {
                let decides = nth < DECIDING_POSITIONS || nth == last;
                weights[position] = if decides { DECIDING_WEIGHT } else { 1.0 };
            }
        }
        let total: f64 = weights[row.clone()].iter().sum();
        for position in row.clone() {
            weights[position] /= total;
        }
        losses.push(row.clone().map(|position| weights[position] * f64::from(at[position])).sum());
    }
    (losses, weights)
}

#[cfg(test)]
mod tests {
    use holdfast_dataset::Example;

    use super::*;

    #[test]
    fn the_deciding_positions_weigh_five() {
        // Two rows of eight supervised positions; the second is worse, at its first position alone.
        let example = Example { ids: (0..9).collect(), supervised: (0..9).map(|time| time > 0).collect() };
        let batch = Batch::new([&example, &example]);
        let held = ReferenceBatch { batch, hidden: None, rows: vec![0..8, 8..16] };
        let mut at = vec![0.01_f32; 16];
        at[8] = 1.0;
        let (losses, weights) = deciding(&at, &held);
        // Σω = 6·5 + 1 + 5 = 36, so the second row's mean is (5·1 + 31·0.01) / 36.
        assert!((losses[0] - 0.01).abs() < 1e-6 && (losses[1] - (5.0 + 0.31) / 36.0).abs() < 1e-6, "{losses:?}");
        let of_second: Vec<f64> = weights[8..].iter().map(|weight| (weight * 36.0).round()).collect();
        assert_eq!(of_second, [5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 1.0, 5.0], "the beginning and the end");
    }
}
