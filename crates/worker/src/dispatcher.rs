//! A worker from its start to its end: claims one job after the other, and does beside it what every worker does for all.

use std::fs::{File, TryLockError};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use holdfast_store::retention::{Removed, Retention};
use holdfast_store::workers::WorkerName;
use holdfast_store::{Listener, Store, StoreError};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::lease::{hold, is_true, within};
use crate::work::FULL_DISK;
use crate::{WorkerConfig, base_cache};

/// How long a staged object may stay without a row: longer than any upload takes.
const STAGED_GRACE: Duration = Duration::from_secs(24 * 60 * 60);
const SWEEP_INTERVAL: Duration = Duration::from_secs(10 * 60);
/// How long a job of a lost worker waits at most once its lease is over.
const MOST_BETWEEN_REAPS: Duration = Duration::from_secs(2);
/// How often a worker says that it is there.
const PRESENCE_INTERVAL: Duration = Duration::from_secs(10);
/// How long a worker waits for one of its name to end: longer than the database takes to notice that a connection is dead, which
/// may be this process' own.
const NAME_PATIENCE: Duration = Duration::from_secs(60);
/// How long to wait after the database or the object store failed.
const BACKOFF: Duration = Duration::from_secs(5);

/// Where job folders are, under the worker's folder.
pub(crate) const JOBS: &str = "jobs";
/// Where base models are kept, under the worker's folder.
pub(crate) const BASE_MODELS: &str = "base-models";

/// Works until `shutdown` is true, then gives back what it holds.
///
/// # Errors
/// When another worker uses its folder, or the folder cannot be made.
pub async fn run(store: Store, config: WorkerConfig, mut shutdown: watch::Receiver<bool>) -> std::io::Result<()> {
    let _alone = lock(&config.folder)?;
    let mut name = take_name(&store, &config.name, &mut shutdown).await?;
    // What a killed worker left: rows of tenants among it.
    let _ = tokio::fs::remove_dir_all(config.folder.join(JOBS)).await;
    base_cache::clean(&config.folder.join(BASE_MODELS)).await;
    // They end with this function, whichever way it ends.
    let mut beside = JoinSet::new();
    beside.spawn(reap(store.clone(), config.lease));
    beside.spawn(sweep(store.clone(), config.retention));
    beside.spawn(be_present(store.clone(), config.name.clone(), config.device.clone()));
    let mut waker = None;
    let mut had_room = true;
    while !is_now_true(&shutdown) {
        if waker.is_none() {
            waker = store.listen().await.ok();
        }
        if let Some(name) = &mut name
            && matches!(within(config.lease, name.is_held(&store)).await, Ok(false))
        {
            // Perhaps by a connection of this process that the database still believes in.
            match take_name(&store, &config.name, &mut shutdown).await? {
                Some(taken) => *name = taken,
                None => break,
            }
        }
        let has_room = crate::has_room(&config.folder)?;
        if had_room && !has_room {
            tracing::error!(folder = %config.folder.display(), "{FULL_DISK}: no job is taken until it has (--data-dir)");
        }
        had_room = has_room;
        let outcome = if has_room { step(&store, &config, &shutdown).await } else { Ok(false) };
        let pause = match outcome {
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
    beside.shutdown().await;
    if let Some(name) = name
        && let Err(error) = name.release().await
    {
        tracing::debug!(%error, "the worker's name could not be given back");
    }
    if let Err(error) = store.worker_goes(&config.name).await {
        tracing::debug!(%error, "it could not be said that this worker goes");
    }
    Ok(())
}

/// Takes the worker's name for this process, waiting a while for one that is just ending. `None` when it is to shut down before.
async fn take_name(store: &Store, name: &str, shutdown: &mut watch::Receiver<bool>) -> std::io::Result<Option<WorkerName>> {
    let mut waited = Duration::ZERO;
    loop {
        match store.take_worker_name(name).await {
            Ok(Some(taken)) => return Ok(Some(taken)),
            Ok(None) if waited >= NAME_PATIENCE => return Err(name_is_taken(name)),
            Ok(None) if waited.is_zero() => tracing::warn!(name, "another worker has this name; waiting for it to end"),
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "the database cannot be asked for the worker's name; trying again"),
        }
        waited += BACKOFF;
        tokio::select! {
            () = tokio::time::sleep(BACKOFF) => {}
            () = is_true(shutdown) => return Ok(None),
        }
    }
}

fn name_is_taken(name: &str) -> std::io::Error {
    let message = format!("another worker is called {name:?}; give each a name of its own (--worker-name)");
    std::io::Error::new(std::io::ErrorKind::ResourceBusy, message)
}

/// Says again and again that this worker is there.
async fn be_present(store: Store, name: String, device: String) {
    let mut started = true;
    loop {
        match store.worker_is_here(&name, &device, env!("CARGO_PKG_VERSION"), started).await {
            Ok(()) => started = false,
            Err(error) => tracing::debug!(%error, "it could not be said that this worker is there"),
        }
        tokio::time::sleep(PRESENCE_INTERVAL).await;
    }
}

/// Keeps the folder to one worker; it is released when the file closes.
fn lock(folder: &Path) -> std::io::Result<File> {
    let make = || {
        std::fs::create_dir_all(folder)?;
        // Tenants' rows are in it: nobody but the service may look inside.
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))?;
        File::options().create(true).append(true).open(folder.join("lock"))
    };
    let file = make().map_err(|error| {
        std::io::Error::new(error.kind(), format!("the folder {} (under --data-dir) cannot be used: {error}", folder.display()))
    })?;
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

/// Returns jobs of lost workers to the queue, again and again.
async fn reap(store: Store, lease: Duration) {
    loop {
        match store.reap().await {
            Ok(0) => {}
            Ok(jobs) => tracing::warn!(jobs, "returned jobs of lost workers to the queue"),
            Err(error) => tracing::warn!(%error, "expired leases could not be looked for"),
        }
        tokio::time::sleep((lease / 2).min(MOST_BETWEEN_REAPS)).await;
    }
}

/// Removes what is done with, again and again.
async fn sweep(store: Store, retention: Retention) {
    loop {
        report("files that had expired", store.remove_expired_files().await);
        report("uploads whose time was over", store.remove_expired_uploads().await);
        report("requests that can no longer be repeated", store.forget_requests().await);
        report("workers that were not heard of for a day", store.forget_workers().await);
        match store.retire(&retention).await {
            Ok(removed) if removed == Removed::default() => {}
            Ok(removed) => tracing::info!(?removed, "removed what was kept long enough"),
            Err(error) => tracing::warn!(%error, "could not remove what was kept long enough"),
        }
        report("objects no row claims", store.objects().sweep(STAGED_GRACE).await);
        tokio::time::sleep(SWEEP_INTERVAL).await;
    }
}

fn report(what: &str, removed: Result<u64, StoreError>) {
    match removed {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "removed {what}"),
        Err(error) => tracing::warn!(%error, "could not remove {what}"),
    }
}

fn is_now_true(shutdown: &watch::Receiver<bool>) -> bool {
    *shutdown.borrow()
}
