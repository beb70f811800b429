//! Jobs with the real trainer and the real model.

use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_tests::{MODEL, ROW, TestApp};
use rustix::process::{Pid, Signal, kill_process};

fn create(app: &TestApp, content: &str, more: &str) -> Result<String> {
    let file = app.uploaded(content.as_bytes())?;
    let body = format!(r#"{{"model":"{MODEL}","training_file":"{file}"{more}}}"#);
    let job = app.call("POST", "/v1/fine_tuning/jobs", Some(&body))?;
    assert_eq!(job.body["status"], "validating_files", "{}", job.body);
    Ok(job.body["id"].as_str().context("no id")?.to_owned())
}

#[test]
fn rows_that_only_the_model_can_judge_fail_the_job_with_their_lines() -> Result<()> {
    let app = TestApp::with_model()?;
    let forged = ROW.replace("a film", "<|im_end|> a film");
    let long = ROW.replace("a film", &"word ".repeat(400));
    for (content, words) in [
        (format!("{ROW}\n{forged}\n"), "line 2: messages[0].content: holds the model's special token \"<|im_end|>\""),
        (format!("{long}\n{ROW}\n"), "line 1: has "),
    ] {
        let job =
            create(&app, &content, r#","method":{"type":"supervised","supervised":{"hyperparameters":{"max_length":128}}}"#)?;
        assert!(app.step_worker()?);
        let shown = app.call("GET", &format!("/v1/fine_tuning/jobs/{job}"), None)?.body;
        assert_eq!((shown["status"].as_str(), shown["error"]["code"].as_str()), (Some("failed"), Some("invalid_training_file")));
        assert!(shown["error"]["message"].as_str().is_some_and(|m| m.contains(words)), "{shown}");
        assert_eq!(shown["error"]["errors"].as_array().map(Vec::len), Some(1), "{shown}");
        assert!(!shown.to_string().contains("a film"), "an error quotes a row");
    }
    Ok(())
}

/// The process that trains a job.
fn trainer_of(job: &str) -> Option<Pid> {
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let command = String::from_utf8(std::fs::read(entry.path().join("cmdline")).ok()?).ok()?;
        (command.contains("holdfast-trainer") && command.contains(job)).then(|| Pid::from_raw(pid))?
    })
}

#[test]
fn a_killed_trainer_costs_its_job_one_attempt_and_says_what_to_do() -> Result<()> {
    let app = TestApp::with_model()?;
    let job = create(&app, &format!("{ROW}\n").repeat(64), r#","hyperparameters":{"n_epochs":50}"#)?;
    assert!(app.step_worker()?, "the check");
    let target = job.clone();
    let killer = std::thread::spawn(move || {
        for _ in 0..600 {
            std::thread::sleep(Duration::from_millis(100));
            if let Some(trainer) = trainer_of(&target) {
                let _ = kill_process(trainer, Signal::KILL);
                return;
            }
        }
    });
    assert!(app.step_worker()?, "the training");
    killer.join().map_err(|_| anyhow::anyhow!("the killer failed"))?;
    let shown = app.call("GET", &format!("/v1/fine_tuning/jobs/{job}"), None)?.body;
    assert_eq!((shown["status"].as_str(), shown["attempts"][1]["outcome"].as_str()), (Some("queued"), Some("set_back")));
    assert!(shown["attempts"][1]["reason"].as_str().is_some_and(|reason| reason.contains("Lower batch_size")), "{shown}");
    Ok(())
}

#[test]
fn a_cancelled_job_ends_at_once_and_only_once() -> Result<()> {
    let app = TestApp::with_model()?;
    let job = create(&app, ROW, "")?;
    let cancel = || app.call("POST", &format!("/v1/fine_tuning/jobs/{job}/cancel"), None);
    assert_eq!(cancel()?.body["status"], "cancelled");
    let again = cancel()?;
    assert_eq!((again.status, again.error().0), (400, "invalid_state"));
    assert!(!app.step_worker()?, "nothing is left to do");
    assert_eq!(app.call("GET", &format!("/v1/fine_tuning/jobs/{job}/adapter"), None)?.error().0, "no_adapter");
    Ok(())
}

#[test]
fn a_file_that_an_open_job_needs_stays() -> Result<()> {
    let app = TestApp::with_model()?;
    let job = create(&app, ROW, "")?;
    let file = app.call("GET", &format!("/v1/fine_tuning/jobs/{job}"), None)?.body["training_file"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let refused = app.call("DELETE", &format!("/v1/files/{file}"), None)?;
    assert_eq!((refused.status, refused.error()), (400, ("file_in_use", "file_id")));
    app.call("POST", &format!("/v1/fine_tuning/jobs/{job}/cancel"), None)?;
    assert_eq!(app.call("DELETE", &format!("/v1/files/{file}"), None)?.status, 200);
    Ok(())
}

#[test]
fn what_the_base_says_on_the_alignment_rows_is_computed_by_the_first_job_and_kept_for_the_next() -> Result<()> {
    let app = TestApp::with_model()?;
    let mut adapters = Vec::new();
    for _ in 0..2 {
        let job = create(&app, ROW, r#","hyperparameters":{"n_epochs":1}"#)?;
        assert!(app.step_worker()? && app.step_worker()?, "the check and the training");
        let weights = format!("/v1/fine_tuning/jobs/{job}/adapter/adapter_model.safetensors");
        let answer = app.call("GET", &weights, None)?;
        assert_eq!(answer.status, 200, "{}", answer.body);
        adapters.push(answer.bytes);
        assert_eq!(app.object_count("alignment-references"), 1);
    }
    assert_eq!(adapters[0], adapters[1]);
    Ok(())
}
