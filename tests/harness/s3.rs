//! A real S3 server for a test: a process of its own, that can be stopped and started again on what it kept.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use holdfast_store::ObjectLocation;
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::program;

/// The name under which the server keeps an object in its bucket's folder.
#[must_use]
pub fn stored_as(key: &str) -> String {
    let (_, name) = key.rsplit_once('/').unwrap_or(("", key));
    let digest = hex::encode(Sha256::digest(key));
    format!("{}-{}", &digest[..32], &name[..name.len().min(40)])
}

/// A running server with one bucket, `bucket`.
#[derive(Debug)]
pub struct S3Server {
    process: Child,
    endpoint: String,
    folder: TempDir,
}

impl S3Server {
    /// Starts a server with an empty bucket.
    ///
    /// # Errors
    /// When it is not built or does not start.
    pub fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::create_dir(folder.path().join("bucket"))?;
        let (process, endpoint) = run(folder.path(), "0")?;
        Ok(Self { process, endpoint, folder })
    }

    /// Where it listens, as `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A bucket, under a prefix, and how to reach it.
    #[must_use]
    pub fn location(&self, bucket: &str) -> ObjectLocation {
        let settings = self.settings().map(|(name, value)| (name.to_owned(), value.to_owned()));
        ObjectLocation::new(format!("s3://{bucket}/a/prefix"), settings)
    }

    /// What a program's environment must hold to reach it.
    #[must_use]
    pub fn settings(&self) -> [(&'static str, &str); 4] {
        [
            ("AWS_ENDPOINT", &self.endpoint),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", "holdfast"),
            ("AWS_SECRET_ACCESS_KEY", "holdfast-secret"),
        ]
    }

    /// The names of the bucket's objects: see [`stored_as`].
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn stored(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(self.folder.path().join("bucket"))?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    /// How many parts of objects lie about that were neither completed nor aborted.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn parts_of_unfinished_objects(&self) -> Result<usize> {
        let entries = std::fs::read_dir(self.folder.path())?.collect::<Result<Vec<_>, _>>()?;
        Ok(entries.iter().filter(|entry| entry.file_name().to_string_lossy().starts_with(".upload_id-")).count())
    }

    /// Kills the server; what it holds stays.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn stop(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Has the server stand still, or go on.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.process.id()).ok().and_then(Pid::from_raw).context("no process")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Starts a stopped server again, in the same place.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_again(&mut self) -> Result<()> {
        let (_, port) = self.endpoint.rsplit_once(':').context("an endpoint without a port")?;
        (self.process, self.endpoint) = run(self.folder.path(), port)?;
        Ok(())
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

fn run(folder: &Path, port: &str) -> Result<(Child, String)> {
    let mut command = Command::new(program("s3-server")?);
    command.arg(folder).arg(port).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = command.spawn()?;
    let mut line = String::new();
    BufReader::new(process.stdout.take().context("no output")?).read_line(&mut line)?;
    let endpoint = line.trim().strip_prefix("listening on ").with_context(|| format!("the S3 server did not start: {line}"))?;
    Ok((process, endpoint.to_owned()))
}
