//! What workers do to jobs: claim, renew, report, finish. A claim commits at once; everything after it happens under a lease
//! that the database's clock ends, and every write names the attempt that makes it, so that a worker that lost its lease
//! changes nothing.

use std::time::Duration;

use holdfast_domain::ids::JobId;
use holdfast_domain::job::Status;
use sqlx::{PgConnection, Postgres, Transaction};

use crate::jobs::{self, Job};
use crate::objects::ObjectRef;
use crate::{Store, StoreError};

mod claim;
mod finish;
mod report;

pub(crate) use claim::Unreadable;
pub use claim::{Claim, Work};
pub(crate) use finish::claim_objects;
pub use finish::{Checked, Published};

/// Where a hint is sent that a job may be claimed.
pub(crate) const CHANNEL: &str = "holdfast_jobs";

/// An adapter's file that has been written to the object store.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    /// Its name, as `adapter_model.safetensors`.
    pub name: String,
    /// Its bytes.
    pub object: ObjectRef,
}

/// What its owner wants of a job that a worker holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// That it goes on.
    Continue,
    /// That it stops with a checkpoint.
    Pause,
}

impl Wish {
    fn of(status: &str) -> Self {
        if status == Status::Pausing.as_str() { Self::Pause } else { Self::Continue }
    }
}

impl Store {
    /// Renews a lease for `lease` from now, and returns what the job's owner wants.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job: it must stop.
    pub async fn heartbeat(&self, job: JobId, attempt: i32, lease: Duration) -> Result<Wish, StoreError> {
        let status = sqlx::query_scalar!(
            "update job_leases l set expires_at = now() + make_interval(secs => $3) from jobs j
             where l.job_id = $1 and l.attempt = $2 and l.expires_at > now() and j.id = l.job_id returning j.status",
            job.0,
            attempt,
            lease.as_secs_f64()
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::Fenced)?;
        Ok(Wish::of(&status))
    }

    /// What the job's owner wants of it, without renewing the lease: reads alone, so that it may be asked often.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn wish(&self, job: JobId, attempt: i32) -> Result<Wish, StoreError> {
        let status = sqlx::query_scalar!(
            "select j.status from job_leases l join jobs j on j.id = l.job_id
             where l.job_id = $1 and l.attempt = $2 and l.expires_at > now()",
            job.0,
            attempt
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::Fenced)?;
        Ok(Wish::of(&status))
    }

    /// Opens a transaction in which the worker's lease is known to hold and the job cannot change under it.
    pub(crate) async fn hold(&self, id: JobId, attempt: i32) -> Result<(Transaction<'static, Postgres>, Job), StoreError> {
        let mut transaction = self.pool.begin().await?;
        let job = jobs::lock(&mut transaction, id, None).await?;
        let holds = sqlx::query_scalar!(
            "select 1 as one from job_leases where job_id = $1 and attempt = $2 and expires_at > now()",
            id.0,
            attempt
        )
        .fetch_optional(&mut *transaction)
        .await?;
        if holds.is_none() || job.state.attempt() != Some(attempt) {
            // Dropped alone, it would be rolled back some time later, and hide the job from who claims next until then.
            transaction.rollback().await?;
            return Err(StoreError::Fenced);
        }
        Ok((transaction, job))
    }
}

/// Tells whoever looks for a job that one may be claimed.
pub(crate) async fn notify(connection: &mut PgConnection) -> Result<(), StoreError> {
    sqlx::query!("select pg_notify($1, '')", CHANNEL).execute(connection).await?;
    Ok(())
}
