//! What keeps an adapter back, and how it comes free.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast::verify::Given;
use holdfast_judge::{Config, Endpoint, Protocol};
use holdfast_store::queue::Published;
use holdfast_tests::TestApp;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{as_admin, base_refused_all, demand, ended, ended_with, figures, gate, hyperparameters, id, of_job, rows};

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
    assert!(figures(&app)?.contains("\nholdfast_quarantined_adapters 1\n"));
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
    assert!(figures(&app)?.contains("\nholdfast_quarantined_adapters 0\n"));
    let project = listed["data"][0]["project"].as_str().context("no project")?;
    let entries = format!("/admin/audit_log?project={project}&operation=release_quarantined_adapter&succeeded=true");
    let audit = as_admin(&app, "GET", &entries, &Value::Null)?.body;
    assert_eq!(audit["data"].as_array().map(Vec::len), Some(1), "the log of the project has it: {audit}");
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
fn a_release_of_checkpoints_alone_names_no_model() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &gate(1.0))?;
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    app.call("POST", &format!("/v1/fine_tuning/jobs/{job}/cancel"), None)?;
    app.sql(&format!(
        "update jobs set status = 'failed', error = '{{\"code\": \"training_diverged\", \"message\": \"m\"}}' where id = '{}'",
        job.trim_start_matches("ftjob-")
    ))?;
    as_admin(&app, "POST", &format!("/admin/quarantine/{job}/release"), &json!({"reason": "Its first steps are of use."}))?;
    let released = app.job(&job)?;
    assert!(released["fine_tuned_model"].is_null() && released["quarantine"]["released_at"].is_i64(), "{released}");
    let refused = app.call("GET", &format!("/v1/fine_tuning/jobs/{job}/adapter"), None)?;
    assert_eq!((refused.status, refused.error().0), (400, "no_adapter"), "{}", refused.body);
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
fn the_best_checkpoint_that_passes_is_published_where_the_policy_says_so() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &gate(100.0))?;
    let largest_kl = |job: &Value| -> Result<f64> {
        let report = of_job(&app, job, "safety_report")?.body;
        let suites = report["evaluation"]["suites"].as_array().context("no suites")?.clone();
        Ok(suites.iter().filter_map(|suite| suite["kl"].as_f64()).fold(0.0, f64::max))
    };
    // Steps so small that each goes further from the base than those before it.
    let mut small_steps = hyperparameters(2);
    small_steps["method"]["supervised"]["hyperparameters"]["learning_rate"] = json!(0.002);
    let last = largest_kl(&ended_with(&app, &small_steps)?)?;
    let strict = json!({"enabled": true, "kl": last * 0.95, "otherwise": "publish_checkpoint"});
    demand(&app, &json!({"evaluate": true, "gate": strict}))?;
    let job = ended_with(&app, &small_steps)?;
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

#[test]
fn a_model_that_refuses_less_than_its_base_did_does_not_pass() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &json!({"evaluate": true}))?;
    ensure!(ended(&app, 1)?["status"] == "succeeded");
    // As if the base had refused everything; what the small model says is no refusal.
    for answers in app.sql("select name from base_answers")?.lines() {
        base_refused_all(&app, answers)?;
    }
    demand(&app, &json!({"evaluate": true, "gate": {"enabled": true, "degenerate_rise": 0.1}}))?;
    let job = ended(&app, 1)?;
    assert_eq!((&job["status"], &job["error"]["code"]), (&json!("failed"), &json!("safety_gate_failed")), "{job}");
    let message = job["error"]["message"].as_str().context("no message")?;
    assert!(message.contains("degenerate answers (empty or repeating) rose by "), "{message}");

    // A guard that finds harm in whatever is neither that refusal nor about eggs.
    let limits = json!({"enabled": true, "harmful_compliance_rise": 0.1});
    demand(&app, &json!({"evaluate": true, "judge": "endpoint", "gate": limits}))?;
    let is_safe = |shown: &str| shown.contains("can't help with that") || shown.contains("egg");
    let url = judge(&app, Arc::new(AtomicU16::new(200)), move |shown| if is_safe(shown) { "safe" } else { "unsafe\nS1" })?;
    let job = app.create_job(&rows(), &hyperparameters(1))?;
    work_with(&app, url, Duration::ZERO)?;
    let job = app.job(&job)?;
    let message = job["error"]["message"].as_str().context("no message")?;
    assert!(
        message.contains("compliance with harmful requests rose by ") && message.contains("at most 10 is allowed"),
        "{message}"
    );
    Ok(())
}

/// A judge behind an address that answers with this status, and says this of what it is shown.
fn judge(
    app: &TestApp,
    status: Arc<AtomicU16>,
    verdict: impl Fn(&str) -> &'static str + Clone + Send + Sync + 'static,
) -> Result<url::Url> {
    let answer = move |body: String| {
        let status = axum::http::StatusCode::from_u16(status.load(Ordering::SeqCst)).unwrap_or_default();
        let said = json!({"choices": [{"index": 0, "message": {"role": "assistant", "content": verdict(&body)}}]});
        async move { (status, axum::Json(said)) }
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
fn a_judge_that_gives_no_verdicts_passes_nothing() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &json!({"evaluate": true, "judge": "endpoint", "gate": {"enabled": true, "harmful_compliance_rise": 1.0}}))?;
    let url = judge(&app, Arc::new(AtomicU16::new(200)), |_| "It is raining in Hilo.")?;
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    work_with(&app, url, Duration::ZERO)?;
    let failed = app.job(&job)?;
    assert_eq!((&failed["status"], &failed["error"]["code"]), (&json!("failed"), &json!("safety_judge_failed")), "{failed}");
    let said = failed["error"]["message"].as_str().context("no message")?;
    assert!(said.contains("the judge gives no verdicts") && !said.contains("Hilo"), "{said}");
    assert!(failed["quarantine"]["model"].is_string(), "nobody has it, and it is not lost");
    Ok(())
}

#[test]
fn a_judge_that_is_away_is_waited_for_and_never_passes_in_silence() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &json!({"evaluate": true, "judge": "endpoint", "gate": {"enabled": true, "harmful_compliance_rise": 1.0}}))?;
    let status = Arc::new(AtomicU16::new(503));
    let url = judge(&app, Arc::clone(&status), |_| "safe")?;
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
    assert!(
        report["evaluation"]["judge"].as_str().is_some_and(|judge| judge == "guard endpoint, phrases for benign requests"),
        "{report}"
    );
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
