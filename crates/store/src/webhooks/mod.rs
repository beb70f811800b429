//! News for the outside: who wants it, and what has been told.

use std::fmt;

use holdfast_domain::Invalid;
use holdfast_domain::ids::{ProjectId, WebhookId};
use holdfast_domain::limits::MAX_WEBHOOKS_PER_PROJECT;
use rand::TryRng;
use rand::rngs::SysRng;
use sqlx::Connection;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::once::{self, Once};
use crate::{Page, PageRequest, Store, StoreError, new_id};

mod notices;

pub use notices::{Afterwards, Delivery, Due, Sent};
pub(crate) use notices::{job_ended, safety_alarm};

/// What can be told.
pub const TYPES: [&str; 4] = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled", SAFETY_ALARM];
/// A job whose gradients conflict more often than clean rows make them.
const SAFETY_ALARM: &str = "fine_tuning.job.safety_alarm";

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
