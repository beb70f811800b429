//! The key that manifests are signed with: read, or made in the data directory when there is none.

use std::path::Path;

use anyhow::{Context, Result};
use holdfast_safety::manifest::SignKey;
use rand::TryRng;
use rand::rngs::SysRng;

use crate::private_file;

/// The name of the key in a data directory; its public half stands beside it.
pub const FILE: &str = "signing.key";

/// Reads the key that somebody named, an Ed25519 key in PEM. None is made there: what a new one signs is refused by all who hold to the one
/// that was meant.
///
/// # Errors
/// When the file cannot be read, or is no key.
pub fn key_at(path: &Path) -> Result<SignKey> {
    let pem = std::fs::read_to_string(path).with_context(|| {
        format!("cannot read {} (--signing-key); `openssl genpkey -algorithm ed25519 -out signing.key` makes one", path.display())
    })?;
    Ok(SignKey::from_pem(&pem, &path.display().to_string())?)
}

/// Reads the key at `path`, as [`key_at`]; makes one where nothing is, readable by its owner alone, and its public half beside it with the
/// ending `pub`.
///
/// # Errors
/// When the file is no key, or cannot be written.
pub fn ensure_key(path: &Path) -> Result<SignKey> {
    if path.try_exists().with_context(|| format!("cannot read {}", path.display()))? { key_at(path) } else { make(path) }
}

fn make(path: &Path) -> Result<SignKey> {
    let mut seed = [0; 32];
    SysRng.try_fill_bytes(&mut seed).context("the system gives no random numbers")?;
    let key = SignKey::of_seed(&seed);
    let write = || -> Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(path.with_extension("pub"), key.verify_key().to_pem()?)?;
        Ok(private_file::write(path, key.to_pem()?.as_bytes())?)
    };
    write().with_context(|| format!("cannot write {} (under --data-dir unless --signing-key names one)", path.display()))?;
    println!("wrote {}", path.display());
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept_to_its_owner() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("new").join(FILE);
        let missing = key_at(&path).err().context("there is a key")?.to_string();
        assert!(missing.contains("--signing-key") && missing.contains("openssl genpkey"), "{missing}");
        let made = ensure_key(&path)?.verify_key();
        assert_eq!(ensure_key(&path)?.verify_key(), made);
        assert_eq!(key_at(&path)?.verify_key(), made, "where one is named it is read, and never made");
        assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "nonsense")?;
        let error = ensure_key(&path).err().context("nonsense is a key")?.to_string();
        assert!(error.ends_with("is no Ed25519 key in PEM"), "{error}");
        Ok(())
    }
}
