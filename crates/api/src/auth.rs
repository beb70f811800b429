//! Who calls: the bearer key of a request, turned into what it may do. One layer stands before every route that wants a key; a
//! handler says by its arguments for whom it serves.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{FromRequestParts, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use holdfast_domain::ids::ProjectId;
use holdfast_store::Store;
use holdfast_store::keys::{self, Principal};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use http::request::Parts;

use crate::rate_limit::Allowance;
use crate::{ApiError, AppState};

/// How long a key is believed without asking the database. A change of a key is told at once; this is for when it is not heard.
pub(crate) const BELIEVED: Duration = Duration::from_secs(10);
/// Keys that are remembered.
const REMEMBERED: usize = 10_000;

/// Keys that were seen lately. Nothing is remembered while nobody listens for their changes.
#[derive(Debug, Default)]
pub(crate) struct KnownKeys(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    listening: bool,
    /// Grows with every change that is heard of, so that what was read before one is not remembered after it.
    changes: u64,
    keys: HashMap<[u8; 32], (Principal, Instant)>,
}

impl KnownKeys {
    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all keys, and says whether changes are heard from now on.
    pub(crate) fn forget(&self, listening: bool) {
        let mut known = self.lock();
        known.keys.clear();
        known.changes += 1;
        known.listening = listening;
    }

    /// Forgets all keys, because one of them was changed here.
    pub(crate) fn forget_all(&self) {
        let listening = self.lock().listening;
        self.forget(listening);
    }

    /// Whether a key still holds that did when a long answer began.
    pub(crate) async fn still_holds(&self, store: &Store, key: &KeyHash) -> bool {
        matches!(self.principal(store, key.0).await, Ok(Some(_)))
    }

    async fn principal(&self, store: &Store, hash: [u8; 32]) -> Result<Option<Principal>, ApiError> {
        let changes = {
            let known = self.lock();
            if let Some((principal, until)) = known.keys.get(&hash)
                && Instant::now() < *until
            {
                return Ok(Some(principal.clone()));
            }
            known.changes
        };
        let Some(principal) = store.authenticate(&hash).await? else { return Ok(None) };
        let mut known = self.lock();
        if known.listening && known.changes == changes {
            if known.keys.len() >= REMEMBERED {
                known.keys.clear();
            }
            let until = Instant::now() + principal.remaining.map_or(BELIEVED, |remaining| remaining.min(BELIEVED));
            known.keys.insert(hash, (principal.clone(), until));
        }
        Ok(Some(principal))
    }
}

/// What the key of a request is known by, for answers that go on for long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyHash([u8; 32]);

impl FromRequestParts<AppState> for KeyHash {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().copied().ok_or_else(outside)
    }
}

/// Stands before every route that wants a key: no key, no answer; and no more answers than the key's share.
pub(crate) async fn authenticate(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    match admit(&state, request.headers()).await {
        Ok((principal, hash, allowance)) => {
            request.extensions_mut().insert(principal);
            request.extensions_mut().insert(hash);
            let mut response = next.run(request).await;
            if let Some(allowance) = allowance {
                allowance.say(response.headers_mut());
            }
            response
        }
        Err(error) => error.into_response(),
    }
}

async fn admit(state: &AppState, headers: &HeaderMap) -> Result<(Principal, KeyHash, Option<Allowance>), ApiError> {
    let header = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let key = header
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| key.trim())
        .ok_or_else(|| ApiError::unauthorized("missing_api_key", "no API key: send the header `Authorization: Bearer KEY`"))?;
    let hash = keys::hash(key);
    let principal =
        state.known_keys.principal(&state.store, hash).await?.ok_or_else(|| {
            ApiError::unauthorized("invalid_api_key", "this API key is unknown, or it was revoked or has expired")
        })?;
    let limit = principal.requests_per_minute.or(state.settings.requests_per_minute);
    let allowance = state.rate_limits.take(principal.key, limit)?;
    Ok((principal, KeyHash(hash), allowance))
}

/// A route was put where no key is asked for.
pub(crate) fn outside() -> ApiError {
    ApiError::internal(&"a route stands outside the layer that asks for keys")
}

fn principal(parts: &Parts) -> Result<&Principal, ApiError> {
    parts.extensions.get::<Principal>().ok_or_else(outside)
}

/// The project a request acts for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tenant(pub(crate) ProjectId);

impl FromRequestParts<AppState> for Tenant {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, ApiError> {
        let project = principal(parts)?.project.ok_or_else(|| {
            ApiError::forbidden(
                "no_project",
                "this key belongs to no project; use one made with `holdfast keys create --project`",
            )
        })?;
        Ok(Self(project))
    }
}

/// The operator. A handler that takes it serves nobody else.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Admin;

impl FromRequestParts<AppState> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, ApiError> {
        if principal(parts)?.scopes.admin {
            return Ok(Self);
        }
        Err(ApiError::forbidden("insufficient_scope", "this call is the operator's; it needs a key with the scope `admin`"))
    }
}
