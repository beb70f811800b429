//! What operators see and change.

use holdfast_domain::ids::{AuditId, JobId, KeyId, ProjectId};
use holdfast_store::audit::Entry;
use holdfast_store::base_models::BaseModel as BaseModelRow;
use holdfast_store::workers::Worker as WorkerRow;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::list::Listed;

pub(crate) mod alignment_sets;
pub(crate) mod keys;
pub(crate) mod tenants;

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
