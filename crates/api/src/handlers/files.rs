//! Files: uploaded as a stream, checked on the way, and kept with every bad line they have.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::extract::multipart::{Field, Multipart, MultipartRejection};
use axum::response::{IntoResponse, Redirect, Response};
use holdfast_dataset::Report;
use holdfast_dataset::structure::StructureCheck;
use holdfast_domain::ids::FileId;
use holdfast_store::files::{BadLines, NewFile};
use holdfast_store::{Content, ObjectRef, StoreError};
use http::{HeaderMap, header};
use sha2::{Digest, Sha256};

use crate::auth::Tenant;
use crate::download::{Download, Segment};
use crate::error::ErrorBody;
use crate::extract::{self, Path, QueryString};
use crate::handlers::form::{self, Form};
use crate::repeatable::Repeatable;
use crate::wire::file::{Bytes, DeletedFile, File, ListFiles, Order, UploadForm};
use crate::wire::list::{Created, List};
use crate::{ApiError, AppState, telemetry};

/// A file that has been written but has no row yet.
struct Staged {
    id: FileId,
    filename: String,
    object: ObjectRef,
    check: StructureCheck,
}

/// A form as it came.
#[derive(Default)]
struct Fields {
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
    staged: Option<Staged>,
}

/// Upload a file.
///
/// The dataset's shape is checked while it streams in. A file with bad lines is kept with the status `error`, and names every one
/// of them with its number, a JSON path, and what was expected there; no job takes such a file.
#[utoipa::path(
    post, path = "/v1/files", operation_id = "create_file", tag = "files",
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "The file", body = File),
        (status = 413, description = "The file is larger than this deployment takes", body = ErrorBody),
    )
)]
pub(crate) async fn create_file(
    tenant: Tenant,
    State(state): State<AppState>,
    repeatable: Repeatable,
    form: Result<Multipart, MultipartRejection>,
) -> Result<Created<File>, ApiError> {
    let mut form = Form::new(form)?;
    let mut fields = Fields::default();
    let read = read_form(&state, tenant, &mut form, &mut fields).await;
    let mut staged = fields.staged.take();
    let accepted = match read {
        Ok(()) => create(&state, tenant, repeatable, &fields, staged.as_mut()).await,
        Err(error) => Err(error),
    };
    // What was refused, or was here before, leaves nothing behind.
    if let Some(staged) = &staged
        && accepted.as_ref().map_or(true, |file| file.id != staged.id)
    {
        state.store.objects().discard(&staged.object).await;
    }
    let file = accepted?;
    telemetry::uploaded(file.content.bytes);
    Ok(Created(file.into()))
}

/// Reads the form's fields. Some clients send the file before its purpose, so the bytes go to a staged object and everything is
/// decided after.
async fn read_form(state: &AppState, tenant: Tenant, form: &mut Form, fields: &mut Fields) -> Result<(), ApiError> {
    while let Some(field) = form.next().await? {
        match field.name() {
            Some("purpose") => fields.purpose = Some(form::word(field).await?),
            Some("expires_after[anchor]") => fields.anchor = Some(form::word(field).await?),
            Some("expires_after[seconds]") => fields.seconds = Some(form::word(field).await?),
            Some("file") if fields.staged.is_none() => fields.staged = Some(stage(state, tenant, field).await?),
            Some("file") => {
                return Err(ApiError::invalid("file", "duplicate_field", "the form holds two files; upload one at a time"));
            }
            Some(name) if name.starts_with("expires_after") => {
                let message = "send the form's fields expires_after[anchor] and expires_after[seconds]";
                return Err(ApiError::invalid("expires_after", "invalid_form", message));
            }
            _ => {
                form::word(field).await?;
            }
        }
    }
    Ok(())
}

/// Streams a field into a staged object.
async fn stage(state: &AppState, tenant: Tenant, field: Field<'_>) -> Result<Staged, ApiError> {
    let filename = form::filename("file", field.file_name())?;
    let room = state.store.room(tenant.0).await?;
    let most = state.settings.max_upload_bytes;
    let (id, writer) = state.store.stage_upload(tenant.0).await?;
    let mut check = StructureCheck::default();
    let too_large = || match room {
        Some(room) if room < most => ApiError::quota(format!(
            "the project may store {room} bytes more, and the file is larger; delete files that are no longer needed, or ask the operator for more room"
        )),
        _ => ApiError::too_large(format!("the file is larger than the {most} bytes this deployment takes")),
    };
    let object =
        form::store(field, writer, room.map_or(most, |room| room.min(most)), too_large, |chunk| check.push(chunk)).await?;
    Ok(Staged { id, filename, object, check })
}

/// Decides whether what came can become a file, and makes it one.
async fn create(
    state: &AppState,
    tenant: Tenant,
    repeatable: Repeatable,
    fields: &Fields,
    staged: Option<&mut Staged>,
) -> Result<holdfast_store::files::File, ApiError> {
    let staged = staged.ok_or_else(|| ApiError::invalid("file", "missing", "the form has no field `file`"))?;
    let purpose = form::purpose(fields.purpose.as_deref())?;
    // What is no number is out of bounds.
    let seconds = fields.seconds.as_deref().map(|text| text.parse().unwrap_or(0));
    let lifetime = form::lifetime(fields.anchor.as_deref(), seconds)?;
    let report = std::mem::take(&mut staged.check).finish();
    let file = NewFile {
        id: staged.id,
        filename: staged.filename.clone(),
        purpose,
        row_count: report.rows,
        errors: bad_lines(report),
        lifetime,
    };
    let body = Sha256::new()
        .chain_update(staged.object.sha256)
        .chain_update(file.filename.as_bytes())
        .chain_update(format!("{:?}", file.lifetime))
        .finalize();
    let once = repeatable.with_body(body.into());
    Ok(state.store.create_file(tenant.0, &file, &staged.object.clone().into(), Some(&once)).await?)
}

/// The bad lines a check found.
pub(crate) fn bad_lines(report: Report) -> Option<BadLines> {
    (report.error_count > 0).then_some(BadLines { count: report.error_count, lines: report.errors })
}

/// List files.
#[utoipa::path(
    get, path = "/v1/files", operation_id = "list_files", tag = "files", params(ListFiles),
    responses((status = 200, description = "A page of the project's files", body = List<File>))
)]
pub(crate) async fn list_files(
    tenant: Tenant,
    State(state): State<AppState>,
    QueryString(query): QueryString<ListFiles>,
) -> Result<Json<List<File>>, ApiError> {
    let ascending = query.order == Some(Order::Asc);
    let page = extract::page::<FileId>(query.after.as_deref(), query.limit, 10_000, 10_000, ascending)?;
    let files = state.store.files(tenant.0, query.purpose.as_deref(), page).await?;
    Ok(Json(List::new(files.items.into_iter().map(File::in_list).collect(), files.has_more)))
}

/// Get a file's row.
#[utoipa::path(
    get, path = "/v1/files/{file_id}", operation_id = "get_file", tag = "files",
    params(("file_id" = String, Path, example = "file-0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "The file", body = File),
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
///
/// Where the object store signs URLs the answer leads there; elsewhere the bytes come from here, and of a file that was uploaded
/// whole also a `Range` of them.
#[utoipa::path(
    get, path = "/v1/files/{file_id}/content", operation_id = "get_file_content", tag = "files",
    params(("file_id" = String, Path, example = "file-0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "Its bytes", body = Bytes, content_type = "application/octet-stream"),
        (status = 206, description = "The range that was asked for", body = Bytes, content_type = "application/octet-stream"),
        (status = 304, description = "The client has it"),
        (status = 307, description = "The file is at this URL for some minutes"),
        (status = 404, description = "The project has no such file", body = ErrorBody),
        (status = 416, description = "The file has no such range", body = ErrorBody),
    )
)]
pub(crate) async fn get_file_content(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(file_id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let file = find(&state, tenant, &file_id).await?;
    let Content { keys, bytes, sha256 } = file.content;
    let objects = state.store.objects();
    let [key] = &keys[..] else {
        let headers =
            [(header::CONTENT_TYPE, "application/octet-stream".to_owned()), (header::CONTENT_LENGTH, bytes.to_string())];
        return Ok((headers, Body::from_stream(objects.read_all(keys))).into_response());
    };
    if let Some(url) = objects.signed_url(key).await {
        return Ok(Redirect::temporary(&url).into_response());
    }
    let download = Download {
        segments: vec![Segment::Object { key: key.clone(), bytes }],
        media_type: "application/octet-stream",
        filename: file.id.to_string(),
        sha256,
    };
    download.answer(objects, &headers)
}

/// Delete a file.
#[utoipa::path(
    delete, path = "/v1/files/{file_id}", operation_id = "delete_file", tag = "files",
    params(("file_id" = String, Path, example = "file-0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "It is gone", body = DeletedFile),
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

pub(crate) async fn find(state: &AppState, tenant: Tenant, file_id: &str) -> Result<holdfast_store::files::File, ApiError> {
    let id = extract::id("file_id", file_id)?;
    state.store.file(tenant.0, id).await.map_err(|e| not_found(e, file_id))
}

fn not_found(error: StoreError, file_id: &str) -> ApiError {
    ApiError::of_one(error, "file_id", file_id)
}
