//! Brings base models in: a Hugging Face directory or a .gguf file becomes one canonical folder (see `holdfast-base-model`
//! and `holdfast-dataset`), checked so that whatever the trainer opens later is known to be usable.
//!
//! Files from outside are hostile until shown otherwise: sizes are checked before anything is allocated by them, nothing that
//! could execute is read, and what is not supported is named.

use std::path::{Path, PathBuf};

use holdfast_base_model::{Architecture, Unsupported, WeightsError};
use holdfast_dataset::tokenizer::LoadError;

mod folder;
mod gguf;
mod gguf_tokenizer;
mod huggingface;

/// What was imported.
#[derive(Debug, Clone)]
pub struct Imported {
    /// The model's architecture.
    pub architecture: Architecture,
    /// Numbers in all its tensors.
    pub parameters: u64,
}

/// Why a model cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// `SOURCE` is neither a folder nor a .gguf file.
    #[error("{0} is neither a Hugging Face model directory nor a .gguf file")]
    NotAModel(PathBuf),
    /// A file cannot be read or written.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: std::io::Error,
    },
    /// A file lacks something, or does not hold what its name says.
    #[error("{file}: {reason}")]
    Format {
        /// The file's name.
        file: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// See [`Unsupported`].
    #[error(transparent)]
    Architecture(#[from] Unsupported),
    /// See [`WeightsError`].
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The tokenizer or the chat template.
    #[error(transparent)]
    Tokenizer(#[from] LoadError),
    /// The tokenizer has ids the embedding has no row for.
    #[error("the tokenizer has {tokenizer} ids, but the embedding has only {embedding} rows")]
    Vocabulary {
        /// Ids of the tokenizer.
        tokenizer: usize,
        /// Rows of the embedding.
        embedding: usize,
    },
}

impl ImportError {
    fn format(file: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Format { file: file.into(), reason: reason.into() }
    }

    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |cause| Self::Io { path, cause }
    }
}

/// Reads the model at `source` and writes its canonical folder to `out`, which must exist and be empty.
///
/// # Errors
/// When the model is not supported, a file is missing, truncated or hostile, or `out` cannot be written.
pub fn import(source: &Path, out: &Path) -> Result<Imported, ImportError> {
    let is_gguf = source.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let architecture = if source.is_dir() {
        huggingface::import(source, out)?
    } else if source.is_file() && is_gguf {
        gguf::import(source, out)?
    } else if source.exists() {
        return Err(ImportError::NotAModel(source.to_owned()));
    } else {
        return Err(ImportError::io(source)(std::io::ErrorKind::NotFound.into()));
    };
    folder::verify(out, &architecture)?;
    let parameters = architecture.tensors().iter().map(|t| t.shape.iter().product::<usize>() as u64).sum();
    Ok(Imported { architecture, parameters })
}

/// As [`import`], unless `out` holds what the same `maker` (a build, a version) imported before. Processes take turns.
///
/// # Errors
/// As [`import`]; also when files beside `out` (its name with `.lock` and `.made-by`) cannot be written.
pub fn import_once(source: &Path, out: &Path, maker: &str) -> Result<(), ImportError> {
    let beside = out.with_extension("lock");
    std::fs::create_dir_all(out).map_err(ImportError::io(out))?;
    let lock = std::fs::File::create(&beside).map_err(ImportError::io(&beside))?;
    lock.lock().map_err(ImportError::io(&beside))?;
    let made_by = out.with_extension("made-by");
    if std::fs::read_to_string(&made_by).is_ok_and(|made| made == maker) {
        return Ok(());
    }
    std::fs::remove_dir_all(out).and_then(|()| std::fs::create_dir(out)).map_err(ImportError::io(out))?;
    import(source, out)?;
    std::fs::write(&made_by, maker).map_err(ImportError::io(&made_by))
}
