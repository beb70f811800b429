//! The service as processes: Postgres, an S3 server, the API and workers, each of which can be hurt and healed.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_local_postgres::TemporaryPostgres;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::{S3Server, one_at_a_time, program, small_base};

/// How long a job stays a silent worker's, as a rule.
pub const LEASE: Duration = Duration::from_secs(5);
/// Room of each worker's disk.
const DISK: &str = "size=160m";

/// All of it; stopped when dropped.
#[derive(Debug)]
pub struct World {
    /// Holds what the processes write, their logs among it.
    pub folder: TempDir,
    /// Their database.
    pub postgres: TemporaryPostgres,
    /// Their objects.
    pub s3: S3Server,
    /// The API's process.
    pub api: Option<Child>,
    /// The workers.
    pub workers: Vec<Worker>,
    /// The key of a project.
    pub key: String,
    address: String,
    lease: Duration,
    _alone: MutexGuard<'static, ()>,
}

/// A worker's process, on a small disk of its own where the machine allows that.
#[derive(Debug)]
pub struct Worker {
    /// Its process, once it was started.
    pub process: Option<Child>,
    /// Its name.
    pub name: String,
    /// Its data folder.
    pub folder: PathBuf,
    /// Whether that is a disk of its own.
    pub has_own_disk: bool,
    /// What its clock is set to, where the machine has what makes clocks jump.
    clock: Option<Clock>,
}

/// What libfaketime is told.
#[derive(Debug)]
struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    fn at(file: PathBuf) -> Option<Self> {
        let libraries =
            std::fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
        Some(Self { library: libraries.into_iter().find(|library| library.exists())?, file })
    }
}

impl Worker {
    /// Where its job folders are.
    #[must_use]
    pub fn jobs(&self) -> PathBuf {
        self.folder.join("worker/jobs")
    }

    fn pid(&self) -> Option<Pid> {
        pid(self.process.as_ref()?.id())
    }

    /// Sends its process a signal; nothing when it has none.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            let _ = kill_process(pid, signal);
        }
    }

    /// Sets its clock ahead by so many seconds. Returns whether that can be done.
    ///
    /// # Errors
    /// When the file that says so cannot be written.
    pub fn set_clock(&self, seconds: i32) -> Result<bool> {
        let Some(clock) = &self.clock else { return Ok(false) };
        // Read again and again: half a file must never be seen.
        let new = clock.file.with_extension("new");
        std::fs::write(&new, format!("{seconds:+}\n"))?;
        std::fs::rename(new, &clock.file)?;
        Ok(true)
    }

    /// The trainer it runs, if it runs one.
    #[must_use]
    pub fn trainer(&self) -> Option<Pid> {
        let worker = self.process.as_ref()?.id();
        // Any of its threads may have started it.
        let of_threads = std::fs::read_dir(format!("/proc/{worker}/task")).ok()?.flatten();
        let all = of_threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
        let ids: Vec<u32> =
            all.flat_map(|ids| ids.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>()).collect();
        ids.first().copied().and_then(pid)
    }
}

pub(crate) fn pid(id: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(id).ok()?)
}

impl World {
    /// A service with so many workers, whose jobs stay theirs for `lease` without a heartbeat, and a base model `base` whose steps take milliseconds.
    ///
    /// # Errors
    /// When one of the programs is not built, or does not start.
    pub fn start(workers: usize, lease: Duration) -> Result<Self> {
        let alone = one_at_a_time();
        let folder = tempfile::Builder::new().prefix("chaos-").permissions(PermissionsExt::from_mode(0o755)).tempdir()?;
        let postgres = crate::start_postgres()?;
        let s3 = S3Server::start()?;
        // Given up again until the service takes it, so of an address that is no other process'.
        let [.., high, low] = std::process::id().to_be_bytes();
        let address = TcpListener::bind((Ipv4Addr::new(127, 77, high, low), 0))?.local_addr()?.to_string();
        let wanted = workers;
        let mut workers = Vec::new();
        for number in 0..wanted {
            let own = folder.path().join(format!("worker-{number}"));
            std::fs::create_dir_all(&own)?;
            let mounted =
                Command::new("mount").args(["-t", "tmpfs", "-o", DISK, "tmpfs"]).arg(&own).stderr(Stdio::null()).status();
            let has_own_disk = mounted.is_ok_and(|status| status.success());
            let clock = Clock::at(folder.path().join(format!("worker-{number}.clock")));
            let worker = Worker { process: None, name: format!("worker-{number}"), folder: own, has_own_disk, clock };
            worker.set_clock(0)?;
            workers.push(worker);
        }
        let mut world = Self { folder, postgres, s3, api: None, workers, key: String::new(), address, lease, _alone: alone };
        let base = world.folder.path().join("base");
        small_base::make(crate::base_folder()?, &base)?;
        world.operator(&["models", "import", &base.to_string_lossy(), "--name", "base"])?;
        world.key = world.operator(&["keys", "create", "--project", "chaos"])?;
        let alignment = world.folder.path().join("alignment.jsonl");
        let rows = include_str!("../../examples/alignment.jsonl");
        std::fs::write(&alignment, rows.split_inclusive('\n').take(4).collect::<String>())?;
        world.operator(&["alignment", "import", &alignment.to_string_lossy(), "--name", "default"])?;
        world.start_api()?;
        for number in 0..wanted {
            world.start_worker(number)?;
        }
        Ok(world)
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new(program("holdfast")?);
        command
            .env("DATABASE_URL", self.postgres.url())
            .env("HOLDFAST_OBJECT_STORE", "s3://bucket/a/prefix")
            .envs(self.s3.settings())
            .env("HOLDFAST_DATA_DIR", self.folder.path().join("data"))
            // Faults are thrown at training; what is asked of models after it would only make each job longer.
            .env("HOLDFAST_SAFETY_GATE", "off");
        Ok(command)
    }

    fn operator(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command()?.args(arguments).output()?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    fn log(&self, name: &str) -> Result<File> {
        Ok(File::options().create(true).append(true).open(self.folder.path().join(format!("{name}.log")))?)
    }

    /// Where the API listens, as `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Starts the API.
    ///
    /// # Errors
    /// When its program is not built.
    pub fn start_api(&mut self) -> Result<()> {
        let log = self.log("api")?;
        let mut command = self.command()?;
        self.api = Some(command.args(["serve", "--listen", &self.address]).stdout(log.try_clone()?).stderr(log).spawn()?);
        Ok(())
    }

    /// Starts a worker's process.
    ///
    /// # Errors
    /// When there is no such worker, or its program is not built.
    pub fn start_worker(&mut self, number: usize) -> Result<()> {
        let mut command = self.command()?;
        let worker = self.workers.get(number).context("no such worker")?;
        let log = self.log(&worker.name)?;
        command
            .args(["worker", "--worker-name", &worker.name, "--lease-seconds", &self.lease.as_secs().to_string(), "--data-dir"])
            .arg(&worker.folder)
            // Three trainers share the machine.
            .env("OMP_NUM_THREADS", "1")
            .env("MKL_NUM_THREADS", "1")
            .stdout(log.try_clone()?)
            .stderr(log);
        if let Some(Clock { library, file }) = &worker.clock {
            // The monotonic clock goes on evenly, as it does where a clock is set.
            command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", file);
            command.envs([("FAKETIME_NO_CACHE", "1"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1"), ("DONT_FAKE_MONOTONIC", "1")]);
        }
        let process = command.spawn()?;
        if let Some(worker) = self.workers.get_mut(number) {
            worker.process = Some(process);
        }
        Ok(())
    }

    /// Starts whatever has ended.
    ///
    /// # Errors
    /// As [`Self::start_worker`].
    pub fn mend(&mut self) -> Result<()> {
        let ended = |process: &mut Option<Child>| process.as_mut().is_none_or(|child| matches!(child.try_wait(), Ok(Some(_))));
        for number in 0..self.workers.len() {
            if self.workers.get_mut(number).is_some_and(|worker| ended(&mut worker.process)) {
                self.start_worker(number)?;
            }
        }
        if ended(&mut self.api) {
            self.start_api()?;
        }
        Ok(())
    }

    /// A request that is made again until it is answered, as clients do: a POST under a name of its own.
    ///
    /// # Errors
    /// When it is refused, or not answered for two minutes.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>, name: &str) -> Result<Value> {
        let since = Instant::now();
        loop {
            let mut request = http::Request::builder()
                .method(method)
                .uri(format!("{}{path}", self.url()))
                .header("authorization", format!("Bearer {}", self.key));
            if method == "POST" {
                request = request.header("idempotency-key", name).header("content-type", "application/json");
            }
            let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(30)));
            let agent: ureq::Agent = config.build().into();
            let answer = match body {
                Some(body) => agent.run(request.body(body.to_string())?),
                None => agent.run(request.body(String::new())?),
            };
            if let Ok(mut answer) = answer {
                let status = answer.status().as_u16();
                if status < 500 {
                    let body: Value = answer.body_mut().with_config().limit(1 << 28).read_json().unwrap_or(Value::Null);
                    ensure!(status < 400, "{method} {path}: {status} {body}");
                    return Ok(body);
                }
            }
            ensure!(since.elapsed() < Duration::from_secs(120), "{method} {path} was not answered for two minutes");
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Uploads a file, trying again until it is taken.
    ///
    /// # Errors
    /// When it is refused, or not answered for two minutes.
    pub fn upload(&self, content: &str, name: &str) -> Result<String> {
        const BOUNDARY: &str = "chaos-boundary";
        let form = format!(
            "--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{name}.jsonl\"\r\n\r\n{content}\r\n--{BOUNDARY}--\r\n"
        );
        let since = Instant::now();
        loop {
            let request = ureq::post(format!("{}/v1/files", self.url()))
                .config()
                .http_status_as_error(false)
                .timeout_global(Some(Duration::from_secs(30)))
                .build();
            let request = request.header("authorization", format!("Bearer {}", self.key)).header("idempotency-key", name);
            if let Ok(mut answer) = request.content_type(format!("multipart/form-data; boundary={BOUNDARY}")).send(&form)
                && answer.status().as_u16() < 500
            {
                let body: Value = answer.body_mut().read_json()?;
                return Ok(body["id"].as_str().with_context(|| format!("the upload was refused: {body}"))?.to_owned());
            }
            ensure!(since.elapsed() < Duration::from_secs(120), "an upload was not answered for two minutes");
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// What the database answers: values alone, a line a row, their columns between `|`.
    ///
    /// # Errors
    /// When a query fails for a minute.
    pub fn sql(&self, query: &str) -> Result<Vec<String>> {
        let since = Instant::now();
        loop {
            let arguments = ["-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", "-d", &self.postgres.url(), "-c", query];
            let output = Command::new("psql").args(arguments).output()?;
            if output.status.success() {
                return Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect());
            }
            if since.elapsed() > Duration::from_secs(60) {
                bail!("psql: {}", String::from_utf8_lossy(&output.stderr));
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Removes what no row claims, now instead of in a day.
    ///
    /// # Errors
    /// When the database or the object store fails.
    pub fn sweep(&self) -> Result<()> {
        let (location, url) = (self.s3.location("bucket"), self.postgres.url());
        tokio::runtime::Runtime::new()?.block_on(async {
            let store = holdfast_store::Store::connect(&url, &location).await?;
            store.objects().sweep(Duration::ZERO).await?;
            store.close().await;
            Ok(())
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            worker.signal(Signal::CONT);
            if let Some(process) = &mut worker.process {
                let _ = process.kill();
                let _ = process.wait();
            }
            if worker.has_own_disk {
                let _ = Command::new("umount").arg("-l").arg(&worker.folder).status();
            }
        }
        if let Some(api) = &mut self.api {
            let _ = api.kill();
            let _ = api.wait();
        }
    }
}
