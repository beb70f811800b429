//! What is written from the code and committed: openapi.yaml, and the descriptions of queries.

use std::process::Command;

use anyhow::{Result, bail};

use crate::shell::{cargo, output, root, run, target};

/// Rewrites openapi.yaml, or fails when it is stale.
pub(crate) fn openapi(check: bool) -> Result<()> {
    let path = root().join("openapi.yaml");
    // Of the whole workspace, so that dependencies keep the features the other builds gave them and are not built again.
    run(cargo().args(["build", "--quiet", "--workspace", "--bin", "openapi"]))?;
    let written = output(&mut Command::new(target().join("debug/openapi")))?;
    if !check {
        return Ok(std::fs::write(path, written)?);
    }
    if std::fs::read(&path).unwrap_or_default() != written {
        bail!("openapi.yaml is stale; run `cargo xtask openapi` and commit it");
    }
    Ok(())
}

/// Has the compiler check every query against a database with all migrations, and keeps what it learns in .sqlx.
pub(crate) fn sqlx() -> Result<()> {
    let descriptions = root().join(".sqlx");
    let _ = std::fs::remove_dir_all(&descriptions);
    std::fs::create_dir_all(&descriptions)?;
    run(cargo().args(["build", "--quiet", "--workspace", "--bin", "with-postgres"]))?;
    let mut database = Command::new(target().join("debug/with-postgres"));
    database.current_dir(root());
    // The macros read the database while the store is compiled; touching it makes that happen.
    let steps = "for f in migrations/*.sql; do psql -q -v ON_ERROR_STOP=1 -d \"$DATABASE_URL\" -f $f || exit 1; done; touch crates/store/src/lib.rs && cargo check --quiet -p holdfast-store";
    run(database.args(["sh", "-c", steps]).env("SQLX_OFFLINE", "false").env("SQLX_OFFLINE_DIR", &descriptions))?;
    run(Command::new("git").args(["status", "--short", ".sqlx"]).current_dir(root()))
}
