//! What is counted of every request.

use std::sync::OnceLock;
use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::Response;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Upper bounds of the histogram's buckets, in seconds: from a row that is read to a file that is sent.
const SECONDS: [f64; 11] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0];

static RECORDER: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

fn recorder() -> Option<&'static PrometheusHandle> {
    let install = || {
        PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)
            .and_then(PrometheusBuilder::install_recorder)
            .map_err(|error| tracing::warn!(%error, "nothing is counted"))
            .ok()
    };
    RECORDER.get_or_init(install).as_ref()
}

/// Begins to count.
pub(crate) fn install() {
    let _ = recorder();
}

/// What was counted, in Prometheus' text format.
pub(crate) fn render() -> String {
    recorder().map(PrometheusHandle::render).unwrap_or_default()
}

/// Counts a request by its route, which is one of few; never by what a client made up.
pub(crate) async fn count(request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or_else(|| "none".to_owned(), |path| path.as_str().to_owned());
    let method = match request.method().as_str() {
        known @ ("GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS") => known.to_owned(),
        _ => "other".to_owned(),
    };
    let since = Instant::now();
    let response = next.run(request).await;
    let status = response.status().as_str().to_owned();
    metrics::histogram!("holdfast_http_request_seconds", "method" => method.clone(), "route" => route.clone())
        .record(since.elapsed().as_secs_f64());
    metrics::counter!("holdfast_http_requests_total", "method" => method, "route" => route, "status" => status).increment(1);
    response
}

/// Counts bytes that came in with files.
pub(crate) fn uploaded(bytes: u64) {
    metrics::counter!("holdfast_upload_bytes_total").increment(bytes);
}
