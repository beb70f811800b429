//! Real clients, unmodified, against the real service.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use holdfast_tests::{MODEL, TestApp};
use tokio::sync::watch;

#[test]
fn the_openai_python_sdk_takes_a_job_from_file_to_adapter() -> Result<()> {
    let app = TestApp::with_model()?;
    let (stop, shutdown) = watch::channel(false);
    let worker = app.runtime.spawn(holdfast_worker::run(app.store.clone(), app.worker()?, shutdown));
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = repository.join(".venv/bin/python");
    ensure!(python.exists(), "{} is missing; run `cargo xtask setup`", python.display());
    let output = Command::new(python)
        .arg(repository.join("tests/sdk/openai_python.py"))
        .env("OPENAI_BASE_URL", format!("{}/v1", app.url))
        .env("OPENAI_API_KEY", &app.key)
        .env("HOLDFAST_MODEL", MODEL)
        .output()?;
    stop.send(true)?;
    app.runtime.block_on(worker)??;
    ensure!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok(())
}
