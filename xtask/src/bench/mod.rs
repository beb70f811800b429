//! What is measured, each bench by one command.

use anyhow::{Context, Result, bail};

mod chaos;
mod contract;
mod http;
mod judge;
mod queue;
mod safety;
mod structure;
mod trainer;
mod upload;

/// What of a bench is to be run, and how.
pub(crate) struct Wanted<'a> {
    /// Only these parts; all of them when there are none.
    pub(crate) parts: &'a [String],
    /// Where chance has a say, what decides it.
    pub(crate) seed: u64,
    /// Where a run is as long as one likes, how long.
    pub(crate) minutes: f64,
    /// The shorter form, where there is one.
    pub(crate) quick: bool,
    /// Where it is made of many runs, only those whose key holds one of these; all of them when there are none.
    pub(crate) only: &'a [String],
}

impl Wanted<'_> {
    fn has(&self, part: &str) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|wanted| wanted == part)
    }
}

struct Bench {
    name: &'static str,
    what: &'static str,
    /// What it is made of, where parts of it can be run alone.
    parts: &'static [&'static str],
    run: fn(&Wanted<'_>, &mut Vec<Figure>) -> Result<()>,
}

const BENCHES: [Bench; 9] = [
    Bench {
        name: "chaos",
        what: "workers, trainers, Postgres, the object store, the API and disks struck at random for --minutes, by --seed",
        parts: &[],
        run: chaos::run,
    },
    Bench {
        name: "contract",
        what: "the service held against openapi.yaml by Schemathesis, thoroughly, as tenant and as operator (twenty minutes)",
        parts: &[],
        run: contract::run,
    },
    Bench {
        name: "http",
        what: "the API beside a bare handler, over a million jobs, and with 256 readers of events (five minutes)",
        parts: &http::PARTS,
        run: http::run,
    },
    Bench {
        name: "judge",
        what: "how well the list of what refusals say knows them, on answers labelled by people (seconds)",
        parts: &[],
        run: judge::run,
    },
    Bench {
        name: "queue",
        what: "how many jobs a second 1, 8 and 64 workers claim and finish, with a thousand and a million ended ones behind them (five minutes)",
        parts: &[],
        run: queue::run,
    },
    Bench {
        name: "safety",
        what: "what fine-tuning leaves of a model's refusals under each method and attack (days; claim five to eleven hours, --quick less than an hour); goes on where it was broken off",
        parts: &safety::PARTS,
        run: safety::run,
    },
    Bench {
        name: "structure",
        what: "how fast the check of a file's shape reads, beside serde_json reading the same lines into nothing (a minute)",
        parts: &[],
        run: structure::run,
    },
    Bench {
        name: "trainer",
        what: "time and memory of training beside PEFT, transformers and TRL (half an hour)",
        parts: &trainer::PARTS,
        run: trainer::run,
    },
    Bench {
        name: "upload",
        what: "memory and time of the API while a file of 2 GiB comes in whole, and in 32 parts (two minutes)",
        parts: &[],
        run: upload::run,
    },
];

/// The middle one.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A measured value and what it is held to.
#[derive(Clone, Copy)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) measured: f64,
    pub(crate) bar: Bar,
}

/// Which side of a value is the good one.
#[derive(Clone, Copy)]
pub(crate) enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

impl Figure {
    pub(crate) fn at_most(name: &'static str, measured: f64, bar: f64) -> Self {
        Self { name, measured, bar: Bar::AtMost(bar) }
    }

    pub(crate) fn at_least(name: &'static str, measured: f64, bar: f64) -> Self {
        Self { name, measured, bar: Bar::AtLeast(bar) }
    }

    /// Whether there is a value; what is claimed and was not measured is not a number, and short.
    pub(crate) fn is_measured(&self) -> bool {
        !self.measured.is_nan()
    }

    /// Of this and another measurement of the same, the one that is further from the bar, or less beyond it.
    pub(crate) fn worse(&self, other: Self) -> Self {
        let is_worse = match self.bar {
            _ if !self.is_measured() => true,
            Bar::AtMost(_) => other.measured > self.measured,
            Bar::AtLeast(_) => other.measured < self.measured,
        };
        if is_worse { other } else { *self }
    }

    /// Its line, for programs.
    fn line(&self) -> String {
        let Self { name, measured, bar } = *self;
        let (value, met) = match bar {
            Bar::AtMost(bar) => (bar, measured <= bar),
            Bar::AtLeast(bar) => (bar, measured >= bar),
        };
        format!("FIGURE {name} {measured:.3} {value} {}", if met { "ok" } else { "short" })
    }
}

/// Runs the bench of that name, or only some of its parts; without a name, names them all.
pub(crate) fn run(name: Option<&str>, wanted: &Wanted<'_>) -> Result<()> {
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
    if let Some(unknown) = wanted.parts.iter().find(|part| !bench.parts.contains(&part.as_str())) {
        bail!("the bench {name:?} has no part {unknown:?}; it has {:?}", bench.parts);
    }
    // What was measured before a failure is worth its lines.
    let mut figures = Vec::new();
    let outcome = (bench.run)(wanted, &mut figures);
    for figure in figures {
        println!("{}", figure.line());
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_short_on_the_wrong_side_of_its_bar() {
        assert_eq!(Figure::at_most("time", 1.0, 1.0).line(), "FIGURE time 1.000 1 ok");
        assert_eq!(Figure::at_most("time", 1.1, 1.0).line(), "FIGURE time 1.100 1 short");
        assert_eq!(Figure::at_least("speed", 1.0, 1.0).line(), "FIGURE speed 1.000 1 ok");
        assert_eq!(Figure::at_least("speed", 0.9, 1.0).line(), "FIGURE speed 0.900 1 short");
        assert_eq!(Figure::at_least("speed", f64::NAN, 1.0).line(), "FIGURE speed NaN 1 short");
    }

    #[test]
    fn of_two_measurements_the_worse_counts_and_any_is_better_than_none() {
        let at_most = |measured| Figure::at_most("time", measured, 1.0);
        for (one, other, worse) in [(0.5, 0.7, 0.7), (0.7, 0.5, 0.7), (f64::NAN, 0.5, 0.5), (0.5, f64::NAN, 0.5)] {
            assert_eq!(at_most(one).worse(at_most(other)).measured, worse);
        }
        assert!(!at_most(f64::NAN).worse(at_most(f64::NAN)).is_measured());
        assert_eq!(Figure::at_least("speed", 2.0, 1.0).worse(Figure::at_least("speed", 1.5, 1.0)).measured, 1.5);
    }
}
