//! What is told, and how often it was tried. A notice is written in the transaction of what it tells; it is sent elsewhere, until it
//! is taken or given up.

use std::time::Duration;

use holdfast_domain::ids::{JobId, NoticeId, ProjectId, WebhookId};
use holdfast_domain::job::Status;
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{SAFETY_ALARM, Secret, TYPES, unknown_type};
use crate::jobs::Job;
use crate::{Page, PageRequest, Store, StoreError, new_id};

/// Seconds from each try to the next: a receiver that is down for a day still gets everything. After the last, the notice is given up.
const BACKOFF_SECONDS: [u64; 10] = [5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800, 43_200];
/// How long a sender keeps a notice to itself before another may try.
const SENDING: Duration = Duration::from_secs(60);

/// Something told to one webhook, or to be told.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The notice.
    pub notice: NoticeId,
    /// What it tells, of [`TYPES`].
    pub kind: String,
    /// `pending`, `delivered` or `dead`.
    pub state: String,
    /// How often it was sent.
    pub tries: u32,
    /// When it is sent next, while it is pending.
    pub next_try_at: OffsetDateTime,
    /// The status of the last answer.
    pub last_status: Option<u16>,
    /// What went wrong at the last try.
    pub last_error: Option<String>,
    /// When it happened.
    pub created_at: OffsetDateTime,
}

/// A notice that is to be sent now.
#[derive(Debug, Clone)]
pub struct Due {
    delivery: Uuid,
    tries: i32,
    /// Whom it is for.
    pub webhook: WebhookId,
    /// The notice.
    pub notice: NoticeId,
    /// The body.
    pub payload: String,
    /// Where to.
    pub url: String,
    /// Each of them signs it: the webhook's, and for a day the one before.
    pub secrets: Vec<Secret>,
    /// When it is sent, in Unix seconds by the database's clock.
    pub sent_at: i64,
}

/// How a try to send ended.
#[derive(Debug, Clone)]
pub enum Sent {
    /// It was taken.
    Taken {
        /// The status of the answer.
        status: u16,
    },
    /// It was not; `status` is that of the answer, if there was one.
    Failed {
        /// The status of the answer.
        status: Option<u16>,
        /// What went wrong.
        error: String,
    },
}

/// What became of a notice whose try failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Afterwards {
    /// It was delivered, or is tried again.
    Open,
    /// It was given up.
    Dead,
}

impl Store {
    /// A notice to one webhook that tells of nothing: to be sent at once, and never again.
    ///
    /// # Errors
    /// When the project has no such webhook, the type is unknown, or the database fails.
    pub async fn trial_notice(&self, project: ProjectId, id: WebhookId, kind: &str) -> Result<Due, StoreError> {
        if !TYPES.contains(&kind) {
            return Err(unknown_type("event_type", kind));
        }
        let mut connection = self.tenant(project).await?;
        let row = sqlx::query!(
            "select url, secret, case when old_secret_until > now() then old_secret end as old_secret,
                    extract(epoch from now())::bigint as \"sent_at!\"
             from webhooks where project_id = $1 and id = $2",
            project.0,
            id.0
        )
        .fetch_optional(&mut *connection)
        .await?
        .ok_or(StoreError::NotFound)?;
        let notice = NoticeId(new_id());
        Ok(Due {
            delivery: notice.0,
            tries: 1,
            webhook: id,
            notice,
            payload: notice_payload(notice, row.sent_at, kind, JobId(Uuid::nil())),
            url: row.url,
            secrets: [Some(row.secret), row.old_secret].into_iter().flatten().map(Secret).collect(),
            sent_at: row.sent_at,
        })
    }

    /// What a webhook was told and is to be told, newest first.
    ///
    /// # Errors
    /// When the project has no such webhook, or the database fails.
    pub async fn deliveries(
        &self,
        project: ProjectId,
        id: WebhookId,
        state: Option<&str>,
        page: PageRequest,
    ) -> Result<Page<Delivery>, StoreError> {
        self.webhook(project, id).await?;
        let mut connection = self.tenant(project).await?;
        let rows = sqlx::query!(
            "select notice_id, type, state, tries, next_try_at, last_status, last_error, created_at from webhook_deliveries
             where project_id = $1 and webhook_id = $2 and ($3::text is null or state = $3)
               and id < coalesce((select id from webhook_deliveries where webhook_id = $2 and notice_id = $4),
                                 'ffffffff-ffff-ffff-ffff-ffffffffffff')
             order by id desc limit $5",
            project.0,
            id.0,
            state,
            page.after,
            page.fetch()
        )
        .fetch_all(&mut *connection)
        .await?;
        let deliveries = rows.into_iter().map(|r| Delivery {
            notice: NoticeId(r.notice_id),
            kind: r.r#type,
            state: r.state,
            tries: r.tries.unsigned_abs(),
            next_try_at: r.next_try_at,
            last_status: r.last_status.and_then(|status| u16::try_from(status).ok()),
            last_error: r.last_error,
            created_at: r.created_at,
        });
        Ok(Page::new(deliveries.collect(), &page))
    }

    /// Has a notice sent to a webhook again, whatever became of it: with all its tries before it.
    ///
    /// # Errors
    /// When the project has no such webhook or it no such notice, or the database fails.
    pub async fn replay_delivery(&self, project: ProjectId, id: WebhookId, notice: NoticeId) -> Result<(), StoreError> {
        let mut connection = self.tenant(project).await?;
        let replayed = sqlx::query!(
            "update webhook_deliveries set state = 'pending', tries = 0, next_try_at = now(), ended_at = null
             where project_id = $1 and webhook_id = $2 and notice_id = $3",
            project.0,
            id.0,
            notice.0
        )
        .execute(&mut *connection)
        .await?;
        if replayed.rows_affected() == 0 { Err(StoreError::NotFound) } else { Ok(()) }
    }

    /// Takes notices that are to be sent now, one of each webhook and none of those that are `busy`; until their try has ended or a
    /// minute is over, no other sender gets them.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn due_notices(&self, most: u32, busy: &[WebhookId]) -> Result<Vec<Due>, StoreError> {
        let busy: Vec<Uuid> = busy.iter().map(|webhook| webhook.0).collect();
        let rows = sqlx::query!(
            "update webhook_deliveries d set tries = d.tries + 1, next_try_at = now() + make_interval(secs => $1)
             from webhooks w
             where w.id = d.webhook_id and d.id in (
                 select due.id from webhooks of cross join lateral (
                     select id, next_try_at from webhook_deliveries
                     where webhook_id = of.id and state = 'pending' and next_try_at <= now()
                     order by next_try_at limit 1 for update skip locked) due
                 where of.enabled and of.id <> all($3) order by due.next_try_at limit $2)
             returning d.id, d.webhook_id, d.tries, d.notice_id, d.payload, w.url, w.secret,
                       case when w.old_secret_until > now() then w.old_secret end as old_secret, extract(epoch from now())::bigint as \"sent_at!\"",
            SENDING.as_secs_f64(),
            i64::from(most),
            &busy
        )
        .fetch_all(&self.pool)
        .await?;
        let due = rows.into_iter().map(|r| Due {
            delivery: r.id,
            webhook: WebhookId(r.webhook_id),
            tries: r.tries,
            notice: NoticeId(r.notice_id),
            payload: r.payload,
            url: r.url,
            secrets: [Some(r.secret), r.old_secret].into_iter().flatten().map(Secret).collect(),
            sent_at: r.sent_at,
        });
        Ok(due.collect())
    }

    /// Writes down how a try to send ended: a notice that was not taken is tried again later, or given up.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn record_sent(&self, due: &Due, sent: &Sent) -> Result<Afterwards, StoreError> {
        let (status, error) = match sent {
            Sent::Taken { status } => (Some(*status), None),
            Sent::Failed { status, error } => (*status, Some(error.as_str())),
        };
        let pause = usize::try_from(due.tries - 1).ok().and_then(|tries| BACKOFF_SECONDS.get(tries));
        let state = match (sent, pause) {
            (Sent::Taken { .. }, _) => "delivered",
            (Sent::Failed { .. }, Some(_)) => "pending",
            (Sent::Failed { .. }, None) => "dead",
        };
        sqlx::query!(
            "update webhook_deliveries set state = $3, last_status = $4, last_error = $5,
                    next_try_at = now() + make_interval(secs => $6), ended_at = case when $3 = 'pending' then null else now() end
             where id = $1 and tries = $2",
            due.delivery,
            due.tries,
            state,
            status.map(i32::from),
            error,
            pause.copied().unwrap_or(0) as f64
        )
        .execute(&self.pool)
        .await?;
        Ok(if state == "dead" { Afterwards::Dead } else { Afterwards::Open })
    }
}

/// Tells the webhooks of a job's project that it has ended, in the transaction in which it ends.
pub(crate) async fn job_ended(connection: &mut PgConnection, job: &Job, status: Status) -> Result<(), StoreError> {
    tell(connection, job, &format!("fine_tuning.job.{}", status.as_str())).await
}

/// Tells them of its alarm, in the transaction in which it is raised.
pub(crate) async fn safety_alarm(connection: &mut PgConnection, job: &Job) -> Result<(), StoreError> {
    tell(connection, job, SAFETY_ALARM).await
}

async fn tell(connection: &mut PgConnection, job: &Job, kind: &str) -> Result<(), StoreError> {
    let notice = NoticeId(new_id());
    let payload = notice_payload(notice, unix_time(connection).await?, kind, job.id);
    let wanted_by = sqlx::query_scalar!(
        "select id from webhooks where project_id = $1 and enabled and $2 = any(types) for key share",
        job.project.0,
        kind
    )
    .fetch_all(&mut *connection)
    .await?;
    for webhook in wanted_by {
        sqlx::query!(
            "insert into webhook_deliveries (id, webhook_id, project_id, notice_id, type, payload) values ($1, $2, $3, $4, $5, $6)",
            new_id(),
            webhook,
            job.project.0,
            notice.0,
            kind,
            payload
        )
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// The body of a notice, as the public contract has it.
fn notice_payload(notice: NoticeId, created_at: i64, kind: &str, job: JobId) -> String {
    serde_json::json!({"id": notice, "object": "event", "created_at": created_at, "type": kind, "data": {"id": job}}).to_string()
}

async fn unix_time(connection: &mut PgConnection) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!("select extract(epoch from now())::bigint as \"now!\"").fetch_one(connection).await?)
}
