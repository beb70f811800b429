//! Requests that may come twice, see [`holdfast_store::once`]: by which words a client says so.

use axum::extract::FromRequestParts;
use holdfast_domain::ids::KeyId;
use holdfast_store::keys::Principal;
use holdfast_store::{Once, Repetition};
use http::request::Parts;
use sha2::{Digest, Sha256};

use crate::auth::outside;
use crate::{ApiError, AppState};

/// The longest name a client may give a request.
const MAX_NAME_BYTES: usize = 255;

/// What a request says about whether it is a new one.
#[derive(Debug, Clone)]
pub(crate) struct Repeatable {
    key: KeyId,
    operation: String,
    name: Option<String>,
    is_retry: bool,
}

impl FromRequestParts<AppState> for Repeatable {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, ApiError> {
        let key = parts.extensions.get::<Principal>().map(|principal| principal.key);
        let key = key.ok_or_else(outside)?;
        let word = |name: &str| parts.headers.get(name).map(|value| value.to_str().map(str::to_owned));
        let name = word("idempotency-key").transpose().ok().flatten();
        let unreadable = parts.headers.contains_key("idempotency-key") && name.is_none();
        let usable =
            |name: &String| (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        if unreadable || !name.as_ref().is_none_or(usable) {
            let message = format!("Idempotency-Key takes 1 to {MAX_NAME_BYTES} printable ASCII characters");
            return Err(ApiError::invalid("Idempotency-Key", "invalid_idempotency_key", message));
        }
        // The SDKs of the public contract count their tries here, and send no key.
        let tries = word("x-stainless-retry-count").and_then(Result::ok).and_then(|count| count.parse::<u32>().ok());
        let operation = format!("{} {}", parts.method, parts.uri.path());
        Ok(Self { key, operation, name, is_retry: tries.is_some_and(|tries| tries > 0) })
    }
}

impl Repeatable {
    /// The same, of a request whose body has this hash.
    pub(crate) fn with_body(self, body_sha256: [u8; 32]) -> Once {
        let (token, repetition) = match (&self.name, self.is_retry) {
            (Some(name), _) => (Sha256::digest(format!("name:{name}")).into(), Repetition::Named),
            (None, true) => (body_sha256, Repetition::Retry),
            (None, false) => (body_sha256, Repetition::First),
        };
        Once { key: self.key, operation: self.operation, token, body_sha256, repetition }
    }

    /// The same, of a request without a body.
    pub(crate) fn without_body(self) -> Once {
        self.with_body(Sha256::digest([]).into())
    }
}
