//! The wish that a run end before its time. It is looked at after each step, and between the passes of whatever goes over a whole
//! file, so that a process that gets SIGTERM is never far from an end in order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// Whether the run was asked to stop; a fresh one is not.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

/// It was asked to stop, and what it was doing is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("asked to stop")]
pub struct Stopped;

impl Stop {
    /// Asked for by SIGTERM, which from here on does not end the process at once.
    ///
    /// # Errors
    /// When signals cannot be watched for.
    pub fn on_sigterm() -> Result<Self> {
        let stop = Self::default();
        signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::clone(&stop.0)).context("cannot watch for signals")?;
        Ok(stop)
    }

    /// Asks for it.
    pub fn ask(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked for.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// The same as a result, for what is broken off by `?`.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn check(&self) -> Result<(), Stopped> {
        if self.is_asked() { Err(Stopped) } else { Ok(()) }
    }
}
