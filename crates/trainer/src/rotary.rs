//! Rotary positions (`RoFormer`, arXiv 2104.09864).

use holdfast_base_model::architecture::{Rope, RopeScaling};
use tch::{Device, Kind, Tensor};

/// The cosines and sines of every position's angles.
#[derive(Debug)]
pub struct Rotary {
    cos: Tensor, // [time, head_dim]
    sin: Tensor, // [time, head_dim]
}

impl Rotary {
    /// Of positions `0..time`, in `kind`.
    #[must_use]
    pub fn new(frequencies: &Tensor, time: i64, kind: Kind) -> Self {
        let positions = Tensor::arange(time, (Kind::Float, frequencies.device()));
        let angles = positions.outer(frequencies); // [time, head_dim / 2]
        let angles = Tensor::cat(&[&angles, &angles], 1);
        Self { cos: angles.cos().to_kind(kind), sin: angles.sin().to_kind(kind) }
    }

    /// Turns each pair of coordinates, half a head apart, by its position's angle (eq. 34). `x: [.., time, head_dim]`.
    pub fn turn(&self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let turned = Tensor::cat(&[&-&halves[1], &halves[0]], -1);
        x * &self.cos + turned * &self.sin
    }
}

/// `θ^(-2i / head_dim)` for each pair `i`, `[head_dim / 2]`, stretched as the architecture says. In float32 throughout, as
/// the models were trained.
pub fn frequencies(rope: &Rope, head_dim: usize) -> Tensor {
    let width = head_dim as i64;
    let exponents = Tensor::arange_start_step(0, width, 2, (Kind::Float, Device::Cpu)) / width as f64;
    let plain = (exponents * -rope.theta.ln()).exp();
    match rope.scaling {
        RopeScaling::Default => plain,
        RopeScaling::Linear { factor } => plain / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let wavelength = plain.reciprocal() * std::f64::consts::TAU;
            // 0 where the wavelength is that of a low frequency, 1 where of a high one, straight between.
            let share = ((wavelength.reciprocal() * original_max_position_embeddings - low_freq_factor)
                / (high_freq_factor - low_freq_factor))
                .clamp(0.0, 1.0);
            &plain * &share + (1.0 - share) * &plain / factor
        }
    }
}
