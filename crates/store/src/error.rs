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
    /// The project uses as much as it may.
    #[error("{0}")]
    Quota(String),
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
    /// Whether the database or the object store could not be reached, so that the same call may do later.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        match self {
            Self::Database(sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::Tls(_)) => {
                true
            }
            // Class 08: connections; 57: the server stops or starts; 53: it lacks room; 40: it undid one of two that waited for each
            // other; 25P03 and 55P03: a transaction stood still, or waited for one that did, for too long.
            Self::Database(sqlx::Error::Database(error)) => error
                .code()
                .is_some_and(|code| ["08", "57P", "53", "40", "25P03", "55P03"].iter().any(|class| code.starts_with(class))),
            // What is left of timeouts, broken connections and a store's own failures after it was tried again; and keys that are
            // being changed. What is missing or refused for itself stays an error.
            Self::Objects(
                object_store::Error::Generic { .. }
                | object_store::Error::PermissionDenied { .. }
                | object_store::Error::Unauthenticated { .. },
            ) => true,
            // A call that was given up waiting for.
            Self::Io(error) => error.kind() == std::io::ErrorKind::TimedOut,
            _ => false,
        }
    }

    /// Whether an object is gone, or not what it was written as.
    #[must_use]
    pub const fn is_damaged(&self) -> bool {
        matches!(self, Self::Checksum { .. } | Self::Objects(object_store::Error::NotFound { .. }))
    }

    /// Whether this machine's disk has no room left.
    #[must_use]
    pub fn is_full_disk(&self) -> bool {
        match self {
            Self::Io(error) => matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded),
            _ => false,
        }
    }

    /// Whether the database refused a text that it has no letters for, as U+0000.
    #[must_use]
    pub fn is_bad_text(&self) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(error)) if matches!(error.code().as_deref(), Some("22021" | "22P05")))
    }

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
