//! `holdfast-trainer`: trains one job folder, proves a model family against a reference, or answers prompts.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use holdfast_dataset::{ChatTokenizer, Row};
use holdfast_domain::exit::{self, ExitRecord};
use holdfast_domain::hyperparameters::Precision;
use holdfast_trainer::model::Model;
use holdfast_trainer::stop::Stop;
use holdfast_trainer::{adapter_files, allocator, device, generate, job, merge, oracle};

#[derive(Parser)]
#[command(version, about = "Trains a LoRA adapter under SafeGrad. Reads a job folder and writes into it; opens no socket.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train the job in JOB_DIR. Exit code: 0 done, 65 bad data, 70 internal, 75 stopped.
    Train {
        /// The folder with plan.json, the rows and the base model.
        job_dir: PathBuf,
    },
    /// Ask the adapter of the job in JOB_DIR what its evaluation.json names. Exit codes as of train.
    Evaluate {
        /// The folder, as train left it.
        job_dir: PathBuf,
    },
    /// Compute every figure of a reference case and print how far each is off; exit code 1 when one is too far.
    Oracle {
        /// A folder with the model, the adapter, case.json and case.safetensors.
        case_dir: PathBuf,
        /// Another config.json for the same model.
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Put an adapter into its base: a model of its own, in the base's numbers.
    Merge {
        /// The base model's folder, as `holdfast models import` made it.
        #[arg(long)]
        base: PathBuf,
        /// The adapter's folder.
        #[arg(long)]
        adapter: PathBuf,
        /// The folder to write; it must not exist.
        #[arg(long)]
        out: PathBuf,
    },
    /// Answer prompts greedily: one JSON row {"messages": […]} a line on standard input, one {"answer": …} a line on
    /// standard output.
    Generate {
        /// The base model's folder, as `holdfast models import` made it.
        #[arg(long)]
        base: PathBuf,
        /// An adapter's folder.
        #[arg(long)]
        adapter: Option<PathBuf>,
        /// The most tokens of an answer.
        #[arg(long, default_value_t = 64)]
        max_tokens: usize,
        /// Where to compute: cpu, cuda or cuda:N.
        #[arg(long, default_value = "cpu", env = "HOLDFAST_DEVICE")]
        device: String,
    },
}

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    // libtorch's messages carry a page of addresses; the first line says what is wrong.
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.to_string();
        eprintln!("{}", message.lines().find(|line| !line.starts_with("panicked at")).unwrap_or(&message));
    }));
    let outcome = match Cli::parse().command {
        Command::Train { job_dir } => return report(&job::run(&job_dir)),
        Command::Evaluate { job_dir } => return report(&job::evaluate(&job_dir)),
        Command::Oracle { case_dir, config } => check_oracle(&case_dir, config.as_deref()),
        Command::Merge { base, adapter, out } => merge::merge(&base, &adapter, &out).map(|()| true),
        Command::Generate { base, adapter, max_tokens, device } => {
            answer(&base, adapter.as_deref(), max_tokens, &device).map(|()| true)
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::from(exit::BAD_DATA)
        }
    }
}

fn report(record: &ExitRecord) -> ExitCode {
    if record.code != exit::DONE {
        eprintln!("{}", record.message);
    }
    ExitCode::from(record.code)
}

fn check_oracle(case: &Path, config: Option<&Path>) -> Result<bool> {
    let figures = oracle::check(case, config)?;
    let mut out = std::io::stdout().lock();
    for figure in &figures {
        writeln!(out, "{} {:.3e} {}", figure.name, figure.error, if figure.is_ok() { "ok" } else { "off" })?;
    }
    Ok(figures.iter().all(oracle::Figure::is_ok))
}

fn answer(base: &Path, adapter: Option<&Path>, max_tokens: usize, device: &str) -> Result<()> {
    let tokenizer = ChatTokenizer::load(base)?;
    let model = Model::load(base, device::kind(Precision::F32), device::parse(device)?)?;
    let adapter = adapter.map(|folder| adapter_files::read(folder, &model)).transpose()?;
    let mut prompts = Vec::new();
    for (number, line) in std::io::stdin().lock().lines().enumerate() {
        let line = line.context("cannot read standard input")?;
        let at = || format!("line {}", number + 1);
        let row = Row::parse_prompt(line.as_bytes()).with_context(at)?;
        prompts.push(tokenizer.encode_prompt(&row).with_context(at)?);
    }
    let stop_ids = &tokenizer.special_tokens.stop_ids;
    let answers = generate::greedy(&model, adapter.as_ref(), &prompts, stop_ids, max_tokens, &Stop::default())?;
    let mut out = std::io::stdout().lock();
    for answer in answers {
        let text = tokenizer.decode(&answer).map_err(anyhow::Error::msg)?;
        writeln!(out, "{}", serde_json::json!({ "answer": text }))?;
    }
    Ok(())
}
