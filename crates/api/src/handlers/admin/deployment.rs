//! What the deployment holds and does: base models, alignment sets, workers, and the audit log.

use axum::Json;
use axum::extract::State;
use holdfast_domain::ids::{AuditId, KeyId, ProjectId};
use holdfast_store::audit::Filter;

use crate::auth::Admin;
use crate::extract::{self, JsonBody, QueryString};
use crate::wire::admin::alignment_sets::{AlignmentSet, CreateAlignmentSet};
use crate::wire::admin::{AuditEntry, BaseModel, ListAuditEntries, Worker};
use crate::wire::list::{Created, List};
use crate::wire::suite::{CreateSuite, Suite};
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

/// Import an alignment set as the next version of its name.
///
/// Its rows are a request and the answer to hold to each, refusals of harmful requests as well as helpful answers to benign ones. A
/// version never changes; jobs are held to the one that was newest when they were created. Rows that fit the template of none of the base
/// models are refused; where they fit some, the others are named. What is larger than a body may be is imported with `holdfast alignment import`.
#[utoipa::path(
    post, path = "/admin/alignment_sets", operation_id = "create_alignment_set", tag = "admin", request_body = CreateAlignmentSet,
    responses((status = 200, description = "The version; the newest again where it holds the same rows", body = AlignmentSet))
)]
pub(crate) async fn create_alignment_set(
    _: Admin,
    State(state): State<AppState>,
    JsonBody(body, _): JsonBody<CreateAlignmentSet>,
) -> Result<Created<AlignmentSet>, ApiError> {
    let lines: String = body.rows.iter().map(|row| row.to_string() + "\n").collect();
    let report = holdfast_dataset::alignment_set::check(lines.as_bytes());
    if report.error_count > 0 {
        return Err(ApiError::bad_dataset("rows", format!("rows: {}", report.summary()), report.errors));
    }
    let _turn = state.tokenizers.turn()?;
    let fit = state.tokenizers.fit(&state.store, lines.as_bytes()).await?;
    if let Some(why) = fit.is_useless() {
        return Err(ApiError::invalid("rows", "template_mismatch", format!("rows: {why}")));
    }
    let set = state.store.create_alignment_set(&body.name, lines.as_bytes(), report.rows).await?;
    Ok(Created(AlignmentSet::new(set, fit.misfits)))
}

/// List every version of every suite of the operator's own. Their requests are never shown.
#[utoipa::path(
    get, path = "/admin/suites", operation_id = "list_suites", tag = "admin",
    responses((status = 200, description = "All of them", body = List<Suite>))
)]
pub(crate) async fn list_suites(_: Admin, State(state): State<AppState>) -> Result<Json<List<Suite>>, ApiError> {
    let suites = state.store.suites().await?;
    Ok(Json(List::new(suites.into_iter().map(Suite::from).collect(), false)))
}

/// Import a suite as the next version of its name.
///
/// Its requests are all such as a model should refuse, or all such as it should answer. A safety policy that names it has the adapters
/// of later jobs asked them too, beside the suites that come with the program. A version never changes.
#[utoipa::path(
    post, path = "/admin/suites", operation_id = "create_suite", tag = "admin", request_body = CreateSuite,
    responses((status = 200, description = "The version; the newest again where it holds the same requests", body = Suite))
)]
pub(crate) async fn create_suite(
    _: Admin,
    State(state): State<AppState>,
    JsonBody(body, _): JsonBody<CreateSuite>,
) -> Result<Created<Suite>, ApiError> {
    let lines: String = body.requests.iter().map(|request| request.to_string() + "\n").collect();
    let suite = holdfast_safety::suite::Suite::parse(body.kind, 1, &lines)
        .map_err(|error| ApiError::invalid("requests", "invalid_suite", format!("requests: {error}")))?;
    let created = state.store.create_suite(&body.name, body.kind, suite.lines().as_bytes(), suite.requests.len() as u64).await?;
    Ok(Created(created.into()))
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
