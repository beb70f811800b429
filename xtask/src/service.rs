//! A running `holdfast up`, and its API as the demo uses it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use ureq::unversioned::multipart::{Form, Part};

/// The service, stopped when dropped.
pub(crate) struct Service {
    process: Child,
    url: String,
    key: String,
    log: PathBuf,
}

impl Service {
    /// Starts the service on a free port and waits until it listens. What it logs goes to `holdfast.log`.
    pub(crate) fn start(program: &Path, data: &Path) -> Result<Self> {
        let service = Self::start_with(program, "up", data)?;
        let key =
            std::fs::read_to_string(data.join("project.key")).context("the service wrote no project.key")?.trim().to_owned();
        Ok(service.with_key(key))
    }

    /// The same service, called with this key.
    pub(crate) fn with_key(mut self, key: String) -> Self {
        self.key = key;
        self
    }

    /// Starts `holdfast up` or `holdfast serve`, without a key to call it with.
    pub(crate) fn start_with(program: &Path, command: &str, data: &Path) -> Result<Self> {
        std::fs::create_dir_all(data)?;
        let log = data.join("holdfast.log");
        let mut process = Command::new(program)
            .args([command, "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(data)
            // The demo is a world of its own, whatever the operator's shell has set.
            .env_remove("DATABASE_URL")
            .env_remove("HOLDFAST_OBJECT_STORE")
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let output = process.stdout.take().context("the service has no output")?;
        let listening = BufReader::new(output)
            .lines()
            .map_while(|line| line.ok())
            .find_map(|line| Some(line.strip_prefix("listening on ")?.to_owned()));
        let Some(url) = listening else {
            let _ = process.wait();
            bail!("the service did not start: {}", std::fs::read_to_string(&log).unwrap_or_default().trim());
        };
        Ok(Self { process, url, key: String::new(), log })
    }

    /// Where it listens.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    fn silent(&self) -> String {
        format!("the service at {} does not answer; its log is {}", self.url, self.log.display())
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.key)
    }

    pub(crate) fn get(&self, path: &str) -> Result<Value> {
        read(
            ureq::get(format!("{}{path}", self.url))
                .config()
                .http_status_as_error(false)
                .build()
                .header("Authorization", self.bearer())
                .call()
                .with_context(|| self.silent())?,
        )
    }

    /// What a browser would be shown.
    pub(crate) fn page(&self, path: &str) -> Result<Vec<u8>> {
        let request =
            ureq::get(format!("{}{path}", self.url)).header("Authorization", self.bearer()).header("Accept", "text/html");
        Ok(request.call().with_context(|| self.silent())?.into_body().read_to_vec()?)
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let request = ureq::post(format!("{}{path}", self.url)).config().http_status_as_error(false).build();
        read(request.header("Authorization", self.bearer()).send_json(body).with_context(|| self.silent())?)
    }

    /// Uploads a dataset and returns its id.
    pub(crate) fn upload(&self, file: &Path) -> Result<String> {
        let form = Form::new().text("purpose", "fine-tune").part("file", Part::file(file)?);
        let request = ureq::post(format!("{}/v1/files", self.url)).config().http_status_as_error(false).build();
        let file = read(request.header("Authorization", self.bearer()).send(form).with_context(|| self.silent())?)?;
        Ok(file["id"].as_str().context("the service gave the file no id")?.to_owned())
    }

    /// Uploads a dataset in `parts` parts, all at the same time.
    pub(crate) fn upload_in_parts(&self, file: &Path, parts: u64) -> Result<()> {
        let bytes = std::fs::metadata(file)?.len();
        let upload = self.post(
            "/v1/uploads",
            &serde_json::json!({"filename": "rows.jsonl", "purpose": "fine-tune", "bytes": bytes, "mime_type": "application/jsonl"}),
        )?;
        let upload = upload["id"].as_str().context("the service gave the upload no id")?;
        let part_bytes = bytes.div_ceil(parts);
        let send = |number: u64| -> Result<String> {
            let mut part = File::open(file)?;
            std::io::Seek::seek(&mut part, std::io::SeekFrom::Start(number * part_bytes))?;
            let part = std::io::Read::take(part, part_bytes);
            let form = Form::new().part("data", Part::owned_reader(part).file_name("part"));
            let url = format!("{}/v1/uploads/{upload}/parts", self.url);
            let request = ureq::post(url).config().http_status_as_error(false).build();
            let part = read(request.header("Authorization", self.bearer()).send(form).with_context(|| self.silent())?)?;
            Ok(part["id"].as_str().context("the service gave the part no id")?.to_owned())
        };
        let ids = std::thread::scope(|scope| {
            let sending: Vec<_> = (0..parts).map(|number| scope.spawn(move || send(number))).collect();
            sending
                .into_iter()
                .map(|part| part.join().map_err(|_| anyhow::anyhow!("a sender failed"))?)
                .collect::<Result<Vec<_>>>()
        })?;
        self.post(&format!("/v1/uploads/{upload}/complete"), &serde_json::json!({"part_ids": ids}))?;
        Ok(())
    }

    /// Writes one of the adapter's files into `folder`.
    pub(crate) fn download_adapter_file(&self, job: &str, name: &str, folder: &Path) -> Result<()> {
        let url = format!("{}/v1/fine_tuning/jobs/{job}/adapter/{name}", self.url);
        let mut answer = ureq::get(url).header("Authorization", self.bearer()).call()?;
        let mut file = File::create(folder.join(name))?;
        std::io::copy(&mut answer.body_mut().as_reader(), &mut file)?;
        Ok(())
    }

    /// The most memory the service has had resident since it started, in MiB. Its Postgres and its trainers are not counted.
    pub(crate) fn peak_memory_mib(&self) -> Result<f64> {
        self.status_mib("VmHWM:")
    }

    /// The memory the service has resident now, in MiB.
    pub(crate) fn memory_mib(&self) -> Result<f64> {
        self.status_mib("VmRSS:")
    }

    fn status_mib(&self, name: &str) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line =
            status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("the kernel tells no {name}"))?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib / 1024.0)
    }

    /// Stops the service and waits for its end.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.terminate()?;
        let status = self.process.wait()?;
        if !status.success() {
            bail!("the service ended with {status}");
        }
        Ok(())
    }

    fn terminate(&self) -> Result<()> {
        let pid = i32::try_from(self.process.id()).ok().and_then(Pid::from_raw).context("the service has no process id")?;
        Ok(kill_process(pid, Signal::TERM)?)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            let _ = self.terminate();
            let _ = self.process.wait();
        }
    }
}

fn read(mut answer: ureq::http::Response<ureq::Body>) -> Result<Value> {
    let status = answer.status();
    let body: Value = answer.body_mut().read_json().with_context(|| format!("the service answered {status} without JSON"))?;
    if !status.is_success() {
        bail!("the service answered {status}: {}", body["error"]["message"].as_str().unwrap_or_default());
    }
    Ok(body)
}
