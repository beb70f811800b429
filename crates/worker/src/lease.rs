//! A claim from its beginning to its end: it is worked on while its lease is renewed beside it.

use std::time::{Duration, Instant};

use holdfast_domain::ids::JobId;
use holdfast_domain::job::JobError;
use holdfast_store::queue::{Claim, Wish};
use holdfast_store::{Store, StoreError};
use tokio::sync::watch;

use crate::work::{FULL_DISK, work};
use crate::{Stop, WorkerConfig, agent};

/// How long between two renewals of a lease at most.
const MOST_BETWEEN_BEATS: Duration = Duration::from_secs(2);
/// How often it is asked whether the job's owner wants it cancelled or to wait.
const ASK_INTERVAL: Duration = Duration::from_millis(200);
/// How long between two tries to write down how an attempt ended.
const WRITE_DELAY: Duration = Duration::from_secs(1);

/// Works on a claim while its lease is renewed beside it.
pub(crate) async fn hold(store: &Store, config: &WorkerConfig, claim: &Claim, shutdown: &watch::Receiver<bool>) {
    let (stop, told) = watch::channel(None);
    let heart = beat(store, config.lease, claim.job.id, claim.attempt, shutdown.clone(), stop);
    let work = async {
        let mut outcome = work(store, config, claim, told.clone()).await;
        if let Err(error) = &outcome
            && !matches!(error, StoreError::Fenced)
        {
            outcome = tokio::select! {
                put_off = put_off(store, config.lease, claim, error) => put_off,
                () = agent::lost(told) => Err(StoreError::Fenced),
            };
        }
        outcome
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        never = heart => never,
    };
    match outcome {
        Ok(()) => {}
        Err(StoreError::Fenced) => tracing::info!("the job is no longer this worker's"),
        Err(error) => tracing::warn!(%error, "the job could not be given back; its lease will expire"),
    }
}

/// Makes a call that begins or ends an attempt, again and again while the database is away, for as long as the lease would last without it.
pub(crate) async fn write_down<Call>(lease: Duration, call: impl Fn() -> Call) -> Result<(), StoreError>
where
    Call: Future<Output = Result<(), StoreError>>,
{
    let since = Instant::now();
    loop {
        match call().await {
            Err(error) if error.is_unavailable() && since.elapsed() < lease => {
                tracing::warn!(%error, "what became of the attempt could not be written down; trying again");
            }
            ended => return ended,
        }
        tokio::time::sleep(WRITE_DELAY).await;
    }
}

/// Gives a claim back that could not be worked on. What every worker needs is waited for; what only this one lacks, another may have.
async fn put_off(store: &Store, lease: Duration, claim: &Claim, error: &StoreError) -> Result<(), StoreError> {
    let (id, attempt) = (claim.job.id, claim.attempt);
    let missing = match error {
        StoreError::Objects(_) if error.is_unavailable() => Some("The object store could not be used"),
        StoreError::Database(_) if error.is_unavailable() => Some("The database could not be used"),
        _ if error.is_full_disk() => Some(FULL_DISK),
        _ => None,
    };
    match missing {
        Some(reason) => {
            tracing::warn!(%error, "{reason}; the job is tried again");
            write_down(lease, || store.delay(id, attempt, reason)).await
        }
        None => {
            tracing::error!(%error, "the job could not be worked on; another attempt may");
            let message = "The service could not work on the job; its log says why. Nothing of your data is lost; tell the operator if the job fails for this.";
            write_down(lease, || store.set_back(id, attempt, JobError::new("operator_error", message))).await
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
    let between = (lease / 5).min(MOST_BETWEEN_BEATS);
    let (mut told, mut beaten) = (false, Instant::now());
    loop {
        tokio::select! {
            () = tokio::time::sleep(between.min(ASK_INTERVAL)) => {}
            // The lease is kept while the trainer ends, so this goes on.
            () = is_true(&mut shutdown), if !told => {
                told = true;
                stop.send_if_modified(|reason| *reason != Some(Stop::Lost) && reason.replace(Stop::Shutdown) != Some(Stop::Shutdown));
            }
        }
        let renews = beaten.elapsed() >= between;
        let answer = if renews {
            let asked = Instant::now();
            let answer = within(between, store.heartbeat(job, attempt, lease)).await;
            // One that failed is tried again at once, not when the next is due: the lease runs on.
            if answer.is_ok() {
                beaten = asked;
            }
            answer
        } else {
            within(between, store.wish(job, attempt)).await
        };
        match answer {
            Ok(Wish::Continue) => {}
            Ok(Wish::Pause) => {
                stop.send_if_modified(|reason| reason.is_none() && reason.replace(Stop::Pause).is_none());
            }
            Err(StoreError::Fenced) => {
                stop.send_if_modified(|reason| reason.replace(Stop::Lost) != Some(Stop::Lost));
            }
            // A short outage is shorter than the lease; a long one loses the job, which the next heartbeat will say.
            Err(error) if renews => tracing::warn!(%error, "the lease could not be renewed; trying again"),
            Err(_) => {}
        }
    }
}

/// A call to the database that is not waited for any longer than this: a connection may be dead without saying so, and another one
/// would do.
pub(crate) async fn within<T>(most: Duration, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    tokio::time::timeout(most, call).await.unwrap_or_else(|_| {
        Err(StoreError::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "the database does not answer")))
    })
}

/// Waits for the word to shut down. A sender that is gone will never say it.
pub(crate) async fn is_true(shutdown: &mut watch::Receiver<bool>) {
    let said = shutdown.wait_for(|down| *down).await.is_ok();
    if !said {
        std::future::pending::<()>().await;
    }
}
