//! Fine-tuning jobs.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use holdfast_dataset::Report;
use holdfast_domain::hyperparameters::Decided;
use holdfast_domain::ids::{FileId, JobId};
use holdfast_domain::job::Status;
use holdfast_domain::{Invalid, model_name, safety::RequestedSafety};
use holdfast_store::base_models::BaseModel;
use holdfast_store::files::File;
use holdfast_store::jobs::{Job as Row, NewJob};
use holdfast_store::{Once, Store, StoreError};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::auth::Tenant;
use crate::error::ErrorBody;
use crate::extract::{self, JsonBody, Path, QueryString};
use crate::handlers::models::FINE_TUNED;
use crate::repeatable::Repeatable;
use crate::wire::job::Job;
use crate::wire::job_request::CreateJob;
use crate::wire::list::{Created, List};
use crate::{ApiError, AppState};

/// The largest seed the public contract knows.
const MAX_SEED: u64 = (1 << 31) - 1;

/// Create a job.
///
/// Every hyperparameter and the safety are decided here and stand on the job. Its files are then checked against the model's
/// template and tokenizer; a job whose files cannot be used fails with the numbers of their bad lines. A request that is sent
/// twice, with the same `Idempotency-Key` or by a client that says it tries again, makes one job.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs", operation_id = "create_fine_tuning_job", tag = "fine-tuning", request_body = CreateJob,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same key within a day is the same request", min_length = 1, max_length = 255)),
    responses(
        (status = 200, description = "The job", body = Job),
        (status = 404, description = "The project has no such file, or there is no such model", body = ErrorBody),
        (status = 413, description = "The body is larger than 1 MiB", body = ErrorBody),
    )
)]
pub(crate) async fn create_job(
    tenant: Tenant,
    State(state): State<AppState>,
    repeatable: Repeatable,
    JsonBody(body, sha256): JsonBody<CreateJob>,
) -> Result<Created<Job>, ApiError> {
    let once = repeatable.with_body(sha256);
    let created = match create(&state, tenant, body, &once).await {
        // What it is refused for may have come after the job that it made: another policy, a file that is gone.
        Err(refusal) => state.store.job_made_before(tenant.0, &once).await?.ok_or(refusal)?,
        Ok(created) => created,
    };
    Ok(Created(show(&state.store, created).await?))
}

async fn create(state: &AppState, tenant: Tenant, body: CreateJob, once: &Once) -> Result<Row, ApiError> {
    let resolved = resolve(state, tenant, body).await?;
    if let Some((param, file)) = resolved.files().find(|(_, file)| file.errors.is_some()) {
        return Err(bad_file(param, file));
    }
    let job = resolved.job;
    state.store.create_job(tenant.0, &job, Some(once)).await.map_err(|error| match error {
        StoreError::Invalid(invalid) if invalid.code == "model_not_found" => ApiError::not_found("model", &job.model),
        StoreError::Invalid(invalid) if invalid.code == "file_not_found" => {
            let missing = if invalid.param == "training_file" { Some(job.training_file) } else { job.validation_file };
            ApiError::not_found(&invalid.param, &missing.map_or_else(String::new, |file| file.to_string()))
        }
        other => other.into(),
    })
}

/// A request for a job, with everything decided.
pub(crate) struct Resolved {
    pub(crate) job: NewJob,
    pub(crate) base: BaseModel,
    pub(crate) training: File,
    pub(crate) validation: Option<File>,
    /// What the service decided because the client left it open.
    pub(crate) decided: Vec<Decided>,
}

impl Resolved {
    pub(crate) fn files(&self) -> impl Iterator<Item = (&'static str, &File)> {
        [("training_file", &self.training)].into_iter().chain(self.validation.iter().map(|file| ("validation_file", file)))
    }
}

/// Decides every value of a request.
pub(crate) async fn resolve(state: &AppState, tenant: Tenant, mut body: CreateJob) -> Result<Resolved, ApiError> {
    let (mut requested, at) = body.take_hyperparameters()?;
    if let Some(suffix) = &body.suffix {
        model_name::check_suffix(suffix)?;
    }
    if body.integrations.as_ref().is_some_and(|list| !list.is_empty()) {
        return Err(ApiError::invalid(
            "integrations",
            "unsupported_integration",
            "no integration is supported; leave integrations out",
        ));
    }
    let metadata = body.metadata()?;
    let requested_safety = body.safety.map(RequestedSafety::from).unwrap_or_default();
    let policy = state.policy_of(tenant.0).await?;
    let safety = requested_safety.resolve(&policy.policy).map_err(|e| e.within("safety"))?;
    let must_pass = policy.policy.gate.enabled;
    let policy = requested_safety.apply(policy);
    let training = file(&state.store, tenant, "training_file", &body.training_file).await?;
    let validation = match &body.validation_file {
        Some(id) => Some(file(&state.store, tenant, "validation_file", id).await?),
        None => None,
    };
    let start = if body.model.starts_with(FINE_TUNED) {
        Some(state.store.starting_point(tenant.0, &body.model).await.map_err(|error| no_model(error, &body.model))?)
    } else {
        None
    };
    if let Some(start) = &start {
        requested.take_adapter_from(&start.hyperparameters).map_err(|e| e.within(at))?;
        start.line.iter().try_for_each(|trained| trained.safety.reaches(trained.rows_per_step, &policy.policy))?;
        if must_pass && !start.line.iter().all(|trained| trained.gated) {
            // It would be asked in the frames of this job's file alone, and what it learned in those of another would pass.
            let message = "the model, or one that it goes on from, was trained without a safety gate, which jobs must pass here; begin with its base model, or ask the operator";
            return Err(Invalid::new("model", "safety_below_floor", message).into());
        }
    }
    let base_model = start.as_ref().map_or_else(|| body.model.clone(), |start| start.base_model.clone());
    let base = state.store.base_model(&base_model).await.map_err(|error| no_model(error, &base_model))?;
    let mut hyperparameters = requested.resolve(training.row_count, base.context_length).map_err(|e| e.within(at))?;
    hyperparameters.row_conflicts = requested.row_conflicts.unwrap_or(policy.policy.evaluates() && safety.can_score_rows());
    let safety = requested_safety.for_steps_of(hyperparameters.rows_per_step(), safety);
    hyperparameters.check_with(&safety).map_err(|e| e.within(at))?;
    let seed = match body.seed {
        Some(seed) if seed > MAX_SEED => {
            return Err(Invalid::new("seed", "out_of_bounds", format!("seed must lie between 0 and {MAX_SEED}")).into());
        }
        Some(seed) => seed,
        None => 42,
    };
    let decided = requested.decided(&hyperparameters, training.row_count, base.context_length);
    let job = NewJob {
        base_model,
        model: body.model,
        start: start.map(|start| start.start),
        training_file: training.id,
        validation_file: validation.as_ref().map(|file| file.id),
        suffix: body.suffix,
        seed,
        metadata,
        hyperparameters,
        safety,
        policy,
    };
    Ok(Resolved { job, base, training, validation, decided })
}

/// The base under a model of either kind.
pub(crate) async fn base_of(state: &AppState, tenant: Tenant, model: &str) -> Result<String, ApiError> {
    if !model.starts_with(FINE_TUNED) {
        return Ok(state.store.base_model(model).await.map_err(|error| no_model(error, model))?.name);
    }
    Ok(state.store.starting_point(tenant.0, model).await.map_err(|error| no_model(error, model))?.base_model)
}

fn no_model(error: StoreError, name: &str) -> ApiError {
    ApiError::of_one(error, "model", name)
}

fn bad_file(param: &str, file: &File) -> ApiError {
    let (count, lines) = file.errors.as_ref().map_or((0, Vec::new()), |bad| (bad.count, bad.lines.clone()));
    let report = Report { error_count: count, errors: lines, ..Report::default() };
    let message = format!("{param} has bad lines: {}; mend them and upload the file again", report.summary());
    ApiError::bad_dataset(param, message, report.errors)
}

async fn file(store: &Store, tenant: Tenant, param: &str, id: &str) -> Result<File, ApiError> {
    let parsed: FileId = extract::id(param, id)?;
    let file = store.file(tenant.0, parsed).await.map_err(|error| ApiError::of_one(error, param, id))?;
    if file.purpose == UPLOADED {
        return Ok(file);
    }
    let message = format!("{param} must be a file of the purpose {UPLOADED:?}; this one is {:?}", file.purpose);
    Err(ApiError::invalid(param, "wrong_purpose", message))
}

/// What files are uploaded for.
const UPLOADED: &str = "fine-tune";

async fn show(store: &Store, row: Row) -> Result<Job, ApiError> {
    let waiting = match row.state.status() {
        Status::ValidatingFiles | Status::Queued => Some(store.waiting(&row).await?),
        _ => None,
    };
    Ok(Job::new(row, waiting))
}

/// Which jobs.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListJobs {
    /// The `last_id` of the page before.
    #[param(pattern = "^ftjob-[0-9a-f]{32}$")]
    after: Option<String>,
    /// 1 to 100.
    #[param(default = 20, minimum = 1, maximum = 100)]
    limit: Option<u32>,
}

/// List jobs, newest first.
///
/// `metadata[key]=value` keeps the jobs whose metadata holds that pair; several such parameters must all hold.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs", operation_id = "list_fine_tuning_jobs", tag = "fine-tuning",
    params(ListJobs, ("metadata" = Option<BTreeMap<String, String>>, Query, style = DeepObject, explode, description = "Pairs that a job's metadata must hold")),
    responses((status = 200, description = "A page of the project's jobs", body = List<Job>))
)]
pub(crate) async fn list_jobs(
    tenant: Tenant,
    State(state): State<AppState>,
    QueryString(query): QueryString<ListJobs>,
    QueryString(pairs): QueryString<Vec<(String, String)>>,
) -> Result<Json<List<Job>>, ApiError> {
    let page = extract::page::<JobId>(query.after.as_deref(), query.limit, 20, 100, false)?;
    let metadata: BTreeMap<&str, &str> = pairs
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix("metadata[")?.strip_suffix(']')?, value.as_str())))
        .collect();
    if metadata.iter().any(|(key, value)| key.contains('\0') || value.contains('\0')) {
        return Err(ApiError::invalid("metadata", "invalid_text", "metadata never holds the character U+0000"));
    }
    let filter = (!metadata.is_empty()).then(|| serde_json::json!(metadata));
    let jobs = state.store.jobs(tenant.0, filter.as_ref(), page).await?;
    Ok(Json(List::new(jobs.items.into_iter().map(|row| Job::new(row, None)).collect(), jobs.has_more)))
}

/// Get a job.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}", operation_id = "get_fine_tuning_job", tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "The job", body = Job),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn get_job(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<Job>, ApiError> {
    let row = state.store.job(tenant.0, job_id(&id)?).await.map_err(|e| not_found(e, &id))?;
    Ok(Json(show(&state.store, row).await?))
}

/// Cancel a job that has not ended.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", operation_id = "cancel_fine_tuning_job", tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "The job, cancelled", body = Job),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn cancel_job(
    tenant: Tenant,
    State(state): State<AppState>,
    repeatable: Repeatable,
    Path(id): Path<String>,
) -> Result<Json<Job>, ApiError> {
    let once = repeatable.without_body();
    let row = state.store.cancel_job(tenant.0, job_id(&id)?, Some(&once)).await.map_err(|e| not_found(e, &id))?;
    Ok(Json(show(&state.store, row).await?))
}

/// Pause a job. One that trains is `pausing` until its worker has written a checkpoint.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause", operation_id = "pause_fine_tuning_job", tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "The job, paused or pausing", body = Job),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn pause_job(
    tenant: Tenant,
    State(state): State<AppState>,
    repeatable: Repeatable,
    Path(id): Path<String>,
) -> Result<Json<Job>, ApiError> {
    let once = repeatable.without_body();
    let row = state.store.pause_job(tenant.0, job_id(&id)?, Some(&once)).await.map_err(|e| not_found(e, &id))?;
    Ok(Json(show(&state.store, row).await?))
}

/// Resume a paused job. It goes on from its last checkpoint, bit for bit as if it had not paused.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume", operation_id = "resume_fine_tuning_job", tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "The job, waiting for a worker", body = Job),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn resume_job(
    tenant: Tenant,
    State(state): State<AppState>,
    repeatable: Repeatable,
    Path(id): Path<String>,
) -> Result<Json<Job>, ApiError> {
    let once = repeatable.without_body();
    let row = state.store.resume_job(tenant.0, job_id(&id)?, Some(&once)).await.map_err(|e| not_found(e, &id))?;
    Ok(Json(show(&state.store, row).await?))
}

pub(crate) fn job_id(text: &str) -> Result<JobId, ApiError> {
    extract::id("fine_tuning_job_id", text)
}

pub(crate) fn not_found(error: StoreError, id: &str) -> ApiError {
    ApiError::of_one(error, "fine_tuning_job_id", id)
}
