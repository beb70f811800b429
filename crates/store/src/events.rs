//! What happened to a job, for its owner: messages and metrics.

use holdfast_domain::ids::{EventId, JobId, ProjectId};
use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{Page, PageRequest, Store, StoreError, new_id};

/// An event's row.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its id.
    pub id: EventId,
    /// Its place among the events of its job: they are written one after the other.
    pub seq: i64,
    /// When.
    pub created_at: OffsetDateTime,
    /// `info`, `warn` or `error`.
    pub level: String,
    /// `message` or `metrics`.
    pub kind: String,
    /// For a person.
    pub message: String,
    /// For a program.
    pub data: Option<Value>,
}

struct Row {
    id: Uuid,
    seq: i64,
    created_at: OffsetDateTime,
    level: String,
    kind: String,
    message: String,
    data: Option<Value>,
}

impl From<Row> for Event {
    fn from(row: Row) -> Self {
        let Row { id, seq, created_at, level, kind, message, data } = row;
        Self { id: EventId(id), seq, created_at, level, kind, message, data }
    }
}

/// How much an event matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// As expected.
    Info,
    /// Worth a look.
    Warn,
    /// It ended the job.
    Error,
}

impl Level {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// Appends a message, in the transaction of the change it speaks of.
pub(crate) async fn message(connection: &mut PgConnection, job: JobId, level: Level, message: &str) -> Result<(), StoreError> {
    append(connection, job, level, "message", message, None).await
}

/// Appends a metric.
pub(crate) async fn metrics(connection: &mut PgConnection, job: JobId, message: &str, data: Value) -> Result<(), StoreError> {
    append(connection, job, Level::Info, "metrics", message, Some(data)).await
}

async fn append(
    connection: &mut PgConnection,
    job: JobId,
    level: Level,
    kind: &str,
    message: &str,
    data: Option<Value>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into job_events (id, job_id, level, type, message, data) values ($1, $2, $3, $4, $5, $6)",
        new_id(),
        job.0,
        level.as_str(),
        kind,
        message,
        data
    )
    .execute(connection)
    .await?;
    Ok(())
}

impl Store {
    /// A job's events, newest first.
    ///
    /// # Errors
    /// When the project has no such job, or the database fails.
    pub async fn events(&self, project: ProjectId, job: JobId, page: PageRequest) -> Result<Page<Event>, StoreError> {
        let mut connection = self.tenant(project).await?;
        owned(&mut connection, project, job).await?;
        let rows = sqlx::query_as!(
            Row,
            "select id, seq, created_at, level, type as kind, message, data from job_events
             where job_id = $1 and seq < coalesce((select seq from job_events where job_id = $1 and id = $2), 9223372036854775807)
             order by seq desc limit $3",
            job.0,
            page.after,
            page.fetch()
        )
        .fetch_all(&mut *connection)
        .await?;
        Ok(Page::new(rows.into_iter().map(Event::from).collect(), &page))
    }

    /// A job's events that came after the one of `seq`, oldest first, at most `limit`; and whether the job had ended before they
    /// were read, so that nothing follows once they are few.
    ///
    /// # Errors
    /// When the project has no such job, or the database fails.
    pub async fn events_after(
        &self,
        project: ProjectId,
        job: JobId,
        seq: i64,
        limit: u32,
    ) -> Result<(Vec<Event>, bool), StoreError> {
        let mut connection = self.tenant(project).await?;
        let ended = owned(&mut connection, project, job).await?;
        let rows = sqlx::query_as!(
            Row,
            "select id, seq, created_at, level, type as kind, message, data from job_events
             where job_id = $1 and seq > $2 order by seq limit $3",
            job.0,
            seq,
            i64::from(limit)
        )
        .fetch_all(&mut *connection)
        .await?;
        Ok((rows.into_iter().map(Event::from).collect(), ended))
    }

    /// Where an event stands among those of its job; 0 when the job has no such event.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn event_seq(&self, project: ProjectId, job: JobId, event: EventId) -> Result<i64, StoreError> {
        let mut connection = self.tenant(project).await?;
        let seq = sqlx::query_scalar!("select seq from job_events where job_id = $1 and id = $2", job.0, event.0)
            .fetch_optional(&mut *connection)
            .await?;
        Ok(seq.unwrap_or(0))
    }

    /// The last event of each of `jobs`, by its place; how streams learn that there is something to read.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn last_events(&self, jobs: &[JobId]) -> Result<Vec<(JobId, i64)>, StoreError> {
        let ids: Vec<Uuid> = jobs.iter().map(|job| job.0).collect();
        let rows = sqlx::query!(
            "select job as \"job!\", last.seq as \"seq!\" from unnest($1::uuid[]) as job
             cross join lateral (select seq from job_events where job_id = job order by seq desc limit 1) last",
            &ids
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|r| (JobId(r.job), r.seq)).collect())
    }
}

/// Whether the project's job has ended.
async fn owned(connection: &mut PgConnection, project: ProjectId, job: JobId) -> Result<bool, StoreError> {
    sqlx::query_scalar!(
        "select finished_at is not null as \"ended!\" from jobs where project_id = $1 and id = $2",
        project.0,
        job.0
    )
    .fetch_optional(connection)
    .await?
    .ok_or(StoreError::NotFound)
}
