//! The service under random faults: see `tests/harness/chaos`.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Figure, Wanted};
use crate::setup::{self, Libtorch};
use crate::shell::{self, cargo, run as run_command};

pub(super) fn run(wanted: &Wanted<'_>, figures: &mut Vec<Figure>) -> Result<()> {
    setup::run(Libtorch::Cpu)?;
    setup::what_makes_clocks_jump()?;
    let programs = shell::build_release()?;
    run_command(cargo().args(["build", "--release", "--quiet", "-p", "holdfast-tests", "--bins"]))?;
    let mut chaos = Command::new(programs.join("chaos"))
        .args(["--seed", &wanted.seed.to_string(), "--minutes", &wanted.minutes.to_string()])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut last = String::new();
    for line in BufReader::new(chaos.stdout.take().context("no output")?).lines() {
        last = line?;
        if !last.starts_with('{') {
            println!("{last}");
        }
    }
    ensure!(chaos.wait()?.success(), "something was lost");
    let found: Value = serde_json::from_str(&last)?;
    let figure = |name: &str| found[name].as_f64().with_context(|| format!("no {name}"));
    figures.push(Figure::at_least("chaos_faults", figure("faults")?, 200.0));
    figures.push(Figure::at_most("chaos_steps_again_over_checkpoint_interval", figure("steps_again")?, 1.0));
    figures.push(Figure::at_most("chaos_recovery_seconds", figure("recovery_seconds")?, figure("lease_seconds")? + 10.0));
    Ok(())
}
