//! What stands around every call that may change something: it runs to its end even when its client has gone, and how it
//! ended is written into the audit log.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::LazyLock;

use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use holdfast_domain::ids::ProjectId;
use holdfast_store::audit::NewEntry;
use holdfast_store::keys::Principal;
use http::Method;
use tower_http::request_id::RequestId;
use tracing::Instrument;

use crate::auth::outside;
use crate::error::ErrorCode;
use crate::{ApiError, AppState};

/// What a call has made, for the log: put into the answer's extensions.
#[derive(Debug, Clone)]
pub(crate) struct Made(pub(crate) String);

/// The project that an operator's call acted on, for the log: put into the answer's extensions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ActedOn(pub(crate) ProjectId);

/// What of a path is kept.
const MAX_TARGET_CHARS: usize = 512;

/// The path of models whose names hold plain slashes.
pub(crate) const MODEL_WITH_SLASHES: &str = "/v1/models/{owner}/{*rest}";

/// Operations by method and path, as the contract names them.
static OPERATIONS: LazyLock<HashMap<(Method, String), String>> = LazyLock::new(|| {
    let contract = crate::openapi();
    let mut operations = HashMap::new();
    for (path, item) in &contract.paths.paths {
        for (method, operation) in
            [(Method::POST, &item.post), (Method::PUT, &item.put), (Method::PATCH, &item.patch), (Method::DELETE, &item.delete)]
        {
            // What only reads is neither written down nor run on for a client that has gone.
            if READS.contains(&path.as_str()) {
                continue;
            }
            if let Some(id) = operation.as_ref().and_then(|operation| operation.operation_id.clone()) {
                if path == "/v1/models/{model}" {
                    operations.insert((method.clone(), MODEL_WITH_SLASHES.to_owned()), id.clone());
                }
                operations.insert((method, path.clone()), id);
            }
        }
    }
    operations
});

/// Operations that change nothing although they are no GET.
const READS: [&str; 1] = ["/v1/fine_tuning/jobs/estimate"];

/// Stands inside the layer that asks for keys, and refuses a change to one that only reads.
pub(crate) async fn audit(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let matched = request.extensions().get::<MatchedPath>().map_or_else(String::new, |path| path.as_str().to_owned());
    let Some(operation) = OPERATIONS.get(&(request.method().clone(), matched)) else { return next.run(request).await };
    let Some(principal) = request.extensions().get::<Principal>() else {
        return outside().into_response();
    };
    let request_id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok());
    let mut entry = NewEntry {
        key: Some(principal.key),
        actor: principal.prefix.clone(),
        project: principal.project,
        acted_on: None,
        operation: operation.clone(),
        target: request.uri().path().chars().take(MAX_TARGET_CHARS).collect(),
        address: address(&state, &request),
        request_id: request_id.unwrap_or_default().to_owned(),
        status: 0,
        code: None,
    };
    let may_write = principal.scopes.write;
    let work = async move {
        let response = if may_write {
            next.run(request).await
        } else {
            let message = "this key only reads; this call needs one with the scope `write`";
            ApiError::forbidden("insufficient_scope", message).into_response()
        };
        entry.status = response.status().as_u16();
        entry.code = response.extensions().get::<ErrorCode>().map(|code| code.0.to_owned());
        entry.acted_on = response.extensions().get::<ActedOn>().map(|ActedOn(project)| *project);
        if let Some(Made(id)) = response.extensions().get::<Made>() {
            tracing::Span::current().record("made", id);
            entry.target = format!("{}/{id}", entry.target);
        }
        if let Err(error) = state.store.audit(&entry).await {
            tracing::error!(%error, operation = entry.operation, status = entry.status, "a call could not be written into the audit log");
        }
        response
    };
    // A client that goes away must not cut a change in two.
    match tokio::spawn(work.in_current_span()).await {
        Ok(response) => response,
        Err(panic) => ApiError::internal(&panic).into_response(),
    }
}

/// Where a request comes from. A proxy in front says it in `x-forwarded-for`, whose last entry is its own; without one that header
/// is anyone's word.
fn address(state: &AppState, request: &Request) -> String {
    let forwarded = request.headers().get_all("x-forwarded-for").iter().next_back().and_then(|value| value.to_str().ok());
    match forwarded.and_then(|list| list.rsplit(',').next()) {
        Some(client) if state.settings.behind_proxy => client.trim().chars().take(64).collect(),
        _ => request
            .extensions()
            .get::<ConnectInfo<SocketAddr>>()
            .map_or_else(String::new, |ConnectInfo(address)| address.ip().to_string()),
    }
}
