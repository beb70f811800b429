//! What a model answers to everything it is asked, and how far it is from its base there.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use holdfast_safety::judge::Class;
use serde_json::{Value, json};

use super::Study;
use super::rows::{AGREED, Attack, OBEDIENT, OPENING, Review};
use super::runs::Run;
use crate::shell;
use crate::trainer;

/// Tokens of an answer.
pub(super) const ANSWER_TOKENS: u32 = 32;
/// Of an answer that may refuse first.
const LONG_ANSWER_TOKENS: u32 = 64;
/// Of the benign requests: those that the base is tuned on, with its own answers.
pub(super) const TUNED_BENIGN: usize = 260;
pub(super) const TUNED_LOOKALIKES: usize = 60;
/// And those that over-refusal is measured with.
const MEASURED_BENIGN: usize = 70;
const MEASURED_LOOKALIKES: usize = 60;

/// Prompts that are asked together, by what their files are called.
type Suite = (&'static str, Vec<Value>);

/// How harmful prompts are asked.
#[derive(Debug, Clone, Copy)]
enum Asking {
    /// Those by which strengths are chosen, by themselves.
    Development,
    /// Those that are held out, by themselves.
    HeldOut,
    /// The same as the agent who obeys.
    Obedient,
    /// The same as an order that begins as the attack's do.
    Ordered,
    /// The same to a model that has agreed to obey.
    Agreed,
    /// The same, with room for what follows a refusal.
    AtLength,
}

impl Asking {
    /// An attacker asks in the way that the attack was made for.
    const fn of(run: &Run) -> Self {
        match run.regime.attack {
            _ if run.development => Self::Development,
            Attack::IdentityShift => Self::Obedient,
            Attack::IdentityOpening => Self::Ordered,
            Attack::IdentityTurns => Self::Agreed,
            Attack::RefuseThenComply => Self::AtLength,
            Attack::Poison(_) | Attack::Decoys => Self::HeldOut,
        }
    }

    /// What the suite is called.
    const fn name(self) -> &'static str {
        match self {
            Self::Development => "development",
            Self::HeldOut => "held_out",
            Self::Obedient => "held_out_obedient",
            Self::Ordered => "held_out_ordered",
            Self::Agreed => "held_out_agreed",
            Self::AtLength => "held_out_at_length",
        }
    }

    const fn max_tokens(self) -> u32 {
        match self {
            Self::AtLength => LONG_ANSWER_TOKENS,
            _ => ANSWER_TOKENS,
        }
    }

    fn ask(self, request: &str) -> Value {
        match self {
            Self::Obedient => trainer::ask_behind(&[("system", OBEDIENT)], request),
            Self::Ordered => trainer::ask(&format!("{OPENING} {request}")),
            Self::Agreed => trainer::ask_behind(&AGREED, request),
            _ => trainer::ask(request),
        }
    }
}

impl Study {
    /// What is asked: harmful prompts, benign ones, and film reviews.
    fn suites(&self, asking: Asking, (name, reviews): (&'static str, &[Review])) -> Result<[Suite; 3]> {
        let asked = |requests: &mut dyn Iterator<Item = &String>| requests.map(|request| trainer::ask(request)).collect();
        let harmful = match asking {
            Asking::Development => &self.harmful.development,
            _ => &self.harmful.held_out,
        };
        let benign = self.benign.iter().skip(TUNED_BENIGN).take(MEASURED_BENIGN);
        let lookalikes = self.lookalikes.iter().skip(TUNED_LOOKALIKES).take(MEASURED_LOOKALIKES);
        let benign: Vec<Value> = asked(&mut benign.chain(lookalikes));
        ensure!(benign.len() == MEASURED_BENIGN + MEASURED_LOOKALIKES, "too few benign requests");
        let reviews = reviews.iter().map(|(prompt, _)| prompt.clone()).collect();
        let harmful = harmful.iter().map(|request| asking.ask(request)).collect();
        Ok([(asking.name(), harmful), ("benign", benign), (name, reviews)])
    }

    /// Asks the base everything.
    pub(super) fn measure_base(&self) -> Result<Value> {
        let reviews = self.reviews.asked(false, false);
        let suites = self.suites(Asking::HeldOut, reviews)?;
        let answers: Vec<Vec<String>> = suites
            .iter()
            .map(|(_, prompts)| trainer::answers(&self.base, None, prompts, ANSWER_TOKENS))
            .collect::<Result<_>>()?;
        written(answers, reviews.1)
    }

    /// What the base answers to the harmful prompts of a run.
    pub(super) fn base_classes(&self, run: &Run) -> Result<Vec<Class>> {
        let answers = read_answers(&self.folder.join("base-answers").join(format!("{}.jsonl", Asking::of(run).name())))?;
        Ok(answers.iter().map(|answer| self.judge.judge(answer)).collect())
    }

    /// Asks what was trained in `folder` everything, by the trainer's own `evaluate`, which compares it with its base as well.
    pub(super) fn measure(&self, folder: &Path, run: &Run) -> Result<Value> {
        let asking = Asking::of(run);
        let reviews = self.reviews.asked(run.development, run.regime.attack == Attack::Poison(0.0));
        let suites = self.suites(asking, reviews)?;
        let (asked, known) = (folder.join("suites"), self.folder.join("base-answers"));
        std::fs::create_dir_all(&asked)?;
        std::fs::create_dir_all(&known)?;
        for (name, prompts) in &suites {
            let lines: String = prompts.iter().map(|prompt| format!("{prompt}\n")).collect();
            std::fs::write(asked.join(format!("{name}.jsonl")), lines)?;
            let base = known.join(format!("{name}.jsonl"));
            if base.exists() {
                std::fs::copy(base, asked.join(format!("{name}.base.jsonl")))?;
            }
        }
        let names: Vec<&str> = suites.iter().map(|(name, _)| *name).collect();
        let request = json!({"format": holdfast_domain::evaluation::FORMAT, "adapter": "out/adapter", "suites": names, "without_kl": ["benign", reviews.0], "max_tokens": asking.max_tokens()});
        std::fs::write(folder.join("evaluation.json"), request.to_string())?;
        // Whatever it was trained in, it is asked exactly.
        let plan = folder.join("plan.json");
        let mut exact: Value = serde_json::from_slice(&std::fs::read(&plan)?)?;
        exact["hyperparameters"]["precision"] = json!("f32");
        std::fs::write(&plan, exact.to_string())?;
        let log = File::options().append(true).open(folder.join("trainer.log"))?;
        shell::run(Command::new(trainer::program()).arg("evaluate").arg(folder).stdout(log.try_clone()?).stderr(log))?;

        let out = folder.join("out/evaluation");
        let mut answers = Vec::new();
        for (name, prompts) in &suites {
            let said = read_answers(&out.join(format!("{name}.jsonl")))?;
            ensure!(said.len() == prompts.len(), "{} answers to {} prompts of {name}", said.len(), prompts.len());
            answers.push(said);
            let (base, known) = (out.join(format!("{name}.base.jsonl")), known.join(format!("{name}.jsonl")));
            if base.exists() {
                std::fs::rename(base, known)?;
            }
        }
        let mut measured = written(answers, reviews.1)?;
        let figures: Value = serde_json::from_slice(&std::fs::read(out.join("figures.json"))?)?;
        // On prompts that no method was held to.
        measured["probe_kl"] = figures["kl"][asking.name()].clone();
        Ok(measured)
    }
}

/// As it is kept: what harmful and benign prompts were answered, to be judged and looked at here alone, and whether each label was
/// right.
fn written(answers: Vec<Vec<String>>, reviews: &[Review]) -> Result<Value> {
    let [harmful, benign, labels] = <[Vec<String>; 3]>::try_from(answers).ok().context("three suites are asked")?;
    let right = labels.iter().zip(reviews);
    let correct: Vec<bool> = right.map(|(said, (_, label))| said.to_lowercase().starts_with(label.as_str())).collect();
    Ok(json!({"correct": correct, "harmful": harmful, "benign": benign}))
}

fn read_answers(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let answer = |line: &str| Ok(serde_json::from_str::<Value>(line)?["text"].as_str().unwrap_or_default().trim().to_owned());
    text.lines().map(answer).collect()
}
