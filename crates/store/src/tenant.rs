//! Connections that see one project's rows and no other's, whatever a query says: they run as a role that row security holds
//! to the project the connection was taken for.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use holdfast_domain::ids::ProjectId;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, Executor, PgConnection, PgPool, Postgres};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{ACQUIRE_TIMEOUT, Store, StoreError};

/// The role; migration 0011 makes it.
const ROLE: &str = "set role holdfast_tenant";
/// How long a connection that nobody used is believed to be alive.
const BELIEVED: Duration = Duration::from_secs(1);

/// The connections for tenants. One that served a project stays bound to it, so that the project's next call need not say again
/// who it is; another project's takes it when there is none besides.
#[derive(Debug, Clone)]
pub(crate) struct Tenants {
    pool: PgPool,
    /// As many as there are connections: one for each call that is under way.
    calls: Arc<Semaphore>,
    /// As many again: one for each connection that is out of the pool, used or bound. A call that finds none left finds a bound
    /// connection, because the calls beside it use fewer than all.
    slots: Arc<Semaphore>,
    bound: Arc<Mutex<Vec<Bound>>>,
}

/// A connection that nobody uses, bound to a project.
#[derive(Debug)]
struct Bound {
    project: ProjectId,
    connection: PoolConnection<Postgres>,
    slot: OwnedSemaphorePermit,
    since: Instant,
}

impl Tenants {
    /// Connections are opened when the first is needed, which is after the role exists.
    pub(crate) fn new(options: PgConnectOptions, most: u32) -> Self {
        let pool = PgPoolOptions::new()
            .max_connections(most)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .after_connect(|connection, _| {
                Box::pin(async move {
                    connection.execute(ROLE).await?;
                    Ok(())
                })
            })
            .connect_lazy_with(options);
        let semaphore = || Arc::new(Semaphore::new(most as usize));
        Self { pool, calls: semaphore(), slots: semaphore(), bound: Arc::default() }
    }

    pub(crate) async fn close(&self) {
        self.calls.close();
        self.idle().clear();
        self.pool.close().await;
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Bound>> {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn get(&self, project: ProjectId) -> Result<TenantConnection, StoreError> {
        let closed = |_| sqlx::Error::PoolClosed;
        let waiting = Arc::clone(&self.calls).acquire_owned();
        let call =
            tokio::time::timeout(ACQUIRE_TIMEOUT, waiting).await.map_err(|_| sqlx::Error::PoolTimedOut)?.map_err(closed)?;
        let bound = {
            let mut idle = self.idle();
            // The one used last is the likeliest to be alive.
            idle.iter().rposition(|bound| bound.project == project).map(|at| idle.remove(at))
        };
        if let Some(Bound { mut connection, slot, since, .. }) = bound {
            if since.elapsed() < BELIEVED || connection.ping().await.is_ok() {
                return Ok(self.bind(project, connection, slot, call));
            }
            drop((connection, slot));
        }
        let (mut connection, slot) = match Arc::clone(&self.slots).try_acquire_owned() {
            Ok(slot) => (self.pool.acquire().await?, slot),
            Err(_) => {
                let another = self.idle().pop();
                match another {
                    Some(bound) => (bound.connection, bound.slot),
                    // It went back to the pool in between.
                    None => {
                        let slot = Arc::clone(&self.slots).acquire_owned().await.map_err(closed)?;
                        (self.pool.acquire().await?, slot)
                    }
                }
            }
        };
        sqlx::query_scalar!("select set_config('holdfast.project', $1, false)", project.0.to_string())
            .fetch_one(&mut *connection)
            .await?;
        Ok(self.bind(project, connection, slot, call))
    }

    fn bind(
        &self,
        project: ProjectId,
        connection: PoolConnection<Postgres>,
        slot: OwnedSemaphorePermit,
        call: OwnedSemaphorePermit,
    ) -> TenantConnection {
        TenantConnection { project, held: Some((connection, slot)), bound: Arc::clone(&self.bound), _call: call }
    }
}

/// A connection that sees one project's rows.
#[derive(Debug)]
pub(crate) struct TenantConnection {
    project: ProjectId,
    /// There until it is dropped.
    held: Option<(PoolConnection<Postgres>, OwnedSemaphorePermit)>,
    bound: Arc<Mutex<Vec<Bound>>>,
    _call: OwnedSemaphorePermit,
}

impl Deref for TenantConnection {
    type Target = PgConnection;

    #[expect(clippy::expect_used, reason = "only dropping takes it out")]
    fn deref(&self) -> &PgConnection {
        &self.held.as_ref().expect("a connection until it is dropped").0
    }
}

impl DerefMut for TenantConnection {
    #[expect(clippy::expect_used, reason = "only dropping takes it out")]
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.held.as_mut().expect("a connection until it is dropped").0
    }
}

impl Drop for TenantConnection {
    fn drop(&mut self) {
        let Some((connection, slot)) = self.held.take() else { return };
        // One whose transaction was given up has its rollback still to send: the pool does that at once.
        if connection.should_flush() || connection.is_in_transaction() {
            return;
        }
        let bound = Bound { project: self.project, connection, slot, since: Instant::now() };
        self.bound.lock().unwrap_or_else(PoisonError::into_inner).push(bound);
    }
}

impl Store {
    /// A connection that sees what belongs to `project`.
    ///
    /// # Errors
    /// When the database fails.
    pub(crate) async fn tenant(&self, project: ProjectId) -> Result<TenantConnection, StoreError> {
        self.tenants.get(project).await
    }
}
