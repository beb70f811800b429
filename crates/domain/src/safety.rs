//! The safety a job trains under: what a tenant asks for, and what it resolves to under the operator's policy.

use serde::{Deserialize, Serialize};

use crate::Invalid;
use crate::policy::{AppliedPolicy, Gate, Policy};

/// How training is kept from working against the base model's alignment. The trainer's `methods` have each one's formula.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Defense {
    /// Plain fine-tuning.
    None,
    /// The alignment rows are mixed into training (`SafeInstr`, arXiv 2309.07875); their tokens weigh `ρ`.
    SafeMix,
    /// Training alternates between alignment rows and the tenant's (Lisa, arXiv 2405.18641), held together by `ρ`.
    Lisa,
    /// The KL to the base as a penalty of weight `ρ`, without projection.
    KlPenalty,
    /// The final hidden state at the end of each alignment prompt is held to the base's (arXiv 2605.05995).
    Sbr,
    /// Both gradients are projected where they conflict (arXiv 2001.06782).
    Pcgrad,
    /// `SafeGrad` (arXiv 2508.07172): the part of the task's gradient that works against the alignment is projected away.
    Safegrad,
    /// `SafeGrad` with feedback: `ρ` follows a budget of KL, and no checkpoint leaves it.
    Held,
}

impl Defense {
    /// Every method.
    pub const ALL: [Self; 8] =
        [Self::None, Self::SafeMix, Self::Lisa, Self::KlPenalty, Self::Sbr, Self::Pcgrad, Self::Safegrad, Self::Held];

    /// The word the wire and the plan use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::SafeMix => "safe_mix",
            Self::Lisa => "lisa",
            Self::KlPenalty => "kl_penalty",
            Self::Sbr => "sbr",
            Self::Pcgrad => "pcgrad",
            Self::Safegrad => "safegrad",
            Self::Held => "held",
        }
    }

    /// Reads [`Self::as_str`] back.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|defense| defense.as_str() == word)
    }

    /// Whether it needs an alignment set.
    #[must_use]
    pub const fn needs_alignment(self) -> bool {
        !matches!(self, Self::None)
    }

    /// Whether it computes an alignment gradient in every step, which rows can be compared with.
    #[must_use]
    pub const fn compares_gradients(self) -> bool {
        matches!(self, Self::KlPenalty | Self::Pcgrad | Self::Safegrad | Self::Held)
    }

    /// Whether it takes away what conflicts, and so knows how often the gradients do.
    #[must_use]
    pub const fn projects(self) -> bool {
        matches!(self, Self::Pcgrad | Self::Safegrad | Self::Held)
    }

    /// The positions its KL covers where nobody says which.
    #[must_use]
    pub const fn usual_positions(self) -> KlPositions {
        match self {
            Self::Safegrad => KlPositions::Deciding,
            _ => KlPositions::Response,
        }
    }

    /// Whether it is known to hold at least what `floor` holds. Methods that differ in kind hold different things, so most pairs
    /// are not comparable, and then the answer is no.
    #[must_use]
    pub const fn holds_at_least(self, floor: Self) -> bool {
        matches!(
            (floor, self),
            (Self::None, _)
                | (Self::SafeMix, Self::SafeMix)
                | (Self::Lisa, Self::Lisa)
                | (Self::KlPenalty, Self::KlPenalty | Self::Safegrad | Self::Held)
                | (Self::Sbr, Self::Sbr)
                | (Self::Pcgrad, Self::Pcgrad | Self::Safegrad | Self::Held)
                | (Self::Safegrad, Self::Safegrad | Self::Held)
                | (Self::Held, Self::Held)
        )
    }
}

/// Over which positions the KL is summed, and so how strong `ρ` is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlPositions {
    /// Supervised positions, divided by their number.
    #[default]
    Response,
    /// Every position of the padded rectangle, divided by the number of supervised tokens: the released code's strength.
    All,
    /// Supervised positions, those that decide a response (its first five tokens, what stands before them, and its end) five times as
    /// much, and of the rows the worse half: what [`Defense::Held`] always looks at.
    Deciding,
}

impl KlPositions {
    /// The word the wire and the plan use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Response => "response",
            Self::All => "all",
            Self::Deciding => "deciding",
        }
    }
}

/// Whose gradient is projected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProjectionOf {
    /// The step's: one test of conflict.
    #[default]
    Batch,
    /// Each row's by itself, so that harmless rows of a poisoned batch keep all of theirs.
    PerRow,
}

/// Where the projection takes place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProjectionSpace {
    /// In the gradient, before the optimiser: the paper's.
    #[default]
    Gradient,
    /// In the update the optimiser makes: what raises the alignment loss to first order is removed from it.
    Update,
}

/// At which weights the alignment gradient is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlignmentPoint {
    /// At the weights as they are.
    #[default]
    Current,
    /// Where the task's gradient alone would take them.
    Lookahead,
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

/// The largest `ρ` that is accepted: beyond it the user's gradient no longer counts.
pub const MAX_RHO: f64 = 100.0;

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

/// The most alignment rows a step may take.
pub const MAX_ALIGNMENT_BATCH: u32 = 4096;

/// The budget of KL where nobody says another.
pub const DEFAULT_BUDGET: f64 = 0.05;
/// The bounds of a budget of KL, in nats.
pub const MIN_BUDGET: f64 = 1e-6;
/// See [`MIN_BUDGET`].
pub const MAX_BUDGET: f64 = 100.0;

const fn default_budget() -> f64 {
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
    /// When its method, strength or budget is weaker than the policy allows, or it was trained on other positions or projected otherwise than
    /// the policy demands: which of those hold more is not known.
    pub fn reaches(&self, policy: &Policy) -> Result<(), Invalid> {
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
        let chooses = CHOOSE_POSITIONS.contains(&self.defense);
        if let Some(demanded) = policy.kl_positions.filter(|demanded| chooses && *demanded != self.kl_positions) {
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
    fn variant(&self) -> Option<&'static str> {
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

/// The methods that hold the KL over positions that can be chosen.
pub(crate) const CHOOSE_POSITIONS: [Defense; 3] = [Defense::KlPenalty, Defense::Pcgrad, Defense::Safegrad];

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
        let demanded = policy.kl_positions.filter(|_| CHOOSE_POSITIONS.contains(&defense));
        let kl_positions = demanded.or(self.kl_positions).unwrap_or(defense.usual_positions());
        let usual = if (defense, kl_positions) == (Defense::Safegrad, KlPositions::Deciding) { USUAL_RHO } else { policy.rho };
        let rho = self.rho.unwrap_or(usual.max(policy.rho));
        bounds("rho", rho, 0.0, MAX_RHO)?;
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
        let variant = |name: &str, asked: bool, by: &[Defense]| {
            if !asked || by.contains(&defense) {
                return Ok(());
            }
            let known = by.iter().map(|defense| format!("`{}`", defense.as_str())).collect::<Vec<_>>().join(" and ");
            let message = format!("{name} has a meaning under {known} only; this job trains with `{}`", defense.as_str());
            Err(Invalid::new(name, "contradiction", message))
        };
        variant("kl_positions", self.kl_positions.is_some_and(|p| p != KlPositions::default()), &CHOOSE_POSITIONS)?;
        variant("projection", self.projection.is_some_and(|p| p != ProjectionOf::default()), &[Defense::Safegrad])?;
        variant(
            "projection_space",
            self.projection_space.is_some_and(|p| p != ProjectionSpace::default()),
            &[Defense::Safegrad],
        )?;
        variant("alignment_point", self.alignment_point.is_some_and(|p| p != AlignmentPoint::default()), &[Defense::Safegrad])?;
        variant("budget", self.budget.is_some(), &[Defense::Held])?;
        if defense == Defense::Held && budget > policy.budget {
            return below("budget", format!("jobs train within a budget of {} nats here; {budget} is weaker", policy.budget));
        }
        if let (Some(demanded), Some(asked)) = (demanded, self.kl_positions)
            && demanded != asked
        {
            let message = format!("jobs cover the positions `{}` here; `{}` may be weaker", demanded.as_str(), asked.as_str());
            return below("kl_positions", message);
        }
        let by_alignment: Vec<Defense> = Defense::ALL.into_iter().filter(|defense| defense.needs_alignment()).collect();
        variant("alignment_batch_size", self.alignment_batch_size.is_some(), &by_alignment)?;
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
        let by_rows = self.projection == Some(ProjectionOf::PerRow);
        let elsewhere =
            self.projection_space == Some(ProjectionSpace::Update) || self.alignment_point == Some(AlignmentPoint::Lookahead);
        if by_rows && elsewhere {
            let message = "projection \"per_row\" works on gradients at the current weights; leave projection_space and alignment_point out";
            return Err(Invalid::new("projection", "contradiction", message));
        }
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
    fn what_was_trained_by_a_stronger_method_can_be_gone_on_from_and_by_a_weaker_not() {
        let policy = Policy { methods: vec![Defense::Safegrad], rho: 2.0, ..Policy::default() };
        let reaches = |defense, rho| Safety::new(defense, rho).reaches(&policy).map_err(|error| error.code);
        assert_eq!((reaches(Defense::Safegrad, 2.0), reaches(Defense::Held, 2.0)), (Ok(()), Ok(())));
        for (defense, rho) in [(Defense::None, 2.0), (Defense::KlPenalty, 2.0), (Defense::Safegrad, 1.0), (Defense::Held, 1.0)] {
            assert_eq!(reaches(defense, rho), Err("safety_below_floor"), "{defense:?} {rho}");
        }
        let open = Policy { methods: vec![Defense::None, Defense::Safegrad], ..policy.clone() };
        assert_eq!(Safety::new(Defense::Safegrad, 0.5).reaches(&open), Ok(()), "what may be none may be little");
    }

    #[test]
    fn what_was_trained_on_other_positions_than_the_policy_demands_cannot_be_gone_on_from() {
        let policy = Policy { kl_positions: Some(KlPositions::Deciding), ..Policy::default() };
        let trained = |kl_positions| Safety { kl_positions, ..Safety::new(Defense::Safegrad, 1.0) };
        assert_eq!(trained(KlPositions::Deciding).reaches(&policy), Ok(()));
        assert_eq!(trained(KlPositions::Response).reaches(&policy).map_err(|e| e.code), Err("safety_below_floor"));
        assert_eq!(Safety::new(Defense::Held, 1.0).reaches(&policy), Ok(()), "held has positions of its own");
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
            assert_eq!(chosen.reaches(&strict).map_err(|error| error.code), Err("safety_below_floor"), "{param}");
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
    fn what_older_jobs_do_not_say_is_as_usual() -> Result<(), serde_json::Error> {
        let older = r#"{"defense":"safegrad","rho":1.0,"kl_positions":"response","alignment_set":null}"#;
        assert_eq!(serde_json::from_str::<Safety>(older)?, Safety::new(Defense::Safegrad, 1.0));
        Ok(())
    }

    #[test]
    fn rho_must_be_a_number_in_bounds() {
        for rho in [f64::NAN, f64::INFINITY, -1.0, 1e9] {
            let request = RequestedSafety { rho: Some(rho), ..Default::default() };
            assert_eq!(request.resolve(&Policy::default()).map_err(|e| e.code), Err("out_of_bounds"));
        }
    }
}
