//! Plain fine-tuning.

use super::{Asks, Method, Sides};
use crate::surgery::{Merged, taken_alone};

/// `g = u`.
#[derive(Debug)]
pub struct Plain;

impl Method for Plain {
    fn asks(&self, step: u64) -> Asks {
        Asks::both(step, None)
    }

    fn merge(&mut self, sides: Sides<'_>) -> Merged {
        taken_alone(sides)
    }
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::super::by_hand::{numbers, side, sides};
    use super::*;

    #[test]
    fn the_user_gradient_is_applied_as_it_is() {
        let (align, weights) = (side(0.0, 1.0, &[-1.0, 0.0]), Tensor::from_slice(&[0.0_f32; 2]));
        let merged = Plain.merge(sides(&[2.0, 1.0], &align, &weights));
        assert_eq!((numbers(&merged), merged.facts), (vec![2.0, 1.0], None));
        assert_eq!(Plain.asks(3).alignment, None);
    }
}
