//! Keys, and what they may do.

use std::time::Duration;

use holdfast_domain::ids::{KeyId, MemberId, ProjectId};
use holdfast_store::keys::{ApiKey as SecretKey, KeyRow};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::wire::list::Listed;

/// An API key, without the key.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ApiKey {
    #[schema(value_type = String, example = "key_0192f3a4000070008000000000000001")]
    id: KeyId,
    #[schema(example = "organization.project.api_key")]
    object: &'static str,
    /// What it is for.
    #[schema(example = "nightly retraining")]
    name: String,
    /// Its first characters.
    #[schema(example = "hf-1f0a9")]
    prefix: String,
    /// The project it acts for.
    #[schema(value_type = Option<String>, example = "proj_0192f3a4000070008000000000000001")]
    project: Option<ProjectId>,
    /// Whose it is.
    #[schema(value_type = Option<String>, example = "mem_0192f3a4000070008000000000000001")]
    member: Option<MemberId>,
    /// What it lets its holder do.
    #[schema(value_type = Vec<Scope>)]
    scopes: Vec<&'static str>,
    /// Requests it may make in a minute, when that is not the deployment's number.
    requests_per_minute: Option<u32>,
    /// In Unix seconds.
    created_at: i64,
    /// In Unix seconds.
    expires_at: Option<i64>,
    /// In Unix seconds.
    revoked_at: Option<i64>,
    /// To the minute, in Unix seconds.
    last_used_at: Option<i64>,
    /// The key itself; shown once, to the one who made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "hf-1f0a9c…")]
    key: Option<String>,
}

impl ApiKey {
    pub(crate) fn new(row: KeyRow, key: Option<&SecretKey>) -> Self {
        let scopes = [(true, "read"), (row.scopes.write, "write"), (row.scopes.admin, "admin")];
        Self {
            id: row.id,
            object: "organization.project.api_key",
            name: row.name,
            prefix: row.prefix,
            project: row.project,
            member: row.member,
            scopes: scopes.into_iter().filter_map(|(has, scope)| has.then_some(scope)).collect(),
            requests_per_minute: row.requests_per_minute,
            created_at: row.created_at.unix_timestamp(),
            expires_at: row.expires_at.map(|t| t.unix_timestamp()),
            revoked_at: row.revoked_at.map(|t| t.unix_timestamp()),
            last_used_at: row.last_used_at.map(|t| t.unix_timestamp()),
            key: key.map(|key| key.reveal().to_owned()),
        }
    }
}

impl Listed for ApiKey {
    fn id(&self) -> String {
        self.id.to_string()
    }
}

/// A request for a key.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateApiKey {
    /// What it is for.
    #[schema(example = "nightly retraining", max_length = 128, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]*$")]
    pub(crate) name: Option<String>,
    /// The project it acts for; only a key with the scope `admin` may have none.
    #[schema(example = "proj_0192f3a4000070008000000000000001")]
    pub(crate) project: Option<String>,
    /// Whose it is: when that member is removed, it is revoked.
    #[schema(example = "mem_0192f3a4000070008000000000000001")]
    pub(crate) member: Option<String>,
    /// What it lets its holder do; `read` and `write` when absent. Every key reads.
    #[schema(min_items = 1)]
    pub(crate) scopes: Option<Vec<Scope>>,
    /// After how many seconds it ends: a minute to ten years.
    #[schema(minimum = 60, maximum = 315_360_000, example = 7_776_000)]
    pub(crate) expires_in_seconds: Option<u64>,
    /// Requests it may make in a minute.
    #[schema(minimum = 1, maximum = 1_000_000)]
    pub(crate) requests_per_minute: Option<u32>,
}

impl CreateApiKey {
    pub(crate) fn lifetime(&self) -> Option<Duration> {
        self.expires_in_seconds.map(Duration::from_secs)
    }
}

/// What a key lets its holder do. Every key reads. `admin` alone also changes things; `read` and `admin` together make the key of an
/// operator who only looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Scope {
    /// See what the project has.
    Read,
    /// Change it.
    Write,
    /// Act as the operator.
    Admin,
}

/// Which keys.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListApiKeys {
    /// Only those of this project.
    #[param(pattern = "^proj_[0-9a-f]{32}$")]
    pub(crate) project: Option<String>,
    /// The `last_id` of the page before.
    #[param(pattern = "^key_[0-9a-f]{32}$")]
    pub(crate) after: Option<String>,
    /// 1 to 100.
    #[param(default = 20, minimum = 1, maximum = 100)]
    pub(crate) limit: Option<u32>,
}
