//! `holdfast up` as a program: first start, stop, restart, and a Postgres that dies under it.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_tests::{PATIENCE, program};
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
        Self::start_as(command(data)?.stdout(Stdio::piped()).stderr(Stdio::null()))
    }

    fn start_as(command: &mut Command) -> Result<Self> {
        let mut process = command.spawn()?;
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
    // What is asked of a model takes longer than all that is looked at here.
    command.env("HOLDFAST_SAFETY_GATE", "off").env_remove("DATABASE_URL").env_remove("HOLDFAST_OBJECT_STORE");
    Ok(command)
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    Ok(kill_process(Pid::from_raw(i32::try_from(pid)?).context("no process")?, signal)?)
}

/// A data folder. Where root's Postgres cannot live in it, its `postgres/data` is a link, and what that leads to goes as well.
struct DataFolder(TempDir);

impl DataFolder {
    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for DataFolder {
    fn drop(&mut self) {
        if let Ok(data) = std::fs::read_link(self.path().join("postgres/data"))
            && let Some(cluster) = data.parent()
        {
            let _ = std::fs::remove_dir_all(cluster);
        }
    }
}

fn folder() -> Result<DataFolder> {
    Ok(DataFolder(tempfile::tempdir()?))
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
fn a_container_learns_whether_the_api_lives() -> Result<()> {
    let data = folder()?;
    let up = Up::start(data.path())?;
    let health = |address: &str| -> Result<bool> {
        let mut command = Command::new(program("holdfast")?);
        Ok(command.args(["health", "--listen", address]).stderr(Stdio::null()).status()?.success())
    };
    let address = up.url.trim_start_matches("http://").to_owned();
    let (_, port) = address.rsplit_once(':').context("no port")?;
    assert!(health(&address)? && health(&format!("0.0.0.0:{port}"))?);
    up.terminate()?;
    assert!(!health(&address)?);
    Ok(())
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
fn a_collector_is_sent_traces_and_the_log_is_json_with_the_request_s_id() -> Result<()> {
    let collector = std::net::TcpListener::bind("127.0.0.1:0")?;
    let endpoint = format!("http://{}", collector.local_addr()?);
    let collected = std::thread::spawn(move || -> Result<Vec<u8>> {
        let (mut stream, _) = collector.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let (mut whole, mut piece) = (Vec::new(), [0; 4096]);
        while let Ok(read @ 1..) = stream.read(&mut piece) {
            whole.extend_from_slice(piece.get(..read).unwrap_or_default());
        }
        let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
        Ok(whole)
    });
    let data = folder()?;
    let log = data.path().join("log");
    let mut command = command(data.path())?;
    command.args(["--otlp-endpoint", &endpoint, "--log-format", "json"]).env("HOLDFAST_LOG", "debug");
    // All is sent in one go when it ends, which is as often as the collector listens.
    command.env("OTEL_BSP_SCHEDULE_DELAY", "600000");
    let up = Up::start_as(command.stdout(Stdio::piped()).stderr(std::fs::File::create(&log)?))?;
    assert_eq!(up.models(data.path())?, 200);
    // Ids travel as bytes.
    let (trace, bytes) = ("4bf92f3577b34da6a3ce929d0e0e4736", [0x4b, 0xf9, 0x2f, 0x35, 0x77, 0xb3, 0x4d, 0xa6]);
    let traced = ureq::get(format!("{}/v1/models", up.url)).header("traceparent", format!("00-{trace}-00f067aa0ba902b7-01"));
    assert_eq!(traced.config().http_status_as_error(false).build().call()?.status().as_u16(), 401);
    up.terminate()?;
    let collected = collected.join().map_err(|_| anyhow::anyhow!("the collector failed"))??;
    assert!(collected.windows(bytes.len()).any(|part| part == bytes), "the caller's trace was not joined");
    let said = String::from_utf8_lossy(&collected);
    assert!(said.starts_with("POST /v1/traces ") && said.contains("holdfast") && said.contains("/v1/models"), "{said}");
    let lines = std::fs::read_to_string(log)?;
    let of_request = lines.lines().find(|line| line.contains("\"/v1/models\"")).context("no line of the request")?;
    let line: serde_json::Value = serde_json::from_str(of_request)?;
    assert!(line["spans"][0]["request_id"].as_str().is_some_and(|id| id.len() == 36), "{line}");
    Ok(())
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
        ensure!(since.elapsed() < PATIENCE, "Postgres did not come back");
        std::thread::sleep(Duration::from_millis(200));
    }
    up.terminate()
}
