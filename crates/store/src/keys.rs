//! API keys: a prefix, then 256 random bits. Only the SHA-256 is kept.

use std::fmt;

use holdfast_domain::ids::{KeyId, ProjectId};
use rand::TryRng;
use rand::rngs::SysRng;
use sha2::{Digest, Sha256};

use crate::{Store, StoreError, new_id};

/// What every key begins with, so that scanners for leaked secrets know one.
const PREFIX: &str = "hf-";
/// Characters of a key that are kept to tell keys apart.
const SHOWN: usize = 8;

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

/// For whom a key acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Principal {
    /// The key.
    pub key: KeyId,
    /// The project it acts for; `None` for an operator's key that belongs to none.
    pub project: Option<ProjectId>,
    /// Whether it may do what operators may.
    pub is_admin: bool,
}

impl Store {
    /// Makes a key. With `project`, it acts for that project; with `is_admin`, also as the operator.
    ///
    /// # Errors
    /// When the machine gives no randomness, or the database fails.
    pub async fn create_key(&self, project: Option<ProjectId>, is_admin: bool) -> Result<ApiKey, StoreError> {
        let mut secret = [0; 32];
        SysRng.try_fill_bytes(&mut secret).map_err(|e| StoreError::Io(std::io::Error::other(e)))?;
        let key = format!("{PREFIX}{}", hex::encode(secret));
        sqlx::query!(
            "insert into api_keys (id, project_id, is_admin, prefix, sha256) values ($1, $2, $3, $4, $5)",
            new_id(),
            project.map(|p| p.0),
            is_admin,
            &key[..SHOWN],
            &hash(&key)[..]
        )
        .execute(&self.pool)
        .await?;
        Ok(ApiKey(key))
    }

    /// For whom a key acts; `None` when there is no such key, or it was revoked.
    ///
    /// The key is looked up by its hash, so how long that takes says nothing about the keys there are.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn authenticate(&self, key: &str) -> Result<Option<Principal>, StoreError> {
        let row = sqlx::query!(
            "select id, project_id, is_admin from api_keys where sha256 = $1 and revoked_at is null",
            &hash(key)[..]
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(|r| Principal { key: KeyId(r.id), project: r.project_id.map(ProjectId), is_admin: r.is_admin }))
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}
