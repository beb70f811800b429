//! A service for a test: the real API on a port, a database of its own in a real Postgres, objects in a folder, and a worker
//! that moves when the test says so.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use holdfast_api::{AppState, Settings};
use holdfast_domain::ids::ProjectId;
use holdfast_domain::safety::Floor;
use holdfast_local_postgres::LocalPostgres;
use holdfast_store::Store;
use holdfast_store::base_models::BaseModelFacts;
use holdfast_worker::WorkerConfig;
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;

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
    folder: TempDir,
    _shutdown: watch::Sender<bool>,
}

/// The name under which [`TestApp::with_model`] imports the real model.
pub const MODEL: &str = "SmolLM2-135M-Instruct";

/// A dataset row that every check accepts.
pub const ROW: &str = r#"{"messages":[{"role":"user","content":"a film of grace"},{"role":"assistant","content":"positive"}]}"#;

/// The largest upload of a test's service.
pub const MAX_UPLOAD_BYTES: u64 = 8 * 1024 * 1024;

/// One Postgres for the whole test program; each service has a database of its own in it.
fn postgres_url() -> Result<&'static str> {
    static POSTGRES: OnceLock<Result<(LocalPostgres, TempDir), String>> = OnceLock::new();
    let start = || -> Result<(LocalPostgres, TempDir)> {
        let folder = tempfile::Builder::new().permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).tempdir()?;
        let postgres = LocalPostgres::start(&folder.path().join("pg"))?;
        stop_at_exit(&folder.path().join("pg/data"));
        Ok((postgres, folder))
    };
    static URL: OnceLock<String> = OnceLock::new();
    let started = POSTGRES.get_or_init(|| start().map_err(|e| format!("{e:#}")));
    match started {
        Ok((postgres, _)) => Ok(URL.get_or_init(|| postgres.url())),
        Err(error) => bail!("no Postgres for the tests: {error}"),
    }
}

/// Statics are not dropped when a test program ends, so a small shell waits for that and then stops the server.
fn stop_at_exit(data: &Path) {
    let script = "while kill -0 \"$0\" 2>/dev/null; do sleep 0.2; done; kill -INT \"$(head -n 1 \"$1/postmaster.pid\")\"; sleep 2; rm -rf \"$(dirname \"$(dirname \"$1\")\")\"";
    let _ = Command::new("sh").args(["-c", script]).arg(std::process::id().to_string()).arg(data).spawn();
}

impl TestApp {
    /// A service without models.
    ///
    /// # Errors
    /// When Postgres cannot be started.
    pub fn start() -> Result<Self> {
        static DATABASES: AtomicU32 = AtomicU32::new(0);
        let database = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        let server = postgres_url()?;
        let made = Command::new("psql").args(["-q", "-d", server, "-c", &format!("create database {database}")]).output()?;
        ensure!(made.status.success(), "psql: {}", String::from_utf8_lossy(&made.stderr));
        let url = server.replacen("postgres:///holdfast", &format!("postgres:///{database}"), 1);
        let folder = tempfile::tempdir()?;
        let objects = folder.path().join("objects");
        std::fs::create_dir(&objects)?;
        let runtime = Runtime::new()?;
        let (shutdown, stopped) = watch::channel(false);
        let (store, key, address) = runtime.block_on(async {
            let store = Store::connect(&url, &objects).await?;
            store.migrate().await?;
            let rows = include_bytes!("../../examples/alignment.jsonl");
            store.create_alignment_set("default", rows, rows.iter().filter(|b| **b == b'\n').count() as u64).await?;
            let project = store.ensure_project("default").await?;
            let key = store.create_key(Some(project), false).await?.reveal().to_owned();
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
            let address = listener.local_addr()?;
            let settings = Settings { safety_floor: Floor::default(), max_upload_bytes: MAX_UPLOAD_BYTES };
            let router = holdfast_api::router(AppState { store: store.clone(), settings: Arc::new(settings) });
            tokio::spawn(async move {
                let mut stopped = stopped;
                let served = axum::serve(listener, router).with_graceful_shutdown(async move {
                    let _ = stopped.wait_for(|down| *down).await;
                });
                served.await
            });
            anyhow::Ok((store, key, address))
        })?;
        Ok(Self { url: format!("http://{address}"), store, key, runtime, folder, _shutdown: shutdown })
    }

    /// A service that has the real model.
    ///
    /// # Errors
    /// When the model is not there: `cargo xtask setup` downloads it.
    pub fn with_model() -> Result<Self> {
        let app = Self::start()?;
        let base = base_folder()?;
        app.runtime.block_on(app.store.create_base_model(
            MODEL,
            base,
            BaseModelFacts { parameter_count: 134_515_008, context_length: 2048 },
        ))?;
        Ok(app)
    }

    /// A project's key.
    ///
    /// # Errors
    /// When the database fails.
    pub fn project_key(&self, name: &str) -> Result<(ProjectId, String)> {
        self.runtime.block_on(async {
            let project = self.store.ensure_project(name).await?;
            Ok((project, self.store.create_key(Some(project), false).await?.reveal().to_owned()))
        })
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
            folder: self.folder.path().join("worker"),
            cache_bytes: 1 << 40,
            lease: Duration::from_secs(30),
            poll: Duration::from_millis(100),
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
        let mut request = http::Request::builder().method(method).uri(format!("{}{path}", self.url));
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let agent: ureq::Agent =
            ureq::Agent::config_builder().http_status_as_error(false).allow_non_standard_methods(true).build().into();
        let answer = match body {
            Some(body) => agent.run(request.body(body.to_owned())?)?,
            None => agent.run(request.body(())?)?,
        };
        Answer::read(answer)
    }

    /// Uploads a dataset.
    ///
    /// # Errors
    /// When the service does not answer.
    pub fn upload(&self, content: &[u8]) -> Result<Answer> {
        self.upload_form(&[("purpose", None, b"fine-tune"), ("file", Some("train.jsonl"), content)])
    }

    /// Sends a form: name, filename and content of each field.
    ///
    /// # Errors
    /// When the service does not answer.
    pub fn upload_form(&self, fields: &[(&str, Option<&str>, &[u8])]) -> Result<Answer> {
        const BOUNDARY: &str = "holdfast-test-boundary";
        let mut body = Vec::new();
        for (name, filename, content) in fields {
            let filename = filename.map_or_else(String::new, |name| format!("; filename=\"{name}\""));
            body.extend(format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"{filename}\r\n\r\n").bytes());
            body.extend(*content);
            body.extend(b"\r\n");
        }
        body.extend(format!("--{BOUNDARY}--\r\n").bytes());
        let request = ureq::post(format!("{}/v1/files", self.url)).config().http_status_as_error(false).build();
        let request = request.header("authorization", format!("Bearer {}", self.key));
        Answer::read(request.content_type(format!("multipart/form-data; boundary={BOUNDARY}")).send(&body[..])?)
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

    /// Objects in the object store, for tests that nothing is left behind.
    #[must_use]
    pub fn object_count(&self, prefix: &str) -> usize {
        fn files(folder: &Path) -> usize {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|e| if e.path().is_dir() { files(&e.path()) } else { 1 }).sum()
        }
        files(&self.folder.path().join("objects").join(prefix))
    }
}

/// What the service answered.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The header `x-request-id`.
    pub request_id: Option<String>,
    /// The body, `null` when it is no JSON.
    pub body: Value,
    /// The body's bytes.
    pub bytes: Vec<u8>,
}

impl Answer {
    fn read(mut answer: http::Response<ureq::Body>) -> Result<Self> {
        let bytes = answer.body_mut().with_config().limit(1 << 30).read_to_vec()?;
        Ok(Self {
            status: answer.status().as_u16(),
            request_id: answer.headers().get("x-request-id").and_then(|id| id.to_str().ok()).map(ToOwned::to_owned),
            body: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
            bytes,
        })
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
    let path = here.parent().and_then(Path::parent).context("no target folder")?.join(name);
    ensure!(path.is_file(), "{} is missing; run `cargo build --workspace`", path.display());
    Ok(path)
}

/// The real model, imported once for all tests.
fn base_folder() -> Result<&'static Path> {
    static FOLDER: OnceLock<Result<TempDir, String>> = OnceLock::new();
    let import = || -> Result<TempDir> {
        let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.models/SmolLM2-135M-Instruct.Q4_1.gguf");
        ensure!(gguf.exists(), "{} is missing; run `cargo xtask setup`", gguf.display());
        let folder = tempfile::tempdir()?;
        holdfast_import::import(&gguf, folder.path())?;
        Ok(folder)
    };
    match FOLDER.get_or_init(|| import().map_err(|e| format!("{e:#}"))) {
        Ok(folder) => Ok(folder.path()),
        Err(error) => bail!("{error}"),
    }
}
