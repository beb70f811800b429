//! Files: uploaded as a stream, checked on the way, stored once they are known to be sound.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::extract::multipart::{Field, Multipart, MultipartError};
use axum::response::{IntoResponse, Response};
use holdfast_dataset::structure::StructureCheck;
use holdfast_domain::ids::FileId;
use holdfast_domain::limits::MAX_FILENAME_BYTES;
use holdfast_store::files::NewFile;
use holdfast_store::objects::ObjectWriter;
use holdfast_store::{ObjectRef, StoreError};
use http::{StatusCode, header};

use crate::auth::Tenant;
use crate::error::ErrorBody;
use crate::extract::{self, Path, QueryString};
use crate::wire::file::{DeletedFile, File, ListFiles, Order, UploadForm};
use crate::wire::list::List;
use crate::{ApiError, AppState};

/// The one purpose a client may upload for.
const PURPOSE: &str = "fine-tune";
/// A form field other than the file is a word.
const MAX_FIELD_BYTES: usize = 256;

/// A file that has been written but has no row yet.
struct Staged {
    id: FileId,
    filename: String,
    object: ObjectRef,
    check: StructureCheck,
}

/// Upload a file.
///
/// The dataset's shape is checked while it streams in. A file with bad lines is refused whole: the error lists every one of
/// them with its number, and nothing is stored.
#[utoipa::path(
    post, path = "/v1/files", operation_id = "create_file", tag = "files",
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "The file", body = File),
        (status = 400, description = "The form or the dataset cannot be used", body = ErrorBody),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
        (status = 413, description = "The file is larger than this deployment takes", body = ErrorBody),
    )
)]
pub(crate) async fn create_file(
    tenant: Tenant,
    State(state): State<AppState>,
    form: Result<Multipart, axum::extract::multipart::MultipartRejection>,
) -> Result<Json<File>, ApiError> {
    let mut form =
        form.map_err(|e| ApiError::malformed("invalid_form", format!("expected multipart/form-data: {}", e.body_text())))?;
    let mut staged = None;
    let accepted = match read_form(&state, tenant, &mut form, &mut staged).await {
        Ok(purpose) => accept(purpose.as_deref(), staged.as_mut()),
        Err(error) => Err(error),
    };
    let file = match (accepted, &staged) {
        (Ok(file), _) => file,
        (Err(error), None) => return Err(error),
        (Err(error), Some(staged)) => {
            state.store.objects().discard(&staged.object).await;
            return Err(error);
        }
    };
    let object = staged.map(|staged| staged.object).ok_or_else(no_file)?;
    Ok(Json(state.store.create_file(tenant.0, &file, &object).await?.into()))
}

/// Reads the form's fields and returns the purpose. Some clients send the file before it, so the bytes go to a staged object
/// and everything is decided after.
async fn read_form(
    state: &AppState,
    tenant: Tenant,
    form: &mut Multipart,
    staged: &mut Option<Staged>,
) -> Result<Option<String>, ApiError> {
    let mut purpose = None;
    while let Some(field) = form.next_field().await.map_err(|e| unreadable(&e))? {
        match field.name() {
            Some("purpose") => purpose = Some(word(field).await?),
            Some("file") if staged.is_none() => *staged = Some(stage(state, tenant, field).await?),
            Some("file") => {
                return Err(ApiError::invalid("file", "duplicate_field", "the form holds two files; upload one at a time"));
            }
            _ => {
                word(field).await?;
            }
        }
    }
    Ok(purpose)
}

/// Decides whether what came can become a file.
fn accept(purpose: Option<&str>, staged: Option<&mut Staged>) -> Result<NewFile, ApiError> {
    let staged = staged.ok_or_else(no_file)?;
    match purpose {
        Some(PURPOSE) => {}
        Some(_) => return Err(ApiError::invalid("purpose", "unsupported_purpose", "purpose must be \"fine-tune\"")),
        None => {
            return Err(ApiError::invalid("purpose", "missing", "the form has no field `purpose`; it must be \"fine-tune\""));
        }
    }
    let report = std::mem::take(&mut staged.check).finish();
    if report.error_count > 0 {
        return Err(ApiError::bad_dataset(report.summary(), report.errors));
    }
    Ok(NewFile { id: staged.id, filename: std::mem::take(&mut staged.filename), purpose: PURPOSE.into(), row_count: report.rows })
}

fn no_file() -> ApiError {
    ApiError::invalid("file", "missing", "the form has no field `file`")
}

/// Streams a field into a staged object. Whatever ends it early, the object is given up; the sweeper knows it.
async fn stage(state: &AppState, tenant: Tenant, field: Field<'_>) -> Result<Staged, ApiError> {
    let filename = filename(field.file_name())?;
    let (id, mut writer) = state.store.stage_upload(tenant.0).await?;
    let mut check = StructureCheck::default();
    match copy(field, &mut writer, &mut check, state.settings.max_upload_bytes).await {
        Ok(()) => Ok(Staged { id, filename, object: writer.finish().await?, check }),
        Err(error) => {
            writer.abort().await;
            Err(error)
        }
    }
}

async fn copy(
    mut field: Field<'_>,
    writer: &mut ObjectWriter,
    check: &mut StructureCheck,
    max_bytes: u64,
) -> Result<(), ApiError> {
    let mut bytes = 0;
    while let Some(chunk) = field.chunk().await.map_err(|e| unreadable(&e))? {
        bytes += chunk.len() as u64;
        if bytes > max_bytes {
            return Err(ApiError::too_large(format!("the file is larger than the {max_bytes} bytes this deployment takes")));
        }
        check.push(&chunk);
        writer.write(&chunk).await?;
    }
    Ok(())
}

async fn word(mut field: Field<'_>) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = field.chunk().await.map_err(|e| unreadable(&e))? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_FIELD_BYTES {
            let name = field.name().unwrap_or_default().to_owned();
            return Err(ApiError::invalid(
                name,
                "too_long",
                format!("a form field other than `file` has at most {MAX_FIELD_BYTES} bytes"),
            ));
        }
    }
    String::from_utf8(bytes).map_err(|_| ApiError::malformed("invalid_form", "a form field is not UTF-8"))
}

/// The last part of what the client calls the file.
fn filename(sent: Option<&str>) -> Result<String, ApiError> {
    let name = sent.and_then(|name| name.rsplit(['/', '\\']).next()).unwrap_or_default();
    if name.is_empty() || name.len() > MAX_FILENAME_BYTES || name.chars().any(char::is_control) {
        let message = format!("the file needs a name of 1 to {MAX_FILENAME_BYTES} bytes without control characters");
        return Err(ApiError::invalid("file", "invalid_filename", message));
    }
    Ok(name.to_owned())
}

fn unreadable(error: &MultipartError) -> ApiError {
    if error.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return ApiError::too_large(error.body_text());
    }
    ApiError::malformed("invalid_form", "the multipart form ends early or is malformed")
}

/// List files.
#[utoipa::path(
    get, path = "/v1/files", operation_id = "list_files", tag = "files", params(ListFiles),
    responses(
        (status = 200, description = "A page of the project's files", body = List<File>),
        (status = 400, description = "A parameter cannot be used", body = ErrorBody),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
    )
)]
pub(crate) async fn list_files(
    tenant: Tenant,
    State(state): State<AppState>,
    QueryString(query): QueryString<ListFiles>,
) -> Result<Json<List<File>>, ApiError> {
    let ascending = query.order == Some(Order::Asc);
    let page = extract::page::<FileId>(query.after.as_deref(), query.limit, 10_000, 10_000, ascending)?;
    let files = state.store.files(tenant.0, query.purpose.as_deref(), page).await?;
    Ok(Json(List::new(files.items.into_iter().map(File::from).collect(), files.has_more)))
}

/// Get a file's row.
#[utoipa::path(
    get, path = "/v1/files/{file_id}", operation_id = "get_file", tag = "files", params(("file_id" = String, Path)),
    responses(
        (status = 200, description = "The file", body = File),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
        (status = 404, description = "The project has no such file", body = ErrorBody),
    )
)]
pub(crate) async fn get_file(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(file_id): Path<String>,
) -> Result<Json<File>, ApiError> {
    Ok(Json(find(&state, tenant, &file_id).await?.into()))
}

/// Get a file's bytes.
#[utoipa::path(
    get, path = "/v1/files/{file_id}/content", operation_id = "get_file_content", tag = "files", params(("file_id" = String, Path)),
    responses(
        (status = 200, description = "Its bytes", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
        (status = 404, description = "The project has no such file", body = ErrorBody),
    )
)]
pub(crate) async fn get_file_content(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(file_id): Path<String>,
) -> Result<Response, ApiError> {
    let file = find(&state, tenant, &file_id).await?;
    let stream = state.store.objects().read(&file.object.key).await?;
    let headers =
        [(header::CONTENT_TYPE, "application/octet-stream".to_owned()), (header::CONTENT_LENGTH, file.object.bytes.to_string())];
    Ok((headers, Body::from_stream(stream)).into_response())
}

/// Delete a file.
#[utoipa::path(
    delete, path = "/v1/files/{file_id}", operation_id = "delete_file", tag = "files", params(("file_id" = String, Path)),
    responses(
        (status = 200, description = "It is gone", body = DeletedFile),
        (status = 400, description = "A job that has not ended needs it", body = ErrorBody),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
        (status = 404, description = "The project has no such file", body = ErrorBody),
    )
)]
pub(crate) async fn delete_file(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(file_id): Path<String>,
) -> Result<Json<DeletedFile>, ApiError> {
    let id: FileId = extract::id("file_id", &file_id)?;
    state.store.delete_file(tenant.0, id).await.map_err(|e| not_found(e, &file_id))?;
    Ok(Json(DeletedFile { id, object: "file", deleted: true }))
}

async fn find(state: &AppState, tenant: Tenant, file_id: &str) -> Result<holdfast_store::files::File, ApiError> {
    let id = extract::id("file_id", file_id)?;
    state.store.file(tenant.0, id).await.map_err(|e| not_found(e, file_id))
}

fn not_found(error: StoreError, file_id: &str) -> ApiError {
    match error {
        StoreError::NotFound => ApiError::not_found("file_id", file_id),
        other => other.into(),
    }
}
