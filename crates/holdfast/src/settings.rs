//! Settings: a flag and an environment name each.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use holdfast_api::Settings;
use holdfast_domain::limits::DEFAULT_MAX_UPLOAD_BYTES;
use holdfast_domain::safety::{Defense, Floor};
use holdfast_worker::WorkerConfig;

/// Where rows and objects are.
#[derive(Debug, Clone, Args)]
pub struct StoreArgs {
    /// Where everything is kept that is not set otherwise.
    #[arg(long, env = "HOLDFAST_DATA_DIR", default_value = ".data", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// The database; without it, a private one under the data directory.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<String>,
    /// The object store: a folder, or file:///a/folder; without it, a folder under the data directory.
    #[arg(long, env = "HOLDFAST_OBJECT_STORE", value_name = "URL")]
    pub object_store: Option<String>,
}

/// What the API holds to.
#[derive(Debug, Clone, Args)]
pub struct ApiArgs {
    /// The largest upload.
    #[arg(long, env = "HOLDFAST_MAX_UPLOAD_BYTES", default_value_t = DEFAULT_MAX_UPLOAD_BYTES, value_name = "BYTES")]
    pub max_upload_bytes: u64,
    /// The weakest defense a tenant may choose: none, safe_mix, lisa, kl_penalty, sbr, pcgrad, safegrad or held.
    #[arg(long, env = "HOLDFAST_SAFETY_FLOOR", default_value = "safegrad", value_name = "DEFENSE")]
    pub safety_floor: String,
    /// The smallest rho a tenant may choose.
    #[arg(long, env = "HOLDFAST_RHO_FLOOR", default_value_t = 1.0, value_name = "RHO")]
    pub rho_floor: f64,
    /// The alignment set used when none is named.
    #[arg(long, env = "HOLDFAST_ALIGNMENT_SET", default_value = crate::first_start::ALIGNMENT_SET, value_name = "NAME")]
    pub alignment_set: String,
}

/// How a worker works.
#[derive(Debug, Clone, Args)]
pub struct WorkerArgs {
    /// Its name; the machine's name and the process's number unless set.
    #[arg(long, env = "HOLDFAST_WORKER_NAME", value_name = "NAME")]
    pub worker_name: Option<String>,
    /// The trainer's program; beside this one unless set.
    #[arg(long, env = "HOLDFAST_TRAINER", value_name = "FILE")]
    pub trainer: Option<PathBuf>,
    /// Where to compute: cpu, cuda or cuda:N.
    #[arg(long, env = "HOLDFAST_DEVICE", default_value = "cpu")]
    pub device: String,
    /// Room for base models on this machine's disk.
    #[arg(long, env = "HOLDFAST_BASE_CACHE_BYTES", default_value_t = 64 << 30, value_name = "BYTES")]
    pub base_cache_bytes: u64,
    /// Seconds a job stays this worker's without a heartbeat.
    #[arg(long, env = "HOLDFAST_LEASE_SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(5..=3600))]
    pub lease_seconds: u64,
}

impl ApiArgs {
    /// The settings handlers see.
    ///
    /// # Errors
    /// When the floor is no defense, or its rho no number it can use.
    pub fn settings(&self) -> Result<Settings> {
        let Some(defense) = Defense::parse(&self.safety_floor) else {
            let known = Defense::ALL.map(Defense::as_str).join(", ");
            bail!("--safety-floor {:?} is no method; there are {known}", self.safety_floor);
        };
        if !(0.0..=holdfast_domain::safety::MAX_RHO).contains(&self.rho_floor) {
            bail!("--rho-floor must lie between 0 and {}; it is {}", holdfast_domain::safety::MAX_RHO, self.rho_floor);
        }
        let safety_floor = Floor { defense, rho: self.rho_floor, alignment_set: self.alignment_set.clone() };
        Ok(Settings { safety_floor, max_upload_bytes: self.max_upload_bytes })
    }
}

impl WorkerArgs {
    /// The worker's configuration, its folders under the data directory.
    ///
    /// # Errors
    /// When the trainer's program is not there.
    pub fn config(&self, store: &StoreArgs) -> Result<WorkerConfig> {
        let trainer = match &self.trainer {
            Some(path) => path.clone(),
            None => std::env::current_exe().context("cannot find this program's own folder")?.with_file_name("holdfast-trainer"),
        };
        if !trainer.is_file() {
            bail!(
                "the trainer {} is not there; build it with `cargo build --release -p holdfast-trainer`, or set --trainer",
                trainer.display()
            );
        }
        let host = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
        let default_name = || format!("{}-{}", host.trim(), std::process::id());
        Ok(WorkerConfig {
            name: self.worker_name.clone().unwrap_or_else(default_name),
            trainer,
            device: self.device.clone(),
            folder: std::path::absolute(store.data_dir.join("worker"))?,
            cache_bytes: self.base_cache_bytes,
            lease: Duration::from_secs(self.lease_seconds),
            poll: Duration::from_secs(2),
        })
    }
}
