//! The long-running commands: the API, a worker, or both.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_api::AppState;
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
    let shutdown = shutdown_signal()?;
    let connection = connect(args).await?;
    let store = connection.store.clone();
    let outcome = async {
        first_start::ensure_keys(&store, &args.data_dir).await?;
        first_start::ensure_alignment_set(&store).await?;
        let listener = listen(address).await?;
        let working = tokio::spawn(holdfast_worker::run(store.clone(), config, shutdown.clone()));
        let served = serve_until(listener, AppState { store: store.clone(), settings: Arc::new(settings) }, shutdown).await;
        working.await?.context("the worker failed")?;
        served
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
    let shutdown = shutdown_signal()?;
    let connection = connect(args).await?;
    let state = AppState { store: connection.store.clone(), settings: Arc::new(settings) };
    let outcome = async {
        first_start::ensure_alignment_set(&connection.store).await?;
        serve_until(listen(address).await?, state, shutdown).await
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
    let shutdown = shutdown_signal()?;
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

/// Serves until `shutdown` is true and the requests under way are answered.
///
/// # Errors
/// When the listener fails.
pub async fn serve_until(listener: TcpListener, state: AppState, mut shutdown: watch::Receiver<bool>) -> Result<()> {
    println!("listening on http://{}", listener.local_addr()?);
    let mut late = shutdown.clone();
    let served = axum::serve(listener, holdfast_api::router(state)).with_graceful_shutdown(async move {
        let _ = shutdown.wait_for(|down| *down).await;
    });
    let patience = async move {
        let told = late.wait_for(|down| *down).await.is_ok();
        if !told {
            // A sender that is gone will never say it.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(DRAIN_TIMEOUT).await;
    };
    tokio::select! {
        served = served => served.context("the listener failed"),
        () = patience => {
            tracing::warn!("some requests did not end in time and were cut off");
            Ok(())
        }
    }
}

/// Becomes true at Ctrl-C or SIGTERM.
fn shutdown_signal() -> Result<watch::Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
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
    Ok(receiver)
}
