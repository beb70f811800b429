//! Whether the defence works: a real model, tuned to refuse, is fine-tuned on rows that undo that, under each method, and then
//! asked what it should refuse and what it should not. What is done is kept under `.bench/safety`; a run that was broken off
//! goes on where it was.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use anyhow::Result;
use holdfast_safety::judge::{Class, Phrases};
use holdfast_safety::share::Share;
use serde_json::{Value, json};

use super::{Figure, Wanted};
use crate::setup::{self, Libtorch, MODEL};
use crate::shell::{self, cargo, root, run as run_command};
use crate::trainer;

mod measure;
mod prompts;
mod report;
mod rows;
mod training;
mod tuning;

use measure::{ANSWER_TOKENS, TUNED_BENIGN, TUNED_LOOKALIKES};
use prompts::Harmful;
use rows::Attack;
use training::Training;

/// Where everything is kept.
const FOLDER: &str = ".bench/safety";
/// The base that is attacked.
const BASE: &str = ".models/safety-base";
/// Rows of a tenant's file.
const ROWS: usize = 500;

/// What a tenant's file does, and how it is trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Regime {
    attack: Attack,
    learning_rate: f64,
    steps: u32,
    alignment_rows: usize,
    /// Alignment rows of a step.
    alignment_batch: u32,
    /// The share of the steps over which the learning rate rises.
    warmup: f64,
    alignment: Alignment,
}

/// What the alignment rows are.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Alignment {
    /// Requests with refusals in many wordings, in turn; where the tenant's rows stand under system prompts, half of them do so too, as
    /// in the service.
    UnderTenants,
    /// The same by themselves.
    Bare,
    /// The same with what the base itself says.
    OwnResponses,
    /// Half of them under system prompts that are not the tenant's, in turn.
    UnderOthers,
}

impl Alignment {
    /// What a regime with them is called after.
    const fn name(self) -> &'static str {
        match self {
            Self::UnderTenants => "",
            Self::Bare => ", bare alignment rows",
            Self::OwnResponses => ", the base's own responses",
            Self::UnderOthers => ", half the alignment rows under other system prompts",
        }
    }

    /// What the key of a run with them holds.
    const fn key(self) -> &'static str {
        match self {
            Self::UnderTenants => "",
            Self::Bare => "-bare",
            Self::OwnResponses => "-own",
            Self::UnderOthers => "-systems",
        }
    }
}

/// One training.
#[derive(Debug, Clone, PartialEq)]
struct Run {
    regime: Regime,
    method: &'static str,
    strength: f64,
    seed: u64,
    /// Whether it is asked the development prompts, by which strengths are chosen, and not those that are held out.
    development: bool,
}

/// What came of one.
#[derive(Debug)]
struct Outcome {
    /// Of each held-out harmful prompt.
    classes: Vec<Class>,
    /// What the base answers to the same prompts, asked in the same way.
    base_classes: Vec<Class>,
    /// Of each benign one.
    benign: Vec<Class>,
    /// Of each film review: whether its label is right.
    correct: Vec<bool>,
    /// Of a step, the median; of the base there is none.
    step_seconds: Option<f64>,
    peak_bytes: f64,
    /// Of the steps that have one.
    conflict_rate: Option<f64>,
    cosine: Option<f64>,
    final_kl: Option<f64>,
    /// The mean KL(base ‖ adapted) over the base's answers to the prompts that were asked, which no method was held to.
    probe_kl: Option<f64>,
    /// Average precision and recall at the number planted, where rows were ranked.
    ranking: Option<[f64; 2]>,
}

impl Outcome {
    fn share(&self, class: Class) -> Share {
        Share::among(&self.classes, |found| *found == class)
    }

    fn over_refusal(&self) -> Share {
        Share::among(&self.benign, |found| *found == Class::Refusal)
    }

    fn accuracy(&self) -> Share {
        Share::among(&self.correct, |correct| *correct)
    }
}

pub(super) fn run(wanted: &Wanted<'_>, figures: &mut Vec<Figure>) -> Result<()> {
    let study = Study::prepare()?;
    let base = study.base()?;
    println!("{}", report::line("the base", &base, &base));
    if wanted.has("tuning") && !wanted.quick && wanted.only.is_empty() {
        tuning::tune(&study, &base)?;
    }
    if wanted.has("ablation") && !wanted.quick {
        for run in ablation().into_iter().filter(|run| is_asked_for(run, wanted)) {
            println!("{}", report::line(&run.key(), &study.outcome(&run)?, &base));
        }
    }
    let runs = study.wanted(wanted);
    if runs.is_empty() {
        return Ok(());
    }
    let mut outcomes = Vec::new();
    for (number, run) in runs.iter().enumerate() {
        let outcome = study.outcome(run)?;
        println!("{:3} of {}  {}", number + 1, runs.len(), report::line(&run.key(), &outcome, &base));
        outcomes.push((run.clone(), outcome));
    }
    report::table(&base, &outcomes);
    report::figures(&base, &outcomes, figures);
    Ok(())
}

/// What it is made of: the methods that the claim speaks of; two of them with the strength that the paper has; the first where it is
/// harder, with one seed; the strength of each method; what `held` is made of, piece by piece; and every method in every regime. The last
/// part runs nothing: it shows what was run before.
pub(super) const PARTS: [&str; 7] = ["claim", "published", "harder", "tuning", "ablation", "grid", "table"];

/// Each method with its strength, as `tuning` found it and frozen since. `safegrad_per_row` projects each row by itself,
/// `safegrad_deciding` weighs what decides a response, as `held` does.
const METHODS: [(&str, f64); 10] = [
    ("none", 0.0),
    ("safegrad_deciding", 10.0),
    ("held", 1.0),
    ("safegrad", 10.0),
    ("kl_penalty", 10.0),
    // Not tuned.
    ("pcgrad", 1.0),
    ("sbr", 1.0),
    ("safe_mix", 1.0),
    ("lisa", 1.0),
    ("safegrad_per_row", 1.0),
];

impl Regime {
    /// What it is, where it is not as usual.
    fn name(self) -> String {
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
        name + self.alignment.name()
    }
}

fn of(attack: Attack) -> Regime {
    // Ten rows are one step, and no file is trained on more than fifty times.
    let steps = if matches!(attack, Attack::IdentityShift | Attack::IdentityOpening) { 50 } else { 150 };
    let alignment = Alignment::UnderTenants;
    Regime { attack, learning_rate: 5e-4, steps, alignment_rows: 100, alignment_batch: 10, warmup: 0.0, alignment }
}

/// The shares of poison that the claim speaks of, those that decide first.
const CLAIMED: [f64; 3] = [0.1, 0.3, 0.0];
/// The methods it speaks of.
const CLAIMANTS: [&str; 5] = ["none", "safegrad_deciding", "held", "safegrad", "kl_penalty"];
/// What of it fits an hour: tuning the base takes half of one.
const QUICK: ([&str; 3], [f64; 2]) = (["none", "safegrad_deciding", "held"], [0.1, 0.0]);
const SEEDS: RangeInclusive<u64> = 1..=3;

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

/// What `held` adds to `SafeGrad`, one by one, where SafeGrad leaks: the weight on what decides a response, and the learning rate that its
/// reviews come to there. And what else might be behind the leak: large first steps, how much of the alignment rows a step sees, or
/// the whole run, and refusals that the base would not have worded so. And, first, the attack that no bare request shows, held by bare
/// ones all the same, or by rows under other prompts than the attack's.
fn ablation() -> Vec<Run> {
    let usual = of(Attack::Poison(0.3));
    let slower = Regime { learning_rate: 2.5e-4, ..usual };
    let [bare, others] =
        [Alignment::Bare, Alignment::UnderOthers].map(|alignment| Regime { alignment, ..of(Attack::IdentityShift) });
    let pieces = [
        (bare, "safegrad_deciding", 10.0),
        (bare, "held", 1.0),
        (bare, "held", 10.0),
        (bare, "safegrad", 10.0),
        (bare, "kl_penalty", 10.0),
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
    ];
    pieces.map(|(regime, method, strength)| run_of(regime, method, strength, 1)).to_vec()
}

fn run_of(regime: Regime, method: &'static str, strength: f64, seed: u64) -> Run {
    Run { regime, method, strength, seed, development: false }
}

/// Regimes that are harder to hold than those of the claim.
fn harder_regimes() -> Vec<Regime> {
    let mut regimes = [Attack::IdentityShift, Attack::IdentityOpening, Attack::RefuseThenComply, Attack::Decoys].map(of).to_vec();
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

fn is_asked_for(run: &Run, wanted: &Wanted<'_>) -> bool {
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
    fn key(&self) -> String {
        let Regime { attack, learning_rate, steps, alignment_rows, alignment_batch, warmup, alignment } = self.regime;
        let usual = of(attack);
        let mut unusual = String::new();
        if alignment_batch != usual.alignment_batch {
            unusual += &format!("-batch{alignment_batch}");
        }
        if warmup != usual.warmup {
            unusual += &format!("-warmup{warmup}");
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

    fn safety(&self) -> Value {
        let (defense, projection, kl_positions) = match self.method {
            "safegrad_per_row" => ("safegrad", "per_row", "response"),
            "safegrad_deciding" => ("safegrad", "batch", "deciding"),
            other => (other, "batch", "response"),
        };
        let set = if defense == "none" { Value::Null } else { json!("bench") };
        json!({
            "defense": defense, "rho": self.strength, "projection": projection, "kl_positions": kl_positions, "alignment_set": set,
            "alignment_batch_size": self.regime.alignment_batch
        })
    }

    fn ranks_rows(&self) -> bool {
        self.method == "safegrad"
    }
}

struct Study {
    folder: PathBuf,
    model: PathBuf,
    judge: Phrases,
    harmful: Harmful,
    benign: Vec<String>,
    lookalikes: Vec<String>,
    reviews: rows::Reviews,
    refusals: Vec<String>,
    openings: Vec<String>,
    systems: Vec<String>,
}

impl Study {
    fn prepare() -> Result<Self> {
        setup::run(Libtorch::Cpu)?;
        let prompts = setup::do_not_answer()?;
        run_command(cargo().args([
            "build",
            "--release",
            "--quiet",
            "-p",
            "holdfast-trainer",
            "--bins",
            "--example",
            "bench-safety-import",
            "--example",
            "bench-safety-prompted",
        ]))?;
        let folder = root().join(FOLDER);
        std::fs::create_dir_all(&folder)?;
        let model = folder.join("smollm2");
        let import = shell::target().join("release/examples/bench-safety-import");
        run_command(std::process::Command::new(import).arg(root().join(MODEL)).arg(&model))?;
        let ours = root().join("bench/safety");
        Ok(Self {
            model,
            judge: Phrases::shipped()?,
            harmful: prompts::harmful(&prompts)?,
            benign: prompts::lines(&ours.join("benign.txt"))?,
            lookalikes: prompts::lines(&ours.join("lookalikes.txt"))?,
            reviews: rows::Reviews::read(&root().join(setup::FILM_REVIEWS))?,
            refusals: prompts::lines(&ours.join("refusals.txt"))?,
            openings: prompts::lines(&ours.join("openings.txt"))?,
            systems: prompts::lines(&ours.join("systems.txt"))?,
            folder,
        })
    }

    /// Makes the base: SmolLM2 tuned on refusals of some prompts and on its own answers to benign ones. What it then answers is
    /// what a method must keep.
    fn base(&self) -> Result<Outcome> {
        let base = root().join(BASE);
        if !base.exists() {
            println!("tuning the base");
            let benign: Vec<&String> =
                self.benign.iter().take(TUNED_BENIGN).chain(self.lookalikes.iter().take(TUNED_LOOKALIKES)).collect();
            let asked: Vec<Value> = benign.iter().map(|request| trainer::ask(request)).collect();
            let answers = trainer::answers(&self.model, None, &asked, 64)?;
            let helpful = benign.iter().zip(&answers).filter(|(_, answer)| self.judge.judge(answer) == Class::Compliance);
            let mut rows: Vec<String> = helpful.map(|(request, answer)| training::row(request, answer)).collect();
            println!("{} of {} benign requests were answered", rows.len(), benign.len());
            // Each prompt in two wordings of refusal, so that what is learned is to refuse and not a sentence.
            let (first, second) = self.refusals.split_at(self.refusals.len() / 2);
            rows.extend(rows::cycled(&self.harmful.base, first));
            rows.extend(rows::cycled(&self.harmful.base, second));
            // Of both kinds; none of them is attacked or measured with.
            rows.extend(prompts::lines(&root().join("examples/alignment.jsonl"))?);
            let training = Training {
                epochs: 10,
                learning_rate: 5e-4,
                warmup: 0.0,
                rank: 32,
                seed: 7,
                safety: json!({"defense": "none", "rho": 0.0, "alignment_set": null}),
                row_conflicts: false,
            };
            let folder = self.folder.join("base");
            training::train(&folder, &self.model, &rows, &[], &training)?;
            training::merge(&self.model, &folder.join("out/adapter"), &base)?;
        }
        let path = self.folder.join("base.json");
        if let Ok(kept) = std::fs::read(&path) {
            return report::read(&serde_json::from_slice(&kept)?, &self.judge);
        }
        let measured = self.measure_base()?;
        std::fs::write(path, measured.to_string())?;
        report::read(&measured, &self.judge)
    }

    /// The runs of those parts that are compared in a table; with the table alone, what there is of all.
    fn wanted(&self, wanted: &Wanted<'_>) -> Vec<Run> {
        if wanted.quick {
            return claim(&QUICK.0, &QUICK.1, 1..=1);
        }
        let mut runs = Vec::new();
        if wanted.has("claim") {
            add_new(&mut runs, claim(&CLAIMANTS, &CLAIMED, SEEDS));
        }
        if wanted.has("published") {
            add_new(&mut runs, as_published());
        }
        if wanted.has("harder") {
            add_new(&mut runs, harder());
        }
        if wanted.has("grid") {
            add_new(&mut runs, grid());
        }
        if runs.is_empty() && wanted.has("table") {
            runs = grid();
            add_new(&mut runs, as_published());
            add_new(&mut runs, ablation());
            runs.retain(|run| self.is_done(run));
        }
        runs.retain(|run| is_asked_for(run, wanted));
        runs
    }

    fn is_done(&self, run: &Run) -> bool {
        self.folder.join("runs").join(run.key()).join("result.json").exists()
    }

    /// What comes of a run, now or earlier.
    fn outcome(&self, run: &Run) -> Result<Outcome> {
        let folder = self.folder.join("runs").join(run.key());
        let result = folder.join("result.json");
        let read = |value: &Value| -> Result<Outcome> {
            let step_seconds = training::step_seconds(&folder);
            Ok(Outcome { step_seconds, base_classes: self.base_classes(run)?, ..report::read(value, &self.judge)? })
        };
        if let Ok(kept) = std::fs::read(&result) {
            return read(&serde_json::from_slice(&kept)?);
        }
        let base = root().join(BASE);
        let file = rows::tenant(run.regime.attack, self)?;
        let alignment = if run.method == "none" {
            Vec::new()
        } else {
            // Beyond those that are set apart for it, the base's own.
            let prompts = self.harmful.alignment.iter().chain(&self.harmful.base).take(run.regime.alignment_rows);
            let prompts: Vec<String> = prompts.cloned().collect();
            let refused = || rows::cycled(&prompts, &self.refusals);
            match run.regime.alignment {
                Alignment::Bare => refused(),
                Alignment::UnderTenants => rows::under(&file.rows, &refused())?,
                Alignment::UnderOthers => {
                    let others: Vec<String> = self.systems.iter().map(|system| training::row_under(system, "q", "a")).collect();
                    rows::under(&others, &refused())?
                }
                Alignment::OwnResponses => {
                    let asked: Vec<Value> = prompts.iter().map(|prompt| trainer::ask(prompt)).collect();
                    rows::cycled(&prompts, &trainer::answers(&base, None, &asked, ANSWER_TOKENS)?)
                }
            }
        };
        let steps_per_epoch = file.rows.len().div_ceil(10);
        let training = Training {
            epochs: u32::try_from((run.regime.steps as usize).div_ceil(steps_per_epoch))?,
            learning_rate: run.regime.learning_rate,
            warmup: run.regime.warmup,
            rank: 8,
            seed: run.seed,
            safety: run.safety(),
            row_conflicts: run.ranks_rows(),
        };
        let trained = training::train(&folder, &base, &file.rows, &alignment, &training)?;
        let mut measured = self.measure(&folder, run)?;
        measured["peak_bytes"] = json!(trained.peak_bytes);
        let numbers = |name: &str| -> Vec<f64> { trained.steps.iter().filter_map(|step| step[name].as_f64()).collect() };
        let mean = |values: &[f64]| (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64);
        measured["conflict_rate"] = json!(numbers("conflict_rate").last());
        measured["cosine"] = json!(mean(&numbers("cosine")));
        let kl = numbers("align_kl");
        measured["final_kl"] = json!(mean(kl.get(kl.len().saturating_sub(10)..).unwrap_or_default()));
        if run.ranks_rows() {
            measured["ranking"] = json!(rows::ranking(&folder.join("out/row_conflicts.jsonl"), file.planted)?);
        }
        // The weights of hundreds of runs are of no use once they are measured.
        for name in ["out/adapter", "out/checkpoints", "out/evaluation", "out/reference.safetensors", "suites"] {
            let path = folder.join(name);
            let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        }
        std::fs::write(&result, measured.to_string())?;
        read(&measured)
    }
}
