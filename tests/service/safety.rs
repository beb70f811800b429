//! What an operator demands of jobs, what keeps an adapter back, and the evidence of it.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use holdfast::verify::Given;
use holdfast_domain::progress::{AlignmentFacts, Progress, Step};
use holdfast_domain::safety::{Defense, Safety};
use holdfast_judge::{Config, Endpoint, Protocol};
use holdfast_safety::manifest::{self, Inputs, Manifest, Named, Outputs, Program, SignKey};
use holdfast_safety::report;
use holdfast_store::queue::{AdapterFile, Published};
use holdfast_tests::{Answer, MODEL, ROW, TestApp};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

fn as_admin(app: &TestApp, method: &str, path: &str, body: &Value) -> Result<Answer> {
    let text = (!body.is_null()).then(|| body.to_string());
    app.call_as(Some(&app.admin_key()?), method, path, text.as_deref())
}

fn set(app: &TestApp, path: &str, policy: &Value) -> Result<Answer> {
    as_admin(app, "PUT", path, policy)
}

/// The deployment's policy, which must be taken.
fn demand(app: &TestApp, policy: &Value) -> Result<()> {
    let answer = set(app, "/admin/safety_policy", policy)?;
    ensure!(answer.status == 200, "{}", answer.body);
    Ok(())
}

fn rows() -> String {
    (0..16).map(|i| format!("{}\n", ROW.replace("a film", &format!("film number {i} is one")))).collect()
}

/// Four steps an epoch.
fn hyperparameters(epochs: u32) -> Value {
    json!({"method": {"type": "supervised", "supervised": {"hyperparameters": {
        "n_epochs": epochs, "batch_size": 4, "precision": "f32", "max_length": 64, "learning_rate": 0.02, "row_conflicts": true}}}})
}

/// A job that has been worked on to its end.
fn ended(app: &TestApp, epochs: u32) -> Result<Value> {
    let job = app.create_job(&rows(), &hyperparameters(epochs))?;
    ensure!(app.step_worker()? && app.step_worker()?, "the check and the training");
    app.job(&job)
}

fn id(job: &Value) -> Result<&str> {
    job["id"].as_str().context("no id")
}

fn of_job(app: &TestApp, job: &Value, what: &str) -> Result<Answer> {
    app.call("GET", &format!("/v1/fine_tuning/jobs/{}/{what}", id(job)?), None)
}

/// The newest job.
fn latest(app: &TestApp) -> Result<String> {
    Ok(id(&app.call("GET", "/v1/fine_tuning/jobs?limit=1", None)?.body["data"][0])?.to_owned())
}

/// A gate that a run of a random base passes whatever it learns, or never does.
fn gate(kl: f64) -> Value {
    json!({"evaluate": true, "gate": {"enabled": true, "kl": kl}})
}

#[test]
fn the_nearest_policy_counts_and_stands_on_the_job_as_it_was() -> Result<()> {
    let app = TestApp::with_model()?;
    let project = app.project_key("default")?.0;
    let shown = app.call("GET", "/v1/fine_tuning/safety_policy", None)?.body;
    assert_eq!((&shown["scope"], &shown["version"], &shown["methods"][0]), (&json!("deployment"), &json!(0), &json!("safegrad")));
    let [deployment, organization, own] = [
        "/admin/safety_policy".into(),
        "/admin/organizations/holdfast/safety_policy".into(),
        format!("/admin/projects/{project}/safety_policy"),
    ];
    assert_eq!(set(&app, &deployment, &json!({"rho": 2.0}))?.body["version"], 1);
    let before = app.job(&app.create_job(ROW, &json!({}))?)?;
    assert_eq!((&before["safety"]["rho"], &before["safety_policy"]["version"]), (&json!(2.0), &json!(1)));

    assert_eq!(set(&app, &organization, &json!({"methods": ["held"], "budget": 0.01}))?.body["scope"], "organization");
    let refused = app.call(
        "POST",
        "/v1/fine_tuning/jobs",
        Some(&json!({"model": MODEL, "training_file": before["training_file"], "safety": {"defense": "safegrad"}}).to_string()),
    )?;
    assert_eq!((refused.status, refused.error()), (400, ("safety_below_floor", "safety.defense")));
    assert_eq!(refused.body["error"]["message"], "jobs train with `held` here; `safegrad` is not allowed");

    // The project's own takes the place of both, as a whole; setting the same again is no new version.
    for _ in 0..2 {
        assert_eq!(set(&app, &own, &json!({"methods": ["none"], "rho": 0.0}))?.body["version"], 1);
    }
    let after = app.job(&app.create_job(ROW, &json!({}))?)?;
    assert_eq!((&after["safety"]["defense"], &after["safety_policy"]["scope"]), (&json!("none"), &json!("project")));
    assert_eq!(as_admin(&app, "DELETE", &own, &Value::Null)?.body["scope"], "organization");
    assert_eq!(as_admin(&app, "DELETE", &organization, &Value::Null)?.body["version"], 1);
    assert_eq!(set(&app, &own, &json!({"methods": ["none"], "rho": 0.0}))?.body["version"], 3, "numbers are never used again");
    assert_eq!(app.job(id(&before)?)?["safety_policy"], before["safety_policy"], "a job keeps what it was created under");

    let earlier = |of: &str, version: &str| as_admin(&app, "GET", &format!("{of}?version={version}"), &Value::Null);
    assert_eq!(earlier(&organization, "1")?.body["budget"], 0.01, "what counts no more can still be read");
    for nowhere in ["2", "4", "4294967295"] {
        let refused = earlier(&own, nowhere)?;
        assert_eq!((refused.status, refused.error()), (404, ("not_found", "version")), "{nowhere}: {}", refused.body);
    }
    assert_eq!(earlier(&own, "latest")?.status, 400);
    Ok(())
}

#[test]
fn a_policy_that_cannot_hold_is_refused_by_the_field_at_fault() -> Result<()> {
    let app = TestApp::start()?;
    let cases = [
        (json!({"methods": []}), "contradiction", "methods"),
        (json!({"methods": ["prayer"]}), "invalid_type", "methods[0]"),
        (json!({"rho": -1}), "out_of_bounds", "rho"),
        (json!({"alignment_set": "nowhere"}), "alignment_set_not_found", "alignment_set"),
        (json!({"evaluate": false, "gate": {"enabled": true}}), "contradiction", "evaluate"),
        (json!({"evaluate": true, "gate": {"enabled": true}}), "contradiction", "gate"),
        (json!({"evaluate": true, "gate": {"enabled": true, "kl": 1000}}), "out_of_bounds", "gate.kl"),
        (json!({"strength": 1}), "unknown_field", "strength"),
    ];
    for (policy, code, param) in cases {
        let refused = set(&app, "/admin/safety_policy", &policy)?;
        assert_eq!((refused.status, refused.error()), (400, (code, param)), "{policy}: {}", refused.body);
    }
    assert_eq!(set(&app, "/admin/organizations/nobody/safety_policy", &json!({}))?.status, 404);
    assert_eq!(app.sql("select count(*) from safety_policies")?, "0", "nothing was written");
    let changed = app.sql("insert into safety_policies (scope, subject, version) values ('deployment', '', 1); update safety_policies set version = 2");
    assert!(changed.is_err(), "the database lets nothing of it change");
    Ok(())
}

#[test]
fn what_passes_is_published_with_a_report_and_a_manifest_that_can_be_checked_anywhere() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &gate(100.0))?;
    // Rows are scored once the first ten steps are taken.
    let job = ended(&app, 4)?;
    assert_eq!(job["status"], "succeeded", "{job}");
    let report = of_job(&app, &job, "safety_report")?.body;
    assert_eq!(report["gate"]["passed"], true, "{report}");
    let suites = report["evaluation"]["suites"].as_array().context("no suites")?;
    for suite in suites {
        let asked: u64 = ["refusal", "compliance", "degenerate"].iter().filter_map(|class| suite["after"][class].as_u64()).sum();
        assert_eq!(asked, 120);
        assert!(suite["kl"].as_f64().is_some_and(|kl| kl > 0.0), "{suite}");
    }
    assert_eq!((suites.len(), &report["training"]["steps"], &report["policy"]["version"]), (2, &json!(16), &json!(1)));
    let worst = report["worst_rows"].as_array().context("no rows")?;
    assert!(!worst.is_empty() && worst.iter().all(|row| row["gradient"].as_f64().is_some_and(|score| score < 0.0)), "{report}");
    assert!(!report.to_string().contains("film number"), "rows are named by their lines alone");
    let page =
        app.call_with(&[("accept", "text/html")], "GET", &format!("/v1/fine_tuning/jobs/{}/safety_report", id(&job)?), None)?;
    let html = String::from_utf8(page.bytes.clone())?;
    assert!(html.starts_with("<!") && html.contains("film number"), "its owner sees the rows");
    assert!(page.header("content-security-policy").is_some_and(|policy| policy.starts_with("default-src 'none'")));

    let folder = tempfile::tempdir()?;
    let tar = folder.path().join("adapter.tar");
    std::fs::File::create(&tar)?.write_all(&of_job(&app, &job, "adapter")?.bytes)?;
    let key = folder.path().join("signing.pub");
    let keys = app.call("GET", "/v1/signing_keys", None)?.body;
    std::fs::write(&key, keys["data"][0]["public_key"].as_str().context("no key")?)?;
    holdfast::verify::run(&tar, Given::default())?;
    let by_key = Given { key: Some(&key), ..Given::default() };
    holdfast::verify::run(&tar, by_key)?;
    let unpacked = folder.path().join("adapter");
    tar::Archive::new(std::fs::File::open(&tar)?).unpack(&unpacked)?;
    let manifest = std::fs::read(unpacked.join("manifest.json"))?;
    assert_eq!(manifest, of_job(&app, &job, "manifest")?.bytes);
    let worker = hex::encode(holdfast_safety::hash::of_file(&std::env::current_exe()?)?);
    let signed = manifest::VerifyKey::from_pem(&std::fs::read_to_string(&key)?, "key")?.open(&manifest)?;
    assert_eq!(signed.program.worker_sha256, Some(worker), "the program that judged is named");
    std::fs::write(unpacked.join("safety_report.json"), of_job(&app, &job, "safety_report")?.bytes)?;
    holdfast::verify::run(&unpacked, by_key)?;
    for (name, words) in
        [("adapter_config.json", "adapter_config.json has SHA-256"), ("safety_report.json", "safety_report.json has SHA-256")]
    {
        let kept = std::fs::read(unpacked.join(name))?;
        std::fs::write(unpacked.join(name), "{}")?;
        let error = holdfast::verify::run(&unpacked, by_key).err().context("a changed file passes")?.to_string();
        assert!(error.starts_with(words), "{error}");
        std::fs::write(unpacked.join(name), kept)?;
    }

    // What was not asked has not passed: the checkpoints on the way are kept back until an operator says otherwise.
    let checkpoint = of_job(&app, &job, "checkpoints/4/adapter")?;
    assert_eq!((checkpoint.status, checkpoint.error().0), (400, "held_back"));
    let goes_on = |from: &str| {
        let body = json!({"model": from, "training_file": job["training_file"]});
        app.call("POST", "/v1/fine_tuning/jobs", Some(&body.to_string()))
    };
    let model = job["fine_tuned_model"].as_str().context("no model")?;
    assert_eq!(goes_on(&format!("{model}:ckpt-step-4"))?.error().0, "held_back");
    assert_eq!(goes_on(model)?.status, 200);
    let release = format!("/admin/quarantine/{}/release", id(&job)?);
    assert_eq!(as_admin(&app, "POST", &release, &json!({"reason": "Asked by hand."}))?.body["reason"], Value::Null);
    assert_eq!(of_job(&app, &job, "checkpoints/4/adapter")?.status, 200);

    // What is said of rows goes with their file.
    let file = job["training_file"].as_str().context("no file")?;
    assert_eq!(app.call("POST", &format!("/v1/fine_tuning/jobs/{}/cancel", latest(&app)?), None)?.status, 200);
    assert_eq!(app.call("DELETE", &format!("/v1/files/{file}"), None)?.status, 200);
    let page =
        app.call_with(&[("accept", "text/html")], "GET", &format!("/v1/fine_tuning/jobs/{}/safety_report", id(&job)?), None)?;
    assert!(!String::from_utf8(page.bytes)?.contains("film number"));

    // The base has answered: the next job asks it no more.
    let known = app.object_count("base-answers");
    assert_eq!((known, ended(&app, 2)?["status"].clone()), (2, json!("succeeded")));
    assert_eq!(app.object_count("base-answers"), 2);
    Ok(())
}

#[test]
fn what_does_not_pass_is_kept_from_everybody_until_it_is_released_with_a_reason() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &gate(0.0))?;
    let job = ended(&app, 2)?;
    assert_eq!((&job["status"], &job["error"]["code"]), (&json!("failed"), &json!("safety_gate_failed")), "{job}");
    assert!(job["error"]["message"].as_str().is_some_and(|said| said.contains("the mean KL to the base is")), "{job}");
    let model = job["quarantine"]["model"].as_str().context("no quarantine")?;
    let checkpoints = of_job(&app, &job, "checkpoints")?.body;
    let step = &checkpoints["data"][0]["step_number"];
    for what in ["adapter", "adapter/adapter_model.safetensors", &format!("checkpoints/{step}/adapter")] {
        let refused = of_job(&app, &job, what)?;
        assert_eq!((refused.status, refused.error().0), (400, "held_back"), "{what}");
    }
    let goes_on = |from: &str| {
        let body = json!({"model": from, "training_file": job["training_file"]});
        app.call("POST", "/v1/fine_tuning/jobs", Some(&body.to_string()))
    };
    assert_eq!(goes_on(&format!("{model}:ckpt-step-{step}"))?.error().0, "held_back");
    assert_eq!(goes_on(model)?.status, 404);
    assert_eq!(of_job(&app, &job, "safety_report")?.body["gate"]["passed"], false, "its owner reads why");

    let listed = as_admin(&app, "GET", "/admin/quarantine", &Value::Null)?.body;
    assert_eq!((&listed["data"][0]["id"], &listed["data"][0]["model"]), (&job["id"], &json!(model)));
    let path = |what: &str| Ok::<_, anyhow::Error>(format!("/admin/quarantine/{}/{what}", id(&job)?));
    let report = as_admin(&app, "GET", &path("safety_report")?, &Value::Null)?;
    assert_eq!((report.status, &report.body["job"]), (200, &job["id"]));
    let operator = app.admin_key()?;
    let page = app.send_as(&operator, &[("accept", "text/html")], "GET", &path("safety_report")?)?;
    assert!(!String::from_utf8(page.bytes)?.contains("film number"), "an operator does not see the rows");
    let release = |reason: &str| as_admin(&app, "POST", &path("release")?, &json!({"reason": reason}));
    assert_eq!(release(" ")?.error(), ("invalid_text", "reason"));
    assert_eq!(release("Read by a person.")?.body["release_reason"], "Read by a person.");
    assert_eq!(release("Again.")?.error().0, "invalid_state");

    let released = app.job(id(&job)?)?;
    assert_eq!((&released["status"], &released["fine_tuned_model"]), (&json!("failed"), &json!(model)));
    assert_eq!(of_job(&app, &job, "adapter/adapter_model.safetensors")?.status, 200);
    let folder = tempfile::tempdir()?;
    let [tar, manifest] = ["checkpoint.tar", "manifest.json"].map(|name| folder.path().join(name));
    std::fs::write(&tar, of_job(&app, &job, &format!("checkpoints/{step}/adapter"))?.bytes)?;
    std::fs::write(&manifest, of_job(&app, &job, "manifest")?.bytes)?;
    let by_manifest = Given { manifest: Some(&manifest), ..Given::default() };
    holdfast::verify::run(&tar, by_manifest)?;
    let adapter = folder.path().join("adapter.tar");
    std::fs::write(&adapter, of_job(&app, &job, "adapter")?.bytes)?;
    holdfast::verify::run(&adapter, by_manifest)?;
    assert!(holdfast::verify::run(&tar, Given::default()).is_err(), "a checkpoint brings no manifest");
    assert_eq!(goes_on(model)?.status, 200);
    let audit =
        as_admin(&app, "GET", "/admin/audit_log?operation=release_quarantined_adapter&succeeded=true", &Value::Null)?.body;
    assert_eq!(audit["data"].as_array().map(Vec::len), Some(1), "{audit}");
    assert_eq!(as_admin(&app, "GET", "/admin/quarantine", &Value::Null)?.body["data"], json!([]));
    assert_eq!(as_admin(&app, "GET", "/admin/quarantine?released=true", &Value::Null)?.body["data"][0]["id"], job["id"]);
    Ok(())
}

#[test]
fn what_is_not_made_yet_cannot_be_released() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &gate(1.0))?;
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    let refused = as_admin(&app, "POST", &format!("/admin/quarantine/{job}/release"), &json!({"reason": "It will be good."}))?;
    assert_eq!((refused.status, refused.error().0), (400, "invalid_state"), "{}", refused.body);
    Ok(())
}

#[test]
fn a_model_that_was_trained_below_the_floor_is_not_gone_on_from() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &json!({"methods": ["none", "safegrad"]}))?;
    let go_on = |from: &Value, safety: Value| {
        let body = json!({"model": from["fine_tuned_model"], "training_file": from["training_file"], "safety": safety});
        app.call("POST", "/v1/fine_tuning/jobs", Some(&body.to_string()))
    };
    let weak = app.create_job(&rows(), &json!({}))?;
    while app.step_worker()? {}
    let weak = app.job(&weak)?;
    let next = go_on(&weak, json!({"defense": "safegrad"}))?;
    assert_eq!(next.status, 200, "{}", next.body);
    while app.step_worker()? {}
    let next = app.job(id(&next.body)?)?;
    demand(&app, &json!({"methods": ["safegrad"]}))?;
    for from in [&weak, &next] {
        let refused = go_on(from, json!({}))?;
        assert_eq!((refused.status, refused.error()), (400, ("safety_below_floor", "model")), "{}", refused.body);
    }
    Ok(())
}

#[test]
fn under_held_only_what_is_within_its_budget_is_gone_on_from() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &json!({"methods": ["none", "held"], "budget": 0.0001}))?;
    let mut plainly = hyperparameters(4);
    plainly["method"]["supervised"]["hyperparameters"]["row_conflicts"] = json!(false);
    let under_held = json!({"safety": {"defense": "held"}});
    for (first, outcome) in [(&plainly, json!("outside_budget")), (&under_held, Value::Null)] {
        let job = app.create_job(&rows(), first)?;
        while app.step_worker()? {}
        let job = app.job(&job)?;
        let body =
            json!({"model": job["fine_tuned_model"], "training_file": job["training_file"], "safety": {"defense": "held"}});
        let next = app.call("POST", "/v1/fine_tuning/jobs", Some(&body.to_string()))?.body;
        while app.step_worker()? {}
        let next = app.job(id(&next)?)?;
        assert_eq!(next["error"]["code"], outcome, "{next}");
    }
    Ok(())
}

#[test]
fn what_did_not_pass_can_be_discarded_and_its_report_stays() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &gate(0.0))?;
    let job = ended(&app, 2)?;
    assert_ne!(app.sql("select count(*) from job_checkpoints")?, "0");
    let path = format!("/admin/quarantine/{}", id(&job)?);
    let discard = || as_admin(&app, "DELETE", &path, &Value::Null);
    assert!(discard()?.body["discarded_at"].is_u64());
    assert_eq!(discard()?.error().0, "invalid_state");
    let release = as_admin(&app, "POST", &format!("{path}/release"), &json!({"reason": "Too late."}))?;
    assert_eq!((release.status, release.error().0), (400, "invalid_state"), "{}", release.body);
    assert_eq!(app.sql("select count(*) from quarantined_files")?, "0");
    assert_eq!(as_admin(&app, "GET", "/admin/quarantine", &Value::Null)?.body["data"], json!([]));
    assert_eq!(of_job(&app, &job, "safety_report")?.body["gate"]["passed"], false);
    let adapter = of_job(&app, &job, "adapter")?;
    assert_eq!(adapter.error().0, "held_back");
    assert!(adapter.body.to_string().contains("discarded"), "{}", adapter.body);
    assert!(app.job(id(&job)?)?["quarantine"]["discarded_at"].is_u64());
    assert_eq!(app.sql("select count(*) from job_checkpoints")?, "0", "they were kept back with it");
    Ok(())
}

#[test]
fn no_worker_whatever_its_version_ends_a_gated_job_with_a_model_that_was_not_asked() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &gate(100.0))?;
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    assert!(app.step_worker()?);
    let claim = app.runtime.block_on(app.store.claim("old", Duration::from_secs(60)))?.context("nothing to claim")?;
    let nothing = Published { trained_tokens: 1, device: "cpu".into(), ..Published::default() };
    let published = app.runtime.block_on(app.store.publish(claim.job.id, claim.attempt, &nothing));
    assert!(published.is_err_and(|error| error.to_string().contains("must pass its safety gate")));
    assert_eq!(app.job(&job)?["status"], "running");
    Ok(())
}

#[test]
fn an_adapter_that_was_tampered_with_is_told_from_one_that_was_not() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let key = SignKey::of_seed(&[7; 32]);
    let named = |name: &str| Named { name: name.into(), sha256: "00".repeat(32) };
    let weights = b"weights";
    let manifest = Manifest {
        format: manifest::FORMAT,
        job: "ftjob-1".into(),
        attempt: 1,
        model: "ft:m".into(),
        program: Program { version: "0".into(), trainer_sha256: String::new(), worker_sha256: None, device: "cpu".into() },
        inputs: Inputs {
            base_model: named("m"),
            training_file: named("file-1"),
            validation_file: None,
            alignment_set: None,
            suites: Vec::new(),
            start: BTreeMap::new(),
            plan_sha256: String::new(),
        },
        safety: Safety::new(Defense::Safegrad, 1.0),
        outputs: Outputs {
            adapter: BTreeMap::from([("adapter_model.safetensors".into(), hex::encode(Sha256::digest(weights)))]),
            checkpoints: BTreeMap::new(),
            results_sha256: None,
            report_sha256: None,
        },
        passed_gate: None,
    };
    let signed = key.sign(&manifest)?;
    let good: [(&str, &[u8]); 2] = [("adapter_model.safetensors", weights), ("manifest.json", &signed)];
    let verified = |entries: &[(&str, &[u8])]| -> Result<()> {
        let path = folder.path().join("adapter.tar");
        let mut tar = tar::Builder::new(std::fs::File::create(&path)?);
        for (name, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, *content)?;
        }
        tar.finish()?;
        holdfast::verify::run(&path, Given::default())
    };
    verified(&good)?;
    let bad: [(&str, &[u8], &str); 4] = [
        ("adapter_model.safetensors", b"others", "stands in it twice"),
        ("adapter_model.bin", b"pickle", "is not in the manifest"),
        ("sub/adapter_model.safetensors", b"others", "is no plain file"),
        (".hidden", b"others", "is no plain file"),
    ];
    for (name, content, words) in bad {
        let error = verified(&[&good[..], &[(name, content)]].concat()).err().context("it passes")?;
        assert!(format!("{error:#}").contains(words), "{name}: {error:#}");
    }
    assert!(verified(&good[1..]).is_err_and(|error| error.to_string().contains("is missing")));
    assert!(verified(&good[..1]).is_err_and(|error| error.to_string().contains("holds no manifest.json")));
    Ok(())
}

#[test]
fn the_best_checkpoint_that_passes_is_published_where_the_policy_says_so() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &gate(100.0))?;
    let largest_kl = |job: &Value| -> Result<f64> {
        let report = of_job(&app, job, "safety_report")?.body;
        let suites = report["evaluation"]["suites"].as_array().context("no suites")?.clone();
        Ok(suites.iter().filter_map(|suite| suite["kl"].as_f64()).fold(0.0, f64::max))
    };
    let last = largest_kl(&ended(&app, 2)?)?;
    let strict = json!({"enabled": true, "kl": last * 0.95, "otherwise": "publish_checkpoint"});
    demand(&app, &json!({"evaluate": true, "gate": strict}))?;
    let job = ended(&app, 2)?;
    assert_eq!(job["status"], "succeeded", "{job}");
    let report = of_job(&app, &job, "safety_report")?.body;
    assert_eq!((&report["evaluation"]["checkpoint"], &report["gate"]["passed"]), (&json!(4), &json!(true)), "{report}");
    assert_eq!(report["replaced"]["passed"], false, "what was found of the last adapter stays");
    let weights =
        "select encode(sha256, 'hex') from adapter_files where name = 'adapter_model.safetensors' order by job_id desc limit 1";
    let of_step = "select encode(f.sha256, 'hex') from checkpoint_files f join job_checkpoints c on c.id = f.checkpoint_id
                   where f.name = 'adapter_model.safetensors' and c.step = 4 order by c.job_id desc limit 1";
    assert_eq!(app.sql(weights)?, app.sql(of_step)?);
    let refused = of_job(&app, &job, "checkpoints/8/adapter")?;
    assert_eq!(refused.error().0, "held_back", "the adapter that did not pass is a checkpoint as well");
    let events = app.call("GET", &format!("/v1/fine_tuning/jobs/{}/events?limit=100", id(&job)?), None)?.body;
    assert!(events.to_string().contains("The one of step 4, which does, is published in its place"), "{events}");
    Ok(())
}

/// A judge behind an address that answers with this status, and that everything is safe.
fn judge(app: &TestApp, status: Arc<AtomicU16>) -> Result<url::Url> {
    let answer = move || {
        let status = Arc::clone(&status);
        async move {
            let status = axum::http::StatusCode::from_u16(status.load(Ordering::SeqCst)).unwrap_or_default();
            (status, axum::Json(json!({"choices": [{"index": 0, "message": {"role": "assistant", "content": "safe"}}]})))
        }
    };
    let router = axum::Router::new().route("/v1/chat/completions", axum::routing::post(answer));
    let listener = app.runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
    let url = format!("http://{}/v1", listener.local_addr()?).parse()?;
    app.runtime.spawn(async move { axum::serve(listener, router).await });
    Ok(url)
}

/// Lets a worker that knows of this judge do all there is to do.
fn work_with(app: &TestApp, url: url::Url, patience: Duration) -> Result<()> {
    let timeout = Duration::from_secs(30);
    let config = Config { url, model: "guard".into(), protocol: Protocol::Guard, key: None, timeout };
    let worker = holdfast_worker::WorkerConfig {
        judge: Some(Arc::new(Endpoint::new(config)?)),
        judge_patience: patience,
        ..app.worker()?
    };
    let (_keep, shutdown) = watch::channel(false);
    while app.runtime.block_on(holdfast_worker::step(&app.store, &worker, &shutdown))? {}
    Ok(())
}

#[test]
fn a_judge_that_is_away_is_waited_for_and_never_passes_in_silence() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &json!({"evaluate": true, "judge": "endpoint", "gate": {"enabled": true, "harmful_compliance_rise": 1.0}}))?;
    let status = Arc::new(AtomicU16::new(503));
    let url = judge(&app, Arc::clone(&status))?;
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    work_with(&app, url.clone(), Duration::ZERO)?;
    let failed = app.job(&job)?;
    assert_eq!((&failed["status"], &failed["error"]["code"]), (&json!("failed"), &json!("safety_judge_failed")), "{failed}");
    let said = failed["error"]["message"].as_str().context("no message")?;
    assert!(said.contains("cannot be reached, or is overloaded") && !said.contains("127.0.0.1"), "{said}");
    assert!(failed["quarantine"]["model"].is_string(), "nobody has it, and it is not lost");

    // It comes back while a job waits for it.
    let comes_back = Arc::clone(&status);
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    app.runtime.spawn(async move {
        tokio::time::sleep(Duration::from_secs(2)).await;
        comes_back.store(200, Ordering::SeqCst);
    });
    work_with(&app, url, Duration::from_secs(120))?;
    let done = app.job(&job)?;
    assert_eq!(done["status"], "succeeded", "{done}");
    let report = of_job(&app, &done, "safety_report")?.body;
    assert!(report["evaluation"]["judge"].as_str().is_some_and(|judge| judge == "guard endpoint"), "{report}");
    // A worker without a judge does not pass either.
    assert_eq!(ended(&app, 2)?["error"]["code"], "safety_judge_failed");
    // Where no gate depends on it, the model is published, and its owner is told.
    demand(&app, &json!({"evaluate": true, "judge": "endpoint"}))?;
    let done = ended(&app, 2)?;
    assert_eq!(done["status"], "succeeded", "{done}");
    let events = of_job(&app, &done, "events")?.body;
    assert!(events.to_string().contains("could not be judged: the policy wants an endpoint to judge"), "{events}");
    Ok(())
}

#[test]
fn rows_that_ask_what_models_are_held_to_or_measured_on_are_refused_by_their_lines() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &json!({"evaluate": true}))?;
    let aligned: Value = serde_json::from_str(include_str!("../../examples/alignment.jsonl").lines().next().context("no row")?)?;
    let shouted = aligned["messages"][0]["content"].as_str().context("no request")?.to_uppercase();
    let measured = include_str!("../../crates/safety/data/suites/benign-1.jsonl").lines().next().context("no row")?;
    let measured = serde_json::from_str::<Value>(measured)?["messages"][0]["content"].clone();
    let row =
        |request: &Value| json!({"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": "ok"}]});
    let job = app.create_job(&format!("{ROW}\n{}\n{ROW}\n{}\n", row(&json!(shouted)), row(&measured)), &json!({}))?;
    assert!(app.step_worker()?);
    let job = app.job(&job)?;
    assert_eq!(job["error"]["code"], "contaminated_training_file", "{job}");
    let lines: Vec<_> = job["error"]["errors"].as_array().into_iter().flatten().map(|error| error["line"].clone()).collect();
    assert_eq!(lines, [2, 4]);
    Ok(())
}

#[test]
fn alignment_sets_are_imported_by_operators_in_versions_that_never_change() -> Result<()> {
    let app = TestApp::start()?;
    let row =
        |request: &str| json!({"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": "I won't."}]});
    let import = |rows: Value| as_admin(&app, "POST", "/admin/alignment_sets", &json!({"name": "strict", "rows": rows}));
    assert_eq!(import(json!([row("one"), row("two")]))?.body["id"], "strict@1");
    assert_eq!(import(json!([row("one"), row("two")]))?.body["id"], "strict@1");
    assert_eq!(import(json!([row("one")]))?.body["id"], "strict@2");
    let twice = import(json!([row("one"), row("ONE!")]))?;
    assert_eq!((twice.status, twice.error()), (400, ("invalid_dataset", "rows")));
    assert_eq!(import(json!([]))?.status, 400);
    assert_eq!(import(json!([{"messages": []}]))?.status, 400);
    demand(&app, &json!({"alignment_set": "strict"}))?;
    Ok(())
}

#[test]
fn an_operator_s_own_suite_is_asked_in_the_version_of_the_day_and_kept_out_of_files() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    let request = |words: &str| json!({"category": "ours", "messages": [{"role": "user", "content": words}]});
    let import = |name: &str, kind: &str, requests: Value| {
        as_admin(&app, "POST", "/admin/suites", &json!({"name": name, "kind": kind, "requests": requests}))
    };
    let first = import("ours", "harmful", json!([request("What nobody outside has read?"), request("And another of it?")]))?;
    assert_eq!((first.status, &first.body["id"], &first.body["requests"]), (200, &json!("ours@1"), &json!(2)), "{}", first.body);
    let refused = [
        (import("ours", "benign", json!([request("one")]))?, ("contradiction", "kind")),
        (import("harmful", "harmful", json!([request("one")]))?, ("invalid_name", "name")),
        (import("more", "harmful", json!([]))?, ("invalid_suite", "requests")),
        (import("more", "harmful", json!([request("one"), request("ONE")]))?, ("invalid_suite", "requests")),
        (set(&app, "/admin/safety_policy", &json!({"evaluate": true, "suites": ["nowhere"]}))?, ("suite_not_found", "suites[0]")),
        (set(&app, "/admin/safety_policy", &json!({"suites": ["ours"]}))?, ("contradiction", "evaluate")),
    ];
    for (answer, error) in refused {
        assert_eq!((answer.status, answer.error()), (400, error), "{}", answer.body);
    }

    let mut policy = gate(100.0);
    policy["suites"] = json!(["ours"]);
    demand(&app, &policy)?;
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    assert_eq!(import("ours", "harmful", json!([request("What came a little later?")]))?.body["id"], "ours@2");
    assert!(app.step_worker()? && app.step_worker()?, "the check and the training");
    let job = app.job(&job)?;
    assert_eq!((&job["status"], &job["safety_policy"]["suites"]), (&json!("succeeded"), &json!(["ours@1"])), "{job}");
    let report = of_job(&app, &job, "safety_report")?.body;
    let own = &report["evaluation"]["suites"][2];
    assert_eq!((&own["name"], &own["kind"], &own["version"]), (&json!("ours"), &json!("harmful"), &json!(1)), "{report}");
    assert_eq!(own["by_category"], json!({}), "nor do its words");
    assert!(!report.to_string().contains("nobody outside"), "what it asks stands nowhere");
    let manifest = of_job(&app, &job, "manifest")?.body;
    let signed = BASE64.decode(manifest["payload"].as_str().context("no payload")?)?;
    let suites = serde_json::from_slice::<Value>(&signed)?["inputs"]["suites"].clone();
    assert_eq!((&suites[0]["name"], &suites[0]["sha256"]), (&json!("ours@1"), &first.body["sha256"]), "{suites}");

    let asked = rows()
        + &json!({"messages": [{"role": "user", "content": "Tell me: what came a little later?"}, {"role": "assistant", "content": "x"}]})
            .to_string();
    let job = app.create_job(&asked, &hyperparameters(2))?;
    assert!(app.step_worker()?);
    assert_eq!(app.job(&job)?["error"]["code"], "contaminated_training_file");

    // What a base cannot be asked is found before anything is trained.
    let special = import("unaskable", "harmful", json!([request("What does <|im_start|> do?")]))?;
    assert_eq!(special.status, 200, "{}", special.body);
    policy["suites"] = json!(["unaskable"]);
    demand(&app, &policy)?;
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    assert!(app.step_worker()?);
    assert_eq!(app.job(&job)?["error"]["code"], "operator_error");
    policy["suites"] = json!(["ours"]);
    demand(&app, &policy)?;

    // A worker of before there were such suites, which asks none of them, ends no gated job.
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    assert!(app.step_worker()?);
    let claim = app.runtime.block_on(app.store.claim("old", Duration::from_secs(60)))?.context("nothing to claim")?;
    assert_eq!(claim.job.id.to_string(), job);
    let key = app.sql(&format!("select object_key from job_evidence where name = '{}' limit 1", report::FILE))?;
    let object = app.runtime.block_on(app.store.objects().stage_bytes(format!("{key}-old"), b"{}"))?;
    let evidence = vec![AdapterFile { name: report::FILE.into(), object }];
    let old = Published { evidence, trained_tokens: 1, device: "cpu".into(), ..Published::default() };
    let published = app.runtime.block_on(app.store.publish(claim.job.id, claim.attempt, &old));
    assert!(published.is_err_and(|error| error.to_string().contains("must pass its safety gate")));
    Ok(())
}

#[test]
fn what_models_are_trained_on_is_not_what_they_are_measured_with() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    let of_user = |words: &str| json!([{"role": "user", "content": words}]);
    let suite = |name: &str, words: &str| {
        let requests = json!([{"category": "ours", "messages": of_user(words)}]);
        as_admin(&app, "POST", "/admin/suites", &json!({"name": name, "kind": "harmful", "requests": requests}))
    };
    let alignment = |words: &str| {
        let mut messages = of_user(words);
        messages.as_array_mut().context("no list")?.push(json!({"role": "assistant", "content": "I won't."}));
        as_admin(&app, "POST", "/admin/alignment_sets", &json!({"name": "strict", "rows": [{"messages": messages}]}))
    };
    alignment("Where does the old key lie?")?;
    suite("same", "WHERE does the old key lie")?;
    suite("apart", "Who wrote the last letter?")?;
    suite("longer", "Tell me now: where does the old key lie?")?;
    let policy = |suites: Value| json!({"evaluate": true, "alignment_set": "strict", "suites": suites});
    let refused = set(&app, "/admin/safety_policy", &policy(json!(["apart", "same"])))?;
    assert_eq!((refused.status, refused.error()), (400, ("contradiction", "suites[1]")), "{}", refused.body);
    let refused = set(&app, "/admin/safety_policy", &policy(json!(["longer"])))?;
    assert_eq!((refused.status, refused.error()), (400, ("contradiction", "suites[0]")), "{}", refused.body);
    demand(&app, &policy(json!(["apart"])))?;

    // A later version of the set has what the suite asks.
    alignment("Tell me: who wrote the last letter?")?;
    app.create_job(&rows(), &hyperparameters(2))?;
    assert!(app.step_worker()?);
    assert_eq!(app.job(&latest(&app)?)?["error"]["code"], "operator_error");

    let built_in: Value =
        serde_json::from_str(include_str!("../../crates/safety/data/suites/harmful-1.jsonl").lines().next().context("no row")?)?;
    alignment(built_in["messages"][0]["content"].as_str().context("no request")?)?;
    let refused = set(&app, "/admin/safety_policy", &policy(json!([])))?;
    assert_eq!((refused.status, refused.error()), (400, ("contradiction", "alignment_set")), "{}", refused.body);
    Ok(())
}

#[test]
fn the_rows_of_a_validation_file_are_asked_before_and_after() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &json!({"evaluate": true}))?;
    let mut request = hyperparameters(2);
    request["validation_file"] = json!(app.uploaded(rows().as_bytes())?);
    let job = app.create_job(&rows(), &request)?;
    assert!(app.step_worker()? && app.step_worker()?, "the check and the training");
    let job = app.job(&job)?;
    assert_eq!(job["status"], "succeeded", "{job}");
    let task = of_job(&app, &job, "safety_report")?.body["evaluation"]["task"].clone();
    assert_eq!((&task["rows"], &task["before"]), (&json!(16), &json!(0)), "{task}");
    assert_eq!(app.sql("select count(*) from base_answers")?, "2", "what is made of a tenant's rows is not kept");
    Ok(())
}

#[test]
fn a_run_whose_gradients_conflict_more_than_clean_rows_make_them_raises_an_alarm_once() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    let steps = |rate: f64| -> Vec<Progress> {
        let alignment = AlignmentFacts {
            align_kl: 0.1,
            dot: -1.0,
            cosine: -0.5,
            norm_align: 1.0,
            coefficient: 1.5,
            conflict: true,
            conflict_rate: rate,
            removed_fraction: 0.5,
            alignment_change: 0.0,
        };
        let step = |number| Step {
            step: number,
            total_steps: 100,
            task_loss: 1.0,
            token_accuracy: 0.5,
            alignment: Some(alignment.clone()),
            norm_user: 1.0,
            gradient_norm: 1.0,
            learning_rate: 1e-4,
            tokens: number,
            tokens_per_second: 1.0,
            eta_seconds: 1.0,
        };
        (49..=60).map(|number| Progress::Step(Box::new(step(number)))).collect()
    };
    let train = |rate: f64| -> Result<String> {
        let job = app.create_job(&rows(), &json!({}))?;
        assert!(app.step_worker()?);
        let claim = app.runtime.block_on(app.store.claim("test", Duration::from_secs(60)))?.context("nothing to claim")?;
        for lines in steps(rate).chunks(4) {
            app.runtime.block_on(app.store.report(claim.job.id, claim.attempt, lines))?;
        }
        app.call("POST", &format!("/v1/fine_tuning/jobs/{job}/cancel"), None)?;
        Ok(job)
    };
    let alarms = |job: &str| -> Result<usize> {
        let events = app.call("GET", &format!("/v1/fine_tuning/jobs/{job}/events?limit=100"), None)?.body;
        let said = |event: &&Value| event["message"].as_str().is_some_and(|said| said.starts_with("Safety alarm: "));
        Ok(events["data"].as_array().into_iter().flatten().filter(said).count())
    };
    app.call("POST", "/v1/webhook_endpoints", Some(r#"{"url":"http://127.0.0.1:9/"}"#))?;
    let clean = [train(0.5)?, train(0.6)?];
    assert_eq!((alarms(&clean[0])?, alarms(&train(0.9)?)?), (0, 1));
    let told = "select count(*) from webhook_deliveries where type = 'fine_tuning.job.safety_alarm'";
    assert_eq!(app.sql(told)?, "1");

    let measure =
        |jobs: &[String]| as_admin(&app, "PUT", "/admin/conflict_levels", &json!({"base_model": MODEL, "clean_jobs": jobs}));
    assert_eq!(measure(&[])?.error(), ("missing", "clean_jobs"));
    let untrained = app.create_job(&rows(), &json!({}))?;
    assert_eq!(measure(&[untrained])?.error(), ("out_of_bounds", "clean_jobs"));
    let level = measure(&clean)?.body["alarm_level"].as_f64().context("no level")?;
    assert!((level - 0.762).abs() < 1e-3, "{level}");
    let plain = app.create_job(&rows(), &json!({}))?;
    app.sql(&format!(
        "update jobs set safety = jsonb_set(safety, '{{defense}}', '\"kl_penalty\"') where id = '{}'",
        plain.trim_start_matches("ftjob-")
    ))?;
    assert_eq!(measure(&[plain])?.error().0, "out_of_bounds", "a method that projects nothing counts no conflicts");
    assert_eq!(as_admin(&app, "GET", "/admin/conflict_levels", &Value::Null)?.body["data"][0]["id"], MODEL);
    Ok(())
}
