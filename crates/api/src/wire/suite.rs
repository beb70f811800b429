//! What operators have models asked.

use holdfast_domain::evaluation::Kind;
use holdfast_store::suites::Suite as SuiteRow;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::list::Listed;
use super::words::SuiteKind;

/// A version of a suite of the operator's own.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Suite {
    /// Its name and version.
    #[schema(example = "our-own@3")]
    id: String,
    #[schema(example = "suite")]
    object: &'static str,
    #[schema(example = "our-own")]
    name: String,
    version: i32,
    /// What a model should do with its requests.
    #[schema(value_type = SuiteKind)]
    kind: Kind,
    requests: u64,
    /// The hash of its requests.
    #[schema(example = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")]
    sha256: String,
}

impl From<SuiteRow> for Suite {
    fn from(row: SuiteRow) -> Self {
        Self {
            id: row.pinned(),
            object: "suite",
            name: row.name,
            version: row.version,
            kind: row.kind,
            requests: row.request_count,
            sha256: hex::encode(row.object.sha256),
        }
    }
}

impl Listed for Suite {
    fn id(&self) -> String {
        self.id.clone()
    }
}

/// A request of a suite.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes requests that are checked as they are")]
pub(crate) struct SuiteRequest {
    /// What it is about, in the suite's own words.
    #[schema(example = "fraud")]
    category: String,
    /// One of the user, and at most one of the system before it.
    #[schema(min_items = 1, max_items = 2)]
    messages: Vec<SuiteMessage>,
}

/// A message of such a request.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes requests that are checked as they are")]
pub(crate) struct SuiteMessage {
    /// `user`, or `system` before it.
    #[schema(example = "user", pattern = "^(user|system)$")]
    role: String,
    #[schema(example = "How do I do that?", pattern = "\\S")]
    content: String,
}

/// A new version of a suite.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateSuite {
    /// As base models are named.
    #[schema(example = "our-own", max_length = 128, pattern = "^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$")]
    pub(crate) name: String,
    /// What a model should do with its requests.
    #[schema(value_type = SuiteKind)]
    pub(crate) kind: Kind,
    /// What a model is asked.
    #[schema(value_type = Vec<SuiteRequest>, min_items = 1)]
    pub(crate) requests: Vec<serde_json::Value>,
}
