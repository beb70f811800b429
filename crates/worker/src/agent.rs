//! Beside the trainer: runs it on a job folder, follows what it writes, and says how it ended.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holdfast_domain::exit::{self, ExitRecord};
use holdfast_domain::job::JobError;
use holdfast_domain::plan::paths;
use holdfast_domain::progress::Progress;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::{mpsc, watch};

use crate::outcome::{self, Verdict};
use crate::process::{self, Ended};
use crate::{Stop, WorkerConfig};

/// How often the progress log is read: a checkpoint's upload begins this long after it was written, at most.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);
/// How often it is looked whether the log grows.
const STALL_INTERVAL: Duration = Duration::from_secs(5);
/// How often what was read is passed on.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);
/// How long a trainer that is of no use any more has to end by itself.
const USELESS_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait after a checkpoint could not be kept: at first, doubled each time up to the last.
const RETRY_DELAYS: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(8));

/// Where the agent's reports go.
pub trait Reports: Sync {
    /// Passes on lines the trainer wrote. What cannot be passed on is said again with the next lines, never lost: an error
    /// makes the agent keep the lines.
    fn progress(&self, lines: &[Progress]) -> impl Future<Output = Result<(), ReportFailed>> + Send;

    /// Keeps a checkpoint, whose files stand under `checkpoints`. An error makes the agent try again; one that can never be kept
    /// is none.
    fn checkpoint(&self, checkpoints: &Path, checkpoint: Checkpoint) -> impl Future<Output = Result<(), ReportFailed>> + Send;
}

/// A checkpoint that the trainer has written, see [`Progress::Checkpoint`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Steps taken before it.
    pub step: u64,
    /// Whose best adapter it needs beside it to go on from.
    pub best: Option<u64>,
    /// Whether its adapter is one to serve.
    pub settled: bool,
}

/// A report did not arrive.
#[derive(Debug, thiserror::Error)]
#[error("the report did not arrive")]
pub struct ReportFailed;

/// What the trainer is to do with a job folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Train an adapter.
    Train,
    /// Ask it the suites, or the base before there is one.
    Evaluate,
}

impl Command {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Evaluate => "evaluate",
        }
    }
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// The adapter is written.
    Done {
        /// Its files; none of an evaluation.
        adapter: Vec<PathBuf>,
        /// Tokens of the training file that were read.
        trained_tokens: u64,
    },
    /// There is no adapter, and why; another attempt would end the same.
    Failed(JobError),
    /// There is no adapter; another attempt may do better.
    Crashed(JobError),
    /// This machine has no room left.
    FullDisk,
    /// It was stopped.
    Stopped(Stop),
}

/// Runs the trainer on a job folder to its end, or until `stop` says so.
///
/// # Errors
/// When the folder cannot be read or the trainer cannot be started: faults of this machine, not of the job.
pub async fn run(
    config: &WorkerConfig,
    folder: &Path,
    command: Command,
    reports: &impl Reports,
    mut stop: watch::Receiver<Option<Stop>>,
) -> std::io::Result<Outcome> {
    let progress = folder.join(paths::PROGRESS);
    // What an earlier command wrote is passed on already, and its record says nothing of this one.
    let written_before = tokio::fs::metadata(&progress).await.map(|metadata| metadata.len()).unwrap_or(0);
    let _ = tokio::fs::remove_file(folder.join(paths::EXIT)).await;
    let mut trainer = process::launch(&config.trainer, command.as_str(), folder)?;
    let (over, is_over) = watch::channel(false);
    let told = stop.clone();
    let supervise = async {
        let ended = tokio::select! {
            ended = trainer.wait() => ended.map(|status| (Ended::from(status), Why::Itself)),
            reason = stopped(&mut stop) => {
                let ended = process::terminate(&mut trainer, patience_is_over(reason, config, told.clone())).await;
                ended.map(|ended| (ended, Why::Told(reason)))
            }
            () = stalled(&progress, config.stall) => {
                let ended = process::terminate(&mut trainer, tokio::time::sleep(USELESS_PATIENCE)).await;
                ended.map(|ended| (ended, Why::Stalled))
            }
        };
        over.send_replace(true);
        ended
    };
    let (written, to_keep) = mpsc::unbounded_channel();
    let following = follow(ProgressTail::new(progress.clone(), written_before, written), reports, config.lease, is_over.clone());
    let follow = async {
        tokio::select! {
            followed = following => followed,
            () = lost(told.clone()) => Ok(()),
        }
    };
    let checkpoints = folder.join(paths::CHECKPOINTS);
    let keep = async {
        tokio::select! {
            () = keep(&checkpoints, to_keep, reports, config.lease, is_over) => {}
            () = lost(told.clone()) => {}
        }
        Ok(())
    };
    let ((ended, why), (), ()) = tokio::try_join!(supervise, follow, keep)?;
    if is_lost(&told) {
        return Ok(Outcome::Stopped(Stop::Lost));
    }
    let record = read_record(folder).await;
    // One that was asked to stop may have been done before it heard of it.
    let is_done = record.as_ref().is_some_and(|record| record.code == exit::DONE);
    match why {
        Why::Told(reason) if !is_done => return Ok(Outcome::Stopped(reason)),
        Why::Stalled if !is_done => {
            let message = format!("The trainer stood still for {} minutes and was ended.", config.stall.as_secs() / 60);
            return Ok(Outcome::Crashed(JobError::new("trainer_stalled", message)));
        }
        _ => {}
    }
    // On a full disk there may have been no room for the record either.
    if record.is_none() && ended != Ended::Code(exit::DONE.into()) && !crate::has_room(folder)? {
        return Ok(Outcome::FullDisk);
    }
    Ok(match outcome::judge(ended, record) {
        Verdict::Failed(error) => Outcome::Failed(error),
        Verdict::Crashed(error) => Outcome::Crashed(error),
        Verdict::FullDisk => Outcome::FullDisk,
        Verdict::Done(trained_tokens) => {
            let adapter = match command {
                Command::Train => files_in(&folder.join(paths::ADAPTER)).await?,
                Command::Evaluate => Vec::new(),
            };
            Outcome::Done { adapter, trained_tokens }
        }
    })
}

/// Waits for as long as a trainer that was told to stop may take to end its step and write a checkpoint. A pause is in no hurry, as
/// the lease is kept, until this worker stops or the job is lost.
async fn patience_is_over(mut reason: Stop, config: &WorkerConfig, mut stop: watch::Receiver<Option<Stop>>) {
    loop {
        let patience = match reason {
            Stop::Lost => USELESS_PATIENCE,
            Stop::Shutdown => config.drain,
            Stop::Pause => config.drain.max(config.stall),
        };
        let other = async {
            let now = stop.wait_for(|now| now.is_some_and(|now| now != reason)).await.map(|now| *now);
            // A sender that is gone will never say another.
            if let Ok(now) = now { now } else { std::future::pending().await }
        };
        tokio::select! {
            () = tokio::time::sleep(patience) => return,
            now = other => reason = now.unwrap_or(reason),
        }
    }
}

/// Why a trainer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Itself,
    Told(Stop),
    Stalled,
}

/// Waits until a log has not grown for so long; for ever, when that is no time at all.
async fn stalled(log: &Path, most: Duration) {
    if most.is_zero() {
        std::future::pending::<()>().await;
    }
    let (mut length, mut since) = (0, Instant::now());
    while since.elapsed() <= most {
        tokio::time::sleep((most / 10).min(STALL_INTERVAL)).await;
        let now = tokio::fs::metadata(log).await.map(|metadata| metadata.len()).unwrap_or(0);
        if now != length {
            (length, since) = (now, Instant::now());
        }
    }
}

/// Waits until the job is no longer this worker's.
pub(crate) async fn lost(mut stop: watch::Receiver<Option<Stop>>) {
    // A sender that is gone will never say it.
    if stop.wait_for(|reason| *reason == Some(Stop::Lost)).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn is_lost(stop: &watch::Receiver<Option<Stop>>) -> bool {
    *stop.borrow() == Some(Stop::Lost)
}

/// Passes on what the trainer writes, to its last line. Once it has ended that is tried for as long as the lease would last without
/// the database.
async fn follow(
    mut log: ProgressTail,
    reports: &impl Reports,
    lease: Duration,
    mut is_over: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let mut reported = Instant::now();
    while !*is_over.borrow() {
        tokio::select! {
            () = tokio::time::sleep(FOLLOW_INTERVAL) => {}
            _ = is_over.changed() => {}
        }
        log.read().await?;
        if reported.elapsed() >= REPORT_INTERVAL {
            log.pass_on(reports).await;
            reported = Instant::now();
        }
    }
    log.read().await?;
    let since = Instant::now();
    loop {
        log.pass_on(reports).await;
        if log.unsent.is_empty() {
            return Ok(());
        }
        if since.elapsed() > lease {
            tracing::warn!(lines = log.unsent.len(), "the last progress lines could not be written down");
            return Ok(());
        }
        tokio::time::sleep(REPORT_INTERVAL).await;
    }
}

/// Keeps checkpoints, one after the other, while the training goes on; what cannot be kept now is tried again, for as long as
/// the trainer keeps it on the disk.
async fn keep(
    checkpoints: &Path,
    mut written: mpsc::UnboundedReceiver<Checkpoint>,
    reports: &impl Reports,
    lease: Duration,
    is_over: watch::Receiver<bool>,
) {
    let (first_delay, longest) = RETRY_DELAYS;
    let mut over_since = None;
    while let Some(checkpoint) = written.recv().await {
        let mut delay = first_delay;
        while reports.checkpoint(checkpoints, checkpoint).await.is_err() {
            if *is_over.borrow() && over_since.get_or_insert_with(Instant::now).elapsed() > lease {
                tracing::warn!(step = checkpoint.step, "a checkpoint could not be kept before the job went on");
                return;
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(longest);
        }
    }
}

/// Waits for the word to stop. A sender that is gone will never say it.
pub(crate) async fn stopped(stop: &mut watch::Receiver<Option<Stop>>) -> Stop {
    let reason = stop.wait_for(Option::is_some).await.map(|reason| *reason);
    match reason {
        Ok(reason) => reason.unwrap_or(Stop::Lost),
        Err(_) => std::future::pending().await,
    }
}

async fn read_record(folder: &Path) -> Option<ExitRecord> {
    let bytes = tokio::fs::read(folder.join(paths::EXIT)).await.ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The files of a folder, by name.
pub(crate) async fn files_in(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut entries = tokio::fs::read_dir(folder).await?;
    let mut files = Vec::new();
    while let Some(entry) = entries.next_entry().await? {
        files.push(entry.path());
    }
    files.sort();
    Ok(files)
}

/// Reads what was appended to the progress log since the last time.
struct ProgressTail {
    path: PathBuf,
    offset: u64,
    partial: Vec<u8>,
    unsent: Vec<Progress>,
    /// Hears of the checkpoints.
    checkpoints: mpsc::UnboundedSender<Checkpoint>,
}

impl ProgressTail {
    fn new(path: PathBuf, offset: u64, checkpoints: mpsc::UnboundedSender<Checkpoint>) -> Self {
        Self { path, offset, partial: Vec::new(), unsent: Vec::new(), checkpoints }
    }

    async fn pass_on(&mut self, reports: &impl Reports) {
        if !self.unsent.is_empty() && reports.progress(&self.unsent).await.is_ok() {
            self.unsent.clear();
        }
    }

    async fn read(&mut self) -> std::io::Result<()> {
        let mut file = match tokio::fs::File::open(&self.path).await {
            Ok(file) => file,
            // The trainer has not begun to write.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        file.seek(std::io::SeekFrom::Start(self.offset)).await?;
        self.offset += file.read_to_end(&mut self.partial).await? as u64;
        let Some(end) = self.partial.iter().rposition(|b| *b == b'\n') else { return Ok(()) };
        let rest = self.partial.split_off(end + 1);
        let whole = std::mem::replace(&mut self.partial, rest);
        for line in whole.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice(line) {
                Ok(Progress::Checkpoint { step, best, settled }) => {
                    // Nobody hears it once the job is lost.
                    let _ = self.checkpoints.send(Checkpoint { step, best, settled });
                }
                Ok(line) => self.unsent.push(line),
                Err(error) => tracing::warn!(%error, "the trainer wrote a progress line that cannot be read"),
            }
        }
        Ok(())
    }
}
