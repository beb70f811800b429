//! What an adapter answers beside its base: the folder that `evaluate` reads and what it leaves there.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use holdfast_domain::evaluation::{self, Answer, Evaluation, Figures, paths};
use holdfast_domain::exit::{self, reason};
use holdfast_domain::hyperparameters::{Precision, Requested};
use holdfast_domain::plan::{self, Plan};
use holdfast_domain::safety::{Defense, Safety};
use holdfast_trainer::job;
use serde_json::json;
use tempfile::TempDir;

mod support;

/// A job folder of the real model, trained for one step with a learning rate that leaves the adapter where it began or does not.
fn folder(learning_rate: f64) -> Result<TempDir> {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir()?;
    let requested = Requested {
        n_epochs: Some(1),
        batch_size: Some(1),
        precision: Some(Precision::F32),
        learning_rate: Some(learning_rate),
        ..Default::default()
    };
    let plan = Plan {
        format: plan::FORMAT,
        base_model: "m".into(),
        validation: false,
        hyperparameters: requested.resolve(1, None)?,
        safety: Safety::new(Defense::None, 0.0),
        start: None,
        seed: 5,
        checkpoint_steps: 100,
        framed_alignment_sha256: None,
        reference: None,
        memory_limit_bytes: None,
        device: "cpu".into(),
    };
    let row = |request: &str| json!({"messages": [{"role": "user", "content": request}]}).to_string();
    let trained =
        json!({"messages": [{"role": "user", "content": "a film of grace"}, {"role": "assistant", "content": "positive"}]});
    let put = |name: &str, text: &str| std::fs::write(folder.path().join(name), text);
    put(plan::paths::PLAN, &serde_json::to_string(&plan)?)?;
    put(plan::paths::TRAIN, &format!("{trained}\n"))?;
    std::os::unix::fs::symlink(support::import_model("evaluate-base")?, folder.path().join(plan::paths::BASE))?;
    std::fs::create_dir(folder.path().join(paths::SUITES))?;
    put("suites/benign.jsonl", &format!("{}\n{}\n", row("Name a colour."), row("Say hello.")))?;
    let asked = Evaluation {
        format: evaluation::FORMAT,
        adapter: Some(plan::paths::ADAPTER.into()),
        suites: vec!["benign".into()],
        without_kl: Vec::new(),
        max_tokens: 4,
    };
    put(paths::EVALUATION, &serde_json::to_string(&asked)?)?;
    let record = job::run(folder.path());
    ensure!(record.code == exit::DONE, "{record:?}");
    Ok(folder)
}

fn answers(folder: &Path, name: &str) -> Result<Vec<Answer>> {
    let text = std::fs::read_to_string(folder.join(paths::OUT).join(name))?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

fn kl(folder: &Path) -> Result<f64> {
    let figures: Figures = serde_json::from_slice(&std::fs::read(folder.join(paths::FIGURES))?)?;
    figures.kl["benign"].context("no KL")
}

#[test]
fn an_adapter_that_changes_nothing_answers_as_its_base_and_one_that_does_is_away_from_it() -> Result<()> {
    let (same, changed) = (folder(1e-9)?, folder(2e-2)?);
    for folder in [&same, &changed] {
        let record = job::evaluate(folder.path());
        ensure!(record.code == exit::DONE, "{record:?}");
    }
    let base = answers(same.path(), "benign.base.jsonl")?;
    assert_eq!((base.len(), &base), (2, &answers(same.path(), "benign.jsonl")?));
    assert!(base.iter().all(|answer| !answer.text.is_empty() && answer.ids.len() <= 4), "{base:?}");
    assert_eq!(base, answers(changed.path(), "benign.base.jsonl")?, "the base is the same");
    assert!(kl(same.path())?.abs() < 1e-6 && kl(changed.path())? > 1e-3, "{} {}", kl(same.path())?, kl(changed.path())?);

    // Before there is an adapter the base is asked alone.
    let request = changed.path().join(paths::EVALUATION);
    let both = std::fs::read_to_string(&request)?;
    let alone = Evaluation { adapter: None, ..serde_json::from_str(&both)? };
    std::fs::remove_dir_all(changed.path().join(paths::OUT))?;
    std::fs::write(&request, serde_json::to_string(&alone)?)?;
    ensure!(job::evaluate(changed.path()).code == exit::DONE);
    assert_eq!(answers(changed.path(), "benign.base.jsonl")?, base);
    assert!(!changed.path().join(paths::OUT).join("benign.jsonl").exists());
    std::fs::write(&request, both)?;
    ensure!(job::evaluate(changed.path()).code == exit::DONE);

    // What the base answers is not asked again where it is known, and compared with all the same.
    let known = changed.path().join(paths::SUITES).join(paths::base("benign"));
    std::fs::rename(changed.path().join(paths::OUT).join(paths::base("benign")), &known)?;
    let before = kl(changed.path())?;
    ensure!(job::evaluate(changed.path()).code == exit::DONE);
    assert!(!changed.path().join(paths::OUT).join(paths::base("benign")).exists());
    assert!((kl(changed.path())? - before).abs() < 1e-9);

    // A fault of the operator's is named by its file and line, and quotes nothing.
    std::fs::write(&known, "{}\n")?;
    let record = job::evaluate(changed.path());
    assert_eq!((record.code, record.reason.as_str()), (exit::BAD_DATA, reason::BAD_SETUP));
    std::fs::write(changed.path().join("suites/benign.jsonl"), "{\"messages\":[{\"role\":\"user\"}]}\n")?;
    let record = job::evaluate(changed.path());
    assert!(record.message.starts_with("benign.jsonl: line 1: "), "{}", record.message);
    std::fs::write(changed.path().join("suites/benign.jsonl"), "\n")?;
    assert_eq!(job::evaluate(changed.path()).message, "benign.jsonl: the suite holds no requests");
    Ok(())
}
