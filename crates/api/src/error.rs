//! One error type at the edge, in OpenAI's shape.

use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use holdfast_domain::Invalid;
use holdfast_domain::invalid::LineError;
use holdfast_store::StoreError;
use http::header::RETRY_AFTER;
use http::{HeaderValue, StatusCode};
use serde::Serialize;
use utoipa::ToSchema;

use crate::codes::{self, ErrorCodes};

/// What a client is told when a request did not do what it asked for.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    body: Box<ErrorBody>,
    /// When to try again, and whether at all: clients of the public contract try again by themselves.
    retry: Retry,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// As the status suggests.
    ByStatus,
    /// Not at all: it would be the same.
    Never,
    /// After so long.
    After(Duration),
}

/// An error's code, for the layers around a handler.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ErrorCode(pub(crate) &'static str);

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
    #[schema(value_type = Option<ErrorCodes>, example = "out_of_bounds")]
    code: Option<&'static str>,
    /// The bad lines of the dataset that was refused, at most 1,000.
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
    /// Where in it, as a JSON path; empty for the line as a whole.
    #[schema(example = "messages[0].role")]
    path: String,
    /// What is wrong, and what was expected. Never quotes the line.
    #[schema(example = "expected system, developer, user, assistant or tool")]
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
        debug_assert!(codes::is_known(code), "{code} is not in the list of codes");
        let error = ErrorDetail { message: message.into(), r#type, param, code: Some(code), errors: Vec::new() };
        Self { status, body: Box::new(ErrorBody { error }), retry: Retry::ByStatus }
    }

    /// 400: a value of the request cannot be used.
    pub(crate) fn invalid(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", code, Some(param.into()), message)
    }

    /// 400: the request as a whole cannot be read.
    pub(crate) fn malformed(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", code, None, message)
    }

    /// 400: a dataset that a request names has bad lines.
    pub(crate) fn bad_dataset(param: &str, message: String, errors: Vec<LineError>) -> Self {
        let mut error = Self::invalid(param, "invalid_dataset", message);
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
        let message = match param {
            "step" => format!("the job has no checkpoint after step {:?}", shortened(id)),
            "version" => format!("no policy was set here as version {id}, or that version took it away"),
            // The operator's own things belong to no project.
            "organization" | "project" | "project_id" | "member" | "member_id" | "key_id" => {
                format!("there is no {} {:?}", noun(param), shortened(id))
            }
            _ => format!("there is no {} {:?} in this project", noun(param), shortened(id)),
        };
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", "not_found", Some(param.into()), message)
    }

    /// What the store said of a call that names one thing: 404 when there is no such thing.
    pub(crate) fn of_one(error: StoreError, param: &str, id: &str) -> Self {
        match error {
            StoreError::NotFound => Self::not_found(param, id),
            other => other.into(),
        }
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

    /// 408.
    pub(crate) fn timeout() -> Self {
        let message = "the request took too long, most often because its body did not come; nothing was changed";
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "timeout", None, message)
    }

    /// 413.
    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", "too_large", None, message)
    }

    /// 416: the file has no such bytes.
    pub(crate) fn no_such_range(bytes: u64) -> Self {
        let message = format!("the range lies outside the {bytes} bytes there are");
        Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "invalid_request_error", "invalid_range", Some("Range".into()), message)
    }

    /// 429: the key has made as many requests as it may; more come with time.
    pub(crate) fn too_many_requests(per_minute: u32, wait: Duration) -> Self {
        let message = format!("this key may make {per_minute} requests a minute; try again in {:.1} seconds", wait.as_secs_f64());
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded", None, message);
        Self { retry: Retry::After(wait), ..error }
    }

    /// 429: the project uses what it may. Trying again changes nothing.
    pub(crate) fn quota(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "insufficient_quota", "insufficient_quota", None, message);
        Self { retry: Retry::Never, ..error }
    }

    /// 503: the database or the object store does not answer.
    pub(crate) fn unavailable(cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(%cause, "a store does not answer");
        let message =
            "the service cannot reach its database or its object store just now; nothing was changed. Try again in some seconds";
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "unavailable", None, message);
        Self { retry: Retry::After(Duration::from_secs(5)), ..error }
    }

    /// 503: the server does as much of this as it can at a time.
    pub(crate) fn busy(what: &str) -> Self {
        let message = format!("the server is busy with other {what}; try again in some seconds");
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "busy", None, message);
        Self { retry: Retry::After(Duration::from_secs(5)), ..error }
    }

    /// 500. The cause is logged here, once, under the request's id; the client gets the id, in `x-request-id`.
    pub(crate) fn internal(cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(%cause, "request failed");
        let message = "the server failed; nothing was changed. Try again, and give the operator the x-request-id of this answer";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal", None, message)
    }
}

/// What people call what a parameter names: a "training file".
fn noun(param: &str) -> String {
    let named = param.strip_suffix("_id").unwrap_or(param).replace('_', " ");
    if named == "id" { "thing".into() } else { named }
}

/// The beginning of a text that a client sent, as an error quotes it.
pub(crate) fn shortened(text: &str) -> &str {
    const MOST_BYTES: usize = 200;
    text.get(..text.floor_char_boundary(MOST_BYTES)).unwrap_or(text)
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        Self::invalid(
            invalid.param,
            invalid.code,
            if invalid.message.len() > 2_000 { shortened(&invalid.message).to_owned() } else { invalid.message },
        )
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Invalid(invalid) => invalid.into(),
            // Not 409: the SDKs of the public contract retry that by themselves.
            StoreError::Transition(e) => Self::invalid("fine_tuning_job_id", "invalid_state", e.to_string()),
            // A thing that a repeated request had made, and that was deleted since.
            StoreError::NotFound => Self::not_found("id", "what this request names or made before"),
            StoreError::Quota(message) => Self::quota(message),
            other if other.is_bad_text() => {
                Self::malformed("invalid_text", "a text of the request holds the character U+0000 or another that cannot be kept")
            }
            other if other.is_unavailable() => Self::unavailable(&other),
            other => Self::internal(&other),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let code = self.body.error.code;
        let mut response = (self.status, Json(self.body)).into_response();
        let headers = response.headers_mut();
        match self.retry {
            Retry::ByStatus => {}
            Retry::Never => {
                headers.insert("x-should-retry", HeaderValue::from_static("false"));
            }
            Retry::After(wait) => {
                // Rounded up: one who waits as long as is said gets through.
                let millis = u64::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(u64::MAX);
                headers.insert(RETRY_AFTER, HeaderValue::from(millis.div_ceil(1000)));
                headers.insert("retry-after-ms", HeaderValue::from(millis));
            }
        }
        if let Some(code) = code {
            response.extensions_mut().insert(ErrorCode(code));
        }
        response
    }
}
