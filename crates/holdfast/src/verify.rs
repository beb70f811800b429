//! `holdfast verify`: whether an adapter is what its manifest says, without a service.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use holdfast_safety::hash;
use holdfast_safety::manifest::{self, Manifest, VerifyKey};
use holdfast_safety::report;
use sha2::{Digest, Sha256};

/// An adapter's files: a folder, or the tar that the service gives.
struct Files {
    /// Names and hashes.
    hashes: Vec<(String, String)>,
    manifest: Option<Vec<u8>>,
}

/// What an adapter is checked with.
#[derive(Debug, Clone, Copy, Default)]
pub struct Given<'a> {
    /// The service's public key in PEM; without it, the key that the manifest brings along, which anybody may have made.
    pub key: Option<&'a Path>,
    /// The manifest of the job, which a checkpoint does not bring along; without it, the one beside the adapter.
    pub manifest: Option<&'a Path>,
}

/// Checks the adapter, or with its job's manifest the checkpoint, at `path`.
///
/// # Errors
/// When a signature or a hash does not fit, with what does not.
pub fn run(path: &Path, given: Given<'_>) -> Result<()> {
    let files = if path.is_dir() { of_folder(path) } else { of_tar(path) };
    let files = files.with_context(|| format!("cannot read {}", path.display()))?;
    let given_manifest = match given.manifest {
        Some(path) => Some(std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?),
        None => None,
    };
    let Some(bytes) = given_manifest.as_ref().or(files.manifest.as_ref()) else {
        bail!(
            "{} holds no {}; download it with GET …/adapter, or give the job's, from GET …/manifest, with --manifest FILE",
            path.display(),
            manifest::FILE
        );
    };
    if given_manifest.is_some() && files.manifest.as_ref().is_some_and(|beside| beside != bytes) {
        bail!("{} beside the adapter is not the one that was given; take it out", manifest::FILE);
    }
    let (manifest, signer) = open(bytes, given.key)?;
    let hash_of = |name: &str| files.hashes.iter().find(|(known, _)| known == name).map(|(_, sha256)| sha256.clone());
    // The adapter that is published may be a checkpoint's too.
    let adapter = manifest.check_adapter(hash_of);
    let checkpoint = given_manifest.as_ref().filter(|_| adapter.is_err()).and_then(|_| manifest.checkpoint_of(hash_of));
    let (step, made_of) = match checkpoint {
        Some((step, made_of)) => (Some(step), made_of),
        None => (None, &manifest.outputs.adapter),
    };
    files.check_names(made_of)?;
    if step.is_none() {
        adapter?;
    }
    let signed_report = manifest.outputs.report_sha256.as_ref();
    let report = hash_of(report::FILE);
    if let (Some(found), Some(signed)) = (&report, signed_report)
        && found != signed
    {
        bail!("{} has SHA-256 {found}, and the manifest says {signed}", report::FILE);
    }
    for name in made_of.keys() {
        println!("ok  {name}");
    }
    match (report, signed_report) {
        (Some(_), Some(_)) => println!("ok  {}", report::FILE),
        (None, Some(_)) => println!("--  {} is not here and was not checked", report::FILE),
        (Some(_), None) => bail!("{} is here, and the manifest knows of none; take it out", report::FILE),
        (None, None) => {}
    }
    say(&manifest, step, &signer, given.key.is_some());
    Ok(())
}

fn open(bytes: &[u8], key: Option<&Path>) -> Result<(Manifest, VerifyKey)> {
    let key = match key {
        Some(path) => {
            let pem = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            VerifyKey::from_pem(&pem, &path.display().to_string())?
        }
        None => VerifyKey::of_manifest(bytes)?,
    };
    Ok((key.open(bytes)?, key))
}

fn say(manifest: &Manifest, step: Option<u64>, signer: &VerifyKey, is_known: bool) {
    let Manifest { model, job, safety, inputs, .. } = manifest;
    let checkpoint = step.map_or_else(String::new, |step| format!(" after step {step}"));
    println!("{model}{checkpoint} of {job}, trained with {} on {}", safety.defense.as_str(), inputs.base_model.name);
    if !is_known {
        println!("signed with {}, a key that came with the manifest: nothing was changed since it was signed, but", signer.id());
        println!("anybody may have signed it. Whether the service did, --key FILE checks; GET /v1/signing_keys has its keys");
        return;
    }
    println!(
        "{}",
        match (step, manifest.passed_gate) {
            (_, None) => "it was held to no safety gate",
            (Some(_), Some(true)) => "a checkpoint; what passed the safety gate is the adapter that was published",
            (Some(_), Some(false)) => "a checkpoint of a job whose adapter did NOT pass the safety gate; an operator released it",
            (None, Some(true)) => "it passed the safety gate",
            (None, Some(false)) => "it did NOT pass the safety gate; an operator released it",
        }
    );
    println!("signed with {}", signer.id());
}

/// What may stand beside an adapter, and is checked by its own means.
const BESIDE: [&str; 2] = [manifest::FILE, report::FILE];

impl Files {
    /// Adds a file. One that another program would find under a name where this one looked at something else is refused.
    fn add(&mut self, name: String, sha256: String) -> Result<()> {
        if self.hashes.iter().any(|(known, _)| *known == name) {
            bail!("{name:?} stands in it twice");
        }
        self.hashes.push((name, sha256));
        Ok(())
    }

    /// Everything that is there is named by the manifest: what loads an adapter may load what stands beside it.
    fn check_names(&self, made_of: &BTreeMap<String, String>) -> Result<()> {
        let is_named = |name: &str| BESIDE.contains(&name) || made_of.contains_key(name);
        match self.hashes.iter().find(|(name, _)| !is_named(name)) {
            Some((name, _)) => bail!("{name:?} is not in the manifest; take it out"),
            None => Ok(()),
        }
    }
}

fn of_folder(folder: &Path) -> Result<Files> {
    let mut files = Files { hashes: Vec::new(), manifest: None };
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !entry.file_type()?.is_file() {
            bail!("{name:?} is no plain file; an adapter is made of nothing else");
        }
        if name == manifest::FILE {
            files.manifest = Some(std::fs::read(entry.path())?);
        }
        files.add(name, hex::encode(hash::of_file(&entry.path())?))?;
    }
    Ok(files)
}

fn of_tar(path: &Path) -> Result<Files> {
    /// A manifest is far smaller; a tar may claim anything.
    const MOST_MANIFEST_BYTES: u64 = 16 << 20;
    let mut files = Files { hashes: Vec::new(), manifest: None };
    let mut archive = tar::Archive::new(File::open(path)?);
    // As they stand there: a header that says of the next entry how to unpack it is an entry of its own, and refused.
    for entry in archive.entries()?.raw(true) {
        let entry = entry?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if entry.header().entry_type() != tar::EntryType::Regular || name.contains(['/', '\\', '\0']) || name.starts_with('.') {
            bail!("{name:?} is no plain file; an adapter's tar holds nothing else");
        }
        if name == manifest::FILE {
            let mut bytes = Vec::new();
            entry.take(MOST_MANIFEST_BYTES).read_to_end(&mut bytes)?;
            files.add(name, hex::encode(Sha256::digest(&bytes)))?;
            files.manifest = Some(bytes);
            continue;
        }
        files.add(name, hex::encode(hash::of(entry)?))?;
    }
    Ok(files)
}
