//! API keys: a prefix, then 256 random bits. Only the SHA-256 is kept.

use std::fmt;
use std::time::Duration;

use holdfast_domain::Invalid;
use holdfast_domain::ids::{KeyId, MemberId, ProjectId};
use rand::TryRng;
use rand::rngs::SysRng;
use sha2::{Digest, Sha256};
use sqlx::PgConnection;
use sqlx::postgres::PgListener;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::once::{self, Once};
use crate::{Page, PageRequest, Store, StoreError, new_id};

/// What every key begins with, so that scanners for leaked secrets know one.
const PREFIX: &str = "hf-";
/// Characters of a key that are kept to tell keys apart.
const SHOWN: usize = 8;
/// Where it is told that a key was changed: who keeps keys in memory must forget them.
const CHANNEL: &str = "holdfast_keys";

/// A key in the clear: exists once, when it is made. Does not print itself.
pub struct ApiKey(String);

impl ApiKey {
    /// The key's text, for the one who asked for it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// What a key lets its holder do. Every key reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scopes {
    /// Change things.
    pub write: bool,
    /// Act as the operator.
    pub admin: bool,
}

/// For whom a key acts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The key.
    pub key: KeyId,
    /// The key's first characters.
    pub prefix: String,
    /// The project it acts for; `None` for an operator's key that belongs to none.
    pub project: Option<ProjectId>,
    /// What it may do.
    pub scopes: Scopes,
    /// Requests it may make in a minute, when that is not the deployment's number.
    pub requests_per_minute: Option<u32>,
    /// How long it still holds; `None` for ever.
    pub remaining: Option<Duration>,
}

/// A key to be made.
#[derive(Debug, Clone, Default)]
pub struct NewKey {
    /// What it is for, for people.
    pub name: String,
    /// The project it acts for.
    pub project: Option<ProjectId>,
    /// Whose it is.
    pub member: Option<MemberId>,
    /// Whether it only reads.
    pub read_only: bool,
    /// Whether it may do what operators may.
    pub is_admin: bool,
    /// How long it holds.
    pub lifetime: Option<Duration>,
    /// Requests it may make in a minute, when that is not the deployment's number.
    pub requests_per_minute: Option<u32>,
}

/// A key's row: everything but the key.
#[derive(Debug, Clone)]
pub struct KeyRow {
    /// Its id.
    pub id: KeyId,
    /// What it is for.
    pub name: String,
    /// Its first characters.
    pub prefix: String,
    /// The project it acts for.
    pub project: Option<ProjectId>,
    /// Whose it is.
    pub member: Option<MemberId>,
    /// What it may do.
    pub scopes: Scopes,
    /// Requests it may make in a minute, when that is not the deployment's number.
    pub requests_per_minute: Option<u32>,
    /// When it was made.
    pub created_at: OffsetDateTime,
    /// When it ends.
    pub expires_at: Option<OffsetDateTime>,
    /// When it was revoked.
    pub revoked_at: Option<OffsetDateTime>,
    /// When it was last used, to the minute.
    pub last_used_at: Option<OffsetDateTime>,
}

struct Row {
    id: Uuid,
    name: String,
    prefix: String,
    project_id: Option<Uuid>,
    member_id: Option<Uuid>,
    can_write: bool,
    is_admin: bool,
    requests_per_minute: Option<i64>,
    created_at: OffsetDateTime,
    expires_at: Option<OffsetDateTime>,
    revoked_at: Option<OffsetDateTime>,
    last_used_at: Option<OffsetDateTime>,
}

impl From<Row> for KeyRow {
    fn from(row: Row) -> Self {
        Self {
            id: KeyId(row.id),
            name: row.name,
            prefix: row.prefix,
            project: row.project_id.map(ProjectId),
            member: row.member_id.map(MemberId),
            scopes: Scopes { write: row.can_write, admin: row.is_admin },
            requests_per_minute: row.requests_per_minute.and_then(|n| u32::try_from(n).ok()),
            created_at: row.created_at,
            expires_at: row.expires_at,
            revoked_at: row.revoked_at,
            last_used_at: row.last_used_at,
        }
    }
}

impl Store {
    /// Makes a key. A request that was served before is refused with the id of the key it made: that key was shown then, and is
    /// kept nowhere.
    ///
    /// # Errors
    /// When it would act for nobody, its project or member does not exist, the request has made a key before, the machine gives no
    /// randomness, or the database fails.
    pub async fn create_key(&self, new: &NewKey, once: Option<&Once>) -> Result<(ApiKey, KeyRow), StoreError> {
        if new.project.is_none() && !new.is_admin {
            return Err(Invalid::new("project", "missing", "a key that is no admin's needs a project").into());
        }
        if new.name.chars().count() > 128 || new.name.chars().any(char::is_control) {
            return Err(Invalid::new(
                "name",
                "invalid_name",
                "a key's name has at most 128 characters and no control characters",
            )
            .into());
        }
        if let Some(member) = new.member {
            sqlx::query_scalar!(
                "select 1 as one from members where id = $1 and removed_at is null
                   and ($2::uuid is null or organization = (select organization from projects where id = $2))",
                member.0,
                new.project.map(|p| p.0)
            )
            .fetch_optional(&self.pool)
            .await?
            .ok_or_else(|| Invalid::new("member", "member_not_found", "the project's organization has no such member"))?;
        }
        let id = new_id();
        let mut transaction = self.pool.begin().await?;
        if let Some(made) = once::admit(&mut transaction, once, id).await? {
            let message = format!(
                "this request has made {} already, and a key is shown once: revoke that one if its text was lost, and send a new request",
                KeyId(made)
            );
            return Err(Invalid::new("id", "already_made", message).into());
        }
        let mut secret = [0; 32];
        SysRng.try_fill_bytes(&mut secret).map_err(|e| StoreError::Io(std::io::Error::other(e)))?;
        let key = format!("{PREFIX}{}", hex::encode(secret));
        let inserted = sqlx::query_as!(
            Row,
            "insert into api_keys (id, name, project_id, member_id, can_write, is_admin, prefix, sha256, requests_per_minute, expires_at)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, now() + make_interval(secs => $10))
             returning id, name, prefix, project_id, member_id, can_write, is_admin, requests_per_minute, created_at, expires_at,
                       revoked_at, last_used_at",
            id,
            new.name,
            new.project.map(|p| p.0),
            new.member.map(|m| m.0),
            !new.read_only,
            new.is_admin,
            &key[..SHOWN],
            &hash(&key)[..],
            new.requests_per_minute.map(i64::from),
            new.lifetime.map(|l| l.as_secs_f64())
        )
        .fetch_one(&mut *transaction)
        .await
        .map_err(StoreError::from);
        match inserted {
            Ok(row) => {
                transaction.commit().await?;
                Ok((ApiKey(key), row.into()))
            }
            Err(error) => Err(match error.constraint() {
                Some("api_keys_project_id_fkey") => {
                    Invalid::new("project", "project_not_found", "there is no such project").into()
                }
                Some("api_keys_member_id_fkey") => Invalid::new("member", "member_not_found", "there is no such member").into(),
                _ => error,
            }),
        }
    }

    /// For whom a key acts; `None` when there is no such key, or it was revoked or has expired. Notes that it was used.
    ///
    /// The key is looked up by its hash, so how long that takes says nothing about the keys there are.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn authenticate(&self, sha256: &[u8; 32]) -> Result<Option<Principal>, StoreError> {
        let row = sqlx::query!(
            "with used as (
                 update api_keys set last_used_at = now()
                 where sha256 = $1 and revoked_at is null and (last_used_at is null or last_used_at < now() - interval '1 minute'))
             select id, prefix, project_id, can_write, is_admin, requests_per_minute,
                    extract(epoch from expires_at - now())::double precision as remaining_seconds
             from api_keys where sha256 = $1 and revoked_at is null and (expires_at is null or expires_at > now())",
            &sha256[..]
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(|r| Principal {
            key: KeyId(r.id),
            prefix: r.prefix,
            project: r.project_id.map(ProjectId),
            scopes: Scopes { write: r.can_write, admin: r.is_admin },
            requests_per_minute: r.requests_per_minute.and_then(|n| u32::try_from(n).ok()),
            remaining: r.remaining_seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default()),
        }))
    }

    /// Keys, newest first, of one project or all.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn keys(&self, project: Option<ProjectId>, page: PageRequest) -> Result<Page<KeyRow>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            "select id, name, prefix, project_id, member_id, can_write, is_admin, requests_per_minute, created_at, expires_at,
                    revoked_at, last_used_at
             from api_keys where ($1::uuid is null or project_id = $1) and ($2::uuid is null or id < $2) order by id desc limit $3",
            project.map(|p| p.0),
            page.after,
            page.fetch()
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(Page::new(rows.into_iter().map(KeyRow::from).collect(), &page))
    }

    /// Revokes a key: from now on it is unknown. Revoking it again changes nothing.
    ///
    /// # Errors
    /// When there is no such key, or the database fails.
    pub async fn revoke_key(&self, id: KeyId) -> Result<KeyRow, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let row = sqlx::query_as!(
            Row,
            "update api_keys set revoked_at = coalesce(revoked_at, now()) where id = $1
             returning id, name, prefix, project_id, member_id, can_write, is_admin, requests_per_minute, created_at, expires_at,
                       revoked_at, last_used_at",
            id.0
        )
        .fetch_optional(&mut *transaction)
        .await?
        .ok_or(StoreError::NotFound)?;
        announce_change(&mut transaction).await?;
        transaction.commit().await?;
        Ok(row.into())
    }

    /// A listener that wakes when a key was changed.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn listen_for_key_changes(&self) -> Result<PgListener, StoreError> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen(CHANNEL).await?;
        Ok(listener)
    }
}

/// Tells all who keep keys in memory that one was changed.
pub(crate) async fn announce_change(connection: &mut PgConnection) -> Result<(), StoreError> {
    sqlx::query!("select pg_notify($1, '')", CHANNEL).execute(connection).await?;
    Ok(())
}

/// What a key is known by.
#[must_use]
pub fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}
