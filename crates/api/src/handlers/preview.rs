//! The first rows of a file as a model is shown them, for a look before a job is paid for.

use axum::Json;
use axum::extract::State;
use futures::TryStreamExt;
use holdfast_dataset::Row;
use holdfast_dataset::encode::EncodeOptions;
use holdfast_dataset::lines::{Line, LineSplitter};
use holdfast_domain::hyperparameters::LongRows;
use holdfast_store::StoreError;

use crate::auth::Tenant;
use crate::error::ErrorBody;
use crate::extract::{Path, QueryString};
use crate::handlers::files;
use crate::handlers::jobs::base_of;
use crate::wire::preview::{FilePreview, PreviewQuery, PreviewRow};
use crate::{ApiError, AppState};

/// Show the first rows of a file as a model is shown them: rendered by its chat template, with what counts towards the loss marked.
#[utoipa::path(
    get, path = "/v1/files/{file_id}/preview", operation_id = "preview_file", tag = "files",
    params(("file_id" = String, Path, example = "file-0192f3a4000070008000000000000001"), PreviewQuery),
    responses(
        (status = 200, description = "Extension: the rows", body = FilePreview),
        (status = 404, description = "The project has no such file, or there is no such model", body = ErrorBody),
    )
)]
pub(crate) async fn preview_file(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(file_id): Path<String>,
    QueryString(query): QueryString<PreviewQuery>,
) -> Result<Json<FilePreview>, ApiError> {
    let limit = bounded("limit", query.limit.unwrap_or(3), 1, 20)?;
    let max_length = bounded("max_length", query.max_length.unwrap_or(1024), 16, 131_072)?;
    let file = files::find(&state, tenant, &file_id).await?;
    let base = base_of(&state, tenant, &query.model).await?;
    let _turn = state.tokenizers.turn()?;
    let known = state.tokenizers.get(&state.store, &base).await?;
    let lines = first_lines(&state, file.content.keys, limit as usize).await?;
    let with_tokens = query.include_tokens.unwrap_or(false);
    let options = EncodeOptions { max_length: max_length as usize, long_rows: LongRows::Truncate };
    let render = move || {
        let show = |(number, line): (u64, Option<Vec<u8>>)| {
            let line = line.as_deref().map_or(Line::TooLong, Line::Whole);
            let row = Row::parse_line(line).map_err(|e| e.to_string());
            match row.and_then(|row| known.tokenizer.preview(&row, options).map_err(|e| e.to_string())) {
                Ok(preview) => PreviewRow::new(number, preview, with_tokens),
                Err(error) => PreviewRow::bad(number, error),
            }
        };
        lines.into_iter().map(show).collect()
    };
    let rows = tokio::task::spawn_blocking(render).await.map_err(|e| ApiError::internal(&e))?;
    Ok(Json(FilePreview { object: "file.preview", file: file.id, model: query.model, rows }))
}

fn bounded(param: &str, value: u32, least: u32, most: u32) -> Result<u32, ApiError> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(ApiError::invalid(param, "out_of_bounds", format!("{param} must lie between {least} and {most}; it is {value}")))
}

/// The first lines of a file with their numbers; `None` for one that is too long to be read. No more of the file is read.
async fn first_lines(state: &AppState, keys: Vec<String>, count: usize) -> Result<Vec<(u64, Option<Vec<u8>>)>, ApiError> {
    let mut pieces = state.store.objects().read_all(keys);
    let (mut splitter, mut lines) = (LineSplitter::default(), Vec::new());
    let mut keep = |number: u64, line: Line<'_>| {
        if lines.len() < count {
            lines.push((
                number,
                match line {
                    Line::Whole(bytes) => Some(bytes.to_vec()),
                    Line::TooLong => None,
                },
            ));
        }
        lines.len()
    };
    let mut kept = 0;
    while let Some(piece) = pieces.try_next().await.map_err(StoreError::from)? {
        splitter.push(&piece, |number, line| kept = keep(number, line));
        if kept >= count {
            return Ok(lines);
        }
    }
    splitter.finish(|number, line| kept = keep(number, line));
    Ok(lines)
}
