//! The tokenizers and shapes of base models, kept in memory for requests that need them: previews and estimates.

use std::sync::{Arc, Mutex, PoisonError};

use futures::TryStreamExt;
use holdfast_base_model::{Architecture, files};
use holdfast_dataset::ChatTokenizer;
use holdfast_dataset::tokenizer::files as text_files;
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
pub(crate) struct Tokenizers {
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
        self.turns.try_acquire().map_err(|_| ApiError::busy("estimates and previews"))
    }

    /// The tokenizer and the shape of a base model.
    pub(crate) async fn get(&self, store: &Store, base_model: &str) -> Result<Arc<Known>, ApiError> {
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
            let object = find(name).ok_or_else(|| ApiError::internal(&format!("the base model {base_model} has no {name}")))?;
            read.push(whole(store, &object).await?);
        }
        let known = tokio::task::spawn_blocking(move || load(&read)).await.map_err(|e| ApiError::internal(&e))?;
        let known = Arc::new(known.map_err(|e| ApiError::internal(&format!("the base model {base_model}: {e}")))?);
        let mut kept = self.lock();
        kept.insert(0, (key, Arc::clone(&known)));
        kept.truncate(KEPT);
        Ok(known)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<([u8; 32], Arc<Known>)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn whole(store: &Store, object: &ObjectRef) -> Result<Vec<u8>, ApiError> {
    if object.bytes > MAX_BYTES {
        return Err(ApiError::internal(&format!("{} is too large to be read here", object.key)));
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
