//! The safety a job trains under: what a tenant may ask for, the operator's floor, and what the two resolve to.

use serde::{Deserialize, Serialize};

use crate::Invalid;

/// How training is kept from working against the base model's alignment, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Defense {
    /// Plain fine-tuning: `g = u`.
    None,
    /// The KL to the base as a penalty, without projection: `g = u + ρ·a`.
    KlPenalty,
    /// `SafeGrad` (arXiv 2508.07172): the part of `u` that works against `a` is projected away, then `ρ·a` is added.
    Safegrad,
}

impl Defense {
    /// The word the wire and the plan use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::KlPenalty => "kl_penalty",
            Self::Safegrad => "safegrad",
        }
    }

    /// Reads [`Self::as_str`] back.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::None, Self::KlPenalty, Self::Safegrad].into_iter().find(|defense| defense.as_str() == word)
    }

    /// Whether it needs the alignment gradient, and so an alignment set.
    #[must_use]
    pub const fn needs_alignment(self) -> bool {
        !matches!(self, Self::None)
    }
}

/// Over which positions the KL is summed, and so how strong `ρ` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlPositions {
    /// Supervised positions, divided by their number.
    Response,
    /// Every position of the padded rectangle, divided by the number of supervised tokens: the released code's strength.
    All,
}

/// What a tenant asked for; what is `None` is left to the operator.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RequestedSafety {
    /// The method.
    pub defense: Option<Defense>,
    /// The weight of the alignment gradient.
    pub rho: Option<f64>,
    /// The positions the KL covers.
    pub kl_positions: Option<KlPositions>,
    /// The alignment set's name.
    pub alignment_set: Option<String>,
}

/// The least a deployment accepts, and its defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Floor {
    /// The weakest method a tenant may choose.
    pub defense: Defense,
    /// The smallest `ρ` a tenant may choose where the method has one.
    pub rho: f64,
    /// The alignment set used when none is named.
    pub alignment_set: String,
}

impl Default for Floor {
    fn default() -> Self {
        Self { defense: Defense::Safegrad, rho: 1.0, alignment_set: "default".into() }
    }
}

/// The largest `ρ` that is accepted: beyond it the user's gradient no longer counts.
pub const MAX_RHO: f64 = 100.0;

/// What a job trains under. Stands in its plan, and is what the evidence speaks of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Safety {
    /// The method.
    pub defense: Defense,
    /// The weight `ρ` of the alignment gradient; without meaning for [`Defense::None`].
    pub rho: f64,
    /// The positions the KL covers.
    pub kl_positions: KlPositions,
    /// The alignment set's name; `None` when the method needs none.
    pub alignment_set: Option<String>,
}

impl RequestedSafety {
    /// Fills in the operator's defaults and holds the request to the floor.
    ///
    /// # Errors
    /// When `rho` is not a number the method can use, or the request is weaker than the floor: it is refused, never raised.
    pub fn resolve(&self, floor: &Floor) -> Result<Safety, Invalid> {
        let defense = self.defense.unwrap_or(floor.defense);
        if defense < floor.defense {
            return Err(Invalid::new(
                "defense",
                "safety_below_floor",
                format!("this deployment trains with at least `{}`; `{}` is weaker", floor.defense.as_str(), defense.as_str()),
            ));
        }
        let rho = self.rho.unwrap_or(floor.rho);
        if !(0.0..=MAX_RHO).contains(&rho) {
            return Err(Invalid::new("rho", "out_of_bounds", format!("rho must lie between 0 and {MAX_RHO}")));
        }
        if defense.needs_alignment() && rho < floor.rho {
            return Err(Invalid::new(
                "rho",
                "safety_below_floor",
                format!("this deployment trains with rho of at least {}; {rho} is weaker", floor.rho),
            ));
        }
        if let Some(set) = self.alignment_set.as_ref().filter(|set| **set != floor.alignment_set) {
            return Err(Invalid::new(
                "alignment_set",
                "safety_below_floor",
                format!("this deployment trains on the alignment set {:?}; {set:?} may be weaker", floor.alignment_set),
            ));
        }
        let alignment_set =
            defense.needs_alignment().then(|| self.alignment_set.clone().unwrap_or_else(|| floor.alignment_set.clone()));
        Ok(Safety { defense, rho, kl_positions: self.kl_positions.unwrap_or(KlPositions::Response), alignment_set })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_request_gets_the_floor() -> Result<(), Invalid> {
        let safety = RequestedSafety::default().resolve(&Floor::default())?;
        assert_eq!((safety.defense, safety.rho), (Defense::Safegrad, 1.0));
        assert_eq!(safety.alignment_set.as_deref(), Some("default"));
        Ok(())
    }

    #[test]
    fn a_weaker_request_is_refused_not_raised() {
        let weaker = [
            RequestedSafety { defense: Some(Defense::None), ..Default::default() },
            RequestedSafety { defense: Some(Defense::KlPenalty), ..Default::default() },
            RequestedSafety { rho: Some(0.5), ..Default::default() },
            RequestedSafety { alignment_set: Some("small".into()), ..Default::default() },
        ];
        for request in weaker {
            let code = request.resolve(&Floor::default()).map_err(|e| e.code);
            assert_eq!(code, Err("safety_below_floor"), "{request:?}");
        }
    }

    #[test]
    fn rho_must_be_a_number_in_bounds() {
        for rho in [f64::NAN, f64::INFINITY, -1.0, 1e9] {
            let request = RequestedSafety { rho: Some(rho), ..Default::default() };
            assert_eq!(request.resolve(&Floor::default()).map_err(|e| e.code), Err("out_of_bounds"));
        }
    }
}
