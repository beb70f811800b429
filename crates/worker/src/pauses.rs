//! The pauses between two tries of what is away and may come back.

use std::time::Duration;

use tokio::sync::watch;

use crate::{Stop, agent};

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

/// Each is twice as long as the one before it, up to a bound.
pub(crate) struct Pauses(Duration);

impl Default for Pauses {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl Pauses {
    /// Waits the next. Whoever stops or pauses meanwhile does not wait for it to end: that is the error.
    pub(crate) async fn next(&mut self, stop: &mut watch::Receiver<Option<Stop>>) -> Result<(), Stop> {
        tokio::select! {
            () = tokio::time::sleep(self.0) => {}
            reason = agent::stopped(stop) => return Err(reason),
        }
        self.0 = (self.0 * 2).min(LONGEST);
        Ok(())
    }
}
