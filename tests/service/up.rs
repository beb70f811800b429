//! `holdfast up` as a program: first start, stop, restart, and a Postgres that dies under it.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_tests::program;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

struct Up {
    process: Child,
    output: BufReader<ChildStdout>,
    /// What it printed before it listened.
    said: String,
    url: String,
}

impl Up {
    fn start(data: &Path) -> Result<Self> {
        let mut process = command(data)?.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut output = BufReader::new(process.stdout.take().context("no output")?);
        let mut said = String::new();
        loop {
            let mut line = String::new();
            ensure!(output.read_line(&mut line)? > 0, "it ended before it listened, having said: {said}");
            if let Some(url) = line.trim().strip_prefix("listening on ") {
                return Ok(Self { process, output, said, url: url.to_owned() });
            }
            said.push_str(&line);
        }
    }

    fn models(&self, data: &Path) -> Result<u16> {
        let key = std::fs::read_to_string(data.join("project.key"))?;
        let request = ureq::get(format!("{}/v1/models", self.url)).config().http_status_as_error(false).build();
        Ok(request.header("Authorization", format!("Bearer {}", key.trim())).call()?.status().as_u16())
    }

    fn terminate(mut self) -> Result<()> {
        signal(self.process.id(), Signal::TERM)?;
        let mut rest = String::new();
        self.output.read_to_string(&mut rest)?;
        let status = self.process.wait()?;
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            let _ = signal(self.process.id(), Signal::TERM);
            let _ = self.process.wait();
        }
    }
}

fn command(data: &Path) -> Result<Command> {
    let mut command = Command::new(program("holdfast")?);
    command.args(["up", "--listen", "127.0.0.1:0", "--data-dir"]).arg(data);
    command.env_remove("DATABASE_URL").env_remove("HOLDFAST_OBJECT_STORE");
    Ok(command)
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    Ok(kill_process(Pid::from_raw(i32::try_from(pid)?).context("no process")?, signal)?)
}

/// Open to the unprivileged user that root's Postgres runs as.
fn folder() -> Result<TempDir> {
    Ok(tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o755)).tempdir()?)
}

#[test]
fn the_first_start_writes_private_keys_and_the_next_goes_on_with_them() -> Result<()> {
    let data = folder()?;
    let first = Up::start(data.path())?;
    for name in ["admin.key", "project.key"] {
        assert!(first.said.contains(name), "{}", first.said);
        assert_eq!(std::fs::metadata(data.path().join(name))?.permissions().mode() & 0o777, 0o600);
    }
    assert_eq!(first.models(data.path())?, 200);
    first.terminate()?;
    assert!(!data.path().join("postgres/data/postmaster.pid").exists(), "Postgres still runs");

    let second = Up::start(data.path())?;
    assert_eq!(second.said, "");
    assert_eq!(second.models(data.path())?, 200);
    second.terminate()
}

#[test]
fn a_folder_serves_one_process_at_a_time() -> Result<()> {
    let data = folder()?;
    let first = Up::start(data.path())?;
    let refused = command(data.path())?.output()?;
    assert!(!refused.status.success());
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(words.contains("is in use by another process"), "{words}");
    first.terminate()
}

#[test]
fn a_postgres_that_dies_is_started_again() -> Result<()> {
    let data = folder()?;
    let up = Up::start(data.path())?;
    let pid_file = data.path().join("postgres/data/postmaster.pid");
    let pid = || -> Option<u32> { std::fs::read_to_string(&pid_file).ok()?.lines().next()?.parse().ok() };
    let killed = pid().context("no Postgres")?;
    signal(killed, Signal::KILL)?;
    let since = Instant::now();
    while pid() == Some(killed) || up.models(data.path())? != 200 {
        ensure!(since.elapsed() < Duration::from_secs(30), "Postgres did not come back");
        std::thread::sleep(Duration::from_millis(200));
    }
    up.terminate()
}
