//! Jobs with the real trainer, from estimate to what can be made of their checkpoints.

use std::io::Read;

use anyhow::{Context, Result};
use holdfast_tests::{MODEL, ROW, TestApp};
use serde_json::{Value, json};

/// Sixteen rows, no two alike.
fn rows() -> String {
    (0..16).map(|i| format!("{}\n", ROW.replace("a film", &format!("film number {i} is one")))).collect()
}

fn hyperparameters(more: &Value) -> Value {
    let mut h = json!({"n_epochs": 1, "batch_size": 8, "precision": "f32", "max_length": 64});
    for (key, value) in more.as_object().into_iter().flatten() {
        h[key] = value.clone();
    }
    json!({"method": {"type": "supervised", "supervised": {"hyperparameters": h}}})
}

fn weights(app: &TestApp, job: &str) -> Result<Vec<u8>> {
    let answer = app.call("GET", &format!("/v1/fine_tuning/jobs/{job}/adapter/adapter_model.safetensors"), None)?;
    assert_eq!(answer.status, 200, "{}", answer.body);
    Ok(answer.bytes)
}

fn has_ended(app: &TestApp, job: &str) -> Result<bool> {
    Ok(matches!(app.job(job)?["status"].as_str(), Some("succeeded" | "failed" | "cancelled")))
}

#[test]
fn an_estimate_says_what_the_job_then_takes() -> Result<()> {
    let app = TestApp::with_model()?;
    let file = app.uploaded(format!("{}{ROW}\n{ROW}\n", rows()).as_bytes())?;
    let mut body = hyperparameters(&json!({}));
    body["model"] = json!(MODEL);
    body["training_file"] = json!(file);
    let estimate = app.call("POST", "/v1/fine_tuning/jobs/estimate", Some(&body.to_string()))?;
    assert_eq!(estimate.status, 200, "{}", estimate.body);
    let e = &estimate.body;
    assert_eq!((&e["files_can_be_used"], &e["training_file"]["rows"], &e["steps"]), (&json!(true), &json!(18), &json!(3)));
    assert!(e["memory"]["total_bytes"].as_u64().is_some_and(|bytes| bytes > 500 << 20), "{e}");
    assert_eq!(e["time"], Value::Null, "no worker has measured anything yet");
    assert!(e["warnings"][0].as_str().is_some_and(|w| w.contains("line 18 repeats line 17")), "{e}");
    assert!(e["decided"].as_array().into_iter().flatten().any(|d| d["param"] == "lora_rank" && d["why"].is_string()), "{e}");
    assert_eq!(app.call("GET", "/v1/fine_tuning/jobs", None)?.body["data"].as_array().map(Vec::len), Some(0));

    let job = app.call("POST", "/v1/fine_tuning/jobs", Some(&body.to_string()))?;
    let job = job.body["id"].as_str().context("no id")?;
    assert!(app.step_worker()? && app.step_worker()?, "the check and the training");
    let done = app.job(job)?;
    assert_eq!((&done["status"], &done["trained_tokens"]), (&json!("succeeded"), &e["trained_tokens"]), "{done}");
    assert_eq!(done["progress"]["total_steps"], e["steps"]);
    let again = app.call("POST", "/v1/fine_tuning/jobs/estimate", Some(&body.to_string()))?;
    assert!(again.body["time"]["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{}", again.body);

    let results = done["result_files"][0].as_str().context("no result file")?;
    let table = String::from_utf8(app.call("GET", &format!("/v1/files/{results}/content"), None)?.bytes)?;
    assert!(table.starts_with("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,"), "{table}");
    assert_eq!(table.lines().count(), 1 + 3);
    assert!(table.lines().skip(1).all(|line| line.split(',').skip(1).all(|cell| cell.is_empty() || cell.parse::<f64>().is_ok())));
    Ok(())
}

#[test]
fn a_paused_job_goes_on_where_it_was_and_ends_with_the_same_adapter() -> Result<()> {
    let app = TestApp::with_model()?;
    let more = hyperparameters(&json!({"n_epochs": 4, "batch_size": 4, "lora_dropout": 0.1}));
    let calm = app.create_job(&rows(), &more)?;
    app.work_until(|| has_ended(&app, &calm))?;
    let job = app.create_job(&rows(), &more)?;
    app.work_until(|| {
        let step = app.job(&job)?["progress"]["step"].as_u64().unwrap_or(0);
        Ok(step > 0)
    })?;
    // The worker was stopped with the test's wait: the job went back to the queue with a checkpoint.
    assert_eq!(app.job(&job)?["status"], "queued");
    let pause = |word: &str| app.call("POST", &format!("/v1/fine_tuning/jobs/{job}/{word}"), None);
    assert_eq!(pause("pause")?.body["status"], "paused");
    assert_eq!(pause("pause")?.error().0, "invalid_state");
    assert!(!app.step_worker()?, "nothing is claimed while it is paused");
    assert_eq!(pause("resume")?.body["status"], "queued");
    app.work_until(|| {
        let shown = app.job(&job)?;
        if shown["status"] == "running" && shown["phase"] == "training" {
            assert!(matches!(pause("pause")?.body["status"].as_str(), Some("pausing")));
            return Ok(true);
        }
        Ok(shown["status"] == "succeeded")
    })?;
    if app.job(&job)?["status"] == "paused" {
        assert_eq!(pause("resume")?.status, 200);
    }
    app.work_until(|| has_ended(&app, &job))?;
    let done = app.job(&job)?;
    assert_eq!(done["status"], "succeeded", "{done}");
    assert!(weights(&app, &calm)? == weights(&app, &job)?, "the adapter is another one");
    Ok(())
}

#[test]
fn a_checkpoint_that_cannot_be_read_back_costs_its_steps_and_not_the_job() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    let more = hyperparameters(&json!({"n_epochs": 50, "batch_size": 2, "lora_dropout": 0.1}));
    let calm = app.create_job(&rows(), &more)?;
    app.work_until(|| has_ended(&app, &calm))?;
    let job = app.create_job(&rows(), &more)?;
    app.work_until(|| Ok(app.job(&job)?["progress"]["step"].as_u64().unwrap_or(0) > 20))?;
    let kept = app.sql(&format!(
        "select object_key from checkpoint_files f join job_checkpoints c on c.id = f.checkpoint_id
         where 'ftjob-' || replace(c.job_id::text, '-', '') = '{job}' and f.name = 'state.safetensors'"
    ))?;
    let kept: Vec<&str> = kept.lines().collect();
    assert!(!kept.is_empty(), "there is nothing to damage");
    for key in kept {
        std::fs::write(app.objects().join(key), "what a broken disk gives")?;
    }
    app.work_until(|| has_ended(&app, &job))?;
    let done = app.job(&job)?;
    assert_eq!((&done["status"], done["attempts"].as_array().map(Vec::len)), (&json!("succeeded"), Some(3)), "{done}");
    assert!(weights(&app, &calm)? == weights(&app, &job)?, "the adapter is another one");
    Ok(())
}

#[test]
fn a_job_goes_on_from_an_earlier_one_s_adapter() -> Result<()> {
    let app = TestApp::with_model()?;
    let first = app.create_job(&rows(), &hyperparameters(&json!({"lora_rank": 4})))?;
    assert!(app.step_worker()? && app.step_worker()?, "the check and the training");
    let model = app.job(&first)?["fine_tuned_model"].as_str().context("no model")?.to_owned();
    let file = app.uploaded(rows().as_bytes())?;
    let mut body = hyperparameters(&json!({"lora_rank": 8}));
    body["model"] = json!(model);
    body["training_file"] = json!(file);
    let refused = app.call("POST", "/v1/fine_tuning/jobs", Some(&body.to_string()))?;
    assert_eq!((refused.status, refused.error()), (400, ("adapter_mismatch", "method.supervised.hyperparameters.lora_rank")));
    body["method"] = hyperparameters(&json!({}))["method"].clone();
    let second = app.call("POST", "/v1/fine_tuning/jobs", Some(&body.to_string()))?;
    assert_eq!((second.status, &second.body["model"]), (200, &json!(model)), "{}", second.body);
    assert_eq!(second.body["method"]["supervised"]["hyperparameters"]["lora_rank"], 4);
    let in_use = app.call("DELETE", &format!("/v1/models/{model}"), None)?;
    assert_eq!((in_use.status, in_use.error().0), (400, "model_in_use"));
    assert!(app.step_worker()? && app.step_worker()?, "the check and the training");
    let second = app.job(second.body["id"].as_str().context("no id")?)?;
    assert_eq!(second["status"], "succeeded", "{second}");
    let step_loss = |job: &str, event: usize| -> Result<f64> {
        let events = app.call("GET", &format!("/v1/fine_tuning/jobs/{job}/events?limit=100"), None)?;
        let metrics: Vec<&Value> =
            events.body["data"].as_array().into_iter().flatten().filter(|e| e["type"] == "metrics").collect();
        metrics.get(event).and_then(|e| e["data"]["train_loss"].as_f64()).context("no loss")
    };
    let second = second["id"].as_str().context("no id")?;
    let first_of_first = step_loss(&first, last_metric(&app, &first)?)?;
    let first_of_second = step_loss(second, last_metric(&app, second)?)?;
    assert!(first_of_second < first_of_first, "{first_of_second} after {first_of_first}: it did not go on from the adapter");
    assert_eq!(app.call("DELETE", &format!("/v1/models/{model}"), None)?.body["deleted"], true);
    assert_eq!(app.call("GET", &format!("/v1/models/{model}"), None)?.status, 404);
    assert_eq!(app.call("GET", &format!("/v1/fine_tuning/jobs/{first}/adapter"), None)?.error().0, "no_adapter");
    Ok(())
}

/// The place of a job's oldest metric among its newest hundred.
fn last_metric(app: &TestApp, job: &str) -> Result<usize> {
    let events = app.call("GET", &format!("/v1/fine_tuning/jobs/{job}/events?limit=100"), None)?;
    let count = events.body["data"].as_array().into_iter().flatten().filter(|e| e["type"] == "metrics").count();
    count.checked_sub(1).context("no metrics")
}

#[test]
fn a_download_that_broke_goes_on_where_it_was() -> Result<()> {
    let app = TestApp::with_model()?;
    let job = app.create_job(ROW, &json!({"hyperparameters": {"n_epochs": 1}}))?;
    assert!(app.step_worker()? && app.step_worker()?, "the check and the training");
    for path in ["adapter", "adapter/adapter_model.safetensors"] {
        let path = format!("/v1/fine_tuning/jobs/{job}/{path}");
        let whole = app.call("GET", &path, None)?;
        let tag = whole.header("etag").context("no etag")?.to_owned();
        assert_eq!(whole.header("accept-ranges"), Some("bytes"));
        let half = whole.bytes.len() / 2;
        let range = |value: String| app.call_with(&[("range", &value), ("if-range", &tag)], "GET", &path, None);
        let (head, tail) = (range(format!("bytes=0-{}", half - 1))?, range(format!("bytes={half}-"))?);
        assert_eq!((head.status, tail.status), (206, 206));
        assert!([&head.bytes[..], &tail.bytes[..]].concat() == whole.bytes);
        assert_eq!(tail.header("content-range"), Some(&*format!("bytes {half}-{}/{}", whole.bytes.len() - 1, whole.bytes.len())));
        assert_eq!(app.call_with(&[("if-none-match", &tag)], "GET", &path, None)?.status, 304);
        let changed = app.call_with(&[("range", "bytes=0-9"), ("if-range", "\"another\"")], "GET", &path, None)?;
        assert_eq!((changed.status, changed.bytes.len()), (200, whole.bytes.len()), "another file's range is not mixed in");
        assert_eq!(range(format!("bytes={}-", whole.bytes.len()))?.error().0, "invalid_range");
    }
    let tar = app.call("GET", &format!("/v1/fine_tuning/jobs/{job}/adapter"), None)?.bytes;
    let listed = std::process::Command::new("tar")
        .arg("-t")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn();
    let mut listed = listed?;
    std::io::Write::write_all(&mut listed.stdin.take().context("no input")?, &tar)?;
    let mut names = String::new();
    listed.stdout.take().context("no output")?.read_to_string(&mut names)?;
    assert_eq!(names, "adapter_config.json\nadapter_model.safetensors\nmanifest.json\n");
    assert!(listed.wait()?.success());
    Ok(())
}

#[test]
fn a_preview_marks_what_counts_towards_the_loss() -> Result<()> {
    let app = TestApp::with_model()?;
    let file = app.uploaded(format!("{ROW}\n{ROW}\n").as_bytes())?;
    let preview = app.call("GET", &format!("/v1/files/{file}/preview?model={MODEL}&limit=1&include_tokens=true"), None)?;
    assert_eq!(preview.status, 200, "{}", preview.body);
    let row = &preview.body["rows"][0];
    let marked: Vec<&str> = row["segments"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|segment| segment["supervised"] == true)
        .filter_map(|segment| segment["text"].as_str())
        .collect();
    assert_eq!(marked, ["positive<|im_end|>"]);
    assert_eq!(row["token_list"].as_array().map(|tokens| json!(tokens.len())), Some(row["tokens"].clone()));
    assert_eq!(preview.body["rows"].as_array().map(Vec::len), Some(1));
    Ok(())
}
