//! Claims jobs, keeps their leases, and writes down how they end.

use std::fs::{File, TryLockError};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_domain::ids::JobId;
use holdfast_domain::job::JobError;
use holdfast_domain::progress::Progress;
use holdfast_store::queue::{AdapterFile, Claim, Work};
use holdfast_store::{Listener, Store, StoreError};
use tokio::sync::watch;
use tracing::Instrument;

use crate::agent::{self, Outcome, ReportFailed, Reports};
use crate::job_folder::JobFolder;
use crate::{Stop, WorkerConfig, base_cache, check};

/// How long a staged object may stay without a row: longer than any upload takes.
const STAGED_GRACE: Duration = Duration::from_secs(24 * 60 * 60);
const SWEEP_INTERVAL: Duration = Duration::from_secs(10 * 60);
/// How long to wait after the database or the object store failed.
const BACKOFF: Duration = Duration::from_secs(5);

/// Where job folders are, under the worker's folder.
const JOBS: &str = "jobs";
/// Where base models are kept, under the worker's folder.
const BASE_MODELS: &str = "base-models";

/// Works until `shutdown` is true, then gives back what it holds.
///
/// # Errors
/// When another worker uses its folder, or the folder cannot be made.
pub async fn run(store: Store, config: WorkerConfig, mut shutdown: watch::Receiver<bool>) -> std::io::Result<()> {
    let _alone = lock(&config.folder)?;
    // What a killed worker left: rows of tenants among it.
    let _ = tokio::fs::remove_dir_all(config.folder.join(JOBS)).await;
    let housekeeping = tokio::spawn(keep_house(store.clone(), config.lease));
    let mut waker = store.listen().await.ok();
    while !is_now_true(&shutdown) {
        let pause = match step(&store, &config, &shutdown).await {
            Ok(true) => continue,
            Ok(false) => config.poll,
            Err(error) => {
                tracing::warn!(%error, "no job could be claimed; trying again");
                BACKOFF
            }
        };
        tokio::select! {
            () = woken(&mut waker) => {}
            () = tokio::time::sleep(pause) => {}
            () = is_true(&mut shutdown) => {}
        }
    }
    housekeeping.abort();
    Ok(())
}

/// Keeps the folder to one worker; it is released when the file closes.
fn lock(folder: &Path) -> std::io::Result<File> {
    std::fs::create_dir_all(folder)?;
    // Tenants' rows are in it: nobody but the service may look inside.
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))?;
    let file = File::options().create(true).append(true).open(folder.join("lock"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::Error(error)) => Err(error),
        Err(TryLockError::WouldBlock) => {
            let message = format!("another worker uses {}; give each its own --data-dir", folder.display());
            Err(std::io::Error::new(std::io::ErrorKind::ResourceBusy, message))
        }
    }
}

/// Claims one job and works on it to its end. Returns whether there was one.
///
/// # Errors
/// When no job could be claimed because the database failed. What goes wrong with a claimed job is written on the job.
pub async fn step(store: &Store, config: &WorkerConfig, shutdown: &watch::Receiver<bool>) -> Result<bool, StoreError> {
    for folder in [JOBS, BASE_MODELS] {
        tokio::fs::create_dir_all(config.folder.join(folder)).await?;
    }
    let Some(claim) = store.claim(&config.name, config.lease).await? else { return Ok(false) };
    let span = tracing::info_span!("job", job = %claim.job.id, attempt = claim.attempt, work = ?claim.work);
    hold(store, config, &claim, shutdown).instrument(span).await;
    Ok(true)
}

/// Waits for a hint that there may be work. Without a listener, or when it fails, polling goes on alone.
async fn woken(waker: &mut Option<Listener>) {
    match waker {
        Some(listener) => {
            if listener.recv().await.is_err() {
                *waker = None;
            }
        }
        None => std::future::pending().await,
    }
}

/// Returns jobs of lost workers to the queue, and removes objects no row claims.
async fn keep_house(store: Store, lease: Duration) {
    let mut since_sweep = SWEEP_INTERVAL;
    let interval = lease / 2;
    loop {
        match store.reap().await {
            Ok(0) => {}
            Ok(jobs) => tracing::warn!(jobs, "returned jobs of lost workers to the queue"),
            Err(error) => tracing::warn!(%error, "expired leases could not be looked for"),
        }
        if since_sweep >= SWEEP_INTERVAL {
            since_sweep = Duration::ZERO;
            match store.objects().sweep(STAGED_GRACE).await {
                Ok(0) => {}
                Ok(objects) => tracing::info!(objects, "removed objects no row claims"),
                Err(error) => tracing::warn!(%error, "unclaimed objects could not be removed"),
            }
        }
        tokio::time::sleep(interval).await;
        since_sweep += interval;
    }
}

/// Works on a claim while its lease is renewed beside it.
async fn hold(store: &Store, config: &WorkerConfig, claim: &Claim, shutdown: &watch::Receiver<bool>) {
    let (stop, stopped) = watch::channel(None);
    let heart = beat(store, config.lease, claim.job.id, claim.attempt, shutdown.clone(), stop);
    let work = work(store, config, claim, stopped);
    let outcome = tokio::select! {
        outcome = work => outcome,
        never = heart => never,
    };
    match outcome {
        Ok(()) => tracing::info!("let go"),
        Err(StoreError::Fenced) => tracing::info!("the job is no longer this worker's"),
        Err(error) => {
            tracing::error!(%error, "the job could not be worked on; another attempt may");
            if let Err(error) = store.give_up(claim.job.id, claim.attempt).await {
                tracing::warn!(%error, "the job could not be given back; its lease will expire");
            }
        }
    }
}

/// Renews the lease, and says stop when it is lost or the worker shuts down. Never returns.
async fn beat(
    store: &Store,
    lease: Duration,
    job: JobId,
    attempt: i32,
    mut shutdown: watch::Receiver<bool>,
    stop: watch::Sender<Option<Stop>>,
) -> Result<(), StoreError> {
    let mut told = false;
    loop {
        tokio::select! {
            () = tokio::time::sleep(lease / 5) => {}
            // The lease is kept while the trainer ends, so this goes on.
            () = is_true(&mut shutdown), if !told => {
                told = true;
                stop.send_if_modified(|reason| reason.is_none() && reason.replace(Stop::Shutdown).is_none());
            }
        }
        match store.heartbeat(job, attempt, lease).await {
            Ok(()) => {}
            Err(StoreError::Fenced) => {
                stop.send_if_modified(|reason| reason.replace(Stop::Lost) != Some(Stop::Lost));
            }
            // A short outage is shorter than the lease; a long one loses the job, which the next heartbeat will say.
            Err(error) => tracing::warn!(%error, "the lease could not be renewed; trying again"),
        }
    }
}

fn is_now_true(shutdown: &watch::Receiver<bool>) -> bool {
    *shutdown.borrow()
}

/// Waits for the word to shut down. A sender that is gone will never say it.
async fn is_true(shutdown: &mut watch::Receiver<bool>) {
    let said = shutdown.wait_for(|down| *down).await.is_ok();
    if !said {
        std::future::pending::<()>().await;
    }
}

async fn work(
    store: &Store,
    config: &WorkerConfig,
    claim: &Claim,
    mut stop: watch::Receiver<Option<Stop>>,
) -> Result<(), StoreError> {
    let (id, attempt) = (claim.job.id, claim.attempt);
    let folder = JobFolder::create(&config.folder.join(JOBS), claim).await?;
    let prepared = tokio::select! {
        prepared = prepare(store, config, claim, &folder) => prepared?,
        reason = agent::stopped(&mut stop) => return stopped(store, claim, reason).await,
    };
    let base = match prepared {
        Prepared::Checked(Ok(summary)) => return store.accept_files(id, attempt, &summary).await,
        Prepared::Checked(Err(error)) => return store.fail(id, attempt, error).await,
        Prepared::ToTrain { base } => base,
    };
    folder.complete(store, claim, &base, &config.device).await?;
    let reports = ToStore { store, job: id, attempt };
    let outcome = agent::run(config, folder.path(), &reports, stop).await?;
    if let Err(error) = folder.keep_reference(store, claim).await {
        tracing::warn!(%error, "the alignment reference could not be kept; the next job computes it again");
    }
    match outcome {
        Outcome::Done { adapter, trained_tokens } => {
            let mut files = Vec::new();
            for path in adapter {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let object = store.objects().stage_file(Store::adapter_key(&claim.job, attempt, &name), &path).await?;
                files.push(AdapterFile { name, object });
            }
            store.publish(id, attempt, &files, trained_tokens).await.map(|_| ())
        }
        Outcome::Failed(error) => {
            tracing::warn!(code = error.code, reason = error.message, "the trainer made no adapter");
            store.fail(id, attempt, error).await
        }
        Outcome::Stopped(reason) => stopped(store, claim, reason).await,
    }
}

/// What a claim comes to before a trainer is needed.
enum Prepared {
    /// The files were checked: what they hold, or why they cannot be used.
    Checked(Result<String, JobError>),
    /// The rows and the base model are here.
    ToTrain { base: PathBuf },
}

/// Brings the files, and checks them when that is the work.
async fn prepare(store: &Store, config: &WorkerConfig, claim: &Claim, folder: &JobFolder) -> Result<Prepared, StoreError> {
    folder.fetch_rows(store, claim).await?;
    let base = base_cache::ensure(store, &config.folder.join(BASE_MODELS), &claim.base, config.cache_bytes).await?;
    Ok(match claim.work {
        Work::Check => Prepared::Checked(check::check(claim, folder, &base).await?),
        Work::Train => Prepared::ToTrain { base },
    })
}

/// Lets go of a claim.
async fn stopped(store: &Store, claim: &Claim, reason: Stop) -> Result<(), StoreError> {
    match reason {
        Stop::Lost => Err(StoreError::Fenced),
        Stop::Shutdown => store.give_back(claim.job.id, claim.attempt).await,
    }
}

struct ToStore<'a> {
    store: &'a Store,
    job: JobId,
    attempt: i32,
}

impl Reports for ToStore<'_> {
    async fn progress(&self, lines: &[Progress]) -> Result<(), ReportFailed> {
        self.store.report(self.job, self.attempt, lines).await.map_err(|error| {
            tracing::warn!(%error, "progress could not be written down");
            ReportFailed
        })
    }
}
