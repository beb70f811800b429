//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::settings::{ApiArgs, StoreArgs, WorkerArgs};
use crate::{admin, serve};

/// Fine-tuning as a service that holds a model to its alignment.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
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
    /// API keys.
    #[command(subcommand)]
    Keys(Keys),
    /// Base models.
    #[command(subcommand)]
    Models(Models),
    /// Alignment sets: what training holds a model to.
    #[command(subcommand)]
    Alignment(Alignment),
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
        /// The project the key acts for; made when there is none of this name.
        #[arg(long)]
        project: String,
        /// Let the key also act as the operator.
        #[arg(long)]
        admin: bool,
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
            Command::Worker { store, worker } => serve::worker(&store, &worker).await,
            Command::Migrate { store } => admin::migrate(&store).await,
            Command::Keys(Keys::Create { project, admin, store }) => admin::create_key(&store, &project, admin).await,
            Command::Models(Models::Import { source, name, store }) => admin::import_model(&store, &source, &name).await,
            Command::Models(Models::List { store }) => admin::list_models(&store).await,
            Command::Models(Models::Export { name, folder, store }) => admin::export_model(&store, &name, &folder).await,
            Command::Alignment(Alignment::Import { file, name, store }) => admin::import_alignment(&store, &file, &name).await,
        }
    }
}
