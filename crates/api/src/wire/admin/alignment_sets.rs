//! Alignment sets, which operators alone read.

use holdfast_store::alignment_sets::AlignmentSet as AlignmentSetRow;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::wire::list::Listed;

/// A version of an alignment set.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AlignmentSet {
    /// Its name and version.
    #[schema(example = "default@3")]
    id: String,
    #[schema(example = "alignment_set")]
    object: &'static str,
    #[schema(example = "default")]
    name: String,
    version: i32,
    rows: u64,
    /// The hash of its rows.
    #[schema(example = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")]
    sha256: String,
    /// Base models whose template some of its rows do not fit, looked at when it is imported: their jobs would fail.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    misfits: Vec<Misfit>,
}

/// A base model that an alignment set cannot be used with.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Misfit {
    #[schema(example = "gemma-3-4b-it")]
    model: String,
    /// Which rows do not fit it, and why.
    problem: String,
}

/// A request and the answer to hold to.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes rows that are checked as they are")]
pub(crate) struct AlignmentRow {
    /// At least one of the user's; the last is the assistant's.
    #[schema(min_items = 2)]
    messages: Vec<AlignmentMessage>,
}

/// A message of such a row.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes rows that are checked as they are")]
pub(crate) struct AlignmentMessage {
    /// `system`, `user` or `assistant`.
    #[schema(example = "user", pattern = "^(system|user|assistant)$")]
    role: String,
    #[schema(example = "How do I do that?", min_length = 1)]
    content: String,
}

/// A request for an alignment set.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateAlignmentSet {
    /// As base models are named.
    #[schema(example = "strict", max_length = 128, pattern = "^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$")]
    pub(crate) name: String,
    /// Chat rows, each a request and the answer to hold to.
    #[schema(value_type = Vec<AlignmentRow>, min_items = 1)]
    pub(crate) rows: Vec<serde_json::Value>,
}

impl From<AlignmentSetRow> for AlignmentSet {
    fn from(row: AlignmentSetRow) -> Self {
        Self::new(row, Vec::new())
    }
}

impl AlignmentSet {
    /// One that was imported now.
    pub(crate) fn new(row: AlignmentSetRow, misfits: Vec<crate::tokenizers::Misfit>) -> Self {
        Self {
            id: format!("{}@{}", row.name, row.version),
            object: "alignment_set",
            name: row.name,
            version: row.version,
            rows: row.row_count,
            sha256: hex::encode(row.object.sha256),
            misfits: misfits.into_iter().map(|misfit| Misfit { model: misfit.model, problem: misfit.problem }).collect(),
        }
    }
}

impl Listed for AlignmentSet {
    fn id(&self) -> String {
        self.id.clone()
    }
}
