//! Whether the service lives, and whether it can do its work.

use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;

use crate::{ApiError, AppState};

/// How long a store may take to answer before the service counts as not ready.
const PATIENCE: Duration = Duration::from_secs(3);

/// Says that the process serves requests. Nothing else is asked: a process whose database is away must not be killed for it.
#[utoipa::path(
    get, path = "/healthz", operation_id = "get_health", tag = "health", security(()),
    responses((status = 200, description = "It lives", body = String, content_type = "text/plain", example = "ok\n"))
)]
pub(crate) async fn get_health() -> &'static str {
    "ok\n"
}

/// Says that the database answers at this program's version and the object store can be written, so that requests can be served.
#[utoipa::path(
    get, path = "/readyz", operation_id = "get_readiness", tag = "health", security(()),
    responses(
        (status = 200, description = "It can", body = String, content_type = "text/plain", example = "ready\n"),
        (status = 503, description = "It cannot, and why", body = String, content_type = "text/plain", example = "the database does not answer\n"),
    )
)]
pub(crate) async fn get_readiness(State(state): State<AppState>) -> Response {
    let database = tokio::time::timeout(PATIENCE, state.store.ready());
    let objects = tokio::time::timeout(PATIENCE, state.store.objects().probe());
    let (database, objects) = tokio::join!(database, objects);
    let fault = match (database, objects) {
        (Ok(Ok(())), Ok(Ok(()))) => return "ready\n".into_response(),
        (Err(_), _) => "the database does not answer".to_owned(),
        (Ok(Err(error)), _) => {
            tracing::warn!(%error, "not ready");
            "the database is not ready".to_owned()
        }
        (_, Err(_)) => "the object store does not answer".to_owned(),
        (_, Ok(Err(error))) => {
            tracing::warn!(%error, "not ready");
            "the object store cannot be written".to_owned()
        }
    };
    (StatusCode::SERVICE_UNAVAILABLE, format!("{fault}\n")).into_response()
}

pub(crate) async fn no_route() -> ApiError {
    ApiError::no_route()
}

pub(crate) async fn method_not_allowed() -> ApiError {
    ApiError::method_not_allowed()
}
