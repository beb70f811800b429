//! The commands the README names. Run as `cargo xtask COMMAND`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod checks;
mod contract;
mod demo;
mod progress;
mod service;
mod setup;
mod shell;
mod trainer;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Sets up, demonstrates and tests Holdfast.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing: system packages, libtorch, the demo's model and data. Quiet when there is nothing to do.
    Setup {
        /// Take the libtorch for NVIDIA GPUs (5 GB) instead of the one for CPUs.
        #[arg(long)]
        cuda: bool,
    },
    /// Fine-tune a real instruct model under SafeGrad through the REST API, and show what came of it.
    Demo,
    /// Every check and every test.
    Test,
    /// Run one bench: a small table, then a line `FIGURE <name> <measured> <bar> ok|short` for each figure it stands for.
    Bench {
        /// Its name.
        #[arg(required_unless_present = "list")]
        name: Option<String>,
        /// Only these parts of it, where it has parts; `--list` names them.
        parts: Vec<String>,
        /// What decides chance, where a bench has any.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// How long, where a bench is as long as one likes.
        #[arg(long, default_value_t = 10.0)]
        minutes: f64,
        /// The shorter form of a bench that has one.
        #[arg(long)]
        quick: bool,
        /// Of a bench of many runs, only those whose key holds this; may be given again.
        #[arg(long)]
        only: Vec<String>,
        /// Name the benches.
        #[arg(long)]
        list: bool,
    },
    /// Rewrite openapi.yaml from the code.
    Openapi {
        /// Change nothing; fail when openapi.yaml is stale.
        #[arg(long)]
        check: bool,
    },
    /// Renew the descriptions in .sqlx that queries are checked against at build time.
    Sqlx,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Setup { cuda } => setup::run(if cuda { setup::Libtorch::Cuda } else { setup::Libtorch::Cpu }),
        Command::Demo => demo::run(),
        Command::Test => checks::run(),
        Command::Bench { name, parts, seed, minutes, quick, only, .. } => {
            bench::run(name.as_deref(), &bench::Wanted { parts: &parts, seed, minutes, quick, only: &only })
        }
        Command::Openapi { check } => contract::openapi(check),
        Command::Sqlx => contract::sqlx(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
