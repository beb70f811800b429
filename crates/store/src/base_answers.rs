//! What base models answer to suites, asked once and kept for every later job.

use crate::files::object_ref;
use crate::objects::{self, ObjectRef, keys};
use crate::{Store, StoreError};

impl Store {
    /// The answers of that name; `None` where no job has asked yet.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn base_answers(&self, name: &str) -> Result<Option<ObjectRef>, StoreError> {
        let row = sqlx::query!("select object_key, bytes, sha256 from base_answers where name = $1", name)
            .fetch_optional(&self.pool)
            .await?;
        row.map(|row| object_ref(row.object_key, row.bytes, &row.sha256)).transpose()
    }

    /// Gives up answers that cannot be read back: the next job asks again.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn lose_base_answers(&self, name: &str) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin().await?;
        let keys = sqlx::query_scalar!("delete from base_answers where name = $1 returning object_key", name)
            .fetch_all(&mut *transaction)
            .await?;
        objects::disown(&mut transaction, &keys).await?;
        Ok(transaction.commit().await?)
    }

    /// Keeps answers under that name. Where another job was faster, its answers stay.
    ///
    /// # Errors
    /// When a store fails.
    pub async fn keep_base_answers(&self, name: &str, answers: &[u8]) -> Result<(), StoreError> {
        let object = self.objects.stage_bytes(keys::base_answers(name), answers).await?;
        let mut transaction = self.pool.begin().await?;
        let inserted = sqlx::query!(
            "insert into base_answers (name, object_key, bytes, sha256) values ($1, $2, $3, $4) on conflict (name) do nothing",
            name,
            object.key,
            object.bytes.cast_signed(),
            &object.sha256[..]
        )
        .execute(&mut *transaction)
        .await?;
        // One that came second is another object, has no row, and is swept.
        if inserted.rows_affected() == 1 {
            objects::claim(&mut transaction, std::slice::from_ref(&object.key)).await?;
        }
        Ok(transaction.commit().await?)
    }
}
