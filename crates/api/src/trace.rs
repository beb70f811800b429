//! The span of each request.

use std::time::Duration;

use http::{HeaderMap, Response};
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tower_http::request_id::RequestId;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// What machines ask every few seconds.
const PROBES: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// Method, path and request id; never a query string or a header, which may hold what is not ours to log. A caller that traces
/// (W3C Trace Context: the headers `traceparent` and `tracestate`) finds the request in its own trace.
pub(crate) fn span<B>(request: &http::Request<B>) -> tracing::Span {
    if PROBES.contains(&request.uri().path()) {
        return tracing::Span::none();
    }
    let id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok()).unwrap_or_default();
    let span =
        tracing::info_span!("request", method = %request.method(), path = request.uri().path(), request_id = id, made = Empty);
    let caller = TraceContextPropagator::new().extract(&Headers(request.headers()));
    if caller.span().span_context().is_valid() {
        // Where nothing is traced there is nothing to join.
        let _ = span.set_parent(caller);
    }
    span
}

/// A line for each request that was answered.
pub(crate) fn answered<B>(response: &Response<B>, took: Duration, span: &tracing::Span) {
    if !span.is_none() {
        tracing::info!(status = response.status().as_u16(), milliseconds = took.as_millis(), "answered");
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
