//! A private `PostgreSQL` made of the machine's own binaries: one cluster under a folder, reached by a Unix socket that only
//! its user can open, started and stopped with the program that needs it.
//!
//! Postgres refuses to run as root, so a root caller drops to the `postgres` user (or `nobody`) for it. That user must be
//! able to walk to the cluster; under a closed folder such as root's home it cannot, and the cluster then lives in
//! `/var/lib/holdfast`, with a link where it was asked for.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process, test_kill_process};
use sha2::{Digest, Sha256};

mod temporary;

pub use temporary::TemporaryPostgres;

/// The database and its superuser, both by this name.
const NAME: &str = "holdfast";
const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// Why there is no Postgres.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    /// The machine has no server binaries.
    #[error(
        "no PostgreSQL server found (looked for `initdb` in PATH and under /usr/lib/postgresql); install it with `apt-get install postgresql`, or set DATABASE_URL"
    )]
    NotInstalled,
    /// Root needs another user to run Postgres as.
    #[error("Postgres refuses to run as root, and this machine has neither a `postgres` nor a `nobody` user to run it as")]
    NoUser,
    /// Another process uses the folder.
    #[error("{0} is in use by another process; stop that one, or choose another --data-dir")]
    InUse(PathBuf),
    /// A file or a process could not be made.
    #[error("{what}: {cause}")]
    Io {
        /// What was tried.
        what: String,
        /// The cause.
        cause: io::Error,
    },
    /// One of Postgres' programs failed.
    #[error("{program} failed: {output}")]
    Failed {
        /// The program.
        program: &'static str,
        /// What it said.
        output: String,
    },
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> PostgresError {
    let what = what.into();
    move |cause| PostgresError::Io { what, cause }
}

/// A running server; stopped when dropped.
#[derive(Debug)]
pub struct LocalPostgres {
    cluster: Cluster,
    server: Child,
    _lock: File,
}

impl LocalPostgres {
    /// Starts the cluster under `folder`, making it first when there is none.
    ///
    /// # Errors
    /// When Postgres is not installed, the folder is in use, or the server does not start.
    pub fn start(folder: &Path) -> Result<Self, PostgresError> {
        let cluster = Cluster::locate(folder)?;
        std::fs::create_dir_all(&cluster.root).map_err(io_error(format!("cannot make {}", cluster.root.display())))?;
        let lock = cluster.lock()?;
        cluster.prepare_folders()?;
        cluster.end_orphan()?;
        if !cluster.data().join("PG_VERSION").exists() {
            cluster.init()?;
        }
        let server = cluster.launch()?;
        let mut postgres = Self { cluster, server, _lock: lock };
        postgres.wait_until_ready()?;
        postgres.cluster.create_database()?;
        Ok(postgres)
    }

    /// The server's process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.server.id()
    }

    /// The connection string of the database.
    #[must_use]
    pub fn url(&self) -> String {
        self.cluster.url()
    }

    /// The connection string of a server that another process runs under `folder`; `None` when none runs.
    ///
    /// # Errors
    /// When Postgres is not installed.
    pub fn running(folder: &Path) -> Result<Option<String>, PostgresError> {
        let cluster = Cluster::locate(folder)?;
        Ok(cluster.server_pid().filter(|_| cluster.is_ready()).map(|_| cluster.url()))
    }

    /// Starts the server again when it has ended by itself or was killed. Returns whether it had.
    ///
    /// # Errors
    /// When it does not start; trying again later is safe.
    pub fn revive(&mut self) -> Result<bool, PostgresError> {
        if self.server.try_wait().map_err(io_error("cannot watch postgres"))?.is_none() {
            return Ok(false);
        }
        self.server = self.cluster.launch()?;
        self.wait_until_ready()?;
        Ok(true)
    }

    fn wait_until_ready(&mut self) -> Result<(), PostgresError> {
        let since = Instant::now();
        // A killed server leaves a file that says "ready" too; only the one that names this process counts.
        while !(self.cluster.server_pid() == self.pid() && self.cluster.is_ready()) {
            let ended = self.server.try_wait().map_err(io_error("cannot watch postgres"))?;
            if ended.is_some() || since.elapsed() > START_TIMEOUT {
                let log = std::fs::read_to_string(self.cluster.log()).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(5).collect();
                return Err(PostgresError::Failed {
                    program: "postgres",
                    output: tail.into_iter().rev().collect::<Vec<_>>().join("; "),
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn pid(&self) -> Option<Pid> {
        i32::try_from(self.server.id()).ok().and_then(Pid::from_raw)
    }

    /// Stops the server cleanly: open connections are ended, everything committed is on disk.
    ///
    /// # Errors
    /// When it does not end within half a minute; it is then killed, which loses nothing but time at the next start.
    pub fn stop(mut self) -> Result<(), PostgresError> {
        self.shut_down()
    }

    fn shut_down(&mut self) -> Result<(), PostgresError> {
        let watch = || io_error("cannot watch postgres");
        if self.server.try_wait().map_err(watch())?.is_some() {
            return Ok(());
        }
        if let Some(pid) = self.pid() {
            // SIGINT is Postgres' fast shutdown.
            kill_process(pid, Signal::INT).map_err(|e| io_error("cannot stop postgres")(e.into()))?;
        }
        let since = Instant::now();
        while since.elapsed() < STOP_TIMEOUT {
            if self.server.try_wait().map_err(watch())?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.server.kill().map_err(io_error("cannot kill postgres"))?;
        self.server.wait().map_err(watch())?;
        Err(PostgresError::Failed { program: "postgres", output: "did not stop within half a minute and was killed".into() })
    }
}

impl Drop for LocalPostgres {
    fn drop(&mut self) {
        if let Err(error) = self.shut_down() {
            tracing::warn!(%error, "the private Postgres did not stop cleanly");
        }
    }
}

/// Where a cluster lives, and as whom it runs.
#[derive(Debug)]
struct Cluster {
    /// Where the caller wants it.
    asked: PathBuf,
    /// Where it is; differs from `asked` only for root under a closed folder.
    root: PathBuf,
    socket: PathBuf,
    binaries: PathBuf,
    user: Option<User>,
}

#[derive(Debug, Clone, Copy)]
struct User {
    uid: u32,
    gid: u32,
}

impl Cluster {
    fn locate(folder: &Path) -> Result<Self, PostgresError> {
        let asked = std::path::absolute(folder).map_err(io_error(format!("cannot resolve {}", folder.display())))?;
        let user = if geteuid().is_root() { Some(unprivileged_user().ok_or(PostgresError::NoUser)?) } else { None };
        let short = &hex::encode(Sha256::digest(asked.as_os_str().as_encoded_bytes()))[..12];
        let root =
            if user.is_some() && !is_open_to_all(&asked) { Path::new("/var/lib/holdfast").join(short) } else { asked.clone() };
        // The path of a Unix socket has at most 107 bytes.
        let inside = root.join("socket");
        let socket = if inside.as_os_str().len() <= 80 { inside } else { std::env::temp_dir().join(format!("holdfast-{short}")) };
        let binaries = binaries(&root.join("data")).ok_or(PostgresError::NotInstalled)?;
        Ok(Self { asked, root, socket, binaries, user })
    }

    fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    fn log(&self) -> PathBuf {
        self.root.join("postgres.log")
    }

    fn url(&self) -> String {
        format!("postgres:///{NAME}?host={}&user={NAME}", self.socket.display())
    }

    fn lock(&self) -> Result<File, PostgresError> {
        let path = self.root.join("lock");
        let file =
            File::options().create(true).append(true).open(&path).map_err(io_error(format!("cannot open {}", path.display())))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(PostgresError::InUse(self.asked.clone())),
            Err(TryLockError::Error(source)) => Err(io_error("cannot lock the cluster")(source)),
        }
    }

    fn prepare_folders(&self) -> Result<(), PostgresError> {
        for folder in [&self.data(), &self.socket] {
            let failed = || io_error(format!("cannot prepare {}", folder.display()));
            std::fs::create_dir_all(folder).map_err(failed())?;
            std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).map_err(failed())?;
            self.give(folder)?;
        }
        if self.root != self.asked && !self.asked.join("data").exists() {
            std::fs::create_dir_all(&self.asked).map_err(io_error("cannot make the data folder"))?;
            let link = self.asked.join("data");
            symlink(self.data(), &link).map_err(io_error(format!("cannot link {}", link.display())))?;
        }
        let log = self.log();
        File::options().create(true).append(true).open(&log).map_err(io_error(format!("cannot open {}", log.display())))?;
        self.give(&log)
    }

    fn give(&self, path: &Path) -> Result<(), PostgresError> {
        let Some(User { uid, gid }) = self.user else { return Ok(()) };
        chown(path, Some(uid), Some(gid)).map_err(io_error(format!("cannot give {} to the Postgres user", path.display())))
    }

    fn command(&self, program: &'static str) -> Command {
        let mut command = Command::new(self.binaries.join(program));
        command.current_dir("/").stdin(Stdio::null()).env_remove("PGDATA").env_remove("PGHOST").env_remove("PGPORT");
        if let Some(User { uid, gid }) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    fn run(&self, program: &'static str, arguments: &[&str]) -> Result<String, PostgresError> {
        let output = self.command(program).args(arguments).output().map_err(io_error(format!("cannot run {program}")))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(PostgresError::Failed { program, output: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
    }

    fn init(&self) -> Result<(), PostgresError> {
        let data = self.data();
        let data = data.to_string_lossy();
        // The socket's folder is closed to everyone else, so whoever reaches it needs no password.
        self.run("initdb", &["-D", &data, "-U", NAME, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8"]).map(|_| ())
    }

    fn launch(&self) -> Result<Child, PostgresError> {
        let log = File::options().append(true).open(self.log()).map_err(io_error("cannot open the Postgres log"))?;
        let errors = log.try_clone().map_err(io_error("cannot open the Postgres log"))?;
        self.command("postgres")
            .arg("-D")
            .arg(self.data())
            .arg("-k")
            .arg(&self.socket)
            .args(["-c", "listen_addresses="])
            // A group of its own: Ctrl-C reaches the service, which then stops Postgres last.
            .process_group(0)
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(io_error("cannot run postgres"))
    }

    /// A server that outlived a killed process of ours still holds the cluster; the lock says that nobody uses it.
    fn end_orphan(&self) -> Result<(), PostgresError> {
        let Some(pid) = self.server_pid() else { return Ok(()) };
        kill_process(pid, Signal::INT).map_err(|e| io_error("cannot stop the orphaned postgres")(e.into()))?;
        let since = Instant::now();
        while test_kill_process(pid).is_ok() && since.elapsed() < STOP_TIMEOUT {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn pid_file(&self) -> Option<Vec<String>> {
        let text = std::fs::read_to_string(self.data().join("postmaster.pid")).ok()?;
        Some(text.lines().map(|line| line.trim().to_owned()).collect())
    }

    /// The server's process, when it lives and is a Postgres of this cluster: a stale file's number may be anyone's.
    fn server_pid(&self) -> Option<Pid> {
        let pid = Pid::from_raw(self.pid_file()?.first()?.parse().ok()?)?;
        let command = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
        let data = self.data();
        let is_ours = command.split(|b| *b == 0).any(|word| word == data.as_os_str().as_encoded_bytes());
        is_ours.then_some(pid)
    }

    /// The eighth line of `postmaster.pid` is the server's own word on its state.
    fn is_ready(&self) -> bool {
        self.pid_file().is_some_and(|lines| lines.get(7).is_some_and(|state| state == "ready"))
    }

    fn create_database(&self) -> Result<(), PostgresError> {
        let socket = self.socket.to_string_lossy();
        let at = ["-h", &socket, "-U", NAME];
        let query = format!("select 1 from pg_database where datname = '{NAME}'");
        let found = self.run("psql", &[&at[..], &["-d", "postgres", "-Atc", &query]].concat())?;
        if found.trim().is_empty() {
            self.run("createdb", &[&at[..], &[NAME]].concat())?;
        }
        Ok(())
    }
}

/// The folder of the server's programs: of the version that made `data`, else of the newest.
fn binaries(data: &Path) -> Option<PathBuf> {
    let made_by = std::fs::read_to_string(data.join("PG_VERSION")).ok().map(|version| version.trim().to_owned());
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok().into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = versions
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            let folder = entry.path().join("bin");
            folder.join("initdb").exists().then_some((version, folder))
        })
        .collect();
    found.sort();
    let same = made_by.and_then(|version| found.iter().find(|(v, _)| v.to_string() == version).cloned());
    if let Some((_, folder)) = same.or_else(|| found.pop()) {
        return Some(folder);
    }
    std::env::split_paths(&std::env::var_os("PATH")?)
        .find(|folder| folder.join("initdb").exists() && folder.join("postgres").exists())
}

fn unprivileged_user() -> Option<User> {
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    ["postgres", "nobody"].into_iter().find_map(|name| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some(User { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    })
}

/// Whether anyone can walk to `folder`, whose last parts may not exist yet.
fn is_open_to_all(folder: &Path) -> bool {
    folder.ancestors().skip(1).filter_map(|ancestor| ancestor.metadata().ok()).all(|m| m.mode() & 0o001 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder whose cluster goes with it, wherever that is.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("holdfast-test-{name}-{}", std::process::id())))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            if let Ok(cluster) = Cluster::locate(&self.0) {
                temporary::remove(&cluster);
            }
        }
    }

    #[test]
    fn a_killed_server_starts_again() -> Result<(), Box<dyn std::error::Error>> {
        let folder = Folder::new("killed");
        let mut postgres = LocalPostgres::start(&folder.0)?;
        postgres.server.kill()?;
        postgres.server.wait()?;
        drop(postgres);
        LocalPostgres::start(&folder.0)?.stop()?;
        Ok(())
    }

    #[test]
    fn a_cluster_starts_refuses_a_second_user_stops_and_starts_again() -> Result<(), Box<dyn std::error::Error>> {
        let folder = Folder::new("stopped");
        let postgres = LocalPostgres::start(&folder.0)?;
        assert!(matches!(LocalPostgres::start(&folder.0), Err(PostgresError::InUse(_))));
        assert_eq!(LocalPostgres::running(&folder.0)?, Some(postgres.url()));
        postgres.stop()?;
        assert_eq!(LocalPostgres::running(&folder.0)?, None);
        LocalPostgres::start(&folder.0)?.stop()?;
        Ok(())
    }
}
