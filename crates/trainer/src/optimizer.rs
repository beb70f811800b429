//! `AdamW` (Loshchilov and Hutter, arXiv 1711.05101), as torch computes it, over the one long vector of weights.

use tch::Tensor;

use crate::adapter::Adapter;
use crate::gradient::Gradient;

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// The optimiser's state: what a checkpoint must hold besides the weights.
#[derive(Debug)]
pub struct AdamW {
    first: Tensor,  // m: [parameters]
    second: Tensor, // v: [parameters]
    steps: i32,
    weight_decay: f64,
}

impl AdamW {
    /// A fresh state for `adapter`.
    #[must_use]
    pub fn new(adapter: &Adapter, weight_decay: f64) -> Self {
        Self { first: adapter.flat().zeros_like(), second: adapter.flat().zeros_like(), steps: 0, weight_decay }
    }

    /// Takes one step and returns how the weights changed, `[parameters]`:
    ///
    /// ```text
    /// m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
    /// θ ← (1 − η λ) θ − η m̂ / (√v̂ + ε)      with m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ)
    /// ```
    pub fn step(&mut self, adapter: &Adapter, gradient: &Gradient, learning_rate: f64) -> Tensor {
        tch::no_grad(|| {
            let g = &gradient.0;
            self.steps += 1;
            self.first = &self.first * BETA_1 + g * (1.0 - BETA_1);
            self.second = &self.second * BETA_2 + g * g * (1.0 - BETA_2);
            let first_scale = learning_rate / (1.0 - BETA_1.powi(self.steps));
            let second_scale = (1.0 - BETA_2.powi(self.steps)).sqrt();
            let denominator = self.second.sqrt() / second_scale + EPSILON;
            let decay = adapter.flat() * (-learning_rate * self.weight_decay);
            let change = decay - (&self.first / denominator) * first_scale;
            let mut weights = adapter.flat().shallow_clone();
            weights += &change;
            change
        })
    }

    /// The first and the second moment, each `[parameters]`.
    pub fn moments(&self) -> [&Tensor; 2] {
        [&self.first, &self.second]
    }

    /// Goes on after `steps` steps that left these moments.
    #[must_use]
    pub fn resume(first: Tensor, second: Tensor, steps: i32, weight_decay: f64) -> Self {
        Self { first, second, steps, weight_decay }
    }
}
