//! Settings: a flag and an environment name each.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use holdfast_api::Settings;
use holdfast_domain::limits::DEFAULT_MAX_UPLOAD_BYTES;
use holdfast_domain::policy::Policy;
use holdfast_domain::safety::Defense;
use holdfast_judge::{Config, Endpoint, Key, Protocol};
use holdfast_store::retention::Retention;
use holdfast_worker::WorkerConfig;

use crate::signing;

/// How long a judge may take for one answer.
const JUDGE_TIMEOUT: Duration = Duration::from_secs(60);

/// Where rows and objects are.
#[derive(Debug, Clone, Args)]
pub struct StoreArgs {
    /// Where everything is kept that is not set otherwise.
    #[arg(long, env = "HOLDFAST_DATA_DIR", default_value = ".data", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// The database; without it, a private one under the data directory.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<String>,
    /// The object store: a folder, file:///a/folder, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix, with
    /// credentials in the environment under their provider's names; without it, a folder under the data directory.
    #[arg(long, env = "HOLDFAST_OBJECT_STORE", value_name = "URL")]
    pub object_store: Option<String>,
}

/// What the API holds to.
#[derive(Debug, Clone, Args)]
pub struct ApiArgs {
    /// The largest upload.
    #[arg(long, env = "HOLDFAST_MAX_UPLOAD_BYTES", default_value_t = DEFAULT_MAX_UPLOAD_BYTES, value_name = "BYTES")]
    pub max_upload_bytes: u64,
    /// Requests an API key may make in a minute, unless it was given a number of its own; 0 for as many as it likes.
    #[arg(long, env = "HOLDFAST_REQUESTS_PER_MINUTE", default_value_t = 0, value_name = "N")]
    pub requests_per_minute: u32,
    /// A proxy stands in front: believe its x-forwarded-for about where requests come from.
    #[arg(long, env = "HOLDFAST_BEHIND_PROXY")]
    pub behind_proxy: bool,
    /// Let webhooks lead to private addresses and plain http.
    #[arg(long, env = "HOLDFAST_PRIVATE_WEBHOOKS")]
    pub private_webhooks: bool,
    /// The weakest defense a tenant may choose: none, safe_mix, lisa, kl_penalty, sbr, pcgrad, safegrad or held.
    #[arg(long, env = "HOLDFAST_SAFETY_FLOOR", default_value = "safegrad", value_name = "DEFENSE")]
    pub safety_floor: String,
    /// The smallest rho a tenant may choose. A job that names none gets it, or 10 under safegrad on deciding positions where
    /// this is less.
    #[arg(long, env = "HOLDFAST_RHO_FLOOR", default_value_t = 1.0, value_name = "RHO")]
    pub rho_floor: f64,
    /// Whether what a job made is asked the safety suites before it is published: off, report (asked, and the report says what came
    /// of it) or on (what does not pass is quarantined). This and the settings before it count where no policy is set over the API.
    #[arg(long, env = "HOLDFAST_SAFETY_GATE", default_value = "on", value_name = "GATE")]
    pub safety_gate: Gate,
    /// The alignment set used when none is named.
    #[arg(long, env = "HOLDFAST_ALIGNMENT_SET", default_value = crate::first_start::ALIGNMENT_SET, value_name = "NAME")]
    pub alignment_set: String,
}

/// What becomes of what a job made, where no policy is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Gate {
    /// It is published.
    Off,
    /// It is asked the suites, and published.
    Report,
    /// It is asked the suites, and published if it passes.
    On,
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
    /// The most memory a run may take on that device; a job that needs more is refused. On a CPU the machine's or its container's unless set; a
    /// GPU is not asked, so say what it has.
    #[arg(long, env = "HOLDFAST_DEVICE_MEMORY_BYTES", value_name = "BYTES")]
    pub device_memory_bytes: Option<u64>,
    /// The Ed25519 key in PEM that manifests are signed with; unless set signing.key in the data directory, made when there is none.
    /// Give all workers the same.
    #[arg(long, env = "HOLDFAST_SIGNING_KEY", value_name = "FILE")]
    pub signing_key: Option<PathBuf>,
    /// The OpenAI-compatible endpoint that judges answers where a policy wants one to, as http://host:8000/v1.
    #[arg(long, env = "HOLDFAST_JUDGE_URL", value_name = "URL")]
    pub judge_url: Option<url::Url>,
    /// The model that is asked there.
    #[arg(long, env = "HOLDFAST_JUDGE_MODEL", value_name = "NAME", default_value = "")]
    pub judge_model: String,
    /// How it is asked: guard (Llama Guard and its like), moderation (the moderation endpoint) or chat (any chat model).
    #[arg(long, env = "HOLDFAST_JUDGE_PROTOCOL", value_name = "PROTOCOL", default_value = "guard")]
    pub judge_protocol: String,
    /// The key it asks for.
    #[arg(long, env = "HOLDFAST_JUDGE_KEY", value_name = "KEY", hide_env_values = true)]
    pub judge_key: Option<String>,
    /// Minutes for which a job waits for a judge that is away.
    #[arg(long, env = "HOLDFAST_JUDGE_PATIENCE_MINUTES", default_value_t = 30, value_name = "MINUTES")]
    pub judge_patience_minutes: u32,
    /// Room for base models on this machine's disk.
    #[arg(long, env = "HOLDFAST_BASE_CACHE_BYTES", default_value_t = 64 << 30, value_name = "BYTES")]
    pub base_cache_bytes: u64,
    /// Seconds a job stays this worker's without a heartbeat.
    #[arg(long, env = "HOLDFAST_LEASE_SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(5..=3600))]
    pub lease_seconds: u64,
    /// Minutes for which a trainer may write nothing before it is ended and its job tried again; 0 for ever.
    #[arg(long, env = "HOLDFAST_STALL_MINUTES", default_value_t = 60, value_name = "MINUTES")]
    pub stall_minutes: u32,
    /// Seconds a trainer has to end its step and write a checkpoint when the worker is told to stop. Allow half a minute more before
    /// the worker itself is killed.
    #[arg(long, env = "HOLDFAST_DRAIN_SECONDS", default_value_t = 240, value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub drain_seconds: u64,
    /// Days for which a job's events, and the figures of its steps beside its result file, are kept once it has ended; 0 for ever.
    #[arg(long, env = "HOLDFAST_KEEP_EVENTS_DAYS", default_value_t = 0, value_name = "DAYS")]
    pub keep_events_days: u32,
    /// Days for which a job's checkpoints are kept once it has ended; 0 for ever. Its model stays.
    #[arg(long, env = "HOLDFAST_KEEP_CHECKPOINTS_DAYS", default_value_t = 0, value_name = "DAYS")]
    pub keep_checkpoints_days: u32,
    /// Days for which the audit log is kept, at least 30; 0 for ever.
    #[arg(long, env = "HOLDFAST_KEEP_AUDIT_DAYS", default_value_t = 0, value_name = "DAYS")]
    pub keep_audit_days: u32,
    /// Days for which it is kept what webhooks were told; 0 for ever.
    #[arg(long, env = "HOLDFAST_KEEP_DELIVERIES_DAYS", default_value_t = 30, value_name = "DAYS")]
    pub keep_deliveries_days: u32,
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
        let mut policy = Policy::at_least(defense, self.rho_floor, &self.alignment_set);
        policy.evaluate = self.safety_gate != Gate::Off;
        policy.gate.enabled = self.safety_gate == Gate::On;
        policy.check().context("the settings of --safety-floor, --rho-floor, --alignment-set and --safety-gate")?;
        Ok(Settings {
            policy,
            max_upload_bytes: self.max_upload_bytes,
            requests_per_minute: (self.requests_per_minute > 0).then_some(self.requests_per_minute),
            behind_proxy: self.behind_proxy,
            private_webhooks: self.private_webhooks,
        })
    }
}

impl WorkerArgs {
    fn judge(&self) -> Result<Option<Endpoint>> {
        let Some(url) = &self.judge_url else { return Ok(None) };
        let Some(protocol) = Protocol::parse(&self.judge_protocol) else {
            let known = Protocol::ALL.map(Protocol::as_str).join(", ");
            bail!("--judge-protocol {:?} is none; there are {known}", self.judge_protocol);
        };
        if self.judge_model.is_empty() && protocol != Protocol::Moderation {
            bail!("--judge-url needs --judge-model: the model that is asked there");
        }
        let config = Config {
            url: url.clone(),
            model: self.judge_model.clone(),
            protocol,
            key: self.judge_key.clone().map(Key::new),
            timeout: JUDGE_TIMEOUT,
        };
        Ok(Some(Endpoint::new(config).context("--judge-url")?))
    }

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
        if (1..30).contains(&self.keep_audit_days) {
            bail!("--keep-audit-days takes 0, or 30 and more; it is {}", self.keep_audit_days);
        }
        let days = |days: u32| (days > 0).then(|| Duration::from_secs(u64::from(days) * 24 * 60 * 60));
        let retention = Retention {
            events: days(self.keep_events_days),
            checkpoints: days(self.keep_checkpoints_days),
            audit: days(self.keep_audit_days),
            deliveries: days(self.keep_deliveries_days),
        };
        let host = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
        let default_name = || format!("{}-{}", host.trim(), std::process::id());
        Ok(WorkerConfig {
            name: self.worker_name.clone().unwrap_or_else(default_name),
            trainer,
            device: self.device.clone(),
            memory_limit_bytes: self.device_memory_bytes,
            folder: std::path::absolute(store.data_dir.join("worker"))?,
            cache_bytes: self.base_cache_bytes,
            lease: Duration::from_secs(self.lease_seconds),
            poll: Duration::from_secs(2),
            stall: Duration::from_secs(u64::from(self.stall_minutes) * 60),
            drain: Duration::from_secs(self.drain_seconds),
            judge: self.judge()?.map(Arc::new),
            judge_patience: Duration::from_secs(u64::from(self.judge_patience_minutes) * 60),
            signing_key: match &self.signing_key {
                Some(path) => signing::key_at(path)?,
                None => signing::ensure_key(&store.data_dir.join(signing::FILE))?,
            },
            retention,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Given {
        #[command(flatten)]
        api: ApiArgs,
    }

    fn settings_of(arguments: &[&str]) -> Result<Settings> {
        Given::try_parse_from([&["api"], arguments].concat())?.api.settings()
    }

    #[test]
    fn an_api_that_is_told_nothing_holds_models_to_safegrad_and_a_gate() -> Result<()> {
        let policy = settings_of(&[])?.policy;
        assert_eq!((policy.default_method(), policy.rho, policy.alignment_set.as_str()), (Defense::Safegrad, 1.0, "default"));
        assert!(policy.evaluate && policy.gate.enabled && policy.gate.harmful_compliance_rise == Some(0.1));
        let open = settings_of(&["--safety-gate", "off"])?.policy;
        assert!(!open.evaluate && !open.gate.enabled);
        let told = settings_of(&["--safety-gate", "report"])?.policy;
        assert!(told.evaluate && !told.gate.enabled);
        Ok(())
    }

    #[test]
    fn a_flag_that_cannot_be_is_named() {
        for (arguments, named) in [
            (&["--safety-floor", "prayer"][..], "--safety-floor"),
            (&["--rho-floor=-1"], "--rho-floor"),
            (&["--alignment-set", ""], "--alignment-set"),
        ] {
            let refused = settings_of(arguments).map(|_| ()).map_err(|error| format!("{error:#}"));
            assert!(refused.as_ref().is_err_and(|said| said.contains(named)), "{arguments:?} {refused:?}");
        }
    }
}
