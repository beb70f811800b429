//! `chaos --seed N --minutes M`: the service under random faults, see `holdfast_tests::chaos`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use holdfast_tests::LEASE;
use holdfast_tests::chaos::{self, Length};

#[derive(Parser)]
struct Cli {
    /// Decides which faults strike, in which order and when.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
}

fn main() -> ExitCode {
    let Cli { seed, minutes } = Cli::parse();
    let length = Length::Time(Duration::from_secs_f64(minutes.clamp(0.1, 10_000.0) * 60.0));
    match chaos::run(seed, length, &mut |line| println!("{line}")) {
        Ok(report) => {
            println!("{report}");
            println!(
                "{}",
                serde_json::json!({
                    "faults": report.faults(),
                    "steps_again": report.steps_again,
                    "steps_again_held_up": report.steps_again_held_up,
                    "lease_seconds": LEASE.as_secs(),
                    "recovery_seconds": report.recovery_seconds,
                })
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("chaos: seed {seed}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
