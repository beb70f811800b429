//! Alignment rows mixed into training (`SafeInstr`, arXiv 2309.07875).

use super::{Asks, Method, Objective, Sides};
use crate::surgery::{self, Merged};

/// Every step learns the alignment rows' responses beside the user's, as one mean over tokens in which theirs weigh `ρ`:
///
/// ```text
/// L = (Σ_user ℓ + ρ Σ_align ℓ) / (N_user + ρ N_align)
/// g = (N_user u + ρ N_align a) / (N_user + ρ N_align)
/// ```
#[derive(Debug)]
pub struct SafeMix {
    /// The weight `ρ` of an alignment token against one of the user's.
    pub rho: f64,
}

impl Method for SafeMix {
    fn asks(&self, step: u64) -> Asks {
        Asks::both(step, Some(Objective::Task))
    }

    fn merge(&mut self, sides: Sides<'_>) -> Merged {
        let user = sides.user.as_ref().map_or(0.0, |side| side.tokens);
        let align = self.rho * sides.align.map_or(0.0, |side| side.tokens);
        surgery::weigh(sides, [user / (user + align), align / (user + align)])
    }
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::super::by_hand::{numbers, side, sides};
    use super::*;

    #[test]
    fn tokens_share_one_mean() {
        let (align, weights) = (side(2.0, 6.0, &[0.0, 4.0]), Tensor::from_slice(&[0.0_f32; 2]));
        let mut both = sides(&[4.0, 0.0], &align, &weights);
        both.user = Some(side(1.0, 9.0, &[4.0, 0.0]));
        // 9 tokens of the user, 6 of the alignment at half weight: g = (9 u + 3 a) / 12.
        assert_eq!(numbers(&SafeMix { rho: 0.5 }.merge(both)), [3.0, 1.0]);
    }
}
