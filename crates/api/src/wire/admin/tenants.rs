//! Organisations, their members and their projects.

use holdfast_domain::Invalid;
use holdfast_domain::ids::{MemberId, ProjectId};
use holdfast_store::projects::{
    Member as MemberRow, Organization as OrganizationRow, Project as ProjectRow, Quotas as QuotasRow, Usage as UsageRow,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::wire::list::Listed;

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
