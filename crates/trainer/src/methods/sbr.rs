//! Holding the representation at the end of a prompt (arXiv 2605.05995).

use super::{Asks, Method, Objective, Sides};
use crate::surgery::{self, Merged};

/// `L = L_user + 50 ρ · mean (h − h₀)²`, over alignment rows and the coordinates of the final hidden state at the last prompt
/// position, `h₀` the base's; so `g = u + 50 ρ a`. `ρ = 1` is the published strength.
#[derive(Debug)]
pub struct Sbr {
    /// The strength, as a multiple of the published one.
    pub rho: f64,
}

/// The published weight of the squared error.
const WEIGHT: f64 = 50.0;

impl Method for Sbr {
    fn asks(&self, step: u64) -> Asks {
        Asks::both(step, Some(Objective::Hidden))
    }

    fn merge(&mut self, sides: Sides<'_>) -> Merged {
        surgery::add(sides, WEIGHT * self.rho)
    }
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::super::by_hand::{numbers, side, sides};
    use super::*;

    #[test]
    fn the_squared_error_s_gradient_is_added_fifty_times() {
        let (align, weights) = (side(0.1, 4.0, &[0.01, -0.02]), Tensor::from_slice(&[0.0_f32; 2]));
        let merged = Sbr { rho: 2.0 }.merge(sides(&[3.0, 1.0], &align, &weights));
        assert_eq!(numbers(&merged), [4.0, -1.0]);
    }
}
