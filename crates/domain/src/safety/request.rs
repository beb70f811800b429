//! What a tenant asks for, and what that comes to under a policy.

use super::{
    AlignmentPoint, Defense, KlPositions, MAX_BUDGET, MAX_RHO, MIN_BUDGET, ProjectionOf, ProjectionSpace, Safety, bounds,
    check_alignment_batch,
};
use crate::Invalid;
use crate::policy::{AppliedPolicy, Gate, Policy};

/// What a tenant asked for; what is `None` is left to the operator.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RequestedSafety {
    /// The method.
    pub defense: Option<Defense>,
    /// The weight of the alignment gradient.
    pub rho: Option<f64>,
    /// The positions the KL covers.
    pub kl_positions: Option<KlPositions>,
    /// Whose gradient is projected.
    pub projection: Option<ProjectionOf>,
    /// Where the projection takes place.
    pub projection_space: Option<ProjectionSpace>,
    /// At which weights the alignment gradient is taken.
    pub alignment_point: Option<AlignmentPoint>,
    /// The budget of KL of [`Defense::Held`].
    pub budget: Option<f64>,
    /// The alignment set's name.
    pub alignment_set: Option<String>,
    /// Alignment rows of a step.
    pub alignment_batch_size: Option<u32>,
    /// Whether the adapter must pass the gate.
    pub gate: Option<bool>,
}

/// The `ρ` of [`Defense::Safegrad`] on [`KlPositions::Deciding`] where nobody says another. The paper's is 1, on whole responses: with a third of
/// the rows harmful, models then complied with half of what they should refuse, and with this as good as never, at one to two points of
/// accuracy on clean rows (`bench/SAFETY.md`).
pub const USUAL_RHO: f64 = 10.0;

impl RequestedSafety {
    /// Fills in the policy's defaults and holds the request to it.
    ///
    /// # Errors
    /// When `rho` is not a number the method can use, or the request is weaker than the policy: it is refused, never raised.
    pub fn resolve(&self, policy: &Policy) -> Result<Safety, Invalid> {
        let below = |param: &str, message: String| Err(Invalid::new(param, "safety_below_floor", message));
        let defense = self.defense.unwrap_or_else(|| policy.default_method());
        if !policy.methods.contains(&defense) {
            let allowed = policy.methods.iter().map(|method| format!("`{}`", method.as_str())).collect::<Vec<_>>().join(" or ");
            return below("defense", format!("jobs train with {allowed} here; `{}` is not allowed", defense.as_str()));
        }
        let demanded = policy.kl_positions.filter(|_| defense.chooses_positions());
        let kl_positions = demanded.or(self.kl_positions).unwrap_or(defense.usual_positions());
        let usual = match (defense, kl_positions) {
            (Defense::Safegrad, KlPositions::Deciding) => USUAL_RHO,
            // It goes up from there, by factors.
            (Defense::Held, _) if policy.rho == 0.0 => 1.0,
            _ => policy.rho,
        };
        let rho = self.rho.unwrap_or(usual.max(policy.rho));
        bounds("rho", rho, 0.0, MAX_RHO)?;
        if defense == Defense::Held && rho == 0.0 {
            let message = "`held` raises rho by factors, and 0 stays 0; give one above 0, as 1";
            return Err(Invalid::new("rho", "contradiction", message));
        }
        if defense.needs_alignment() && rho < policy.rho {
            return below("rho", format!("jobs train with a rho of at least {} here; {rho} is weaker", policy.rho));
        }
        if let Some(set) = self.alignment_set.as_ref().filter(|set| **set != policy.alignment_set) {
            let message = format!("jobs are held to the alignment set {:?} here; {set:?} may be weaker", policy.alignment_set);
            return below("alignment_set", message);
        }
        if policy.gate.enabled && self.gate == Some(false) {
            return below("gate", "adapters must pass the safety gate here; leave gate out, or say true".into());
        }
        let budget = self.budget.unwrap_or(policy.budget);
        bounds("budget", budget, MIN_BUDGET, MAX_BUDGET)?;
        check_alignment_batch(self.alignment_batch_size)?;
        self.check_meanings(defense)?;
        if defense == Defense::Held && budget > policy.budget {
            return below("budget", format!("jobs train within a budget of {} nats here; {budget} is weaker", policy.budget));
        }
        if let (Some(demanded), Some(asked)) = (demanded, self.kl_positions)
            && demanded != asked
        {
            let message = format!("jobs cover the positions `{}` here; `{}` may be weaker", demanded.as_str(), asked.as_str());
            return below("kl_positions", message);
        }
        match (policy.alignment_batch_size, self.alignment_batch_size) {
            (Some(least), Some(asked)) if asked < least => {
                let message = format!("a step takes at least {least} alignment rows here; {asked} are weaker");
                return below("alignment_batch_size", message);
            }
            (None, Some(_)) => {
                let message = "a step takes as many alignment rows as rows of the job's here; leave alignment_batch_size out";
                return below("alignment_batch_size", message.into());
            }
            _ => {}
        }
        let alignment_batch_size = self.alignment_batch_size.or(policy.alignment_batch_size);
        let alignment_set =
            defense.needs_alignment().then(|| self.alignment_set.clone().unwrap_or_else(|| policy.alignment_set.clone()));
        let safety = Safety {
            defense,
            rho,
            kl_positions,
            projection: self.projection.unwrap_or_default(),
            projection_space: self.projection_space.unwrap_or_default(),
            alignment_point: self.alignment_point.unwrap_or_default(),
            budget,
            alignment_set,
            alignment_batch_size: alignment_batch_size.filter(|_| defense.needs_alignment()),
        };
        match safety.variant().filter(|_| !policy.variants) {
            Some(name) => below(name, format!("jobs project as usual here; leave {name} out")),
            None => Ok(safety),
        }
    }

    /// Refuses what has no meaning under the method, and choices that exclude each other.
    fn check_meanings(&self, defense: Defense) -> Result<(), Invalid> {
        let that = |uses: fn(&Defense) -> bool| Defense::ALL.into_iter().filter(uses).collect::<Vec<_>>();
        let (choosing, by_alignment) = (that(|defense| defense.chooses_positions()), that(|defense| defense.needs_alignment()));
        let projection_space = self.projection_space.is_some_and(|space| space != ProjectionSpace::default());
        let alignment_point = self.alignment_point.is_some_and(|point| point != AlignmentPoint::default());
        let choices: [(&str, bool, &[Defense]); 6] = [
            ("kl_positions", self.kl_positions.is_some_and(|p| p != KlPositions::default()), &choosing),
            ("projection", self.projection.is_some_and(|p| p != ProjectionOf::default()), &[Defense::Safegrad]),
            ("projection_space", projection_space, &[Defense::Safegrad]),
            ("alignment_point", alignment_point, &[Defense::Safegrad]),
            ("budget", self.budget.is_some(), &[Defense::Held]),
            ("alignment_batch_size", self.alignment_batch_size.is_some(), &by_alignment),
        ];
        if let Some((name, _, by)) = choices.iter().find(|(_, asked, by)| *asked && !by.contains(&defense)) {
            let known = by.iter().map(|defense| format!("`{}`", defense.as_str())).collect::<Vec<_>>().join(" and ");
            let message = format!("{name} has a meaning under {known} only; this job trains with `{}`", defense.as_str());
            return Err(Invalid::new(*name, "contradiction", message));
        }
        if self.projection == Some(ProjectionOf::PerRow) && (projection_space || alignment_point) {
            let message = "projection \"per_row\" works on gradients at the current weights; leave projection_space and alignment_point out";
            return Err(Invalid::new("projection", "contradiction", message));
        }
        Ok(())
    }

    /// `resolved` for steps of so many of the tenant's rows: where the request names no number, a step takes as many alignment rows as
    /// rows, and the policy's least where that is more.
    #[must_use]
    pub fn for_steps_of(&self, rows: u64, resolved: Safety) -> Safety {
        let least = resolved.alignment_batch_size.filter(|least| u64::from(*least) > rows);
        Safety { alignment_batch_size: self.alignment_batch_size.or(least), ..resolved }
    }

    /// The policy as it counts for this request: a tenant may ask for the gate where the operator does not demand it.
    #[must_use]
    pub fn apply(&self, mut applied: AppliedPolicy) -> AppliedPolicy {
        if self.gate == Some(true) {
            applied.policy.evaluate = true;
            applied.policy.gate = Gate { enabled: true, ..applied.policy.gate.or_usual() };
        }
        applied
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Scope;

    #[test]
    fn a_silent_request_gets_what_was_measured_to_hold_and_never_less_than_the_policy_says() -> Result<(), Invalid> {
        let resolved = |request: &RequestedSafety, policy: &Policy| -> Result<_, Invalid> {
            let Safety { defense, rho, kl_positions, .. } = request.resolve(policy)?;
            Ok((defense, rho, kl_positions))
        };
        let (silent, usual) = (RequestedSafety::default(), Policy::default());
        assert_eq!(silent.resolve(&usual)?.alignment_set.as_deref(), Some("default"));
        assert_eq!(resolved(&silent, &usual)?, (Defense::Safegrad, USUAL_RHO, KlPositions::Deciding));
        let strict = Policy { rho: 20.0, ..Policy::default() };
        assert_eq!(resolved(&silent, &strict)?, (Defense::Safegrad, 20.0, KlPositions::Deciding));
        let whole = Policy { kl_positions: Some(KlPositions::Response), ..Policy::default() };
        assert_eq!(resolved(&silent, &whole)?, (Defense::Safegrad, 1.0, KlPositions::Response));
        let held = RequestedSafety { defense: Some(Defense::Held), ..Default::default() };
        assert_eq!(resolved(&held, &usual)?, (Defense::Held, 1.0, KlPositions::Response));
        Ok(())
    }

    #[test]
    fn the_papers_setting_can_be_asked_for() -> Result<(), Invalid> {
        let paper = RequestedSafety { rho: Some(1.0), kl_positions: Some(KlPositions::Response), ..Default::default() };
        let safety = paper.resolve(&Policy::default())?;
        assert_eq!((safety.rho, safety.kl_positions), (1.0, KlPositions::Response));
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
            let code = request.resolve(&Policy::default()).map_err(|e| e.code);
            assert_eq!(code, Err("safety_below_floor"), "{request:?}");
        }
    }

    #[test]
    fn how_it_is_projected_is_the_tenants_choice_unless_the_policy_says_otherwise() {
        let (open, strict) = (Policy::default(), Policy { variants: false, ..Policy::default() });
        let (per_row, ahead) = (Some(ProjectionOf::PerRow), Some(AlignmentPoint::Lookahead));
        let requests = [
            (RequestedSafety { projection: per_row, ..Default::default() }, "projection"),
            (RequestedSafety { projection_space: Some(ProjectionSpace::Update), ..Default::default() }, "projection_space"),
            (RequestedSafety { alignment_point: ahead, ..Default::default() }, "alignment_point"),
        ];
        for (request, param) in requests {
            let chosen = request.resolve(&open).expect("the tenant may choose");
            let refused = request.resolve(&strict).map_err(|error| (error.code, error.param));
            assert_eq!(refused, Err(("safety_below_floor", param.into())));
            assert_eq!(chosen.reaches(8, &strict).map_err(|error| error.code), Err("safety_below_floor"), "{param}");
        }
        assert!(RequestedSafety::default().resolve(&strict).is_ok());
    }

    #[test]
    fn a_stronger_method_is_accepted_and_one_that_differs_in_kind_is_not() {
        let under = |defense| RequestedSafety { defense: Some(defense), ..Default::default() }.resolve(&Policy::default());
        assert_eq!(under(Defense::Held).map(|s| s.defense), Ok(Defense::Held));
        for defense in [Defense::Sbr, Defense::Pcgrad, Defense::Lisa, Defense::SafeMix] {
            assert_eq!(under(defense).map_err(|e| e.code), Err("safety_below_floor"));
        }
    }

    #[test]
    fn the_gate_can_be_asked_for_and_not_declined() {
        let open = AppliedPolicy { scope: Scope::Deployment, version: 0, policy: Policy::default() };
        let asked = RequestedSafety { gate: Some(true), ..Default::default() };
        assert!(asked.apply(open.clone()).policy.gate.enabled && asked.apply(open.clone()).policy.check().is_ok());
        let mut blind = open;
        blind.policy.gate =
            Gate { harmful_compliance_rise: None, over_refusal_rise: None, degenerate_rise: None, ..blind.policy.gate };
        assert_eq!(asked.apply(blind).policy.check(), Ok(()), "a gate that is asked for looks at something");
        let mut closed = Policy { evaluate: true, ..Policy::default() };
        closed.gate.enabled = true;
        let declined = RequestedSafety { gate: Some(false), ..Default::default() };
        assert_eq!(declined.resolve(&closed).map_err(|e| e.param), Err("gate".into()));
        assert!(declined.resolve(&Policy::default()).is_ok());
    }

    #[test]
    fn what_the_policy_says_of_alignment_rows_and_positions_is_the_default_and_the_least() {
        let strict = Policy { kl_positions: Some(KlPositions::Deciding), alignment_batch_size: Some(16), ..Policy::default() };
        let rows = |request: &RequestedSafety, rows: u64| {
            let safety = request.resolve(&strict).map(|safety| request.for_steps_of(rows, safety));
            safety.map(|safety| (safety.kl_positions, safety.alignment_rows_per_step(rows)))
        };
        let (silent, more) =
            (RequestedSafety::default(), RequestedSafety { alignment_batch_size: Some(32), ..Default::default() });
        assert_eq!(rows(&silent, 4), Ok((KlPositions::Deciding, 16)));
        assert_eq!(rows(&silent, 64), Ok((KlPositions::Deciding, 64)), "never fewer than the step's own");
        assert_eq!(rows(&more, 4), Ok((KlPositions::Deciding, 32)));
        let weaker = [
            (RequestedSafety { alignment_batch_size: Some(15), ..Default::default() }, &strict),
            (RequestedSafety { kl_positions: Some(KlPositions::Response), ..Default::default() }, &strict),
            // It might be fewer than the job's own rows, which are what counts where nothing is said.
            (RequestedSafety { alignment_batch_size: Some(16), ..Default::default() }, &Policy::default()),
        ];
        for (request, policy) in weaker {
            assert_eq!(request.resolve(policy).map_err(|e| e.code), Err("safety_below_floor"), "{request:?}");
        }
        let held = RequestedSafety { defense: Some(Defense::Held), ..Default::default() };
        assert!(held.resolve(&strict).is_ok(), "held looks at what decides a response anyway");
    }

    #[test]
    fn a_variant_that_the_method_does_not_have_is_refused_by_name() {
        let request =
            RequestedSafety { defense: Some(Defense::Held), projection: Some(ProjectionOf::PerRow), ..Default::default() };
        assert_eq!(request.resolve(&Policy::default()).map_err(|e| e.param), Err("projection".into()));
    }

    #[test]
    fn rho_must_be_a_number_in_bounds() {
        for rho in [f64::NAN, f64::INFINITY, -1.0, 1e9] {
            let request = RequestedSafety { rho: Some(rho), ..Default::default() };
            assert_eq!(request.resolve(&Policy::default()).map_err(|e| e.code), Err("out_of_bounds"));
        }
        let open = Policy::at_least(Defense::None, 0.0, "default");
        let held = |rho| RequestedSafety { defense: Some(Defense::Held), rho, ..Default::default() }.resolve(&open);
        assert_eq!(held(Some(0.0)).map_err(|e| e.param), Err("rho".into()), "what it raises must be something");
        assert_eq!(held(None).map(|safety| safety.rho), Ok(1.0));
    }
}
