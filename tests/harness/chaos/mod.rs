//! Real processes under random faults: a stream of small jobs, and at the end nothing is lost. A seed decides which fault strikes
//! what, in which order and when.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

mod faults;
mod steps;
mod verdict;

use faults::{Fault, Kind};
use steps::{Standstill, Watcher};
pub use verdict::Report;
use verdict::Seen;

use crate::{LEASE, Worker, World};

/// Workers.
const WORKERS: usize = 3;
/// Jobs that are open at a time.
const OPEN: usize = 4;
/// Setbacks in a row from which a job is struck no more until it made progress.
const SPARED_FROM: i32 = holdfast_domain::limits::MAX_SETBACKS - 2;
/// How long what is open may take once nothing strikes any more.
const CALM: Duration = Duration::from_secs(240);

/// What a job is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Finish,
    /// Cancelled after so long.
    Cancel(Duration),
    /// Paused after so long, and resumed after as long again.
    Pause(Duration),
}

/// A job of the stream.
#[derive(Debug)]
struct Job {
    id: String,
    kind: usize,
    wish: Wish,
    since: Instant,
    /// Requests of its owner that were made.
    asked: u32,
}

/// Kinds of jobs: their hyperparameters and safety.
fn kinds() -> [Value; 3] {
    [
        json!({"hyperparameters": {"n_epochs": 6, "batch_size": 4, "lora_dropout": 0.1}}),
        json!({"hyperparameters": {"n_epochs": 4, "batch_size": 4, "gradient_accumulation_steps": 2}, "seed": 5}),
        json!({"hyperparameters": {"n_epochs": 4, "batch_size": 2}, "safety": {"defense": "safegrad", "projection": "per_row"}}),
    ]
}

/// Rows of each kind's file: an epoch, and so the interval between checkpoints, takes longer than an upload.
const ROWS: usize = 240;

/// Steps between the checkpoints of such a job: one at each epoch's end, and every hundred.
fn checkpoint_interval(kind: usize) -> Option<u64> {
    let kinds = kinds();
    let hyperparameters = &kinds.get(kind)?["hyperparameters"];
    let of_step = hyperparameters["batch_size"].as_u64()? * hyperparameters["gradient_accumulation_steps"].as_u64().unwrap_or(1);
    Some(u64::try_from(ROWS).ok()?.div_ceil(of_step).min(100))
}

fn rows(kind: usize) -> String {
    let row = |i: usize| {
        let answer = if i.is_multiple_of(2) { "positive" } else { "negative" };
        json!({"messages": [{"role": "user", "content": format!("review {kind}-{i}")}, {"role": "assistant", "content": answer}]})
    };
    (0..ROWS).map(|i| format!("{}\n", row(i))).collect()
}

/// How long a run strikes.
#[derive(Debug, Clone, Copy)]
pub enum Length {
    /// This many faults that found something to strike.
    Faults(usize),
    /// This long.
    Time(Duration),
}

/// Runs the world under faults, and says what came of it.
///
/// # Errors
/// When the world cannot be started, or something was lost: the first thing that was.
pub fn run(seed: u64, length: Length, say: &mut dyn FnMut(&str)) -> Result<Report> {
    let mut world = World::start(WORKERS, LEASE)?;
    let outcome = strike(&mut world, seed, length, say);
    if outcome.is_err() {
        // What the processes said is all there is to find out why.
        let kept = world.folder.path().with_extension("failed");
        let _ = std::process::Command::new("cp").arg("-r").arg(world.folder.path()).arg(&kept).status();
        say(&format!("the logs are in {}", kept.display()));
    }
    outcome
}

fn strike(world: &mut World, seed: u64, length: Length, say: &mut dyn FnMut(&str)) -> Result<Report> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let files: Vec<String> =
        (0..kinds().len()).map(|kind| world.upload(&rows(kind), &format!("kind-{kind}"))).collect::<Result<_>>()?;
    let mut made = 0;
    let mut jobs: Vec<Job> = Vec::new();
    say("a calm run first: what each kind of job ends with");
    for kind in 0..files.len() {
        jobs.push(create(world, &files, kind, Wish::Finish, &mut made)?);
    }
    let calm = wait_for_all(world, &mut jobs, Duration::from_secs(180))?;
    ensure!(calm.values().all(|status| status == "succeeded"), "a calm job did not succeed: {calm:?}");

    let watcher = Watcher::start(world.workers.iter().map(Worker::jobs).collect());
    let (since, mut struck, mut by_kind) = (Instant::now(), 0, BTreeMap::new());
    let mut healing: VecDeque<(Instant, Fault)> = VecDeque::new();
    let (mut uploads, mut seen) = (Vec::new(), Seen::default());
    let mut next = Fault::draw(&mut random);
    let mut due = Instant::now() + next.pause;
    let mut looked = Instant::now();
    let goes_on = |struck: usize| match length {
        Length::Faults(most) => struck < most,
        Length::Time(time) => since.elapsed() < time,
    };
    while goes_on(struck) {
        std::thread::sleep(Duration::from_millis(50));
        while let Some(at) = healing.iter().position(|(at, _)| *at <= Instant::now()) {
            if let Some((_, fault)) = healing.remove(at) {
                heal(world, &fault, &mut seen)?;
            }
        }
        if due <= Instant::now() {
            // One at a time of each kind, so that each is mended for itself.
            if !healing.iter().any(|(_, fault)| fault.kind.excludes(next.kind)) && !spares(world, &next, &healing)? {
                let lost = lost_with(world, &next, &healing)?;
                let found = next.strike(world)?;
                seen.losses.extend(lost);
                if found {
                    struck += 1;
                    *by_kind.entry(next.kind).or_insert(0_usize) += 1;
                    say(&format!(
                        "{:6.1} s  {struck:4}  {:?} of worker {}",
                        since.elapsed().as_secs_f64(),
                        next.kind,
                        next.worker
                    ));
                }
                healing.push_back((Instant::now() + next.lasts, next));
            }
            next = Fault::draw(&mut random);
            due = Instant::now() + next.pause;
        }
        // Only what can be asked while everything is there: a client waits as well.
        if healing.is_empty() && looked.elapsed() > Duration::from_millis(700) {
            looked = Instant::now();
            let statuses = statuses(world)?;
            for job in &mut jobs {
                ask(world, job, statuses.get(&job.id).map_or("", String::as_str))?;
            }
            let is_open = |job: &&Job| statuses.get(&job.id).is_none_or(|status| !is_ended(status));
            if jobs.iter().filter(is_open).count() < OPEN {
                let wish = match random.random_range(0..6) {
                    0 => Wish::Cancel(Duration::from_millis(random.random_range(500..8000))),
                    1 => Wish::Pause(Duration::from_millis(random.random_range(500..6000))),
                    _ => Wish::Finish,
                };
                let kind = random.random_range(0..files.len());
                jobs.push(create(world, &files, kind, wish, &mut made)?);
                let name = format!("upload-{made}");
                let content = rows(made);
                uploads.push((world.upload(&content, &name)?, content));
            }
        }
    }
    say("nothing strikes any more");
    for (_, fault) in healing {
        heal(world, &fault, &mut seen)?;
    }
    world.mend()?;
    let ended = wait_for_all(world, &mut jobs, CALM)?;
    seen.steps = Some(watcher.stop()?);
    verdict::judge(world, &jobs, &ended, &uploads, &seen, by_kind)
}

/// Mends what a fault did, and writes down what it held up.
fn heal(world: &mut World, fault: &Fault, seen: &mut Seen) -> Result<()> {
    fault.heal(world)?;
    if fault.kind.holds_up_checkpoints() {
        let now = seconds_since_1970()?;
        seen.standstills.push(Standstill { from: now - fault.lasts.as_secs_f64() - 1.0, to: now });
    }
    Ok(())
}

/// Whether a fault would end an attempt of a job that had setback after setback just before. That such a job is given up is tested
/// elsewhere; here each is to end as asked, and is struck more often than any machine would strike it.
fn spares(world: &World, fault: &Fault, healing: &VecDeque<(Instant, Fault)>) -> Result<bool> {
    if !fault.kind.ends_attempts() || healing.iter().any(|(_, fault)| fault.kind == Kind::PostgresKilled) {
        return Ok(false);
    }
    let query = format!(
        "select 1 from job_leases l join jobs j on j.id = l.job_id where l.worker = 'worker-{}' and j.lost_workers >= {SPARED_FROM}",
        fault.worker
    );
    Ok(!world.sql(&query)?.is_empty())
}

/// The claim that is lost with a worker: its job, its number, and when, in seconds by the database's clock.
fn lost_with(world: &World, fault: &Fault, healing: &VecDeque<(Instant, Fault)>) -> Result<Option<String>> {
    let loses = matches!(fault.kind, Kind::WorkerKilled | Kind::WorkerStopped);
    if !loses || healing.iter().any(|(_, fault)| fault.kind == Kind::PostgresKilled) {
        return Ok(None);
    }
    let query = format!(
        "select format('(%L::uuid, %s, %s)', job_id, attempt, extract(epoch from now())) from job_leases where worker = 'worker-{}'",
        fault.worker
    );
    Ok(world.sql(&query)?.pop())
}

/// By this machine's clock, which is the database's as well.
#[expect(clippy::disallowed_methods, reason = "it is compared with no row of another machine")]
fn seconds_since_1970() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

fn is_ended(status: &str) -> bool {
    matches!(status, "succeeded" | "failed" | "cancelled")
}

fn create(world: &World, files: &[String], kind: usize, wish: Wish, made: &mut usize) -> Result<Job> {
    *made += 1;
    let mut body = kinds().get(kind).context("no such kind")?.clone();
    body["model"] = json!("base");
    body["training_file"] = json!(files.get(kind).context("no such file")?);
    body["metadata"] = json!({"kind": kind.to_string()});
    let job = world.call("POST", "/v1/fine_tuning/jobs", Some(&body), &format!("job-{made}"))?;
    let id = job["id"].as_str().context("no id")?.to_owned();
    Ok(Job { id, kind, wish, since: Instant::now(), asked: 0 })
}

/// Asks of a job what its owner wants by now.
fn ask(world: &World, job: &mut Job, status: &str) -> Result<()> {
    let (verb, after) = match (job.wish, job.asked) {
        (Wish::Cancel(after), 0) => ("cancel", after),
        (Wish::Pause(after), 0) => ("pause", after),
        (Wish::Pause(after), 1) if status == "paused" => ("resume", after * 2),
        _ => return Ok(()),
    };
    if job.since.elapsed() < after || is_ended(status) {
        return Ok(());
    }
    let path = format!("/v1/fine_tuning/jobs/{}/{verb}", job.id);
    match world.call("POST", &path, None, &format!("{verb}-{}", job.id)) {
        Ok(_) => job.asked += 1,
        // It ended in between.
        Err(error) if error.to_string().contains("invalid_state") => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Each job's status, as the database has it.
fn statuses(world: &World) -> Result<BTreeMap<String, String>> {
    let rows = world.sql("select 'ftjob-' || replace(id::text, '-', ''), status from jobs")?;
    Ok(rows.iter().filter_map(|row| row.split_once('|')).map(|(id, status)| (id.to_owned(), status.to_owned())).collect())
}

/// Waits until every job has ended, still asking what their owners want.
fn wait_for_all(world: &World, jobs: &mut [Job], most: Duration) -> Result<BTreeMap<String, String>> {
    let since = Instant::now();
    loop {
        let statuses = statuses(world)?;
        if jobs.iter().all(|job| statuses.get(&job.id).is_some_and(|status| is_ended(status))) {
            return Ok(statuses);
        }
        if since.elapsed() > most {
            let open: Vec<_> = statuses.iter().filter(|(_, status)| !is_ended(status)).collect();
            bail!("after {most:?} without a fault jobs are still open: {open:?}");
        }
        for job in jobs.iter_mut() {
            ask(world, job, statuses.get(&job.id).map_or("", String::as_str))?;
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}
