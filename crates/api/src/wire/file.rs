//! Files.

use holdfast_domain::ids::FileId;
use holdfast_store::files::File as Row;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::list::Listed;

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
    #[schema(example = "train.jsonl")]
    filename: String,
    #[schema(example = "fine-tune")]
    purpose: String,
    /// Always `processed`: a file whose shape is wrong is refused while it is uploaded.
    #[schema(example = "processed")]
    status: &'static str,
}

impl From<Row> for File {
    fn from(row: Row) -> Self {
        Self {
            id: row.id,
            object: "file",
            bytes: row.object.bytes,
            created_at: row.created_at.unix_timestamp(),
            filename: row.filename,
            purpose: row.purpose,
            status: "processed",
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
    #[schema(example = "fine-tune")]
    purpose: String,
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
    /// By time of upload.
    #[param(inline, default = "desc")]
    pub(crate) order: Option<Order>,
    /// The `last_id` of the page before.
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
