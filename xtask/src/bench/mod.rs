//! What is measured, each bench by one command.

use anyhow::{Context, Result};

mod upload;

/// Name, what it measures, and the bench.
const BENCHES: [(&str, &str, fn() -> Result<Vec<Figure>>); 1] =
    [("upload", "memory and time of the API while a file of 1 GiB streams in", upload::run)];

/// A measured value and what it is held to.
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) measured: f64,
    /// The most it may be.
    pub(crate) bar: f64,
}

/// Runs the bench of that name; without one, names them all.
pub(crate) fn run(name: Option<&str>) -> Result<()> {
    let Some(name) = name else {
        for (name, what, _) in BENCHES {
            println!("{name:10} {what}");
        }
        return Ok(());
    };
    let known = || BENCHES.map(|(name, ..)| name).join(", ");
    let (.., bench) = BENCHES
        .iter()
        .find(|bench| bench.0 == name)
        .with_context(|| format!("there is no bench {name:?}; there are {}", known()))?;
    for Figure { name, measured, bar } in bench()? {
        println!("FIGURE {name} {measured:.3} {bar} {}", if measured <= bar { "ok" } else { "short" });
    }
    Ok(())
}
