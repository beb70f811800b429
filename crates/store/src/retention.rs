//! What is removed with time, by the operator's policy: in small batches, and never what something else still needs.

use std::time::Duration;

use crate::{Store, StoreError, checkpoints};

/// How long things are kept; `None` for ever.
#[derive(Debug, Clone, Copy, Default)]
pub struct Retention {
    /// Events of a job, after it has ended, and the figures of its steps, which its result file keeps.
    pub events: Option<Duration>,
    /// Checkpoints of a job, after it has ended. One that a job which has not ended begins from stays.
    pub checkpoints: Option<Duration>,
    /// Entries of the audit log.
    pub audit: Option<Duration>,
    /// What webhooks were told, after it was taken or given up.
    pub deliveries: Option<Duration>,
}

/// Rows that are removed in one transaction.
const BATCH: i64 = 1_000;

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removed {
    /// Events.
    pub events: u64,
    /// Rows with the figures of some steps.
    pub figures: u64,
    /// Checkpoints.
    pub checkpoints: u64,
    /// Entries of the audit log.
    pub audit: u64,
    /// Deliveries.
    pub deliveries: u64,
}

impl Store {
    /// Removes what has been kept long enough.
    ///
    /// # Errors
    /// When the database fails; what is left is removed the next time.
    pub async fn retire(&self, policy: &Retention) -> Result<Removed, StoreError> {
        let mut sum = Removed::default();
        loop {
            let mut batch = Removed::default();
            if let Some(kept) = policy.events {
                batch.events = self.retire_events(kept).await?;
                batch.figures = self.retire_figures(kept).await?;
            }
            if let Some(kept) = policy.checkpoints {
                batch.checkpoints = self.retire_checkpoints(kept).await?;
            }
            if let Some(kept) = policy.audit {
                batch.audit = self.retire_audit(kept).await?;
            }
            if let Some(kept) = policy.deliveries {
                batch.deliveries = self.retire_deliveries(kept).await?;
            }
            if batch == Removed::default() {
                return Ok(sum);
            }
            sum.events += batch.events;
            sum.figures += batch.figures;
            sum.checkpoints += batch.checkpoints;
            sum.audit += batch.audit;
            sum.deliveries += batch.deliveries;
        }
    }

    async fn retire_events(&self, kept: Duration) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from job_events where ctid = any(array(
                 select e.ctid from job_events e join jobs j on j.id = e.job_id
                 where e.created_at < now() - make_interval(secs => $1) and j.finished_at < now() - make_interval(secs => $1) limit $2))",
            kept.as_secs_f64(),
            BATCH
        )
        .execute(&self.pool)
        .await?;
        Ok(removed.rows_affected())
    }

    /// A checkpoint shows the figures of its step, so they stay as long as it does.
    async fn retire_figures(&self, kept: Duration) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from job_metrics where ctid = any(array(
                 select m.ctid from job_metrics m join jobs j on j.id = m.job_id
                 where j.finished_at < now() - make_interval(secs => $1)
                   and not exists (select 1 from job_checkpoints c where c.job_id = m.job_id) limit $2))",
            kept.as_secs_f64(),
            BATCH
        )
        .execute(&self.pool)
        .await?;
        Ok(removed.rows_affected())
    }

    async fn retire_checkpoints(&self, kept: Duration) -> Result<u64, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let old = sqlx::query_scalar!(
            "select c.id from job_checkpoints c join jobs j on j.id = c.job_id
             where j.finished_at < now() - make_interval(secs => $1)
               and not exists (select 1 from jobs n where n.start_job_id = c.job_id and n.start_step = c.step and n.finished_at is null)
             limit $2 for update of c skip locked",
            kept.as_secs_f64(),
            BATCH
        )
        .fetch_all(&mut *transaction)
        .await?;
        checkpoints::remove(&mut transaction, &old).await?;
        transaction.commit().await?;
        Ok(old.len() as u64)
    }

    async fn retire_audit(&self, kept: Duration) -> Result<u64, StoreError> {
        let mut transaction = self.pool.begin().await?;
        // The log lets nothing go but what its trigger is told has been kept long enough.
        sqlx::query_scalar!("select set_config('holdfast.audit_kept_seconds', $1, true)", kept.as_secs().to_string())
            .fetch_one(&mut *transaction)
            .await?;
        let removed = sqlx::query!(
            "delete from audit_log where ctid = any(array(
                 select ctid from audit_log where at < now() - make_interval(secs => $1) order by at limit $2))",
            kept.as_secs_f64(),
            BATCH
        )
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(removed.rows_affected())
    }

    async fn retire_deliveries(&self, kept: Duration) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from webhook_deliveries where ctid = any(array(
                 select ctid from webhook_deliveries where state <> 'pending' and ended_at < now() - make_interval(secs => $1) limit $2))",
            kept.as_secs_f64(),
            BATCH
        )
        .execute(&self.pool)
        .await?;
        Ok(removed.rows_affected())
    }
}
