//! The short commands: migrations, keys, models, alignment sets.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use holdfast_api::{Misfit, Tokenizers};
use holdfast_domain::evaluation::Kind;
use holdfast_domain::ids::{KeyId, ProjectId};
use holdfast_safety::suite::Suite;
use holdfast_store::audit::NewEntry;
use holdfast_store::base_models::BaseModelFacts;
use holdfast_store::keys::NewKey;
use holdfast_store::{PageRequest, Store, StoreError};

use crate::connect::connect_beside;
use crate::first_start;
use crate::settings::StoreArgs;

/// Runs `command` on a store and closes it, whatever came of the command.
pub(crate) async fn with_store<T>(args: &StoreArgs, command: impl AsyncFnOnce(&Store) -> Result<T>) -> Result<T> {
    let connection = connect_beside(args).await?;
    let outcome = command(&connection.store).await;
    connection.close().await?;
    outcome
}

/// `holdfast migrate`.
///
/// # Errors
/// When the database cannot be reached or a migration fails.
pub async fn migrate(args: &StoreArgs) -> Result<()> {
    // Connecting migrates.
    with_store(args, async |store| first_start::ensure_alignment_set(store).await).await?;
    println!("the database is at this program's version");
    Ok(())
}

/// `holdfast keys create`.
///
/// # Errors
/// When a name cannot be used, or the database fails.
pub async fn create_key(args: &StoreArgs, organization: &str, project: Option<&str>, mut key: NewKey) -> Result<()> {
    let secret = with_store(args, async |store| {
        if let Some(project) = project {
            key.project = Some(store.ensure_project_of(organization, project).await?);
        }
        let (secret, row) = store.create_key(&key, None).await?;
        note(store, "keys create", &row.id.to_string(), row.project).await?;
        Ok(secret)
    })
    .await?;
    println!("{}", secret.reveal());
    Ok(())
}

/// `holdfast keys list`.
///
/// # Errors
/// When the database fails.
pub async fn list_keys(args: &StoreArgs) -> Result<()> {
    let keys = with_store(args, async |store| {
        let (mut keys, mut after) = (Vec::new(), None);
        loop {
            let page = store.keys(None, PageRequest { after, limit: 100, ascending: false }).await?;
            after = page.items.last().map(|key| key.id.0);
            keys.extend(page.items);
            if !page.has_more {
                return Ok(keys);
            }
        }
    })
    .await?;
    for key in keys {
        let scopes = [(true, "read"), (key.scopes.write, "write"), (key.scopes.admin, "admin")];
        let scopes: Vec<&str> = scopes.into_iter().filter_map(|(has, scope)| has.then_some(scope)).collect();
        let state = if key.revoked_at.is_some() { "revoked" } else { "valid" };
        let project = key.project.map_or_else(|| "-".to_owned(), |project| project.to_string());
        println!("{}\t{}…\t{project}\t{}\t{state}\t{}", key.id, key.prefix, scopes.join("+"), key.name);
    }
    Ok(())
}

/// `holdfast keys revoke`.
///
/// # Errors
/// When there is no such key, or the database fails.
pub async fn revoke_key(args: &StoreArgs, id: &str) -> Result<()> {
    let id: KeyId = id.parse().map_err(|e| anyhow!("{id:?} is no key's id: {e}; `holdfast keys list` shows them"))?;
    with_store(args, async |store| match store.revoke_key(id).await {
        Err(StoreError::NotFound) => bail!("there is no key {id}; `holdfast keys list` shows what there is"),
        revoked => note(store, "keys revoke", &id.to_string(), revoked?.project).await,
    })
    .await?;
    println!("{id} is revoked");
    Ok(())
}

/// Writes a command into the audit log.
async fn note(store: &Store, operation: &str, target: &str, project: Option<ProjectId>) -> Result<()> {
    let user = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_else(|_| "unknown".into());
    let host = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    let entry = NewEntry {
        key: None,
        actor: user,
        project,
        acted_on: None,
        operation: operation.into(),
        target: target.into(),
        address: host.trim().into(),
        request_id: String::new(),
        status: 200,
        code: None,
    };
    Ok(store.audit(&entry).await?)
}

/// `holdfast models import`.
///
/// # Errors
/// When the model is not supported, or cannot be read or kept.
pub async fn import_model(args: &StoreArgs, source: &Path, name: &str) -> Result<()> {
    holdfast_domain::model_name::check(name)?;
    std::fs::create_dir_all(&args.data_dir).with_context(|| format!("cannot make {}", args.data_dir.display()))?;
    // Beside the object store, so that there is room for it.
    let folder =
        tempfile::Builder::new().prefix("import-").tempdir_in(&args.data_dir).context("cannot make a folder for the import")?;
    println!("reading {}", source.display());
    let (from, to) = (source.to_owned(), folder.path().to_owned());
    let imported = tokio::task::spawn_blocking(move || holdfast_import::import(&from, &to)).await??;
    let architecture = &imported.architecture;
    println!(
        "found a {} of {} million parameters: {} layers, width {}, {} tokens",
        architecture.family.model_type(),
        imported.parameters / 1_000_000,
        architecture.layers.len(),
        architecture.hidden_size,
        architecture.vocab_size
    );
    let facts = BaseModelFacts {
        parameter_count: imported.parameters,
        context_length: u32::try_from(architecture.max_position_embeddings).unwrap_or(u32::MAX),
    };
    with_store(args, async |store| {
        store.create_base_model(name, folder.path(), facts).await?;
        note(store, "models import", name, None).await
    })
    .await?;
    println!("imported as {name}");
    Ok(())
}

/// `holdfast models list`.
///
/// # Errors
/// When the database fails.
pub async fn list_models(args: &StoreArgs) -> Result<()> {
    for model in with_store(args, async |store| Ok(store.base_models().await?)).await? {
        println!("{}\t{} parameters", model.name, model.parameter_count);
    }
    Ok(())
}

/// `holdfast models export`.
///
/// # Errors
/// When there is no such model, or the folder cannot be written.
pub async fn export_model(args: &StoreArgs, name: &str, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    with_store(args, async |store| {
        let files = match store.base_model_files(name).await {
            Err(StoreError::NotFound) => bail!("there is no base model {name:?}; `holdfast models list` shows what there is"),
            other => other?,
        };
        for (file, object) in &files.files {
            store.objects().fetch(object, &folder.join(file)).await?;
        }
        Ok(())
    })
    .await
}

/// `holdfast suites import`.
///
/// # Errors
/// When the file cannot be read or has bad lines, or a store fails.
pub async fn import_suite(args: &StoreArgs, file: &Path, name: &str, kind: Kind) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let parsed = Suite::parse(kind, 1, &text).with_context(|| file.display().to_string())?;
    let suite = with_store(args, async |store| {
        let suite = store.create_suite(name, kind, parsed.lines().as_bytes(), parsed.requests.len() as u64).await?;
        note(store, "suites import", &suite.pinned(), None).await?;
        Ok(suite)
    })
    .await?;
    println!("imported {} of {} requests", suite.pinned(), suite.request_count);
    Ok(())
}

/// `holdfast alignment import`.
///
/// # Errors
/// When the file cannot be read or has bad lines, or a store fails.
pub async fn import_alignment(args: &StoreArgs, file: &Path, name: &str) -> Result<()> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let report = holdfast_dataset::alignment_set::check(&bytes);
    if report.error_count > 0 {
        bail!("{}: {}", file.display(), report.summary());
    }
    let (set, fit) = with_store(args, async |store| {
        let fit = Tokenizers::default().fit(store, &bytes).await?;
        if let Some(why) = fit.is_useless() {
            bail!("{}: {why}", file.display());
        }
        let set = store.create_alignment_set(name, &bytes, report.rows).await?;
        note(store, "alignment import", &format!("{}@{}", set.name, set.version), None).await?;
        Ok((set, fit))
    })
    .await?;
    println!("imported {}@{} of {} rows", set.name, set.version, set.row_count);
    for Misfit { model, problem } in fit.misfits {
        println!("warning: jobs of {model} cannot be held to it: {problem}");
    }
    Ok(())
}
