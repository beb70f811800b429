//! Sums over all projects, for the operator's monitoring. Nothing here can be laid at one tenant.

use crate::{Store, StoreError};

/// What the queue and the workers are doing.
#[derive(Debug, Clone, Default)]
pub struct Statistics {
    /// Jobs that have not ended, by status.
    pub jobs: Vec<(String, u64)>,
    /// How long the oldest waiting job has waited, in seconds.
    pub oldest_wait_seconds: f64,
    /// Workers that train or check.
    pub busy_workers: u64,
    /// Workers that were heard of lately and have nothing to do.
    pub idle_workers: u64,
    /// Workers that were not heard of for a minute.
    pub lost_workers: u64,
    /// Bytes of all files.
    pub stored_bytes: u64,
    /// Notices that are still to be sent.
    pub pending_notices: u64,
    /// Notices that were given up.
    pub dead_notices: u64,
    /// Objects that no row claims.
    pub staged_objects: u64,
    /// Jobs that raised the alarm of the poison gauge within a day.
    pub safety_alarms: u64,
    /// Adapters that did not pass the gate and that nobody has decided about.
    pub quarantined_adapters: u64,
    /// Means over the last steps of the jobs that train: task loss, alignment loss, conflict rate.
    pub training: Option<(f64, f64, f64)>,
}

impl Store {
    /// Whether the database answers, and has every migration this program knows.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ready(&self) -> Result<(), StoreError> {
        let wanted = sqlx::migrate!("../../migrations").iter().map(|m| m.version).max().unwrap_or(0);
        let found = sqlx::query_scalar::<_, Option<i64>>("select max(version) from _sqlx_migrations where success")
            .fetch_one(&self.pool)
            .await?
            .unwrap_or(0);
        if found < wanted {
            return Err(StoreError::Migration(format!("the database is at {found} of {wanted}; run `holdfast migrate`")));
        }
        Ok(())
    }

    /// The sums.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn statistics(&self) -> Result<Statistics, StoreError> {
        let jobs = sqlx::query!(
            "select status, count(*) as \"count!\" from jobs
             where status in ('validating_files', 'queued', 'running', 'pausing', 'paused') group by status"
        )
        .fetch_all(&self.pool)
        .await?;
        let sums = sqlx::query!(
            "select coalesce(extract(epoch from now() - (select min(created_at) from jobs j
                        where status in ('validating_files', 'queued')
                          and not exists (select 1 from job_leases l where l.job_id = j.id))), 0)::double precision as \"oldest!\",
                    (select count(*) from workers where seen_at > now() - interval '1 minute' and job_id is not null) as \"busy!\",
                    (select count(*) from workers where seen_at > now() - interval '1 minute' and job_id is null) as \"idle!\",
                    (select count(*) from workers where seen_at <= now() - interval '1 minute') as \"lost!\",
                    (select coalesce(sum(bytes), 0)::bigint from files) as \"stored!\",
                    (select count(*) from webhook_deliveries where state = 'pending') as \"pending!\",
                    (select count(*) from webhook_deliveries where state = 'dead') as \"dead!\",
                    (select count(*) from staged_objects) as \"staged!\",
                    (select count(*) from jobs where alarmed_at > now() - interval '1 day') as \"alarms!\",
                    (select count(*) from quarantined_adapters where released_at is null and discarded_at is null) as \"quarantined!\""
        )
        .fetch_one(&self.pool)
        .await?;
        let training = sqlx::query!(
            "select avg((s.step ->> 'task_loss')::double precision) as loss,
                    avg((s.step ->> 'align_kl')::double precision) as kl,
                    avg((s.step ->> 'conflict_rate')::double precision) as conflict_rate
             from jobs j cross join lateral (
                 select m.steps -> -1 as step from job_metrics m where m.job_id = j.id order by attempt desc, first_step desc limit 1) s
             where j.status = 'running'"
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(Statistics {
            jobs: jobs.into_iter().map(|r| (r.status, r.count.unsigned_abs())).collect(),
            oldest_wait_seconds: sums.oldest,
            busy_workers: sums.busy.unsigned_abs(),
            idle_workers: sums.idle.unsigned_abs(),
            lost_workers: sums.lost.unsigned_abs(),
            stored_bytes: sums.stored.unsigned_abs(),
            pending_notices: sums.pending.unsigned_abs(),
            dead_notices: sums.dead.unsigned_abs(),
            staged_objects: sums.staged.unsigned_abs(),
            safety_alarms: sums.alarms.unsigned_abs(),
            quarantined_adapters: sums.quarantined.unsigned_abs(),
            training: training.loss.map(|loss| (loss, training.kl.unwrap_or(0.0), training.conflict_rate.unwrap_or(0.0))),
        })
    }
}
