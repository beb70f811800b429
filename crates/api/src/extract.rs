//! Extractors whose refusals have OpenAI's shape.

use std::str::FromStr;
use std::time::Duration;

use axum::extract::{self, FromRequest, FromRequestParts, Request};
use holdfast_domain::limits::MAX_JSON_BODY_BYTES;
use holdfast_store::PageRequest;
use http::request::Parts;
use http_body_util::BodyExt;
use hyper::body::Body;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tower_http::timeout::TimeoutError;
use uuid::Uuid;

use crate::ApiError;
use crate::error::shortened;

/// A JSON body with the SHA-256 of its bytes. The refusal of a wrong value names its path.
#[derive(Debug)]
pub(crate) struct JsonBody<T>(pub(crate) T, pub(crate) [u8; 32]);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let body = whole(request).await?;
        Ok(Self(parse(&body)?, Sha256::digest(&body).into()))
    }
}

/// A JSON body that clients may leave out.
#[derive(Debug)]
pub(crate) struct OptionalJsonBody<T>(pub(crate) Option<T>);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for OptionalJsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let body = whole(request).await?;
        if body.is_empty() || body.trim_ascii() == b"null" { Ok(Self(None)) } else { parse(&body).map(|body| Self(Some(body))) }
    }
}

/// How long a body may take that is no file.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// A body as one piece. Its pieces are copied as they come: kept as they are, each would keep the buffer it was read into, and a
/// body of single bytes would take three thousand times its size.
async fn whole(request: Request) -> Result<Vec<u8>, ApiError> {
    let too_large = || ApiError::too_large("the JSON body is larger than 1 MiB");
    if request.body().size_hint().lower() > MAX_JSON_BODY_BYTES as u64 {
        return Err(too_large());
    }
    let mut body = request.into_body();
    let read = async {
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| unreadable(&error, "unreadable_body", "the body could not be read to its end"))?;
            if let Ok(data) = frame.into_data() {
                if bytes.len() + data.len() > MAX_JSON_BODY_BYTES {
                    return Err(too_large());
                }
                bytes.extend_from_slice(&data);
            }
        }
        Ok(bytes)
    };
    tokio::time::timeout(BODY_TIMEOUT, read).await.unwrap_or_else(|_| Err(ApiError::timeout()))
}

/// Why a body ended early: because its client was silent for too long, or for another reason.
pub(crate) fn unreadable(error: &(dyn std::error::Error + 'static), code: &'static str, message: &str) -> ApiError {
    let mut cause = Some(error);
    while let Some(this) = cause {
        if this.is::<TimeoutError>() {
            return ApiError::timeout();
        }
        cause = this.source();
    }
    ApiError::malformed(code, message)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // serde would take an array of a struct's fields as well.
    if body.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        return Err(ApiError::malformed("invalid_json", "the body must be a JSON object"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let path = e.path().to_string();
        let cause = e.into_inner();
        let text = cause.to_string();
        if let Some(field) = text.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
            let path = if path == "." { field.to_owned() } else { format!("{path}.{field}") };
            return ApiError::invalid(path.clone(), "missing", format!("{path} is missing"));
        }
        // Where it stands is said by the path.
        let what = text.split(" at line ").next().unwrap_or(&text);
        if cause.is_data() && what.starts_with("unknown field `") {
            let (found, known) = what.split_once(", expected ").unwrap_or((what, "none"));
            let message = format!("{path}: {}; the known ones are {}", shortened(found), known.trim_start_matches("one of "));
            ApiError::invalid(if path == "." { "body" } else { &path }, "unknown_field", message)
        } else if cause.is_data() && path != "." {
            ApiError::invalid(path.clone(), "invalid_type", format!("{path}: {}", shortened(&plain(what))))
        } else {
            ApiError::malformed("invalid_json", format!("the body cannot be read as JSON: {}", shortened(&text)))
        }
    })?;
    json.end().map_err(|e| ApiError::malformed("invalid_json", format!("the body cannot be read as JSON: {e}")))?;
    Ok(value)
}

/// What a parser says, without the names of its own types.
fn plain(text: &str) -> String {
    const WORDS: [(&str, &str); 7] = [
        ("expected u64", "expected a whole number that is not negative"),
        ("expected u32", "expected a whole number that is not negative, and less than 2^32"),
        ("expected i64", "expected a whole number"),
        ("expected f64", "expected a number"),
        ("invalid digit found in string", "it must be a whole number"),
        ("number too large to fit in target type", "the number is too large"),
        ("provided string was not `true` or `false`", "it must be true or false"),
    ];
    WORDS.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// A query string.
#[derive(Debug)]
pub(crate) struct QueryString<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for QueryString<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let query = parts.uri.query().unwrap_or_default();
        if query.contains("%00") {
            return Err(ApiError::malformed("invalid_text", "the query string holds the character U+0000"));
        }
        let pairs = serde_urlencoded::Deserializer::new(form_urlencoded::parse(query.as_bytes()));
        serde_path_to_error::deserialize(pairs).map(Self).map_err(|e| {
            let (path, cause) = (e.path().to_string(), e.into_inner().to_string());
            if let Some(field) = cause.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
                return ApiError::invalid(field, "missing", format!("the query parameter {field} is missing"));
            }
            if path == "." {
                return ApiError::malformed("invalid_query", format!("the query string cannot be read: {cause}"));
            }
            ApiError::invalid(path.clone(), "invalid_query", format!("{path}: {}", plain(&cause)))
        })
    }
}

/// The parameters of a path.
#[derive(Debug)]
pub(crate) struct Path<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = extract::Path::<T>::from_request_parts(parts, state).await;
        if parts.uri.path().contains("%00") {
            return Err(ApiError::malformed("invalid_text", "the path holds the character U+0000"));
        }
        path.map(|extract::Path(value)| Self(value)).map_err(|e| ApiError::malformed("invalid_path", e.body_text()))
    }
}

/// An id that a query filters by.
pub(crate) fn filter_id<T: FromStr>(param: &str, text: Option<&str>) -> Result<Option<T>, ApiError> {
    let parse = |text: &str| text.parse().map_err(|_| ApiError::invalid(param, "invalid_id", format!("{param} is no such id")));
    text.map(parse).transpose()
}

/// An id of a path. One that is malformed names nothing, so it is not found.
pub(crate) fn id<T: FromStr>(param: &str, text: &str) -> Result<T, ApiError> {
    text.parse().map_err(|_| ApiError::not_found(param, text))
}

/// The `after` and `limit` of a list, checked.
pub(crate) fn page<T: FromStr + Into<Uuid>>(
    after: Option<&str>,
    limit: Option<u32>,
    default: u32,
    most: u32,
    ascending: bool,
) -> Result<PageRequest, ApiError> {
    let limit = limit.unwrap_or(default);
    if !(1..=most).contains(&limit) {
        return Err(ApiError::invalid("limit", "out_of_bounds", format!("limit must lie between 1 and {most}; it is {limit}")));
    }
    let after = after
        .map(|text| {
            text.parse::<T>().map_err(|_| {
                ApiError::invalid("after", "invalid_cursor", "after must be the id of the last item of the page before")
            })
        })
        .transpose()?
        .map(Into::into);
    Ok(PageRequest { after, limit, ascending })
}
