//! The safety a job trains under: what a tenant asks for, and what it resolves to under the operator's policy.

use serde::{Deserialize, Serialize};

use crate::Invalid;
use crate::policy::Policy;

mod method;
mod request;

pub use method::{AlignmentPoint, Defense, KlPositions, ProjectionOf, ProjectionSpace};
pub use request::{RequestedSafety, USUAL_RHO};

/// The largest `ρ` that is accepted: beyond it the user's gradient no longer counts.
pub const MAX_RHO: f64 = 100.0;

/// The most alignment rows a step may take.
pub const MAX_ALIGNMENT_BATCH: u32 = 4096;

/// The budget of KL where nobody says another.
pub const DEFAULT_BUDGET: f64 = 0.05;

/// The bounds of a budget of KL, in nats.
pub const MIN_BUDGET: f64 = 1e-6;
/// See [`MIN_BUDGET`].
pub const MAX_BUDGET: f64 = 100.0;

/// What a job trains under. Stands in its plan, and is what the evidence speaks of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Safety {
    /// The method.
    pub defense: Defense,
    /// The method's strength `ρ`; without meaning for [`Defense::None`].
    pub rho: f64,
    /// The positions the KL covers.
    #[serde(default)]
    pub kl_positions: KlPositions,
    /// Whose gradient is projected, under [`Defense::Safegrad`].
    #[serde(default)]
    pub projection: ProjectionOf,
    /// Where the projection takes place, under [`Defense::Safegrad`].
    #[serde(default)]
    pub projection_space: ProjectionSpace,
    /// At which weights the alignment gradient is taken, under [`Defense::Safegrad`].
    #[serde(default)]
    pub alignment_point: AlignmentPoint,
    /// The budget ε of mean KL on alignment rows, in nats, under [`Defense::Held`].
    #[serde(default = "default_budget")]
    pub budget: f64,
    /// The alignment set's name; `None` when the method needs none.
    pub alignment_set: Option<String>,
    /// Alignment rows of a step; `None`: as many as of the tenant's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment_batch_size: Option<u32>,
}

/// The budget of what was written down before there was one.
pub(crate) const fn default_budget() -> f64 {
    DEFAULT_BUDGET
}

impl Safety {
    /// A method of strength `ρ` with everything else as usual, on no named set.
    #[must_use]
    pub fn new(defense: Defense, rho: f64) -> Self {
        Self {
            defense,
            rho,
            kl_positions: KlPositions::default(),
            projection: ProjectionOf::default(),
            projection_space: ProjectionSpace::default(),
            alignment_point: AlignmentPoint::default(),
            budget: DEFAULT_BUDGET,
            alignment_set: None,
            alignment_batch_size: None,
        }
    }

    /// Alignment rows of a step that takes `rows_per_step` of the tenant's.
    #[must_use]
    pub fn alignment_rows_per_step(&self, rows_per_step: u64) -> u64 {
        self.alignment_batch_size.map_or(rows_per_step, u64::from)
    }

    /// Makes sure that a plan that was not made by [`RequestedSafety::resolve`] is one that could have been.
    ///
    /// # Errors
    /// When a number is out of its bounds.
    pub fn check(&self) -> Result<(), Invalid> {
        bounds("rho", self.rho, 0.0, MAX_RHO)?;
        bounds("budget", self.budget, MIN_BUDGET, MAX_BUDGET)?;
        check_alignment_batch(self.alignment_batch_size)
    }

    /// Holds what was trained so, and is to be gone on from, to a policy's floor: what it undid then is not made good by less than that
    /// now.
    ///
    /// # Errors
    /// When its method, strength or budget is weaker than the policy allows, it took fewer alignment rows beside its `rows_per_step`, or it
    /// was held to another alignment set, trained on other positions or projected otherwise than the policy demands: which of those hold
    /// more is not known.
    pub fn reaches(&self, rows_per_step: u64, policy: &Policy) -> Result<(), Invalid> {
        let below = |what: String| {
            let message = format!("the model was trained {what}; begin with its base model, or ask the operator");
            Err(Invalid::new("model", "safety_below_floor", message))
        };
        let method = self.defense.as_str();
        if policy.methods.contains(&Defense::None) {
            return Ok(());
        }
        if !policy.methods.iter().any(|floor| self.defense.holds_at_least(*floor)) {
            return below(format!("with `{method}`, or goes on from one that was, which is not allowed here"));
        }
        if self.defense.needs_alignment() && self.rho < policy.rho {
            return below(format!(
                "with a rho of {}, or goes on from one that was, and it must be at least {} here",
                self.rho, policy.rho
            ));
        }
        if let Some(set) = self.alignment_set.as_ref().filter(|set| **set != policy.alignment_set) {
            let demanded = &policy.alignment_set;
            return below(format!(
                "on the alignment set {set:?}, or goes on from one that was, and jobs are held to {demanded:?} here"
            ));
        }
        let (rows, least) = (self.alignment_rows_per_step(rows_per_step), policy.alignment_batch_size.unwrap_or_default());
        if self.defense.needs_alignment() && rows < u64::from(least) {
            return below(format!(
                "on {rows} alignment rows a step, or goes on from one that was, and it must be {least} at least here"
            ));
        }
        let demanded = policy.kl_positions.filter(|_| self.defense.chooses_positions());
        if let Some(demanded) = demanded.filter(|demanded| *demanded != self.kl_positions) {
            let (own, demanded) = (self.kl_positions.as_str(), demanded.as_str());
            return below(format!(
                "with a KL over the positions `{own}`, or goes on from one that was, and it covers `{demanded}` here"
            ));
        }
        if let Some(name) = self.variant().filter(|_| !policy.variants) {
            return below(format!("with a {name} of its own, or goes on from one that was, which is not allowed here"));
        }
        if self.defense == Defense::Held && self.budget > policy.budget {
            let (budget, most) = (self.budget, policy.budget);
            return below(format!(
                "within a budget of {budget} nats, or goes on from one that was, and it may be {most} at most here"
            ));
        }
        Ok(())
    }

    /// What of how it projects is not as usual, if anything is.
    #[must_use]
    pub fn variant(&self) -> Option<&'static str> {
        let choices = [
            ("projection", self.projection == ProjectionOf::default()),
            ("projection_space", self.projection_space == ProjectionSpace::default()),
            ("alignment_point", self.alignment_point == AlignmentPoint::default()),
        ];
        choices.into_iter().find(|(_, is_usual)| !is_usual).map(|(name, _)| name)
    }

    /// Whether rows can be scored by how hard they push against the alignment: their gradients must be compared with an alignment
    /// gradient at the same weights.
    #[must_use]
    pub fn can_score_rows(&self) -> bool {
        self.defense.compares_gradients() && self.alignment_point == AlignmentPoint::Current
    }
}

/// Holds a number to its bounds.
pub(crate) fn bounds(param: &str, value: f64, least: f64, most: f64) -> Result<(), Invalid> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(Invalid::new(param, "out_of_bounds", format!("{param} must lie between {least} and {most}")))
}

pub(crate) fn check_alignment_batch(rows: Option<u32>) -> Result<(), Invalid> {
    rows.map_or(Ok(()), |rows| bounds("alignment_batch_size", f64::from(rows), 1.0, f64::from(MAX_ALIGNMENT_BATCH)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_trained_by_a_stronger_method_can_be_gone_on_from_and_by_a_weaker_not() {
        let policy = Policy { methods: vec![Defense::Safegrad], rho: 2.0, ..Policy::default() };
        let reaches = |defense, rho| Safety::new(defense, rho).reaches(8, &policy).map_err(|error| error.code);
        assert_eq!((reaches(Defense::Safegrad, 2.0), reaches(Defense::Held, 2.0)), (Ok(()), Ok(())));
        for (defense, rho) in [(Defense::None, 2.0), (Defense::KlPenalty, 2.0), (Defense::Safegrad, 1.0), (Defense::Held, 1.0)] {
            assert_eq!(reaches(defense, rho), Err("safety_below_floor"), "{defense:?} {rho}");
        }
        let open = Policy { methods: vec![Defense::None, Defense::Safegrad], ..policy.clone() };
        assert_eq!(Safety::new(Defense::Safegrad, 0.5).reaches(8, &open), Ok(()), "what may be none may be little");
    }

    #[test]
    fn what_was_trained_on_other_positions_than_the_policy_demands_cannot_be_gone_on_from() {
        let policy = Policy { kl_positions: Some(KlPositions::Deciding), ..Policy::default() };
        let trained = |kl_positions| Safety { kl_positions, ..Safety::new(Defense::Safegrad, 1.0) };
        assert_eq!(trained(KlPositions::Deciding).reaches(8, &policy), Ok(()));
        assert_eq!(trained(KlPositions::Response).reaches(8, &policy).map_err(|e| e.code), Err("safety_below_floor"));
        assert_eq!(Safety::new(Defense::Held, 1.0).reaches(8, &policy), Ok(()), "held has positions of its own");
    }

    #[test]
    fn what_was_held_to_another_alignment_set_cannot_be_gone_on_from() {
        let policy = Policy { alignment_set: "strict".into(), ..Policy::default() };
        let on = |set: &str| Safety { alignment_set: Some(set.into()), ..Safety::new(Defense::Safegrad, 1.0) };
        assert_eq!(on("strict").reaches(8, &policy), Ok(()));
        assert_eq!(on("default").reaches(8, &policy).map_err(|e| e.code), Err("safety_below_floor"));
    }

    #[test]
    fn what_older_jobs_do_not_say_is_as_usual() -> Result<(), serde_json::Error> {
        let older = r#"{"defense":"safegrad","rho":1.0,"kl_positions":"response","alignment_set":null}"#;
        assert_eq!(serde_json::from_str::<Safety>(older)?, Safety::new(Defense::Safegrad, 1.0));
        Ok(())
    }
}
