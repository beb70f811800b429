//! The imported real model, which `cargo xtask setup` downloads.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// Imports it into a folder of that name, once for each build of the tests: they may run in processes of their own.
pub(crate) fn import_model(name: &str) -> Result<PathBuf> {
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.models/SmolLM2-135M-Instruct.Q4_1.gguf");
    ensure!(gguf.exists(), "{} is missing; run `cargo xtask setup`", gguf.display());
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let build = std::fs::metadata(std::env::current_exe()?)?.modified()?;
    holdfast_import::import_once(&gguf, &out, &format!("{build:?}"))?;
    Ok(out)
}
