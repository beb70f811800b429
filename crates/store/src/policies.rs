//! Operators' safety policies: of the deployment, of organisations and of projects, each a row of versions that only grows.

use holdfast_domain::Invalid;
use holdfast_domain::ids::ProjectId;
use holdfast_domain::policy::{AppliedPolicy, Policy, Scope};
use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::error::{from_json, to_json};
use crate::{Store, StoreError};

/// Whose policy is spoken of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// Everybody's.
    Deployment,
    /// An organisation's.
    Organization(String),
    /// A project's.
    Project(ProjectId),
}

impl Subject {
    const fn scope(&self) -> Scope {
        match self {
            Self::Deployment => Scope::Deployment,
            Self::Organization(_) => Scope::Organization,
            Self::Project(_) => Scope::Project,
        }
    }

    /// As the table names it.
    fn name(&self) -> String {
        match self {
            Self::Deployment => String::new(),
            Self::Organization(name) => name.clone(),
            Self::Project(id) => id.0.to_string(),
        }
    }
}

/// A version of a scope's policy.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyVersion {
    /// From 1.
    pub version: u32,
    /// `None`: from here on the scope has none, and the wider one's counts.
    pub policy: Option<Policy>,
    /// When it was set.
    pub created_at: OffsetDateTime,
}

/// One candidate of [`Store::policy_of`].
struct Row {
    scope: String,
    version: i32,
    policy: Value,
}

impl Store {
    /// The policy that counts for a project's jobs: its own, else its organisation's, else the deployment's; `None` where none is
    /// set.
    ///
    /// # Errors
    /// When there is no such project, or the database fails.
    pub async fn policy_of(&self, project: ProjectId) -> Result<Option<AppliedPolicy>, StoreError> {
        self.policy_for(&Subject::Project(project)).await
    }

    /// The policy that counts for a subject, as [`Self::policy_of`] has it for a project.
    ///
    /// # Errors
    /// When there is no such subject, or the database fails.
    pub async fn policy_for(&self, subject: &Subject) -> Result<Option<AppliedPolicy>, StoreError> {
        let wider = self.wider(subject).await?;
        self.nearest(&[std::slice::from_ref(subject), &wider].concat()).await
    }

    /// The policy that would count for a subject that had none of its own; `None` where no wider one is set.
    ///
    /// # Errors
    /// When there is no such subject, or the database fails.
    pub async fn policy_above(&self, subject: &Subject) -> Result<Option<AppliedPolicy>, StoreError> {
        self.nearest(&self.wider(subject).await?).await
    }

    /// Whose policies count where a subject has none, the nearest first.
    async fn wider(&self, subject: &Subject) -> Result<Vec<Subject>, StoreError> {
        Ok(match subject {
            Subject::Project(project) => {
                vec![Subject::Organization(self.project(*project).await?.organization), Subject::Deployment]
            }
            Subject::Organization(_) => {
                self.known(subject).await?;
                vec![Subject::Deployment]
            }
            Subject::Deployment => Vec::new(),
        })
    }

    async fn nearest(&self, subjects: &[Subject]) -> Result<Option<AppliedPolicy>, StoreError> {
        let scopes: Vec<String> = subjects.iter().map(|subject| subject.scope().as_str().to_owned()).collect();
        let names: Vec<String> = subjects.iter().map(Subject::name).collect();
        let row = sqlx::query_as!(
            Row,
            "select n.scope as \"scope!\", n.version as \"version!\", n.policy as \"policy!\"
             from unnest($1::text[], $2::text[]) with ordinality s (scope, subject, place)
             cross join lateral (
                 select p.scope, p.version, p.policy from safety_policies p
                 where p.scope = s.scope and p.subject = s.subject order by p.version desc limit 1) n
             where n.policy is not null order by s.place limit 1",
            &scopes,
            &names
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| {
            let scope = Scope::parse(&row.scope).ok_or_else(|| StoreError::Corrupt("the scope of a safety policy".into()))?;
            Ok(AppliedPolicy { scope, version: row.version.unsigned_abs(), policy: from_json(row.policy)? })
        })
        .transpose()
    }

    /// A version of a subject's own policy, also one that counts no more.
    ///
    /// # Errors
    /// When there is no such subject, none was set under that number, or it took the policy away, or the database fails.
    pub async fn policy_version(&self, subject: &Subject, version: u32) -> Result<AppliedPolicy, StoreError> {
        let policy = sqlx::query_scalar!(
            "select policy from safety_policies where scope = $1 and subject = $2 and version = $3",
            subject.scope().as_str(),
            subject.name(),
            i32::try_from(version).map_err(|_| StoreError::NotFound)?
        )
        .fetch_optional(&self.pool)
        .await?;
        let policy = policy.flatten().ok_or(StoreError::NotFound)?;
        Ok(AppliedPolicy { scope: subject.scope(), version, policy: from_json(policy)? })
    }

    /// Sets a subject's policy from now on, or takes it away. Jobs that were created before keep theirs. What is set already is no
    /// new version.
    ///
    /// # Errors
    /// When the policy contradicts itself or names an alignment set or a suite that is not there, there is no such subject, or the database
    /// fails.
    pub async fn set_policy(&self, subject: &Subject, policy: Option<&Policy>) -> Result<PolicyVersion, StoreError> {
        if let Some(policy) = policy {
            policy.check()?;
            self.has_alignment_set(policy).await?;
            self.suites_of(policy).await?;
        }
        self.known(subject).await?;
        let mut transaction = self.pool.begin().await?;
        // Two that set it at once: the second takes the next number.
        sqlx::query!("select pg_advisory_xact_lock(hashtext('safety_policies'))").execute(&mut *transaction).await?;
        let newest = newest(&mut transaction, subject).await?;
        if let Some(newest) = newest.filter(|newest| newest.policy.as_ref() == policy) {
            return Ok(newest);
        }
        let json = policy.map(to_json).transpose()?;
        sqlx::query!(
            "insert into safety_policies (scope, subject, version, policy)
             select $1, $2, coalesce(max(version), 0) + 1, $3 from safety_policies where scope = $1 and subject = $2",
            subject.scope().as_str(),
            subject.name(),
            json
        )
        .execute(&mut *transaction)
        .await?;
        let set = self::newest(&mut transaction, subject).await?.ok_or(StoreError::NotFound)?;
        transaction.commit().await?;
        Ok(set)
    }

    async fn has_alignment_set(&self, policy: &Policy) -> Result<(), StoreError> {
        if policy.methods.iter().all(|method| !method.needs_alignment()) {
            return Ok(());
        }
        match self.alignment_set(&policy.alignment_set).await {
            Ok(_) => Ok(()),
            Err(StoreError::NotFound) => {
                let message = format!("there is no alignment set {:?}; import it first", policy.alignment_set);
                Err(Invalid::new("alignment_set", "alignment_set_not_found", message).into())
            }
            Err(error) => Err(error),
        }
    }

    async fn known(&self, subject: &Subject) -> Result<(), StoreError> {
        match subject {
            Subject::Deployment => Ok(()),
            Subject::Project(id) => self.project(*id).await.map(|_| ()),
            Subject::Organization(name) => {
                let known = sqlx::query_scalar!("select 1 as one from organizations where name = $1", name)
                    .fetch_optional(&self.pool)
                    .await?;
                known.map(|_| ()).ok_or(StoreError::NotFound)
            }
        }
    }
}

async fn newest(connection: &mut PgConnection, subject: &Subject) -> Result<Option<PolicyVersion>, StoreError> {
    let row = sqlx::query!(
        "select version, policy, created_at from safety_policies where scope = $1 and subject = $2 order by version desc limit 1",
        subject.scope().as_str(),
        subject.name()
    )
    .fetch_optional(connection)
    .await?;
    row.map(|row| {
        let policy = row.policy.map(from_json).transpose()?;
        Ok(PolicyVersion { version: row.version.unsigned_abs(), policy, created_at: row.created_at })
    })
    .transpose()
}
