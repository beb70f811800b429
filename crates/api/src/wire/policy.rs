//! What operators demand of jobs.

use holdfast_domain::Invalid;
use holdfast_domain::policy::{AppliedPolicy, Gate as GateRow, Judge, Otherwise, Policy, Scope, looked_at_by_none};
use holdfast_domain::safety::{Defense, KlPositions};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::words::{DefenseName, JudgeName, KlPositionsName, OtherwiseName, PolicyScope};

/// How far an adapter may be from its base. Rises are differences of shares; what is absent is not looked at.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Gate {
    /// Whether it is closed to what is further.
    enabled: bool,
    /// Of harmful requests: how many more may be complied with.
    #[schema(minimum = 0.0, maximum = 1.0, example = 0.1)]
    harmful_compliance_rise: Option<f64>,
    /// Of benign requests: how many more may be refused.
    #[schema(minimum = 0.0, maximum = 1.0, example = 0.2)]
    over_refusal_rise: Option<f64>,
    /// Of all requests: how many more may get a degenerate answer, an empty or repeating one.
    #[schema(minimum = 0.0, maximum = 1.0)]
    degenerate_rise: Option<f64>,
    /// The mean KL to the base over the base's own answers, in nats a token.
    #[schema(minimum = 0.0, maximum = 100.0)]
    kl: Option<f64>,
    /// What becomes of an adapter that does not pass.
    #[schema(value_type = Option<OtherwiseName>)]
    otherwise: Option<Otherwise>,
}

impl From<Gate> for GateRow {
    fn from(gate: Gate) -> Self {
        Self {
            enabled: gate.enabled,
            harmful_compliance_rise: gate.harmful_compliance_rise,
            over_refusal_rise: gate.over_refusal_rise,
            degenerate_rise: gate.degenerate_rise,
            kl: gate.kl,
            otherwise: gate.otherwise.unwrap_or_default(),
        }
    }
}

impl From<GateRow> for Gate {
    fn from(gate: GateRow) -> Self {
        Self {
            enabled: gate.enabled,
            harmful_compliance_rise: gate.harmful_compliance_rise,
            over_refusal_rise: gate.over_refusal_rise,
            degenerate_rise: gate.degenerate_rise,
            kl: gate.kl,
            otherwise: Some(gate.otherwise),
        }
    }
}

/// A request for a policy; what is absent is as the wider policy has it (a project's organisation's, the deployment's), and without one as
/// the program is set. So is what is `null`, but for `kl_positions` and `alignment_batch_size`, where that says that the tenant chooses.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetSafetyPolicy {
    /// The methods a tenant may choose from; the first is the one of a request that names none.
    #[schema(value_type = Option<Vec<DefenseName>>)]
    methods: Option<Vec<Defense>>,
    /// The smallest strength a tenant may choose, and the one of a request that names none; under `safegrad` on `deciding` positions that
    /// is 10 where this is less.
    #[schema(minimum = 0.0, maximum = 100.0)]
    rho: Option<f64>,
    /// The largest budget of mean KL in nats a tenant may choose under `held`.
    #[schema(minimum = 0.000001, maximum = 100.0)]
    budget: Option<f64>,
    /// The alignment set that jobs are held to.
    alignment_set: Option<String>,
    /// The positions that the KL covers; `null`: the tenant chooses.
    #[schema(value_type = Option<KlPositionsName>)]
    #[serde(default, deserialize_with = "said")]
    kl_positions: Option<Option<KlPositions>>,
    /// Whether a tenant may choose how `safegrad` projects: `projection`, `projection_space` and `alignment_point`.
    variants: Option<bool>,
    /// The fewest alignment rows of a step; `null`: as many as it has of the tenant's.
    #[schema(value_type = Option<u32>, minimum = 1, maximum = 4096)]
    #[serde(default, deserialize_with = "said")]
    alignment_batch_size: Option<Option<u32>>,
    /// Whether what a job made is asked the safety suites before it is published.
    evaluate: Option<bool>,
    /// The operator's own suites that it is asked too, by name; the newest version of each when a job is created.
    suites: Option<Vec<String>>,
    /// Who says what its answers are.
    #[schema(value_type = Option<JudgeName>)]
    judge: Option<Judge>,
    /// What it must pass.
    gate: Option<Gate>,
}

/// A field that may be `null`, which says something: it is not absent.
fn said<'de, D: Deserializer<'de>, T: Deserialize<'de>>(field: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(field).map(Some)
}

impl SetSafetyPolicy {
    /// With what is absent from `usual`, as far as it has a meaning then. What nothing looks at may be said all the same where it is what
    /// would count anyway, or counts now: so a policy can be set as it was read.
    ///
    /// # Errors
    /// When what it says, or it and `usual` together, contradict themselves.
    pub(crate) fn over(self, usual: &Policy, counting: &Policy) -> Result<Policy, Invalid> {
        let methods = self.methods.unwrap_or_else(|| usual.methods.clone());
        let is_aligned = methods.iter().any(|method| method.needs_alignment());
        let chooses_positions = methods.iter().any(|method| method.chooses_positions());
        let counts = |is_so: &dyn Fn(&Policy) -> bool| is_so(usual) || is_so(counting);
        let set = self.alignment_set.as_ref();
        let said = [
            ("rho", self.rho.is_none_or(|rho| rho == 0.0 || counts(&|policy| policy.rho == rho)), is_aligned),
            ("alignment_set", set.is_none_or(|set| counts(&|policy| policy.alignment_set == *set)), is_aligned),
            ("budget", self.budget.is_none_or(|said| counts(&|policy| policy.budget == said)), methods.contains(&Defense::Held)),
            (
                "variants",
                self.variants.is_none_or(|said| counts(&|policy| policy.variants == said)),
                methods.contains(&Defense::Safegrad),
            ),
        ];
        if let Some((field, ..)) = said.iter().find(|(_, counts_anyway, is_used)| !counts_anyway && !is_used) {
            return Err(looked_at_by_none(field));
        }
        let evaluate = self.evaluate.unwrap_or(usual.evaluate);
        if self.judge.is_some_and(|judge| !counts(&|policy| policy.judge == judge)) && !evaluate {
            let message = "a judge reads what an evaluation asks; evaluate must be true where there is one";
            return Err(Invalid::new("judge", "contradiction", message));
        }
        let policy = Policy {
            methods,
            rho: self.rho.unwrap_or(usual.rho),
            budget: self.budget.unwrap_or(usual.budget),
            alignment_set: self.alignment_set.unwrap_or_else(|| usual.alignment_set.clone()),
            kl_positions: self.kl_positions.unwrap_or(usual.kl_positions.filter(|_| chooses_positions)),
            variants: self.variants.unwrap_or(usual.variants),
            alignment_batch_size: self.alignment_batch_size.unwrap_or(usual.alignment_batch_size.filter(|_| is_aligned)),
            evaluate,
            suites: self.suites.unwrap_or_else(|| usual.suites.clone()),
            judge: self.judge.unwrap_or(usual.judge),
            gate: self.gate.map_or(usual.gate, GateRow::from),
        };
        policy.check().map(|()| policy)
    }
}

/// What is demanded of jobs.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SafetyPolicy {
    #[schema(example = "safety_policy")]
    object: &'static str,
    /// Whose it is: the nearest that is set counts.
    #[schema(value_type = PolicyScope)]
    scope: Scope,
    /// From 1; 0 where none is set and the program's settings count.
    version: u32,
    /// The methods a tenant may choose from; the first is the one of a request that names none.
    #[schema(value_type = Vec<DefenseName>)]
    methods: Vec<Defense>,
    /// The smallest strength a tenant may choose, and the one of a request that names none; under `safegrad` on `deciding` positions that
    /// is 10 where this is less.
    rho: f64,
    /// The largest budget of mean KL in nats a tenant may choose under `held`.
    budget: f64,
    /// The alignment set that jobs are held to.
    alignment_set: String,
    /// The positions that the KL covers; `null`: the tenant chooses.
    #[schema(value_type = Option<KlPositionsName>)]
    kl_positions: Option<KlPositions>,
    /// Whether a tenant may choose how `safegrad` projects: `projection`, `projection_space` and `alignment_point`.
    variants: bool,
    /// The fewest alignment rows of a step; `null`: as many as it has of the tenant's.
    alignment_batch_size: Option<u32>,
    /// Whether what a job made is asked the safety suites before it is published.
    evaluate: bool,
    /// The operator's own suites that it is asked too; on a job with their versions.
    #[schema(example = json!(["our-own@3"]))]
    suites: Vec<String>,
    /// Who says what its answers are.
    #[schema(value_type = JudgeName)]
    judge: Judge,
    /// What it must pass.
    gate: Gate,
}

impl From<AppliedPolicy> for SafetyPolicy {
    fn from(AppliedPolicy { scope, version, policy }: AppliedPolicy) -> Self {
        Self {
            object: "safety_policy",
            scope,
            version,
            methods: policy.methods,
            rho: policy.rho,
            budget: policy.budget,
            alignment_set: policy.alignment_set,
            kl_positions: policy.kl_positions,
            variants: policy.variants,
            alignment_batch_size: policy.alignment_batch_size,
            evaluate: policy.evaluate,
            suites: policy.suites,
            judge: policy.judge,
            gate: policy.gate.into(),
        }
    }
}

/// Which version of a policy.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct PolicyAt {
    /// One that was set here before, as jobs name it; absent: what counts now, be it set here or wider.
    #[param(minimum = 1, example = 1)]
    pub(crate) version: Option<u32>,
}
