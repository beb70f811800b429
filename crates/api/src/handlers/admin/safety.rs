//! What the operator demands of jobs, and what becomes of adapters that do not pass.

use axum::extract::State;
use axum::response::Response;
use axum::{Extension, Json};
use holdfast_dataset::alignment_set;
use holdfast_domain::evaluation::Kind;
use holdfast_domain::ids::{JobId, ProjectId};
use holdfast_domain::invalid::line_numbers;
use holdfast_domain::policy::Policy;
use holdfast_safety::report::{self, Report};
use holdfast_safety::suite::Suite;
use holdfast_store::StoreError;
use holdfast_store::policies::Subject;
use holdfast_store::quarantine::Quarantined;
use http::HeaderMap;

use crate::audit::ActedOn;
use crate::auth::Admin;
use crate::error::ErrorBody;
use crate::extract::{self, JsonBody, Path, QueryString};
use crate::handlers::safety::{show_report, show_unfinished};
use crate::wire::evidence::{ConflictLevel, ListQuarantined, MeasureConflictLevel, QuarantinedAdapter, ReleaseAdapter};
use crate::wire::list::List;
use crate::wire::policy::{PolicyAt, SafetyPolicy, SetSafetyPolicy};
use crate::{ApiError, AppState};

/// Get the deployment's safety policy, or an earlier version of it.
#[utoipa::path(
    get, path = "/admin/safety_policy", operation_id = "get_deployment_safety_policy", tag = "admin", params(PolicyAt),
    responses(
        (status = 200, description = "The policy", body = SafetyPolicy),
        (status = 404, description = "There is no such version", body = ErrorBody),
    )
)]
pub(crate) async fn get_deployment_policy(
    _: Admin,
    State(state): State<AppState>,
    QueryString(at): QueryString<PolicyAt>,
) -> Result<Json<SafetyPolicy>, ApiError> {
    get(&state, &Subject::Deployment, &at, None).await
}

/// Set the deployment's safety policy, for jobs that are created from now on.
#[utoipa::path(
    put, path = "/admin/safety_policy", operation_id = "set_deployment_safety_policy", tag = "admin", request_body = SetSafetyPolicy,
    responses((status = 200, description = "The policy that counts now", body = SafetyPolicy))
)]
pub(crate) async fn set_deployment_policy(
    _: Admin,
    State(state): State<AppState>,
    JsonBody(body, _): JsonBody<SetSafetyPolicy>,
) -> Result<Json<SafetyPolicy>, ApiError> {
    set(&state, &Subject::Deployment, Some(body), None).await
}

/// Take the deployment's safety policy away: the program's settings count again.
#[utoipa::path(
    delete, path = "/admin/safety_policy", operation_id = "delete_deployment_safety_policy", tag = "admin",
    responses((status = 200, description = "The policy that counts now", body = SafetyPolicy))
)]
pub(crate) async fn delete_deployment_policy(_: Admin, State(state): State<AppState>) -> Result<Json<SafetyPolicy>, ApiError> {
    set(&state, &Subject::Deployment, None, None).await
}

/// Get the safety policy that counts for an organisation's projects, unless they have their own, or an earlier version of its own.
#[utoipa::path(
    get, path = "/admin/organizations/{organization}/safety_policy", operation_id = "get_organization_safety_policy", tag = "admin",
    params(("organization" = String, Path, example = "acme"), PolicyAt),
    responses(
        (status = 200, description = "The policy", body = SafetyPolicy),
        (status = 404, description = "There is no such organisation, or no such version", body = ErrorBody),
    )
)]
pub(crate) async fn get_organization_policy(
    _: Admin,
    State(state): State<AppState>,
    Path(organization): Path<String>,
    QueryString(at): QueryString<PolicyAt>,
) -> Result<Json<SafetyPolicy>, ApiError> {
    get(&state, &Subject::Organization(organization.clone()), &at, Some(("organization", &organization))).await
}

/// Set an organisation's safety policy, for jobs that are created from now on. It takes the place of the deployment's as a whole.
#[utoipa::path(
    put, path = "/admin/organizations/{organization}/safety_policy", operation_id = "set_organization_safety_policy", tag = "admin",
    params(("organization" = String, Path, example = "acme")), request_body = SetSafetyPolicy,
    responses(
        (status = 200, description = "The policy that counts now", body = SafetyPolicy),
        (status = 404, description = "There is no such organisation", body = ErrorBody),
    )
)]
pub(crate) async fn set_organization_policy(
    _: Admin,
    State(state): State<AppState>,
    Path(organization): Path<String>,
    JsonBody(body, _): JsonBody<SetSafetyPolicy>,
) -> Result<Json<SafetyPolicy>, ApiError> {
    let subject = Subject::Organization(organization.clone());
    set(&state, &subject, Some(body), Some(("organization", &organization))).await
}

/// Take an organisation's safety policy away: the deployment's counts again.
#[utoipa::path(
    delete, path = "/admin/organizations/{organization}/safety_policy", operation_id = "delete_organization_safety_policy",
    tag = "admin", params(("organization" = String, Path, example = "acme")),
    responses(
        (status = 200, description = "The policy that counts now", body = SafetyPolicy),
        (status = 404, description = "There is no such organisation", body = ErrorBody),
    )
)]
pub(crate) async fn delete_organization_policy(
    _: Admin,
    State(state): State<AppState>,
    Path(organization): Path<String>,
) -> Result<Json<SafetyPolicy>, ApiError> {
    set(&state, &Subject::Organization(organization.clone()), None, Some(("organization", &organization))).await
}

/// Get the safety policy that counts for a project, or an earlier version of its own.
#[utoipa::path(
    get, path = "/admin/projects/{project_id}/safety_policy", operation_id = "get_project_safety_policy", tag = "admin",
    params(("project_id" = String, Path, example = "proj_0192f3a4000070008000000000000001"), PolicyAt),
    responses(
        (status = 200, description = "The policy", body = SafetyPolicy),
        (status = 404, description = "There is no such project, or no such version", body = ErrorBody),
    )
)]
pub(crate) async fn get_project_policy(
    _: Admin,
    State(state): State<AppState>,
    Path(project_id): Path<String>,
    QueryString(at): QueryString<PolicyAt>,
) -> Result<Json<SafetyPolicy>, ApiError> {
    let project = Subject::Project(extract::id::<ProjectId>("project_id", &project_id)?);
    get(&state, &project, &at, Some(("project_id", &project_id))).await
}

/// Set a project's safety policy, for jobs that are created from now on. It takes the place of any wider one as a whole.
#[utoipa::path(
    put, path = "/admin/projects/{project_id}/safety_policy", operation_id = "set_project_safety_policy", tag = "admin",
    params(("project_id" = String, Path, example = "proj_0192f3a4000070008000000000000001")), request_body = SetSafetyPolicy,
    responses(
        (status = 200, description = "The policy that counts now", body = SafetyPolicy),
        (status = 404, description = "There is no such project", body = ErrorBody),
    )
)]
pub(crate) async fn set_project_policy(
    _: Admin,
    State(state): State<AppState>,
    Path(project_id): Path<String>,
    JsonBody(body, _): JsonBody<SetSafetyPolicy>,
) -> Result<(Extension<ActedOn>, Json<SafetyPolicy>), ApiError> {
    set_of_project(&state, &project_id, Some(body)).await
}

/// Take a project's safety policy away: its organisation's counts again, or the deployment's.
#[utoipa::path(
    delete, path = "/admin/projects/{project_id}/safety_policy", operation_id = "delete_project_safety_policy", tag = "admin",
    params(("project_id" = String, Path, example = "proj_0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "The policy that counts now", body = SafetyPolicy),
        (status = 404, description = "There is no such project", body = ErrorBody),
    )
)]
pub(crate) async fn delete_project_policy(
    _: Admin,
    State(state): State<AppState>,
    Path(project_id): Path<String>,
) -> Result<(Extension<ActedOn>, Json<SafetyPolicy>), ApiError> {
    set_of_project(&state, &project_id, None).await
}

async fn set_of_project(
    state: &AppState,
    id: &str,
    body: Option<SetSafetyPolicy>,
) -> Result<(Extension<ActedOn>, Json<SafetyPolicy>), ApiError> {
    let project = extract::id("project_id", id)?;
    let policy = set(state, &Subject::Project(project), body, Some(("project_id", id))).await?;
    Ok((Extension(ActedOn(project)), policy))
}

async fn get(
    state: &AppState,
    subject: &Subject,
    at: &PolicyAt,
    named: Option<(&str, &str)>,
) -> Result<Json<SafetyPolicy>, ApiError> {
    // Also with a version: whether there is such a subject is told by its own name.
    let now = counting(state, subject, named).await?;
    let Some(version) = at.version else { return Ok(now) };
    let found = state.store.policy_version(subject, version).await;
    Ok(Json(found.map_err(|error| ApiError::of_one(error, "version", &version.to_string()))?.into()))
}

async fn counting(state: &AppState, subject: &Subject, named: Option<(&str, &str)>) -> Result<Json<SafetyPolicy>, ApiError> {
    let policy = state.store.policy_for(subject).await.map_err(|error| of_one(error, named))?;
    Ok(Json(policy.unwrap_or_else(|| state.default_policy()).into()))
}

async fn set(
    state: &AppState,
    subject: &Subject,
    body: Option<SetSafetyPolicy>,
    named: Option<(&str, &str)>,
) -> Result<Json<SafetyPolicy>, ApiError> {
    let policy = match body {
        Some(body) => {
            let wider = state.store.policy_above(subject).await.map_err(|error| of_one(error, named))?;
            let counting = state.store.policy_for(subject).await.map_err(|error| of_one(error, named))?;
            let [wider, counting] = [wider, counting].map(|policy| policy.unwrap_or_else(|| state.default_policy()).policy);
            Some(body.over(&wider, &counting)?)
        }
        None => None,
    };
    if let Some(policy) = policy.as_ref().filter(|policy| policy.evaluates()) {
        keeps_apart(state, policy).await?;
    }
    state.store.set_policy(subject, policy.as_ref()).await.map_err(|error| of_one(error, named))?;
    counting(state, subject, named).await
}

/// Refuses a policy that would measure models with what it trains them on.
async fn keeps_apart(state: &AppState, policy: &Policy) -> Result<(), ApiError> {
    let set = match state.store.alignment_set(&policy.alignment_set).await {
        Ok(set) => set,
        Err(StoreError::NotFound) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let rows = state.store.objects().read_whole(&set.object).await?;
    let lines_in_common = |suite: &Suite| {
        let measured: Vec<&str> = suite.requests.iter().map(|request| request.content.as_str()).collect();
        alignment_set::in_common(&rows, &measured)
    };
    let contradiction = |param: String, whose: &str, lines: &[u64]| {
        let message = format!(
            "in the alignment set {:?} {} what {whose} asks, and what models are trained on measures nothing (lines {}); take that out of one of the two and import it again",
            set.name,
            if lines.len() == 1 { "a row asks".to_owned() } else { format!("{} rows ask", lines.len()) },
            line_numbers(lines)
        );
        Err(ApiError::invalid(param, "contradiction", message))
    };
    for (at, named) in policy.suites.iter().enumerate() {
        let suite = match state.store.suite(named).await {
            Ok(suite) => suite,
            // It is refused by its name where the policy is kept.
            Err(StoreError::NotFound) => continue,
            Err(error) => return Err(error.into()),
        };
        let text = String::from_utf8(state.store.objects().read_whole(&suite.object).await?).unwrap_or_default();
        let parsed = Suite::parse(suite.kind, 1, &text);
        let parsed = parsed.map_err(|error| StoreError::Corrupt(format!("the suite {}: {error}", suite.pinned())))?;
        let lines = lines_in_common(&parsed);
        if !lines.is_empty() {
            return contradiction(format!("suites[{at}]"), &format!("the suite {named:?}"), &lines);
        }
    }
    for kind in Kind::ALL {
        let suite = Suite::built_in(kind).map_err(|error| StoreError::Corrupt(error.to_string()))?;
        let lines = lines_in_common(&suite);
        if !lines.is_empty() {
            return contradiction("alignment_set".into(), &format!("the program's own suite {:?}", kind.as_str()), &lines);
        }
    }
    Ok(())
}

fn of_one(error: StoreError, named: Option<(&str, &str)>) -> ApiError {
    match named {
        Some((param, id)) => ApiError::of_one(error, param, id),
        None => error.into(),
    }
}

/// List adapters that did not pass the safety gate, the newest first.
#[utoipa::path(
    get, path = "/admin/quarantine", operation_id = "list_quarantined_adapters", tag = "admin", params(ListQuarantined),
    responses((status = 200, description = "A page of them", body = List<QuarantinedAdapter>))
)]
pub(crate) async fn list_quarantined(
    _: Admin,
    State(state): State<AppState>,
    QueryString(query): QueryString<ListQuarantined>,
) -> Result<Json<List<QuarantinedAdapter>>, ApiError> {
    let page = extract::page::<JobId>(query.after.as_deref(), query.limit, 20, 100, false)?;
    let found = state.store.quarantined(!query.released.unwrap_or(false), page).await?;
    Ok(Json(List::new(found.items.into_iter().map(QuarantinedAdapter::from).collect(), found.has_more)))
}

/// Get the safety report of any job: of one whose adapter did not pass, or whose checkpoints are asked for, or that raised an alarm. It
/// names its owner's rows by their lines and shows none of them.
#[utoipa::path(
    get, path = "/admin/quarantine/{fine_tuning_job_id}/safety_report", operation_id = "get_quarantined_safety_report", tag = "admin",
    params(
        ("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001"),
        ("Accept" = Option<String>, Header, description = "`text/html` for a page", example = "application/json")
    ),
    responses(
        (status = 200, description = "The report", content((Report = "application/json"), (String = "text/html"))),
        (status = 304, description = "The client has it"),
        (status = 404, description = "There is no such job, or it has not ended, or ended before it trained", body = ErrorBody),
    )
)]
pub(crate) async fn get_quarantined_report(
    _: Admin,
    State(state): State<AppState>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let job: JobId = extract::id("fine_tuning_job_id", &id)?;
    let job = state.store.job_for_operator(job).await.map_err(|error| ApiError::of_one(error, "fine_tuning_job_id", &id))?;
    let object = match state.store.evidence_for_operator(job.id, report::FILE).await {
        Err(StoreError::NotFound) => return show_unfinished(&state, &job, &headers).await,
        object => object?,
    };
    // The rows are their owner's to see.
    show_report(&state, object, &headers, async { Ok(Vec::new()) }).await
}

/// Release what the safety gate keeps back of a job that has ended: an adapter that did not pass, and its checkpoints, also of a job that
/// passed. The job stays as it ended, and the reason stands on it.
#[utoipa::path(
    post, path = "/admin/quarantine/{fine_tuning_job_id}/release", operation_id = "release_quarantined_adapter", tag = "admin",
    params(("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001")), request_body = ReleaseAdapter,
    responses(
        (status = 200, description = "The adapter, released", body = QuarantinedAdapter),
        (status = 404, description = "There is no such job", body = ErrorBody),
    )
)]
pub(crate) async fn release_quarantined(
    _: Admin,
    State(state): State<AppState>,
    Path(id): Path<String>,
    JsonBody(body, _): JsonBody<ReleaseAdapter>,
) -> Result<(Extension<ActedOn>, Json<QuarantinedAdapter>), ApiError> {
    let job: JobId = extract::id("fine_tuning_job_id", &id)?;
    decided(state.store.release(job, &body.reason).await, &id)
}

/// Discard an adapter that the safety gate keeps back, and the checkpoints of its job: the files are gone for good. The job, its report
/// and its manifest stay.
#[utoipa::path(
    delete, path = "/admin/quarantine/{fine_tuning_job_id}", operation_id = "discard_quarantined_adapter", tag = "admin",
    params(("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "What is left to say of it", body = QuarantinedAdapter),
        (status = 404, description = "There is no such job", body = ErrorBody),
    )
)]
pub(crate) async fn discard_quarantined(
    _: Admin,
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<(Extension<ActedOn>, Json<QuarantinedAdapter>), ApiError> {
    let job: JobId = extract::id("fine_tuning_job_id", &id)?;
    decided(state.store.discard_quarantined(job).await, &id)
}

/// What was decided about an adapter, and whose it is.
fn decided(
    decided: Result<Quarantined, StoreError>,
    id: &str,
) -> Result<(Extension<ActedOn>, Json<QuarantinedAdapter>), ApiError> {
    let adapter = decided.map_err(|error| ApiError::of_one(error, "fine_tuning_job_id", id))?;
    Ok((Extension(ActedOn(adapter.project)), Json(adapter.into())))
}

/// List the levels of the poison gauge that were measured, by base model and method.
#[utoipa::path(
    get, path = "/admin/conflict_levels", operation_id = "list_conflict_levels", tag = "admin",
    responses((status = 200, description = "All of them", body = List<ConflictLevel>))
)]
pub(crate) async fn list_conflict_levels(_: Admin, State(state): State<AppState>) -> Result<Json<List<ConflictLevel>>, ApiError> {
    let levels = state.store.conflict_levels().await?;
    Ok(Json(List::new(levels.into_iter().map(ConflictLevel::from).collect(), false)))
}

/// Measure the level of a base model's poison gauge under a method, on jobs of both whose rows are known to be clean.
#[utoipa::path(
    put, path = "/admin/conflict_levels", operation_id = "measure_conflict_level", tag = "admin", request_body = MeasureConflictLevel,
    responses(
        (status = 200, description = "The level", body = ConflictLevel),
        (status = 404, description = "There is no such base model", body = ErrorBody),
    )
)]
pub(crate) async fn measure_conflict_level(
    _: Admin,
    State(state): State<AppState>,
    JsonBody(body, _): JsonBody<MeasureConflictLevel>,
) -> Result<Json<ConflictLevel>, ApiError> {
    let jobs: Vec<JobId> = body.clean_jobs.iter().map(|id| extract::id("clean_jobs", id)).collect::<Result<_, _>>()?;
    let level = state.store.measure_conflict_level(&body.base_model, &jobs).await;
    Ok(Json(level.map_err(|error| ApiError::of_one(error, "base_model", &body.base_model))?.into()))
}
