//! What came of what operators demand: adapters that did not pass, the keys that vouch for those that did, and how often gradients
//! conflict on clean rows.

use holdfast_domain::ids::{JobId, ProjectId};
use holdfast_store::conflict_levels::ConflictLevel as ConflictLevelRow;
use holdfast_store::evidence::SigningKey as SigningKeyRow;
use holdfast_store::quarantine::Quarantined as QuarantinedRow;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};

use super::list::Listed;

/// An adapter that did not pass the gate.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct QuarantinedAdapter {
    /// The job that made it.
    #[schema(value_type = String, example = "ftjob-0192f3a4000070008000000000000001")]
    id: JobId,
    #[schema(example = "quarantined_adapter")]
    object: &'static str,
    #[schema(value_type = String, example = "proj_0192f3a4000070008000000000000001")]
    project: ProjectId,
    organization: String,
    /// What the model is called once it is released.
    model: String,
    /// Why it is kept apart; absent where only checkpoints of the job were.
    reason: Option<String>,
    /// In Unix seconds.
    created_at: i64,
    /// When it was released, in Unix seconds.
    released_at: Option<i64>,
    /// Why it was.
    release_reason: Option<String>,
    /// When its files were discarded, in Unix seconds.
    discarded_at: Option<i64>,
}

impl From<QuarantinedRow> for QuarantinedAdapter {
    fn from(row: QuarantinedRow) -> Self {
        Self {
            id: row.job,
            object: "quarantined_adapter",
            project: row.project,
            organization: row.organization,
            model: row.model,
            reason: row.reason,
            created_at: row.created_at.unix_timestamp(),
            released_at: row.released.as_ref().map(|release| release.at.unix_timestamp()),
            release_reason: row.released.map(|release| release.reason),
            discarded_at: row.discarded_at.map(OffsetDateTime::unix_timestamp),
        }
    }
}

impl Listed for QuarantinedAdapter {
    fn id(&self) -> String {
        self.id.to_string()
    }
}

/// Which of them.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListQuarantined {
    /// The `last_id` of the page before.
    #[param(pattern = "^ftjob-[0-9a-f]{32}$")]
    pub(crate) after: Option<String>,
    /// 1 to 100.
    #[param(default = 20, minimum = 1, maximum = 100)]
    pub(crate) limit: Option<u32>,
    /// Also those that were released or discarded.
    #[param(default = false)]
    pub(crate) released: Option<bool>,
}

/// An operator's word that an adapter may go to its owner.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReleaseAdapter {
    /// Why, for its owner.
    #[schema(
        min_length = 1,
        max_length = 1000,
        pattern = "^[^\\x00]*$",
        example = "Read by a person; the answers are harmless."
    )]
    pub(crate) reason: String,
}

/// A public key that manifests are signed with.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SigningKey {
    /// SHA-256 of its bytes, in hex: what signatures name it by.
    id: String,
    #[schema(example = "signing_key")]
    object: &'static str,
    /// In PEM.
    public_key: String,
    /// In Unix seconds.
    created_at: i64,
}

impl From<SigningKeyRow> for SigningKey {
    fn from(row: SigningKeyRow) -> Self {
        Self { id: row.id, object: "signing_key", public_key: row.pem, created_at: row.created_at.unix_timestamp() }
    }
}

impl Listed for SigningKey {
    fn id(&self) -> String {
        self.id.clone()
    }
}

/// How often gradients conflict on clean rows of a base model under a method.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ConflictLevel {
    /// The base model's name, the method and the positions of its KL.
    #[schema(example = "smollm2:safegrad:deciding")]
    id: String,
    #[schema(example = "conflict_level")]
    object: &'static str,
    /// The base model's name.
    base_model: String,
    /// The method.
    #[schema(example = "safegrad")]
    defense: String,
    /// The positions its KL covers.
    #[schema(example = "deciding")]
    kl_positions: String,
    /// The mean share of a clean run's steps, 0 to 1.
    clean_rate: f64,
    /// The share of a long run's steps above which it alarms, 0 to 1; of a short one it is higher.
    alarm_level: f64,
    /// Jobs that it was measured on.
    jobs: u64,
    /// In Unix seconds.
    measured_at: i64,
}

impl From<ConflictLevelRow> for ConflictLevel {
    fn from(row: ConflictLevelRow) -> Self {
        Self {
            id: format!("{}:{}:{}", row.base_model, row.defense, row.kl_positions),
            object: "conflict_level",
            base_model: row.base_model,
            defense: row.defense,
            kl_positions: row.kl_positions,
            clean_rate: row.clean.mean,
            alarm_level: row.clean.level(),
            jobs: row.jobs,
            measured_at: row.measured_at.unix_timestamp(),
        }
    }
}

impl Listed for ConflictLevel {
    fn id(&self) -> String {
        self.id.clone()
    }
}

/// A request to measure a base model's level under a method.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MeasureConflictLevel {
    /// The base model's name.
    pub(crate) base_model: String,
    /// Jobs of this base whose rows are known to be clean, 50 steps long at least, all of one method and one choice of KL positions: the
    /// level counts for jobs like them.
    #[schema(min_items = 1, max_items = 100)]
    pub(crate) clean_jobs: Vec<String>,
}
