//! A job's adapter, as PEFT, vLLM and `LoRAX` load it: one file, or all of them in a tar.

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use holdfast_domain::Invalid;
use holdfast_domain::job::Status;
use holdfast_store::StoreError;
use holdfast_store::queue::AdapterFile;
use http::header;

use crate::auth::Tenant;
use crate::error::ErrorBody;
use crate::extract::Path;
use crate::handlers::jobs::{job_id, not_found};
use crate::{ApiError, AppState};

/// A tar is made of blocks of this size.
const BLOCK_BYTES: u64 = 512;
/// Two empty blocks end a tar; nothing in it needs more zeros.
static ZEROS: [u8; 1024] = [0; 1024];

/// Download the adapter as a tar of its files.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/adapter", operation_id = "get_adapter", tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path)),
    responses(
        (status = 200, description = "adapter_config.json and adapter_model.safetensors in a tar", body = Vec<u8>, content_type = "application/x-tar"),
        (status = 400, description = "The job has no adapter (yet)", body = ErrorBody),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn get_adapter(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let files = files(&state, tenant, &id).await?;
    let bytes: u64 =
        files.iter().map(|file| BLOCK_BYTES + file.object.bytes.next_multiple_of(BLOCK_BYTES)).sum::<u64>() + 2 * BLOCK_BYTES;
    let mut parts: Vec<BoxStream<'static, Result<Bytes, StoreError>>> = Vec::new();
    for file in files {
        let padding = file.object.bytes.next_multiple_of(BLOCK_BYTES) - file.object.bytes;
        parts.push(one(tar_header(&file)?));
        parts.push(state.store.objects().read(&file.object.key).await?.map_err(StoreError::from).boxed());
        parts.push(one(zeros(padding)));
    }
    parts.push(one(zeros(2 * BLOCK_BYTES)));
    let headers = [
        (header::CONTENT_TYPE, "application/x-tar".to_owned()),
        (header::CONTENT_LENGTH, bytes.to_string()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{id}.tar\"")),
    ];
    Ok((headers, Body::from_stream(stream::iter(parts).flatten())).into_response())
}

/// Download one file of the adapter.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/adapter/{file}", operation_id = "get_adapter_file", tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path), ("file" = String, Path, example = "adapter_config.json")),
    responses(
        (status = 200, description = "The file", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 400, description = "The job has no adapter (yet)", body = ErrorBody),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
        (status = 404, description = "The project has no such job, or its adapter no such file", body = ErrorBody),
    )
)]
pub(crate) async fn get_adapter_file(
    tenant: Tenant,
    State(state): State<AppState>,
    Path((id, name)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let file = files(&state, tenant, &id).await?.into_iter().find(|file| file.name == name);
    let file = file.ok_or_else(|| ApiError::not_found("file", &name))?;
    let stream = state.store.objects().read(&file.object.key).await?;
    let headers =
        [(header::CONTENT_TYPE, "application/octet-stream".to_owned()), (header::CONTENT_LENGTH, file.object.bytes.to_string())];
    Ok((headers, Body::from_stream(stream)).into_response())
}

async fn files(state: &AppState, tenant: Tenant, id: &str) -> Result<Vec<AdapterFile>, ApiError> {
    let job = state.store.job(tenant.0, job_id(id)?).await.map_err(|e| not_found(e, id))?;
    if job.state.status() != Status::Succeeded {
        let message = format!("this job is {} and has no adapter; one exists once it has succeeded", job.state.status().as_str());
        return Err(Invalid::new("fine_tuning_job_id", "no_adapter", message).into());
    }
    state.store.adapter_files(tenant.0, job.id).await.map_err(|e: StoreError| not_found(e, id))
}

fn tar_header(file: &AdapterFile) -> Result<Bytes, ApiError> {
    let mut header = tar::Header::new_gnu();
    header.set_path(&file.name).map_err(|e| ApiError::internal(&e))?;
    header.set_size(file.object.bytes);
    header.set_mode(0o644);
    header.set_cksum();
    Ok(Bytes::copy_from_slice(header.as_bytes()))
}

fn one(bytes: Bytes) -> BoxStream<'static, Result<Bytes, StoreError>> {
    stream::once(async { Ok(bytes) }).boxed()
}

fn zeros(bytes: u64) -> Bytes {
    Bytes::from_static(ZEROS.get(..usize::try_from(bytes).unwrap_or(0)).unwrap_or(&ZEROS))
}
