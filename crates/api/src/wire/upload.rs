//! Uploads.

use holdfast_domain::ids::{PartId, UploadId};
use holdfast_store::files::File as FileRow;
use holdfast_store::uploads::{Part as PartRow, Upload as Row};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::file::File;
use super::list::Listed;
use super::words::UploadStatus;

/// A file that comes in parts.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Upload {
    #[schema(value_type = String, example = "upload_0192f3a4000070008000000000000001")]
    id: UploadId,
    #[schema(example = "upload")]
    object: &'static str,
    /// What the parts must come to.
    bytes: u64,
    /// In Unix seconds.
    created_at: i64,
    /// Until when it takes parts, in Unix seconds.
    expires_at: i64,
    #[schema(example = "train.jsonl")]
    filename: String,
    #[schema(example = "fine-tune")]
    purpose: String,
    #[schema(value_type = UploadStatus)]
    status: &'static str,
    /// What it has become, once it is completed.
    file: Option<File>,
}

impl Upload {
    pub(crate) fn new(row: Row, file: Option<FileRow>) -> Self {
        Self {
            id: row.id,
            object: "upload",
            bytes: row.bytes,
            created_at: row.created_at.unix_timestamp(),
            expires_at: row.expires_at.unix_timestamp(),
            status: row.state.as_str(),
            filename: row.filename,
            purpose: row.purpose,
            file: file.map(File::from),
        }
    }
}

impl Listed for Upload {
    fn id(&self) -> String {
        self.id.to_string()
    }
}

/// A part of an upload.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct UploadPart {
    #[schema(value_type = String, example = "part_0192f3a4000070008000000000000001")]
    id: PartId,
    #[schema(example = "upload.part")]
    object: &'static str,
    /// In Unix seconds.
    created_at: i64,
    #[schema(value_type = String, example = "upload_0192f3a4000070008000000000000001")]
    upload_id: UploadId,
}

impl UploadPart {
    pub(crate) fn new(row: &PartRow, upload: UploadId) -> Self {
        Self { id: row.id, object: "upload.part", created_at: row.created_at.unix_timestamp(), upload_id: upload }
    }
}

impl Listed for UploadPart {
    fn id(&self) -> String {
        self.id.to_string()
    }
}

/// A request for an upload.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CreateUpload {
    /// The name of the file it becomes; 255 bytes at most.
    #[schema(example = "train.jsonl", min_length = 1, max_length = 255, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]*$")]
    pub(crate) filename: String,
    /// `fine-tune`.
    #[schema(example = "fine-tune", pattern = "^fine-tune$")]
    pub(crate) purpose: String,
    /// What the parts will come to.
    #[schema(minimum = 1, example = 2_147_483_648_u64)]
    pub(crate) bytes: u64,
    /// 255 bytes at most.
    #[schema(example = "application/jsonl", max_length = 255, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]*$")]
    pub(crate) mime_type: String,
    /// When the file goes by itself.
    pub(crate) expires_after: Option<ExpiresAfter>,
}

/// When a file goes by itself.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ExpiresAfter {
    /// `created_at`: counted from the file's creation.
    #[schema(example = "created_at", pattern = "^created_at$")]
    pub(crate) anchor: String,
    /// An hour to thirty days.
    #[schema(minimum = 3_600, maximum = 2_592_000, example = 86_400)]
    pub(crate) seconds: u64,
}

/// A request to complete an upload.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CompleteUpload {
    /// The parts in the order in which they make the file.
    #[schema(example = json!(["part_0192f3a4000070008000000000000001", "part_0192f3a4000070008000000000000002"]), min_items = 1)]
    pub(crate) part_ids: Vec<String>,
    /// The MD5 of the whole file, in hexadecimal digits, to be held against what came.
    #[schema(example = "9e107d9d372bb6826bd81d3542a419d6", pattern = "^[0-9a-fA-F]{32}$")]
    pub(crate) md5: Option<String>,
}

/// The form of a part.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the form; the part is read as a stream")]
pub(crate) struct PartForm {
    /// 64 MiB at most.
    #[schema(value_type = String, format = Binary)]
    data: Vec<u8>,
}
