//! Workers, as the operator sees them.

use holdfast_domain::ids::JobId;
use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;

use crate::{Store, StoreError};

/// A worker's row.
#[derive(Debug, Clone)]
pub struct Worker {
    /// Its name.
    pub name: String,
    /// Where its trainers compute.
    pub device: String,
    /// The version of its program.
    pub version: String,
    /// What it works on.
    pub job: Option<JobId>,
    /// When it began.
    pub started_at: OffsetDateTime,
    /// When it was last heard of.
    pub seen_at: OffsetDateTime,
    /// Whether that is less than a minute ago.
    pub is_alive: bool,
}

/// Keeps a worker's name to one process: as long as its connection lives, nobody else gets the name.
#[derive(Debug)]
pub struct WorkerName {
    name: String,
    connection: PgConnection,
}

impl WorkerName {
    /// Gives the name back.
    ///
    /// # Errors
    /// When the database fails; the name is then free once it notices.
    pub async fn release(mut self) -> Result<(), StoreError> {
        sqlx::query_scalar!("select pg_advisory_unlock_all() is null as \"released!\"").fetch_one(&mut self.connection).await?;
        Ok(self.connection.close().await?)
    }

    /// Whether the name is still this process'. The database may have been restarted, and forgotten who has it: it is then taken
    /// again, unless another was faster.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn is_held(&mut self, store: &Store) -> Result<bool, StoreError> {
        if self.connection.ping().await.is_ok() {
            return Ok(true);
        }
        match store.take_worker_name(&self.name).await? {
            Some(taken) => {
                *self = taken;
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

impl Store {
    /// Takes a worker's name; `None` when another process has it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn take_worker_name(&self, name: &str) -> Result<Option<WorkerName>, StoreError> {
        let mut connection = self.pool.acquire().await?.detach();
        let taken =
            sqlx::query_scalar!("select pg_try_advisory_lock(hashtext('holdfast worker'), hashtext($1)) as \"taken!\"", name)
                .fetch_one(&mut connection)
                .await?;
        if taken {
            return Ok(Some(WorkerName { name: name.into(), connection }));
        }
        connection.close().await?;
        Ok(None)
    }

    /// A worker says that it is there.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn worker_is_here(&self, name: &str, device: &str, version: &str, started: bool) -> Result<(), StoreError> {
        sqlx::query!(
            "insert into workers (name, device, version, job_id)
             values ($1, $2, $3, (select job_id from job_leases where worker = $1 limit 1))
             on conflict (name) do update set device = excluded.device, version = excluded.version, job_id = excluded.job_id,
                 seen_at = now(), started_at = case when $4 then now() else workers.started_at end",
            name,
            device,
            version,
            started
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// A worker says that it goes.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn worker_goes(&self, name: &str) -> Result<(), StoreError> {
        sqlx::query!("delete from workers where name = $1", name).execute(&self.pool).await?;
        Ok(())
    }

    /// Forgets workers that were not heard of for a day. Returns how many.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn forget_workers(&self) -> Result<u64, StoreError> {
        let forgotten = sqlx::query!("delete from workers where seen_at < now() - interval '1 day'").execute(&self.pool).await?;
        Ok(forgotten.rows_affected())
    }

    /// All workers that were heard of in the last day, by name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn workers(&self) -> Result<Vec<Worker>, StoreError> {
        let rows = sqlx::query!(
            "select name, device, version, job_id, started_at, seen_at, seen_at > now() - interval '1 minute' as \"is_alive!\"
             from workers where seen_at > now() - interval '1 day' order by name"
        )
        .fetch_all(&self.pool)
        .await?;
        let workers = rows.into_iter().map(|r| Worker {
            name: r.name,
            device: r.device,
            version: r.version,
            job: r.job_id.map(JobId),
            started_at: r.started_at,
            seen_at: r.seen_at,
            is_alive: r.is_alive,
        });
        Ok(workers.collect())
    }
}
