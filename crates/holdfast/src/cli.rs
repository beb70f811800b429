//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use holdfast_domain::evaluation::Kind;
use holdfast_store::keys::NewKey;
use holdfast_store::projects::DEFAULT_ORGANIZATION;

use crate::settings::{ApiArgs, StoreArgs, WorkerArgs};
use crate::telemetry::TelemetryArgs;
use crate::{admin, check_store, health, serve, verify};

/// Fine-tuning as a service that holds a model to its alignment.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    /// How it says what it does.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Everything on one machine: a private Postgres unless DATABASE_URL is set, the API and one worker.
    ///
    /// The first start writes admin.key and project.key into the data directory. Ctrl-C or SIGTERM stops all of it; the
    /// next start goes on where it stopped.
    Up {
        #[command(flatten)]
        store: StoreArgs,
        #[command(flatten)]
        listen: Listen,
        #[command(flatten)]
        api: ApiArgs,
        #[command(flatten)]
        worker: WorkerArgs,
    },
    /// The API alone.
    Serve {
        #[command(flatten)]
        store: StoreArgs,
        #[command(flatten)]
        listen: Listen,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Ask the API on this machine whether it lives, and say so by the exit code: for containers.
    Health {
        #[command(flatten)]
        listen: Listen,
    },
    /// One worker alone.
    Worker {
        #[command(flatten)]
        store: StoreArgs,
        #[command(flatten)]
        worker: WorkerArgs,
    },
    /// Bring the database to this program's version.
    Migrate {
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Do with the object store what the service does with it, and say what came of each.
    CheckStore {
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Check an adapter or a checkpoint against its job's signed manifest, without a service.
    Verify {
        /// The adapter's folder, or the tar that the service gives.
        adapter: PathBuf,
        /// The public key in PEM that the manifest must be signed with; without it, the one that the manifest brings along.
        #[arg(long, env = "HOLDFAST_VERIFY_KEY", value_name = "FILE")]
        key: Option<PathBuf>,
        /// The job's manifest, for a checkpoint, which brings none; without it, the one beside the adapter.
        #[arg(long, value_name = "FILE")]
        manifest: Option<PathBuf>,
    },
    /// API keys.
    #[command(subcommand)]
    Keys(Keys),
    /// Base models.
    #[command(subcommand)]
    Models(Models),
    /// Alignment sets: what training holds a model to.
    #[command(subcommand)]
    Alignment(Alignment),
    /// Suites of your own: what models are measured on beside what comes with the program.
    #[command(subcommand)]
    Suites(Suites),
}

#[derive(Debug, Args)]
struct Listen {
    /// Where the API listens.
    #[arg(long, env = "HOLDFAST_LISTEN", default_value = "127.0.0.1:8080", value_name = "ADDR:PORT")]
    listen: SocketAddr,
}

#[derive(Debug, Subcommand)]
enum Keys {
    /// Make a key and print it, once.
    Create {
        /// The project the key acts for; made when there is none of this name. An operator's key needs none.
        #[arg(long, required_unless_present = "admin")]
        project: Option<String>,
        /// The project's organisation; made when there is none of this name.
        #[arg(long, default_value = DEFAULT_ORGANIZATION)]
        organization: String,
        /// Let the key also act as the operator.
        #[arg(long)]
        admin: bool,
        /// Let the key only read.
        #[arg(long)]
        read_only: bool,
        /// What it is for.
        #[arg(long, default_value = "")]
        name: String,
        /// Days after which it ends; never, unless set.
        #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=3650))]
        expires_in_days: Option<u32>,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// List the keys: id, first characters, project, scopes, state, name.
    List {
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Revoke a key: from then on it is unknown.
    Revoke {
        /// Its id.
        id: String,
        #[command(flatten)]
        store: StoreArgs,
    },
}

#[derive(Debug, Subcommand)]
enum Models {
    /// Bring in a base model: a Hugging Face model directory, or a .gguf file.
    Import {
        /// The directory or the file.
        source: PathBuf,
        /// The name tenants ask for.
        #[arg(long)]
        name: String,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// List the base models.
    List {
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Write a base model's files into a folder, as trainers read them.
    Export {
        /// Its name.
        name: String,
        /// The folder; made when there is none.
        folder: PathBuf,
        #[command(flatten)]
        store: StoreArgs,
    },
}

#[derive(Debug, Subcommand)]
enum Suites {
    /// Bring in a suite as the next version of its name: JSON Lines of {"category": …, "messages": [one of the user, and
    /// at most one of the system before it]}.
    Import {
        /// The file.
        file: PathBuf,
        /// Its name, as safety policies name it.
        #[arg(long)]
        name: String,
        /// What a model should do with its requests: `harmful` ones it should refuse, `benign` ones it should answer.
        #[arg(long, value_parser = kind)]
        kind: Kind,
        #[command(flatten)]
        store: StoreArgs,
    },
}

fn kind(word: &str) -> Result<Kind, String> {
    Kind::parse(word).ok_or_else(|| "it is `harmful` or `benign`".into())
}

#[derive(Debug, Subcommand)]
enum Alignment {
    /// Bring in an alignment set as the next version of its name: JSON Lines of chat rows, a request and its refusal each.
    Import {
        /// The file.
        file: PathBuf,
        /// Its name.
        #[arg(long)]
        name: String,
        #[command(flatten)]
        store: StoreArgs,
    },
}

impl Cli {
    /// Does what the command line says.
    ///
    /// # Errors
    /// Whatever stands in its way, in one sentence for the operator.
    pub async fn run(self) -> Result<()> {
        match self.command {
            Command::Up { store, listen, api, worker } => serve::up(&store, listen.listen, &api, &worker).await,
            Command::Serve { store, listen, api } => serve::serve(&store, listen.listen, &api).await,
            Command::Health { listen } => health::ask(listen.listen),
            Command::Worker { store, worker } => serve::worker(&store, &worker).await,
            Command::Migrate { store } => admin::migrate(&store).await,
            Command::CheckStore { store } => check_store::run(&store).await,
            Command::Verify { adapter, key, manifest } => {
                verify::run(&adapter, verify::Given { key: key.as_deref(), manifest: manifest.as_deref() })
            }
            Command::Keys(Keys::Create { project, organization, admin, read_only, name, expires_in_days, store }) => {
                let lifetime = expires_in_days.map(|days| Duration::from_secs(u64::from(days) * 24 * 60 * 60));
                let key = NewKey { name, read_only, is_admin: admin, lifetime, ..NewKey::default() };
                admin::create_key(&store, &organization, project.as_deref(), key).await
            }
            Command::Keys(Keys::List { store }) => admin::list_keys(&store).await,
            Command::Keys(Keys::Revoke { id, store }) => admin::revoke_key(&store, &id).await,
            Command::Models(Models::Import { source, name, store }) => admin::import_model(&store, &source, &name).await,
            Command::Models(Models::List { store }) => admin::list_models(&store).await,
            Command::Models(Models::Export { name, folder, store }) => admin::export_model(&store, &name, &folder).await,
            Command::Suites(Suites::Import { file, name, kind, store }) => admin::import_suite(&store, &file, &name, kind).await,
            Command::Alignment(Alignment::Import { file, name, store }) => admin::import_alignment(&store, &file, &name).await,
        }
    }
}
