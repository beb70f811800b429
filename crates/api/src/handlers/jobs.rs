//! Fine-tuning jobs.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use holdfast_domain::ids::{EventId, FileId, JobId};
use holdfast_domain::job::Status;
use holdfast_domain::{Invalid, model_name, safety::RequestedSafety};
use holdfast_store::jobs::{Job as Row, NewJob};
use holdfast_store::{Store, StoreError};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::auth::Tenant;
use crate::error::ErrorBody;
use crate::extract::{self, JsonBody, Path, QueryString};
use crate::wire::event::Event;
use crate::wire::job::Job;
use crate::wire::job_request::CreateJob;
use crate::wire::list::List;
use crate::{ApiError, AppState};

/// The largest seed the public contract knows.
const MAX_SEED: u64 = (1 << 31) - 1;

/// Create a job.
///
/// Every hyperparameter and the safety are decided here and stand on the job. Its files are then checked against the model's
/// template and tokenizer; a job whose files cannot be used fails with the numbers of their bad lines.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs", operation_id = "create_fine_tuning_job", tag = "fine-tuning", request_body = CreateJob,
    responses(
        (status = 200, description = "The job", body = Job),
        (status = 400, description = "A value cannot be used", body = ErrorBody),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
        (status = 404, description = "The project has no such file, or there is no such model", body = ErrorBody),
        (status = 413, description = "The body is larger than 1 MiB", body = ErrorBody),
    )
)]
pub(crate) async fn create_job(
    tenant: Tenant,
    State(state): State<AppState>,
    JsonBody(mut body): JsonBody<CreateJob>,
) -> Result<Json<Job>, ApiError> {
    let (requested, at) = body.take_hyperparameters()?;
    if let Some(suffix) = &body.suffix {
        model_name::check_suffix(suffix)?;
    }
    let metadata = body.metadata()?;
    let safety = body.safety.map(RequestedSafety::from).unwrap_or_default();
    let safety = safety.resolve(&state.settings.safety_floor).map_err(|e| e.within("safety"))?;
    let training = file(&state.store, tenant, "training_file", &body.training_file).await?;
    let validation = match &body.validation_file {
        Some(id) => Some(file(&state.store, tenant, "validation_file", id).await?.id),
        None => None,
    };
    let base = state.store.base_model(&body.model).await.map_err(|error| match error {
        StoreError::NotFound => ApiError::not_found("model", &body.model),
        other => other.into(),
    })?;
    let hyperparameters = requested.resolve(training.row_count, base.context_length).map_err(|e| e.within(at))?;
    hyperparameters.check_with(&safety).map_err(|e| e.within(at))?;
    let seed = match body.seed {
        Some(seed) if seed > MAX_SEED => {
            return Err(Invalid::new("seed", "out_of_bounds", format!("seed must lie between 0 and {MAX_SEED}")).into());
        }
        Some(seed) => seed,
        None => 42,
    };
    let job = NewJob {
        base_model: body.model,
        training_file: training.id,
        validation_file: validation,
        suffix: body.suffix,
        seed,
        metadata,
        hyperparameters,
        safety,
    };
    let created = state.store.create_job(tenant.0, &job).await.map_err(|error| match error {
        StoreError::Invalid(invalid) if invalid.code == "model_not_found" => ApiError::not_found("model", &job.base_model),
        StoreError::Invalid(invalid) if invalid.code == "file_not_found" => {
            ApiError::not_found(&invalid.param, &job.training_file.to_string())
        }
        other => other.into(),
    })?;
    show(&state.store, created).await
}

async fn file(store: &Store, tenant: Tenant, param: &str, id: &str) -> Result<holdfast_store::files::File, ApiError> {
    let parsed: FileId = extract::id(param, id)?;
    store.file(tenant.0, parsed).await.map_err(|error| match error {
        StoreError::NotFound => ApiError::not_found(param, id),
        other => other.into(),
    })
}

async fn show(store: &Store, row: Row) -> Result<Json<Job>, ApiError> {
    let position = match row.state.status() {
        Status::ValidatingFiles | Status::Queued => Some(store.queue_position(row.id).await?),
        _ => None,
    };
    Ok(Json(Job::new(row, position)))
}

/// Which jobs or events.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListPage {
    /// The `last_id` of the page before.
    after: Option<String>,
    /// 1 to 100.
    #[param(default = 20, minimum = 1, maximum = 100)]
    limit: Option<u32>,
}

/// List jobs, newest first.
///
/// `metadata[key]=value` keeps the jobs whose metadata holds that pair; several such parameters must all hold.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs", operation_id = "list_fine_tuning_jobs", tag = "fine-tuning", params(ListPage),
    responses(
        (status = 200, description = "A page of the project's jobs", body = List<Job>),
        (status = 400, description = "A parameter cannot be used", body = ErrorBody),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
    )
)]
pub(crate) async fn list_jobs(
    tenant: Tenant,
    State(state): State<AppState>,
    QueryString(query): QueryString<ListPage>,
    QueryString(pairs): QueryString<Vec<(String, String)>>,
) -> Result<Json<List<Job>>, ApiError> {
    let page = extract::page::<JobId>(query.after.as_deref(), query.limit, 20, 100, false)?;
    let metadata: BTreeMap<&str, &str> = pairs
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix("metadata[")?.strip_suffix(']')?, value.as_str())))
        .collect();
    let filter = (!metadata.is_empty()).then(|| serde_json::json!(metadata));
    let jobs = state.store.jobs(tenant.0, filter.as_ref(), page).await?;
    Ok(Json(List::new(jobs.items.into_iter().map(|row| Job::new(row, None)).collect(), jobs.has_more)))
}

/// Get a job.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}", operation_id = "get_fine_tuning_job", tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path)),
    responses(
        (status = 200, description = "The job", body = Job),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn get_job(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<Job>, ApiError> {
    let row = state.store.job(tenant.0, job_id(&id)?).await.map_err(|e| not_found(e, &id))?;
    show(&state.store, row).await
}

/// Cancel a job that has not ended.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", operation_id = "cancel_fine_tuning_job", tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path)),
    responses(
        (status = 200, description = "The job, cancelled", body = Job),
        (status = 400, description = "The job has ended", body = ErrorBody),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn cancel_job(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<Job>, ApiError> {
    let row = state.store.cancel_job(tenant.0, job_id(&id)?).await.map_err(|e| not_found(e, &id))?;
    show(&state.store, row).await
}

/// List a job's events, newest first.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", operation_id = "list_fine_tuning_events", tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path), ListPage),
    responses(
        (status = 200, description = "A page of the job's events", body = List<Event>),
        (status = 400, description = "A parameter cannot be used", body = ErrorBody),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn list_events(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
    QueryString(query): QueryString<ListPage>,
) -> Result<Json<List<Event>>, ApiError> {
    let page = extract::page::<EventId>(query.after.as_deref(), query.limit, 20, 100, false)?;
    let events = state.store.events(tenant.0, job_id(&id)?, page).await.map_err(|e| not_found(e, &id))?;
    Ok(Json(List::new(events.items.into_iter().map(Event::from).collect(), events.has_more)))
}

pub(crate) fn job_id(text: &str) -> Result<JobId, ApiError> {
    extract::id("fine_tuning_job_id", text)
}

pub(crate) fn not_found(error: StoreError, id: &str) -> ApiError {
    match error {
        StoreError::NotFound => ApiError::not_found("fine_tuning_job_id", id),
        other => other.into(),
    }
}
