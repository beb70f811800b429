//! The alignment reference: what the base says on the alignment rows, which the adapted model is held to.
//!
//! The rows and the base are both fixed, so the base runs over them once and keeps its final hidden states at the positions
//! that count: `hidden` numbers each, where logits would be a vocabulary.

use std::ops::Range;

use holdfast_dataset::Example;
use holdfast_dataset::batch::Batch;
use holdfast_domain::safety::KlPositions;
use tch::Tensor;

use crate::methods::Objective;
use crate::model::Model;
use crate::packed::Packed;
use crate::stop::{Stop, Stopped};

/// Alignment rows with the base's final hidden states on them.
#[derive(Debug)]
pub struct Reference {
    examples: Vec<Example>,
    positions: KlPositions,
    /// The base's final hidden states at all rows' supervised positions, `[Σ positions, hidden]`; empty where nothing of them is
    /// needed, and where every position counts, because padding counts too and depends on which rows stand together.
    hidden: Option<Tensor>,
    /// Each row's part of `hidden`.
    places: Vec<Range<i64>>,
}

/// Alignment rows of one forward pass.
#[derive(Debug)]
pub struct ReferenceBatch {
    /// The rows, with the positions that the objective looks at.
    pub batch: Batch,
    /// The base's final hidden states there, `[positions, hidden]`, where the objective needs them.
    pub hidden: Option<Tensor>,
    /// Each row's part of the positions.
    pub rows: Vec<Range<usize>>,
}

impl Reference {
    /// Runs the base over `examples`, a few rows at a time, so that memory does not grow with their number.
    ///
    /// # Errors
    /// [`Stopped`], between two passes.
    pub fn new(model: &Model, examples: Vec<Example>, positions: KlPositions, stop: &Stop) -> Result<Self, Stopped> {
        const ROWS_AT_ONCE: usize = 4;
        let hidden = match positions {
            KlPositions::Response | KlPositions::Deciding => {
                let passes = examples.chunks(ROWS_AT_ONCE);
                let parts = passes.map(|rows| stop.check().map(|()| base_hidden(model, &Batch::new(rows))));
                Some(Tensor::cat(&parts.collect::<Result<Vec<_>, _>>()?, 0))
            }
            KlPositions::All => None,
        };
        Ok(Self::with_hidden(examples, positions, hidden))
    }

    /// The same with states that are known, `[Σ supervised positions, hidden]`.
    #[must_use]
    pub fn with_hidden(examples: Vec<Example>, positions: KlPositions, hidden: Option<Tensor>) -> Self {
        let mut end = 0;
        let places = examples.iter().map(|example| {
            let start = end;
            end += example.supervised_count() as i64;
            start..end
        });
        let places = places.collect();
        Self { examples, positions, hidden, places }
    }

    /// The base's final hidden states, `[Σ supervised positions, hidden]`, where they are kept.
    pub fn hidden(&self) -> Option<&Tensor> {
        self.hidden.as_ref()
    }

    /// Keeps every `every`th row apart: the others, and those. `None` where there are not that many rows.
    #[must_use]
    pub fn split(self, every: usize) -> Option<(Self, Self)> {
        if self.rows() < every {
            return None;
        }
        let part = |wanted: &dyn Fn(usize) -> bool| {
            let rows: Vec<usize> = (0..self.rows()).filter(|&row| wanted(row)).collect();
            let examples = rows.iter().map(|&row| self.examples[row].clone()).collect();
            let hidden = self.hidden.as_ref().map(|hidden| {
                let places = rows.iter().map(|&row| &self.places[row]);
                Tensor::cat(&places.map(|at| hidden.narrow(0, at.start, at.end - at.start)).collect::<Vec<_>>(), 0)
            });
            Self::with_hidden(examples, self.positions, hidden)
        };
        let apart = |row: usize| row % every == every - 1;
        Some((part(&|row| !apart(row)), part(&apart)))
    }

    /// The number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.examples.len()
    }

    /// What an objective's sum over some rows is divided by: their supervised tokens, or the rows themselves.
    #[must_use]
    pub fn divisor(&self, objective: Objective, rows: &[usize]) -> f64 {
        let count = match (objective, self.positions) {
            (Objective::Hidden | Objective::WeightedKl, _) => rows.len(),
            // The released code counts labels, so a supervised first token counts although nothing predicts it.
            (Objective::Kl, KlPositions::All) => {
                rows.iter().map(|&row| self.examples[row].supervised.iter().filter(|s| **s).count()).sum()
            }
            (Objective::Kl | Objective::Task, _) => rows.iter().map(|&row| self.examples[row].supervised_count()).sum(),
        };
        count as f64
    }

    /// The rows of one forward pass, for an objective.
    #[must_use]
    pub fn batch(&self, model: &Model, objective: Objective, rows: &[usize]) -> ReferenceBatch {
        let examples = || rows.iter().map(|&row| &self.examples[row]);
        let batch = Batch::new(examples());
        match objective {
            Objective::Task => ReferenceBatch { rows: positions_by_row(&batch), batch, hidden: None },
            Objective::Kl if self.positions == KlPositions::All => {
                let batch = Batch::padded(examples()).everywhere();
                let hidden = Some(base_hidden(model, &batch));
                ReferenceBatch { rows: positions_by_row(&batch), batch, hidden }
            }
            Objective::Kl | Objective::WeightedKl => {
                let hidden = Some(self.states(model, rows, &batch));
                ReferenceBatch { rows: positions_by_row(&batch), batch, hidden }
            }
            Objective::Hidden => self.last_prompt_positions(model, rows, batch),
        }
    }

    /// The base's states at the supervised positions of `rows`, `[positions, hidden]`.
    fn states(&self, model: &Model, rows: &[usize], batch: &Batch) -> Tensor {
        let Some(hidden) = &self.hidden else { return base_hidden(model, batch) };
        let parts = rows.iter().map(|&row| &self.places[row]);
        let parts: Vec<Tensor> = parts.map(|at| hidden.narrow(0, at.start, at.end - at.start)).collect();
        Tensor::cat(&parts, 0)
    }

    /// One position a row: the last before its last response.
    fn last_prompt_positions(&self, model: &Model, rows: &[usize], mut batch: Batch) -> ReferenceBatch {
        let states = self.states(model, rows, &batch);
        let starts: Vec<usize> = positions_by_row(&batch)
            .iter()
            .filter_map(|row| runs(&batch.positions, row.clone()).last().map(|run| run.start))
            .collect();
        let index = Tensor::from_slice(&starts.iter().map(|&at| at as i64).collect::<Vec<_>>()).to_device(model.device);
        batch.positions = starts.iter().map(|&at| batch.positions[at]).collect();
        batch.targets.clear();
        let rows = (0..batch.positions.len()).map(|at| at..at + 1).collect();
        ReferenceBatch { batch, hidden: Some(states.index_select(0, &index)), rows }
    }
}

/// How many rows the worse half is.
#[must_use]
pub fn worse_half(rows: usize) -> usize {
    rows.div_ceil(2)
}

/// The runs of neighbouring positions within `row`, one for each response.
pub fn runs(positions: &[i64], row: Range<usize>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for at in row {
        match runs.last_mut() {
            Some(run) if positions[at] == positions[at - 1] + 1 => run.end = at + 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

fn positions_by_row(batch: &Batch) -> Vec<Range<usize>> {
    let (mut end, mut at) = (0, 0);
    let of_row = |&length: &usize| {
        end += length as i64;
        let start = at;
        while batch.positions.get(at).is_some_and(|position| *position < end) {
            at += 1;
        }
        start..at
    };
    batch.lengths.iter().map(of_row).collect()
}

/// Final hidden states at the batch's positions, with the adapter off, `[positions, hidden]`.
fn base_hidden(model: &Model, batch: &Batch) -> Tensor {
    model.hidden(&Packed::new(&[(batch, 0)], model.device), None)
}
