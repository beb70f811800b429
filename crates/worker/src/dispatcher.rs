//! Claims jobs, keeps their leases, and writes down how they end.

use std::fs::{File, TryLockError};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holdfast_domain::ids::JobId;
use holdfast_domain::job::JobError;
use holdfast_domain::plan::{CheckpointFiles, paths};
use holdfast_domain::policy::Policy;
use holdfast_domain::progress::Progress;
use holdfast_store::queue::{AdapterFile, Checked, Claim, Wish, Work};
use holdfast_store::retention::{Removed, Retention};
use holdfast_store::workers::WorkerName;
use holdfast_store::{Listener, Store, StoreError};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::agent::{self, Checkpoint, Command, Outcome, ReportFailed, Reports};
use crate::evaluation;
use crate::evidence::Programs;
use crate::finish::{self, Ending, discard, stage};
use crate::job_folder::{Framed, JobFolder};
use crate::{Stop, WorkerConfig, base_cache, check};

/// How long a staged object may stay without a row: longer than any upload takes.
const STAGED_GRACE: Duration = Duration::from_secs(24 * 60 * 60);
const SWEEP_INTERVAL: Duration = Duration::from_secs(10 * 60);
/// How long between two renewals of a lease at most.
const MOST_BETWEEN_BEATS: Duration = Duration::from_secs(2);
/// How often it is asked whether the job's owner wants it cancelled or to wait.
const ASK_INTERVAL: Duration = Duration::from_millis(200);
/// How long a job of a lost worker waits at most once its lease is over.
const MOST_BETWEEN_REAPS: Duration = Duration::from_secs(2);
/// How often a worker says that it is there.
const PRESENCE_INTERVAL: Duration = Duration::from_secs(10);
/// How long a worker waits for one of its name to end: longer than the database takes to notice that a connection is dead, which
/// may be this process' own.
const NAME_PATIENCE: Duration = Duration::from_secs(60);
/// How long between two tries to write down how an attempt ended.
const WRITE_DELAY: Duration = Duration::from_secs(1);
/// How long to wait after the database or the object store failed.
const BACKOFF: Duration = Duration::from_secs(5);

/// What a job's owner is told of a machine without room.
const FULL_DISK: &str = "The worker's disk has no room left";

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

/// Works on a claim while its lease is renewed beside it.
async fn hold(store: &Store, config: &WorkerConfig, claim: &Claim, shutdown: &watch::Receiver<bool>) {
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

/// Makes a call that ends an attempt, again and again while the database is away, for as long as the lease would last without it.
async fn write_down<Call>(lease: Duration, call: impl Fn() -> Call) -> Result<(), StoreError>
where
    Call: Future<Output = Result<(), StoreError>>,
{
    let since = Instant::now();
    loop {
        match call().await {
            Err(error) if error.is_unavailable() && since.elapsed() < lease => {
                tracing::warn!(%error, "how the attempt ended could not be written down; trying again");
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
async fn within<T>(most: Duration, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    tokio::time::timeout(most, call).await.unwrap_or_else(|_| {
        Err(StoreError::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "the database does not answer")))
    })
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
        reason = agent::stopped(&mut stop) => return let_go(store, config.lease, claim, reason).await,
    };
    let base = match prepared {
        Prepared::Checked(Ok(checked)) => {
            tracing::info!("the job's files were checked");
            return write_down(config.lease, || store.accept_files(id, attempt, &checked)).await;
        }
        Prepared::Checked(Err(error)) => {
            tracing::info!(code = error.code, "the job's files cannot be used");
            return write_down(config.lease, || store.fail(id, attempt, error.clone())).await;
        }
        Prepared::ToTrain { base } => base,
    };
    let framed = tokio::select! {
        completed = folder.complete(store, claim, &base, &config.device) => completed?,
        reason = agent::stopped(&mut stop) => return let_go(store, config.lease, claim, reason).await,
    };
    let programs = Programs::now(&config.trainer).await?;
    let held = Held { store, config, claim, folder: &folder, stop, programs, framed };
    // A run that goes on has asked it, and is asked what is missing in the end: what a file's frames hold is kept for no later attempt.
    let unasked = match held.asking_policy().filter(|_| claim.resume.is_empty()) {
        Some(policy) => evaluation::ask_base(&held, policy).await?,
        None => None,
    };
    let outcome = match unasked {
        Some(outcome) => outcome,
        None => agent::run(config, folder.path(), Command::Train, &held.reports(), held.stop.clone()).await?,
    };
    tokio::select! {
        concluded = conclude(&held, outcome) => concluded,
        () = agent::lost(held.stop.clone()) => Err(StoreError::Fenced),
    }
}

/// A job that this worker trains, with all that its end needs.
pub(crate) struct Held<'a> {
    pub(crate) store: &'a Store,
    pub(crate) config: &'a WorkerConfig,
    pub(crate) claim: &'a Claim,
    pub(crate) folder: &'a JobFolder,
    pub(crate) stop: watch::Receiver<Option<Stop>>,
    /// As they were when the run began.
    pub(crate) programs: Programs,
    pub(crate) framed: Framed,
}

impl Held<'_> {
    /// The job's policy, if what it made is asked the suites under it.
    pub(crate) fn asking_policy(&self) -> Option<&Policy> {
        self.claim.job.policy.as_ref().map(|applied| &applied.policy).filter(|policy| policy.evaluates())
    }

    pub(crate) fn reports(&self) -> impl Reports {
        ToStore { store: self.store, claim: self.claim }
    }
}

/// Writes down how a run ended; publishes what it made.
async fn conclude(held: &Held<'_>, outcome: Outcome) -> Result<(), StoreError> {
    let Held { store, claim, .. } = held;
    match outcome {
        Outcome::Done { adapter, trained_tokens } => {
            if let Err(error) = held.folder.keep_reference(store, claim, &held.config.device).await {
                tracing::warn!(%error, "the alignment reference could not be kept; the next job computes it again");
            }
            match finish::finish(held, adapter, trained_tokens).await? {
                Ending::Written(ended) => ended,
                Ending::Other(outcome) => end(held, outcome).await,
            }
        }
        outcome => end(held, outcome).await,
    }
}

/// Writes down how a run ended that made no adapter.
async fn end(held: &Held<'_>, outcome: Outcome) -> Result<(), StoreError> {
    let Held { store, claim, config, .. } = held;
    let (id, attempt, lease) = (claim.job.id, claim.attempt, config.lease);
    match outcome {
        Outcome::Done { .. } => Ok(()),
        Outcome::Failed(error) => {
            tracing::warn!(code = error.code, reason = error.message, "the trainer made no adapter");
            write_down(lease, || store.fail(id, attempt, error.clone())).await
        }
        Outcome::Crashed(error) => {
            tracing::warn!(code = error.code, reason = error.message, "the trainer crashed");
            write_down(lease, || store.set_back(id, attempt, error.clone())).await
        }
        Outcome::FullDisk => {
            tracing::error!(folder = %config.folder.display(), "the disk under the worker's folder (--data-dir) has no room left");
            write_down(lease, || store.delay(id, attempt, FULL_DISK)).await
        }
        Outcome::Stopped(reason) => let_go(store, lease, claim, reason).await,
    }
}

/// What a claim comes to before a trainer is needed.
enum Prepared {
    /// The files were checked: what they hold, or why they cannot be used.
    Checked(Result<Checked, JobError>),
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
async fn let_go(store: &Store, lease: Duration, claim: &Claim, reason: Stop) -> Result<(), StoreError> {
    match reason {
        Stop::Lost => Err(StoreError::Fenced),
        Stop::Shutdown | Stop::Pause => {
            tracing::info!(?reason, "the job is given back");
            write_down(lease, || store.give_back(claim.job.id, claim.attempt)).await
        }
    }
}

struct ToStore<'a> {
    store: &'a Store,
    claim: &'a Claim,
}

impl ToStore<'_> {
    async fn keep(&self, checkpoints: &Path, checkpoint: Checkpoint) -> Result<(), StoreError> {
        let Self { store, claim } = self;
        let key = Store::checkpoint_keys(claim.job.project, claim.job.id, claim.attempt, checkpoint.step);
        let own = checkpoints.join(format!("{}{}", paths::CHECKPOINT_PREFIX, checkpoint.step));
        let mut files = stage(store, &agent::files_in(&own).await?, &key).await?;
        if let Err(what) = is_whole(&own, &files).await {
            discard(store, &files).await;
            return Err(StoreError::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, what)));
        }
        if let Some(step) = checkpoint.best {
            let folder = format!("{}{step}", paths::BEST_PREFIX);
            let best = agent::files_in(&checkpoints.join(&folder)).await?;
            for file in stage(store, &best, |name| key(&format!("{folder}/{name}"))).await? {
                files.push(AdapterFile { name: format!("{folder}/{}", file.name), ..file });
            }
        }
        store.keep_checkpoint(claim.job.id, claim.attempt, checkpoint.step, checkpoint.settled, &files).await
    }
}

/// Whether what was staged of a checkpoint is what the trainer wrote: one that is torn must not take the place of a whole one.
async fn is_whole(checkpoint: &Path, staged: &[AdapterFile]) -> Result<(), String> {
    let manifest = tokio::fs::read(checkpoint.join(paths::CHECKPOINT_MANIFEST)).await.map_err(|e| e.to_string())?;
    let CheckpointFiles { files } = serde_json::from_slice(&manifest).map_err(|e| e.to_string())?;
    let is_there = |(name, sha256): (&String, &String)| {
        staged.iter().any(|file| file.name == *name && hex::encode(file.object.sha256) == *sha256)
    };
    if files.iter().all(is_there) { Ok(()) } else { Err("the checkpoint is torn".into()) }
}

impl Reports for ToStore<'_> {
    async fn progress(&self, lines: &[Progress]) -> Result<(), ReportFailed> {
        self.store.report(self.claim.job.id, self.claim.attempt, lines).await.map_err(|error| {
            tracing::warn!(%error, "progress could not be written down");
            ReportFailed
        })
    }

    async fn checkpoint(&self, checkpoints: &Path, checkpoint: Checkpoint) -> Result<(), ReportFailed> {
        let Err(error) = self.keep(checkpoints, checkpoint).await else { return Ok(()) };
        if error.is_unavailable() {
            tracing::warn!(%error, step = checkpoint.step, "a checkpoint could not be kept; trying again");
            return Err(ReportFailed);
        }
        tracing::warn!(%error, step = checkpoint.step, "a checkpoint cannot be kept");
        Ok(())
    }
}
