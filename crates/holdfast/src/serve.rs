//! The long-running commands: the API, a worker, or both.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_api::{AppState, Settings};
use holdfast_store::Store;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::connect::connect;
use crate::first_start;
use crate::settings::{ApiArgs, StoreArgs, WorkerArgs};

/// How long requests under way may take when the service stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// `holdfast up`.
///
/// # Errors
/// When a part cannot start; the message names the setting.
pub async fn up(args: &StoreArgs, address: SocketAddr, api: &ApiArgs, worker: &WorkerArgs) -> Result<()> {
    let settings = api.settings()?;
    let config = worker.config(args)?;
    let (stop, shutdown) = shutdown_signal()?;
    let connection = connect(args).await?;
    let store = connection.store.clone();
    let outcome = async {
        first_start::ensure_keys(&store, &args.data_dir).await?;
        first_start::ensure_alignment_set(&store).await?;
        let listener = listen(address).await?;
        // Whichever ends first ends the other: half a service looks alive and does nothing.
        let work = async {
            let worked = holdfast_worker::run(store.clone(), config, shutdown.clone()).await;
            stop.send_replace(true);
            worked.context("the worker failed")
        };
        let serve = async {
            let served = serve_until(listener, store.clone(), settings, shutdown.clone()).await;
            stop.send_replace(true);
            served
        };
        let (worked, served) = tokio::join!(work, serve);
        worked.and(served)
    }
    .await;
    connection.close().await?;
    outcome
}

/// `holdfast serve`.
///
/// # Errors
/// As [`up`].
pub async fn serve(args: &StoreArgs, address: SocketAddr, api: &ApiArgs) -> Result<()> {
    let settings = api.settings()?;
    let (_, shutdown) = shutdown_signal()?;
    let connection = connect(args).await?;
    let outcome = async {
        first_start::ensure_alignment_set(&connection.store).await?;
        serve_until(listen(address).await?, connection.store.clone(), settings, shutdown).await
    }
    .await;
    connection.close().await?;
    outcome
}

/// `holdfast worker`.
///
/// # Errors
/// As [`up`].
pub async fn worker(args: &StoreArgs, worker: &WorkerArgs) -> Result<()> {
    let config = worker.config(args)?;
    let (_, shutdown) = shutdown_signal()?;
    let connection = connect(args).await?;
    tracing::info!(worker = config.name, "looking for jobs");
    let outcome = holdfast_worker::run(connection.store.clone(), config, shutdown).await;
    connection.close().await?;
    outcome.context("the worker failed")
}

/// The API on a port of its own, for tests: everything but the signals.
///
/// # Errors
/// When the port cannot be bound.
pub async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address} (--listen); is another service there?"))
}

/// Serves until `shutdown` is true and the requests under way are answered: the API, and what goes out to webhooks.
///
/// # Errors
/// When the sender of webhooks cannot start.
pub async fn serve_until(listener: TcpListener, store: Store, settings: Settings, shutdown: watch::Receiver<bool>) -> Result<()> {
    println!("listening on http://{}", listener.local_addr()?);
    let options = holdfast_webhooks::Options { allow_private: settings.private_webhooks };
    let sender = holdfast_webhooks::Sender::new(options).context("the sender of webhooks cannot start")?;
    let sending = tokio::spawn(holdfast_webhooks::run(store.clone(), sender.clone(), shutdown.clone()));
    let state = AppState::new(store, settings, sender, shutdown.clone());
    let background = tokio::spawn(state.clone().run());
    if !holdfast_api::serve(listener, holdfast_api::router(state), shutdown, DRAIN_TIMEOUT).await {
        tracing::warn!("some requests did not end in time and were cut off");
    }
    background.abort();
    sending.await.context("the sender of webhooks failed")
}

/// Becomes true at Ctrl-C or SIGTERM, or by the word of whoever has the sender.
fn shutdown_signal() -> Result<(watch::Sender<bool>, watch::Receiver<bool>)> {
    let (sender, receiver) = watch::channel(false);
    let by_word = sender.clone();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tracing::info!("stopping");
        let _ = sender.send(true);
        // Receivers wait for the change; the sender lives until they have all gone.
        sender.closed().await;
    });
    Ok((by_word, receiver))
}
