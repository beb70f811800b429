//! What can go wrong, and how it is mended.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use rustix::process::{Signal, kill_process};

use super::WORKERS;
use crate::World;
use crate::world::pid;

/// What is done to the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    /// A worker is killed, and its trainer with it.
    WorkerKilled,
    /// A worker stands still, often past its lease, and goes on.
    WorkerStopped,
    /// A worker is asked to stop, and started again.
    WorkerDrained,
    /// A trainer is killed.
    TrainerKilled,
    /// A trainer stands still.
    TrainerStopped,
    /// A trainer dies as if the power went: its newest checkpoint is torn.
    CheckpointTorn,
    /// The disk under a worker's job folders is full.
    DiskFull,
    /// Postgres is stopped at once.
    PostgresKilled,
    /// The object store is gone.
    StoreDown,
    /// The object store takes requests and does not answer.
    StoreSlow,
    /// The API is killed.
    ApiKilled,
    /// A worker's clock jumps, forwards or back, and jumps again when it is set right.
    ClockJumps,
}

impl Kind {
    /// Whether both strike the same thing, so that one's end would be in the other's way.
    pub(super) fn excludes(self, other: Self) -> bool {
        self == other || (self.strikes_store() && other.strikes_store())
    }

    /// Whether no checkpoint can be kept while it lasts.
    pub(super) fn holds_up_checkpoints(self) -> bool {
        self.strikes_store() || matches!(self, Self::PostgresKilled | Self::WorkerStopped)
    }

    /// Whether it ends what a worker works on.
    pub(super) fn ends_attempts(self) -> bool {
        matches!(self, Self::WorkerKilled | Self::WorkerStopped | Self::TrainerKilled | Self::CheckpointTorn)
    }

    fn strikes_store(self) -> bool {
        matches!(self, Self::StoreDown | Self::StoreSlow)
    }
}

/// How often each is chosen, of the sum of all.
const WEIGHTS: [(Kind, u32); 12] = [
    (Kind::WorkerKilled, 4),
    (Kind::WorkerStopped, 3),
    (Kind::WorkerDrained, 3),
    (Kind::TrainerKilled, 4),
    (Kind::TrainerStopped, 2),
    (Kind::CheckpointTorn, 3),
    (Kind::DiskFull, 2),
    (Kind::PostgresKilled, 2),
    (Kind::StoreDown, 2),
    (Kind::StoreSlow, 2),
    (Kind::ApiKilled, 3),
    (Kind::ClockJumps, 2),
];

const DAY: i32 = 24 * 60 * 60;

/// A fault, when it comes and how long it lasts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    pub(super) kind: Kind,
    pub(super) worker: usize,
    /// After the one before it.
    pub(super) pause: Duration,
    pub(super) lasts: Duration,
    /// How far a clock jumps, in seconds.
    jump: i32,
}

impl Fault {
    /// The next one.
    pub(super) fn draw(random: &mut ChaCha8Rng) -> Self {
        let sum: u32 = WEIGHTS.iter().map(|(_, weight)| weight).sum();
        let mut at = random.random_range(0..sum);
        let mut kind = Kind::WorkerKilled;
        for (candidate, weight) in WEIGHTS {
            if at < weight {
                kind = candidate;
                break;
            }
            at -= weight;
        }
        let worker = random.random_range(0..WORKERS);
        let mut milliseconds = |range: std::ops::Range<u64>| Duration::from_millis(random.random_range(range));
        let pause = milliseconds(500..2500);
        let lasts = match kind {
            Kind::WorkerStopped | Kind::ClockJumps => milliseconds(1000..9000),
            Kind::TrainerStopped | Kind::StoreSlow => milliseconds(500..4000),
            Kind::StoreDown => milliseconds(500..5000),
            Kind::DiskFull => milliseconds(500..3000),
            Kind::PostgresKilled => milliseconds(0..2000),
            _ => milliseconds(0..1000),
        };
        // Drawn always, so that what comes after does not hang on the kind.
        let jump = random.random_range(-DAY..DAY);
        Self { kind, worker, pause, lasts, jump }
    }

    /// Does it. Returns whether there was anything to do it to.
    pub(super) fn strike(&self, world: &mut World) -> Result<bool> {
        let worker = world.workers.get(self.worker).context("no such worker")?;
        match self.kind {
            Kind::WorkerKilled => worker.signal(Signal::KILL),
            Kind::WorkerStopped => worker.signal(Signal::STOP),
            Kind::WorkerDrained => worker.signal(Signal::TERM),
            Kind::TrainerKilled | Kind::TrainerStopped => {
                let Some(trainer) = worker.trainer() else { return Ok(false) };
                let signal = if self.kind == Kind::TrainerKilled { Signal::KILL } else { Signal::STOP };
                return Ok(kill_process(trainer, signal).is_ok());
            }
            Kind::CheckpointTorn => {
                let (Some(trainer), Some(file)) = (worker.trainer(), newest_checkpoint(&worker.jobs())) else { return Ok(false) };
                let bytes = std::fs::metadata(&file).map(|metadata| metadata.len()).unwrap_or(0);
                let _ = kill_process(trainer, Signal::KILL);
                if let Ok(file) = std::fs::File::options().write(true).open(&file) {
                    let _ = file.set_len(bytes / 2);
                }
            }
            Kind::DiskFull => {
                if !worker.has_own_disk {
                    return Ok(false);
                }
                let mut filler = std::fs::File::create(worker.folder.join("filler"))?;
                while filler.write_all(&[0; 1 << 16]).is_ok() {}
            }
            Kind::PostgresKilled => {
                let Some(server) = pid(world.postgres.id()) else { return Ok(false) };
                return Ok(kill_process(server, Signal::QUIT).is_ok());
            }
            Kind::StoreDown => world.s3.stop()?,
            Kind::StoreSlow => world.s3.signal(Signal::STOP)?,
            Kind::ApiKilled => {
                if let Some(api) = &mut world.api {
                    api.kill()?;
                }
            }
            Kind::ClockJumps => return worker.set_clock(self.jump),
        }
        Ok(true)
    }

    /// Mends what it did.
    pub(super) fn heal(&self, world: &mut World) -> Result<()> {
        let worker = world.workers.get(self.worker).context("no such worker")?;
        match self.kind {
            Kind::WorkerStopped => worker.signal(Signal::CONT),
            Kind::TrainerStopped => {
                if let Some(trainer) = worker.trainer() {
                    let _ = kill_process(trainer, Signal::CONT);
                }
            }
            Kind::DiskFull => {
                let _ = std::fs::remove_file(worker.folder.join("filler"));
            }
            Kind::PostgresKilled => {
                // It may not have ended yet.
                for _ in 0..100 {
                    if matches!(world.postgres.revive(), Ok(true)) {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            Kind::ClockJumps => {
                worker.set_clock(0)?;
            }
            Kind::StoreDown => world.s3.start_again()?,
            Kind::StoreSlow => world.s3.signal(Signal::CONT)?,
            _ => {}
        }
        world.mend()
    }
}

fn newest_checkpoint(jobs: &Path) -> Option<PathBuf> {
    let job = std::fs::read_dir(jobs).ok()?.flatten().next()?.path();
    let checkpoints = std::fs::read_dir(job.join("out/checkpoints")).ok()?.flatten();
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u64>().ok();
    let newest = checkpoints.map(|entry| entry.path()).filter(|path| step(path).is_some()).max_by_key(|path| step(path))?;
    Some(newest.join("state.safetensors")).filter(|file| file.exists())
}
