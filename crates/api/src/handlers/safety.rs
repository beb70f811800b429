//! The evidence of jobs, for their owners: safety reports, manifests and the keys that these are signed with; and what is
//! demanded of jobs.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use holdfast_domain::Invalid;
use holdfast_domain::ids::JobId;
use holdfast_domain::job::JobState;
use holdfast_safety::manifest;
use holdfast_safety::report::{self, Gauge, Report, RowText, Training};
use holdfast_store::jobs::Job;
use holdfast_store::{ObjectRef, StoreError, evidence};
use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::auth::Tenant;
use crate::download::{Download, Segment};
use crate::error::ErrorBody;
use crate::extract::Path;
use crate::handlers::jobs::{job_id, not_found};
use crate::wire::evidence::SigningKey;
use crate::wire::list::List;
use crate::wire::policy::SafetyPolicy;
use crate::{ApiError, AppState};

/// What a report's page may do: show itself.
const PAGE_POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Get a job's safety report.
///
/// There is one once the job has trained, passed or not: what the training did, what the model answers before and after to requests
/// that it should refuse and to such as only look like them, and the rows that push hardest against the alignment, by their lines.
/// With `Accept: text/html` it comes as a page to look at, which also shows these rows. Of a job that failed or was cancelled on its way
/// it says what the training did until then, and nothing of it is signed.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/safety_report", operation_id = "get_safety_report", tag = "fine-tuning",
    params(
        ("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001"),
        ("Accept" = Option<String>, Header, description = "`text/html` for a page", example = "application/json")
    ),
    responses(
        (status = 200, description = "The report", content((Report = "application/json"), (String = "text/html"))),
        (status = 304, description = "The client has it"),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn get_safety_report(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let job = state.store.job(tenant.0, job_id(&id)?).await.map_err(|e| not_found(e, &id))?;
    let object = match state.store.evidence(tenant.0, job.id, report::FILE).await {
        Err(StoreError::NotFound) => return show_unfinished(&state, &job, &headers).await,
        object => object?,
    };
    show_report(&state, object, &headers, async {
        match state.store.evidence(tenant.0, job.id, evidence::TEXTS).await {
            Ok(texts) => state.store.objects().read_whole(&texts).await,
            // The file they stood in is gone, or no row was named.
            Err(StoreError::NotFound) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    })
    .await
}

/// Get the signed manifest of what went into a job and what came out.
///
/// A DSSE envelope; the same file stands beside the adapter, and `holdfast verify` checks it.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/manifest", operation_id = "get_manifest", tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "The manifest", body = manifest::Envelope, content_type = "application/json"),
        (status = 304, description = "The client has it"),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn get_manifest(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let job = state.store.job(tenant.0, job_id(&id)?).await.map_err(|e| not_found(e, &id))?;
    let object = state.store.evidence(tenant.0, job.id, manifest::FILE).await.map_err(|error| missing(error, job.id))?;
    file(&state, object, manifest::FILE, &headers)
}

/// List the public keys that manifests are signed with, the newest first.
#[utoipa::path(
    get, path = "/v1/signing_keys", operation_id = "list_signing_keys", tag = "fine-tuning",
    responses((status = 200, description = "All of them", body = List<SigningKey>))
)]
pub(crate) async fn list_signing_keys(_: Tenant, State(state): State<AppState>) -> Result<Json<List<SigningKey>>, ApiError> {
    let keys = state.store.signing_keys().await?;
    Ok(Json(List::new(keys.into_iter().map(SigningKey::from).collect(), false)))
}

/// Get what is demanded of the project's jobs from now on.
#[utoipa::path(
    get, path = "/v1/fine_tuning/safety_policy", operation_id = "get_safety_policy", tag = "fine-tuning",
    responses((status = 200, description = "The policy that counts", body = SafetyPolicy))
)]
pub(crate) async fn get_safety_policy(tenant: Tenant, State(state): State<AppState>) -> Result<Json<SafetyPolicy>, ApiError> {
    let policy = state.policy_of(tenant.0).await?;
    Ok(Json(policy.into()))
}

pub(crate) fn missing(error: StoreError, job: JobId) -> ApiError {
    match error {
        StoreError::NotFound => {
            let message = format!("{job} has no such evidence: there is some once a job has trained");
            Invalid::new("fine_tuning_job_id", "no_evidence", message).into()
        }
        other => other.into(),
    }
}

/// What is known of a job that ended without an adapter after it had begun to train.
pub(crate) async fn show_unfinished(state: &AppState, job: &Job, headers: &HeaderMap) -> Result<Response, ApiError> {
    let how = match &job.state {
        JobState::Failed { error } => error.message.clone(),
        JobState::Cancelled => "the job was cancelled".to_owned(),
        _ => return Err(missing(StoreError::NotFound, job.id)),
    };
    let (steps, validations) = state.store.steps(job.id).await?;
    let Some(last) = steps.last() else { return Err(missing(StoreError::NotFound, job.id)) };
    let (clean, alarm) = state.store.gauge_of(job).await?;
    let report = Report {
        format: report::FORMAT,
        job: job.id.to_string(),
        attempt: job.attempts.last().map_or(0, |attempt| attempt.attempt),
        base_model: job.base_model.clone(),
        safety: job.safety.clone(),
        alignment_set_version: job.alignment_set_version,
        policy: job.policy.clone(),
        frames: Vec::new(),
        unfinished: Some(how),
        training: Training::of(&steps, &validations),
        gauge: Gauge::after(Some(last), &job.safety, clean, alarm),
        evaluation: None,
        not_judged: None,
        gate: None,
        replaced: None,
        worst_rows: Vec::new(),
    };
    if wants_page(headers) { show_page(&report, &BTreeMap::new()) } else { Ok(Json(report).into_response()) }
}

/// A report as it was written, or as a page, which shows the texts of rows: lines of [`RowText`], read only where they are shown.
pub(crate) async fn show_report(
    state: &AppState,
    object: ObjectRef,
    headers: &HeaderMap,
    texts: impl Future<Output = Result<Vec<u8>, StoreError>>,
) -> Result<Response, ApiError> {
    if !wants_page(headers) {
        return file(state, object, report::FILE, headers);
    }
    let texts = texts.await?;
    let texts = serde_json::Deserializer::from_slice(&texts).into_iter::<RowText>();
    let texts = texts.map(|row| row.map(|row| (row.line, row.text))).collect::<Result<_, _>>();
    let report = state.store.objects().read_whole(&object).await?;
    let report = serde_json::from_slice(&report).map_err(|e| ApiError::internal(&e))?;
    show_page(&report, &texts.map_err(|e| ApiError::internal(&e))?)
}

fn wants_page(headers: &HeaderMap) -> bool {
    headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).is_some_and(|accept| accept.contains("text/html"))
}

fn file(state: &AppState, object: ObjectRef, name: &str, headers: &HeaderMap) -> Result<Response, ApiError> {
    let download = Download {
        segments: vec![Segment::Object { key: object.key, bytes: object.bytes }],
        media_type: "application/json",
        filename: name.to_owned(),
        sha256: object.sha256,
    };
    download.answer(state.store.objects(), headers)
}

fn show_page(report: &Report, texts: &BTreeMap<u64, String>) -> Result<Response, ApiError> {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY)),
        (HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff")),
        (header::CACHE_CONTROL, HeaderValue::from_static("private, no-store")),
    ];
    Ok((headers, report.html(texts)).into_response())
}
