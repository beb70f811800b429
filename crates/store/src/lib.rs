//! The only SQL and the only object keys of the service: one file per aggregate.
//!
//! Rules that hold in every file: a query that serves a tenant takes its project; an UPDATE names the state it expects and
//! checks how many rows it changed; the event of a change stands in the change's transaction; an object is staged before it
//! is written and claimed by the transaction that gives it a row. Time is the database's. This crate knows nothing of HTTP.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};
use uuid::Uuid;

pub mod alignment_references;
pub mod alignment_sets;
pub mod attempts;
pub mod audit;
pub mod base_answers;
pub mod base_models;
pub mod checkpoints;
pub mod conflict_levels;
pub mod error;
pub mod events;
pub mod evidence;
pub mod files;
pub mod fine_tuned_models;
pub mod jobs;
pub mod keys;
pub mod objects;
pub mod once;
pub mod page;
pub mod policies;
pub mod projects;
pub mod quarantine;
pub mod queue;
pub mod retention;
pub mod speeds;
pub mod statistics;
pub mod suites;
mod tenant;
pub mod uploads;
pub mod webhooks;
pub mod workers;

pub use error::StoreError;
pub use objects::{Content, MARK, ObjectLocation, ObjectRef, Objects};
pub use once::{Once, Repetition};
pub use page::{Page, PageRequest};
pub use sqlx::postgres::PgListener as Listener;

/// The database and the object store, cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    /// For workers, operators and what belongs to no one.
    pool: PgPool,
    /// For tenants: see [`tenant`].
    tenants: tenant::Tenants,
    objects: Objects,
    /// Waiting jobs that this process cannot read.
    unreadable: Arc<queue::Unreadable>,
}

/// Connections of each of the two pools.
const MAX_CONNECTIONS: u32 = 20;
/// How long a call waits for a connection before it says that there is none.
pub(crate) const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// What each session is set to. A process that stands still or is cut off in the middle of a transaction must not keep its rows from
/// everyone else for as long as TCP believes in it.
const SESSION: [(&str, &str); 5] = [
    ("idle_in_transaction_session_timeout", "15s"),
    ("lock_timeout", "30s"),
    ("tcp_keepalives_idle", "20"),
    ("tcp_keepalives_interval", "10"),
    ("tcp_keepalives_count", "3"),
];

impl Store {
    /// Connects to the database, and to the objects at `objects`.
    ///
    /// # Errors
    /// When one of them cannot be reached.
    pub async fn connect(database_url: &str, objects: &ObjectLocation) -> Result<Self, StoreError> {
        // A pool tries again until its time is up and then says only that; one plain connection says what is wrong.
        PgConnection::connect(database_url).await?.close().await?;
        let options = database_url.parse::<PgConnectOptions>()?.options(SESSION);
        let pool = PgPoolOptions::new()
            .max_connections(MAX_CONNECTIONS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_with(options.clone())
            .await?;
        let tenants = tenant::Tenants::new(options, MAX_CONNECTIONS);
        Ok(Self { objects: Objects::open(pool.clone(), objects)?, pool, tenants, unreadable: Arc::default() })
    }

    /// Applies the migrations that are missing, one process at a time. A database that a newer version has migrated is left as it is.
    ///
    /// # Errors
    /// When one fails, or the database no longer takes programs as old as this one.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        let mut migrations = sqlx::migrate!("../../migrations");
        // While a newer version is rolled out beside this one, its migrations are there already.
        migrations.set_ignore_missing(true);
        // Whoever comes second waits for the first, however long that one takes.
        let patient =
            (*self.pool.connect_options()).clone().options([("lock_timeout", "0"), ("idle_in_transaction_session_timeout", "0")]);
        let mut connection = patient.connect().await?;
        migrations.run(&mut connection).await.map_err(|e| StoreError::Migration(e.to_string()))?;
        connection.close().await?;
        let newest = migrations.iter().map(|migration| migration.version).max().unwrap_or(0);
        let oldest = sqlx::query_scalar!("select oldest_schema from schema_compatibility").fetch_one(&self.pool).await?;
        if newest < oldest {
            return Err(StoreError::Migration(format!(
                "the database takes programs of schema {oldest} and newer, and this one is of schema {newest}: upgrade this program, or set DATABASE_URL to another database"
            )));
        }
        Ok(())
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
        self.tenants.close().await;
        self.pool.close().await;
    }
}

/// A new id. They grow with time, so that the order of ids is the order of creation.
#[expect(clippy::disallowed_methods, reason = "the one place that draws ids")]
pub(crate) fn new_id() -> Uuid {
    Uuid::now_v7()
}
