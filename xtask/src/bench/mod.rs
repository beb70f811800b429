//! What is measured, each bench by one command.

use anyhow::{Context, Result, bail};

mod trainer;
mod upload;

/// Whether a part of a bench is to be run.
type Wanted<'a> = &'a dyn Fn(&str) -> bool;

struct Bench {
    name: &'static str,
    what: &'static str,
    /// What it is made of, where parts of it can be run alone.
    parts: &'static [&'static str],
    run: fn(Wanted<'_>, &mut Vec<Figure>) -> Result<()>,
}

const BENCHES: [Bench; 2] = [
    Bench {
        name: "trainer",
        what: "time and memory of training beside PEFT, transformers and TRL (half an hour)",
        parts: &trainer::PARTS,
        run: trainer::run,
    },
    Bench { name: "upload", what: "memory and time of the API while a file of 1 GiB streams in", parts: &[], run: upload::run },
];

/// A measured value and what it is held to.
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) measured: f64,
    /// The most it may be.
    pub(crate) bar: f64,
}

/// Runs the bench of that name, or only some of its parts; without a name, names them all.
pub(crate) fn run(name: Option<&str>, parts: &[String]) -> Result<()> {
    let Some(name) = name else {
        for Bench { name, what, parts, .. } in BENCHES {
            println!("{name:10} {what}");
            if !parts.is_empty() {
                println!("{:10} parts: {}", "", parts.join(", "));
            }
        }
        return Ok(());
    };
    let known = || BENCHES.map(|bench| bench.name).join(", ");
    let bench = BENCHES.iter().find(|bench| bench.name == name);
    let bench = bench.with_context(|| format!("there is no bench {name:?}; there are {}", known()))?;
    if let Some(unknown) = parts.iter().find(|part| !bench.parts.contains(&part.as_str())) {
        bail!("the bench {name:?} has no part {unknown:?}; it has {:?}", bench.parts);
    }
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| wanted == part);
    // What was measured before a failure is worth its lines.
    let mut figures = Vec::new();
    let outcome = (bench.run)(&wanted, &mut figures);
    for Figure { name, measured, bar } in figures {
        println!("FIGURE {name} {measured:.3} {bar} {}", if measured <= bar { "ok" } else { "short" });
    }
    outcome
}
