//! How fast the check of a file's shape reads, on one core. What reads is `bench/structure/rows.rs`, built as it is deployed.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Figure, Wanted};
use crate::shell::{self, cargo, output};

/// Shapes of rows as the program names them, what they are, and the figure that stands for each.
const SHAPES: [(&str, &str, &str); 6] = [
    ("short", "chats with escapes and letters beyond ASCII", "structure_short_mb_per_second"),
    ("usual", "plain English", "structure_usual_mb_per_second"),
    ("chat", "chats with escapes and letters beyond ASCII", "structure_chat_mb_per_second"),
    ("long", "the same, long", "structure_long_mb_per_second"),
    ("escapes", "Russian, every letter an escape", "structure_escapes_mb_per_second"),
    ("tools", "chats that offer and call tools", "structure_tools_mb_per_second"),
];

/// Megabytes a second on one core that every shape must reach.
const BAR: f64 = 250.0;

pub(super) fn run(_: &Wanted<'_>, figures: &mut Vec<Figure>) -> Result<()> {
    shell::run(cargo().args(["build", "--release", "--quiet", "-p", "holdfast-dataset", "--example", "bench-structure"]))?;
    let printed = output(&mut Command::new(shell::target().join("release/examples/bench-structure")))?;
    let found: Value = serde_json::from_slice(&printed).context("it printed no JSON")?;
    println!("megabytes a second on one core, in 64 MiB of rows   the check   serde_json into nothing");
    for (shape, what, name) in SHAPES {
        let number = |key: &str| found[shape][key].as_f64().with_context(|| format!("the measurement of {shape} lacks {key}"));
        let (bytes, ours, peer) =
            (number("bytes_per_row")?, number("megabytes_per_second")?, number("serde_json_megabytes_per_second")?);
        println!("  {bytes:6.0} bytes a row, {what:43}   {ours:6.0}   {peer:6.0}   {:.2}x", ours / peer);
        figures.push(Figure::at_least(name, ours, BAR));
    }
    Ok(())
}
