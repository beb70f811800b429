//! The REST API: OpenAI's fine-tuning contract, with our extensions.
//!
//! `routes.rs` is the table of contents. A handler checks what came in, calls the store once or twice, and turns a row into
//! the wire's shape; the shapes (`wire/`) are known nowhere else. No SQL, no libtorch, no training rows in logs.

use std::sync::Arc;
use std::time::Duration;

use holdfast_domain::ids::ProjectId;
use holdfast_domain::policy::{AppliedPolicy, Policy, Scope};
use holdfast_store::{Store, StoreError};
use holdfast_webhooks::Sender;
use tokio::sync::watch;

mod audit;
mod auth;
mod codes;
mod contract;
mod download;
mod error;
mod extract;
mod handlers;
mod rate_limit;
mod repeatable;
mod routes;
mod server;
mod streams;
mod telemetry;
mod tokenizers;
mod trace;
mod wire;

pub use error::ApiError;
pub use routes::{openapi, router};
pub use server::serve;
pub use tokenizers::{Fit, Misfit, Tokenizers};

/// What every handler can reach.
#[derive(Debug, Clone)]
pub struct AppState {
    /// Rows and objects.
    pub store: Store,
    /// What the operator decided.
    pub settings: Arc<Settings>,
    /// Becomes true when the service stops.
    pub(crate) stopping: watch::Receiver<bool>,
    pub(crate) known_keys: Arc<auth::KnownKeys>,
    pub(crate) rate_limits: Arc<rate_limit::RateLimits>,
    pub(crate) streams: Arc<streams::Streams>,
    pub(crate) tokenizers: Arc<tokenizers::Tokenizers>,
    pub(crate) sender: Sender,
}

/// What the operator decided.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What is demanded of jobs where no policy is set.
    pub policy: Policy,
    /// The largest file.
    pub max_upload_bytes: u64,
    /// Requests a key may make in a minute, unless it has a number of its own; `None` for as many as it likes.
    pub requests_per_minute: Option<u32>,
    /// Whether a proxy stands in front, whose word counts for where requests come from.
    pub behind_proxy: bool,
    /// Whether webhooks may lead to private addresses and plain http.
    pub private_webhooks: bool,
}

/// How long to wait before the database is asked again to tell of changed keys.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);

impl AppState {
    /// The state of a service, until `stopping` is true.
    #[must_use]
    pub fn new(store: Store, settings: Settings, sender: Sender, stopping: watch::Receiver<bool>) -> Self {
        telemetry::install();
        Self {
            store,
            settings: Arc::new(settings),
            stopping,
            known_keys: Arc::default(),
            rate_limits: Arc::default(),
            streams: Arc::default(),
            tokenizers: Arc::default(),
            sender,
        }
    }

    /// The policy of jobs for which none is set.
    pub(crate) fn default_policy(&self) -> AppliedPolicy {
        AppliedPolicy { scope: Scope::Deployment, version: 0, policy: self.settings.policy.clone() }
    }

    /// The policy that counts for a project's jobs.
    pub(crate) async fn policy_of(&self, project: ProjectId) -> Result<AppliedPolicy, StoreError> {
        Ok(self.store.policy_of(project).await?.unwrap_or_else(|| self.default_policy()))
    }

    /// Does what no request asks for: hears of changed keys and looks for new events. Ends when the service stops.
    pub async fn run(self) {
        let mut stopping = self.stopping.clone();
        tokio::select! {
            () = self.hear_of_keys() => {}
            () = self.streams.follow(&self.store) => {}
            () = server::is_true(&mut stopping) => {}
        }
    }

    /// Without an ear on the database no key is remembered, so that one that was revoked elsewhere is not believed.
    async fn hear_of_keys(&self) {
        loop {
            match self.store.listen_for_key_changes().await {
                Ok(mut listener) => {
                    self.known_keys.forget(true);
                    while listener.try_recv().await.is_ok_and(|heard| heard.is_some()) {
                        self.known_keys.forget(true);
                    }
                    self.known_keys.forget(false);
                }
                Err(error) => tracing::warn!(%error, "changes of keys are not heard of; every request asks the database"),
            }
            tokio::time::sleep(LISTEN_AGAIN).await;
        }
    }
}
