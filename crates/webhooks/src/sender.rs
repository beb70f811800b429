//! Sends what is due.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use holdfast_domain::ids::WebhookId;
use holdfast_store::Store;
use holdfast_store::webhooks::{Afterwards, Due, Sent};
use reqwest::Client;
use reqwest::redirect::Policy;
use tokio::sync::watch;
use tokio::task::{self, JoinSet};

use crate::address::Guarded;
use crate::{ANSWER_TIMEOUT, Options, check_url, sign};

/// How often the outbox is looked at.
const INTERVAL: Duration = Duration::from_secs(1);
/// Notices that are under way at a time.
const AT_ONCE: usize = 64;

/// Sends notices. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Sender {
    client: Client,
    options: Options,
}

/// Sends notices until `shutdown` is true; what is under way then is sent to its end.
pub async fn run(store: Store, sender: Sender, mut shutdown: watch::Receiver<bool>) {
    let mut sending = JoinSet::new();
    // One notice of each webhook at a time, so that a receiver that hangs holds up nobody else's.
    let mut busy: HashMap<task::Id, WebhookId> = HashMap::new();
    loop {
        let room = AT_ONCE.saturating_sub(busy.len());
        let waits: Vec<WebhookId> = busy.values().copied().collect();
        match store.due_notices(u32::try_from(room).unwrap_or(0), &waits).await {
            Ok(due) => {
                for one in due {
                    let webhook = one.webhook;
                    let task = sending.spawn(deliver(store.clone(), sender.clone(), one));
                    busy.insert(task.id(), webhook);
                }
            }
            Err(error) => tracing::warn!(%error, "notices could not be looked for"),
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            Some(sent) = sending.join_next_with_id() => {
                let task = match sent {
                    Ok((task, ())) => task,
                    Err(error) => {
                        tracing::error!(%error, "a notice could not be sent");
                        error.id()
                    }
                };
                busy.remove(&task);
            }
            () = is_true(&mut shutdown) => break,
        }
    }
    while sending.join_next().await.is_some() {}
}

/// Waits for the word to stop. A sender that is gone will never say it.
async fn is_true(shutdown: &mut watch::Receiver<bool>) {
    let said = shutdown.wait_for(|stop| *stop).await.is_ok();
    if !said {
        std::future::pending::<()>().await;
    }
}

async fn deliver(store: Store, sender: Sender, due: Due) {
    let sent = sender.send(&due).await;
    let outcome = if matches!(sent, Sent::Taken { .. }) { "taken" } else { "failed" };
    metrics::counter!("holdfast_webhook_tries_total", "outcome" => outcome).increment(1);
    match store.record_sent(&due, &sent).await {
        Ok(Afterwards::Open) => {}
        Ok(Afterwards::Dead) => tracing::warn!(notice = %due.notice, "a notice was given up after its last try"),
        Err(error) => {
            tracing::warn!(%error, notice = %due.notice, "it could not be written down how a notice was sent; it is sent again");
        }
    }
}

impl Sender {
    /// A sender.
    ///
    /// # Errors
    /// When no client can be made.
    pub fn new(options: Options) -> Result<Self, reqwest::Error> {
        let client = Client::builder()
            .user_agent(concat!("holdfast/", env!("CARGO_PKG_VERSION")))
            .timeout(ANSWER_TIMEOUT)
            // A redirect could lead where a URL may not.
            .redirect(Policy::none())
            .no_proxy()
            .dns_resolver(Arc::new(Guarded { allow_private: options.allow_private }))
            .build()?;
        Ok(Self { client, options })
    }

    /// Whether a tenant may have this URL called.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence.
    pub fn check_url(&self, url: &str) -> Result<(), String> {
        check_url(url, self.options.allow_private)
    }

    /// Sends a notice once, and says how that ended.
    pub async fn send(&self, due: &Due) -> Sent {
        // The operator may have changed their mind since the webhook was made.
        if let Err(error) = self.check_url(&due.url) {
            return Sent::Failed { status: None, error };
        }
        let id = due.notice.to_string();
        let signatures = due.secrets.iter().map(|secret| sign(secret.reveal(), &id, due.sent_at, &due.payload));
        let request = self
            .client
            .post(&due.url)
            .header("content-type", "application/json")
            .header("webhook-id", &id)
            .header("webhook-timestamp", due.sent_at.to_string())
            .header("webhook-signature", signatures.collect::<Vec<_>>().join(" "))
            .body(due.payload.clone());
        match request.send().await {
            Ok(answer) if answer.status().is_success() => Sent::Taken { status: answer.status().as_u16() },
            Ok(answer) => {
                let status = answer.status().as_u16();
                Sent::Failed { status: Some(status), error: format!("the receiver answered {status}") }
            }
            Err(error) => Sent::Failed { status: None, error: reason(&error) },
        }
    }
}

/// Why nothing was answered, in words that tell the webhook's owner nothing about this side's network.
fn reason(error: &reqwest::Error) -> String {
    let what = if error.is_timeout() {
        "the receiver did not answer in time"
    } else if error.is_connect() {
        "no connection could be made: the name may lead to no public address, nothing may listen there, or its certificate may not hold"
    } else {
        "the connection broke"
    };
    what.into()
}
