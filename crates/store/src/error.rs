//! What can go wrong between a caller and the rows.

use holdfast_domain::Invalid;
use holdfast_domain::job::InvalidTransition;

/// Why a store call did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such row, or it is another project's.
    #[error("not found")]
    NotFound,
    /// The caller holds the job no longer: another attempt runs, or the job has ended.
    #[error("this worker no longer holds the job")]
    Fenced,
    /// The job's life does not have this change.
    #[error(transparent)]
    Transition(#[from] InvalidTransition),
    /// A value was refused.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// A row holds what no version of this program writes.
    #[error("a row holds an unreadable value: {0}")]
    Corrupt(String),
    /// A migration failed.
    #[error("migration: {0}")]
    Migration(String),
    /// The database failed.
    #[error("database: {0}")]
    Database(sqlx::Error),
    /// The object store failed.
    #[error("object store: {0}")]
    Objects(object_store::Error),
    /// A local file failed.
    #[error("{0}")]
    Io(std::io::Error),
    /// An object's bytes are not those its row names.
    #[error("object {key} does not have the SHA-256 its row names")]
    Checksum {
        /// The object.
        key: String,
    },
}

// Written out, because a derived conversion would make the cause a `source` as well, and whoever prints the chain would read
// it twice.
impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl From<object_store::Error> for StoreError {
    fn from(error: object_store::Error) -> Self {
        Self::Objects(error)
    }
}

impl From<std::io::Error> for StoreError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl StoreError {
    /// The database's name of the constraint that was violated, if one was.
    pub(crate) fn constraint(&self) -> Option<&str> {
        match self {
            Self::Database(sqlx::Error::Database(error)) => error.constraint(),
            _ => None,
        }
    }
}

/// Checks that an UPDATE changed exactly the row it named.
pub(crate) fn changed_one(result: &sqlx::postgres::PgQueryResult) -> Result<(), StoreError> {
    if result.rows_affected() == 1 { Ok(()) } else { Err(StoreError::Fenced) }
}

/// Reads a JSON column.
pub(crate) fn from_json<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> Result<T, StoreError> {
    serde_json::from_value(value).map_err(|e| StoreError::Corrupt(e.to_string()))
}

/// Writes a JSON column.
pub(crate) fn to_json<T: serde::Serialize>(value: &T) -> Result<serde_json::Value, StoreError> {
    serde_json::to_value(value).map_err(|e| StoreError::Corrupt(e.to_string()))
}
