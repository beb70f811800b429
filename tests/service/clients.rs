//! Real clients, unmodified, against the real service.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use holdfast_store::keys::NewKey;
use holdfast_tests::{MODEL, ROW, TestApp};
use serde_json::json;
use tokio::sync::watch;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs `client` against a service with a worker.
fn run(app: &TestApp, client: &mut Command) -> Result<()> {
    let (stop, shutdown) = watch::channel(false);
    let worker = app.runtime.spawn(holdfast_worker::run(app.store.clone(), app.worker()?, shutdown));
    let output = client.output();
    stop.send(true)?;
    app.runtime.block_on(worker)??;
    let output = output?;
    ensure!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Runs a script of tests/sdk by a program that set-up has installed.
fn sdk(program: &str, script: &str, package: Option<&str>) -> Result<()> {
    let app = TestApp::with_model()?;
    let program = repository().join(program);
    ensure!(program.exists(), "{} is missing; `cargo xtask test` installs it", program.display());
    let mut client = Command::new(program);
    client
        .arg(repository().join("tests/sdk").join(script))
        .env("OPENAI_BASE_URL", format!("{}/v1", app.url))
        .env("OPENAI_API_KEY", &app.key)
        .env("HOLDFAST_ADMIN_KEY", app.admin_key()?)
        .env("HOLDFAST_MODEL", MODEL);
    if let Some(package) = package {
        client.env("OPENAI_PACKAGE", package);
    }
    run(&app, &mut client)
}

#[test]
fn the_newest_python_sdk_works() -> Result<()> {
    sdk(".venv/bin/python", "openai_python.py", None)
}

#[test]
fn the_oldest_python_sdk_works() -> Result<()> {
    sdk(".venv-oldest/bin/python", "openai_python.py", None)
}

#[test]
fn the_newest_node_sdk_works() -> Result<()> {
    sdk("tests/sdk/node_modules/.bin/node", "openai_node.mjs", None)
}

#[test]
fn the_node_sdk_before_it_works() -> Result<()> {
    sdk("tests/sdk/node_modules/.bin/node", "openai_node.mjs", Some("openai-6"))
}

/// The Node that set-up has installed, in the folder of its packages.
fn node() -> Result<Command> {
    let folder = repository().join("tests/sdk");
    let program = folder.join("node_modules/.bin/node");
    ensure!(program.exists(), "{} is missing; `cargo xtask test` installs it", program.display());
    let mut node = Command::new(program);
    node.current_dir(folder);
    Ok(node)
}

#[test]
fn a_client_generated_from_the_contract_is_typed_and_works() -> Result<()> {
    for tool in [
        &["node_modules/.bin/openapi-typescript", "../../openapi.yaml", "--output", "node_modules/.api.d.ts"][..],
        &["node_modules/.bin/tsc"],
    ] {
        let output = node()?.args(tool).output()?;
        let said = [output.stdout, output.stderr].concat();
        ensure!(output.status.success(), "{tool:?}: {}", String::from_utf8_lossy(&said));
    }
    let app = TestApp::with_model()?;
    let mut client = node()?;
    client.arg("generated.ts").env("HOLDFAST_URL", &app.url).env("HOLDFAST_KEY", &app.key).env("HOLDFAST_MODEL", MODEL);
    run(&app, &mut client)
}

/// Holds the service against openapi.yaml with requests that keep to it and requests that do not, with a job to call.
fn contract(is_admin: bool) -> Result<()> {
    let app = TestApp::with_model()?;
    let (project, _) = app.project_key("default")?;
    let job = app.create_job(ROW, &json!({"hyperparameters": {"n_epochs": 1}}))?;
    assert!(app.step_worker()? && app.step_worker()?, "the check and the training");
    let file = app.job(&job)?["training_file"].as_str().context("no file")?.to_owned();
    let program = repository().join(".venv-contract/bin/schemathesis");
    ensure!(program.exists(), "{} is missing; `cargo xtask test` installs it", program.display());
    let mut client = Command::new(program);
    client
        .args(["run", "--no-color", "../../openapi.yaml"])
        .current_dir(repository().join("tests/contract"))
        .env("HOLDFAST_URL", &app.url)
        .env("HOLDFAST_KEY", app.make_key(&NewKey { project: Some(project), is_admin, ..NewKey::default() })?)
        .env("HOLDFAST_JOB", job)
        .env("HOLDFAST_FILE", file)
        .env("HOLDFAST_MODEL", MODEL);
    // Without a worker: jobs that are made here are not trained.
    let output = client.output()?;
    ensure!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn a_tenant_s_every_answer_is_one_that_the_contract_names() -> Result<()> {
    contract(false)
}

#[test]
fn an_operator_s_every_answer_is_one_that_the_contract_names() -> Result<()> {
    contract(true)
}
