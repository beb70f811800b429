//! A model's tokenizer together with its chat template.

use std::path::Path;

use serde::{Deserialize, Serialize};
use tokenizers::{PostProcessorWrapper, Tokenizer};

use crate::template::{ChatTemplate, TemplateError};

/// The names of the files a base model's folder keeps for text.
pub mod files {
    /// The tokenizer, in the `tokenizers` library's own format.
    pub const TOKENIZER: &str = "tokenizer.json";
    /// The special tokens by role, see [`super::SpecialTokens`].
    pub const SPECIAL_TOKENS: &str = "special_tokens.json";
    /// The chat template.
    pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
}

/// Special tokens that templates and generation refer to by role.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecialTokens {
    /// Begins a text; empty when the model has none.
    pub bos_token: String,
    /// Ends a text; empty when the model has none.
    pub eos_token: String,
    /// Ids after which generation stops.
    pub stop_ids: Vec<u32>,
}

/// Turns conversations into token ids.
#[derive(Debug)]
pub struct ChatTokenizer {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: ChatTemplate,
    pub(crate) specials: Vec<(String, u32)>,
    /// The special tokens by role.
    pub special_tokens: SpecialTokens,
}

/// Why a model's folder gives no tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file is missing or unreadable.
    #[error("{file}: {cause}")]
    Read {
        /// Its name.
        file: &'static str,
        /// The cause.
        cause: std::io::Error,
    },
    /// A file does not hold what its name says.
    #[error("{file}: {message}")]
    Format {
        /// Its name.
        file: &'static str,
        /// What is wrong.
        message: String,
    },
    /// See [`TemplateError`].
    #[error(transparent)]
    Template(#[from] TemplateError),
}

impl ChatTokenizer {
    /// Reads the tokenizer, its special tokens and the template of a base model's folder.
    ///
    /// # Errors
    /// When one of the three files is missing or does not hold what it should.
    pub fn load(folder: &Path) -> Result<Self, LoadError> {
        let read = |file: &'static str| std::fs::read(folder.join(file)).map_err(|cause| LoadError::Read { file, cause });
        let format = |file: &'static str| move |message: String| LoadError::Format { file, message };
        let special_tokens: SpecialTokens =
            serde_json::from_slice(&read(files::SPECIAL_TOKENS)?).map_err(|e| format(files::SPECIAL_TOKENS)(e.to_string()))?;
        let template = String::from_utf8(read(files::CHAT_TEMPLATE)?).map_err(|e| format(files::CHAT_TEMPLATE)(e.to_string()))?;
        Self::new(&read(files::TOKENIZER)?, &template, special_tokens)
    }

    /// Builds one from the contents of the three files.
    ///
    /// # Errors
    /// When `tokenizer_json` is not a tokenizer, or the template does not compile.
    pub fn new(tokenizer_json: &[u8], template: &str, special_tokens: SpecialTokens) -> Result<Self, LoadError> {
        let mut tokenizer = Tokenizer::from_bytes(tokenizer_json)
            .map_err(|e| LoadError::Format { file: files::TOKENIZER, message: e.to_string() })?;
        // Templates write their special tokens themselves; all a post-processor would do here is to trim the offsets, from
        // which the loss mask is made.
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| LoadError::Format { file: files::TOKENIZER, message: e.to_string() })?;
        let mut specials: Vec<(String, u32)> = tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, token)| (token.content, id))
            .collect();
        specials.sort_by_key(|(_, id)| *id);
        let template = ChatTemplate::new(template, &special_tokens.bos_token, &special_tokens.eos_token)?;
        Ok(Self { tokenizer, template, specials, special_tokens })
    }

    /// The number of token ids, added ones counted.
    #[must_use]
    pub fn vocabulary_size(&self) -> usize {
        // Ids need not be dense, so the largest one decides how many rows the embedding must have.
        self.tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.specials.binary_search_by_key(&id, |(_, id)| *id).is_ok()
    }

    /// The text of token ids, special tokens left out.
    ///
    /// # Errors
    /// When an id is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String, String> {
        self.tokenizer.decode(ids, true).map_err(|e| e.to_string())
    }
}
