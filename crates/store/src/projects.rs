//! Organisations, their members and their projects, and what a project may use.

use holdfast_domain::ids::{MemberId, ProjectId};
use holdfast_domain::{Invalid, model_name};
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::once::{self, Once};
use crate::{Page, PageRequest, Store, StoreError, new_id};

/// The organisation of a project for which none is named.
pub const DEFAULT_ORGANIZATION: &str = "holdfast";

/// What a project may use at most; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quotas {
    /// Bytes of its files, and of uploads under way.
    pub max_stored_bytes: Option<u64>,
    /// Jobs that wait to be checked or trained, paused ones among them.
    pub max_queued_jobs: Option<u64>,
    /// Jobs that train at a time.
    pub max_running_jobs: Option<u64>,
    /// Tokens of training files, read or to be read by jobs created in one calendar month (UTC).
    pub max_trained_tokens_per_month: Option<u64>,
}

/// What a project uses, in the terms of [`Quotas`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// See [`Quotas::max_stored_bytes`].
    pub stored_bytes: u64,
    /// See [`Quotas::max_queued_jobs`].
    pub queued_jobs: u64,
    /// See [`Quotas::max_running_jobs`].
    pub running_jobs: u64,
    /// See [`Quotas::max_trained_tokens_per_month`].
    pub trained_tokens_this_month: u64,
}

/// A project's row.
#[derive(Debug, Clone)]
pub struct Project {
    /// Its id.
    pub id: ProjectId,
    /// Its name, of which its organisation has one.
    pub name: String,
    /// Whose it is.
    pub organization: String,
    /// What it may use.
    pub quotas: Quotas,
    /// When it was made.
    pub created_at: OffsetDateTime,
}

/// An organisation's row.
#[derive(Debug, Clone)]
pub struct Organization {
    /// Its name.
    pub name: String,
    /// When it was made.
    pub created_at: OffsetDateTime,
}

/// A member's row.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its id.
    pub id: MemberId,
    /// The organisation.
    pub organization: String,
    /// What people call them.
    pub name: String,
    /// When they came.
    pub created_at: OffsetDateTime,
}

struct Row {
    id: Uuid,
    name: String,
    organization: String,
    max_stored_bytes: Option<i64>,
    max_queued_jobs: Option<i64>,
    max_running_jobs: Option<i64>,
    max_trained_tokens_per_month: Option<i64>,
    created_at: OffsetDateTime,
}

impl From<Row> for Project {
    fn from(row: Row) -> Self {
        let quotas = Quotas {
            max_stored_bytes: row.max_stored_bytes.map(i64::unsigned_abs),
            max_queued_jobs: row.max_queued_jobs.map(i64::unsigned_abs),
            max_running_jobs: row.max_running_jobs.map(i64::unsigned_abs),
            max_trained_tokens_per_month: row.max_trained_tokens_per_month.map(i64::unsigned_abs),
        };
        let Row { id, name, organization, created_at, .. } = row;
        Self { id: ProjectId(id), name, organization, quotas, created_at }
    }
}

impl Store {
    /// The project of this name in the default organisation, made when there is none.
    ///
    /// # Errors
    /// When the name cannot be used, or the database fails.
    pub async fn ensure_project(&self, name: &str) -> Result<ProjectId, StoreError> {
        self.ensure_project_of(DEFAULT_ORGANIZATION, name).await
    }

    /// The project of this name in an organisation; both are made when they are not there.
    ///
    /// # Errors
    /// When a name cannot be used, or the database fails.
    pub async fn ensure_project_of(&self, organization: &str, name: &str) -> Result<ProjectId, StoreError> {
        self.ensure_organization(organization).await?;
        check_name("project", name)?;
        // The update changes nothing; it makes the row come back when it was there before.
        let id = sqlx::query_scalar!(
            "insert into projects (id, name, organization) values ($1, $2, $3)
             on conflict (organization, name) do update set name = excluded.name returning id",
            new_id(),
            name,
            organization
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(ProjectId(id))
    }

    /// Makes sure that there is an organisation of this name.
    ///
    /// # Errors
    /// When the name cannot be used, or the database fails.
    pub async fn ensure_organization(&self, name: &str) -> Result<(), StoreError> {
        check_name("organization", name)?;
        sqlx::query!("insert into organizations (name) values ($1) on conflict do nothing", name).execute(&self.pool).await?;
        Ok(())
    }

    /// Makes an organisation. Of a request that was served before, the one it made then comes back.
    ///
    /// # Errors
    /// When there is one of this name, the name cannot be used, or the database fails.
    pub async fn create_organization(&self, name: &str, once: Option<&Once>) -> Result<Organization, StoreError> {
        check_name("name", name)?;
        let mut transaction = self.pool.begin().await?;
        // Its name is its id.
        if once::admit(&mut transaction, once, Uuid::nil()).await?.is_some() {
            return sqlx::query_as!(Organization, "select name, created_at from organizations where name = $1", name)
                .fetch_optional(&mut *transaction)
                .await?
                .ok_or(StoreError::NotFound);
        }
        let made = sqlx::query_as!(
            Organization,
            "insert into organizations (name) values ($1) on conflict do nothing returning name, created_at",
            name
        )
        .fetch_optional(&mut *transaction)
        .await?
        .ok_or_else(|| Invalid::new("name", "name_taken", format!("there is an organization {name:?} already")))?;
        transaction.commit().await?;
        Ok(made)
    }

    /// All organisations, by name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn organizations(&self) -> Result<Vec<Organization>, StoreError> {
        Ok(sqlx::query_as!(Organization, "select name, created_at from organizations order by name")
            .fetch_all(&self.pool)
            .await?)
    }

    /// Makes a project in an organisation. Of a request that was served before, the one it made then comes back.
    ///
    /// # Errors
    /// When there is no such organisation, it has a project of this name, the name cannot be used, or the database fails.
    pub async fn create_project(
        &self,
        organization: &str,
        name: &str,
        quotas: Quotas,
        once: Option<&Once>,
    ) -> Result<Project, StoreError> {
        check_name("name", name)?;
        let id = new_id();
        let mut transaction = self.pool.begin().await?;
        if let Some(made) = once::admit(&mut transaction, once, id).await? {
            transaction.rollback().await?;
            return self.project(ProjectId(made)).await;
        }
        let inserted = sqlx::query!(
            "insert into projects (id, name, organization, max_stored_bytes, max_queued_jobs, max_running_jobs, max_trained_tokens_per_month)
             values ($1, $2, $3, $4, $5, $6, $7)",
            id,
            name,
            organization,
            column(quotas.max_stored_bytes),
            column(quotas.max_queued_jobs),
            column(quotas.max_running_jobs),
            column(quotas.max_trained_tokens_per_month)
        )
        .execute(&mut *transaction)
        .await
        .map_err(StoreError::from);
        match inserted {
            Ok(_) => {
                transaction.commit().await?;
                self.project(ProjectId(id)).await
            }
            Err(error) => Err(match error.constraint() {
                Some("projects_name_unique") => {
                    let message = format!("the organization {organization:?} has a project {name:?} already");
                    Invalid::new("name", "name_taken", message).into()
                }
                Some("projects_organization_known") => no_organization(organization),
                _ => error,
            }),
        }
    }

    /// One project.
    ///
    /// # Errors
    /// When there is no such project, or the database fails.
    pub async fn project(&self, id: ProjectId) -> Result<Project, StoreError> {
        sqlx::query_as!(
            Row,
            "select id, name, organization, max_stored_bytes, max_queued_jobs, max_running_jobs, max_trained_tokens_per_month, created_at
             from projects where id = $1",
            id.0
        )
        .fetch_optional(&self.pool)
        .await?
        .map(Project::from)
        .ok_or(StoreError::NotFound)
    }

    /// Projects, newest first, of one organisation or all.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn projects(&self, organization: Option<&str>, page: PageRequest) -> Result<Page<Project>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            "select id, name, organization, max_stored_bytes, max_queued_jobs, max_running_jobs, max_trained_tokens_per_month, created_at
             from projects where ($1::text is null or organization = $1) and ($2::uuid is null or id < $2) order by id desc limit $3",
            organization,
            page.after,
            page.fetch()
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(Page::new(rows.into_iter().map(Project::from).collect(), &page))
    }

    /// Sets what a project may use. Nothing that is there is taken away; what is over a limit only grows no further.
    ///
    /// # Errors
    /// When there is no such project, or the database fails.
    pub async fn set_quotas(&self, id: ProjectId, quotas: Quotas) -> Result<Project, StoreError> {
        sqlx::query!(
            "update projects set max_stored_bytes = $2, max_queued_jobs = $3, max_running_jobs = $4, max_trained_tokens_per_month = $5
             where id = $1",
            id.0,
            column(quotas.max_stored_bytes),
            column(quotas.max_queued_jobs),
            column(quotas.max_running_jobs),
            column(quotas.max_trained_tokens_per_month)
        )
        .execute(&self.pool)
        .await?;
        self.project(id).await
    }

    /// What a project uses.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn usage(&self, id: ProjectId) -> Result<Usage, StoreError> {
        let mut connection = self.tenant(id).await?;
        usage(&mut connection, id).await
    }

    /// Adds a member to an organisation. Of a request that was served before, the one it added then comes back.
    ///
    /// # Errors
    /// When there is no such organisation, it has a member of this name, the name cannot be used, or the database fails.
    pub async fn create_member(&self, organization: &str, name: &str, once: Option<&Once>) -> Result<Member, StoreError> {
        if !(1..=128).contains(&name.chars().count()) || name.chars().any(char::is_control) {
            let message = "a member's name has 1 to 128 characters and no control characters";
            return Err(Invalid::new("name", "invalid_name", message).into());
        }
        let id = new_id();
        let mut transaction = self.pool.begin().await?;
        let made = once::admit(&mut transaction, once, id).await?;
        if made.is_none() {
            sqlx::query!("insert into members (id, organization, name) values ($1, $2, $3)", id, organization, name)
                .execute(&mut *transaction)
                .await
                .map_err(|error| {
                    let error = StoreError::from(error);
                    match error.constraint() {
                        Some("members_name_unique") => {
                            let message = format!("the organization {organization:?} has a member {name:?} already");
                            Invalid::new("name", "name_taken", message).into()
                        }
                        Some("members_organization_fkey") => no_organization(organization),
                        _ => error,
                    }
                })?;
        }
        let row = sqlx::query!("select id, organization, name, created_at from members where id = $1", made.unwrap_or(id))
            .fetch_optional(&mut *transaction)
            .await?
            .ok_or(StoreError::NotFound)?;
        transaction.commit().await?;
        Ok(Member { id: MemberId(row.id), organization: row.organization, name: row.name, created_at: row.created_at })
    }

    /// The members of an organisation, by name.
    ///
    /// # Errors
    /// When there is no such organisation, or the database fails.
    pub async fn members(&self, organization: &str) -> Result<Vec<Member>, StoreError> {
        sqlx::query_scalar!("select 1 as one from organizations where name = $1", organization)
            .fetch_optional(&self.pool)
            .await?
            .ok_or(StoreError::NotFound)?;
        let rows = sqlx::query!(
            "select id, organization, name, created_at from members where organization = $1 and removed_at is null order by name",
            organization
        )
        .fetch_all(&self.pool)
        .await?;
        let members = rows.into_iter().map(|r| Member {
            id: MemberId(r.id),
            organization: r.organization,
            name: r.name,
            created_at: r.created_at,
        });
        Ok(members.collect())
    }

    /// Removes a member; their keys are revoked.
    ///
    /// # Errors
    /// When there is no such member, or the database fails.
    pub async fn remove_member(&self, id: MemberId) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin().await?;
        let removed = sqlx::query!("update members set removed_at = now() where id = $1 and removed_at is null", id.0)
            .execute(&mut *transaction)
            .await?;
        if removed.rows_affected() == 0 {
            return Err(StoreError::NotFound);
        }
        sqlx::query!("update api_keys set revoked_at = now() where member_id = $1 and revoked_at is null", id.0)
            .execute(&mut *transaction)
            .await?;
        crate::keys::announce_change(&mut transaction).await?;
        Ok(transaction.commit().await?)
    }
}

/// Reads a project's quotas and keeps others from using them up until the transaction ends.
pub(crate) async fn lock_quotas(connection: &mut PgConnection, project: ProjectId) -> Result<Quotas, StoreError> {
    let row = sqlx::query_as!(
        Row,
        "select id, name, organization, max_stored_bytes, max_queued_jobs, max_running_jobs, max_trained_tokens_per_month, created_at
         from projects where id = $1 for no key update",
        project.0
    )
    .fetch_optional(connection)
    .await?;
    row.map(|row| Project::from(row).quotas).ok_or(StoreError::NotFound)
}

/// What a project uses, as its connection or a worker's sees it.
pub(crate) async fn usage(connection: &mut PgConnection, project: ProjectId) -> Result<Usage, StoreError> {
    let row = sqlx::query!(
        "select (select coalesce(sum(bytes), 0) from files where project_id = $1)::bigint
                + (select coalesce(sum(greatest(u.bytes, (select coalesce(sum(p.bytes), 0) from upload_parts p where p.upload_id = u.id))), 0)
                   from uploads u where u.project_id = $1 and u.status = 'pending')::bigint
                    as \"stored_bytes!\",
                (select count(*) from jobs where project_id = $1 and status in ('validating_files', 'queued', 'paused')) as \"queued_jobs!\",
                (select count(*) from jobs where project_id = $1 and status in ('running', 'pausing')) as \"running_jobs!\",
                (select coalesce(sum(case
                            when finished_at is null and dataset is not null
                                then (dataset ->> 'tokens')::bigint * (hyperparameters ->> 'n_epochs')::bigint
                            else coalesce(trained_tokens, (progress ->> 'tokens')::bigint, 0) end), 0) from jobs
                 where project_id = $1 and created_at >= date_trunc('month', now() at time zone 'utc') at time zone 'utc')::bigint
                    as \"trained_tokens!\"",
        project.0
    )
    .fetch_one(connection)
    .await?;
    Ok(Usage {
        stored_bytes: row.stored_bytes.unsigned_abs(),
        queued_jobs: row.queued_jobs.unsigned_abs(),
        running_jobs: row.running_jobs.unsigned_abs(),
        trained_tokens_this_month: row.trained_tokens.unsigned_abs(),
    })
}

fn check_name(param: &str, name: &str) -> Result<(), StoreError> {
    // The name becomes a part of a model's name, where slashes would be read as an owner's.
    let fits = (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && model_name::check(name).is_ok();
    if fits {
        return Ok(());
    }
    let message = format!("{name:?} is no name: use 1 to 64 letters, digits, `.`, `_` and `-`, not beginning with `.`");
    Err(Invalid::new(param, "invalid_name", message).into())
}

fn no_organization(name: &str) -> StoreError {
    Invalid::new("organization", "organization_not_found", format!("there is no organization {name:?}")).into()
}

fn column(limit: Option<u64>) -> Option<i64> {
    limit.map(|limit| i64::try_from(limit).unwrap_or(i64::MAX))
}
