//! The service held against openapi.yaml, far longer than the tests do it.

use std::process::Command;

use anyhow::Result;

use super::{Figure, Wanted};
use crate::service::Service;
use crate::setup::{self, Libtorch, MODEL};
use crate::shell;

/// Examples of each operation and kind of test.
const EXAMPLES: &str = "400";

pub(super) fn run(_: &Wanted<'_>, figures: &mut Vec<Figure>) -> Result<()> {
    setup::run(Libtorch::Cpu)?;
    setup::clients()?;
    let programs = shell::build_release()?;
    let data = shell::target().join("bench-contract");
    let _ = std::fs::remove_dir_all(&data);
    let service = Service::start_with(&programs.join("holdfast"), "up", &data)?;
    let mut import = Command::new(programs.join("holdfast"));
    import.env_remove("DATABASE_URL").env_remove("HOLDFAST_OBJECT_STORE").args(["models", "import"]);
    shell::output(import.arg(shell::root().join(MODEL)).args(["--name", "base", "--data-dir"]).arg(&data))?;
    let mut failed = 0.0;
    for key in ["project.key", "admin.key"] {
        let key = std::fs::read_to_string(data.join(key))?;
        let status = Command::new(shell::root().join(".venv-contract/bin/schemathesis"))
            .args(["run", "--no-color", "--max-examples", EXAMPLES, "../../openapi.yaml"])
            .current_dir(shell::root().join("tests/contract"))
            .env("HOLDFAST_URL", service.url())
            .env("HOLDFAST_KEY", key.trim())
            .status()?;
        failed += f64::from(u8::from(!status.success()));
    }
    service.stop()?;
    std::fs::remove_dir_all(&data)?;
    figures.push(Figure::at_most("contract_roles_with_findings", failed, 0.0));
    Ok(())
}
