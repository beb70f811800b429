//! One error type at the edge, in OpenAI's shape.

use axum::Json;
use axum::response::{IntoResponse, Response};
use holdfast_domain::Invalid;
use holdfast_domain::invalid::LineError;
use holdfast_store::StoreError;
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

/// What a client is told when a request did not do what it asked for.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorBody,
}

/// The body of every error.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    error: ErrorDetail,
}

/// What went wrong, for a person and for a program.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorDetail {
    /// What is wrong and what to do.
    #[schema(example = "n_epochs must lie between 1 and 50; it is 99")]
    message: String,
    /// The class of the error.
    #[schema(example = "invalid_request_error")]
    r#type: &'static str,
    /// The path of the value that was refused.
    #[schema(example = "method.supervised.hyperparameters.n_epochs")]
    param: Option<String>,
    /// A stable word for programs.
    #[schema(example = "out_of_bounds")]
    code: Option<&'static str>,
    /// Every bad line of an uploaded dataset, at most 1,000.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<BadLine>)]
    errors: Vec<LineError>,
}

/// A bad line of an uploaded dataset.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes holdfast_domain::invalid::LineError, which knows nothing of OpenAPI")]
pub(crate) struct BadLine {
    /// Its number, from 1.
    #[schema(example = 7)]
    line: u64,
    /// What is wrong with it.
    #[schema(example = "messages[0].role: expected system, developer, user, assistant or tool")]
    message: String,
}

impl ApiError {
    fn new(
        status: StatusCode,
        r#type: &'static str,
        code: &'static str,
        param: Option<String>,
        message: impl Into<String>,
    ) -> Self {
        let error = ErrorDetail { message: message.into(), r#type, param, code: Some(code), errors: Vec::new() };
        Self { status, body: ErrorBody { error } }
    }

    /// 400: a value of the request cannot be used.
    pub(crate) fn invalid(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", code, Some(param.into()), message)
    }

    /// 400: the request as a whole cannot be read.
    pub(crate) fn malformed(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", code, None, message)
    }

    /// 400: an uploaded dataset has bad lines.
    pub(crate) fn bad_dataset(message: String, errors: Vec<LineError>) -> Self {
        let mut error = Self::invalid("file", "invalid_dataset", message);
        error.body.error.errors = errors;
        error
    }

    /// 401.
    pub(crate) fn unauthorized(code: &'static str, message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", code, None, message)
    }

    /// 403.
    pub(crate) fn forbidden(code: &'static str, message: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", code, None, message)
    }

    /// 404, also for what belongs to someone else.
    pub(crate) fn not_found(param: &str, id: &str) -> Self {
        let message = format!("there is no {id:?} in this project");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", "not_found", Some(param.into()), message)
    }

    /// 404 for a path that is no route.
    pub(crate) fn no_route() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            "unknown_url",
            None,
            "there is nothing at this URL; see openapi.yaml",
        )
    }

    /// 405.
    pub(crate) fn method_not_allowed() -> Self {
        let message = "this URL does not take this method; see openapi.yaml";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", "method_not_allowed", None, message)
    }

    /// 413.
    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", "too_large", None, message)
    }

    /// 500. The cause is logged here, once, under the request's id; the client gets the id, in `x-request-id`.
    pub(crate) fn internal(cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(%cause, "request failed");
        let message = "the server failed; nothing was changed. Try again, and give the operator the x-request-id of this answer";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal", None, message)
    }
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        Self::invalid(invalid.param, invalid.code, invalid.message)
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Invalid(invalid) => invalid.into(),
            // Not 409: the SDKs of the public contract retry that by themselves.
            StoreError::Transition(e) => Self::invalid("fine_tuning_job_id", "invalid_state", e.to_string()),
            other => Self::internal(&other),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(self.body)).into_response()
    }
}
