//! Alignment references: what a base model says on an alignment set, computed once and kept for every later job.

use std::path::Path;

use sha2::{Digest, Sha256};
use sqlx::PgExecutor;
use tokio::io::AsyncReadExt;

use crate::files::object_ref;
use crate::objects::{self, ObjectRef, keys};
use crate::{Store, StoreError};

impl Store {
    /// The reference of that name; `None` where no job has computed it yet.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn alignment_reference(&self, name: &str) -> Result<Option<ObjectRef>, StoreError> {
        find(&self.pool, name).await
    }

    /// Keeps the file at `path` as the reference of that name, under the hash of its content. Where another job was faster, its
    /// reference stays.
    ///
    /// # Errors
    /// When the file cannot be read, or a store fails.
    pub async fn keep_alignment_reference(&self, name: &str, path: &Path) -> Result<(), StoreError> {
        if self.alignment_reference(name).await?.is_some() {
            return Ok(());
        }
        let object = self.objects.stage_file(keys::alignment_reference(&hash(path).await?), path).await?;
        let mut transaction = self.pool.begin().await?;
        let inserted = sqlx::query!(
            "insert into alignment_references (name, object_key, bytes, sha256) values ($1, $2, $3, $4)
             on conflict (name) do nothing",
            name,
            object.key,
            object.bytes.cast_signed(),
            &object.sha256[..]
        )
        .execute(&mut *transaction)
        .await?;
        let kept = find(&mut *transaction, name).await?;
        // Two jobs that computed the same bytes wrote the same object; one that differs has no row and is swept.
        if inserted.rows_affected() == 1 || kept.is_some_and(|kept| kept.key == object.key) {
            objects::claim(&mut transaction, std::slice::from_ref(&object.key)).await?;
        }
        Ok(transaction.commit().await?)
    }
}

async fn find(executor: impl PgExecutor<'_>, name: &str) -> Result<Option<ObjectRef>, StoreError> {
    let row = sqlx::query!("select object_key, bytes, sha256 from alignment_references where name = $1", name)
        .fetch_optional(executor)
        .await?;
    row.map(|row| object_ref(row.object_key, row.bytes, &row.sha256)).transpose()
}

async fn hash(path: &Path) -> Result<[u8; 32], StoreError> {
    let mut file = tokio::fs::File::open(path).await?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1024 * 1024]);
    loop {
        match file.read(&mut buffer).await? {
            0 => return Ok(hash.finalize().into()),
            read => hash.update(&buffer[..read]),
        }
    }
}
