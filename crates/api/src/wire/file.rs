//! Files.

use std::borrow::Cow;

use holdfast_dataset::Report;
use holdfast_domain::ids::FileId;
use holdfast_domain::invalid::LineError;
use holdfast_store::files::File as Row;
use serde::{Deserialize, Serialize};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, Schema, SchemaFormat, Type};
use utoipa::{IntoParams, PartialSchema, ToSchema};

use super::list::Listed;
use super::words::FileStatus;

/// An uploaded file.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct File {
    #[schema(value_type = String, example = "file-0192f3a4000070008000000000000001")]
    id: FileId,
    #[schema(example = "file")]
    object: &'static str,
    /// Its length.
    bytes: u64,
    /// When it was uploaded, in Unix seconds.
    created_at: i64,
    /// When it goes by itself, in Unix seconds.
    expires_at: Option<i64>,
    #[schema(example = "train.jsonl")]
    filename: String,
    /// `fine-tune`, or `fine-tune-results` for what a job wrote.
    #[schema(example = "fine-tune")]
    purpose: String,
    /// A file of status `error` has bad lines and is taken by no job.
    #[schema(value_type = FileStatus)]
    status: &'static str,
    /// What is wrong, in a sentence or a few.
    #[schema(example = "1 line cannot be used; line 7: messages[0].role: expected system, developer, user, assistant or tool")]
    status_details: Option<String>,
    /// Extension: its good rows.
    rows: u64,
    /// Extension: how many bad lines there are.
    error_count: u64,
    /// Extension: the bad lines, at most 1,000; shown of one file by itself.
    #[schema(value_type = Vec<crate::error::BadLine>)]
    errors: Vec<LineError>,
}

impl File {
    /// A file as lists show it: without its bad lines, of which ten thousand files might have ten million.
    pub(crate) fn in_list(row: Row) -> Self {
        Self { errors: Vec::new(), ..Self::from(row) }
    }
}

impl From<Row> for File {
    fn from(row: Row) -> Self {
        let (error_count, errors) = row.errors.map_or((0, Vec::new()), |bad| (bad.count, bad.lines));
        let details = (error_count > 0).then(|| Report { error_count, errors: errors.clone(), ..Report::default() }.summary());
        Self {
            id: row.id,
            object: "file",
            bytes: row.content.bytes,
            created_at: row.created_at.unix_timestamp(),
            expires_at: row.expires_at.map(|t| t.unix_timestamp()),
            filename: row.filename,
            purpose: row.purpose,
            status: if error_count > 0 { "error" } else { "processed" },
            status_details: details,
            rows: row.row_count,
            error_count,
            errors,
        }
    }
}

impl Listed for File {
    fn id(&self) -> String {
        self.id.to_string()
    }
}

/// The news that a file is gone.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DeletedFile {
    #[schema(value_type = String)]
    pub(crate) id: FileId,
    #[schema(example = "file")]
    pub(crate) object: &'static str,
    pub(crate) deleted: bool,
}

/// The form of an upload. The fields may come in any order.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the form; the upload is read as a stream")]
pub(crate) struct UploadForm {
    /// JSON Lines, each {"messages": […]} or {"prompt": …, "completion": …}.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
    #[schema(example = "fine-tune", pattern = "^fine-tune$")]
    purpose: String,
    /// `created_at`: the file's life is counted from its creation.
    #[schema(rename = "expires_after[anchor]", example = "created_at", pattern = "^created_at$", nullable = false)]
    anchor: Option<String>,
    /// After how many seconds the file goes by itself: an hour to thirty days.
    #[schema(rename = "expires_after[seconds]", minimum = 3_600, maximum = 2_592_000, example = 86_400, nullable = false)]
    seconds: Option<u64>,
}

/// Which files.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListFiles {
    /// Only files of this purpose.
    pub(crate) purpose: Option<String>,
    /// 1 to 10,000.
    #[param(default = 10_000, minimum = 1, maximum = 10_000)]
    pub(crate) limit: Option<u32>,
    /// By time of upload; `desc` when absent.
    #[param(inline, value_type = Order, required = false)]
    pub(crate) order: Option<Order>,
    /// The `last_id` of the page before.
    #[param(pattern = "^file-[0-9a-f]{32}$")]
    pub(crate) after: Option<String>,
}

/// Which end of a list comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Order {
    /// Oldest first.
    Asc,
    /// Newest first.
    Desc,
}

/// Bytes.
pub(crate) struct Bytes;

impl PartialSchema for Bytes {
    fn schema() -> RefOr<Schema> {
        let binary = SchemaFormat::KnownFormat(KnownFormat::Binary);
        ObjectBuilder::new().schema_type(Type::String).format(Some(binary)).description(Some("Bytes.")).into()
    }
}

impl ToSchema for Bytes {
    fn name() -> Cow<'static, str> {
        "Bytes".into()
    }
}
