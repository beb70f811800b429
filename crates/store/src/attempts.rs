//! The times a worker took a job up, and what became of each.

use holdfast_domain::ids::JobId;
use holdfast_domain::job::AttemptEnd;
use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::queue::Work;
use crate::{Store, StoreError};

/// An attempt's row.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
pub struct Attempt {
    /// The claim's number.
    pub attempt: i32,
    /// `check` or `training`.
    pub work: String,
    /// When it began.
    #[serde(with = "time::serde::timestamp")]
    pub started_at: OffsetDateTime,
    /// When it ended.
    #[serde(with = "time::serde::timestamp::option")]
    pub ended_at: Option<OffsetDateTime>,
    /// How it ended, see [`AttemptEnd`].
    pub outcome: Option<String>,
    /// Why it ended so, where that needs words.
    pub reason: Option<String>,
}

impl Store {
    /// Writes down what computes an attempt at a training.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn know_program(&self, id: JobId, attempt: i32, program: &Value) -> Result<(), StoreError> {
        let (mut transaction, _) = self.hold(id, attempt).await?;
        sqlx::query!("update job_attempts set program = $3 where job_id = $1 and attempt = $2", id.0, attempt, program)
            .execute(&mut *transaction)
            .await?;
        Ok(transaction.commit().await?)
    }

    /// What computed the attempts at a job's training before this one, as far as it was written down; the first comes first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn programs_before(&self, id: JobId, attempt: i32) -> Result<Vec<Value>, StoreError> {
        let programs = sqlx::query_scalar!(
            "select program as \"program!\" from job_attempts where job_id = $1 and attempt < $2 and program is not null order by attempt",
            id.0,
            attempt
        );
        Ok(programs.fetch_all(&self.pool).await?)
    }
}

/// A claim begins.
pub(crate) async fn begin(
    connection: &mut PgConnection,
    job: JobId,
    attempt: i32,
    work: Work,
    worker: &str,
) -> Result<(), StoreError> {
    let work = match work {
        Work::Check => "check",
        Work::Train => "training",
    };
    sqlx::query!(
        "insert into job_attempts (job_id, attempt, work, worker) values ($1, $2, $3, $4)",
        job.0,
        attempt,
        work,
        worker
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// A job is nobody's again: its lease goes, and with it the attempt. A job that had a setback rests a while, longer each time in a
/// row.
pub(crate) async fn end(
    connection: &mut PgConnection,
    job: JobId,
    end: AttemptEnd,
    reason: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query!("delete from job_leases where job_id = $1", job.0).execute(&mut *connection).await?;
    sqlx::query!(
        "update job_attempts set ended_at = now(), outcome = $2, reason = $3 where job_id = $1 and ended_at is null",
        job.0,
        end.as_str(),
        reason
    )
    .execute(&mut *connection)
    .await?;
    sqlx::query!(
        "update jobs set delays = case when $2 = 'delayed' then delays + 1 else 0 end,
                rests_until = case $2
                    when 'delayed' then now() + least(300, 2 ^ least(delays, 10)) * interval '1 second'
                    when 'set_back' then now() + least(60, 2 ^ (lost_workers - 1)) * interval '1 second' end
         where id = $1 and (rests_until is not null or delays > 0 or $2 in ('delayed', 'set_back'))",
        job.0,
        end.as_str()
    )
    .execute(connection)
    .await?;
    Ok(())
}
