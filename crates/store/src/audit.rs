//! The audit log: every call that changes something, by whom, from where, and how it ended. Rows are only ever added.

use holdfast_domain::ids::{AuditId, KeyId, ProjectId};
use time::OffsetDateTime;

use crate::{Page, PageRequest, Store, StoreError, new_id};

/// An entry to be written.
#[derive(Debug, Clone)]
pub struct NewEntry {
    /// The key that called; `None` for a command on the operator's own machine.
    pub key: Option<KeyId>,
    /// The key's first characters, or who ran the command.
    pub actor: String,
    /// The project it acted for.
    pub project: Option<ProjectId>,
    /// The project an operator's call acted on.
    pub acted_on: Option<ProjectId>,
    /// What was called, as openapi.yaml names it.
    pub operation: String,
    /// On what.
    pub target: String,
    /// From where.
    pub address: String,
    /// The request's id.
    pub request_id: String,
    /// The HTTP status of the answer.
    pub status: u16,
    /// The error's code.
    pub code: Option<String>,
}

/// An entry.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its id.
    pub id: AuditId,
    /// When.
    pub at: OffsetDateTime,
    /// What.
    pub entry: NewEntry,
}

/// Which entries.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// For or on one project.
    pub project: Option<ProjectId>,
    /// Of one key.
    pub key: Option<KeyId>,
    /// Of one operation.
    pub operation: Option<String>,
    /// Not before this, in Unix seconds.
    pub since: Option<i64>,
    /// Before this, in Unix seconds.
    pub until: Option<i64>,
    /// Only refused and failed ones, or only those that were done.
    pub succeeded: Option<bool>,
}

impl Store {
    /// Adds an entry.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn audit(&self, entry: &NewEntry) -> Result<(), StoreError> {
        sqlx::query!(
            "insert into audit_log (id, key_id, actor, project_id, operation, target, address, request_id, status, code, acted_on)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
            new_id(),
            entry.key.map(|k| k.0),
            entry.actor,
            entry.project.map(|p| p.0),
            entry.operation,
            entry.target,
            entry.address,
            entry.request_id,
            i32::from(entry.status),
            entry.code,
            entry.acted_on.map(|p| p.0)
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Entries, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn audit_entries(&self, filter: &Filter, page: PageRequest) -> Result<Page<Entry>, StoreError> {
        let rows = sqlx::query!(
            "select id, at, key_id, actor, project_id, operation, target, address, request_id, status, code, acted_on from audit_log
             where ($1::uuid is null or project_id = $1 or acted_on = $1) and ($2::uuid is null or key_id = $2) and ($3::text is null or operation = $3)
               and ($4::bigint is null or at >= to_timestamp($4)) and ($5::bigint is null or at < to_timestamp($5))
               and ($6::boolean is null or (status < 400) = $6)
               and ($7::uuid is null or (at, id) < (select at, id from audit_log where id = $7))
             order by at desc, id desc limit $8",
            filter.project.map(|p| p.0),
            filter.key.map(|k| k.0),
            filter.operation,
            filter.since,
            filter.until,
            filter.succeeded,
            page.after,
            page.fetch()
        )
        .fetch_all(&self.pool)
        .await?;
        let entries = rows.into_iter().map(|r| Entry {
            id: AuditId(r.id),
            at: r.at,
            entry: NewEntry {
                key: r.key_id.map(KeyId),
                actor: r.actor,
                project: r.project_id.map(ProjectId),
                acted_on: r.acted_on.map(ProjectId),
                operation: r.operation,
                target: r.target,
                address: r.address,
                request_id: r.request_id,
                status: u16::try_from(r.status).unwrap_or(0),
                code: r.code,
            },
        });
        Ok(Page::new(entries.collect(), &page))
    }
}
