//! The API beside a bare handler, over many rows, and with many readers of events.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_local_postgres::LocalPostgres;
use serde_json::{Value, json};

use super::{Figure, Wanted, median};
use crate::service::Service;
use crate::setup::{self, Libtorch, MODEL};
use crate::shell::{self, cargo, output, run as run_command};

/// What can be measured alone.
pub(super) const PARTS: [&str; 3] = ["get", "list", "events"];

const SECONDS: &str = "4";
const CONNECTIONS: &str = "16";
/// Pairs of measurements; the median of their ratios counts.
const PAIRS: usize = 5;
const JOBS: u32 = 1_000_000;
const FEW_JOBS: u32 = 1_000;
const PAGE: u32 = 100;
const READERS: usize = 256;

/// The service with what measures it.
struct Bench {
    service: Service,
    database: String,
    program: std::path::PathBuf,
    key: String,
}

impl Bench {
    fn address(&self) -> &str {
        self.service.url().trim_start_matches("http://")
    }

    /// Answers a second from `address`.
    fn load(&self, address: &str, path: &str, key: &str) -> Result<f64> {
        let printed = output(Command::new(&self.program).args(["load", address, path, key, SECONDS, CONNECTIONS]))?;
        let found: Value = serde_json::from_slice(&printed)?;
        found["answers_per_second"].as_f64().context("no figure")
    }

    fn sql(&self, statements: &str) -> Result<String> {
        let said = output(Command::new("psql").args([
            "-q",
            "-t",
            "-A",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            &self.database,
            "-c",
            statements,
        ]))?;
        Ok(String::from_utf8(said)?.trim().to_owned())
    }
}

pub(super) fn run(wanted: &Wanted<'_>, figures: &mut Vec<Figure>) -> Result<()> {
    setup::run(Libtorch::Cpu)?;
    let programs = shell::build_release()?;
    run_command(cargo().args(["build", "--release", "--quiet", "-p", "holdfast-api", "--example", "bench-http"]))?;
    let data = shell::target().join("bench-http");
    let _ = std::fs::remove_dir_all(&data);
    std::fs::create_dir_all(&data)?;
    let service = Service::start_with(&programs.join("holdfast"), "serve", &data)?;
    let holdfast = || {
        let mut command = Command::new(programs.join("holdfast"));
        command.env_remove("DATABASE_URL").env_remove("HOLDFAST_OBJECT_STORE");
        command
    };
    output(
        holdfast().args(["models", "import"]).arg(shell::root().join(MODEL)).args(["--name", "base", "--data-dir"]).arg(&data),
    )?;
    let made = |project: &str| -> Result<String> {
        let key = output(holdfast().args(["keys", "create", "--project", project, "--data-dir"]).arg(&data))?;
        Ok(String::from_utf8(key)?.trim().to_owned())
    };
    let key = made("bench")?;
    let database = LocalPostgres::running(&data.join("postgres"))?.context("the service has no Postgres")?;
    let program = shell::target().join("release/examples/bench-http");
    let bench = Bench { service: service.with_key(key.clone()), database, program, key };
    let file = data.join("rows.jsonl");
    std::fs::write(&file, "{\"prompt\":\"a film of grace\",\"completion\":\"positive\"}\n")?;
    let file = bench.service.upload(&file)?;
    let job = bench.service.post("/v1/fine_tuning/jobs", &json!({"model": "base", "training_file": file}))?;
    let job = job["id"].as_str().context("no id")?.to_owned();
    if wanted.has("get") {
        get(&bench, &job, figures)?;
    }
    if wanted.has("events") {
        events(&bench, &job, figures)?;
    }
    if wanted.has("list") {
        list(&bench, &job, &made("few")?, figures)?;
    }
    bench.service.stop()?;
    std::fs::remove_dir_all(&data)?;
    Ok(())
}

/// A bare handler, ended when dropped.
struct Bare(Child, String);

impl Bare {
    fn start(bench: &Bench) -> Result<Self> {
        let mut process = Command::new(&bench.program).args(["bare", &bench.database]).stdout(Stdio::piped()).spawn()?;
        let mut address = String::new();
        BufReader::new(process.stdout.take().context("no output")?).read_line(&mut address)?;
        Ok(Self(process, address.trim().to_owned()))
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn get(bench: &Bench, job: &str, figures: &mut Vec<Figure>) -> Result<()> {
    let bare = Bare::start(bench)?;
    // A job that has ended, whose row alone is read.
    bench.sql("update jobs set status = 'cancelled', finished_at = now()")?;
    let uuid = bench.sql("select id from jobs limit 1")?;
    let (mut ratios, mut rates) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let ours = bench.load(bench.address(), &format!("/v1/fine_tuning/jobs/{job}"), &bench.key)?;
        let theirs = bench.load(&bare.1, &format!("/jobs/{uuid}"), "none")?;
        ratios.push(ours / theirs);
        rates.push((ours, theirs));
    }
    bench.sql("update jobs set status = 'validating_files', finished_at = null")?;
    let ratio = median(&mut ratios);
    for (ours, theirs) in rates {
        println!("a job by its id        {ours:8.0} answers a second   a bare handler {theirs:8.0}   {:.2}x", ours / theirs);
    }
    figures.push(Figure::at_least("http_get_job_over_bare", ratio, 0.6));
    Ok(())
}

fn list(bench: &Bench, job: &str, few: &str, figures: &mut Vec<Figure>) -> Result<()> {
    println!("writing {JOBS} jobs");
    let copy = |count: u32, project: &str| {
        format!(
            "insert into jobs (id, project_id, base_model_id, training_file_id, seed, metadata, hyperparameters, safety, status, model,
                               files_checked, finished_at)
             select ('01900000-0000-7000-8000-' || lpad(to_hex(n + case when '{project}' = 'few' then 100000000 else 0 end), 12, '0'))::uuid,
                    (select id from projects where name = '{project}'), base_model_id, training_file_id, seed, metadata,
                    hyperparameters, safety, 'cancelled', model, true, now()
             from jobs, generate_series(1, {count}) n where jobs.id = '{}';",
            job.trim_start_matches("ftjob-")
        )
    };
    bench.sql(&format!("{}{}analyze jobs;", copy(JOBS - 1, "bench"), copy(FEW_JOBS, "few")))?;
    let path = |after: Option<u32>, offset: u32| match after {
        None => format!("/v1/fine_tuning/jobs?limit={PAGE}"),
        Some(n) => {
            format!("/v1/fine_tuning/jobs?limit={PAGE}&after=ftjob-0190000000007000 8000{:012x}", n + offset).replace(' ', "")
        }
    };
    // The last page begins after the oldest hundred but one.
    let last = Some(PAGE + 1);
    for (name, figure, many_path, few_path) in [
        ("page 1", "http_list_page_1_over_few", path(None, 0), path(None, 0)),
        ("page 10,000", "http_list_page_10000_over_few", path(last, 0), path(last, 100_000_000)),
    ] {
        let mut ratios = Vec::new();
        for _ in 0..PAIRS {
            let many = bench.load(bench.address(), &many_path, &bench.key)?;
            let of_few = bench.load(bench.address(), &few_path, few)?;
            println!(
                "{name:12} of {JOBS} jobs {many:7.0} answers a second   of {FEW_JOBS} jobs {of_few:7.0}   {:.2}x the time",
                of_few / many
            );
            ratios.push(of_few / many);
        }
        figures.push(Figure::at_most(figure, median(&mut ratios), 1.5));
    }
    Ok(())
}

fn events(bench: &Bench, job: &str, figures: &mut Vec<Figure>) -> Result<()> {
    let before = bench.service.memory_mib()?;
    let mut readers = Vec::new();
    for _ in 0..READERS {
        let mut stream = TcpStream::connect(bench.address())?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(
            stream,
            "GET /v1/fine_tuning/jobs/{job}/events HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {}\r\naccept: text/event-stream\r\n\r\n",
            bench.key
        )?;
        readers.push(BufReader::new(stream));
    }
    for reader in &mut readers {
        let mut line = String::new();
        while !line.starts_with("data:") {
            line.clear();
            ensure!(reader.read_line(&mut line)? > 0, "a stream of events ended");
        }
    }
    std::thread::sleep(Duration::from_secs(3));
    let more = bench.service.memory_mib()? - before;
    println!("{READERS} readers of events   {more:6.1} MiB");
    figures.push(Figure::at_most("http_256_event_readers_mib", more, 100.0));
    Ok(())
}
