//! Files that are there whole or not at all.

use std::path::Path;

use anyhow::{Context, Result};

/// Writes a file aside and puts it in its place.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let unfinished = path.with_extension("partial");
    std::fs::write(&unfinished, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(std::fs::rename(unfinished, path)?)
}
