//! Which rows did it: how hard each of the tenant's rows pushes against the alignment.
//!
//! With `u_i` a row's gradient and `ā` an exponential mean of the alignment gradient's direction `a / ‖a‖`, `s_i = ⟨u_i, ā⟩` over
//! norms is below zero where a step along the row raises the alignment loss. The mean is of directions, since a method that holds leaves
//! `a` short, and the long ones of the first steps would outlast it.
//!
//! Two ways to the score, both averaged over the epochs after a short warm-up (at the base `a` is zero, and the score means nothing). A
//! score counts by the square of the step that it is from: what a model has not learned yet pushes in every direction, harmless rows
//! too, and those that still push when the others are learned are the ones to tell apart.
//!
//! - by gradients: `s_i = ⟨u_i, ā⟩ / (√‖u_i‖ ‖ā‖)`, over all weights at once, of the sum over the row's tokens: a row must not count
//!   for more because few others shared its step. The cosine, with the whole of `‖u_i‖`, has a short harmless
//!   row count as much as a long harmful one, although its gradient lies in few directions and so, by chance, well along `ā` or against it;
//!   without it, as a step has it, what is long or loud counts alone. In between more planted rows are found than by either;
//! - by a forward pass over the whole file at the end of an epoch: `s_i ≈ (ℓ_i(θ + h ā) − ℓ_i(θ)) / (h ‖ā‖)`; only in
//!   float32, since a base in bfloat16 rounds so small a step away.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::adapter::Adapter;
use crate::gradient::{self, Gradient};
use crate::kernels::single;
use crate::stop::Stopped;
use crate::whole_file;

/// The newest gradient's weight in the mean.
const NEWEST: f64 = 0.1;
/// Steps before scores count.
const WARMUP_STEPS: u64 = 10;
/// How far the forward pass steps, against the length of the weights themselves.
const STEP_LENGTH: f64 = 1e-3;

/// Scores of all rows so far.
#[derive(Debug)]
pub struct RowConflicts {
    device: Device,
    mean_align: Option<Tensor>, // ā: [parameters]
    /// ‖ā‖.
    norm: f64,
    by_gradient: Scores,
    by_forward: Scores,
}

/// A sum for each row, and what it is to be divided by.
#[derive(Debug)]
struct Scores {
    sums: Vec<f32>,
    weights: Vec<f32>,
}

impl Scores {
    fn none(rows: usize) -> Self {
        Self { sums: vec![0.0; rows], weights: vec![0.0; rows] }
    }

    fn add(&mut self, row: usize, score: f64, step: u64) {
        if let (Some(sum), Some(weight), true) = (self.sums.get_mut(row), self.weights.get_mut(row), score.is_finite()) {
            let counts = (step as f64).powi(2);
            *sum += single(score * counts);
            *weight += single(counts);
        }
    }

    fn mean(&self, row: usize) -> Option<f32> {
        let weight = self.weights.get(row).copied().filter(|weight| *weight > 0.0)?;
        self.sums.get(row).map(|sum| sum / weight)
    }
}

impl RowConflicts {
    /// No scores yet, of `rows` rows.
    #[must_use]
    pub fn new(adapter: &Adapter, rows: usize) -> Self {
        Self {
            device: adapter.flat().device(),
            mean_align: None,
            norm: 0.0,
            by_gradient: Scores::none(rows),
            by_forward: Scores::none(rows),
        }
    }

    /// The direction to score by at `step`, once the warm-up is over.
    pub fn direction(&self, step: u64) -> Option<&Tensor> {
        self.mean_align.as_ref().filter(|_| step >= WARMUP_STEPS && self.norm > 0.0)
    }

    /// Scores `row` at `step` against [`Self::direction`], by its part of the step's mean over so many `tokens`. A row without a gradient
    /// has no score.
    pub fn score(&mut self, row: usize, part: &Gradient, tokens: f64, step: u64) {
        let Some(mean) = &self.mean_align else { return };
        // The gradient of the row's own sum is so many times as long, and its score the root of that.
        let score = tokens.sqrt() * gradient::dot(&part.0, mean) / (part.norm().sqrt() * self.norm);
        self.by_gradient.add(row, score, step);
    }

    /// Takes a step's alignment gradient into the mean; where it is zero, as at the base, there is no direction to take.
    pub fn learn(&mut self, align: &Gradient) {
        let norm = align.norm();
        if norm > 0.0 {
            let mean = gradient::mean_with(self.mean_align.take(), &Gradient(&align.0 / norm), NEWEST);
            self.go_on_from(Some(mean));
        }
    }

    fn go_on_from(&mut self, mean: Option<Tensor>) {
        self.norm = mean.as_ref().map_or(0.0, gradient::norm);
        self.mean_align = mean;
    }

    /// Scores all rows by two forward passes, at the weights and a little along the mean. `losses` gives each row's mean loss.
    ///
    /// # Errors
    /// [`Stopped`] where `losses` is; then no row is scored.
    pub fn score_by_forward(
        &mut self,
        adapter: &Adapter,
        step: u64,
        losses: impl Fn() -> Result<Vec<f64>, Stopped>,
    ) -> Result<(), Stopped> {
        let Some(mean) = self.direction(step) else { return Ok(()) };
        let start = adapter.flat().copy();
        let distance = STEP_LENGTH * gradient::norm(&start);
        let before = losses()?;
        adapter.shift(&(mean * (distance / self.norm)));
        let after = losses();
        adapter.set(&start);
        for (row, (before, after)) in before.iter().zip(&after?).enumerate() {
            self.by_forward.add(row, (after - before) / distance, step);
        }
        Ok(())
    }

    /// Writes one line a row: `lines` has each row's number in the uploaded file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path, lines: &[u64]) -> Result<()> {
        let mut text = Vec::new();
        for (row, line) in lines.iter().enumerate() {
            let scores = serde_json::json!({
                "line": line,
                "gradient": self.by_gradient.mean(row),
                "forward": self.by_forward.mean(row),
            });
            writeln!(text, "{scores}")?;
        }
        whole_file::write(path, &text)
    }

    /// What goes into a checkpoint.
    #[must_use]
    pub fn memory(&self) -> Vec<(String, Tensor)> {
        let mut memory = vec![
            ("gradient_row_sums".to_owned(), Tensor::from_slice(&self.by_gradient.sums)),
            ("gradient_row_weights".to_owned(), Tensor::from_slice(&self.by_gradient.weights)),
            ("forward_weighted_sums".to_owned(), Tensor::from_slice(&self.by_forward.sums)),
            ("forward_weights".to_owned(), Tensor::from_slice(&self.by_forward.weights)),
        ];
        memory.extend(self.mean_align.as_ref().map(|mean| ("mean_align".to_owned(), mean.to_device(Device::Cpu))));
        memory
    }

    /// Goes on from a checkpoint.
    pub fn recall(&mut self, mut memory: BTreeMap<String, Tensor>) {
        let device = self.device;
        self.go_on_from(memory.remove("mean_align").map(|mean| mean.to_device(device)));
        let mut numbers = |name: &str, into: &mut Vec<f32>| {
            let found = memory.remove(name).and_then(|vector| Vec::<f32>::try_from(&vector.to_kind(Kind::Float)).ok());
            if let Some(found) = found.filter(|found| found.len() == into.len()) {
                *into = found;
            }
        };
        numbers("gradient_row_sums", &mut self.by_gradient.sums);
        numbers("gradient_row_weights", &mut self.by_gradient.weights);
        numbers("forward_weighted_sums", &mut self.by_forward.sums);
        numbers("forward_weights", &mut self.by_forward.weights);
    }
}
