//! What a job that waits waits for.

use super::Job;
use crate::{Store, StoreError};

/// What a job that waits waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Jobs that workers will take before it, as things stand.
    pub ahead: u64,
    /// Workers that were heard of lately.
    pub workers: u64,
    /// Jobs of its project that train.
    pub running_in_project: u64,
    /// How many of the project's jobs may train at a time.
    pub may_run_in_project: Option<u64>,
}

impl Store {
    /// What a job that waits waits for. Workers take turns between projects: the one with the fewest jobs in training first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn waiting(&self, job: &Job) -> Result<Waiting, StoreError> {
        let row = sqlx::query!(
            "with waiting as (
                 select project_id, count(*) as jobs, count(*) filter (where id < $2) as older from jobs
                 where status in ('validating_files', 'queued') group by project_id),
             running as (
                 select project_id, count(*) as jobs from jobs where status in ('running', 'pausing') group by project_id),
             mine as (
                 select coalesce((select older from waiting where project_id = $1), 0) as older,
                        coalesce((select jobs from running where project_id = $1), 0) as running)
             select mine.running as \"running!\",
                    (select count(*) from workers where seen_at > now() - interval '1 minute') as \"workers!\",
                    (select max_running_jobs from projects where id = $1) as may_run,
                    (mine.older + coalesce((
                        select sum(least(w.jobs, greatest(0, mine.older + mine.running - coalesce(r.jobs, 0))))
                        from waiting w left join running r using (project_id) where w.project_id <> $1), 0))::bigint as \"ahead!\"
             from mine",
            job.project.0,
            job.id.0
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(Waiting {
            ahead: row.ahead.unsigned_abs(),
            workers: row.workers.unsigned_abs(),
            running_in_project: row.running.unsigned_abs(),
            may_run_in_project: row.may_run.map(i64::unsigned_abs),
        })
    }
}
