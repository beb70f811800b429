//! A service for a test: the real API on a port, a database of its own in a real Postgres, objects in a folder, and a worker
//! that moves when the test says so.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_api::Settings;
use holdfast_domain::ids::ProjectId;
use holdfast_domain::policy::Policy;
use holdfast_local_postgres::TemporaryPostgres;
use holdfast_safety::manifest::SignKey;
use holdfast_store::base_models::BaseModelFacts;
use holdfast_store::keys::NewKey;
use holdfast_store::retention::Retention;
use holdfast_store::{ObjectLocation, Store};
use holdfast_worker::WorkerConfig;
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;

pub mod chaos;
mod s3;
mod small_base;
mod world;

pub use s3::{S3Server, stored_as};
pub use world::{LEASE, Worker, World};

/// A running service.
#[derive(Debug)]
pub struct TestApp {
    /// Where it listens, as `http://127.0.0.1:PORT`.
    pub url: String,
    /// Its rows and objects.
    pub store: Store,
    /// The key of the project `default`.
    pub key: String,
    /// Runs what is async for the test.
    pub runtime: Runtime,
    database: Database,
    folder: TempDir,
    /// Where its objects are, unless they are in a folder.
    pub s3: Option<S3Server>,
    _shutdown: watch::Sender<bool>,
}

/// The name under which [`TestApp::with_model`] imports the real model.
pub const MODEL: &str = "SmolLM2-135M-Instruct";

/// Held by what loads the machine and by what measures time, so that one does not disturb the other.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a test waits for what must come, where its time is not what is tested: a busy machine is no failure.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// A dataset row that every check accepts.
pub const ROW: &str = r#"{"messages":[{"role":"user","content":"a film of grace"},{"role":"assistant","content":"positive"}]}"#;

/// Rows of the alignment set of a test's service.
pub const ALIGNMENT_ROWS: usize = 8;

/// The largest upload of a test's service.
pub const MAX_UPLOAD_BYTES: u64 = 8 * 1024 * 1024;

/// A server that does not wait for the disk: what a test writes need not outlive the machine, and the model that another test writes would
/// hold it up for seconds.
fn start_postgres() -> Result<TemporaryPostgres> {
    let postgres = TemporaryPostgres::start()?;
    let hurry = ["-c", "alter system set fsync = off", "-c", "select pg_reload_conf()"];
    let made = Command::new("psql").args(["-q", "-d", &postgres.url()]).args(hurry).output()?;
    ensure!(made.status.success(), "psql: {}", String::from_utf8_lossy(&made.stderr));
    Ok(postgres)
}

/// One Postgres for the whole test program; each service has a database of its own in it.
fn postgres_url() -> Result<&'static str> {
    static POSTGRES: OnceLock<Result<TemporaryPostgres, String>> = OnceLock::new();
    static URL: OnceLock<String> = OnceLock::new();
    match POSTGRES.get_or_init(|| start_postgres().map_err(|e| format!("{e:#}"))) {
        Ok(postgres) => Ok(URL.get_or_init(|| postgres.url())),
        Err(error) => bail!("no Postgres for the tests: {error}"),
    }
}

/// A database of its own, empty at first; dropped with the service.
#[derive(Debug)]
struct Database {
    name: String,
    url: String,
}

impl Database {
    fn new() -> Result<Self> {
        static DATABASES: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        let server = postgres_url()?;
        let made = Command::new("psql").args(["-q", "-d", server, "-c", &format!("create database {name}")]).output()?;
        ensure!(made.status.success(), "psql: {}", String::from_utf8_lossy(&made.stderr));
        Ok(Self { url: server.replacen("postgres:///holdfast", &format!("postgres:///{name}"), 1), name })
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let Ok(server) = postgres_url() else { return };
        let drop = format!("drop database if exists {} with (force)", self.name);
        let _ = Command::new("psql").args(["-q", "-d", server, "-c", &drop]).output();
    }
}

/// Where objects are, under a service's folder.
const OBJECTS: &str = "objects";

fn objects_in(folder: &Path) -> Result<ObjectLocation> {
    let objects = folder.join(OBJECTS);
    std::fs::create_dir_all(&objects)?;
    Ok(ObjectLocation::new(objects.to_string_lossy(), []))
}

/// What a test's service is set to.
fn settings() -> Settings {
    Settings {
        policy: Policy::default(),
        max_upload_bytes: MAX_UPLOAD_BYTES,
        requests_per_minute: None,
        behind_proxy: false,
        private_webhooks: true,
    }
}

impl TestApp {
    /// A service without models.
    ///
    /// # Errors
    /// When Postgres cannot be started.
    pub fn start() -> Result<Self> {
        Self::start_on(None)
    }

    /// A service whose objects are in a bucket of a real S3 server.
    ///
    /// # Errors
    /// When Postgres or the S3 server cannot be started.
    pub fn start_on_s3() -> Result<Self> {
        Self::start_on(Some(S3Server::start()?))
    }

    fn start_on(s3: Option<S3Server>) -> Result<Self> {
        let database = Database::new()?;
        let folder = tempfile::tempdir()?;
        let location = match &s3 {
            Some(s3) => s3.location("bucket"),
            None => objects_in(folder.path())?,
        };
        let runtime = Runtime::new()?;
        let (store, key) = runtime.block_on(async {
            let store = Store::connect(&database.url, &location).await?;
            store.migrate().await?;
            store.objects().take().await?;
            // A few of the rows, so that what the base says on them is computed in a moment.
            let rows: String =
                include_str!("../../examples/alignment.jsonl").split_inclusive('\n').take(ALIGNMENT_ROWS).collect();
            store.create_alignment_set("default", rows.as_bytes(), ALIGNMENT_ROWS as u64).await?;
            let project = store.ensure_project("default").await?;
            let key = store.create_key(&NewKey { project: Some(project), ..NewKey::default() }, None).await?.0;
            anyhow::Ok((store, key.reveal().to_owned()))
        })?;
        Self::serve(store, key, database, runtime, folder, s3)
    }

    fn serve(
        store: Store,
        key: String,
        database: Database,
        runtime: Runtime,
        folder: TempDir,
        s3: Option<S3Server>,
    ) -> Result<Self> {
        let (shutdown, stopped) = watch::channel(false);
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let url = format!("http://{}", listener.local_addr()?);
        runtime.spawn(holdfast::serve::serve_until(listener, store.clone(), settings(), stopped));
        Ok(Self { url, store, key, runtime, database, folder, s3, _shutdown: shutdown })
    }

    /// The connection string of its database.
    #[must_use]
    pub fn database_url(&self) -> &str {
        &self.database.url
    }

    /// A service on a database that is restored from a dump of this one's, and on a copy of its objects.
    ///
    /// # Errors
    /// When one of Postgres' programs fails.
    pub fn restored(&self) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let dump = folder.path().join("holdfast.dump");
        let run = |command: &mut Command| -> Result<()> {
            let output = command.output()?;
            ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        run(Command::new("pg_dump").args(["--format=custom", "--no-owner", "--file"]).arg(&dump).arg(self.database_url()))?;
        let database = Database::new()?;
        run(Command::new("pg_restore")
            .args(["--exit-on-error", "--single-transaction", "--no-owner", "--dbname", &database.url])
            .arg(&dump))?;
        run(Command::new("cp").arg("-r").arg(self.folder.path().join(OBJECTS)).arg(folder.path()))?;
        let location = objects_in(folder.path())?;
        let runtime = Runtime::new()?;
        let store = runtime.block_on(Store::connect(&database.url, &location))?;
        Self::serve(store, self.key.clone(), database, runtime, folder, None)
    }

    /// A service that has the real model.
    ///
    /// # Errors
    /// When the model is not there: `cargo xtask setup` downloads it.
    pub fn with_model() -> Result<Self> {
        Self::start()?.import_model()
    }

    /// Gives this service a model under [`MODEL`]'s name whose steps take milliseconds.
    ///
    /// # Errors
    /// As [`Self::with_model`].
    pub fn with_small_model(self) -> Result<Self> {
        let base = self.folder.path().join("small-base");
        small_base::make(base_folder()?, &base)?;
        let facts = BaseModelFacts { parameter_count: 1_000_000, context_length: 2048 };
        self.runtime.block_on(self.store.create_base_model(MODEL, &base, facts))?;
        Ok(self)
    }

    /// Gives this service the real model.
    ///
    /// # Errors
    /// As [`Self::with_model`].
    pub fn import_model(self) -> Result<Self> {
        let base = base_folder()?;
        let facts = BaseModelFacts { parameter_count: 134_515_008, context_length: 2048 };
        self.runtime.block_on(self.store.create_base_model(MODEL, base, facts))?;
        Ok(self)
    }

    /// The same service, called with another key.
    #[must_use]
    pub fn with_key(self, key: String) -> Self {
        Self { key, ..self }
    }

    /// A project's key.
    ///
    /// # Errors
    /// When the database fails.
    pub fn project_key(&self, name: &str) -> Result<(ProjectId, String)> {
        let project = self.runtime.block_on(self.store.ensure_project(name))?;
        Ok((project, self.make_key(&NewKey { project: Some(project), ..NewKey::default() })?))
    }

    /// An operator's key, which belongs to no project.
    ///
    /// # Errors
    /// When the database fails.
    pub fn admin_key(&self) -> Result<String> {
        self.make_key(&NewKey { is_admin: true, ..NewKey::default() })
    }

    /// Any key.
    ///
    /// # Errors
    /// When the database fails.
    pub fn make_key(&self, key: &NewKey) -> Result<String> {
        Ok(self.runtime.block_on(self.store.create_key(key, None))?.0.reveal().to_owned())
    }

    /// The configuration of this service's worker.
    ///
    /// # Errors
    /// When the trainer is not built.
    pub fn worker(&self) -> Result<WorkerConfig> {
        let trainer = program("holdfast-trainer")?;
        Ok(WorkerConfig {
            name: "test".into(),
            trainer,
            device: "cpu".into(),
            memory_limit_bytes: None,
            folder: self.folder.path().join("worker"),
            cache_bytes: 1 << 40,
            lease: Duration::from_secs(30),
            poll: Duration::from_millis(100),
            stall: Duration::ZERO,
            drain: Duration::from_secs(60),
            judge: None,
            judge_patience: Duration::ZERO,
            signing_key: SignKey::of_seed(&[7; 32]),
            retention: Retention::default(),
        })
    }

    /// Lets the worker take one job, and returns whether there was one.
    ///
    /// # Errors
    /// When the trainer is not built, or the database fails.
    pub fn step_worker(&self) -> Result<bool> {
        let (_keep, shutdown) = watch::channel(false);
        let config = self.worker()?;
        Ok(self.runtime.block_on(holdfast_worker::step(&self.store, &config, &shutdown))?)
    }

    /// A request with this service's key.
    ///
    /// # Errors
    /// When the service does not answer.
    pub fn call(&self, method: &str, path: &str, body: Option<&str>) -> Result<Answer> {
        self.call_as(Some(&self.key), method, path, body)
    }

    /// A request with any key, or none.
    ///
    /// # Errors
    /// When the service does not answer.
    pub fn call_as(&self, key: Option<&str>, method: &str, path: &str, body: Option<&str>) -> Result<Answer> {
        self.send(key, method, path, &[], body)
    }

    /// A request with this service's key and headers of its own.
    ///
    /// # Errors
    /// When the service does not answer.
    pub fn call_with(&self, headers: &[(&str, &str)], method: &str, path: &str, body: Option<&str>) -> Result<Answer> {
        self.send(Some(&self.key), method, path, headers, body)
    }

    /// A request without a body, with any key and headers of its own.
    ///
    /// # Errors
    /// When the service does not answer.
    pub fn send_as(&self, key: &str, headers: &[(&str, &str)], method: &str, path: &str) -> Result<Answer> {
        self.send(Some(key), method, path, headers, None)
    }

    fn send(&self, key: Option<&str>, method: &str, path: &str, headers: &[(&str, &str)], body: Option<&str>) -> Result<Answer> {
        let mut request = http::Request::builder().method(method).uri(format!("{}{path}", self.url));
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let config = ureq::Agent::config_builder().http_status_as_error(false).allow_non_standard_methods(true).max_redirects(0);
        let agent: ureq::Agent = config.build().into();
        let answer = match body {
            Some(body) => agent.run(request.body(body.to_owned())?)?,
            None => agent.run(request.body(())?)?,
        };
        Answer::read(answer)
    }

    /// What the database's own client answers to queries: values alone, a line a row.
    ///
    /// # Errors
    /// When a query fails.
    pub fn sql(&self, queries: &str) -> Result<String> {
        let arguments = ["-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", "-d", self.database_url(), "-c", queries];
        let output = Command::new("psql").args(arguments).output()?;
        ensure!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// Uploads a dataset.
    ///
    /// # Errors
    /// When the service does not answer.
    pub fn upload(&self, content: &[u8]) -> Result<Answer> {
        self.upload_form(&[("purpose", None, b"fine-tune"), ("file", Some("train.jsonl"), content)])
    }

    /// Sends a file's form: name, filename and content of each field.
    ///
    /// # Errors
    /// When the service does not answer.
    pub fn upload_form(&self, fields: &[(&str, Option<&str>, &[u8])]) -> Result<Answer> {
        self.send_form("/v1/files", &[], fields)
    }

    /// Sends a form with headers of its own.
    ///
    /// # Errors
    /// When the service does not answer.
    pub fn send_form(&self, path: &str, headers: &[(&str, &str)], fields: &[(&str, Option<&str>, &[u8])]) -> Result<Answer> {
        const BOUNDARY: &str = "holdfast-test-boundary";
        let mut body = Vec::new();
        for (name, filename, content) in fields {
            let filename = filename.map_or_else(String::new, |name| format!("; filename=\"{name}\""));
            body.extend(format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"{filename}\r\n\r\n").bytes());
            body.extend(*content);
            body.extend(b"\r\n");
        }
        body.extend(format!("--{BOUNDARY}--\r\n").bytes());
        let request = ureq::post(format!("{}{path}", self.url)).config().http_status_as_error(false).build();
        let mut request = request.header("authorization", format!("Bearer {}", self.key));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Answer::read(request.content_type(format!("multipart/form-data; boundary={BOUNDARY}")).send(&body[..])?)
    }

    /// Creates a job of the real model on rows that are accepted, with `more` in its request, and returns its id.
    ///
    /// # Errors
    /// When it is not created.
    pub fn create_job(&self, rows: &str, more: &Value) -> Result<String> {
        let mut body = serde_json::json!({"model": MODEL, "training_file": self.uploaded(rows.as_bytes())?});
        for (key, value) in more.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        let job = self.call("POST", "/v1/fine_tuning/jobs", Some(&body.to_string()))?;
        ensure!(job.status == 200, "{}", job.body);
        Ok(job.body["id"].as_str().context("no id")?.to_owned())
    }

    /// A job as the service shows it.
    ///
    /// # Errors
    /// When the service does not show it.
    pub fn job(&self, id: &str) -> Result<Value> {
        let job = self.call("GET", &format!("/v1/fine_tuning/jobs/{id}"), None)?;
        ensure!(job.status == 200, "{}", job.body);
        Ok(job.body)
    }

    /// Lets a worker of its own run until `done`, at most [`PATIENCE`].
    ///
    /// # Errors
    /// When the worker fails, or it takes longer.
    pub fn work_until(&self, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        let (stop, shutdown) = watch::channel(false);
        let worker = self.runtime.spawn(holdfast_worker::run(self.store.clone(), self.worker()?, shutdown));
        let (since, mut outcome) = (Instant::now(), Err(anyhow::anyhow!("it took too long")));
        while since.elapsed() < PATIENCE {
            match done() {
                Ok(false) => std::thread::sleep(Duration::from_millis(100)),
                other => {
                    outcome = other.map(|_| ());
                    break;
                }
            }
        }
        stop.send(true)?;
        self.runtime.block_on(worker)??;
        if outcome.is_err() {
            eprintln!("the newest job: {}", self.call("GET", "/v1/fine_tuning/jobs?limit=1", None)?.body["data"][0]);
        }
        outcome
    }

    /// Uploads a dataset that is accepted, and returns its id.
    ///
    /// # Errors
    /// When it is not accepted.
    pub fn uploaded(&self, content: &[u8]) -> Result<String> {
        let answer = self.upload(content)?;
        ensure!(answer.status == 200, "{}", answer.body);
        Ok(answer.body["id"].as_str().context("no id")?.to_owned())
    }

    /// The folder its objects are in, unless they are in a bucket.
    #[must_use]
    pub fn objects(&self) -> PathBuf {
        self.folder.path().join(OBJECTS)
    }

    /// Objects in the object store, for tests that nothing is left behind.
    #[must_use]
    pub fn object_count(&self, prefix: &str) -> usize {
        fn files(folder: &Path) -> usize {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|e| if e.path().is_dir() { files(&e.path()) } else { 1 }).sum()
        }
        files(&self.objects().join(prefix))
    }
}

/// What the service answered.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The header `x-request-id`.
    pub request_id: Option<String>,
    /// All headers.
    pub headers: http::HeaderMap,
    /// The body, `null` when it is no JSON.
    pub body: Value,
    /// The body's bytes.
    pub bytes: Vec<u8>,
}

impl Answer {
    fn read(mut answer: http::Response<ureq::Body>) -> Result<Self> {
        let headers = answer.headers().clone();
        let bytes = answer.body_mut().with_config().limit(1 << 30).read_to_vec()?;
        Ok(Self {
            status: answer.status().as_u16(),
            request_id: headers.get("x-request-id").and_then(|id| id.to_str().ok()).map(ToOwned::to_owned),
            headers,
            body: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
            bytes,
        })
    }

    /// A header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The error's `code` and `param`.
    #[must_use]
    pub fn error(&self) -> (&str, &str) {
        let word = |key: &str| self.body["error"][key].as_str().unwrap_or_default();
        (word("code"), word("param"))
    }
}

/// One of the project's programs, beside the test program's folder.
///
/// # Errors
/// When it is not built.
pub fn program(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    // Tests stand in a folder of their own beside the programs.
    let beside = here.parent().context("no target folder")?;
    let folder = if beside.ends_with("deps") { beside.parent().context("no target folder")? } else { beside };
    let path = folder.join(name);
    ensure!(path.is_file(), "{} is missing; run `cargo build --workspace`", path.display());
    Ok(path)
}

/// The real model, imported once for each build of a test program.
fn base_folder() -> Result<&'static Path> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let import = || -> Result<PathBuf> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let gguf = root.join(".models/SmolLM2-135M-Instruct.Q4_1.gguf");
        ensure!(gguf.exists(), "{} is missing; run `cargo xtask setup`", gguf.display());
        let program = std::env::current_exe()?;
        let name = program.file_stem().context("a program without a name")?.to_string_lossy().into_owned();
        // Cargo ends a test program's name with a hash that changes with its dependencies.
        let name = name.split('-').next().unwrap_or(&name);
        let out =
            program.ancestors().find(|folder| folder.ends_with("target")).context("no target folder")?.join("tmp").join(name);
        holdfast_import::import_once(&gguf, &out, &format!("{:?}", std::fs::metadata(&program)?.modified()?))?;
        Ok(out)
    };
    match FOLDER.get_or_init(|| import().map_err(|e| format!("{e:#}"))) {
        Ok(folder) => Ok(folder),
        Err(error) => bail!("{error}"),
    }
}
