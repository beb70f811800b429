//! A server that goes with everything it wrote: for tests, benches and single commands.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::{Cluster, LocalPostgres, PostgresError, io_error};

/// What folders of such servers begin with; the process that made one, when that began, and a number follow.
const PREFIX: &str = "holdfast-postgres-";

/// Stops the server and removes its files once the process in `$0` is gone; `$1` is where the files are, `$2` where they were
/// asked for, `$3` the socket's folder. It ends by itself when the files have been removed.
const WATCH: &str = r#"
while kill -0 "$0" 2>/dev/null; do sleep 0.2; [ -d "$1" ] || exit 0; done
server="$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null)"
[ -n "$server" ] && grep -qaF "$1/data" "/proc/$server/cmdline" 2>/dev/null && kill -INT "$server" && sleep 2
rm -rf "$1" "$2" "$3"
"#;

/// A folder younger than this may belong to a process that has not locked it yet.
const LOCKED_BY: Duration = Duration::from_secs(10);

/// A server with an empty database, whose files go when this is dropped, and also when the process ends without dropping it.
#[derive(Debug)]
pub struct TemporaryPostgres {
    server: LocalPostgres,
}

impl TemporaryPostgres {
    /// Starts one under the folder for temporary files, and removes what killed processes left of theirs.
    ///
    /// # Errors
    /// As [`LocalPostgres::start`].
    pub fn start() -> Result<Self, PostgresError> {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let temporary = std::env::temp_dir();
        sweep(&temporary);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{}-{number}", std::process::id(), began());
        let this = Self { server: LocalPostgres::start(&temporary.join(name))? };
        // A value in a static is never dropped, and a killed process drops nothing.
        let mut watch = Command::new("sh");
        watch.args(["-c", WATCH, &std::process::id().to_string()]);
        watch.arg(&this.server.cluster.root).arg(&this.server.cluster.asked).arg(&this.server.cluster.socket);
        watch.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        watch.spawn().map_err(io_error("cannot run sh"))?;
        Ok(this)
    }
}

impl Deref for TemporaryPostgres {
    type Target = LocalPostgres;

    fn deref(&self) -> &LocalPostgres {
        &self.server
    }
}

impl DerefMut for TemporaryPostgres {
    fn deref_mut(&mut self) -> &mut LocalPostgres {
        &mut self.server
    }
}

impl Drop for TemporaryPostgres {
    fn drop(&mut self) {
        if let Err(error) = self.server.shut_down() {
            tracing::warn!(%error, "a temporary Postgres did not stop cleanly");
        }
        remove(&self.server.cluster);
    }
}

pub(crate) fn remove(cluster: &Cluster) {
    for folder in [&cluster.root, &cluster.asked, &cluster.socket] {
        let _ = std::fs::remove_dir_all(folder);
    }
}

/// Removes the clusters that no process has locked any more. What cannot be removed stays for the next start.
fn sweep(temporary: &Path) {
    for folder in std::fs::read_dir(temporary).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let is_ours = folder.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PREFIX));
        if is_ours
            && is_old(&folder)
            && let Ok(cluster) = Cluster::locate(&folder)
            && std::fs::create_dir_all(&cluster.root).is_ok()
            && let Ok(_lock) = cluster.lock()
            && cluster.end_orphan().is_ok()
        {
            remove(&cluster);
        }
    }
}

fn is_old(folder: &Path) -> bool {
    let changed = folder.metadata().and_then(|metadata| metadata.modified());
    changed.ok().and_then(|changed| changed.elapsed().ok()).is_some_and(|age| age > LOCKED_BY)
}

/// A number that no earlier process of this one's had: when it began, by the kernel's count.
fn began() -> String {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the program's name, which may hold anything, the twentieth word.
    stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)).unwrap_or("0").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_files_go_with_it_and_those_of_a_killed_process_with_the_next() -> Result<(), Box<dyn std::error::Error>> {
        let left_over = std::env::temp_dir().join(format!("{PREFIX}left-over"));
        std::fs::create_dir_all(left_over.join("data"))?;
        let an_hour_ago = std::fs::FileTimes::new().set_modified(left_over.metadata()?.modified()? - LOCKED_BY * 360);
        std::fs::File::open(&left_over)?.set_times(an_hour_ago)?;
        let postgres = TemporaryPostgres::start()?;
        let (root, asked) = (postgres.cluster.root.clone(), postgres.cluster.asked.clone());
        assert!(root.join("data/PG_VERSION").exists() && !left_over.exists());
        drop(postgres);
        assert!(!root.exists() && !asked.exists());
        Ok(())
    }
}
