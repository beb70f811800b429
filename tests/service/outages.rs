//! Processes that stand still, end or are gone for a while, and what becomes of the job they worked on.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_domain::policy::Policy;
use holdfast_tests::{LEASE, PATIENCE, ROW, World};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};

/// A lease that outlasts the end of a database and its recovery, which take seconds and, where the machine is busy, far longer.
const LONG_LEASE: Duration = Duration::from_secs(180);

/// Creates a job that trains for some seconds, with a checkpoint every 20 steps.
fn create_job(world: &World, name: &str) -> Result<String> {
    let rows: String = (0..40).map(|i| format!("{}\n", ROW.replace("a film", &format!("film number {i} is one")))).collect();
    let file = world.upload(&rows, "rows")?;
    let hyperparameters = json!({"n_epochs": 30, "batch_size": 2, "lora_dropout": 0.1});
    let body = json!({"model": "base", "training_file": file, "hyperparameters": hyperparameters});
    let job = world.call("POST", "/v1/fine_tuning/jobs", Some(&body), name)?;
    Ok(job["id"].as_str().context("no id")?.to_owned())
}

fn shown(world: &World, job: &str) -> Result<Value> {
    world.call("GET", &format!("/v1/fine_tuning/jobs/{job}"), None, "")
}

fn wait_until(world: &World, job: &str, mut is_so: impl FnMut(&Value) -> bool) -> Result<Value> {
    let since = Instant::now();
    loop {
        let now = shown(world, job)?;
        if is_so(&now) {
            return Ok(now);
        }
        ensure!(now["status"] != "failed", "it failed: {now}");
        ensure!(since.elapsed() < PATIENCE, "it took too long: {now}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn step(job: &Value) -> u64 {
    job["progress"]["step"].as_u64().unwrap_or(0)
}

fn has_succeeded(job: &Value) -> bool {
    job["status"] == "succeeded"
}

/// How each attempt at the job ended, the check left out.
fn ends(job: &Value) -> Vec<&str> {
    let attempts = job["attempts"].as_array().into_iter().flatten();
    attempts.filter(|a| a["work"] == "training").map(|a| a["outcome"].as_str().unwrap_or("open")).collect()
}

/// The hash of a job's weights.
fn weights(world: &World, job: &str) -> Result<Vec<String>> {
    let id = job.trim_start_matches("ftjob-");
    world.sql(&format!(
        "select encode(sha256, 'hex') from adapter_files
         where replace(job_id::text, '-', '') = '{id}' and name = 'adapter_model.safetensors'"
    ))
}

/// A service with so many workers; what an undisturbed job ends with; and another such job, past its first checkpoint.
fn in_the_middle(workers: usize, lease: Duration) -> Result<(World, Vec<String>, String)> {
    let world = World::start(workers, lease)?;
    let calm = create_job(&world, "calm")?;
    wait_until(&world, &calm, has_succeeded)?;
    let calm = weights(&world, &calm)?;
    let job = create_job(&world, "disturbed")?;
    wait_until(&world, &job, |job| step(job) > 20)?;
    Ok((world, calm, job))
}

fn worker_of(world: &World, job: &str) -> Result<usize> {
    let id = job.trim_start_matches("ftjob-");
    let names = world.sql(&format!("select worker from job_leases where replace(job_id::text, '-', '') = '{id}'"))?;
    let name = names.first().context("no worker has the job")?;
    world.workers.iter().position(|worker| worker.name == *name).context("no such worker")
}

/// Kills the database, and says when.
fn kill_database(world: &World) -> Result<Instant> {
    let server = i32::try_from(world.postgres.id()).ok().and_then(Pid::from_raw).context("no Postgres")?;
    kill_process(server, Signal::QUIT)?;
    Ok(Instant::now())
}

/// Brings it back once it has ended, at the earliest after half a lease of the usual length.
fn revive_database(world: &mut World, gone: Instant) -> Result<()> {
    while gone.elapsed() < LEASE / 2 || !world.postgres.revive()? {
        ensure!(gone.elapsed() < LONG_LEASE / 2, "Postgres does not end");
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(gone.elapsed() < LONG_LEASE / 2, "the gap was too long to show anything: {:?}", gone.elapsed());
    Ok(())
}

#[test]
fn a_worker_that_stood_still_past_its_lease_changes_nothing() -> Result<()> {
    let (world, calm, job) = in_the_middle(2, LEASE)?;
    let first = world.workers.get(worker_of(&world, &job)?).context("no worker")?;
    let trainer = first.trainer().context("no trainer")?;
    first.signal(Signal::STOP);
    // Its trainer goes on, and ends long before the worker does.
    let taken_over = wait_until(&world, &job, |job| ends(job) == ["set_back", "open"])?;
    assert!(taken_over["attempts"][1]["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{taken_over}");
    first.signal(Signal::CONT);
    let done = wait_until(&world, &job, has_succeeded)?;
    assert_eq!(ends(&done), ["set_back", "succeeded"]);
    assert_eq!(weights(&world, &job)?, calm);
    let since = Instant::now();
    while test_kill_process(trainer).is_ok() || first.jobs().read_dir()?.next().is_some() {
        ensure!(since.elapsed() < PATIENCE, "the first worker does not let go");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(shown(&world, &job)?["fine_tuned_model"], done["fine_tuned_model"]);
    Ok(())
}

#[test]
fn a_worker_that_is_told_to_stop_leaves_a_checkpoint_of_its_last_step() -> Result<()> {
    let (mut world, calm, job) = in_the_middle(1, LEASE)?;
    let worker = world.workers.get_mut(0).context("no worker")?;
    worker.signal(Signal::TERM);
    let process = worker.process.as_mut().context("no process")?;
    let since = Instant::now();
    let status = loop {
        if let Some(status) = process.try_wait()? {
            break status;
        }
        ensure!(since.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
    let given_back = shown(&world, &job)?;
    assert_eq!((&given_back["status"], ends(&given_back)), (&json!("queued"), vec!["returned"]), "{given_back}");
    world.mend()?;
    let done = wait_until(&world, &job, has_succeeded)?;
    assert_eq!(ends(&done), ["returned", "succeeded"]);
    let twice = world.sql(
        "select s ->> 'step' from job_metrics m, jsonb_array_elements(m.steps) s group by m.job_id, s ->> 'step' having count(*) > 1",
    )?;
    assert!(twice.is_empty(), "steps taken twice: {twice:?}");
    assert_eq!(weights(&world, &job)?, calm);
    Ok(())
}

#[test]
fn a_database_that_is_away_for_less_than_a_lease_costs_no_attempt_and_the_api_says_to_wait() -> Result<()> {
    let (mut world, calm, job) = in_the_middle(1, LONG_LEASE)?;
    let gone = kill_database(&world)?;
    let asked = loop {
        let answer = ureq::get(format!("{}/v1/fine_tuning/jobs/{job}", world.url()))
            .config()
            .http_status_as_error(false)
            .build()
            .header("authorization", format!("Bearer {}", world.key))
            .call()?;
        // It takes Postgres a moment to end.
        if answer.status() != 200 {
            break answer;
        }
        ensure!(gone.elapsed() < LONG_LEASE / 2, "Postgres does not end");
    };
    assert_eq!(asked.status(), 503);
    let wait: u64 = asked.headers().get("retry-after").context("no Retry-After")?.to_str()?.parse()?;
    assert!((1..=60).contains(&wait), "{wait}");
    revive_database(&mut world, gone)?;
    let done = wait_until(&world, &job, has_succeeded)?;
    assert_eq!(ends(&done), ["succeeded"], "{done}");
    assert_eq!(weights(&world, &job)?, calm);
    let steps = world.sql("select count(distinct s ->> 'step') from job_metrics m, jsonb_array_elements(m.steps) s")?;
    assert_eq!(steps, ["600"], "figures were lost");
    Ok(())
}

#[test]
fn a_database_that_is_away_while_a_model_is_asked_costs_no_attempt() -> Result<()> {
    let mut world = World::start(1, LONG_LEASE)?;
    // A gate would be about what so small a model says, which differs by processor.
    let policy = serde_json::to_string(&Policy { evaluate: true, ..Policy::default() })?;
    world.sql(&format!(
        "insert into safety_policies (scope, subject, version, policy) values ('deployment', '', 1, '{policy}')"
    ))?;
    let job = create_job(&world, "asked")?;
    wait_until(&world, &job, |job| job["phase"] == "evaluating")?;
    let gone = kill_database(&world)?;
    revive_database(&mut world, gone)?;
    let done = wait_until(&world, &job, has_succeeded)?;
    assert_eq!(ends(&done), ["succeeded"], "{done}");
    let report = world.call("GET", &format!("/v1/fine_tuning/jobs/{job}/safety_report"), None, "")?;
    assert!(report["evaluation"]["suites"].is_array(), "what the model answered was lost: {report}");
    Ok(())
}
