//! What the deployment holds and does: base models, alignment sets, workers, and the audit log.

use axum::Json;
use axum::extract::State;
use holdfast_domain::ids::{AuditId, KeyId, ProjectId};
use holdfast_store::audit::Filter;

use crate::auth::Admin;
use crate::extract::{self, QueryString};
use crate::wire::admin::{AlignmentSet, AuditEntry, BaseModel, ListAuditEntries, Worker};
use crate::wire::list::List;
use crate::{ApiError, AppState};

/// List base models, by name.
#[utoipa::path(
    get, path = "/admin/base_models", operation_id = "list_base_models", tag = "admin",
    responses((status = 200, description = "All of them", body = List<BaseModel>))
)]
pub(crate) async fn list_base_models(_: Admin, State(state): State<AppState>) -> Result<Json<List<BaseModel>>, ApiError> {
    let models = state.store.base_models().await?;
    Ok(Json(List::new(models.into_iter().map(BaseModel::from).collect(), false)))
}

/// List every version of every alignment set. Their rows are never shown.
#[utoipa::path(
    get, path = "/admin/alignment_sets", operation_id = "list_alignment_sets", tag = "admin",
    responses((status = 200, description = "All of them", body = List<AlignmentSet>))
)]
pub(crate) async fn list_alignment_sets(_: Admin, State(state): State<AppState>) -> Result<Json<List<AlignmentSet>>, ApiError> {
    let sets = state.store.alignment_sets().await?;
    Ok(Json(List::new(sets.into_iter().map(AlignmentSet::from).collect(), false)))
}

/// List the workers that were heard of in the last day, by name.
#[utoipa::path(
    get, path = "/admin/workers", operation_id = "list_workers", tag = "admin",
    responses((status = 200, description = "All of them", body = List<Worker>))
)]
pub(crate) async fn list_workers(_: Admin, State(state): State<AppState>) -> Result<Json<List<Worker>>, ApiError> {
    let workers = state.store.workers().await?;
    Ok(Json(List::new(workers.into_iter().map(Worker::from).collect(), false)))
}

/// Read the audit log, newest first: every call that changed something or tried to, by whom, from where, and how it ended.
#[utoipa::path(
    get, path = "/admin/audit_log", operation_id = "list_audit_entries", tag = "admin", params(ListAuditEntries),
    responses((status = 200, description = "A page of it", body = List<AuditEntry>))
)]
pub(crate) async fn list_audit_entries(
    _: Admin,
    State(state): State<AppState>,
    QueryString(query): QueryString<ListAuditEntries>,
) -> Result<Json<List<AuditEntry>>, ApiError> {
    let page = extract::page::<AuditId>(query.after.as_deref(), query.limit, 20, 100, false)?;
    // The last second of the year 9999: what the database has a word for.
    const LAST_SECOND: i64 = 253_402_300_799;
    for (param, seconds) in [("since", query.since), ("until", query.until)] {
        if seconds.is_some_and(|seconds| !(0..=LAST_SECOND).contains(&seconds)) {
            return Err(ApiError::invalid(param, "out_of_bounds", format!("{param} takes Unix seconds from 0 to {LAST_SECOND}")));
        }
    }
    let filter = Filter {
        project: extract::filter_id::<ProjectId>("project", query.project.as_deref())?,
        key: extract::filter_id::<KeyId>("key", query.key.as_deref())?,
        operation: query.operation,
        since: query.since,
        until: query.until,
        succeeded: query.succeeded,
    };
    let entries = state.store.audit_entries(&filter, page).await?;
    Ok(Json(List::new(entries.items.into_iter().map(AuditEntry::from).collect(), entries.has_more)))
}
