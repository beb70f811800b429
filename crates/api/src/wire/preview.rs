//! The first rows of a file as a model is shown them.

use holdfast_dataset::preview::Preview;
use holdfast_domain::ids::FileId;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// The first rows of a file as a model is shown them.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FilePreview {
    #[schema(example = "file.preview")]
    pub(crate) object: &'static str,
    #[schema(value_type = String, example = "file-0192f3a4000070008000000000000001")]
    pub(crate) file: FileId,
    #[schema(example = "SmolLM2-135M-Instruct")]
    pub(crate) model: String,
    pub(crate) rows: Vec<PreviewRow>,
}

/// A row as a model is shown it, or why it cannot be.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PreviewRow {
    /// Its number in the file, from 1.
    line: u64,
    /// Tokens it has.
    tokens: u64,
    /// Those of them that count towards the loss.
    supervised_tokens: u64,
    /// Its text in pieces: what counts towards the loss, and what is only read.
    segments: Vec<PreviewSegment>,
    /// Its tokens, when they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    token_list: Option<Vec<PreviewToken>>,
    /// Why no model can be shown it.
    error: Option<String>,
}

/// A piece of a row's text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PreviewSegment {
    #[schema(example = "positive<|im_end|>")]
    text: String,
    /// Whether it counts towards the loss.
    supervised: bool,
}

/// A token of a row.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PreviewToken {
    #[schema(example = 16_438)]
    id: u32,
    #[schema(example = " positive")]
    text: String,
    /// Whether it counts towards the loss.
    supervised: bool,
}

impl PreviewRow {
    pub(crate) fn new(line: u64, preview: Preview, with_tokens: bool) -> Self {
        let (tokens, supervised_tokens) = (preview.token_count() as u64, preview.supervised_count() as u64);
        let token = |t: holdfast_dataset::preview::Token| PreviewToken { id: t.id, text: t.text, supervised: t.supervised };
        Self {
            line,
            tokens,
            supervised_tokens,
            segments: preview
                .segments
                .into_iter()
                .map(|segment| PreviewSegment { text: segment.text, supervised: segment.supervised })
                .collect(),
            token_list: with_tokens.then(|| preview.tokens.into_iter().map(token).collect()),
            error: None,
        }
    }

    pub(crate) fn bad(line: u64, error: String) -> Self {
        Self { line, tokens: 0, supervised_tokens: 0, segments: Vec::new(), token_list: None, error: Some(error) }
    }
}

/// What to show.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct PreviewQuery {
    /// The base model, or a fine-tuned one, whose template and tokenizer are used.
    #[param(example = "SmolLM2-135M-Instruct")]
    pub(crate) model: String,
    /// 1 to 20 rows.
    #[param(default = 3, minimum = 1, maximum = 20)]
    pub(crate) limit: Option<u32>,
    /// The most tokens a row may have, as in a job's hyperparameters; longer rows are cut.
    #[param(default = 1024, minimum = 16, maximum = 131_072)]
    pub(crate) max_length: Option<u32>,
    /// Whether the tokens are listed as well.
    #[param(default = false)]
    pub(crate) include_tokens: Option<bool>,
}
