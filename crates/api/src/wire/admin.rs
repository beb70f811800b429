//! What operators see and change.

use std::time::Duration;

use holdfast_domain::Invalid;
use holdfast_domain::ids::{AuditId, JobId, KeyId, MemberId, ProjectId};
use holdfast_store::alignment_sets::AlignmentSet as AlignmentSetRow;
use holdfast_store::audit::Entry;
use holdfast_store::base_models::BaseModel as BaseModelRow;
use holdfast_store::keys::{ApiKey as SecretKey, KeyRow};
use holdfast_store::projects::{
    Member as MemberRow, Organization as OrganizationRow, Project as ProjectRow, Quotas as QuotasRow, Usage as UsageRow,
};
use holdfast_store::workers::Worker as WorkerRow;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::list::Listed;

/// An organisation: it owns projects, and its name is a part of their models' names.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Organization {
    /// Its name.
    #[schema(example = "acme")]
    id: String,
    #[schema(example = "organization")]
    object: &'static str,
    /// In Unix seconds.
    created_at: i64,
}

impl From<OrganizationRow> for Organization {
    fn from(row: OrganizationRow) -> Self {
        Self { id: row.name, object: "organization", created_at: row.created_at.unix_timestamp() }
    }
}

impl Listed for Organization {
    fn id(&self) -> String {
        self.id.clone()
    }
}

/// A request for an organisation.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateOrganization {
    /// Letters, digits, `.`, `_` and `-`; it cannot be changed.
    #[schema(example = "acme", pattern = "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")]
    pub(crate) name: String,
}

/// A person of an organisation.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Member {
    #[schema(value_type = String, example = "mem_0192f3a4000070008000000000000001")]
    id: MemberId,
    #[schema(example = "organization.member")]
    object: &'static str,
    #[schema(example = "acme")]
    organization: String,
    #[schema(example = "jo@example.com")]
    name: String,
    /// In Unix seconds.
    created_at: i64,
}

impl From<MemberRow> for Member {
    fn from(row: MemberRow) -> Self {
        Self {
            id: row.id,
            object: "organization.member",
            organization: row.organization,
            name: row.name,
            created_at: row.created_at.unix_timestamp(),
        }
    }
}

impl Listed for Member {
    fn id(&self) -> String {
        self.id.to_string()
    }
}

/// A request for a member.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateMember {
    /// What people call them: an address or a login.
    #[schema(example = "jo@example.com", min_length = 1, max_length = 128, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]*$")]
    pub(crate) name: String,
}

/// The news that something is gone.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DeletedMember {
    #[schema(value_type = String, example = "mem_0192f3a4000070008000000000000001")]
    pub(crate) id: MemberId,
    #[schema(example = "organization.member")]
    pub(crate) object: &'static str,
    pub(crate) deleted: bool,
}

/// What a project may use at most; an absent value is no limit.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Quotas {
    /// Bytes of its files, and of uploads under way.
    #[schema(maximum = 9_223_372_036_854_775_807_u64, example = 107_374_182_400_u64)]
    max_stored_bytes: Option<u64>,
    /// Jobs that wait to be checked or trained, paused ones among them.
    #[schema(maximum = 9_223_372_036_854_775_807_u64, example = 100)]
    max_queued_jobs: Option<u64>,
    /// Jobs that train at a time.
    #[schema(maximum = 9_223_372_036_854_775_807_u64, example = 4)]
    max_running_jobs: Option<u64>,
    /// Tokens of training files, read by jobs created in one calendar month (UTC).
    #[schema(maximum = 9_223_372_036_854_775_807_u64, example = 1_000_000_000_u64)]
    max_trained_tokens_per_month: Option<u64>,
}

impl TryFrom<Quotas> for QuotasRow {
    type Error = Invalid;

    fn try_from(q: Quotas) -> Result<Self, Invalid> {
        let bounded = |param: &str, value: Option<u64>| {
            let message = format!("{param} must lie between 0 and {}", i64::MAX);
            match value {
                Some(value) if i64::try_from(value).is_err() => Err(Invalid::new(param, "out_of_bounds", message)),
                value => Ok(value),
            }
        };
        Ok(Self {
            max_stored_bytes: bounded("max_stored_bytes", q.max_stored_bytes)?,
            max_queued_jobs: bounded("max_queued_jobs", q.max_queued_jobs)?,
            max_running_jobs: bounded("max_running_jobs", q.max_running_jobs)?,
            max_trained_tokens_per_month: bounded("max_trained_tokens_per_month", q.max_trained_tokens_per_month)?,
        })
    }
}

impl From<QuotasRow> for Quotas {
    fn from(q: QuotasRow) -> Self {
        Self {
            max_stored_bytes: q.max_stored_bytes,
            max_queued_jobs: q.max_queued_jobs,
            max_running_jobs: q.max_running_jobs,
            max_trained_tokens_per_month: q.max_trained_tokens_per_month,
        }
    }
}

/// What a project uses.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(crate) struct Usage {
    stored_bytes: u64,
    queued_jobs: u64,
    running_jobs: u64,
    trained_tokens_this_month: u64,
}

impl From<UsageRow> for Usage {
    fn from(u: UsageRow) -> Self {
        Self {
            stored_bytes: u.stored_bytes,
            queued_jobs: u.queued_jobs,
            running_jobs: u.running_jobs,
            trained_tokens_this_month: u.trained_tokens_this_month,
        }
    }
}

/// A project: it owns files, jobs and models, and keys act for it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Project {
    #[schema(value_type = String, example = "proj_0192f3a4000070008000000000000001")]
    id: ProjectId,
    #[schema(example = "organization.project")]
    object: &'static str,
    #[schema(example = "reviews")]
    name: String,
    #[schema(example = "acme")]
    organization: String,
    /// In Unix seconds.
    created_at: i64,
    quotas: Quotas,
    /// What it uses; shown of one project by itself.
    usage: Option<Usage>,
}

impl Project {
    pub(crate) fn new(row: ProjectRow, usage: Option<UsageRow>) -> Self {
        Self {
            id: row.id,
            object: "organization.project",
            name: row.name,
            organization: row.organization,
            created_at: row.created_at.unix_timestamp(),
            quotas: row.quotas.into(),
            usage: usage.map(Usage::from),
        }
    }
}

impl Listed for Project {
    fn id(&self) -> String {
        self.id.to_string()
    }
}

/// A request for a project.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateProject {
    /// Of which the organisation has one.
    #[schema(example = "reviews", pattern = "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")]
    pub(crate) name: String,
    #[schema(example = "acme")]
    pub(crate) organization: String,
    pub(crate) quotas: Option<Quotas>,
}

/// Which projects.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListProjects {
    /// Only those of this organisation.
    pub(crate) organization: Option<String>,
    /// The `last_id` of the page before.
    #[param(pattern = "^proj_[0-9a-f]{32}$")]
    pub(crate) after: Option<String>,
    /// 1 to 100.
    #[param(default = 20, minimum = 1, maximum = 100)]
    pub(crate) limit: Option<u32>,
}

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

/// A base model, as operators see it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BaseModel {
    /// Its name.
    #[schema(example = "SmolLM2-135M-Instruct")]
    id: String,
    #[schema(example = "base_model")]
    object: &'static str,
    /// Numbers in all its tensors.
    parameter_count: u64,
    /// The most tokens it can see at once.
    context_length: Option<u32>,
    /// In Unix seconds.
    created_at: i64,
}

impl From<BaseModelRow> for BaseModel {
    fn from(row: BaseModelRow) -> Self {
        Self {
            id: row.name,
            object: "base_model",
            parameter_count: row.parameter_count,
            context_length: row.context_length,
            created_at: row.created_at.unix_timestamp(),
        }
    }
}

impl Listed for BaseModel {
    fn id(&self) -> String {
        self.id.clone()
    }
}

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
    #[schema(example = "strict")]
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

/// A worker.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Worker {
    /// Its name.
    #[schema(example = "gpu-7-4711")]
    id: String,
    #[schema(example = "worker")]
    object: &'static str,
    #[schema(example = "cuda:0")]
    device: String,
    #[schema(example = "0.1.0")]
    version: String,
    /// Whether it was heard of in the last minute.
    alive: bool,
    /// What it works on.
    #[schema(value_type = Option<String>, example = "ftjob-0192f3a4000070008000000000000001")]
    job: Option<JobId>,
    /// In Unix seconds.
    started_at: i64,
    /// In Unix seconds.
    seen_at: i64,
}

impl From<WorkerRow> for Worker {
    fn from(row: WorkerRow) -> Self {
        Self {
            id: row.name,
            object: "worker",
            device: row.device,
            version: row.version,
            alive: row.is_alive,
            job: row.job,
            started_at: row.started_at.unix_timestamp(),
            seen_at: row.seen_at.unix_timestamp(),
        }
    }
}

impl Listed for Worker {
    fn id(&self) -> String {
        self.id.clone()
    }
}

/// An entry of the audit log: a call that changed something, or tried to.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AuditEntry {
    #[schema(value_type = String, example = "audit_0192f3a4000070008000000000000001")]
    id: AuditId,
    #[schema(example = "audit_entry")]
    object: &'static str,
    /// In Unix seconds.
    at: i64,
    /// The key that called; absent for a command on the operator's own machine.
    #[schema(value_type = Option<String>, example = "key_0192f3a4000070008000000000000001")]
    key: Option<KeyId>,
    /// The key's first characters, or who ran the command.
    #[schema(example = "hf-1f0a9")]
    actor: String,
    #[schema(value_type = Option<String>, example = "proj_0192f3a4000070008000000000000001")]
    project: Option<ProjectId>,
    /// The project an operator's call acted on.
    #[schema(value_type = Option<String>, example = "proj_0192f3a4000070008000000000000001")]
    acted_on: Option<ProjectId>,
    /// What was called, by its operation id.
    #[schema(example = "create_fine_tuning_job")]
    operation: String,
    /// On what.
    #[schema(example = "/v1/fine_tuning/jobs/ftjob-0192f3a4000070008000000000000001")]
    target: String,
    /// From where.
    #[schema(example = "192.0.2.7")]
    address: String,
    #[schema(example = "0b1f9c2e-6a58-4c6f-9a61-1d5c7b1d2b11")]
    request_id: String,
    /// The status of the answer.
    #[schema(example = 200)]
    status: u16,
    /// The error's code, where it was refused.
    #[schema(example = "insufficient_scope")]
    code: Option<String>,
}

impl From<Entry> for AuditEntry {
    fn from(Entry { id, at, entry }: Entry) -> Self {
        Self {
            id,
            object: "audit_entry",
            at: at.unix_timestamp(),
            key: entry.key,
            actor: entry.actor,
            project: entry.project,
            acted_on: entry.acted_on,
            operation: entry.operation,
            target: entry.target,
            address: entry.address,
            request_id: entry.request_id,
            status: entry.status,
            code: entry.code,
        }
    }
}

impl Listed for AuditEntry {
    fn id(&self) -> String {
        self.id.to_string()
    }
}

/// Which entries.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListAuditEntries {
    /// Only those for this project, or on it.
    #[param(pattern = "^proj_[0-9a-f]{32}$")]
    pub(crate) project: Option<String>,
    /// Only those of this key.
    #[param(pattern = "^key_[0-9a-f]{32}$")]
    pub(crate) key: Option<String>,
    /// Only those of this operation id.
    pub(crate) operation: Option<String>,
    /// Not before this, in Unix seconds.
    #[param(minimum = 0, maximum = 253_402_300_799_i64)]
    pub(crate) since: Option<i64>,
    /// Before this, in Unix seconds.
    #[param(minimum = 0, maximum = 253_402_300_799_i64)]
    pub(crate) until: Option<i64>,
    /// `true` for what was done, `false` for what was refused or failed.
    pub(crate) succeeded: Option<bool>,
    /// The `last_id` of the page before.
    #[param(pattern = "^audit_[0-9a-f]{32}$")]
    pub(crate) after: Option<String>,
    /// 1 to 100.
    #[param(default = 20, minimum = 1, maximum = 100)]
    pub(crate) limit: Option<u32>,
}
