//! Requests that come twice. Clients send one again when a connection breaks, and must not get two of what they asked for.

use std::time::Duration;

use holdfast_domain::Invalid;
use holdfast_domain::ids::KeyId;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{Store, StoreError};

/// How long a client's own idempotency key holds.
const NAMED_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// How long after the first a request of the same body counts as the same: longer than clients wait before they try again.
const UNNAMED_LIFETIME: Duration = Duration::from_secs(15 * 60);

/// How a request says whether it is a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repetition {
    /// The client named it: the same name is the same request.
    Named,
    /// The client says that it tries again: the same body is the same request.
    Retry,
    /// A first try, to be known again.
    First,
}

/// What tells whether a request is one that was served before.
#[derive(Debug, Clone)]
pub struct Once {
    /// Whose request it is.
    pub key: KeyId,
    /// Method and path.
    pub operation: String,
    /// SHA-256 of the client's name for it, or of its body.
    pub token: [u8; 32],
    /// SHA-256 of its body.
    pub body_sha256: [u8; 32],
    /// How it says whether it is new.
    pub repetition: Repetition,
}

impl Once {
    /// How long what it made is remembered by its token.
    const fn lifetime(&self) -> Duration {
        match self.repetition {
            Repetition::Named => NAMED_LIFETIME,
            Repetition::Retry | Repetition::First => UNNAMED_LIFETIME,
        }
    }
}

/// Admits a request that will make `made`, in the transaction that makes it: one of the same token waits until that has
/// ended. Returns what an earlier one has made, when this is its repetition.
///
/// # Errors
/// When the client's name for it stands for another body, or the database fails.
pub(crate) async fn admit(connection: &mut PgConnection, once: Option<&Once>, made: Uuid) -> Result<Option<Uuid>, StoreError> {
    let Some(once) = once else { return Ok(None) };
    let admitted = sqlx::query_scalar!(
        "insert into made_requests (key_id, operation, token, body_sha256, made) values ($1, $2, $3, $4, $5)
         on conflict (key_id, operation, token) do update set made = excluded.made, body_sha256 = excluded.body_sha256, made_at = now()
         where $6 or made_requests.made_at < now() - make_interval(secs => $7)
         returning made",
        once.key.0,
        once.operation,
        &once.token[..],
        &once.body_sha256[..],
        made,
        once.repetition == Repetition::First,
        once.lifetime().as_secs_f64()
    )
    .fetch_optional(&mut *connection)
    .await?;
    if admitted.is_some() {
        return Ok(None);
    }
    let earlier = sqlx::query!(
        "select made, body_sha256 from made_requests where key_id = $1 and operation = $2 and token = $3",
        once.key.0,
        once.operation,
        &once.token[..]
    )
    .fetch_one(connection)
    .await?;
    if earlier.body_sha256 != once.body_sha256 {
        return Err(Invalid::new(
            "Idempotency-Key",
            "idempotency_key_reused",
            "this Idempotency-Key was sent before with another body; give every request a key of its own",
        )
        .into());
    }
    Ok(Some(earlier.made))
}

/// What a request of the same token and body has made. Unlike [`admit`] it admits nothing.
///
/// # Errors
/// When the database fails.
pub(crate) async fn made_before(connection: &mut PgConnection, once: &Once) -> Result<Option<Uuid>, StoreError> {
    let made = sqlx::query_scalar!(
        "select made from made_requests where key_id = $1 and operation = $2 and token = $3 and body_sha256 = $4
         and made_at >= now() - make_interval(secs => $5)",
        once.key.0,
        once.operation,
        &once.token[..],
        &once.body_sha256[..],
        once.lifetime().as_secs_f64()
    );
    Ok(made.fetch_optional(connection).await?)
}

impl Store {
    /// Forgets requests that are too old to be repeated. Returns how many.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn forget_requests(&self) -> Result<u64, StoreError> {
        let forgotten = sqlx::query!(
            "delete from made_requests where ctid = any(array(
                 select ctid from made_requests where made_at < now() - make_interval(secs => $1) limit 10000))",
            NAMED_LIFETIME.as_secs_f64()
        )
        .execute(&self.pool)
        .await?;
        Ok(forgotten.rows_affected())
    }
}
