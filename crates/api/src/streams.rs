//! Who reads a job's events while they come. One look at the database every moment serves all readers of this process; each
//! reader then reads what is its own.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use holdfast_domain::ids::JobId;
use holdfast_store::Store;
use tokio::sync::watch;

/// How often the database is asked whether there is something to read.
const INTERVAL: Duration = Duration::from_millis(500);

/// The jobs that somebody reads, each with the place of its last event.
#[derive(Debug, Default)]
pub(crate) struct Streams(Mutex<HashMap<JobId, watch::Sender<i64>>>);

impl Streams {
    /// Something that changes when a job has a new event.
    pub(crate) fn subscribe(&self, job: JobId) -> watch::Receiver<i64> {
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.entry(job).or_insert_with(|| watch::channel(0).0).subscribe()
    }

    /// The jobs that are read; those whose last reader has gone are forgotten.
    fn read_now(&self) -> Vec<JobId> {
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.retain(|_, sender| sender.receiver_count() > 0);
        jobs.keys().copied().collect()
    }

    fn tell(&self, last: &[(JobId, i64)]) {
        let jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (job, seq) in last {
            if let Some(sender) = jobs.get(job) {
                sender.send_if_modified(|known| std::mem::replace(known, *seq) != *seq);
            }
        }
    }

    /// Looks for new events without end.
    pub(crate) async fn follow(&self, store: &Store) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let jobs = self.read_now();
            if jobs.is_empty() {
                continue;
            }
            match store.last_events(&jobs).await {
                Ok(last) => self.tell(&last),
                Err(error) => tracing::warn!(%error, "events could not be looked for; readers wait"),
            }
        }
    }
}
