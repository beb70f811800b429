//! The key that manifests are signed with: read, or made when there is none.

use std::path::Path;

use anyhow::{Context, Result};
use holdfast_safety::manifest::SignKey;
use rand::TryRng;
use rand::rngs::SysRng;

use crate::private_file;

/// The name of the key in a data directory; its public half stands beside it.
pub const FILE: &str = "signing.key";

/// Reads the key at `path`, an Ed25519 key in PEM; makes one where nothing is, readable by its owner alone, and its public half
/// beside it with the ending `pub`.
///
/// # Errors
/// When the file is no key, or cannot be written.
pub fn ensure_key(path: &Path) -> Result<SignKey> {
    match std::fs::read_to_string(path) {
        Ok(pem) => Ok(SignKey::from_pem(&pem, &path.display().to_string())?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => make(path),
        Err(error) => Err(error).with_context(|| format!("cannot read {} (--signing-key)", path.display())),
    }
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
    write().with_context(|| format!("cannot write {} (--signing-key; under --data-dir unless set)", path.display()))?;
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
        let made = ensure_key(&path)?.verify_key();
        assert_eq!(ensure_key(&path)?.verify_key(), made);
        assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "nonsense")?;
        let error = ensure_key(&path).err().context("nonsense is a key")?.to_string();
        assert!(error.ends_with("is no Ed25519 key in PEM"), "{error}");
        Ok(())
    }
}
