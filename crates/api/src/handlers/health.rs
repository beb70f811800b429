//! Whether the service lives.

use crate::ApiError;

/// Says that the process serves requests.
#[utoipa::path(get, path = "/healthz", operation_id = "get_health", tag = "health", security(()), responses((status = 200, description = "It lives", body = String, content_type = "text/plain")))]
pub(crate) async fn get_health() -> &'static str {
    "ok\n"
}

pub(crate) async fn no_route() -> ApiError {
    ApiError::no_route()
}

pub(crate) async fn method_not_allowed() -> ApiError {
    ApiError::method_not_allowed()
}
