//! Beside the trainer: makes the job folder, runs the trainer, follows what it writes, and says how it ended.

use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_domain::exit::ExitRecord;
use holdfast_domain::job::JobError;
use holdfast_domain::plan::paths;
use holdfast_domain::progress::Progress;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::watch;

use crate::outcome;
use crate::process::{self, Ended};
use crate::{Stop, WorkerConfig};

/// How often the progress log is read.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);

/// How often the last lines are tried, [`FOLLOW_INTERVAL`] apart.
const LAST_TRIES: u32 = 40;

/// Where the agent's reports go.
pub trait Reports: Sync {
    /// Passes on lines the trainer wrote. What cannot be passed on is said again with the next lines, never lost: an error
    /// makes the agent keep the lines.
    fn progress(&self, lines: &[Progress]) -> impl Future<Output = Result<(), ReportFailed>> + Send;
}

/// A report did not arrive.
#[derive(Debug, thiserror::Error)]
#[error("the report did not arrive")]
pub struct ReportFailed;

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// The adapter is written.
    Done {
        /// Its files.
        adapter: Vec<PathBuf>,
        /// Tokens of the training file that were read.
        trained_tokens: u64,
    },
    /// There is no adapter, and why.
    Failed(JobError),
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
    reports: &impl Reports,
    mut stop: watch::Receiver<Option<Stop>>,
) -> std::io::Result<Outcome> {
    let mut trainer = process::launch(&config.trainer, folder)?;
    let mut log = ProgressTail::new(folder.join(paths::PROGRESS));
    let ended = loop {
        tokio::select! {
            ended = trainer.wait() => break Ended::from(ended?),
            reason = stopped(&mut stop) => {
                process::terminate(&mut trainer).await?;
                return Ok(Outcome::Stopped(reason));
            }
            () = tokio::time::sleep(FOLLOW_INTERVAL) => log.pass_on(reports).await?,
        }
    };
    log.pass_on_the_rest(reports).await?;
    let record = read_record(folder).await;
    match outcome::judge(ended, record) {
        Err(error) => Ok(Outcome::Failed(error)),
        Ok(trained_tokens) => Ok(Outcome::Done { adapter: adapter_files(folder).await?, trained_tokens }),
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

async fn adapter_files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut entries = tokio::fs::read_dir(folder.join(paths::ADAPTER)).await?;
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
}

impl ProgressTail {
    fn new(path: PathBuf) -> Self {
        Self { path, offset: 0, partial: Vec::new(), unsent: Vec::new() }
    }

    async fn pass_on(&mut self, reports: &impl Reports) -> std::io::Result<()> {
        self.read().await?;
        if !self.unsent.is_empty() && reports.progress(&self.unsent).await.is_ok() {
            self.unsent.clear();
        }
        Ok(())
    }

    /// Passes on what is left once the trainer has ended, trying again for as long as a short outage of the database lasts.
    async fn pass_on_the_rest(&mut self, reports: &impl Reports) -> std::io::Result<()> {
        for _ in 0..LAST_TRIES {
            self.pass_on(reports).await?;
            if self.unsent.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(FOLLOW_INTERVAL).await;
        }
        tracing::warn!(lines = self.unsent.len(), "the last progress lines could not be written down");
        Ok(())
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
                Ok(line) => self.unsent.push(line),
                Err(error) => tracing::warn!(%error, "the trainer wrote a progress line that cannot be read"),
            }
        }
        Ok(())
    }
}
