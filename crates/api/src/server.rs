//! The listener: connections that say nothing are closed, and those under way when the service stops are answered first.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower::ServiceExt;

/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// The largest head of a request.
const MAX_HEAD_BYTES: u32 = 64 * 1024;
/// How long to wait when the machine has no room for another connection.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves until `stopping` is true and the requests under way are answered, or `patience` after it is over. Returns whether all
/// were answered.
pub async fn serve(listener: TcpListener, router: Router, mut stopping: watch::Receiver<bool>, patience: Duration) -> bool {
    let mut server = auto::Builder::new(TokioExecutor::new());
    server.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(MAX_HEAD_BYTES as usize);
    server.http2().timer(TokioTimer::new()).max_header_list_size(MAX_HEAD_BYTES).keep_alive_interval(HEAD_TIMEOUT);
    let under_way = GracefulShutdown::new();
    loop {
        let (stream, address) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                    continue;
                }
            },
            () = is_true(&mut stopping) => break,
        };
        // Small answers go out at once.
        let _ = stream.set_nodelay(true);
        let router = router.clone();
        let begun = Arc::new(AtomicBool::new(false));
        let has_begun = Arc::clone(&begun);
        let service = service_fn(move |request: Request<Incoming>| {
            has_begun.store(true, Ordering::Relaxed);
            answer(router.clone(), address, request)
        });
        let connection = server.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
        let connection = under_way.watch(connection);
        tokio::spawn(async move {
            // hyper counts its time from the first byte; one who sends none is waited for here.
            let silence = async {
                tokio::time::sleep(HEAD_TIMEOUT).await;
                if begun.load(Ordering::Relaxed) {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                ended = connection => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection ended early");
                    }
                }
                () = silence => tracing::debug!("a connection that sent nothing was closed"),
            }
        });
    }
    drop(listener);
    tokio::time::timeout(patience, under_way.shutdown()).await.is_ok()
}

async fn answer(router: Router, address: SocketAddr, request: Request<Incoming>) -> Result<axum::response::Response, Infallible> {
    // One who waits for leave to send a body has sent none.
    let waits = request.headers().contains_key(http::header::EXPECT);
    let mut request = request.map(|body| axum::body::Body::new(ReadToEnd { body: Some(body), waits }));
    request.extensions_mut().insert(ConnectInfo(address));
    router.oneshot(request).await
}

/// A request's body that is read to its end even when it was refused before: a client that still sends would otherwise find its
/// connection broken, and never hear why.
struct ReadToEnd {
    body: Option<Incoming>,
    waits: bool,
}

/// How long what nobody wants is read, and how much of it.
const READ_ON_FOR: Duration = Duration::from_secs(30);
const READ_ON_BYTES: usize = 256 * 1024 * 1024;

impl Body for ReadToEnd {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for ReadToEnd {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| !body.is_end_stream() && !self.waits) else { return };
        let read_on = async move {
            let mut read = 0;
            while let Some(Ok(frame)) = body.frame().await {
                read += frame.data_ref().map_or(0, Bytes::len);
                if read > READ_ON_BYTES {
                    return;
                }
            }
        };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(tokio::time::timeout(READ_ON_FOR, read_on));
        }
    }
}

/// Waits for the word to stop. A sender that is gone will never say it.
pub(crate) async fn is_true(stopping: &mut watch::Receiver<bool>) {
    let said = stopping.wait_for(|stop| *stop).await.is_ok();
    if !said {
        std::future::pending::<()>().await;
    }
}
