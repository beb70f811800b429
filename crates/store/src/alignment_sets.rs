//! Alignment sets: operator-owned, versioned, never readable by tenants.

use holdfast_domain::model_name;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::files::object_ref;
use crate::objects::{self, ObjectRef, keys};
use crate::{Store, StoreError, new_id};

/// A version of an alignment set.
#[derive(Debug, Clone)]
pub struct AlignmentSet {
    pub(crate) id: Uuid,
    /// Its name.
    pub name: String,
    /// From 1.
    pub version: i32,
    /// Its rows.
    pub row_count: u64,
    /// Its bytes.
    pub object: ObjectRef,
}

struct Row {
    id: Uuid,
    name: String,
    version: i32,
    object_key: String,
    bytes: i64,
    sha256: Vec<u8>,
    row_count: i64,
}

impl TryFrom<Row> for AlignmentSet {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let object = object_ref(row.object_key, row.bytes, &row.sha256)?;
        Ok(Self { id: row.id, name: row.name, version: row.version, row_count: row.row_count.unsigned_abs(), object })
    }
}

impl Store {
    /// Keeps `rows` (checked JSON Lines) as the next version of the set `name`; the content of the newest version again is
    /// no change.
    ///
    /// # Errors
    /// When the name cannot be used, or a store fails.
    pub async fn create_alignment_set(&self, name: &str, rows: &[u8], row_count: u64) -> Result<AlignmentSet, StoreError> {
        model_name::check(name)?;
        let content: [u8; 32] = Sha256::digest(rows).into();
        let key = keys::alignment_set(&content);
        // Two imports at once: the second waits for the first, and then finds its content or takes the next number.
        let mut transaction = self.pool.begin().await?;
        sqlx::query!("select pg_advisory_xact_lock(hashtext('alignment_sets'))").execute(&mut *transaction).await?;
        match self.alignment_set(name).await {
            Ok(newest) if newest.object.sha256 == content => return Ok(newest),
            Ok(_) | Err(StoreError::NotFound) => {}
            Err(error) => return Err(error),
        }
        let known = sqlx::query_scalar!("select 1 as one from alignment_sets where object_key = $1 limit 1", key)
            .fetch_optional(&self.pool)
            .await?
            .is_some();
        if !known {
            self.objects.stage_bytes(key.clone(), rows).await?;
            objects::claim(&mut transaction, std::slice::from_ref(&key)).await?;
        }
        let row = sqlx::query_as!(
            Row,
            "insert into alignment_sets (id, name, version, object_key, bytes, sha256, row_count)
             select $1, $2, coalesce(max(version), 0) + 1, $3, $4, $5, $6 from alignment_sets where name = $2
             returning id, name, version, object_key, bytes, sha256, row_count",
            new_id(),
            name,
            key,
            rows.len() as i64,
            &content[..],
            row_count.cast_signed()
        )
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        row.try_into()
    }

    /// The newest version of a set.
    ///
    /// # Errors
    /// When there is no such set, or the database fails.
    pub async fn alignment_set(&self, name: &str) -> Result<AlignmentSet, StoreError> {
        sqlx::query_as!(
            Row,
            "select id, name, version, object_key, bytes, sha256, row_count from alignment_sets
             where name = $1 order by version desc limit 1",
            name
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::NotFound)?
        .try_into()
    }

    /// Every version of every set, by name, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn alignment_sets(&self) -> Result<Vec<AlignmentSet>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            "select id, name, version, object_key, bytes, sha256, row_count from alignment_sets order by name, version desc"
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(AlignmentSet::try_from).collect()
    }

    pub(crate) async fn alignment_set_by_id(&self, id: Uuid) -> Result<AlignmentSet, StoreError> {
        sqlx::query_as!(
            Row,
            "select id, name, version, object_key, bytes, sha256, row_count from alignment_sets where id = $1",
            id
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::NotFound)?
        .try_into()
    }
}
