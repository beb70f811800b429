//! What went into a job and what came out of it, by SHA-256, signed: a DSSE envelope (Dead Simple Signing Envelope 1.0) with an
//! Ed25519 signature, which stands beside the adapter as `manifest.json` and can be checked without the service.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use holdfast_domain::safety::Safety;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The name of a manifest beside its adapter.
pub const FILE: &str = "manifest.json";
/// What is signed is said to be this.
const PAYLOAD_TYPE: &str = "application/vnd.holdfast.manifest+json";
/// The form of [`Manifest`] this program writes.
pub const FORMAT: u32 = 1;

/// What went into a job, and what came out. Hashes are SHA-256 in hex.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Which form it has: 1.
    pub format: u32,
    /// The job.
    pub job: String,
    /// The claim that made it.
    pub attempt: i32,
    /// The model's public name.
    pub model: String,
    /// What computed it.
    pub program: Program,
    /// What else computed a part of it, before a run went on from a checkpoint with that: each other program and device of the attempts
    /// before. Those whose worker was of before migration 0020 wrote nothing down, and are not among them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier_programs: Vec<Program>,
    /// What went in.
    pub inputs: Inputs,
    /// What the training was held to.
    pub safety: Safety,
    /// What came out.
    pub outputs: Outputs,
    /// Whether it passed the safety gate; absent where it was held to none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passed_gate: Option<bool>,
}

/// The programs that computed an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The release.
    pub version: String,
    /// The trainer's build, as it was when the attempt began.
    pub trainer_sha256: String,
    /// The build of the service's worker: the suites of the program, what refusals say and the gate are in it. Absent in manifests that
    /// were signed before it was named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_sha256: Option<String>,
    /// Where it computed: `cpu`, `cuda` or `cuda:N`.
    pub device: String,
}

/// What went into a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// The base model: a hash over its files' names and hashes.
    pub base_model: Named,
    /// The training file.
    pub training_file: Named,
    /// The validation file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_file: Option<Named>,
    /// The alignment set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment_set: Option<Named>,
    /// The alignment set's rows as they were trained with, where half of them stood in frames of the training file once more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment_rows_sha256: Option<String>,
    /// The operator's own suites that it was asked; those of the program are of its version.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub suites: Vec<Named>,
    /// The adapter the job went on from: each file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub start: BTreeMap<String, String>,
    /// `plan.json`, as the trainer read it.
    pub plan_sha256: String,
}

/// Something by its name and hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// Its name or id.
    pub name: String,
    /// Its hash.
    pub sha256: String,
}

/// What came out of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outputs {
    /// The adapter: each file.
    pub adapter: BTreeMap<String, String>,
    /// The checkpoints that can be downloaded: each step's files.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub checkpoints: BTreeMap<u64, BTreeMap<String, String>>,
    /// The table of the steps' figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub results_sha256: Option<String>,
    /// The safety report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report_sha256: Option<String>,
}

/// A signed manifest, as it is written: a DSSE envelope.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = SignedManifest))]
#[serde(rename_all = "camelCase")]
pub struct Envelope {
    /// What the payload is said to be.
    #[cfg_attr(feature = "schema", schema(example = "application/vnd.holdfast.manifest+json"))]
    payload_type: String,
    /// Base64 of the manifest's JSON.
    payload: String,
    /// Those of the service's key over the type and the payload.
    signatures: Vec<Signed>,
}

/// A signature of a manifest.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = ManifestSignature))]
pub struct Signed {
    /// SHA-256 of the public key, in hex.
    keyid: String,
    /// Base64 of the signature.
    sig: String,
    /// The public key in PEM, so that files can be checked where nobody knows the service; whether it is the service's must be known
    /// from elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    public_key: Option<String>,
}

/// Why a manifest is not to be believed.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is no manifest of this program.
    #[error("{FILE} is no signed manifest: {0}")]
    Malformed(String),
    /// Somebody else signed it, or nobody.
    #[error("{FILE} was signed with the key {found}, not with {expected}")]
    OtherKey {
        /// Who signed it.
        found: String,
        /// Who should have.
        expected: String,
    },
    /// What is signed was changed.
    #[error("the signature of {FILE} does not fit what it says: it was changed after it was signed")]
    BadSignature,
    /// A file is not the one that was signed.
    #[error("{name} has SHA-256 {found}, and the manifest says {expected}")]
    OtherFile {
        /// Its name.
        name: String,
        /// What it has.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// A file is not there.
    #[error("{0}, which the manifest names, is missing")]
    MissingFile(String),
    /// A key cannot be read.
    #[error("{0} is no Ed25519 key in PEM")]
    BadKey(String),
}

/// The key that signs.
#[derive(Debug, Clone)]
pub struct SignKey(SigningKey);

/// The key that checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyKey(VerifyingKey);

impl SignKey {
    /// A new one, of 32 bytes that nobody can guess.
    #[must_use]
    pub fn of_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// Reads PKCS#8 in PEM, as `openssl genpkey -algorithm ed25519` writes it. `name` is for the error.
    ///
    /// # Errors
    /// When it is none.
    pub fn from_pem(pem: &str, name: &str) -> Result<Self, ManifestError> {
        SigningKey::from_pkcs8_pem(pem).map(Self).map_err(|_| ManifestError::BadKey(name.to_owned()))
    }

    /// Writes it as [`Self::from_pem`] reads it.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn to_pem(&self) -> Result<String, ManifestError> {
        let pem = self.0.to_pkcs8_pem(LineEnding::LF).map_err(|error| ManifestError::BadKey(error.to_string()))?;
        Ok(pem.to_string())
    }

    /// The key that checks what this one signs.
    #[must_use]
    pub fn verify_key(&self) -> VerifyKey {
        VerifyKey(self.0.verifying_key())
    }

    /// Signs a manifest: the bytes of [`FILE`].
    ///
    /// # Errors
    /// When it is no JSON, as a number that is none.
    pub fn sign(&self, manifest: &Manifest) -> Result<Vec<u8>, ManifestError> {
        let malformed = |error: serde_json::Error| ManifestError::Malformed(error.to_string());
        let payload = serde_json::to_vec(manifest).map_err(malformed)?;
        let signature = self.0.sign(&encoded(PAYLOAD_TYPE, &payload));
        let envelope = Envelope {
            payload_type: PAYLOAD_TYPE.into(),
            payload: BASE64.encode(payload),
            signatures: vec![Signed {
                keyid: self.verify_key().id(),
                sig: BASE64.encode(signature.to_bytes()),
                public_key: Some(self.verify_key().to_pem()?),
            }],
        };
        serde_json::to_vec_pretty(&envelope).map_err(malformed)
    }
}

impl VerifyKey {
    /// Reads a public key in PEM, as `openssl pkey -pubout` writes it. `name` is for the error.
    ///
    /// # Errors
    /// When it is none.
    pub fn from_pem(pem: &str, name: &str) -> Result<Self, ManifestError> {
        VerifyingKey::from_public_key_pem(pem).map(Self).map_err(|_| ManifestError::BadKey(name.to_owned()))
    }

    /// Writes it as [`Self::from_pem`] reads it.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn to_pem(&self) -> Result<String, ManifestError> {
        self.0.to_public_key_pem(LineEnding::LF).map_err(|error| ManifestError::BadKey(error.to_string()))
    }

    /// The key that a manifest brings along. That it opens the manifest says only that nothing was changed since.
    ///
    /// # Errors
    /// When it brings none.
    pub fn of_manifest(bytes: &[u8]) -> Result<Self, ManifestError> {
        let envelope: Envelope = serde_json::from_slice(bytes).map_err(|error| ManifestError::Malformed(error.to_string()))?;
        let pem = envelope.signatures.iter().find_map(|signed| signed.public_key.as_deref());
        let pem = pem.ok_or_else(|| ManifestError::Malformed("it brings no public key; give one with --key".into()))?;
        Self::from_pem(pem, FILE)
    }

    /// SHA-256 of its 32 bytes, in hex.
    #[must_use]
    pub fn id(&self) -> String {
        hex::encode(Sha256::digest(self.0.as_bytes()))
    }

    /// The manifest that `bytes` hold, if this key signed it.
    ///
    /// # Errors
    /// When it did not, or it was changed since.
    pub fn open(&self, bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let malformed = |reason: String| ManifestError::Malformed(reason);
        let envelope: Envelope = serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
        if envelope.payload_type != PAYLOAD_TYPE {
            return Err(malformed(format!("it holds {:?}, not {PAYLOAD_TYPE}", envelope.payload_type)));
        }
        let payload = BASE64.decode(&envelope.payload).map_err(|error| malformed(error.to_string()))?;
        let id = self.id();
        let Some(signed) = envelope.signatures.iter().find(|signed| signed.keyid == id) else {
            let found = envelope.signatures.first().map_or_else(|| "none".to_owned(), |signed| signed.keyid.clone());
            return Err(ManifestError::OtherKey { found, expected: id });
        };
        let signature = BASE64.decode(&signed.sig).map_err(|error| malformed(error.to_string()))?;
        let signature = Signature::from_slice(&signature).map_err(|error| malformed(error.to_string()))?;
        self.0.verify_strict(&encoded(&envelope.payload_type, &payload), &signature).map_err(|_| ManifestError::BadSignature)?;
        let manifest: Manifest = serde_json::from_slice(&payload).map_err(|error| malformed(error.to_string()))?;
        if manifest.format != FORMAT {
            return Err(malformed(format!("it has the format {}, and this program reads {FORMAT}", manifest.format)));
        }
        Ok(manifest)
    }
}

impl Manifest {
    /// Holds the files of an adapter's folder to the manifest; `hash_of` gives a file's hash, or `None` where it is missing.
    ///
    /// # Errors
    /// The first file that is another one, or missing.
    pub fn check_adapter(&self, hash_of: impl FnMut(&str) -> Option<String>) -> Result<(), ManifestError> {
        check_files(&self.outputs.adapter, hash_of)
    }

    /// The checkpoint that files are, where they are all of one's: its step and what it is made of.
    #[must_use]
    pub fn checkpoint_of(&self, hash_of: impl Fn(&str) -> Option<String>) -> Option<(u64, &BTreeMap<String, String>)> {
        let mut checkpoints = self.outputs.checkpoints.iter();
        let (step, files) = checkpoints.find(|(_, files)| !files.is_empty() && check_files(files, &hash_of).is_ok())?;
        Some((*step, files))
    }
}

fn check_files(files: &BTreeMap<String, String>, mut hash_of: impl FnMut(&str) -> Option<String>) -> Result<(), ManifestError> {
    for (name, expected) in files {
        match hash_of(name) {
            None => return Err(ManifestError::MissingFile(name.clone())),
            Some(found) if found != *expected => {
                return Err(ManifestError::OtherFile { name: name.clone(), found, expected: expected.clone() });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// What is signed (DSSE's `PAE`): the type and the payload, each with its length before it, so that neither can be moved into the
/// other.
fn encoded(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use holdfast_domain::safety::Defense;

    use super::*;

    fn manifest() -> Manifest {
        let named = |name: &str| Named { name: name.into(), sha256: "00".repeat(32) };
        Manifest {
            format: FORMAT,
            job: "ftjob-1".into(),
            attempt: 2,
            model: "ft:m:o::1".into(),
            program: Program {
                version: "0.1.0".into(),
                trainer_sha256: "11".repeat(32),
                worker_sha256: None,
                device: "cpu".into(),
            },
            earlier_programs: Vec::new(),
            inputs: Inputs {
                base_model: named("m"),
                training_file: named("file-1"),
                validation_file: None,
                alignment_set: Some(named("default")),
                alignment_rows_sha256: None,
                suites: Vec::new(),
                start: BTreeMap::new(),
                plan_sha256: "22".repeat(32),
            },
            safety: Safety::new(Defense::Safegrad, 1.0),
            outputs: Outputs {
                adapter: BTreeMap::from([("adapter_model.safetensors".into(), "33".repeat(32))]),
                checkpoints: BTreeMap::new(),
                results_sha256: None,
                report_sha256: None,
            },
            passed_gate: Some(true),
        }
    }

    #[test]
    fn what_a_key_signed_its_other_half_opens() -> Result<(), ManifestError> {
        let key = SignKey::of_seed(&[7; 32]);
        let bytes = key.sign(&manifest())?;
        assert_eq!(key.verify_key().open(&bytes)?, manifest());
        assert_eq!(VerifyKey::of_manifest(&bytes)?, key.verify_key());
        let again = SignKey::from_pem(&key.to_pem()?, "key")?;
        assert_eq!(VerifyKey::from_pem(&again.verify_key().to_pem()?, "key")?, key.verify_key());
        Ok(())
    }

    #[test]
    fn another_key_a_changed_word_and_a_changed_signature_are_told_apart() -> Result<(), ManifestError> {
        let key = SignKey::of_seed(&[7; 32]);
        let bytes = key.sign(&manifest())?;
        let other = SignKey::of_seed(&[8; 32]).verify_key();
        assert!(matches!(other.open(&bytes), Err(ManifestError::OtherKey { .. })));
        let mut envelope: Envelope = serde_json::from_slice(&bytes).expect("an envelope");
        let changed = Manifest { attempt: 3, ..manifest() };
        envelope.payload = BASE64.encode(serde_json::to_vec(&changed).expect("JSON"));
        let forged = serde_json::to_vec(&envelope).expect("JSON");
        assert!(matches!(key.verify_key().open(&forged), Err(ManifestError::BadSignature)));
        assert!(matches!(key.verify_key().open(b"{}"), Err(ManifestError::Malformed(_))));
        Ok(())
    }

    #[test]
    fn a_file_that_is_another_one_is_named() {
        let same = manifest().check_adapter(|_| Some("33".repeat(32)));
        assert!(same.is_ok());
        let other = manifest().check_adapter(|_| Some("44".repeat(32))).unwrap_err().to_string();
        assert!(other.starts_with("adapter_model.safetensors has SHA-256 44"), "{other}");
        assert!(matches!(manifest().check_adapter(|_| None), Err(ManifestError::MissingFile(_))));
    }
}
