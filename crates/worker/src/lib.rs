//! Takes jobs and runs the trainer on them, in two halves that one process holds on one machine and that a cluster will
//! split: the dispatcher (claims, leases, publishes; knows the store) and the agent (makes the job folder, runs the trainer,
//! follows its progress; knows only the small trait it reports through). No libtorch, no HTTP.

use std::path::PathBuf;
use std::time::Duration;

pub mod agent;
mod base_cache;
mod check;
mod dispatcher;
mod job_folder;
mod outcome;
mod process;

pub use dispatcher::{run, step};

/// How a worker works.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Its name, on leases and in logs.
    pub name: String,
    /// The trainer's program.
    pub trainer: PathBuf,
    /// Where trainers compute: `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// Where job folders and the cache of base models are.
    pub folder: PathBuf,
    /// How much of the disk base models may take, before the least recently used go.
    pub cache_bytes: u64,
    /// How long a job stays this worker's without a heartbeat.
    pub lease: Duration,
    /// How often it looks for work when nothing wakes it.
    pub poll: Duration,
}

/// Why a running job must stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The job is no longer this worker's: it was cancelled, or the lease was lost.
    Lost,
    /// The worker itself stops.
    Shutdown,
}
