//! The only SQL and the only object keys of the service: one file per aggregate.
//!
//! Rules that hold in every file: a query that serves a tenant takes its project; an UPDATE names the state it expects and
//! checks how many rows it changed; the event of a change stands in the change's transaction; an object is staged before it
//! is written and claimed by the transaction that gives it a row. Time is the database's. This crate knows nothing of HTTP.

use std::path::Path;

use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection, PgConnection, PgPool};
use uuid::Uuid;

pub mod alignment_references;
pub mod alignment_sets;
pub mod base_models;
pub mod error;
pub mod events;
pub mod files;
pub mod fine_tuned_models;
pub mod jobs;
pub mod keys;
pub mod objects;
pub mod page;
pub mod projects;
pub mod queue;

pub use error::StoreError;
pub use objects::{ObjectRef, Objects};
pub use page::{Page, PageRequest};
pub use sqlx::postgres::PgListener as Listener;

/// The database and the object store, cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    pool: PgPool,
    objects: Objects,
}

impl Store {
    /// Connects to the database, and to the objects under the folder `objects`.
    ///
    /// # Errors
    /// When one of them cannot be reached.
    pub async fn connect(database_url: &str, objects: &Path) -> Result<Self, StoreError> {
        // A pool tries again until its time is up and then says only that; one plain connection says what is wrong.
        PgConnection::connect(database_url).await?.close().await?;
        let pool = PgPoolOptions::new().max_connections(20).connect(database_url).await?;
        Ok(Self { objects: Objects::open(pool.clone(), objects)?, pool })
    }

    /// Applies the migrations that are missing, one process at a time.
    ///
    /// # Errors
    /// When one fails, or the database is of a newer version than this program.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        sqlx::migrate!("../../migrations").run(&self.pool).await.map_err(|e| StoreError::Migration(e.to_string()))
    }

    /// The object store.
    #[must_use]
    pub const fn objects(&self) -> &Objects {
        &self.objects
    }

    /// A listener that wakes when a job may be claimed. Waking is a hint: polling is the truth.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn listen(&self) -> Result<Listener, StoreError> {
        let mut listener = Listener::connect_with(&self.pool).await?;
        listener.listen(queue::CHANNEL).await?;
        Ok(listener)
    }

    /// Closes the connections.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// A new id. They grow with time, so that the order of ids is the order of creation.
#[expect(clippy::disallowed_methods, reason = "the one place that draws ids")]
pub(crate) fn new_id() -> Uuid {
    Uuid::now_v7()
}
