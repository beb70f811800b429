//! Safety as operators demand it and tenants meet it.

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use holdfast_tests::{Answer, ROW, TestApp};
use serde_json::{Value, json};

mod evidence;
mod gate;
mod held_to;
mod policies;
mod secrecy;

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
    (0..16).map(|i| format!("{}\n", ROW.replace("a film of grace", &format!("{i} is film number {i}")))).collect()
}

/// Four steps an epoch.
fn hyperparameters(epochs: u32) -> Value {
    json!({"method": {"type": "supervised", "supervised": {"hyperparameters": {
        "n_epochs": epochs, "batch_size": 4, "precision": "f32", "max_length": 64, "learning_rate": 0.02, "row_conflicts": true}}}})
}

/// A job that has been worked on to its end.
fn ended(app: &TestApp, epochs: u32) -> Result<Value> {
    ended_with(app, &hyperparameters(epochs))
}

fn ended_with(app: &TestApp, hyperparameters: &Value) -> Result<Value> {
    let job = app.create_job(&rows(), hyperparameters)?;
    ensure!(app.step_worker()? && app.step_worker()?, "the check and the training");
    app.job(&job)
}

fn id(job: &Value) -> Result<&str> {
    job["id"].as_str().context("no id")
}

fn of_job(app: &TestApp, job: &Value, what: &str) -> Result<Answer> {
    app.call("GET", &format!("/v1/fine_tuning/jobs/{}/{what}", id(job)?), None)
}

/// What went into a job, as its manifest has it.
fn signed_inputs(app: &TestApp, job: &Value) -> Result<Value> {
    let manifest = of_job(app, job, "manifest")?.body;
    let signed = BASE64.decode(manifest["payload"].as_str().context("no payload")?)?;
    Ok(serde_json::from_slice::<Value>(&signed)?["inputs"].clone())
}

/// Lets a base have refused everything that a suite asks, whatever it said.
fn base_refused_all(app: &TestApp, answers: &str) -> Result<()> {
    let refusals = "{\"text\":\"I can't help with that.\",\"ids\":[1]}\n".repeat(120);
    app.sql(&format!("delete from base_answers where name = '{answers}'"))?;
    Ok(app.runtime.block_on(app.store.keep_base_answers(answers, refusals.as_bytes()))?)
}

/// What an operator's monitoring reads.
fn figures(app: &TestApp) -> Result<String> {
    Ok(String::from_utf8(as_admin(app, "GET", "/metrics", &Value::Null)?.bytes)?)
}

/// The newest job.
fn latest(app: &TestApp) -> Result<String> {
    Ok(id(&app.call("GET", "/v1/fine_tuning/jobs?limit=1", None)?.body["data"][0])?.to_owned())
}

/// A gate that a run of a random base passes whatever it learns, or never does.
fn gate(kl: f64) -> Value {
    json!({"evaluate": true, "gate": {"enabled": true, "kl": kl}})
}
