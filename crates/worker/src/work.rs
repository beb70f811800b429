//! What is done with a claim: its files are checked, or a model is trained, and how that ended is written down.

use std::path::PathBuf;
use std::time::Duration;

use holdfast_domain::job::JobError;
use holdfast_domain::policy::Policy;
use holdfast_safety::manifest::Program;
use holdfast_store::queue::{Checked, Claim, Work};
use holdfast_store::{Store, StoreError};
use tokio::sync::watch;

use crate::agent::{self, Command, Outcome, Reports};
use crate::dispatcher::{BASE_MODELS, JOBS};
use crate::evidence;
use crate::finish::{self, Unfinished};
use crate::job_folder::{Framed, JobFolder};
use crate::lease::write_down;
use crate::reports::ToStore;
use crate::{Stop, WorkerConfig, base_cache, check, evaluation};

/// What a job's owner is told of a machine without room.
pub(crate) const FULL_DISK: &str = "The worker's disk has no room left";

pub(crate) async fn work(
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
        completed = folder.complete(store, claim, &base, config) => completed?,
        reason = agent::stopped(&mut stop) => return let_go(store, config.lease, claim, reason).await,
    };
    let program = evidence::program(config).await?;
    let known = serde_json::to_value(&program).map_err(std::io::Error::other)?;
    write_down(config.lease, || store.know_program(id, attempt, &known)).await?;
    let run = Run { store, config, claim, folder: &folder, stop, program, framed };
    // A run that goes on has asked it, and is asked what is missing in the end: what a file's frames hold is kept for no later attempt.
    let unasked = match run.asking_policy().filter(|_| claim.resume.is_empty()) {
        Some(policy) => evaluation::ask_base(&run, policy).await?,
        None => None,
    };
    let outcome = match unasked {
        Some(outcome) => outcome,
        None => agent::run(config, folder.path(), Command::Train, &run.reports(), run.stop.clone()).await?,
    };
    tokio::select! {
        concluded = conclude(&run, outcome) => concluded,
        () = agent::lost(run.stop.clone()) => Err(StoreError::Fenced),
    }
}

/// A job that this worker trains, with all that its end needs.
pub(crate) struct Run<'a> {
    pub(crate) store: &'a Store,
    pub(crate) config: &'a WorkerConfig,
    pub(crate) claim: &'a Claim,
    pub(crate) folder: &'a JobFolder,
    pub(crate) stop: watch::Receiver<Option<Stop>>,
    /// As it was when the attempt began.
    pub(crate) program: Program,
    pub(crate) framed: Framed,
}

impl Run<'_> {
    /// The job's policy, if what it made is asked the suites under it.
    pub(crate) fn asking_policy(&self) -> Option<&Policy> {
        self.claim.job.policy.as_ref().map(|applied| &applied.policy).filter(|policy| policy.evaluates())
    }

    pub(crate) fn reports(&self) -> impl Reports {
        ToStore { store: self.store, claim: self.claim }
    }
}

/// Writes down how a run ended; publishes what it made.
async fn conclude(run: &Run<'_>, outcome: Outcome) -> Result<(), StoreError> {
    let Run { store, claim, .. } = run;
    match outcome {
        Outcome::Done { adapter, trained_tokens } => {
            if let Err(error) = run.folder.keep_reference(store, claim, &run.config.device).await {
                tracing::warn!(%error, "the alignment reference could not be kept; the next job computes it again");
            }
            match finish::finish(run, adapter, trained_tokens).await {
                Ok(()) => Ok(()),
                Err(Unfinished::Store(error)) => Err(error),
                Err(Unfinished::Ended(outcome)) => end(run, outcome).await,
            }
        }
        outcome => end(run, outcome).await,
    }
}

/// Writes down how a run ended that made no adapter.
async fn end(run: &Run<'_>, outcome: Outcome) -> Result<(), StoreError> {
    let Run { store, claim, config, .. } = run;
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
