//! What happened to a job, for its owner: messages and metrics.

use holdfast_domain::ids::{EventId, JobId, ProjectId};
use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::{Page, PageRequest, Store, StoreError, new_id};

/// An event's row.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its id.
    pub id: EventId,
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
        self.job(project, job).await?;
        let rows = sqlx::query!(
            "select id, created_at, level, type, message, data from job_events
             where job_id = $1 and ($2::uuid is null or id < $2) order by id desc limit $3",
            job.0,
            page.after,
            page.fetch()
        )
        .fetch_all(&self.pool)
        .await?;
        let events = rows.into_iter().map(|r| Event {
            id: EventId(r.id),
            created_at: r.created_at,
            level: r.level,
            kind: r.r#type,
            message: r.message,
            data: r.data,
        });
        Ok(Page::new(events.collect(), &page))
    }
}
