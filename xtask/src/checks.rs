//! Every check and every test, in the order in which they fail fastest.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::contract;
use crate::setup::{self, Libtorch};
use crate::shell::{self, cargo};

/// Runs all of them.
pub(crate) fn run() -> Result<()> {
    timed("set-up", || setup::run(Libtorch::Cpu).and_then(|()| setup::clients()).and_then(|()| setup::what_makes_clocks_jump()))?;
    timed("format", || shell::run(cargo().args(["fmt", "--all", "--check"])).context("run `cargo fmt --all`"))?;
    timed("deployment", deployment)?;
    // One build serves the tests and the programs they start.
    timed("build", || shell::run(cargo().args(["build", "--workspace", "--all-targets"])))?;
    timed("openapi.yaml", || contract::openapi(true))?;
    // Tests run side by side, and their trainers with them: two that take both cores each wait for each other at every step.
    timed("tests", || shell::run(cargo().args(["test", "--workspace"]).env("OMP_NUM_THREADS", "1").env("MKL_NUM_THREADS", "1")))?;
    timed("lints", || shell::run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])))
}

/// Holds the Dockerfile, the compose file, the manifests, the alerts and the guide to their formats and to the code.
fn deployment() -> Result<()> {
    let python = setup::deployment_python()?;
    shell::run(Command::new(python).arg("deploy/check.py").current_dir(shell::root()))
}

fn timed(what: &str, check: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("── {what}");
    let since = Instant::now();
    check()?;
    println!("── {what}: {:.0} s", since.elapsed().as_secs_f64());
    Ok(())
}
