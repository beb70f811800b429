//! Which rows did it: how hard each of the tenant's rows pushes against the alignment.
//!
//! With `u_i` a row's gradient and `ā` an exponential mean of the alignment gradient, `s_i = ⟨u_i, ā⟩` over norms is negative
//! where a step along the row raises the alignment loss. Two ways to it, both averaged over the epochs after a short warm-up (at
//! the base `a` is zero, and the score means nothing):
//!
//! - by gradients: `s_i = mean over modules of ⟨u_i, ā⟩_m / (‖u_i‖_m ‖ā‖_m)`, normalised module by module, since one module's
//!   large norm would drown the others;
//! - by a forward pass over the whole file at the end of an epoch: `s_i ≈ (ℓ_i(θ + h ā) − ℓ_i(θ)) / (h ‖ā‖)`; only in
//!   float32, since a base in bfloat16 rounds so small a step away.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
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
    modules: Vec<Range<i64>>,
    mean_align: Option<Tensor>, // ā: [parameters]
    /// ‖ā‖ by module.
    norms: Vec<f64>,
    by_gradient: Scores,
    by_forward: Scores,
}

/// A sum and a count for each row.
#[derive(Debug)]
struct Scores {
    sums: Vec<f32>,
    counts: Vec<f32>,
}

impl Scores {
    fn none(rows: usize) -> Self {
        Self { sums: vec![0.0; rows], counts: vec![0.0; rows] }
    }

    fn add(&mut self, row: usize, score: f64) {
        if let (Some(sum), Some(count), true) = (self.sums.get_mut(row), self.counts.get_mut(row), score.is_finite()) {
            *sum += single(score);
            *count += 1.0;
        }
    }

    fn mean(&self, row: usize) -> Option<f32> {
        let count = self.counts.get(row).copied().filter(|count| *count > 0.0)?;
        self.sums.get(row).map(|sum| sum / count)
    }
}

/// A module's part of a vector.
fn part(vector: &Tensor, range: &Range<i64>) -> Tensor {
    vector.narrow(0, range.start, range.end - range.start)
}

impl RowConflicts {
    /// No scores yet, of `rows` rows.
    #[must_use]
    pub fn new(adapter: &Adapter, rows: usize) -> Self {
        // A module's two factors count as two: their gradients have norms of their own.
        let modules = adapter.places().map(|place| place.range).collect();
        Self {
            device: adapter.flat().device(),
            modules,
            mean_align: None,
            norms: Vec::new(),
            by_gradient: Scores::none(rows),
            by_forward: Scores::none(rows),
        }
    }

    /// The direction to score by at `step`, once the warm-up is over.
    pub fn direction(&self, step: u64) -> Option<&Tensor> {
        self.mean_align.as_ref().filter(|_| step >= WARMUP_STEPS && self.norms.iter().any(|norm| *norm > 0.0))
    }

    /// Scores `row` by its gradient against [`Self::direction`].
    pub fn score(&mut self, row: usize, gradient: &Gradient) {
        let Some(mean) = &self.mean_align else { return };
        let (mut sum, mut modules) = (0.0, 0.0);
        for (range, norm_mean) in self.modules.iter().zip(&self.norms) {
            let of_row = part(&gradient.0, range);
            let norms = gradient::norm(&of_row) * norm_mean;
            if norms > 0.0 {
                sum += gradient::dot(&of_row, &part(mean, range)) / norms;
                modules += 1.0;
            }
        }
        if modules > 0.0 {
            self.by_gradient.add(row, sum / modules);
        }
    }

    /// Takes a step's alignment gradient into the mean.
    pub fn learn(&mut self, align: &Gradient) {
        let mean = gradient::mean_with(self.mean_align.take(), align, NEWEST);
        self.go_on_from(Some(mean));
    }

    fn go_on_from(&mut self, mean: Option<Tensor>) {
        let norms = |mean| self.modules.iter().map(move |range| gradient::norm(&part(mean, range)));
        self.norms = mean.iter().flat_map(norms).collect();
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
        let (start, length) = (adapter.flat().copy(), gradient::norm(mean));
        let distance = STEP_LENGTH * gradient::norm(&start);
        let before = losses()?;
        adapter.shift(&(mean * (distance / length)));
        let after = losses();
        adapter.set(&start);
        for (row, (before, after)) in before.iter().zip(&after?).enumerate() {
            self.by_forward.add(row, (after - before) / distance);
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
            ("gradient_sums".to_owned(), Tensor::from_slice(&self.by_gradient.sums)),
            ("gradient_counts".to_owned(), Tensor::from_slice(&self.by_gradient.counts)),
            ("forward_sums".to_owned(), Tensor::from_slice(&self.by_forward.sums)),
            ("forward_counts".to_owned(), Tensor::from_slice(&self.by_forward.counts)),
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
        numbers("gradient_sums", &mut self.by_gradient.sums);
        numbers("gradient_counts", &mut self.by_gradient.counts);
        numbers("forward_sums", &mut self.by_forward.sums);
        numbers("forward_counts", &mut self.by_forward.counts);
    }
}
