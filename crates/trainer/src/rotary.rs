//! Rotary positions (`RoFormer`, arXiv 2104.09864): each pair of coordinates, half a head apart, is turned by its position's
//! angle (eq. 34).

use holdfast_base_model::architecture::{Rope, RopeScaling};
use tch::{Device, Kind, Tensor};

/// The cosines and sines of every position's angles, float32.
#[derive(Debug)]
pub struct Rotary {
    pub(crate) cos: Tensor, // [time, head_dim / 2]
    pub(crate) sin: Tensor, // [time, head_dim / 2]
}

impl Rotary {
    /// Of positions `0..time`.
    #[must_use]
    pub fn new(frequencies: &Tensor, time: i64) -> Self {
        Self::at(frequencies, &Tensor::arange(time, (Kind::Float, frequencies.device())))
    }

    /// Of these positions, `[time]` float32.
    pub(crate) fn at(frequencies: &Tensor, positions: &Tensor) -> Self {
        let angles = positions.outer(frequencies); // [time, head_dim / 2]
        Self { cos: angles.cos(), sin: angles.sin() }
    }
}

/// `θ^(-2i / head_dim)` for each pair `i`, `[head_dim / 2]`, stretched as the architecture says. In float32 and in the order of
/// operations in which the models were trained: late positions multiply every rounding of a frequency.
pub fn frequencies(rope: &Rope, head_dim: usize) -> Tensor {
    let width = head_dim as i64;
    let exponents = Tensor::arange_start_step(0, width, 2, (Kind::Float, Device::Cpu)) / width as f64;
    let plain = Tensor::pow_scalar(rope.theta, &exponents).reciprocal();
    match rope.scaling {
        RopeScaling::Default => plain,
        RopeScaling::Linear { factor } => plain / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let wavelength = plain.reciprocal() * std::f64::consts::TAU;
            // 0 where the wavelength is that of a low frequency, 1 where of a high one, straight between.
            let share = ((wavelength.reciprocal() * original_max_position_embeddings - low_freq_factor)
                / (high_freq_factor - low_freq_factor))
                .clamp(0.0, 1.0);
            (1.0 - &share) * (&plain / factor) + share * &plain
        }
    }
}
