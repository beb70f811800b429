//! Gradients over all trainable weights as one long vector.

use tch::{Kind, Tensor};

use crate::adapter::Adapter;

/// A gradient, `[parameters]`, float32, in the order of [`Adapter::flat`].
#[derive(Debug)]
pub struct Gradient(pub Tensor);

impl Gradient {
    /// The zero gradient of an adapter.
    #[must_use]
    pub fn zeros(adapter: &Adapter) -> Self {
        Self(adapter.flat().zeros_like())
    }

    /// Adds the gradient of `Σ hidden · by`, where `by` is a loss's derivative by the hidden states: the backward pass of
    /// that loss without its vocabulary-sized part, which was done when `by` was made.
    pub fn accumulate(&mut self, adapter: &Adapter, hidden: &Tensor, by: &Tensor) {
        let surrogate = (hidden * by).sum(Kind::Float);
        let parts = Tensor::run_backward(&[surrogate], &adapter.leaves(), false, false);
        let parts: Vec<Tensor> = parts.iter().map(|part| part.reshape(-1)).collect();
        self.0 += Tensor::cat(&parts, 0);
    }

    /// ⟨self, other⟩, summed in float64.
    #[must_use]
    pub fn dot(&self, other: &Self) -> f64 {
        dot(&self.0, &other.0)
    }

    /// ‖self‖, summed in float64.
    #[must_use]
    pub fn norm(&self) -> f64 {
        self.dot(self).sqrt()
    }

    /// Scales the gradient so that its norm is at most `max_norm`; returns the norm before. `max_norm` of 0 means no limit.
    pub fn clip(&mut self, max_norm: f64) -> f64 {
        let norm = self.norm();
        if max_norm > 0.0 && norm > max_norm {
            self.0 *= max_norm / norm;
        }
        norm
    }
}

/// The inner product of two vectors, summed in float64.
#[must_use]
pub fn dot(x: &Tensor, y: &Tensor) -> f64 {
    x.to_kind(Kind::Double).dot(&y.to_kind(Kind::Double)).double_value(&[])
}
