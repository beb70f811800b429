//! Who calls: the bearer key of a request, turned into the project it acts for.

use axum::extract::FromRequestParts;
use holdfast_domain::ids::ProjectId;
use http::header::AUTHORIZATION;
use http::request::Parts;

use crate::{ApiError, AppState};

/// The project a request acts for. A handler that takes it cannot be reached without a key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tenant(pub(crate) ProjectId);

impl FromRequestParts<AppState> for Tenant {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let header = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let key = header
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, key)| key.trim())
            .ok_or_else(|| {
                ApiError::unauthorized("missing_api_key", "no API key: send the header `Authorization: Bearer KEY`")
            })?;
        let principal = state
            .store
            .authenticate(key)
            .await?
            .ok_or_else(|| ApiError::unauthorized("invalid_api_key", "this API key is unknown or revoked"))?;
        let project = principal.project.ok_or_else(|| {
            ApiError::forbidden(
                "no_project",
                "this key belongs to no project; use one made with `holdfast keys create --project`",
            )
        })?;
        Ok(Self(project))
    }
}
