//! From settings to a store: the database that is named, or a private one.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_local_postgres::LocalPostgres;
use holdfast_store::{ObjectLocation, Store, StoreError};
use tokio::task::JoinHandle;

use crate::settings::StoreArgs;

/// A store, and the private Postgres under it, if this process started one.
#[derive(Debug)]
pub struct Connection {
    /// Rows and objects.
    pub store: Store,
    postgres: Option<Supervised>,
}

/// Empty once it is stopped.
type Shared = Arc<Mutex<Option<LocalPostgres>>>;

/// A private Postgres that is started again when it dies.
#[derive(Debug)]
struct Supervised {
    server: Shared,
    watch: JoinHandle<()>,
}

impl Supervised {
    const INTERVAL: Duration = Duration::from_secs(1);

    fn new(server: LocalPostgres) -> Self {
        let server = Arc::new(Mutex::new(Some(server)));
        let watched = Arc::clone(&server);
        let watch = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Self::INTERVAL).await;
                let server = Arc::clone(&watched);
                let revived =
                    tokio::task::spawn_blocking(move || lock(&server).as_mut().map_or(Ok(false), LocalPostgres::revive)).await;
                match revived {
                    Ok(Ok(false)) => {}
                    Ok(Ok(true)) => tracing::warn!("the private Postgres had ended and was started again"),
                    Ok(Err(error)) => tracing::error!(%error, "the private Postgres ended and does not start; trying again"),
                    Err(_) => return,
                }
            }
        });
        Self { server, watch }
    }

    async fn stop(self) -> Result<()> {
        self.watch.abort();
        let stop = move || lock(&self.server).take().map_or(Ok(()), LocalPostgres::stop);
        Ok(tokio::task::spawn_blocking(stop).await??)
    }
}

fn lock(server: &Shared) -> MutexGuard<'_, Option<LocalPostgres>> {
    server.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Connects, starting the private Postgres when no database is named.
///
/// # Errors
/// When a folder, Postgres or the database cannot be used; the message names the setting.
pub async fn connect(args: &StoreArgs) -> Result<Connection> {
    taken(start(args).await?, args).await
}

/// Connects for a short command: to the private Postgres of a service that runs on the same folder, else as [`connect`].
///
/// # Errors
/// As [`connect`].
pub async fn connect_beside(args: &StoreArgs) -> Result<Connection> {
    taken(connect_to_try(args).await?, args).await
}

/// The same to a store that is tried out, and may be another than the one in use.
///
/// # Errors
/// As [`connect`], but for a store that holds nothing of what the database names.
pub async fn connect_to_try(args: &StoreArgs) -> Result<Connection> {
    if args.database_url.is_none()
        && let Some(url) = LocalPostgres::running(&args.data_dir.join("postgres"))?
    {
        return Ok(Connection { store: open(args, &url).await?, postgres: None });
    }
    start(args).await
}

async fn start(args: &StoreArgs) -> Result<Connection> {
    make_folder(&args.data_dir).context("cannot use the data directory (--data-dir)")?;
    let (url, postgres) = match &args.database_url {
        Some(url) => (url.clone(), None),
        None => {
            let folder = args.data_dir.join("postgres");
            let postgres = tokio::task::spawn_blocking(move || LocalPostgres::start(&folder)).await??;
            (postgres.url(), Some(postgres))
        }
    };
    Ok(Connection { store: open(args, &url).await?, postgres: postgres.map(Supervised::new) })
}

async fn open(args: &StoreArgs, database_url: &str) -> Result<Store> {
    let location = ObjectLocation::from_env(object_store(args));
    if let Some(folder) = location.folder().with_context(|| unusable(args))? {
        make_private(folder).with_context(|| unusable(args))?;
    }
    let store = Store::connect(database_url, &location).await.map_err(|error| match error {
        StoreError::Objects(_) | StoreError::Io(_) => anyhow::Error::new(error).context(unusable(args)),
        other => anyhow::Error::new(other).context("cannot reach the database (DATABASE_URL)"),
    })?;
    store.migrate().await?;
    Ok(store)
}

/// Takes the store into use. A private Postgres does not outlive a store that is another one.
async fn taken(connection: Connection, args: &StoreArgs) -> Result<Connection> {
    match connection.store.objects().take().await.with_context(|| unusable(args)) {
        Ok(()) => Ok(connection),
        Err(error) => {
            connection.close().await?;
            Err(error)
        }
    }
}

fn unusable(args: &StoreArgs) -> String {
    format!("cannot use the object store {} (HOLDFAST_OBJECT_STORE)", object_store(args))
}

/// A folder, or the URL of a store.
fn object_store(args: &StoreArgs) -> String {
    match args.object_store.as_deref() {
        None => args.data_dir.join("objects").to_string_lossy().into_owned(),
        Some(url) => url.strip_prefix("file://").unwrap_or(url).to_owned(),
    }
}

fn make_folder(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))
}

/// Makes a folder that nobody but the service may look into: tenants' rows will be in it. One that holds something already may not be ours
/// to close: a name that was mistaken must not shut a whole machine out of its `/tmp`. Where it is open, the log says so.
fn make_private(folder: &Path) -> Result<()> {
    make_folder(folder)?;
    let mut inside = folder.read_dir().with_context(|| format!("cannot read {}", folder.display()))?;
    if inside.next().is_some() {
        let mode = folder.metadata().map_or(0, |found| found.permissions().mode() & 0o777);
        if mode & 0o077 != 0 {
            let folder = folder.display();
            tracing::warn!(%folder, mode = format!("{mode:o}"), "others may look into the object store; close it with chmod 700");
        }
        return Ok(());
    }
    let closed = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(folder, closed).with_context(|| format!("cannot close {} to others", folder.display()))
}

impl Connection {
    /// Closes the connections and stops the private Postgres, if there is one.
    ///
    /// # Errors
    /// When Postgres does not stop.
    pub async fn close(self) -> Result<()> {
        self.store.close().await;
        if let Some(postgres) = self.postgres {
            postgres.stop().await?;
        }
        Ok(())
    }
}
