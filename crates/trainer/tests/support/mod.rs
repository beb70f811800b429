//! The imported real model, which `cargo xtask setup` downloads.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// Imports it into a folder of that name.
pub(crate) fn import_model(name: &str) -> Result<PathBuf> {
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.models/SmolLM2-135M-Instruct.Q4_1.gguf");
    ensure!(gguf.exists(), "{} is missing; run `cargo xtask setup`", gguf.display());
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&out);
    std::fs::create_dir_all(&out)?;
    holdfast_import::import(&gguf, &out)?;
    Ok(out)
}
