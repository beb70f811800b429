//! The tokenizers and shapes of base models, kept in memory for requests that need them: previews, estimates, and alignment sets.

use std::sync::{Arc, Mutex, PoisonError};

use futures::TryStreamExt;
use holdfast_base_model::{Architecture, files};
use holdfast_dataset::tokenizer::files as text_files;
use holdfast_dataset::{ChatTokenizer, alignment_set};
use holdfast_store::{ObjectRef, Store, StoreError};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::ApiError;

/// Models that are kept.
const KEPT: usize = 8;
/// The largest of a model's files that is read here.
const MAX_BYTES: u64 = 256 * 1024 * 1024;
/// Files that are tokenised at the same time: each takes a core.
const AT_ONCE: usize = 2;

/// What is known of a base model beside its weights.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) tokenizer: ChatTokenizer,
    pub(crate) architecture: Architecture,
}

/// The models that were asked for lately, by the hash of their content; the last one first.
#[derive(Debug)]
pub struct Tokenizers {
    kept: Mutex<Vec<([u8; 32], Arc<Known>)>>,
    turns: Semaphore,
}

impl Default for Tokenizers {
    fn default() -> Self {
        Self { kept: Mutex::default(), turns: Semaphore::new(AT_ONCE) }
    }
}

impl Tokenizers {
    /// A turn to tokenise a file. When all are taken the client is told to come back, instead of waiting past its patience.
    pub(crate) fn turn(&self) -> Result<SemaphorePermit<'_>, ApiError> {
        self.turns.try_acquire().map_err(|_| ApiError::busy("estimates, previews and imports"))
    }

    /// The tokenizer and the shape of a base model.
    pub(crate) async fn get(&self, store: &Store, base_model: &str) -> Result<Arc<Known>, StoreError> {
        let unusable = |what: &dyn std::fmt::Display| std::io::Error::other(format!("the base model {base_model}: {what}"));
        let base = store.base_model_files(base_model).await?;
        let key = base.content_sha256;
        {
            let mut kept = self.lock();
            if let Some(at) = kept.iter().position(|(known, _)| *known == key) {
                let found = kept.remove(at);
                let known = Arc::clone(&found.1);
                kept.insert(0, found);
                return Ok(known);
            }
        }
        let find = |name: &str| base.files.iter().find(|(file, _)| file == name).map(|(_, object)| object.clone());
        let mut read = Vec::new();
        for name in [text_files::TOKENIZER, text_files::SPECIAL_TOKENS, text_files::CHAT_TEMPLATE, files::CONFIG] {
            let object = find(name).ok_or_else(|| unusable(&format!("it has no {name}")))?;
            read.push(whole(store, &object).await?);
        }
        let known = tokio::task::spawn_blocking(move || load(&read)).await.map_err(std::io::Error::other)?;
        let known = Arc::new(known.map_err(|error| unusable(&error))?);
        let mut kept = self.lock();
        kept.insert(0, (key, Arc::clone(&known)));
        kept.truncate(KEPT);
        Ok(known)
    }

    /// How the rows of an alignment set go with the template and the tokenizer of each base model that is here and can be read.
    ///
    /// # Errors
    /// When the database or the object store fails.
    pub async fn fit(&self, store: &Store, rows: &[u8]) -> Result<Fit, StoreError> {
        let rows: Arc<[u8]> = rows.into();
        let models = store.base_models().await?;
        let (mut examined, mut misfits) = (0, Vec::new());
        for model in &models {
            let known = match self.get(store, &model.name).await {
                Ok(known) => known,
                // Deleted meanwhile.
                Err(StoreError::NotFound) => continue,
                Err(error) if error.is_unavailable() => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, model = model.name, "a base model's tokenizer cannot be read");
                    continue;
                }
            };
            examined += 1;
            let rows = Arc::clone(&rows);
            let check = move || alignment_set::check_template(&rows, &known.tokenizer);
            let report = tokio::task::spawn_blocking(check).await.map_err(std::io::Error::other)??;
            if report.error_count > 0 {
                misfits.push(Misfit { model: model.name.clone(), problem: report.summary() });
            }
        }
        Ok(Fit { examined, misfits })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<([u8; 32], Arc<Known>)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How an alignment set goes with the base models that are here.
#[derive(Debug)]
pub struct Fit {
    examined: usize,
    /// Those it cannot be used with: their jobs would fail.
    pub misfits: Vec<Misfit>,
}

/// A base model that an alignment set cannot be used with.
#[derive(Debug)]
pub struct Misfit {
    /// Its name.
    pub model: String,
    /// Which rows do not go with it, and why. Quotes none.
    pub problem: String,
}

impl Fit {
    /// Why the set is of no use: it goes with none of the models. What is imported before there is one is found out by its jobs.
    #[must_use]
    pub fn is_useless(&self) -> Option<String> {
        let first = self.misfits.first().filter(|_| self.misfits.len() == self.examined)?;
        Some(format!("the rows fit the template of no base model that is here; of {}: {}", first.model, first.problem))
    }
}

async fn whole(store: &Store, object: &ObjectRef) -> Result<Vec<u8>, StoreError> {
    if object.bytes > MAX_BYTES {
        return Err(std::io::Error::other(format!("{} is too large to be read here", object.key)).into());
    }
    let mut bytes = Vec::new();
    let mut pieces = store.objects().read(&object.key).await?;
    while let Some(piece) = pieces.try_next().await.map_err(StoreError::from)? {
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

fn load(read: &[Vec<u8>]) -> Result<Known, String> {
    let [tokenizer, specials, template, config] = read else { return Err("files are missing".into()) };
    let specials = serde_json::from_slice(specials).map_err(|e| e.to_string())?;
    let template = std::str::from_utf8(template).map_err(|e| e.to_string())?;
    let config = serde_json::from_slice(config).map_err(|e| e.to_string())?;
    Ok(Known {
        tokenizer: ChatTokenizer::new(tokenizer, template, specials).map_err(|e| e.to_string())?,
        architecture: Architecture::from_config(&config).map_err(|e| e.to_string())?,
    })
}
