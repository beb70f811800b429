//! Which steps were trained, as the trainers themselves wrote them down: what a worker reports goes down with it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow};
use holdfast_domain::progress::Progress;

use super::seconds_since_1970;

/// How long after a standstill a checkpoint may still wait for its next try, in seconds.
const STANDSTILL_FOLLOWS: f64 = 8.0;

/// The steps of an attempt in the order in which they were taken, and when each was seen, in seconds since 1970.
type Taken = Vec<(u64, f64)>;

/// Reads what trainers write while they write it.
#[derive(Debug)]
pub(super) struct Watcher {
    stop: Sender<()>,
    thread: JoinHandle<BTreeMap<(String, i32), Taken>>,
}

impl Watcher {
    /// Watches the job folders of some workers.
    pub(super) fn start(jobs: Vec<PathBuf>) -> Self {
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            let (mut taken, mut read) = (BTreeMap::new(), BTreeMap::new());
            while stopped
                .recv_timeout(Duration::from_millis(20))
                .is_err_and(|error| error == std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                for folder in jobs.iter().filter_map(|jobs| std::fs::read_dir(jobs).ok()).flatten().flatten() {
                    // A folder may go while it is read.
                    let _ = read_on(&folder.path(), &mut read, &mut taken);
                }
            }
            taken
        });
        Self { stop, thread }
    }

    /// What was trained.
    pub(super) fn stop(self) -> Result<Steps> {
        drop(self.stop);
        self.thread.join().map(Steps).map_err(|_| anyhow!("the thread that watched the steps panicked"))
    }
}

/// Reads the whole lines that a folder's trainer wrote since the last time.
fn read_on(folder: &Path, read: &mut BTreeMap<PathBuf, u64>, taken: &mut BTreeMap<(String, i32), Taken>) -> Result<()> {
    let name = folder.file_name().and_then(|name| name.to_str()).and_then(|name| name.rsplit_once('-'));
    let (job, attempt) = name.ok_or_else(|| anyhow!("no job's folder"))?;
    let mut file = File::open(folder.join(holdfast_domain::plan::paths::PROGRESS))?;
    let at = read.entry(folder.to_owned()).or_default();
    file.seek(SeekFrom::Start(*at))?;
    let (now, mut lines, mut line) = (seconds_since_1970()?, BufReader::new(file), String::new());
    while lines.read_line(&mut line)? > 0 && line.ends_with('\n') {
        *at += u64::try_from(line.len())?;
        if let Ok(Progress::Step(step)) = serde_json::from_str(&line) {
            taken.entry((job.to_owned(), attempt.parse()?)).or_default().push((step.step, now));
        }
        line.clear();
    }
    Ok(())
}

/// Something without which no checkpoint can be kept stood still, in seconds since 1970.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standstill {
    pub(super) from: f64,
    pub(super) to: f64,
}

/// All that was trained.
#[derive(Debug)]
pub(super) struct Steps(BTreeMap<(String, i32), Taken>);

/// The most steps that an attempt took again of those before it, in checkpoint intervals.
#[derive(Debug, Default)]
pub(super) struct Again {
    /// Where checkpoints could be kept all along.
    pub(super) most: f64,
    /// Where the store, the database or the worker itself stood still while a checkpoint was due.
    pub(super) held_up: f64,
}

impl Steps {
    /// What was taken again by jobs whose checkpoints are so many steps apart.
    pub(super) fn again(&self, standstills: &[Standstill], interval: impl Fn(&str) -> Option<u64>) -> Again {
        let mut again = Again::default();
        for (((job, _), before), ((next, _), after)) in self.0.iter().zip(self.0.iter().skip(1)) {
            let (Some(last), Some(first)) = (before.iter().map(|taken| taken.0).max(), after.first().map(|taken| taken.0)) else {
                continue;
            };
            let Some(interval) = interval(job).filter(|_| job == next) else { continue };
            let twice = (last + 1).saturating_sub(first);
            // The checkpoint that the next attempt would have gone on from, had it been kept at once.
            let due = before.iter().find(|taken| taken.0 >= first - 1 + interval).map(|taken| taken.1);
            let ended = before.last().map(|taken| taken.1);
            let held_up = due.zip(ended).is_some_and(|(due, ended)| {
                standstills.iter().any(|still| still.from < ended && still.to + STANDSTILL_FOLLOWS > due)
            });
            #[expect(clippy::cast_precision_loss, reason = "steps of small jobs")]
            let intervals = twice as f64 / interval as f64;
            let most = if held_up { &mut again.held_up } else { &mut again.most };
            *most = most.max(intervals);
        }
        again
    }
}
