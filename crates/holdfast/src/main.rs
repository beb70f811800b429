//! `holdfast`: the control plane's one program.

use std::process::ExitCode;

use clap::Parser;
use holdfast::cli::Cli;
use holdfast::telemetry::Telemetry;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let telemetry = match Telemetry::start(&cli.telemetry) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("holdfast: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("holdfast: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(cli.run());
    // A check of a large file may still run; nothing waits for it any more.
    runtime.shutdown_background();
    telemetry.finish();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfast: {error:#}");
            ExitCode::FAILURE
        }
    }
}
