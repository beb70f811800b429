//! What a data directory gets when it is first used.

use std::path::Path;

use anyhow::{Context, Result};
use holdfast_dataset::alignment_set;
use holdfast_store::keys::NewKey;
use holdfast_store::{Store, StoreError};

use crate::private_file;

/// The name of the alignment set every deployment begins with.
pub const ALIGNMENT_SET: &str = "default";
/// The name of the project every data directory begins with.
const PROJECT: &str = "default";

const ALIGNMENT_ROWS: &str = include_str!("../../../examples/alignment.jsonl");

/// Imports the alignment set this program ships with, when there is none of its name.
///
/// # Errors
/// When a store fails.
pub async fn ensure_alignment_set(store: &Store) -> Result<()> {
    match store.alignment_set(ALIGNMENT_SET).await {
        Ok(_) => Ok(()),
        Err(StoreError::NotFound) => {
            let rows = alignment_set::check(ALIGNMENT_ROWS.as_bytes()).rows;
            store.create_alignment_set(ALIGNMENT_SET, ALIGNMENT_ROWS.as_bytes(), rows).await?;
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Writes admin.key and project.key into `folder`, each readable by its owner alone, when they are not there.
///
/// # Errors
/// When a file cannot be written, or the database fails.
pub async fn ensure_keys(store: &Store, folder: &Path) -> Result<()> {
    for (name, is_admin) in [("admin.key", true), ("project.key", false)] {
        let path = folder.join(name);
        if path.exists() {
            continue;
        }
        let project = store.ensure_project(PROJECT).await?;
        let new = NewKey { name: name.into(), project: Some(project), is_admin, ..NewKey::default() };
        let (key, _) = store.create_key(&new, None).await?;
        let written = private_file::write(&path, format!("{}\n", key.reveal()).as_bytes());
        written.with_context(|| format!("cannot write {}", path.display()))?;
        println!("wrote {}", path.display());
    }
    Ok(())
}
