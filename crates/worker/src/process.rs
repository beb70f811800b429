//! The trainer's process.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use holdfast_domain::plan::paths;
use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};
use tokio::process::{Child, Command};

/// What a trainer may know of its surroundings: never the database, never a key.
const ENVIRONMENT: [&str; 8] =
    ["PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "RUST_BACKTRACE"];
/// Where what the trainer prints goes.
const LOG: &str = "trainer.log";

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl From<ExitStatus> for Ended {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, signal) => Self::Signal(signal.unwrap_or(0)),
        }
    }
}

/// Starts the trainer in a process group of its own, so that Ctrl-C reaches only the worker, which stops it in order.
pub(crate) fn launch(program: &Path, subcommand: &str, folder: &Path) -> std::io::Result<Child> {
    let out = folder.join(paths::OUT);
    std::fs::create_dir_all(&out)?;
    let log = std::fs::File::create(out.join(LOG))?;
    let inherited = ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    let mut command = Command::new(program);
    command
        .arg(subcommand)
        .arg(folder)
        .env_clear()
        .envs(inherited)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .kill_on_drop(true);
    end_with_worker(&mut command);
    command.spawn().map_err(|e| std::io::Error::new(e.kind(), format!("cannot run the trainer {}: {e}", program.display())))
}

/// A worker that is killed must not leave a trainer that goes on beside the next attempt.
#[expect(unsafe_code, reason = "what runs between fork and exec must be async-signal-safe; prctl is")]
fn end_with_worker(command: &mut Command) {
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
}

/// Ends a trainer: politely, and where it has not ended before `patience` is over, not.
pub(crate) async fn terminate(trainer: &mut Child, patience: impl Future<Output = ()>) -> std::io::Result<Ended> {
    let group = trainer.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(group) = group {
        // It may have ended on its own in between.
        let _ = kill_process_group(group, Signal::TERM);
    }
    let ended = tokio::select! {
        ended = trainer.wait() => Some(ended),
        () = patience => None,
    };
    if let Some(ended) = ended {
        return Ok(ended?.into());
    }
    trainer.kill().await?;
    Ok(trainer.wait().await?.into())
}
