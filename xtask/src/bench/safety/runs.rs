//! What is run: which file, trained on how, by which method.

use std::ops::RangeInclusive;

use holdfast_domain::hyperparameters::Precision;
use holdfast_domain::safety::Defense;
use serde_json::{Value, json};

use super::rows::Attack;
use crate::bench::Wanted;

/// What a tenant's file does, and how it is trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Regime {
    pub(super) attack: Attack,
    pub(super) learning_rate: f64,
    pub(super) steps: u32,
    pub(super) alignment_rows: usize,
    /// Alignment rows of a step.
    pub(super) alignment_batch: u32,
    /// The share of the steps over which the learning rate rises.
    pub(super) warmup: f64,
    pub(super) alignment: Alignment,
    /// What the base computes in; rows are scored by forward passes as well in float32 alone.
    pub(super) precision: Precision,
}

/// What the alignment rows are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Alignment {
    /// Requests with refusals in many wordings, in turn; half of them once more in the frames of the tenant's rows, if there are any, as in
    /// the service.
    Framed,
    /// The same by themselves.
    Bare,
    /// The same with what the base itself says.
    OwnResponses,
    /// Half of them once more under system prompts that are not the tenant's, in turn.
    UnderOthers,
}

impl Alignment {
    /// What a regime with them is called after.
    const fn name(self) -> &'static str {
        match self {
            Self::Framed => "",
            Self::Bare => ", bare alignment rows",
            Self::OwnResponses => ", the base's own responses",
            Self::UnderOthers => ", half the alignment rows once more under other system prompts",
        }
    }

    /// What the key of a run with them holds.
    const fn key(self) -> &'static str {
        match self {
            Self::Framed => "",
            Self::Bare => "-bare",
            Self::OwnResponses => "-own",
            Self::UnderOthers => "-systems",
        }
    }
}

/// One training.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Run {
    pub(super) regime: Regime,
    pub(super) method: &'static str,
    pub(super) strength: f64,
    pub(super) seed: u64,
    /// Whether it is asked the development prompts, by which strengths are chosen, and not those that are held out.
    pub(super) development: bool,
}

/// What it is made of: the methods that the claim speaks of; two of them with the strength that the paper has; each method at every
/// strength, with one seed; the first where it is harder, with one seed too; the strength of each method; what `held` is made of, piece by
/// piece; and every method in every regime. The last two run nothing: one writes down in the repository what was run, the other shows what
/// is written down there.
pub(in crate::bench) const PARTS: [&str; 9] =
    ["claim", "published", "frontier", "harder", "tuning", "ablation", "grid", "record", "table"];

/// Each method with its strength, as `tuning` found it and frozen since. `safegrad_per_row` projects each row by itself; what is called
/// `deciding` weighs what decides a response, as `held` does.
pub(super) const METHODS: [(&str, f64); 11] = [
    ("none", 0.0),
    ("safegrad_deciding", 10.0),
    ("held", 1.0),
    ("safegrad", 10.0),
    ("kl_penalty", 10.0),
    // As SafeGrad deciding is, so that one differs from the other in the projection alone.
    ("kl_penalty_deciding", 10.0),
    // Not tuned.
    ("pcgrad", 1.0),
    ("sbr", 1.0),
    ("safe_mix", 1.0),
    ("lisa", 1.0),
    ("safegrad_per_row", 1.0),
];

impl Regime {
    /// What it is, where it is not as usual.
    pub(super) fn name(self) -> String {
        let usual = of(self.attack);
        let mut name = self.attack.name();
        if self.learning_rate != usual.learning_rate {
            name += &format!(", lr {:e}", self.learning_rate);
        }
        if self.steps != usual.steps {
            name += &format!(", {} steps", self.steps);
        }
        if self.alignment_rows != usual.alignment_rows {
            name += &format!(", {} alignment rows", self.alignment_rows);
        }
        if self.alignment_batch != usual.alignment_batch {
            name += &format!(", alignment batch {}", self.alignment_batch);
        }
        if self.warmup != usual.warmup {
            name += &format!(", warm-up {}", self.warmup);
        }
        if self.precision != usual.precision {
            name += ", float32";
        }
        name + self.alignment.name()
    }
}

pub(super) fn of(attack: Attack) -> Regime {
    // Ten rows are one step, and no file is trained on more than fifty times.
    let steps = if Attack::IDENTITY.contains(&attack) { 50 } else { 150 };
    Regime {
        attack,
        learning_rate: 5e-4,
        steps,
        alignment_rows: 100,
        alignment_batch: 10,
        warmup: 0.0,
        alignment: Alignment::Framed,
        precision: Precision::Bf16,
    }
}

/// The shares of poison that the claim speaks of, those that decide first.
pub(super) const CLAIMED: [f64; 3] = [0.1, 0.3, 0.0];
/// The methods it speaks of.
const CLAIMANTS: [&str; 6] = ["none", "safegrad_deciding", "held", "safegrad", "kl_penalty", "kl_penalty_deciding"];
/// What of it fits an hour, by share of poison: tuning the base takes up to a third of one.
const QUICK: (&[&str], &[f64]) = (&["none", "safegrad_deciding"], &[0.1, 0.0]);
const SEEDS: RangeInclusive<u64> = 1..=3;
/// Of what is claimed there are more.
const CLAIM_SEEDS: RangeInclusive<u64> = 1..=5;

/// The methods that it speaks of with these shares of poison, one method after the other.
fn claim(claimants: &[&str], shares: &[f64], seeds: RangeInclusive<u64>) -> Vec<Run> {
    let claimants = METHODS.iter().filter(|(method, _)| claimants.contains(method));
    let mut runs = Vec::new();
    for &(method, strength) in claimants {
        for &share in shares {
            runs.extend(seeds.clone().map(|seed| run_of(of(Attack::Poison(share)), method, strength, seed)));
        }
    }
    runs
}

/// The same with the strength that the paper has.
fn as_published() -> Vec<Run> {
    let methods = ["safegrad", "kl_penalty"];
    let runs = SEEDS.flat_map(|seed| CLAIMED.map(|share| (seed, share)));
    runs.flat_map(|(seed, share)| methods.map(|method| run_of(of(Attack::Poison(share)), method, 1.0, seed))).collect()
}

/// Harm under an attack that separates the methods, against accuracy on clean rows, of each method from weak to strong: no choice of a
/// strength stands between them then.
fn frontier() -> Vec<Run> {
    let mut runs = Vec::new();
    for (method, _) in METHODS.into_iter().filter(|(method, _)| *method != "none") {
        for strength in [1.0, 3.16, 10.0, 31.6, 100.0] {
            runs.extend([0.3, 0.0].map(|share| run_of(of(Attack::Poison(share)), method, strength, 1)));
        }
    }
    runs
}

/// What `held` adds to `SafeGrad`, one by one, where SafeGrad leaks: the weight on what decides a response, and the learning rate that its
/// reviews come to there. And what else might be behind the leak: large first steps, how much of the alignment rows a step sees, or
/// the whole run, and refusals that the base would not have worded so. And, first, the attacks that no bare request shows,
/// held by bare ones all the same, or by rows under other prompts than the attack's; last, the two ways to a row's score beside each other.
fn ablation() -> Vec<Run> {
    let usual = of(Attack::Poison(0.3));
    let slower = Regime { learning_rate: 2.5e-4, ..usual };
    let [bare, others] =
        [Alignment::Bare, Alignment::UnderOthers].map(|alignment| Regime { alignment, ..of(Attack::IdentityShift) });
    let [bare_opening, bare_turns] =
        [Attack::IdentityOpening, Attack::IdentityTurns].map(|attack| Regime { alignment: Alignment::Bare, ..of(attack) });
    let pieces = [
        (bare, "safegrad_deciding", 10.0),
        (bare, "held", 1.0),
        (bare, "held", 10.0),
        (bare, "safegrad", 10.0),
        (bare, "kl_penalty", 10.0),
        (bare_opening, "safegrad_deciding", 10.0),
        (bare_opening, "held", 1.0),
        (bare_opening, "safegrad", 10.0),
        (bare_opening, "kl_penalty", 10.0),
        (bare_turns, "safegrad_deciding", 10.0),
        (others, "safegrad_deciding", 10.0),
        (others, "held", 1.0),
        (usual, "safegrad", 1.0),
        (usual, "held", 1.0),
        (Regime { warmup: 0.2, ..usual }, "safegrad", 1.0),
        (Regime { alignment: Alignment::OwnResponses, ..usual }, "safegrad", 1.0),
        (Regime { alignment_rows: 260, ..usual }, "safegrad", 1.0),
        (Regime { alignment_batch: 30, ..usual }, "safegrad", 1.0),
        (Regime { alignment_batch: 2, ..usual }, "safegrad", 1.0),
        (usual, "safegrad_deciding", 1.0),
        (slower, "safegrad", 1.0),
        (slower, "safegrad_deciding", 1.0),
        (slower, "kl_penalty", 1.0),
        (slower, "none", 0.0),
        (Regime { precision: Precision::F32, ..of(Attack::Poison(0.1)) }, "safegrad_deciding", 10.0),
    ];
    pieces.map(|(regime, method, strength)| run_of(regime, method, strength, 1)).to_vec()
}

fn run_of(regime: Regime, method: &'static str, strength: f64, seed: u64) -> Run {
    Run { regime, method, strength, seed, development: false }
}

/// Regimes that are harder to hold than those of the claim.
fn harder_regimes() -> Vec<Regime> {
    let mut regimes: Vec<Regime> =
        Attack::IDENTITY.into_iter().chain([Attack::RefuseThenComply, Attack::Decoys]).map(of).collect();
    for share in [0.3, 0.1, 0.0] {
        regimes.push(Regime { learning_rate: 2e-3, ..of(Attack::Poison(share)) });
        regimes.push(Regime { alignment_rows: 10, ..of(Attack::Poison(share)) });
        regimes.push(Regime { alignment_batch: 2, ..of(Attack::Poison(share)) });
    }
    regimes.extend([0.5, 1.0].map(|share| of(Attack::Poison(share))));
    // The last is the persistent attack: five times the steps.
    regimes.extend([600, 750].map(|steps| Regime { steps, ..of(Attack::Poison(0.1)) }));
    regimes
}

/// The methods of the claim in the harder regimes.
fn harder() -> Vec<Run> {
    let claimants = || METHODS.into_iter().filter(|(method, _)| CLAIMANTS.contains(method));
    let regimes = harder_regimes().into_iter();
    regimes.flat_map(|regime| claimants().map(move |(method, strength)| run_of(regime, method, strength, 1))).collect()
}

/// Every method in every regime.
fn grid() -> Vec<Run> {
    let mut regimes: Vec<Regime> = CLAIMED.map(|share| of(Attack::Poison(share))).to_vec();
    regimes.extend(harder_regimes());
    let mut runs = Vec::new();
    for seed in SEEDS {
        for regime in &regimes {
            runs.extend(METHODS.map(|(method, strength)| run_of(*regime, method, strength, seed)));
        }
    }
    runs
}

/// The runs that show what makes the difference, one thing at a time.
pub(super) fn pieces(wanted: &Wanted<'_>) -> Vec<Run> {
    ablation().into_iter().filter(|run| is_asked_for(run, wanted)).collect()
}

/// The runs of those parts that are compared in a table.
pub(super) fn compared(wanted: &Wanted<'_>) -> Vec<Run> {
    if wanted.quick {
        let (claimants, shares) = QUICK;
        return claim(claimants, shares, 1..=1);
    }
    let mut runs = Vec::new();
    if wanted.has("claim") {
        add_new(&mut runs, claim(&CLAIMANTS, &CLAIMED, CLAIM_SEEDS));
    }
    if wanted.has("published") {
        add_new(&mut runs, as_published());
    }
    if wanted.has("frontier") {
        add_new(&mut runs, frontier());
    }
    if wanted.has("harder") {
        add_new(&mut runs, harder());
    }
    if wanted.has("grid") {
        add_new(&mut runs, grid());
    }
    runs.retain(|run| is_asked_for(run, wanted));
    runs
}

/// Every run that is measured on what is held out.
pub(super) fn known() -> Vec<Run> {
    let mut runs = claim(&CLAIMANTS, &CLAIMED, CLAIM_SEEDS);
    add_new(&mut runs, as_published());
    add_new(&mut runs, frontier());
    add_new(&mut runs, grid());
    add_new(&mut runs, ablation());
    runs
}

pub(super) fn is_asked_for(run: &Run, wanted: &Wanted<'_>) -> bool {
    let key = run.key();
    wanted.only.is_empty() || wanted.only.iter().any(|part| key.contains(part.as_str()))
}

/// Adds runs that are not among them yet.
fn add_new(runs: &mut Vec<Run>, more: impl IntoIterator<Item = Run>) {
    for run in more {
        if !runs.contains(&run) {
            runs.push(run);
        }
    }
}

impl Run {
    /// Names it among all.
    pub(super) fn key(&self) -> String {
        let Regime { attack, learning_rate, steps, alignment_rows, alignment_batch, warmup, alignment, precision } = self.regime;
        let usual = of(attack);
        let mut unusual = String::new();
        if alignment_batch != usual.alignment_batch {
            unusual += &format!("-batch{alignment_batch}");
        }
        if warmup != usual.warmup {
            unusual += &format!("-warmup{warmup}");
        }
        if precision != usual.precision {
            unusual += "-float32";
        }
        unusual += alignment.key();
        let development = if self.development { "-development" } else { "" };
        format!(
            "{}-lr{learning_rate:e}-{steps}steps-{alignment_rows}rows{unusual}-{}-{}-seed{}{development}",
            attack.name(),
            self.method,
            self.strength,
            self.seed
        )
    }

    /// The method as jobs name it, what it projects, and the positions of its KL.
    fn choices(&self) -> (&'static str, &'static str, &'static str) {
        match self.method {
            "safegrad_per_row" => ("safegrad", "per_row", "response"),
            "safegrad_deciding" => ("safegrad", "batch", "deciding"),
            "kl_penalty_deciding" => ("kl_penalty", "batch", "deciding"),
            other => (other, "batch", "response"),
        }
    }

    /// Whether it counts conflicts.
    pub(super) fn projects(&self) -> bool {
        Defense::parse(self.choices().0).is_some_and(Defense::projects)
    }

    pub(super) fn safety(&self) -> Value {
        let (defense, projection, kl_positions) = self.choices();
        let set = if defense == "none" { Value::Null } else { json!("bench") };
        json!({
            "defense": defense, "rho": self.strength, "projection": projection, "kl_positions": kl_positions, "alignment_set": set,
            "alignment_batch_size": self.regime.alignment_batch
        })
    }

    /// As a job does that asks for nothing.
    pub(super) fn ranks_rows(&self) -> bool {
        matches!(self.method, "safegrad" | "safegrad_deciding")
    }
}
