//! The program of the bench `queue`: fills a database with jobs, and lets many workers claim and finish empty ones.
//!
//! `bench-queue fill DATABASE_URL FINISHED` migrates the database and has it hold so many jobs that have ended.
//! `bench-queue work DATABASE_URL WORKERS SECONDS` has so many workers take a job and publish it, again and again, and prints how many
//! they finished a second. Nothing is trained: what is measured is the queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use holdfast_domain::hyperparameters::Requested;
use holdfast_domain::ids::FileId;
use holdfast_domain::policy::{AppliedPolicy, Policy, Scope};
use holdfast_domain::safety::{Defense, RequestedSafety};
use holdfast_store::base_models::BaseModelFacts;
use holdfast_store::jobs::NewJob;
use holdfast_store::queue::Published;
use holdfast_store::{ObjectLocation, Store};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

/// Jobs that wait when the workers begin: more than they finish in the time.
const WAITING: u32 = 60_000;
/// Projects that the workers take turns between.
const PROJECTS: u32 = 4;
const LEASE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["fill", database_url, finished] => fill(database_url, finished.parse()?).await,
        ["work", database_url, workers, seconds] => {
            work(database_url, workers.parse()?, Duration::from_secs(seconds.parse()?)).await
        }
        _ => bail!("usage: bench-queue fill DATABASE_URL FINISHED | work DATABASE_URL WORKERS SECONDS"),
    }
}

async fn connect(database_url: &str) -> Result<Store> {
    let objects = std::env::temp_dir().join("bench-queue-objects");
    std::fs::create_dir_all(&objects)?;
    Ok(Store::connect(database_url, &ObjectLocation::new(objects.to_string_lossy(), [])).await?)
}

async fn fill(database_url: &str, finished: u32) -> Result<()> {
    let store = connect(database_url).await?;
    store.migrate().await?;
    // A base of one word: nothing reads it here.
    let base = std::env::temp_dir().join("bench-queue-base");
    std::fs::create_dir_all(&base)?;
    std::fs::write(base.join("config.json"), "{}")?;
    store.create_base_model("base", &base, BaseModelFacts { parameter_count: 1, context_length: 2048 }).await?;
    let mut connection = PgConnection::connect(database_url).await?;
    for number in 1..=PROJECTS {
        let project = store.ensure_project(&format!("bench-{number}")).await?;
        let file: Uuid = sqlx::query_scalar(
            "insert into files (id, project_id, filename, purpose, bytes, sha256, row_count, object_keys)
             values (gen_random_uuid(), $1, 'rows.jsonl', 'fine-tune', 1, sha256('rows'), 1, array['bench']) returning id",
        )
        .bind(project.0)
        .fetch_one(&mut connection)
        .await?;
        let policy = Policy::at_least(Defense::None, 0.0, "default");
        let job = NewJob {
            base_model: "base".into(),
            model: "base".into(),
            start: None,
            training_file: FileId(file),
            validation_file: None,
            suffix: None,
            seed: 0,
            metadata: serde_json::json!({}),
            hyperparameters: Requested::default().resolve(1, None)?,
            safety: RequestedSafety::default().resolve(&policy)?,
            policy: AppliedPolicy { scope: Scope::Deployment, version: 0, policy: policy.clone() },
        };
        // The job that the others are copies of; it never waits itself.
        let template = store.create_job(project, &job, None).await?;
        store.cancel_job(project, template.id, None).await?;
    }
    copy(&mut connection, finished, "cancelled").await?;
    sqlx::raw_sql("vacuum analyze").execute(&mut connection).await?;
    store.close().await;
    Ok(())
}

/// Writes copies of the projects' first jobs, as many of each.
async fn copy(connection: &mut PgConnection, count: u32, status: &str) -> Result<()> {
    sqlx::query(
        "insert into jobs (id, project_id, base_model_id, training_file_id, seed, metadata, hyperparameters, safety, model, status,
                           files_checked, finished_at)
         select gen_random_uuid(), t.project_id, t.base_model_id, t.training_file_id, t.seed, t.metadata, t.hyperparameters, t.safety,
                t.model, $2, true, case when $2 = 'cancelled' then now() end
         from (select distinct on (project_id) * from jobs order by project_id, id) t, generate_series(1, $1) n",
    )
    .bind(i32::try_from(count / PROJECTS)?)
    .bind(status)
    .execute(connection)
    .await?;
    Ok(())
}

async fn work(database_url: &str, workers: usize, time: Duration) -> Result<()> {
    let mut connection = PgConnection::connect(database_url).await?;
    sqlx::raw_sql(
        "delete from job_leases; update jobs set status = 'cancelled', finished_at = now() where status in ('queued', 'running')",
    )
    .execute(&mut connection)
    .await?;
    copy(&mut connection, WAITING, "queued").await?;
    sqlx::raw_sql("vacuum analyze jobs").execute(&mut connection).await?;
    let store = connect(database_url).await?;
    let (finished, until) = (Arc::new(AtomicU64::new(0)), Instant::now() + time);
    let working: Vec<_> = (0..workers)
        .map(|number| {
            let (store, finished) = (store.clone(), Arc::clone(&finished));
            tokio::spawn(async move {
                while Instant::now() < until {
                    let Some(claim) = store.claim(&format!("worker-{number}"), LEASE).await? else { continue };
                    let nothing = Published { trained_tokens: 1, device: "cpu".into(), ..Published::default() };
                    store.publish(claim.job.id, claim.attempt, &nothing).await?;
                    finished.fetch_add(1, Ordering::Relaxed);
                }
                anyhow::Ok(())
            })
        })
        .collect();
    let since = Instant::now();
    for one in working {
        one.await??;
    }
    let finished = finished.load(Ordering::Relaxed);
    ensure!(finished < u64::from(WAITING), "the workers ran out of jobs");
    println!("{}", serde_json::json!({"finished_per_second": finished as f64 / since.elapsed().as_secs_f64()}));
    Ok(())
}
