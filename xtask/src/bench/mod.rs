//! What is measured, each bench by one command.

use anyhow::{Context, Result};

mod trainer;
mod upload;

struct Bench {
    name: &'static str,
    what: &'static str,
    run: fn() -> Result<Vec<Figure>>,
}

const BENCHES: [Bench; 2] = [
    Bench {
        name: "trainer",
        what: "time and memory of training beside PEFT, transformers and TRL (half an hour)",
        run: trainer::run,
    },
    Bench { name: "upload", what: "memory and time of the API while a file of 1 GiB streams in", run: upload::run },
];

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
        for Bench { name, what, .. } in BENCHES {
            println!("{name:10} {what}");
        }
        return Ok(());
    };
    let known = || BENCHES.map(|bench| bench.name).join(", ");
    let bench = BENCHES.iter().find(|bench| bench.name == name);
    let bench = bench.with_context(|| format!("there is no bench {name:?}; there are {}", known()))?;
    for Figure { name, measured, bar } in (bench.run)()? {
        println!("FIGURE {name} {measured:.3} {bar} {}", if measured <= bar { "ok" } else { "short" });
    }
    Ok(())
}
