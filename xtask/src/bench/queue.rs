//! How many jobs a second workers can claim and finish, with few and with many finished ones behind them.

use std::process::Command;

use anyhow::{Context, Result};
use holdfast_local_postgres::TemporaryPostgres;
use serde_json::Value;

use super::{Figure, Wanted, median};
use crate::shell::{self, cargo, output, run as run_command};

const FEW: u32 = 1_000;
const MANY: u32 = 1_000_000;
const WORKERS: [u32; 3] = [1, 8, 64];
const SECONDS: &str = "8";
/// Pairs of measurements; the median of their ratios counts.
const PAIRS: usize = 3;

pub(super) fn run(_: &Wanted<'_>, figures: &mut Vec<Figure>) -> Result<()> {
    run_command(cargo().args(["build", "--release", "--quiet", "-p", "holdfast-store", "--example", "bench-queue"]))?;
    let program = shell::target().join("release/examples/bench-queue");
    let postgres = TemporaryPostgres::start()?;
    let database = |finished: u32| -> Result<String> {
        let name = format!("finished_{finished}");
        output(Command::new("psql").args(["-q", "-d", &postgres.url(), "-c", &format!("create database {name}")]))?;
        let url = postgres.url().replacen("postgres:///holdfast", &format!("postgres:///{name}"), 1);
        println!("writing {finished} jobs that have ended");
        output(Command::new(&program).args(["fill", &url, &finished.to_string()]))?;
        Ok(url)
    };
    let (few, many) = (database(FEW)?, database(MANY)?);
    let rate = |url: &str, workers: u32| -> Result<f64> {
        let printed = output(Command::new(&program).args(["work", url, &workers.to_string(), SECONDS]))?;
        serde_json::from_slice::<Value>(&printed)?["finished_per_second"].as_f64().context("no figure")
    };
    for workers in WORKERS {
        let (mut rates, mut ratios) = (Vec::new(), Vec::new());
        for _ in 0..PAIRS {
            let (of_many, of_few) = (rate(&many, workers)?, rate(&few, workers)?);
            println!(
                "{workers:2} workers   behind {MANY} jobs {of_many:6.0} a second   behind {FEW} jobs {of_few:6.0}   {:.2}x",
                of_few / of_many
            );
            rates.push(of_many);
            ratios.push(of_few / of_many);
        }
        let (rate, ratio) = (median(&mut rates), median(&mut ratios));
        match workers {
            1 => figures.push(Figure::at_most("queue_1_worker_few_over_many", ratio, 1.3)),
            8 => {
                figures.push(Figure::at_least("queue_8_workers_jobs_per_second", rate, 500.0));
                figures.push(Figure::at_most("queue_8_workers_few_over_many", ratio, 1.3));
            }
            _ => {
                figures.push(Figure::at_least("queue_64_workers_jobs_per_second", rate, 500.0));
                figures.push(Figure::at_most("queue_64_workers_few_over_many", ratio, 1.3));
            }
        }
    }
    Ok(())
}
