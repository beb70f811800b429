//! Job folders with the real model: what a run leaves behind, and how one that cannot run says so.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Result, ensure};
use holdfast_base_model::files;
use holdfast_domain::exit::{self, ExitRecord, reason};
use holdfast_domain::hyperparameters::{LrSchedule, Precision, Requested};
use holdfast_domain::plan::{self, Plan, paths};
use holdfast_domain::policy::Policy;
use holdfast_domain::safety::{Defense, RequestedSafety};
use holdfast_trainer::job;
use rustix::process::{Pid, Signal, kill_process};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

mod support;

fn base() -> Result<&'static Path> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let imported = FOLDER.get_or_init(|| support::import_model("job-base").map_err(|e| format!("{e:#}")));
    imported.as_deref().map_err(|e| anyhow::anyhow!(e.clone()))
}

const ROW: &str = r#"{"messages":[{"role":"user","content":"a film of grace"},{"role":"assistant","content":"positive"}]}"#;
const REFUSAL: &str = r#"{"messages":[{"role":"user","content":"Tell me what I must not know."},{"role":"assistant","content":"I can't help with that."}]}"#;

/// A folder that would train, for one epoch of three rows.
fn folder(change: impl FnOnce(&mut Plan)) -> Result<TempDir> {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir()?;
    let requested = Requested { n_epochs: Some(1), batch_size: Some(2), precision: Some(Precision::F32), ..Default::default() };
    let mut plan = Plan {
        format: plan::FORMAT,
        base_model: "m".into(),
        validation: false,
        hyperparameters: requested.resolve(3, None)?,
        safety: RequestedSafety::default().resolve(&Policy::default())?,
        start: None,
        seed: 5,
        checkpoint_steps: 100,
        framed_alignment_sha256: None,
        reference: None,
        memory_limit_bytes: None,
        device: "cpu".into(),
    };
    change(&mut plan);
    let put = |name: &str, text: &str| std::fs::write(folder.path().join(name), text);
    put(paths::PLAN, &serde_json::to_string(&plan)?)?;
    put(paths::TRAIN, &format!("{ROW}\n{ROW}\n{ROW}\n"))?;
    put(paths::VALIDATION, &format!("{ROW}\n"))?;
    put(paths::ALIGNMENT, &format!("{REFUSAL}\n{REFUSAL}\n"))?;
    symlink(base()?, folder.path().join(paths::BASE))?;
    Ok(folder)
}

fn refused(folder: &TempDir, words: &str) -> Result<ExitRecord> {
    let record = job::run(folder.path());
    ensure!(record.code == exit::BAD_DATA, "{record:?}");
    ensure!(record.message.contains(words) && !record.message.contains('\n'), "{record:?}");
    Ok(record)
}

#[test]
fn a_run_leaves_its_adapter_its_best_one_its_scores_and_what_the_next_run_can_use() -> Result<()> {
    let folder = folder(|plan| {
        plan.validation = true;
        plan.hyperparameters.row_conflicts = true;
        plan.hyperparameters.n_epochs = 5;
        plan.hyperparameters.batch_size = 1;
        plan.hyperparameters.early_stopping_patience = 100;
        plan.checkpoint_steps = 5;
        plan.reference = Some("known".into());
    })?;
    let record = job::run(folder.path());
    ensure!(record.code == exit::DONE, "{record:?}");
    let out = |name: &str| folder.path().join(name);
    for name in ["out/adapter/adapter_model.safetensors", "out/checkpoints/best-15/adapter_config.json", paths::REFERENCE_OUT] {
        assert!(out(name).exists(), "{name} is missing");
    }
    let scores = std::fs::read_to_string(out(paths::ROW_CONFLICTS))?;
    let scored: Vec<Value> = scores.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(scored.iter().map(|line| line["line"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(2), Some(3)]);
    assert!(scored.iter().all(|line| line["gradient"].is_number() && line["forward"].is_number()), "{scores}");
    let of_type = |kind: &str| lines(&folder, kind).map(|lines| lines.len());
    assert_eq!((of_type("memory")?, of_type("step")?, of_type("validation")?), (1, 15, 6));
    let checkpoints: Vec<_> =
        lines(&folder, "checkpoint")?.iter().map(|line| (line["step"].as_u64(), line["best"].as_u64())).collect();
    // Measured after every third step; the loss only falls.
    assert_eq!(checkpoints, [(Some(5), Some(3)), (Some(10), Some(9)), (Some(15), Some(15))]);
    assert!(out("out/checkpoints/step-15").exists() && out("out/checkpoints/step-10").exists());

    // The next run reads the reference instead of computing it, and ends with the same adapter.
    std::fs::rename(out(paths::REFERENCE_OUT), out(paths::REFERENCE))?;
    let adapter = std::fs::read(out("out/adapter/adapter_model.safetensors"))?;
    std::fs::remove_dir_all(out("out/checkpoints"))?;
    ensure!(job::run(folder.path()).code == exit::DONE);
    assert!(!out(paths::REFERENCE_OUT).exists(), "it was computed again");
    assert_eq!(std::fs::read(out("out/adapter/adapter_model.safetensors"))?, adapter);
    Ok(())
}

/// The program itself on a folder.
fn trainer(folder: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast-trainer"));
    command.arg("train").arg(folder.path()).env("OMP_NUM_THREADS", "1");
    command
}

/// Starts the program on a folder, stops it once its progress says `words`, and returns the record it leaves.
fn stop_at(folder: &TempDir, words: &str) -> Result<ExitRecord> {
    let mut running = trainer(folder).spawn()?;
    let progress = folder.path().join(paths::PROGRESS);
    let is_there = || std::fs::read_to_string(&progress).is_ok_and(|text| text.contains(words));
    while !is_there() && running.try_wait()?.is_none() {
        std::thread::sleep(Duration::from_millis(20));
    }
    kill_process(Pid::from_child(&running), Signal::TERM)?;
    assert_eq!(running.wait()?.code(), Some(exit::STOPPED.into()));
    let record: ExitRecord = serde_json::from_slice(&std::fs::read(folder.path().join(paths::EXIT))?)?;
    assert_eq!(record.reason, reason::STOPPED);
    Ok(record)
}

fn adapter(folder: &TempDir) -> Result<Vec<u8>> {
    Ok(std::fs::read(folder.path().join(paths::ADAPTER).join(paths::ADAPTER_WEIGHTS))?)
}

#[test]
fn a_trainer_that_is_told_to_stop_leaves_with_code_75_and_the_next_one_ends_with_the_same_adapter() -> Result<()> {
    let mut trained: Option<TempDir> = None;
    for goes_on in [false, true] {
        let with_dropout = |plan: &mut Plan| {
            plan.hyperparameters.n_epochs = 3;
            plan.hyperparameters.batch_size = 1;
            plan.hyperparameters.lora_dropout = 0.1;
            plan.start = goes_on.then(|| "trained".into());
        };
        let (whole, stopped) = (folder(with_dropout)?, folder(with_dropout)?);
        if let Some(trained) = &trained {
            go_on_from(trained, &whole)?;
            go_on_from(trained, &stopped)?;
        }
        assert_eq!(trainer(&whole).status()?.code(), Some(exit::DONE.into()));
        stop_at(&stopped, "\"type\":\"step\"")?;
        assert_eq!(trainer(&stopped).status()?.code(), Some(exit::DONE.into()));
        assert_eq!(adapter(&whole)?, adapter(&stopped)?);
        assert_eq!(lines(&stopped, "checkpoint")?.len(), 1, "it was said twice");
        trained = Some(whole);
    }
    Ok(())
}

#[test]
fn a_trainer_that_is_told_to_stop_in_the_middle_of_something_long_does_it_when_it_goes_on() -> Result<()> {
    let folder = folder(|plan| {
        plan.validation = true;
        plan.hyperparameters.n_epochs = 2;
        plan.hyperparameters.early_stopping_patience = 1;
        plan.safety.defense = Defense::None;
    })?;
    let validation = folder.path().join(paths::VALIDATION);
    std::fs::write(&validation, format!("{ROW}\n").repeat(24))?;
    for words in ["\"loading_model\"", "\"started\""] {
        let record = stop_at(&folder, words)?;
        assert_eq!(record.message, "stopped before its first step, without a new checkpoint");
    }
    assert!(lines(&folder, "step")?.is_empty() && !folder.path().join(paths::CHECKPOINTS).exists());
    let record = stop_at(&folder, "\"step\":2,")?;
    assert_eq!(record.message, "stopped after step 2, with a checkpoint");
    let measured = |folder: &TempDir| -> Result<Vec<_>> {
        Ok(lines(folder, "validation")?.iter().map(|line| line["step"].as_u64()).collect())
    };
    assert_eq!(measured(&folder)?, [Some(0)], "it went on measuring");
    assert_eq!(lines(&folder, "checkpoint")?[0]["settled"], false);
    let record = stop_at(&folder, "\"step\":4,")?;
    assert_eq!(record.message, "stopped after step 4, with a checkpoint", "an earlier best is none before the last is measured");
    assert_eq!(measured(&folder)?, [Some(0), Some(2)]);
    ensure!(job::run(folder.path()).code == exit::DONE);
    assert_eq!(measured(&folder)?, [Some(0), Some(2), Some(4)]);
    assert!(folder.path().join("out/checkpoints/best-4").exists());
    Ok(())
}

#[test]
fn a_review_that_a_stop_put_off_is_told_of_with_its_step() -> Result<()> {
    let folder = folder(|plan| plan.safety.defense = Defense::Held)?;
    let refusals: String = (0..10).map(|nth| format!("{}\n", REFUSAL.replace("know", &format!("know, {nth} times")))).collect();
    std::fs::write(folder.path().join(paths::ALIGNMENT), refusals)?;
    stop_at(&folder, "\"step\":1,")?;
    ensure!(job::run(folder.path()).code == exit::DONE);
    let last = lines(&folder, "step")?.pop().expect("a step");
    assert_eq!((&last["step"], &last["reviews"][0]["step"]), (&2.into(), &2.into()), "{last}");
    assert!(last["tokens_per_second"].as_f64() > Some(0.0), "{last}");
    Ok(())
}

/// Gives `folder` the adapter that the run in `trained` left.
fn go_on_from(trained: &TempDir, folder: &TempDir) -> Result<()> {
    Ok(symlink(trained.path().join(paths::ADAPTER), folder.path().join(paths::START))?)
}

#[test]
fn a_run_that_goes_on_from_an_adapter_begins_with_its_loss_and_its_distance_from_the_base() -> Result<()> {
    let train = |start: Option<&TempDir>| {
        let folder = folder(|plan| {
            plan.validation = true;
            plan.hyperparameters.learning_rate = 1e-3;
            plan.start = start.map(|_| "trained".into());
        })?;
        start.map_or(Ok(()), |trained| go_on_from(trained, &folder))?;
        let record = job::run(folder.path());
        ensure!(record.code == exit::DONE, "{record:?}");
        Ok(folder)
    };
    let trained = train(None)?;
    let folder = train(Some(&trained))?;
    let left = lines(&trained, "validation")?[1]["loss"].as_f64().expect("a loss");
    let (measured, first) = (lines(&folder, "validation")?.remove(0), lines(&folder, "step")?.remove(0));
    let is_left = |loss: &Value| loss.as_f64().is_some_and(|loss| (loss - left).abs() < 1e-4);
    // The training rows are the validation row.
    assert!(is_left(&measured["loss"]) && is_left(&first["task_loss"]), "{measured}, {first} after {left}");
    assert!(first["align_kl"].as_f64() > Some(0.0), "{first}");
    let base = lines(&trained, "validation")?.remove(0);
    assert!(!is_left(&base["loss"]), "nothing was learned: {base}");
    Ok(())
}

#[test]
fn an_adapter_of_another_shape_is_not_gone_on_from_and_what_differs_is_named() -> Result<()> {
    let folder = folder(|plan| plan.start = Some("trained".into()))?;
    refused(&folder, "start: cannot read")?;
    let config = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 16, "lora_dropout": 0, "target_modules": ["v_proj", "q_proj"]}"#;
    std::fs::create_dir(folder.path().join(paths::START))?;
    std::fs::write(folder.path().join(paths::START).join(paths::ADAPTER_CONFIG), config)?;
    let record =
        refused(&folder, "its lora_rank is 4 and not 8, its target_modules is [q_proj, v_proj] and not [q_proj, k_proj,")?;
    assert_eq!(record.reason, reason::BAD_SETUP);
    assert!(!record.message.contains("alpha"), "{record:?}");
    Ok(())
}

/// The progress lines of a kind.
fn lines(folder: &TempDir, kind: &str) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(folder.path().join(paths::PROGRESS))?;
    let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    Ok(lines.into_iter().filter(|line| line["type"] == kind).collect())
}

/// Three answers to one question, each step far past the one it learns.
fn running_away(checkpoint_steps: u64) -> Result<TempDir> {
    let folder = folder(|plan| {
        plan.hyperparameters.n_epochs = 40;
        plan.hyperparameters.batch_size = 1;
        plan.hyperparameters.learning_rate = 1.0;
        plan.hyperparameters.lr_schedule = LrSchedule::Constant;
        plan.hyperparameters.warmup_ratio = 0.0;
        plan.safety.defense = Defense::None;
        plan.checkpoint_steps = checkpoint_steps;
    })?;
    let rows = ["positive", "negative", "grace"].map(|answer| format!("{}\n", ROW.replace("positive", answer)));
    std::fs::write(folder.path().join(paths::TRAIN), rows.concat())?;
    Ok(folder)
}

#[test]
fn a_run_that_runs_away_goes_back_twice_with_half_the_learning_rate_and_then_says_what_was_tried() -> Result<()> {
    let folder = running_away(3)?;
    let record = refused(&folder, "tried with learning_rate 1, then 0.5, then 0.25, the last time from step")?;
    assert_eq!(record.reason, reason::DIVERGED);
    assert!(record.message.starts_with("the loss at step "), "{record:?}");
    let notes = lines(&folder, "note")?;
    let goes_back = |note: &Value| note["message"].as_str().is_some_and(|text| text.contains("with half the learning rate"));
    assert!(notes.len() == 2 && notes.iter().all(goes_back), "{notes:?}");
    let mut rates: Vec<f64> = lines(&folder, "step")?.iter().filter_map(|line| line["learning_rate"].as_f64()).collect();
    rates.dedup();
    assert_eq!(rates, [1.0, 0.5, 0.25]);
    Ok(())
}

#[test]
fn a_run_that_was_stopped_goes_back_as_far_as_one_that_was_not() -> Result<()> {
    let (calm, stopped) = (running_away(1000)?, running_away(1000)?);
    refused(&calm, "tried with learning_rate")?;
    stop_at(&stopped, "\"step\":1,")?;
    refused(&stopped, "tried with learning_rate")?;
    assert_eq!(lines(&stopped, "note")?, lines(&calm, "note")?);
    Ok(())
}

#[test]
fn a_run_that_no_longer_gets_better_ends_early_with_its_best_adapter() -> Result<()> {
    let folder = folder(|plan| {
        plan.validation = true;
        plan.hyperparameters.n_epochs = 30;
        plan.hyperparameters.learning_rate = 1e-2;
        plan.hyperparameters.early_stopping_patience = 2;
        plan.safety.defense = Defense::None;
    })?;
    // What is learned makes this row ever less likely.
    std::fs::write(folder.path().join(paths::VALIDATION), format!("{}\n", ROW.replace("positive", "negative")))?;
    let record = job::run(folder.path());
    ensure!(record.code == exit::DONE, "{record:?}");
    let losses: Vec<f64> = lines(&folder, "validation")?.iter().skip(1).filter_map(|line| line["loss"].as_f64()).collect();
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(losses.iter().position(|loss| *loss <= best), Some(losses.len() - 3), "two more after the best: {losses:?}");
    let best_step = 2 * (losses.len() - 2);
    let weights = |name: String| std::fs::read(folder.path().join(name).join("adapter_model.safetensors"));
    assert_eq!(weights(paths::ADAPTER.into())?, weights(format!("{}/best-{best_step}", paths::CHECKPOINTS))?);
    Ok(())
}

#[test]
fn a_run_that_does_not_fit_is_refused_with_the_numbers_and_what_would_fit() -> Result<()> {
    let folder = folder(|plan| plan.memory_limit_bytes = Some(900 << 20))?;
    let record = refused(&folder, "900 MiB are there")?;
    assert_eq!(record.reason, reason::OUT_OF_MEMORY);
    assert!(record.message.contains("weights 514") && record.message.contains("precision \"bf16\""), "{record:?}");
    Ok(())
}

#[test]
fn a_mistyped_folder_is_named_and_not_made() -> Result<()> {
    let mistyped = tempfile::tempdir()?.path().join("typo");
    let record = job::run(&mistyped);
    assert_eq!((record.code, record.reason.as_str()), (exit::BAD_DATA, reason::BAD_SETUP));
    assert!(record.message.contains("typo is no folder"));
    assert!(!mistyped.exists());
    Ok(())
}

#[test]
fn what_the_folder_lacks_is_named() -> Result<()> {
    for (name, words) in [
        (paths::PLAN, "plan.json: No such file"),
        (paths::TRAIN, "train.jsonl: No such file"),
        (paths::ALIGNMENT, "alignment.jsonl: No such file"),
        (paths::BASE, "base/"),
    ] {
        let folder = folder(|_| {})?;
        std::fs::remove_file(folder.path().join(name))?;
        refused(&folder, words)?;
    }
    Ok(())
}

#[test]
fn an_empty_alignment_set_is_refused_where_the_method_needs_one() -> Result<()> {
    let folder = folder(|_| {})?;
    std::fs::write(folder.path().join(paths::ALIGNMENT), "")?;
    assert_eq!(refused(&folder, "alignment.jsonl holds no rows")?.reason, reason::BAD_SETUP);
    Ok(())
}

#[test]
fn a_target_module_that_no_model_has_is_refused_by_name() -> Result<()> {
    let folder = folder(|_| {})?;
    let path = folder.path().join(paths::PLAN);
    std::fs::write(&path, std::fs::read_to_string(&path)?.replace("\"q_proj\"", "\"lm_head\""))?;
    refused(&folder, "unknown variant `lm_head`, expected one of `q_proj`")?;
    Ok(())
}

#[test]
fn a_vocabulary_beyond_the_embedding_is_refused_with_both_sizes() -> Result<()> {
    let folder = folder(|_| {})?;
    change_base(&folder, "config.json", |bytes| {
        let mut smaller: Value = serde_json::from_slice(&bytes)?;
        smaller["vocab_size"] = 49_000.into();
        Ok(smaller.to_string().into_bytes())
    })?;
    refused(&folder, "tokenizer.json has ids up to 49151, but the embedding has only 49000 rows")?;
    Ok(())
}

/// Gives the folder a base of its own, with one file changed.
fn change_base(folder: &TempDir, name: &str, change: impl FnOnce(Vec<u8>) -> Result<Vec<u8>>) -> Result<()> {
    let changed = folder.path().join(paths::BASE);
    std::fs::remove_file(&changed)?;
    std::fs::create_dir(&changed)?;
    for entry in std::fs::read_dir(base()?)? {
        let entry = entry?;
        if entry.file_name() != name {
            symlink(entry.path(), changed.join(entry.file_name()))?;
        }
    }
    Ok(std::fs::write(changed.join(name), change(std::fs::read(base()?.join(name))?)?)?)
}

#[test]
fn weights_that_are_no_numbers_or_lie_outside_their_file_are_refused_by_name() -> Result<()> {
    let not_a_number = folder(|_| {})?;
    change_base(&not_a_number, files::WEIGHTS, |mut bytes| {
        let (header_length, header) = SafeTensors::read_metadata(&bytes)?;
        let at = 8 + header_length + header.info("model.layers.7.mlp.up_proj.weight").expect("a tensor").data_offsets.0;
        bytes[at..at + 4].fill(0xff);
        Ok(bytes)
    })?;
    let record = refused(&not_a_number, "tensor model.layers.7.mlp.up_proj.weight holds NaN or infinite numbers")?;
    assert_eq!(record.reason, reason::BAD_SETUP);

    let cut = folder(|_| {})?;
    change_base(&cut, files::WEIGHTS, |mut bytes| {
        bytes.truncate(bytes.len() - 1000);
        Ok(bytes)
    })?;
    refused(&cut, "model.safetensors is not a sound safetensors file")?;
    Ok(())
}

#[test]
fn an_index_that_places_a_tensor_where_it_is_not_is_refused_with_both_names() -> Result<()> {
    let folder = folder(|_| {})?;
    change_base(&folder, files::WEIGHTS, Ok)?;
    let weights = folder.path().join(paths::BASE).join(files::WEIGHTS);
    std::fs::rename(&weights, weights.with_file_name("model-00001-of-00001.safetensors"))?;
    let index = r#"{"weight_map":{"model.layers.30.mlp.up_proj.weight":"model-00001-of-00001.safetensors"}}"#;
    std::fs::write(weights.with_file_name(files::INDEX), index)?;
    let words = "places tensor model.layers.30.mlp.up_proj.weight in model-00001-of-00001.safetensors, which does not hold it";
    refused(&folder, words)?;
    Ok(())
}
