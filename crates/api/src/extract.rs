//! Extractors whose refusals have OpenAI's shape.

use std::str::FromStr;

use axum::extract::{self, FromRequest, FromRequestParts, Query, Request};
use bytes::Bytes;
use holdfast_store::PageRequest;
use http::request::Parts;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::ApiError;

/// A JSON body. The refusal of a wrong value names its path.
#[derive(Debug)]
pub(crate) struct JsonBody<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let body = Bytes::from_request(request, state).await.map_err(|rejection| {
            if rejection.status() == http::StatusCode::PAYLOAD_TOO_LARGE {
                ApiError::too_large("the JSON body is larger than 1 MiB")
            } else {
                ApiError::malformed("unreadable_body", "the body could not be read to its end")
            }
        })?;
        let mut json = serde_json::Deserializer::from_slice(&body);
        let value = serde_path_to_error::deserialize(&mut json).map_err(|e| {
            let path = e.path().to_string();
            let cause = e.into_inner();
            let text = cause.to_string();
            if let Some(field) = text.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
                let path = if path == "." { field.to_owned() } else { format!("{path}.{field}") };
                return ApiError::invalid(path.clone(), "missing", format!("{path} is missing"));
            }
            if cause.is_data() && path != "." {
                ApiError::invalid(path.clone(), "invalid_type", format!("{path}: {cause}"))
            } else {
                ApiError::malformed("invalid_json", format!("the body cannot be read as JSON: {cause}"))
            }
        })?;
        json.end().map_err(|e| ApiError::malformed("invalid_json", format!("the body cannot be read as JSON: {e}")))?;
        Ok(Self(value))
    }
}

/// A query string.
#[derive(Debug)]
pub(crate) struct QueryString<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for QueryString<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        query.map(|Query(value)| Self(value)).map_err(|e| ApiError::malformed("invalid_query", e.body_text()))
    }
}

/// The parameters of a path.
#[derive(Debug)]
pub(crate) struct Path<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = extract::Path::<T>::from_request_parts(parts, state).await;
        path.map(|extract::Path(value)| Self(value)).map_err(|e| ApiError::malformed("invalid_path", e.body_text()))
    }
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
