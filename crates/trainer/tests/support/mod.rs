//! The imported real model, which `cargo xtask setup` downloads.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// Imports it into a folder of that name, once for each build of the tests: they may run in processes of their own.
pub(crate) fn import_model(name: &str) -> Result<PathBuf> {
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.models/SmolLM2-135M-Instruct.Q4_1.gguf");
    ensure!(gguf.exists(), "{} is missing; run `cargo xtask setup`", gguf.display());
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let lock = File::create(out.with_extension("lock"))?;
    lock.lock()?;
    let build = format!("{:?}", fs::metadata(std::env::current_exe()?)?.modified()?);
    let made_by = out.with_extension("made-by");
    if fs::read_to_string(&made_by).is_ok_and(|made| made == build) {
        return Ok(out);
    }
    let _ = fs::remove_dir_all(&out);
    fs::create_dir_all(&out)?;
    holdfast_import::import(&gguf, &out)?;
    fs::write(made_by, build)?;
    Ok(out)
}
