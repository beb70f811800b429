//! Operators' own suites: requests that models are measured on, versioned, and never readable by tenants.

use holdfast_domain::evaluation::Kind;
use holdfast_domain::policy::{self, Policy};
use holdfast_domain::{Invalid, model_name};
use sha2::{Digest, Sha256};

use crate::files::object_ref;
use crate::objects::{self, ObjectRef, keys};
use crate::{Store, StoreError, new_id};

/// A version of a suite.
#[derive(Debug, Clone)]
pub struct Suite {
    /// Its name.
    pub name: String,
    /// From 1.
    pub version: i32,
    /// What a model should do with its requests.
    pub kind: Kind,
    /// How many they are.
    pub request_count: u64,
    /// Its bytes.
    pub object: ObjectRef,
}

impl Suite {
    /// Its name and version, as policies name it.
    #[must_use]
    pub fn pinned(&self) -> String {
        format!("{}@{}", self.name, self.version)
    }
}

struct Row {
    name: String,
    version: i32,
    kind: String,
    object_key: String,
    bytes: i64,
    sha256: Vec<u8>,
    request_count: i64,
}

impl TryFrom<Row> for Suite {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        Ok(Self {
            kind: Kind::parse(&row.kind).ok_or_else(|| StoreError::Corrupt("the kind of a suite".into()))?,
            object: object_ref(row.object_key, row.bytes, &row.sha256)?,
            name: row.name,
            version: row.version,
            request_count: row.request_count.unsigned_abs(),
        })
    }
}

impl Store {
    /// Keeps `requests` (checked JSON Lines) as the next version of the suite `name`; the content of the newest version again is no
    /// change.
    ///
    /// # Errors
    /// When the name cannot be used or holds requests of the other kind, or a store fails.
    pub async fn create_suite(&self, name: &str, kind: Kind, requests: &[u8], count: u64) -> Result<Suite, StoreError> {
        model_name::check(name)?;
        if Kind::parse(name).is_some() {
            let message = format!("{name:?} is what a suite of this program is called; give yours another name");
            return Err(Invalid::new("name", "invalid_name", message).into());
        }
        let content: [u8; 32] = Sha256::digest(requests).into();
        let key = keys::suite(&content);
        // Two imports at once: the second waits for the first, and then finds its content or takes the next number.
        let mut transaction = self.pool.begin().await?;
        sqlx::query!("select pg_advisory_xact_lock(hashtext('suites'))").execute(&mut *transaction).await?;
        match self.suite(name).await {
            Ok(newest) if newest.kind != kind => {
                let message = format!("the suite {name:?} holds {} requests; give these another name", newest.kind.as_str());
                return Err(Invalid::new("kind", "contradiction", message).into());
            }
            Ok(newest) if newest.object.sha256 == content => return Ok(newest),
            Ok(_) | Err(StoreError::NotFound) => {}
            Err(error) => return Err(error),
        }
        let known = sqlx::query_scalar!("select 1 as one from suites where object_key = $1 limit 1", key)
            .fetch_optional(&self.pool)
            .await?
            .is_some();
        if !known {
            self.objects.stage_bytes(key.clone(), requests).await?;
            objects::claim(&mut transaction, std::slice::from_ref(&key)).await?;
        }
        let row = sqlx::query_as!(
            Row,
            "insert into suites (id, name, version, kind, object_key, bytes, sha256, request_count)
             select $1, $2, coalesce(max(version), 0) + 1, $3, $4, $5, $6, $7 from suites where name = $2
             returning name, version, kind, object_key, bytes, sha256, request_count",
            new_id(),
            name,
            kind.as_str(),
            key,
            requests.len() as i64,
            &content[..],
            count.cast_signed()
        )
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        row.try_into()
    }

    /// The suite of a name, the newest version; or of a name with a version, `name@version`.
    ///
    /// # Errors
    /// When there is no such suite, or the database fails.
    pub async fn suite(&self, named: &str) -> Result<Suite, StoreError> {
        let (name, version) = policy::suite_reference(named);
        let version = version.map(str::parse::<i32>).transpose().map_err(|_| StoreError::NotFound)?;
        sqlx::query_as!(
            Row,
            "select name, version, kind, object_key, bytes, sha256, request_count from suites
             where name = $1 and ($2::integer is null or version = $2) order by version desc limit 1",
            name,
            version
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::NotFound)?
        .try_into()
    }

    /// Every version of every suite, by name, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn suites(&self) -> Result<Vec<Suite>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            "select name, version, kind, object_key, bytes, sha256, request_count from suites order by name, version desc"
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Suite::try_from).collect()
    }

    /// The suites that a policy names.
    ///
    /// # Errors
    /// When one is not there, or the database fails.
    pub(crate) async fn suites_of(&self, policy: &Policy) -> Result<Vec<Suite>, StoreError> {
        let mut suites = Vec::new();
        for (at, named) in policy.suites.iter().enumerate() {
            suites.push(match self.suite(named).await {
                Err(StoreError::NotFound) => {
                    let message = format!("there is no suite {named:?}; import it first");
                    return Err(Invalid::new(format!("suites[{at}]"), "suite_not_found", message).into());
                }
                found => found?,
            });
        }
        Ok(suites)
    }
}
