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

    /// Takes `gradient` into the moments and returns the update it makes, `[parameters]`, which [`Adapter::shift`] applies:
    ///
    /// ```text
    /// m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
    /// Δ = −η λ θ − η m̂ / (√v̂ + ε)      with m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ)
    /// ```
    pub fn update(&mut self, adapter: &Adapter, gradient: &Gradient, learning_rate: f64) -> Tensor {
        let (next, change) = self.next(adapter, gradient, learning_rate);
        *self = next;
        change
    }

    /// The update that `gradient` would make, without remembering it.
    pub fn preview(&self, adapter: &Adapter, gradient: &Gradient, learning_rate: f64) -> Tensor {
        self.next(adapter, gradient, learning_rate).1
    }

    fn next(&self, adapter: &Adapter, gradient: &Gradient, learning_rate: f64) -> (Self, Tensor) {
        let g = &gradient.0;
        let steps = self.steps + 1;
        let first = &self.first * BETA_1 + g * (1.0 - BETA_1);
        let second = &self.second * BETA_2 + g * g * (1.0 - BETA_2);
        let first_scale = learning_rate / (1.0 - BETA_1.powi(steps));
        let second_scale = (1.0 - BETA_2.powi(steps)).sqrt();
        let mut change = &first / (second.sqrt() / second_scale + EPSILON) * -first_scale;
        if self.weight_decay > 0.0 {
            change -= adapter.flat() * (learning_rate * self.weight_decay);
        }
        (Self { first, second, steps, weight_decay: self.weight_decay }, change)
    }

    /// The first and the second moment, each `[parameters]`.
    pub fn moments(&self) -> [&Tensor; 2] {
        [&self.first, &self.second]
    }

    /// Gradients it has taken.
    #[must_use]
    pub fn steps(&self) -> i32 {
        self.steps
    }

    /// The same settings after `steps` gradients that left these moments.
    #[must_use]
    pub fn resumed(&self, first: Tensor, second: Tensor, steps: i32) -> Self {
        Self { first, second, steps, weight_decay: self.weight_decay }
    }
}

impl Clone for AdamW {
    fn clone(&self) -> Self {
        Self { first: self.first.copy(), second: self.second.copy(), steps: self.steps, weight_decay: self.weight_decay }
    }
}
