//! Leases and fences, with workers played by the test.

use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_domain::hyperparameters::Requested;
use holdfast_domain::ids::ProjectId;
use holdfast_domain::job::{JobError, Status};
use holdfast_domain::progress::{Progress, Step};
use holdfast_domain::safety::{Floor, RequestedSafety};
use holdfast_store::StoreError;
use holdfast_store::base_models::BaseModelFacts;
use holdfast_store::jobs::{Job, NewJob};
use holdfast_store::queue::{Claim, Work};
use holdfast_tests::{ROW, TestApp};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(300);

/// A service with a job whose base model is a folder of one word: no trainer runs in these tests.
fn app_with_job() -> Result<(TestApp, ProjectId, Job)> {
    let app = TestApp::start()?;
    let file = app.uploaded(ROW.as_bytes())?.parse()?;
    let base = std::env::temp_dir().join(format!("holdfast-queue-{}", std::process::id()));
    std::fs::create_dir_all(&base)?;
    std::fs::write(base.join("config.json"), "{}")?;
    let (project, job) = app.runtime.block_on(async {
        app.store.create_base_model("m", &base, BaseModelFacts { parameter_count: 1, context_length: 2048 }).await?;
        let project = app.store.ensure_project("default").await?;
        let job = NewJob {
            base_model: "m".into(),
            training_file: file,
            validation_file: None,
            suffix: None,
            seed: 0,
            metadata: serde_json::json!({}),
            hyperparameters: Requested::default().resolve(1, None)?,
            safety: RequestedSafety::default().resolve(&Floor::default())?,
        };
        anyhow::Ok((project, app.store.create_job(project, &job).await?))
    })?;
    Ok((app, project, job))
}

async fn claim(app: &TestApp, lease: Duration) -> Result<Claim> {
    app.store.claim("test", lease).await?.context("nothing to claim")
}

/// Takes the job through its check, and claims it for training.
async fn running(app: &TestApp, lease: Duration) -> Result<Claim> {
    let check = claim(app, LONG).await?;
    app.store.accept_files(check.job.id, check.attempt, "fine").await?;
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
        let second = claim(&app, LONG).await?;
        assert!(second.attempt > first.attempt);
        assert!(matches!(app.store.publish(job.id, first.attempt, &[], 1).await, Err(StoreError::Fenced)));
        assert!(matches!(app.store.report(job.id, first.attempt, &[]).await, Err(StoreError::Fenced)));
        app.store.publish(job.id, second.attempt, &[], 1).await?;
        assert_eq!(app.store.job(project, job.id).await?.state.status(), Status::Succeeded);
        Ok(())
    })
}

#[test]
fn a_job_whose_workers_are_lost_again_and_again_fails_with_the_reason() -> Result<()> {
    let (app, project, job) = app_with_job()?;
    app.runtime.block_on(async {
        running(&app, SHORT).await?;
        for _ in 0..2 {
            tokio::time::sleep(SHORT * 2).await;
            app.store.reap().await?;
            claim(&app, SHORT).await?;
        }
        tokio::time::sleep(SHORT * 2).await;
        app.store.reap().await?;
        assert_eq!(app.store.job(project, job.id).await?.state.status(), Status::Failed);
        Ok(())
    })
}

#[test]
fn a_cancelled_job_s_worker_is_told_at_its_next_heartbeat() -> Result<()> {
    let (app, project, job) = app_with_job()?;
    app.runtime.block_on(async {
        let claim = running(&app, LONG).await?;
        app.store.cancel_job(project, job.id).await?;
        assert!(matches!(app.store.heartbeat(job.id, claim.attempt, LONG).await, Err(StoreError::Fenced)));
        assert!(matches!(app.store.publish(job.id, claim.attempt, &[], 1).await, Err(StoreError::Fenced)));
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
fn a_worker_that_lost_the_check_cannot_touch_the_training() -> Result<()> {
    let (app, project, job) = app_with_job()?;
    app.runtime.block_on(async {
        let zombie = claim(&app, SHORT).await?;
        tokio::time::sleep(SHORT * 2).await;
        app.store.reap().await?;
        running(&app, LONG).await?;
        let error = JobError::new("x", "y");
        assert!(matches!(app.store.fail(job.id, zombie.attempt, error).await, Err(StoreError::Fenced)));
        assert!(matches!(app.store.heartbeat(job.id, zombie.attempt, LONG).await, Err(StoreError::Fenced)));
        assert_eq!(app.store.job(project, job.id).await?.state.status(), Status::Running);
        Ok(())
    })
}

fn step(step: u64) -> Progress {
    Progress::Step(Box::new(Step {
        step,
        total_steps: 9,
        task_loss: 1.0,
        token_accuracy: 0.5,
        alignment: None,
        norm_user: 1.0,
        gradient_norm: 1.0,
        learning_rate: 1.0,
        tokens: 1,
        tokens_per_second: 1.0,
        eta_seconds: 1.0,
    }))
}
