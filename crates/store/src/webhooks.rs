//! News for the outside: who wants it, and what has been told. A notice is written in the transaction of what it tells; it is
//! sent elsewhere, until it is taken or given up.

use std::fmt;
use std::time::Duration;

use holdfast_domain::Invalid;
use holdfast_domain::ids::{JobId, NoticeId, ProjectId, WebhookId};
use holdfast_domain::job::Status;
use holdfast_domain::limits::MAX_WEBHOOKS_PER_PROJECT;
use rand::TryRng;
use rand::rngs::SysRng;
use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::jobs::Job;
use crate::once::{self, Once};
use crate::{Page, PageRequest, Store, StoreError, new_id};

/// What can be told.
pub const TYPES: [&str; 4] = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled", SAFETY_ALARM];
/// A job whose gradients conflict more often than clean rows make them.
const SAFETY_ALARM: &str = "fine_tuning.job.safety_alarm";

/// Seconds from each try to the next: what a receiver that is down for a day misses nothing of. After the last, the notice is
/// given up.
const BACKOFF_SECONDS: [u64; 10] = [5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800, 43_200];
/// How long a sender keeps a notice to itself before another may try.
const SENDING: Duration = Duration::from_secs(60);

/// The key that signs what is told to one webhook. Does not print itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Its bytes, for signing and for the one who asked for it.
    #[must_use]
    pub fn reveal(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A webhook's row.
#[derive(Debug, Clone)]
pub struct Webhook {
    /// Its id.
    pub id: WebhookId,
    /// What people call it.
    pub name: String,
    /// Where it is told.
    pub url: String,
    /// Signs what it is told.
    pub secret: Secret,
    /// What it wants to know, of [`TYPES`].
    pub types: Vec<String>,
    /// Whether it is told anything now.
    pub enabled: bool,
    /// When it was made.
    pub created_at: OffsetDateTime,
    /// When it was last changed.
    pub updated_at: OffsetDateTime,
}

/// A change of a webhook; what is `None` stays.
#[derive(Debug, Clone, Default)]
pub struct WebhookChange {
    /// See [`Webhook::name`].
    pub name: Option<String>,
    /// See [`Webhook::url`].
    pub url: Option<String>,
    /// See [`Webhook::types`].
    pub types: Option<Vec<String>>,
    /// See [`Webhook::enabled`].
    pub enabled: Option<bool>,
}

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

struct Row {
    id: Uuid,
    name: String,
    url: String,
    secret: Vec<u8>,
    types: Vec<String>,
    enabled: bool,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
}

impl From<Row> for Webhook {
    fn from(row: Row) -> Self {
        let Row { id, name, url, secret, types, enabled, created_at, updated_at } = row;
        Self { id: WebhookId(id), name, url, secret: Secret(secret), types, enabled, created_at, updated_at }
    }
}

impl Store {
    /// Makes a webhook. Of a request that was served before, the webhook it made then comes back.
    ///
    /// # Errors
    /// When the project has as many as it may, a name or a type cannot be used, the machine gives no randomness, or the database
    /// fails.
    pub async fn create_webhook(
        &self,
        project: ProjectId,
        name: &str,
        url: &str,
        types: &[String],
        once: Option<&Once>,
    ) -> Result<Webhook, StoreError> {
        check_name(name)?;
        check_types(types)?;
        let (id, secret) = (new_id(), new_secret()?);
        let mut connection = self.tenant(project).await?;
        let mut transaction = connection.begin().await?;
        if let Some(made) = once::admit(&mut transaction, once, id).await? {
            transaction.rollback().await?;
            drop(connection);
            return self.webhook(project, WebhookId(made)).await;
        }
        crate::projects::lock_quotas(&mut transaction, project).await?;
        let count = sqlx::query_scalar!("select count(*) as \"count!\" from webhooks where project_id = $1", project.0)
            .fetch_one(&mut *transaction)
            .await?;
        if count >= MAX_WEBHOOKS_PER_PROJECT {
            let message = format!("a project has at most {MAX_WEBHOOKS_PER_PROJECT} webhooks; delete one first");
            return Err(Invalid::new("url", "too_many_webhooks", message).into());
        }
        let row = sqlx::query_as!(
            Row,
            "insert into webhooks (id, project_id, name, url, secret, types) values ($1, $2, $3, $4, $5, $6)
             returning id, name, url, secret, types, enabled, created_at, updated_at",
            id,
            project.0,
            name,
            url,
            secret,
            types
        )
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(row.into())
    }

    /// One webhook.
    ///
    /// # Errors
    /// When the project has no such webhook, or the database fails.
    pub async fn webhook(&self, project: ProjectId, id: WebhookId) -> Result<Webhook, StoreError> {
        let mut connection = self.tenant(project).await?;
        sqlx::query_as!(
            Row,
            "select id, name, url, secret, types, enabled, created_at, updated_at from webhooks where project_id = $1 and id = $2",
            project.0,
            id.0
        )
        .fetch_optional(&mut *connection)
        .await?
        .map(Webhook::from)
        .ok_or(StoreError::NotFound)
    }

    /// A project's webhooks, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn webhooks(&self, project: ProjectId, page: PageRequest) -> Result<Page<Webhook>, StoreError> {
        let mut connection = self.tenant(project).await?;
        let rows = sqlx::query_as!(
            Row,
            "select id, name, url, secret, types, enabled, created_at, updated_at from webhooks
             where project_id = $1 and id < $2 order by id desc limit $3",
            project.0,
            page.after.unwrap_or(Uuid::max()),
            page.fetch()
        )
        .fetch_all(&mut *connection)
        .await?;
        Ok(Page::new(rows.into_iter().map(Webhook::from).collect(), &page))
    }

    /// Changes a webhook.
    ///
    /// # Errors
    /// When the project has no such webhook, a name or a type cannot be used, or the database fails.
    pub async fn update_webhook(&self, project: ProjectId, id: WebhookId, change: &WebhookChange) -> Result<Webhook, StoreError> {
        change.name.as_deref().map_or(Ok(()), check_name)?;
        change.types.as_deref().map_or(Ok(()), check_types)?;
        let mut connection = self.tenant(project).await?;
        sqlx::query_as!(
            Row,
            "update webhooks set name = coalesce($3, name), url = coalesce($4, url), types = coalesce($5, types),
                    enabled = coalesce($6, enabled), updated_at = now()
             where project_id = $1 and id = $2 returning id, name, url, secret, types, enabled, created_at, updated_at",
            project.0,
            id.0,
            change.name.as_deref(),
            change.url.as_deref(),
            change.types.as_deref(),
            change.enabled
        )
        .fetch_optional(&mut *connection)
        .await?
        .map(Webhook::from)
        .ok_or(StoreError::NotFound)
    }

    /// Gives a webhook another secret; with `keep_old` the one it had signs beside it for a day. Of a request that was served
    /// before, the secret it made comes back.
    ///
    /// # Errors
    /// When the project has no such webhook, the machine gives no randomness, or the database fails.
    pub async fn rotate_webhook_secret(
        &self,
        project: ProjectId,
        id: WebhookId,
        keep_old: bool,
        once: Option<&Once>,
    ) -> Result<Webhook, StoreError> {
        let secret = new_secret()?;
        let mut connection = self.tenant(project).await?;
        let mut transaction = connection.begin().await?;
        if once::admit(&mut transaction, once, id.0).await?.is_some() {
            transaction.rollback().await?;
            drop(connection);
            return self.webhook(project, id).await;
        }
        let row = sqlx::query_as!(
            Row,
            "update webhooks set secret = $3, old_secret = case when $4 then secret end,
                    old_secret_until = case when $4 then now() + interval '1 day' end, updated_at = now()
             where project_id = $1 and id = $2 returning id, name, url, secret, types, enabled, created_at, updated_at",
            project.0,
            id.0,
            secret,
            keep_old
        )
        .fetch_optional(&mut *transaction)
        .await?
        .ok_or(StoreError::NotFound)?;
        transaction.commit().await?;
        Ok(row.into())
    }

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

    /// Deletes a webhook and what it was still to be told.
    ///
    /// # Errors
    /// When the project has no such webhook, or the database fails.
    pub async fn delete_webhook(&self, project: ProjectId, id: WebhookId) -> Result<(), StoreError> {
        let mut connection = self.tenant(project).await?;
        let deleted = sqlx::query!("delete from webhooks where project_id = $1 and id = $2", project.0, id.0)
            .execute(&mut *connection)
            .await?;
        if deleted.rows_affected() == 0 { Err(StoreError::NotFound) } else { Ok(()) }
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

fn new_secret() -> Result<Vec<u8>, StoreError> {
    let mut secret = vec![0; 32];
    SysRng.try_fill_bytes(&mut secret).map_err(|e| StoreError::Io(std::io::Error::other(e)))?;
    Ok(secret)
}

fn check_name(name: &str) -> Result<(), StoreError> {
    if name.chars().count() <= 128 && !name.chars().any(char::is_control) {
        return Ok(());
    }
    Err(Invalid::new("name", "invalid_name", "a webhook's name has at most 128 characters and no control characters").into())
}

fn check_types(types: &[String]) -> Result<(), StoreError> {
    if types.is_empty() {
        let message = format!("name at least one of {}, or leave event_types out for all", TYPES.join(", "));
        return Err(Invalid::new("event_types", "unknown_type", message).into());
    }
    match types.iter().enumerate().find(|(_, kind)| !TYPES.contains(&kind.as_str())) {
        Some((i, kind)) => Err(unknown_type(&format!("event_types[{i}]"), kind)),
        None => Ok(()),
    }
}

fn unknown_type(param: &str, found: &str) -> StoreError {
    Invalid::new(param, "unknown_type", format!("{found:?} is no event that is told; choose from {}", TYPES.join(", "))).into()
}
