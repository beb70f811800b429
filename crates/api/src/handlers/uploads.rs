//! Uploads: files that come in parts, several at a time, in any order.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::extract::multipart::{Multipart, MultipartRejection};
use futures::TryStreamExt;
use holdfast_dataset::Report;
use holdfast_dataset::structure::StructureCheck;
use holdfast_domain::ids::{PartId, UploadId};
use holdfast_domain::limits::{MAX_PART_BYTES, MAX_PARTS_PER_UPLOAD};
use holdfast_store::files::NewFile;
use holdfast_store::uploads::{NewUpload, Part, UploadState};
use holdfast_store::{Content, Store, StoreError};
use md5::Md5;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::auth::Tenant;
use crate::error::ErrorBody;
use crate::extract::{self, JsonBody, Path};
use crate::handlers::files::bad_lines;
use crate::handlers::form::{self, Form};
use crate::repeatable::Repeatable;
use crate::wire::list::Created;
use crate::wire::upload::{CompleteUpload, CreateUpload, PartForm, Upload, UploadPart};
use crate::{ApiError, AppState, telemetry};

/// Begin an upload.
///
/// Its parts are added one by one or several at a time; completing it makes them a file. It takes parts for an hour.
#[utoipa::path(
    post, path = "/v1/uploads", operation_id = "create_upload", tag = "uploads", request_body = CreateUpload,
    responses(
        (status = 200, description = "The upload", body = Upload),
        (status = 413, description = "The file would be larger than this deployment takes", body = ErrorBody),
    )
)]
pub(crate) async fn create_upload(
    tenant: Tenant,
    State(state): State<AppState>,
    repeatable: Repeatable,
    JsonBody(body, sha256): JsonBody<CreateUpload>,
) -> Result<Created<Upload>, ApiError> {
    let most = state.settings.max_upload_bytes;
    if body.bytes == 0 {
        return Err(ApiError::invalid("bytes", "out_of_bounds", "bytes must be at least 1"));
    }
    if body.bytes > most {
        return Err(ApiError::too_large(format!("the file would be larger than the {most} bytes this deployment takes")));
    }
    if body.mime_type.len() > 255 || body.mime_type.chars().any(char::is_control) {
        let message = "mime_type takes at most 255 bytes and no control characters";
        return Err(ApiError::invalid("mime_type", "invalid_mime_type", message));
    }
    let expires = body.expires_after.as_ref();
    let new = NewUpload {
        filename: form::filename("filename", Some(&body.filename))?,
        purpose: form::purpose(Some(&body.purpose))?,
        mime_type: body.mime_type,
        bytes: body.bytes,
        file_lifetime: form::lifetime(expires.map(|e| e.anchor.as_str()), expires.map(|e| e.seconds))?,
    };
    let upload = state.store.create_upload(tenant.0, &new, Some(&repeatable.with_body(sha256))).await?;
    Ok(Created(Upload::new(upload, None)))
}

/// Add a part to an upload: 64 MiB at most.
#[utoipa::path(
    post, path = "/v1/uploads/{upload_id}/parts", operation_id = "add_upload_part", tag = "uploads",
    params(("upload_id" = String, Path, example = "upload_0192f3a4000070008000000000000001")),
    request_body(content = PartForm, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "The part", body = UploadPart),
        (status = 404, description = "The project has no such upload", body = ErrorBody),
        (status = 413, description = "The part is larger than 64 MiB", body = ErrorBody),
    )
)]
pub(crate) async fn add_upload_part(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(upload_id): Path<String>,
    form: Result<Multipart, MultipartRejection>,
) -> Result<Created<UploadPart>, ApiError> {
    let upload = find(&state, tenant, &upload_id).await?;
    upload.must_be_pending()?;
    let mut form = Form::new(form)?;
    let mut staged = None;
    while let Some(field) = form.next().await? {
        if field.name() == Some("data") && staged.is_none() {
            let (id, writer) = state.store.stage_part(tenant.0, upload.id).await?;
            let too_large = || ApiError::too_large(format!("a part has at most {MAX_PART_BYTES} bytes; cut the file into more"));
            staged = Some((id, form::store(field, writer, MAX_PART_BYTES, too_large, |_| {}).await?));
        } else {
            form::word(field).await?;
        }
    }
    let (id, object) = staged.ok_or_else(|| ApiError::invalid("data", "missing", "the form has no field `data`"))?;
    match state.store.add_part(tenant.0, upload.id, id, &object).await {
        Ok(part) => {
            telemetry::uploaded(part.bytes);
            Ok(Created(UploadPart::new(&part, upload.id)))
        }
        Err(error) => {
            state.store.objects().discard(&object).await;
            Err(not_found(error, &upload_id))
        }
    }
}

/// Complete an upload: its parts, in the order that is given, are a file from here on.
///
/// The file is checked as one that is uploaded whole. Completing it again gives the same answer.
#[utoipa::path(
    post, path = "/v1/uploads/{upload_id}/complete", operation_id = "complete_upload", tag = "uploads",
    params(("upload_id" = String, Path, example = "upload_0192f3a4000070008000000000000001")),
    request_body = CompleteUpload,
    responses(
        (status = 200, description = "The upload, with its file", body = Upload),
        (status = 404, description = "The project has no such upload", body = ErrorBody),
    )
)]
pub(crate) async fn complete_upload(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(upload_id): Path<String>,
    JsonBody(body, _): JsonBody<CompleteUpload>,
) -> Result<Json<Upload>, ApiError> {
    let upload = find(&state, tenant, &upload_id).await?;
    if let UploadState::Completed(file) = upload.state {
        let file = state.store.file(tenant.0, file).await.map_err(|e| not_found(e, &upload_id))?;
        return Ok(Json(Upload::new(upload, Some(file))));
    }
    upload.must_be_pending()?;
    if body.part_ids.is_empty() || body.part_ids.len() > MAX_PARTS_PER_UPLOAD {
        let message = format!("part_ids names 1 to {MAX_PARTS_PER_UPLOAD} parts, in the order they make the file");
        return Err(ApiError::invalid("part_ids", "out_of_bounds", message));
    }
    let part_id = |(i, id): (usize, &String)| {
        let message = format!("part_ids[{i}] is no part's id");
        id.parse::<PartId>().map_err(|_| ApiError::invalid(format!("part_ids[{i}]"), "part_not_found", message))
    };
    let ids: Vec<PartId> = body.part_ids.iter().enumerate().map(part_id).collect::<Result<_, _>>()?;
    let parts = state.store.parts(tenant.0, upload.id, &ids).await?;
    let bytes: u64 = parts.iter().map(|part| part.bytes).sum();
    if bytes != upload.bytes {
        let message = format!("the parts come to {bytes} bytes, and the upload was begun for {}", upload.bytes);
        return Err(ApiError::invalid("part_ids", "wrong_size", message));
    }
    let wanted = body.md5.as_deref().map(read_md5).transpose()?;
    let read = read_through(&state, &parts, wanted.is_some()).await?;
    if wanted.is_some() && wanted != read.md5 {
        let message = "the parts do not have this md5; was one of them damaged, or are they in another order?";
        return Err(ApiError::invalid("md5", "checksum_mismatch", message));
    }
    let file = NewFile {
        id: Store::new_file_id(),
        filename: upload.filename.clone(),
        purpose: upload.purpose.clone(),
        row_count: read.report.rows,
        errors: bad_lines(read.report),
        lifetime: upload.file_lifetime,
    };
    let content = Content { keys: parts.into_iter().map(|part| part.key).collect(), bytes, sha256: read.sha256 };
    let completed = state.store.complete_upload(tenant.0, upload.id, &file, &content).await;
    match completed {
        Ok((upload, file)) => Ok(Json(Upload::new(upload, Some(file)))),
        Err(error) => {
            // Another try of the same call may have been faster.
            let upload = find(&state, tenant, &upload_id).await?;
            let UploadState::Completed(file) = upload.state else { return Err(not_found(error, &upload_id)) };
            let file = state.store.file(tenant.0, file).await.map_err(|e| not_found(e, &upload_id))?;
            Ok(Json(Upload::new(upload, Some(file))))
        }
    }
}

/// Give an upload up. Its parts are removed.
#[utoipa::path(
    post, path = "/v1/uploads/{upload_id}/cancel", operation_id = "cancel_upload", tag = "uploads",
    params(("upload_id" = String, Path, example = "upload_0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "The upload, cancelled", body = Upload),
        (status = 404, description = "The project has no such upload", body = ErrorBody),
    )
)]
pub(crate) async fn cancel_upload(
    tenant: Tenant,
    State(state): State<AppState>,
    repeatable: Repeatable,
    Path(upload_id): Path<String>,
) -> Result<Json<Upload>, ApiError> {
    let id: UploadId = extract::id("upload_id", &upload_id)?;
    let once = repeatable.without_body();
    let upload = state.store.cancel_upload(tenant.0, id, Some(&once)).await.map_err(|e| not_found(e, &upload_id))?;
    Ok(Json(Upload::new(upload, None)))
}

async fn find(state: &AppState, tenant: Tenant, upload_id: &str) -> Result<holdfast_store::uploads::Upload, ApiError> {
    let id: UploadId = extract::id("upload_id", upload_id)?;
    state.store.upload(tenant.0, id).await.map_err(|e| not_found(e, upload_id))
}

fn not_found(error: StoreError, upload_id: &str) -> ApiError {
    ApiError::of_one(error, "upload_id", upload_id)
}

fn read_md5(text: &str) -> Result<[u8; 16], ApiError> {
    let mut md5 = [0; 16];
    hex::decode_to_slice(text, &mut md5)
        .map_err(|_| ApiError::invalid("md5", "invalid_checksum", "md5 takes 32 hexadecimal digits"))?;
    Ok(md5)
}

/// What one reading of all parts tells.
struct Reading {
    sha256: [u8; 32],
    md5: Option<[u8; 16]>,
    report: Report,
}

/// Pieces on their way from the reader to each of those who look at them.
const PIECES_AHEAD: usize = 8;
/// How long a reading may take before its caller is gone: what clients of the public contract wait.
const READING_TIMEOUT: Duration = Duration::from_secs(600);

/// Reads the parts once, one behind the other. Hashes and checks are made beside each other, off the threads that serve requests.
async fn read_through(state: &AppState, parts: &[Part], with_md5: bool) -> Result<Reading, ApiError> {
    let mut pieces = state.store.objects().read_all(parts.iter().map(|part| part.key.clone()).collect());
    let (to_hash, mut hashed) = mpsc::channel::<bytes::Bytes>(PIECES_AHEAD);
    let (to_check, mut checked) = mpsc::channel::<bytes::Bytes>(PIECES_AHEAD);
    let hashes = tokio::task::spawn_blocking(move || {
        let (mut sha256, mut md5) = (Sha256::new(), with_md5.then(Md5::new));
        while let Some(piece) = hashed.blocking_recv() {
            sha256.update(&piece);
            if let Some(md5) = &mut md5 {
                md5.update(&piece);
            }
        }
        (<[u8; 32]>::from(sha256.finalize()), md5.map(|md5| <[u8; 16]>::from(md5.finalize())))
    });
    let report = tokio::task::spawn_blocking(move || {
        let mut check = StructureCheck::default();
        while let Some(piece) = checked.blocking_recv() {
            check.push(&piece);
        }
        check.finish()
    });
    let read = async {
        while let Some(piece) = pieces.try_next().await.map_err(StoreError::from)? {
            // A receiver is gone only when its thread has failed, which joining it tells.
            let _ = to_hash.send(piece.clone()).await;
            let _ = to_check.send(piece).await;
        }
        drop((to_hash, to_check));
        Ok::<(), ApiError>(())
    };
    tokio::time::timeout(READING_TIMEOUT, read).await.map_err(|_| ApiError::busy("uploads"))??;
    let (sha256, md5) = hashes.await.map_err(|e| ApiError::internal(&e))?;
    let report = report.await.map_err(|e| ApiError::internal(&e))?;
    Ok(Reading { sha256, md5, report })
}
