//! Adapters, as PEFT, vLLM and `LoRAX` load them: a job's last one or one of its checkpoints, one file, or all of them in a tar.

use axum::extract::State;
use axum::response::{IntoResponse, Redirect, Response};
use bytes::Bytes;
use holdfast_domain::Invalid;
use holdfast_domain::job::Status;
use holdfast_store::queue::AdapterFile;
use http::HeaderMap;
use sha2::{Digest, Sha256};

use crate::auth::Tenant;
use crate::download::{Download, Segment};
use crate::error::ErrorBody;
use crate::extract::Path;
use crate::handlers::jobs::{job_id, not_found};
use crate::{ApiError, AppState, wire};

/// A tar is made of blocks of this size.
const BLOCK_BYTES: u64 = 512;
/// Two empty blocks end a tar; nothing in it needs more zeros.
static ZEROS: [u8; 1024] = [0; 1024];

/// Download the adapter as a tar of its files.
///
/// `Range`, `If-Range` and `If-None-Match` are understood; the tar's bytes are always the same.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/adapter", operation_id = "get_adapter", tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "adapter_config.json and adapter_model.safetensors in a tar", body = wire::file::Bytes, content_type = "application/x-tar"),
        (status = 206, description = "The range that was asked for", body = wire::file::Bytes, content_type = "application/x-tar"),
        (status = 304, description = "The client has it"),
        (status = 404, description = "The project has no such job", body = ErrorBody),
        (status = 416, description = "The tar has no such range", body = ErrorBody),
    )
)]
pub(crate) async fn get_adapter(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let files = last_adapter(&state, tenant, &id).await?;
    tar(files, &id)?.answer(state.store.objects(), &headers)
}

/// Download one file of the adapter.
///
/// Where the object store signs URLs the answer leads there; elsewhere the bytes come from here.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/adapter/{file}", operation_id = "get_adapter_file", tag = "fine-tuning",
    params(
        ("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001"),
        ("file" = String, Path, example = "adapter_config.json")
    ),
    responses(
        (status = 200, description = "The file", body = wire::file::Bytes, content_type = "application/octet-stream"),
        (status = 206, description = "The range that was asked for", body = wire::file::Bytes, content_type = "application/octet-stream"),
        (status = 304, description = "The client has it"),
        (status = 307, description = "The file is at this URL for some minutes"),
        (status = 404, description = "The project has no such job, or its adapter no such file", body = ErrorBody),
        (status = 416, description = "The file has no such range", body = ErrorBody),
    )
)]
pub(crate) async fn get_adapter_file(
    tenant: Tenant,
    State(state): State<AppState>,
    Path((id, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    one(&state, last_adapter(&state, tenant, &id).await?, &name, &headers).await
}

/// Download a checkpoint's adapter as a tar of its files.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints/{step}/adapter", operation_id = "get_checkpoint_adapter",
    tag = "fine-tuning",
    params(
        ("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001"),
        ("step" = u64, Path, example = 100, minimum = 1, maximum = 9_223_372_036_854_775_807_u64)
    ),
    responses(
        (status = 200, description = "adapter_config.json and adapter_model.safetensors in a tar", body = wire::file::Bytes, content_type = "application/x-tar"),
        (status = 206, description = "The range that was asked for", body = wire::file::Bytes, content_type = "application/x-tar"),
        (status = 304, description = "The client has it"),
        (status = 404, description = "The project has no such job, or it no such checkpoint", body = ErrorBody),
        (status = 416, description = "The tar has no such range", body = ErrorBody),
    )
)]
pub(crate) async fn get_checkpoint_adapter(
    tenant: Tenant,
    State(state): State<AppState>,
    Path((id, step)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let files = of_checkpoint(&state, tenant, &id, &step).await?;
    tar(files, &format!("{id}-step-{step}"))?.answer(state.store.objects(), &headers)
}

/// Download one file of a checkpoint's adapter.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints/{step}/adapter/{file}",
    operation_id = "get_checkpoint_adapter_file", tag = "fine-tuning",
    params(
        ("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001"),
        ("step" = u64, Path, example = 100, minimum = 1, maximum = 9_223_372_036_854_775_807_u64),
        ("file" = String, Path, example = "adapter_model.safetensors")
    ),
    responses(
        (status = 200, description = "The file", body = wire::file::Bytes, content_type = "application/octet-stream"),
        (status = 206, description = "The range that was asked for", body = wire::file::Bytes, content_type = "application/octet-stream"),
        (status = 304, description = "The client has it"),
        (status = 307, description = "The file is at this URL for some minutes"),
        (status = 404, description = "The project has no such job, or it no such checkpoint or file", body = ErrorBody),
        (status = 416, description = "The file has no such range", body = ErrorBody),
    )
)]
pub(crate) async fn get_checkpoint_adapter_file(
    tenant: Tenant,
    State(state): State<AppState>,
    Path((id, step, name)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    one(&state, of_checkpoint(&state, tenant, &id, &step).await?, &name, &headers).await
}

async fn last_adapter(state: &AppState, tenant: Tenant, id: &str) -> Result<Vec<AdapterFile>, ApiError> {
    let job = state.store.job(tenant.0, job_id(id)?).await.map_err(|e| not_found(e, id))?;
    let status = job.state.status();
    if job.is_discarded() {
        return Err(discarded());
    }
    if job.quarantine.is_some() && !job.is_released() {
        return Err(held_back("this job's adapter did not pass the safety gate, and the operator has not released it"));
    }
    if status != Status::Succeeded && !job.is_released() {
        let message = format!("this job is {} and has no adapter; one exists once it has succeeded", status.as_str());
        return Err(Invalid::new("fine_tuning_job_id", "no_adapter", message).into());
    }
    let files = state.store.adapter_files(tenant.0, job.id).await?;
    if files.is_empty() {
        let message = "this job has no adapter: its model was deleted, or what was released of it are checkpoints alone; those that are there are listed under its checkpoints";
        return Err(Invalid::new("fine_tuning_job_id", "no_adapter", message).into());
    }
    Ok(files)
}

async fn of_checkpoint(state: &AppState, tenant: Tenant, id: &str, step: &str) -> Result<Vec<AdapterFile>, ApiError> {
    let job = state.store.job(tenant.0, job_id(id)?).await.map_err(|e| not_found(e, id))?;
    let no_checkpoint = || ApiError::not_found("step", step);
    let number = step.parse().ok().filter(|step| i64::try_from(*step).is_ok()).ok_or_else(no_checkpoint)?;
    if job.is_discarded() {
        return Err(discarded());
    }
    let files = state.store.checkpoint_adapter(tenant.0, job.id, number).await;
    let files = files.map_err(|error| ApiError::of_one(error, "step", step))?;
    if job.holds_back_checkpoints() {
        let message = "this job must pass a safety gate, and only the adapter that was published has; the operator may release its checkpoints";
        return Err(held_back(message));
    }
    Ok(files)
}

/// What nobody may have before it has passed the gate.
fn held_back(message: &str) -> ApiError {
    Invalid::new("fine_tuning_job_id", "held_back", message).into()
}

fn discarded() -> ApiError {
    held_back("this job's adapter did not pass the safety gate, and the operator has discarded it with its checkpoints")
}

async fn one(state: &AppState, files: Vec<AdapterFile>, name: &str, headers: &HeaderMap) -> Result<Response, ApiError> {
    let file = files.into_iter().find(|file| file.name == name).ok_or_else(|| ApiError::not_found("file", name))?;
    if let Some(url) = state.store.objects().signed_url(&file.object.key).await {
        return Ok(Redirect::temporary(&url).into_response());
    }
    let download = Download {
        segments: vec![Segment::Object { key: file.object.key, bytes: file.object.bytes }],
        media_type: "application/octet-stream",
        filename: file.name,
        sha256: file.object.sha256,
    };
    download.answer(state.store.objects(), headers)
}

fn tar(files: Vec<AdapterFile>, name: &str) -> Result<Download, ApiError> {
    let (mut segments, mut hash) = (Vec::new(), Sha256::new());
    for file in files {
        hash.update(file.name.as_bytes());
        hash.update([0]);
        hash.update(file.object.sha256);
        segments.push(Segment::Here(tar_header(&file)?));
        let padding = file.object.bytes.next_multiple_of(BLOCK_BYTES) - file.object.bytes;
        segments.push(Segment::Object { key: file.object.key, bytes: file.object.bytes });
        segments.push(Segment::Here(zeros(padding)));
    }
    segments.push(Segment::Here(zeros(2 * BLOCK_BYTES)));
    Ok(Download { segments, media_type: "application/x-tar", filename: format!("{name}.tar"), sha256: hash.finalize().into() })
}

fn tar_header(file: &AdapterFile) -> Result<Bytes, ApiError> {
    let mut header = tar::Header::new_gnu();
    header.set_path(&file.name).map_err(|e| ApiError::internal(&e))?;
    header.set_size(file.object.bytes);
    header.set_mode(0o644);
    header.set_cksum();
    Ok(Bytes::copy_from_slice(header.as_bytes()))
}

fn zeros(bytes: u64) -> Bytes {
    Bytes::from_static(ZEROS.get(..usize::try_from(bytes).unwrap_or(0)).unwrap_or(&ZEROS))
}
