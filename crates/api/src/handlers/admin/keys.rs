//! API keys.

use axum::extract::State;
use axum::{Extension, Json};
use holdfast_domain::ids::{KeyId, MemberId, ProjectId};
use holdfast_store::StoreError;
use holdfast_store::keys::NewKey;

use crate::audit::ActedOn;
use crate::auth::Admin;
use crate::error::ErrorBody;
use crate::extract::{self, JsonBody, Path, QueryString};
use crate::repeatable::Repeatable;
use crate::wire::admin::keys::{ApiKey, CreateApiKey, ListApiKeys, Scope};
use crate::wire::list::{Created, List};
use crate::{ApiError, AppState};

/// The shortest and the longest life of a key, in seconds: a minute and ten years.
const LIFETIME_SECONDS: std::ops::RangeInclusive<u64> = 60..=315_360_000;

/// List keys, newest first.
#[utoipa::path(
    get, path = "/admin/keys", operation_id = "list_api_keys", tag = "admin", params(ListApiKeys),
    responses((status = 200, description = "A page of them", body = List<ApiKey>))
)]
pub(crate) async fn list_keys(
    _: Admin,
    State(state): State<AppState>,
    QueryString(query): QueryString<ListApiKeys>,
) -> Result<Json<List<ApiKey>>, ApiError> {
    let page = extract::page::<KeyId>(query.after.as_deref(), query.limit, 20, 100, false)?;
    let project = extract::filter_id::<ProjectId>("project", query.project.as_deref())?;
    let keys = state.store.keys(project, page).await?;
    Ok(Json(List::new(keys.items.into_iter().map(|row| ApiKey::new(row, None)).collect(), keys.has_more)))
}

/// Make a key. The answer alone holds it.
///
/// With an `Idempotency-Key`, a request that comes again makes no second key; its answer is a 400 `already_made`, which names the first.
#[utoipa::path(
    post, path = "/admin/keys", operation_id = "create_api_key", tag = "admin", request_body = CreateApiKey,
    responses(
        (status = 200, description = "The key", body = ApiKey),
        (status = 404, description = "There is no such project or member", body = ErrorBody),
    )
)]
pub(crate) async fn create_key(
    _: Admin,
    State(state): State<AppState>,
    repeatable: Repeatable,
    JsonBody(body, sha256): JsonBody<CreateApiKey>,
) -> Result<(Option<Extension<ActedOn>>, Created<ApiKey>), ApiError> {
    if body.expires_in_seconds.is_some_and(|seconds| !LIFETIME_SECONDS.contains(&seconds)) {
        let message = format!("expires_in_seconds must lie between {} and {}", LIFETIME_SECONDS.start(), LIFETIME_SECONDS.end());
        return Err(ApiError::invalid("expires_in_seconds", "out_of_bounds", message));
    }
    if body.requests_per_minute.is_some_and(|requests| !(1..=1_000_000).contains(&requests)) {
        let message = "requests_per_minute must lie between 1 and 1000000";
        return Err(ApiError::invalid("requests_per_minute", "out_of_bounds", message));
    }
    let scopes = body.scopes.clone().unwrap_or_else(|| vec![Scope::Read, Scope::Write]);
    if scopes.is_empty() {
        return Err(ApiError::invalid("scopes", "out_of_bounds", "name at least one of read, write and admin"));
    }
    let key = NewKey {
        name: body.name.clone().unwrap_or_default(),
        project: body.project.as_deref().map(|id| extract::id::<ProjectId>("project", id)).transpose()?,
        member: body.member.as_deref().map(|id| extract::id::<MemberId>("member", id)).transpose()?,
        read_only: !scopes.contains(&Scope::Write) && (scopes.contains(&Scope::Read) || !scopes.contains(&Scope::Admin)),
        is_admin: scopes.contains(&Scope::Admin),
        lifetime: body.lifetime(),
        requests_per_minute: body.requests_per_minute,
    };
    let created = state.store.create_key(&key, Some(&repeatable.with_body(sha256))).await.map_err(|error| match error {
        StoreError::Invalid(invalid) if matches!(invalid.code, "project_not_found" | "member_not_found") => {
            let named = if invalid.param == "project" { &body.project } else { &body.member };
            ApiError::not_found(&invalid.param, named.as_deref().unwrap_or_default())
        }
        other => other.into(),
    });
    let (secret, row) = created?;
    Ok((row.project.map(ActedOn).map(Extension), Created(ApiKey::new(row, Some(&secret)))))
}

/// Revoke a key: from here on it is unknown. Its row stays, for the audit log.
#[utoipa::path(
    delete, path = "/admin/keys/{key_id}", operation_id = "revoke_api_key", tag = "admin",
    params(("key_id" = String, Path, example = "key_0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "The key's row", body = ApiKey),
        (status = 404, description = "There is no such key", body = ErrorBody),
    )
)]
pub(crate) async fn revoke_key(
    _: Admin,
    State(state): State<AppState>,
    Path(key_id): Path<String>,
) -> Result<(Option<Extension<ActedOn>>, Json<ApiKey>), ApiError> {
    let id: KeyId = extract::id("key_id", &key_id)?;
    let row = state.store.revoke_key(id).await.map_err(|error| ApiError::of_one(error, "key_id", &key_id))?;
    state.known_keys.forget_all();
    Ok((row.project.map(ActedOn).map(Extension), Json(ApiKey::new(row, None))))
}
