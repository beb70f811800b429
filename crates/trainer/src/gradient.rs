//! Gradients over all trainable weights as one long vector.

use std::ops::Range;

use tch::kind::Element;
use tch::{TchError, Tensor};

use crate::adapter::Adapter;
use crate::kernels;

/// A gradient, `[parameters]`, float32, in the order of [`Adapter::flat`].
#[derive(Debug)]
pub struct Gradient(pub Tensor);

impl Gradient {
    /// The zero gradient of an adapter.
    #[must_use]
    pub fn zeros(adapter: &Adapter) -> Self {
        Self(adapter.flat().zeros_like())
    }

    /// Adds `by`, the derivative by the factor that lies at `range`.
    pub(crate) fn add(&mut self, range: Range<i64>, by: &Tensor) {
        let mut part = self.0.narrow(0, range.start, range.end - range.start).view(by.size().as_slice());
        part += by;
    }

    /// ⟨self, other⟩, summed in float64.
    #[must_use]
    pub fn dot(&self, other: &Self) -> f64 {
        dot(&self.0, &other.0)
    }

    /// ‖self‖, summed in float64.
    #[must_use]
    pub fn norm(&self) -> f64 {
        norm(&self.0)
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

/// The inner product of two float32 vectors, summed in float64.
#[must_use]
pub fn dot(x: &Tensor, y: &Tensor) -> f64 {
    kernels::inner_product(x, y)
}

/// The norm of a float32 vector, summed in float64.
#[must_use]
pub fn norm(x: &Tensor) -> f64 {
    dot(x, x).sqrt()
}

/// The numbers of a vector. Like every operation on tensors here it panics where the kind is another.
#[expect(
    clippy::expect_used,
    reason = "numbers that are missing must not pass for none; it is caught where all of libtorch's are"
)]
pub(crate) fn numbers<T: Element>(vector: &Tensor) -> Vec<T>
where
    for<'a> Vec<T>: TryFrom<&'a Tensor, Error = TchError>,
{
    Vec::try_from(vector).expect("a vector of this kind")
}

/// An exponential mean with `newest` taken in at `weight`; the first one is the mean.
pub(crate) fn mean_with(mean: Option<Tensor>, newest: &Gradient, weight: f64) -> Tensor {
    mean.map_or_else(|| newest.0.copy(), |mean| mean * (1.0 - weight) + &newest.0 * weight)
}
