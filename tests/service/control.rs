//! Cancel, pause and resume in every phase of a job's life: its worker lets go within a step and a second.

use std::path::PathBuf;
use std::sync::MutexGuard;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_tests::{Answer, PATIENCE, ROW, TestApp, one_at_a_time};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::sync::watch;

/// A step of the small model takes milliseconds, so the bar is the second alone.
const MOST: Duration = Duration::from_secs(1);

/// How a phase is come to and held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Validating,
    Queued,
    Preparing,
    Running,
    Evaluating,
    Publishing,
}

const PHASES: [Phase; 6] =
    [Phase::Validating, Phase::Queued, Phase::Preparing, Phase::Running, Phase::Evaluating, Phase::Publishing];

/// A service on a bucket with a model of small steps; while the bucket's server stands still, whoever needs it waits.
struct Held {
    app: TestApp,
    job: String,
    worker: Option<(watch::Sender<bool>, JoinHandle<Result<()>>)>,
    _alone: MutexGuard<'static, ()>,
}

impl Held {
    /// A job that stands in `phase`.
    fn at(phase: Phase) -> Result<Self> {
        let alone = one_at_a_time();
        let app = TestApp::start_on_s3()?.with_small_model()?;
        // One whose training is waited for is long; the other's end is come to at once.
        let epochs = if phase == Phase::Running { 20 } else { 1 };
        let rows: String = (0..40).map(|i| format!("{}\n", ROW.replace("a film", &format!("film number {i} is one")))).collect();
        if phase == Phase::Evaluating {
            let asked = app.call_as(Some(&app.admin_key()?), "PUT", "/admin/safety_policy", Some(r#"{"evaluate":true}"#))?;
            ensure!(asked.status == 200, "{}", asked.body);
        }
        let job =
            app.create_job(&rows, &json!({"hyperparameters": {"n_epochs": epochs, "batch_size": 2, "precision": "f32"}}))?;
        let mut held = Self { app, job, worker: None, _alone: alone };
        if phase != Phase::Validating {
            ensure!(held.app.step_worker()?, "there was nothing to check");
        }
        match phase {
            Phase::Queued => {}
            Phase::Validating | Phase::Preparing => {
                held.store(Signal::STOP)?;
                held.start_worker()?;
                held.wait_for("a job folder", |held| Ok(held.job_folder().is_some()))?;
            }
            Phase::Running => {
                held.start_worker()?;
                held.wait_for("a step", |held| Ok(held.shown()?["progress"]["step"].as_u64().unwrap_or(0) > 0))?;
            }
            Phase::Evaluating => {
                held.start_worker()?;
                held.wait_for("a suite's requests", |held| {
                    Ok(held.job_folder().is_some_and(|folder| folder.join("evaluation.json").exists()))
                })?;
            }
            Phase::Publishing => {
                held.start_worker()?;
                let trains = |held: &Self| Ok(held.job_folder().is_some_and(|folder| folder.join("out/progress.jsonl").exists()));
                held.wait_for("a trainer", trains)?;
                held.store(Signal::STOP)?;
                held.wait_for("its end", |held| {
                    Ok(held.job_folder().is_some_and(|folder| folder.join("out/exit.json").exists()))
                })?;
            }
        }
        Ok(held)
    }

    fn store(&self, signal: Signal) -> Result<()> {
        self.app.s3.as_ref().context("no bucket")?.signal(signal)
    }

    /// A worker that works until [`Self::stop_worker`].
    fn start_worker(&mut self) -> Result<()> {
        let (stop, shutdown) = watch::channel(false);
        let (store, config, handle) = (self.app.store.clone(), self.app.worker()?, self.app.runtime.handle().clone());
        let worker = std::thread::spawn(move || Ok(handle.block_on(holdfast_worker::run(store, config, shutdown))?));
        self.worker = Some((stop, worker));
        Ok(())
    }

    fn stop_worker(&mut self) -> Result<()> {
        let Some((stop, worker)) = self.worker.take() else { return Ok(()) };
        stop.send(true)?;
        worker.join().map_err(|_| anyhow::anyhow!("the worker panicked"))?
    }

    /// The folder of the job its worker holds: it goes when the worker lets go.
    fn job_folder(&self) -> Option<PathBuf> {
        let jobs = self.app.worker().ok()?.folder.join("jobs");
        Some(std::fs::read_dir(jobs).ok()?.flatten().next()?.path())
    }

    fn shown(&self) -> Result<Value> {
        self.app.job(&self.job)
    }

    fn ask(&self, verb: &str) -> Result<Answer> {
        self.app.call("POST", &format!("/v1/fine_tuning/jobs/{}/{verb}", self.job), None)
    }

    fn wait_for(&self, what: &str, mut is_so: impl FnMut(&Self) -> Result<bool>) -> Result<Duration> {
        let since = Instant::now();
        while !is_so(self)? {
            ensure!(since.elapsed() < PATIENCE, "there never was {what}: {}", self.shown()?);
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(since.elapsed())
    }

    fn has_ended(&self) -> Result<bool> {
        Ok(matches!(self.shown()?["status"].as_str(), Some("succeeded" | "failed" | "cancelled")))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.store(Signal::CONT);
        let _ = self.stop_worker();
    }
}

/// What a worker takes to let go. The machine has other tests to run: what was too slow is measured anew, nine times at most.
fn quickest(measure: impl Fn() -> Result<Duration>) -> Result<Duration> {
    let mut least = measure()?;
    for _ in 0..9 {
        if least > MOST {
            least = least.min(measure()?);
        }
    }
    Ok(least)
}

/// Cancels a job in `phase`. Returns how long its worker took to let go.
fn cancelled(phase: Phase) -> Result<Duration> {
    let held = Held::at(phase)?;
    let answer = held.ask("cancel")?;
    assert_eq!((answer.status, &answer.body["status"]), (200, &json!("cancelled")), "{phase:?}: {}", answer.body);
    let took = held.wait_for("an end of the work", |held| Ok(held.job_folder().is_none()))?;
    assert_eq!(held.ask("cancel")?.error().0, "invalid_state", "{phase:?}: a second cancel changes nothing");
    assert_eq!(held.ask("pause")?.error().0, "invalid_state");
    assert_eq!(held.ask("resume")?.error().0, "invalid_state");
    held.store(Signal::CONT)?;
    assert_eq!(held.shown()?["status"], "cancelled", "{phase:?}");
    Ok(took)
}

/// Pauses a job in `phase` and resumes it. Returns how long its worker took to let go.
fn paused(phase: Phase) -> Result<Duration> {
    let mut held = Held::at(phase)?;
    let answer = held.ask("pause")?;
    assert_eq!(answer.status, 200, "{phase:?}: {}", answer.body);
    let took = held.wait_for("a pause", |held| Ok(held.shown()?["status"] == "paused" && held.job_folder().is_none()))?;
    assert_eq!(held.ask("pause")?.error().0, "invalid_state", "{phase:?}: a second pause changes nothing");
    held.store(Signal::CONT)?;
    let resumed = held.ask("resume")?;
    assert!(matches!(resumed.body["status"].as_str(), Some("queued" | "validating_files")), "{phase:?}: {}", resumed.body);
    assert_eq!(held.ask("resume")?.error().0, "invalid_state", "{phase:?}: a second resume changes nothing");
    if held.worker.is_none() {
        held.start_worker()?;
    }
    held.wait_for("an end", Held::has_ended)?;
    assert_eq!(held.shown()?["status"], "succeeded", "{phase:?}: {}", held.shown()?);
    Ok(took)
}

#[test]
fn a_cancel_ends_a_job_in_any_phase_and_its_worker_lets_go_within_a_second() -> Result<()> {
    for phase in PHASES {
        let took = quickest(|| cancelled(phase))?;
        assert!(took <= MOST, "{phase:?}: the worker let go after {took:?}");
    }
    Ok(())
}

#[test]
fn a_pause_holds_a_job_in_any_phase_within_a_second_and_a_resume_lets_it_go_on() -> Result<()> {
    for phase in PHASES.into_iter().filter(|phase| *phase != Phase::Publishing) {
        let took = quickest(|| paused(phase))?;
        assert!(took <= MOST, "{phase:?}: paused after {took:?}");
    }
    Ok(())
}

#[test]
fn a_job_that_only_has_to_be_written_down_is_not_given_up_for_a_pause() -> Result<()> {
    let held = Held::at(Phase::Publishing)?;
    let answer = held.ask("pause")?;
    assert_eq!((answer.status, &answer.body["status"]), (200, &json!("pausing")));
    held.store(Signal::CONT)?;
    held.wait_for("an end", Held::has_ended)?;
    assert_eq!(held.shown()?["status"], "succeeded");
    Ok(())
}

#[test]
fn a_pause_is_heard_while_an_adapter_waits_for_the_store() -> Result<()> {
    let mut held = Held::at(Phase::Publishing)?;
    held.app.s3.as_mut().context("no bucket")?.stop()?;
    assert_eq!(held.ask("pause")?.body["status"], "pausing");
    held.wait_for("a pause", |held| Ok(held.shown()?["status"] == "paused"))?;
    held.app.s3.as_mut().context("no bucket")?.start_again()?;
    assert_eq!(held.ask("resume")?.body["status"], "queued");
    held.wait_for("an end", Held::has_ended)?;
    assert_eq!(held.shown()?["status"], "succeeded", "{}", held.shown()?);
    Ok(())
}

#[test]
fn of_calls_that_race_one_is_heard_and_the_job_is_what_it_said() -> Result<()> {
    let held = Held::at(Phase::Running)?;
    let answers: Vec<(&str, Answer)> = std::thread::scope(|scope| {
        let calls: Vec<_> = ["pause", "cancel", "resume", "pause", "cancel"]
            .into_iter()
            .map(|verb| (verb, scope.spawn(|| held.ask(verb))))
            .collect();
        let answered =
            calls.into_iter().map(|(verb, call)| Ok((verb, call.join().map_err(|_| anyhow::anyhow!("a call panicked"))??)));
        answered.collect::<Result<_>>()
    })?;
    for (verb, answer) in &answers {
        let is_refused = (answer.status, answer.error().0) == (400, "invalid_state");
        assert!(answer.status == 200 || is_refused, "{verb}: {} {}", answer.status, answer.body);
    }
    let cancels = answers.iter().filter(|(verb, answer)| *verb == "cancel" && answer.status == 200).count();
    assert_eq!(cancels, 1, "a job is cancelled once");
    assert_eq!(held.shown()?["status"], "cancelled");
    Ok(())
}
