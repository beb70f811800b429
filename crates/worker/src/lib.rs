//! Takes jobs and runs the trainer on them, in two halves that one process holds on one machine and that a cluster will
//! split: the dispatcher (claims, leases, job folders, publishes; knows the store) and the agent (runs the trainer,
//! follows its progress; knows only the small trait it reports through). No libtorch, no HTTP.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use holdfast_judge::Endpoint;
use holdfast_safety::manifest::SignKey;
use holdfast_store::retention::Retention;

pub mod agent;
mod base_cache;
mod check;
mod dispatcher;
mod evaluation;
mod evidence;
mod finish;
mod job_folder;
mod lease;
mod outcome;
mod pauses;
mod process;
mod reports;
mod results;
mod task;
mod work;

pub use dispatcher::{run, step};

/// Below so many free bytes a worker takes no job, and a trainer that ended without a word is taken to have met the end of the disk.
const LEAST_ROOM: u64 = 32 * 1024 * 1024;

/// Whether the disk under a folder has room for a job's rows.
fn has_room(folder: &Path) -> std::io::Result<bool> {
    let disk = rustix::fs::statvfs(folder)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize) >= LEAST_ROOM)
}

/// How a worker works.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Its name, on leases and in logs.
    pub name: String,
    /// The trainer's program.
    pub trainer: PathBuf,
    /// Where trainers compute: `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// The most memory in bytes that a run may take where it computes; `None`: on a CPU what the machine or its container has, and a GPU is not
    /// asked.
    pub memory_limit_bytes: Option<u64>,
    /// Where job folders and the cache of base models are.
    pub folder: PathBuf,
    /// How much of the disk base models may take, before the least recently used go.
    pub cache_bytes: u64,
    /// How long a job stays this worker's without a heartbeat.
    pub lease: Duration,
    /// How often it looks for work when nothing wakes it.
    pub poll: Duration,
    /// How long a trainer may write nothing before it is taken to hang and ended; zero: for ever.
    pub stall: Duration,
    /// How long a trainer has to end its step and write a checkpoint when this worker stops.
    pub drain: Duration,
    /// Who judges answers where a policy wants an endpoint to.
    pub judge: Option<Arc<Endpoint>>,
    /// How long a job waits for a judge that is away.
    pub judge_patience: Duration,
    /// What manifests are signed with.
    pub signing_key: SignKey,
    /// How long what is done with is kept.
    pub retention: Retention,
}

/// Why a running job must stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The job is no longer this worker's: it was cancelled, or the lease was lost.
    Lost,
    /// The worker itself stops.
    Shutdown,
    /// The job's owner wants it to wait.
    Pause,
}
