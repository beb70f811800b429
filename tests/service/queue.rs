//! Leases and fences, with workers played by the test.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use holdfast_domain::hyperparameters::Requested;
use holdfast_domain::ids::ProjectId;
use holdfast_domain::job::{JobError, JobState, Status};
use holdfast_domain::limits::MAX_SETBACKS;
use holdfast_domain::policy::{AppliedPolicy, Policy, Scope};
use holdfast_domain::progress::{Progress, Step};
use holdfast_domain::safety::RequestedSafety;
use holdfast_store::StoreError;
use holdfast_store::base_models::BaseModelFacts;
use holdfast_store::jobs::{Dataset, Job, NewJob};
use holdfast_store::queue::{Checked, Claim, Published, Work};
use holdfast_tests::{ROW, TestApp};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(300);

/// A service with a job whose base model is a folder of one word: no trainer runs in these tests.
fn app_with_job() -> Result<(TestApp, ProjectId, Job)> {
    let app = TestApp::start()?;
    let file = app.uploaded(ROW.as_bytes())?.parse()?;
    let base = tempfile::tempdir()?;
    std::fs::write(base.path().join("config.json"), "{}")?;
    let (project, job) = app.runtime.block_on(async {
        app.store.create_base_model("m", base.path(), BaseModelFacts { parameter_count: 1, context_length: 2048 }).await?;
        let project = app.store.ensure_project("default").await?;
        let job = NewJob {
            base_model: "m".into(),
            model: "m".into(),
            start: None,
            training_file: file,
            validation_file: None,
            suffix: None,
            seed: 0,
            metadata: serde_json::json!({}),
            hyperparameters: Requested::default().resolve(1, None)?,
            safety: RequestedSafety::default().resolve(&Policy::default())?,
            policy: AppliedPolicy { scope: Scope::Deployment, version: 0, policy: Policy::default() },
        };
        anyhow::Ok((project, app.store.create_job(project, &job, None).await?))
    })?;
    Ok((app, project, job))
}

/// What a check of such a job finds.
fn checked() -> Checked {
    let dataset = Dataset { rows: 1, tokens: 8, supervised_tokens: 2 };
    Checked { summary: "fine".into(), warnings: Vec::new(), dataset }
}

/// A run that leaves no files.
fn nothing() -> Published {
    Published { trained_tokens: 1, device: "cpu".into(), ..Published::default() }
}

async fn claim(app: &TestApp, lease: Duration) -> Result<Claim> {
    app.store.claim("test", lease).await?.context("nothing to claim")
}

/// Lets jobs that rest after a setback be claimed at once.
fn end_rest(app: &TestApp) -> Result<()> {
    app.sql("update jobs set rests_until = null")?;
    Ok(())
}

/// Takes the job through its check, and claims it for training.
async fn running(app: &TestApp, lease: Duration) -> Result<Claim> {
    let check = claim(app, LONG).await?;
    app.store.accept_files(check.job.id, check.attempt, &checked()).await?;
    claim(app, lease).await
}

#[test]
fn a_claimed_job_is_claimed_once() -> Result<()> {
    let (app, ..) = app_with_job()?;
    app.runtime.block_on(async {
        assert_eq!(claim(&app, LONG).await?.work, Work::Check);
        assert!(app.store.claim("other", LONG).await?.is_none());
        Ok(())
    })
}

#[test]
fn an_expired_lease_gives_the_job_to_another_and_the_first_worker_changes_nothing() -> Result<()> {
    let (app, project, job) = app_with_job()?;
    app.runtime.block_on(async {
        let first = running(&app, SHORT).await?;
        tokio::time::sleep(SHORT * 2).await;
        assert!(matches!(app.store.heartbeat(job.id, first.attempt, LONG).await, Err(StoreError::Fenced)));
        assert_eq!(app.store.reap().await?, 1);
        app.sql("update jobs set rests_until = rests_until + interval '1 hour'")?;
        assert!(app.store.claim("test", LONG).await?.is_none(), "the job rests a while");
        end_rest(&app)?;
        let second = claim(&app, LONG).await?;
        assert!(second.attempt > first.attempt);
        assert!(matches!(app.store.publish(job.id, first.attempt, &nothing()).await, Err(StoreError::Fenced)));
        assert!(matches!(app.store.report(job.id, first.attempt, &[]).await, Err(StoreError::Fenced)));
        app.store.publish(job.id, second.attempt, &nothing()).await?;
        assert_eq!(app.store.job(project, job.id).await?.state.status(), Status::Succeeded);
        Ok(())
    })
}

#[test]
fn whatever_a_worker_writes_past_its_lease_is_refused() -> Result<()> {
    let (app, project, job) = app_with_job()?;
    app.runtime.block_on(async {
        let late = running(&app, SHORT).await?;
        let (id, attempt, store) = (job.id, late.attempt, &app.store);
        tokio::time::sleep(SHORT * 2).await;
        // Before anyone noticed, and after the job went to another.
        for is_claimed_again in [false, true] {
            if is_claimed_again {
                assert_eq!(store.reap().await?, 1);
                end_rest(&app)?;
                claim(&app, LONG).await?;
            }
            let before = store.job(project, id).await?;
            let error = || JobError::new("server_error", "late");
            let refused = [
                ("heartbeat", store.heartbeat(id, attempt, LONG).await.err()),
                ("wish", store.wish(id, attempt).await.err()),
                ("accept_files", store.accept_files(id, attempt, &checked()).await.err()),
                ("report", store.report(id, attempt, &[]).await.err()),
                ("keep_checkpoint", store.keep_checkpoint(id, attempt, 1, true, &[]).await.err()),
                ("give_back", store.give_back(id, attempt).await.err()),
                ("set_back", store.set_back(id, attempt, error()).await.err()),
                ("delay", store.delay(id, attempt, "late").await.err()),
                ("fail", store.fail(id, attempt, error()).await.err()),
                ("publish", store.publish(id, attempt, &nothing()).await.err()),
            ];
            for (what, error) in refused {
                assert!(matches!(error, Some(StoreError::Fenced)), "{what} gave {error:?}");
            }
            let after = store.job(project, id).await?;
            assert_eq!((before.state, before.attempts), (after.state, after.attempts));
        }
        Ok(())
    })
}

#[test]
fn a_job_whose_workers_are_lost_again_and_again_fails_with_the_reason() -> Result<()> {
    let (app, project, job) = app_with_job()?;
    app.runtime.block_on(async {
        running(&app, SHORT).await?;
        for _ in 1..MAX_SETBACKS {
            tokio::time::sleep(SHORT * 2).await;
            app.store.reap().await?;
            end_rest(&app)?;
            claim(&app, SHORT).await?;
        }
        tokio::time::sleep(SHORT * 2).await;
        app.store.reap().await?;
        let job = app.store.job(project, job.id).await?;
        let JobState::Failed { error } = &job.state else { bail!("the job is {}", job.state.status().as_str()) };
        assert_eq!(error.code, "worker_lost");
        assert!(error.message.starts_with("5 attempts in a row"), "{}", error.message);
        let ends: Vec<_> = job.attempts.iter().map(|attempt| attempt.outcome.as_deref().unwrap_or("open")).collect();
        assert_eq!(ends, ["files_accepted", "set_back", "set_back", "set_back", "set_back", "set_back"]);
        assert!(job.attempts.iter().skip(1).all(|attempt| attempt.reason.is_some()), "each says why");
        Ok(())
    })
}

#[test]
fn a_job_that_goes_on_between_its_setbacks_is_not_given_up() -> Result<()> {
    let (app, project, job) = app_with_job()?;
    app.runtime.block_on(async {
        let lost = || JobError::new("worker_lost", "The worker was lost.");
        let mut held = running(&app, LONG).await?;
        for step in 1..=u64::try_from(2 * MAX_SETBACKS)? {
            app.store.keep_checkpoint(job.id, held.attempt, step, true, &[]).await?;
            app.store.set_back(job.id, held.attempt, lost()).await?;
            end_rest(&app)?;
            held = claim(&app, LONG).await?;
        }
        // The same step again is no progress.
        for _ in 0..MAX_SETBACKS {
            assert_eq!(app.store.job(project, job.id).await?.state.status(), Status::Running);
            app.store.keep_checkpoint(job.id, held.attempt, 1, true, &[]).await?;
            app.store.set_back(job.id, held.attempt, lost()).await?;
            end_rest(&app)?;
            match app.store.claim("test", LONG).await? {
                Some(claim) => held = claim,
                None => break,
            }
        }
        assert_eq!(app.store.job(project, job.id).await?.state.status(), Status::Failed);
        Ok(())
    })
}

#[test]
fn a_job_waits_longer_each_time_for_what_is_not_to_be_had_and_never_fails_for_it() -> Result<()> {
    let (app, project, job) = app_with_job()?;
    app.runtime.block_on(async {
        let rest = "select extract(epoch from j.rests_until - max(a.ended_at))::int from jobs j join job_attempts a on a.job_id = j.id group by j.id";
        let mut rests = Vec::new();
        for _ in 0..12 {
            let held = claim(&app, LONG).await?;
            app.store.delay(job.id, held.attempt, "The object store could not be used").await?;
            assert_eq!(app.store.job(project, job.id).await?.state.status(), Status::ValidatingFiles);
            rests.push(app.sql(rest)?.parse::<i32>()?);
            end_rest(&app)?;
        }
        assert_eq!(rests, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        let held = claim(&app, LONG).await?;
        app.store.accept_files(job.id, held.attempt, &checked()).await?;
        let held = claim(&app, LONG).await?;
        app.store.delay(job.id, held.attempt, "The object store could not be used").await?;
        let shown = app.call("GET", &format!("/v1/fine_tuning/jobs/{}", job.id), None)?.body;
        assert_eq!(shown["attempts"][13]["outcome"], "delayed");
        assert_eq!(shown["attempts"][13]["reason"], "The object store could not be used");
        Ok(())
    })
}

#[test]
fn a_cancelled_job_s_worker_is_told_at_its_next_heartbeat() -> Result<()> {
    let (app, project, job) = app_with_job()?;
    app.runtime.block_on(async {
        let claim = running(&app, LONG).await?;
        app.store.cancel_job(project, job.id, None).await?;
        assert!(matches!(app.store.heartbeat(job.id, claim.attempt, LONG).await, Err(StoreError::Fenced)));
        assert!(matches!(app.store.publish(job.id, claim.attempt, &nothing()).await, Err(StoreError::Fenced)));
        Ok(())
    })
}

#[test]
fn a_worker_that_stops_gives_its_job_back_unspent() -> Result<()> {
    let (app, ..) = app_with_job()?;
    app.runtime.block_on(async {
        for _ in 0..5 {
            let check = claim(&app, LONG).await?;
            app.store.give_back(check.job.id, check.attempt).await?;
        }
        assert_eq!(claim(&app, LONG).await?.job.state.status(), Status::ValidatingFiles);
        Ok(())
    })
}

#[test]
fn the_next_worker_reports_the_same_steps_again() -> Result<()> {
    let (app, _, job) = app_with_job()?;
    app.runtime.block_on(async {
        let first = running(&app, LONG).await?;
        app.store.report(job.id, first.attempt, &[step(1)]).await?;
        app.store.report(job.id, first.attempt, &[step(1)]).await?;
        app.store.give_back(job.id, first.attempt).await?;
        let second = claim(&app, LONG).await?;
        app.store.report(job.id, second.attempt, &[step(1)]).await?;
        Ok(())
    })
}

#[test]
fn steps_that_a_run_takes_anew_come_in_the_place_of_those_it_gave_up() -> Result<()> {
    let (app, _, job) = app_with_job()?;
    app.runtime.block_on(async {
        let held = running(&app, LONG).await?;
        let report = async |taken: &[(u64, f64)]| {
            let lines: Vec<Progress> = taken.iter().map(|&(number, loss)| step_with(number, loss)).collect();
            app.store.report(job.id, held.attempt, &lines).await
        };
        report(&[(1, 1.0), (2, 1.0)]).await?;
        report(&[(3, 9.0), (4, 9.0), (5, 9.0)]).await?;
        // It diverged, and went back in the middle of what is reported at once.
        report(&[(6, 9.0), (2, 2.0), (3, 2.0)]).await?;
        let known = async || -> Result<Vec<(u64, f64)>> {
            Ok(app.store.steps(job.id).await?.0.iter().map(|step| (step.step, step.task_loss)).collect())
        };
        report(&[(4, 2.0), (5, 9.0), (6, 9.0)]).await?;
        assert_eq!(known().await?, [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 9.0), (6, 9.0)]);
        report(&[(5, 3.0)]).await?;
        assert_eq!(known().await?, [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 3.0)], "what was reported with steps that stay");
        Ok(())
    })
}

#[test]
fn what_was_measured_on_a_way_that_a_run_left_is_given_up_with_its_steps() -> Result<()> {
    let (app, _, job) = app_with_job()?;
    app.runtime.block_on(async {
        let held = running(&app, LONG).await?;
        let measured = |step: u64, loss: f64| Progress::Validation { step, loss, token_accuracy: 0.5 };
        let report = async |lines: &[Progress]| app.store.report(job.id, held.attempt, lines).await;
        report(&[measured(0, 3.0), step(1), step(2), measured(2, 2.0), step(3), step(4), measured(4, 1.0)]).await?;
        let known =
            async || -> Result<Vec<u64>> { Ok(app.store.steps(job.id).await?.1.into_iter().map(|(step, ..)| step).collect()) };
        assert_eq!(known().await?, [0, 2, 4]);
        report(&[step(5), step(3), measured(3, 1.5)]).await?;
        assert_eq!(known().await?, [0, 2, 3]);
        Ok(())
    })
}

#[test]
fn what_computed_each_attempt_is_known_to_those_that_go_on_from_it() -> Result<()> {
    let (app, _, job) = app_with_job()?;
    app.runtime.block_on(async {
        let first = running(&app, LONG).await?;
        let program = serde_json::json!({"device": "cuda:0"});
        app.store.know_program(job.id, first.attempt, &program).await?;
        app.store.give_back(job.id, first.attempt).await?;
        assert!(matches!(app.store.know_program(job.id, first.attempt, &program).await, Err(StoreError::Fenced)));
        let second = claim(&app, LONG).await?;
        app.store.know_program(job.id, second.attempt, &serde_json::json!({"device": "cpu"})).await?;
        assert_eq!(app.store.programs_before(job.id, second.attempt).await?, [program]);
        Ok(())
    })
}

#[test]
fn a_job_that_this_version_cannot_read_keeps_no_worker_from_others() -> Result<()> {
    let (app, _, unreadable) = app_with_job()?;
    let id = unreadable.id.0;
    let next = app.sql(&format!(
        "insert into jobs select (jsonb_populate_record(j, jsonb_build_object('id', gen_random_uuid()))).* from jobs j where id = '{id}' returning id;
         update jobs set safety = jsonb_set(safety, '{{defense}}', '\"of_a_later_version\"') where id = '{id}'"
    ))?;
    let claimed = app.runtime.block_on(claim(&app, LONG))?;
    assert!(next.contains(&claimed.job.id.0.to_string()), "{next}");
    let row = app.sql(&format!("select status, rests_until from jobs where id = '{id}'"))?;
    assert_eq!(row, "validating_files|", "a worker that can read it finds it as it was");
    Ok(())
}

#[test]
fn a_worker_that_lost_the_check_cannot_touch_the_training() -> Result<()> {
    let (app, project, job) = app_with_job()?;
    app.runtime.block_on(async {
        let zombie = claim(&app, SHORT).await?;
        tokio::time::sleep(SHORT * 2).await;
        app.store.reap().await?;
        end_rest(&app)?;
        running(&app, LONG).await?;
        let error = JobError::new("x", "y");
        assert!(matches!(app.store.fail(job.id, zombie.attempt, error).await, Err(StoreError::Fenced)));
        assert!(matches!(app.store.heartbeat(job.id, zombie.attempt, LONG).await, Err(StoreError::Fenced)));
        assert_eq!(app.store.job(project, job.id).await?.state.status(), Status::Running);
        Ok(())
    })
}

fn step(step: u64) -> Progress {
    step_with(step, 1.0)
}

fn step_with(step: u64, task_loss: f64) -> Progress {
    Progress::Step(Box::new(Step {
        step,
        total_steps: 9,
        task_loss,
        token_accuracy: 0.5,
        alignment: None,
        norm_user: 1.0,
        gradient_norm: 1.0,
        learning_rate: 1.0,
        tokens: 1,
        tokens_per_second: 1.0,
        eta_seconds: 1.0,
        reviews: Vec::new(),
    }))
}
