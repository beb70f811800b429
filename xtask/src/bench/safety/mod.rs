//! Whether the defence works: a real model, tuned to refuse, is fine-tuned on rows that undo that, under each method, and then
//! asked what it should refuse and what it should not. What is done is kept under `.bench/safety`; a run that was broken off
//! goes on where it was.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use holdfast_domain::hyperparameters::Precision;
use holdfast_safety::judge::{Class, Phrases};
use holdfast_safety::share::Share;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Figure, Wanted};
use crate::setup::{self, Libtorch, MODEL};
use crate::shell::{self, cargo, root, run as run_command};
use crate::trainer;

mod measure;
mod prompts;
mod report;
mod results;
mod rows;
mod runs;
mod training;
mod tuning;

use measure::{ANSWER_TOKENS, TUNED_BENIGN, TUNED_LOOKALIKES};
use prompts::Harmful;
use runs::{Alignment, Run};
use training::Training;

pub(super) use runs::PARTS;

/// Where everything is kept.
const FOLDER: &str = ".bench/safety";
/// The base of everything that is recorded.
const BASE: Base = Base { model: ".models/safety-base", folder: FOLDER, epochs: 10 };
/// The base of `--quick`: half as long tuned, so that it and what is run on it take less than an hour.
const QUICK_BASE: Base = Base { model: ".models/safety-base-quick", folder: ".bench/safety/quick", epochs: 5 };
/// Rows of a tenant's file.
const ROWS: usize = 500;

/// A base that is attacked.
struct Base {
    /// Where it is once it is tuned.
    model: &'static str,
    /// Where it is tuned, and what is run on it is kept.
    folder: &'static str,
    /// How long it is tuned.
    epochs: u32,
}

/// What came of a run.
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    /// The revision that made it.
    program: Option<String>,
    /// Of each held-out harmful prompt.
    #[serde(with = "results::letters")]
    classes: Vec<Class>,
    /// What the base answers to the same prompts, asked in the same way.
    #[serde(with = "results::letters")]
    base_classes: Vec<Class>,
    /// Of each benign one.
    #[serde(with = "results::letters")]
    benign: Vec<Class>,
    /// Of each film review: whether its label is right.
    #[serde(with = "results::bits")]
    correct: Vec<bool>,
    /// Of a step, the median; of the base there is none.
    step_seconds: Option<f64>,
    /// How many threads that took, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    threads: Option<u64>,
    peak_bytes: f64,
    /// Of the steps that have one.
    conflict_rate: Option<f64>,
    cosine: Option<f64>,
    final_kl: Option<f64>,
    /// The mean KL(base ‖ adapted) over the base's answers to the prompts that were asked, which no method was held to.
    probe_kl: Option<f64>,
    /// Average precision and recall at the number planted, where rows were ranked: by their gradients,
    ranking: Option<[f64; 2]>,
    /// by forward passes, where they were scored so, and by the better of their two places.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ranking_by_forward: Option<[f64; 2]>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ranking_by_either: Option<[f64; 2]>,
    /// Under a method with a budget, the largest KL that a review kept, as a share of what it may keep.
    kept_of_budget: Option<f64>,
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
    for alone in ["record", "table"] {
        let asked = wanted.parts.iter().any(|part| part == alone);
        ensure!(
            !asked || wanted.parts.len() == 1,
            "the part {alone:?} is run by itself: it shows or keeps what the others have made"
        );
        ensure!(!asked || !wanted.quick, "the part {alone:?} knows nothing of --quick, whose base is another: leave that out");
    }
    if wanted.parts == ["table"] {
        return results::table(wanted, figures);
    }
    let study = Study::prepare(if wanted.quick { &QUICK_BASE } else { &BASE })?;
    let base = study.base()?;
    if wanted.parts == ["record"] {
        return results::record(&study, base, wanted);
    }
    println!("{}", report::line("the base", &base, &base));
    if wanted.has("tuning") && !wanted.quick {
        tuning::tune(&study, &base, wanted)?;
    }
    if wanted.has("ablation") && !wanted.quick {
        for run in runs::pieces(wanted) {
            println!("{}", report::line(&run.key(), &study.outcome(&run)?, &base));
        }
    }
    let runs = runs::compared(wanted);
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
    // Of some runs not everything that is claimed can be told.
    let is_whole = wanted.has("claim") && wanted.only.is_empty() && !wanted.quick;
    figures.retain(|figure| is_whole || figure.is_measured());
    Ok(())
}

struct Study {
    /// What is tuned into the base.
    model: PathBuf,
    base: PathBuf,
    base_epochs: u32,
    folder: PathBuf,
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
    fn prepare(base: &Base) -> Result<Self> {
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
            "bench-safety-framed",
        ]))?;
        let folder = root().join(base.folder);
        std::fs::create_dir_all(&folder)?;
        let model = root().join(FOLDER).join("smollm2");
        let import = shell::target().join("release/examples/bench-safety-import");
        run_command(std::process::Command::new(import).arg(root().join(MODEL)).arg(&model))?;
        let ours = root().join("bench/safety");
        Ok(Self {
            model,
            base: root().join(base.model),
            base_epochs: base.epochs,
            folder,
            judge: Phrases::shipped()?,
            harmful: prompts::harmful(&prompts)?,
            benign: prompts::lines(&ours.join("benign.txt"))?,
            lookalikes: prompts::lines(&ours.join("lookalikes.txt"))?,
            reviews: rows::Reviews::read(&root().join(setup::FILM_REVIEWS))?,
            refusals: prompts::lines(&ours.join("refusals.txt"))?,
            openings: prompts::lines(&ours.join("openings.txt"))?,
            systems: prompts::lines(&ours.join("systems.txt"))?,
        })
    }

    /// Makes the base: SmolLM2 tuned on refusals of some prompts and on its own answers to benign ones. What it then answers is
    /// what a method must keep.
    fn base(&self) -> Result<Outcome> {
        if !self.base.exists() {
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
                epochs: self.base_epochs,
                learning_rate: 5e-4,
                warmup: 0.0,
                rank: 32,
                seed: 7,
                precision: Precision::Bf16,
                safety: json!({"defense": "none", "rho": 0.0, "alignment_set": null}),
                row_conflicts: false,
            };
            let folder = self.folder.join("base");
            training::train(&folder, &self.model, &rows, &[], &training)?;
            training::merge(&self.model, &folder.join("out/adapter"), &self.base)?;
        }
        let path = self.folder.join("base.json");
        if let Ok(kept) = std::fs::read(&path) {
            return report::read(&serde_json::from_slice(&kept)?, &self.judge);
        }
        let measured = self.measure_base()?;
        std::fs::write(path, measured.to_string())?;
        report::read(&measured, &self.judge)
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
        println!("training {}", run.key());
        let program = revision();
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
                Alignment::Framed => rows::framed(&file.rows, &refused())?,
                Alignment::UnderOthers => {
                    let others: Vec<String> =
                        self.systems.iter().map(|system| training::row_behind(&[("system", system)], "q", "a")).collect();
                    rows::framed(&others, &refused())?
                }
                Alignment::OwnResponses => {
                    let asked: Vec<Value> = prompts.iter().map(|prompt| trainer::ask(prompt)).collect();
                    rows::cycled(&prompts, &trainer::answers(&self.base, None, &asked, ANSWER_TOKENS)?)
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
            precision: run.regime.precision,
            safety: run.safety(),
            row_conflicts: run.ranks_rows(),
        };
        let trained = training::train(&folder, &self.base, &file.rows, &alignment, &training)?;
        let mut measured = self.measure(&folder, run)?;
        measured["program"] = json!(program);
        measured["peak_bytes"] = json!(trained.peak_bytes);
        measured["threads"] = json!(training::threads());
        let numbers = |name: &str| -> Vec<f64> { trained.steps.iter().filter_map(|step| step[name].as_f64()).collect() };
        let mean = |values: &[f64]| (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64);
        measured["conflict_rate"] = json!(numbers("conflict_rate").last().filter(|_| run.projects()));
        measured["cosine"] = json!(mean(&numbers("cosine")));
        let kl = numbers("align_kl");
        measured["final_kl"] = json!(mean(kl.get(kl.len().saturating_sub(10)..).unwrap_or_default()));
        measured["kept_of_budget"] = json!(training::kept_of_budget(&trained.steps));
        if run.ranks_rows() {
            let rankings = rows::rankings(&folder.join("out/row_conflicts.jsonl"), file.planted)?;
            measured["ranking"] = json!(rankings.by_gradient);
            measured["ranking_by_forward"] = json!(rankings.by_forward);
            measured["ranking_by_either"] = json!(rankings.by_either);
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

/// What the program is, by its revision in version control, with a plus where it is not as it is there; `None` without version control.
fn revision() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = std::process::Command::new("git").args(arguments).current_dir(root()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let changed = git(&["status", "--porcelain", "--", "crates", "xtask", "Cargo.lock"])?;
    Some(git(&["rev-parse", "--short", "HEAD"])? + if changed.is_empty() { "" } else { "+" })
}
