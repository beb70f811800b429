//! The canonical folder: how it is written, and the check that it can be read.

use std::borrow::Cow;
use std::cell::RefCell;
use std::path::Path;

use holdfast_base_model::architecture::ExpectedTensor;
use holdfast_base_model::{Architecture, WeightFile, files};
use holdfast_dataset::tokenizer::{self, ChatTokenizer, SpecialTokens};
use safetensors::{Dtype, View};
use serde_json::Value;

use crate::ImportError;

/// Where a tensor's bytes come from, one tensor at a time, so that a model larger than memory can be imported.
pub(crate) trait TensorSource {
    /// In what numbers the tensor will be written.
    fn dtype(&self, tensor: &ExpectedTensor) -> Result<Dtype, ImportError>;
    /// Its bytes, little-endian, row-major, in [`Self::dtype`].
    fn bytes(&self, tensor: &ExpectedTensor) -> Result<Cow<'_, [u8]>, ImportError>;
}

/// The text side of a model.
pub(crate) struct TextFiles {
    pub(crate) tokenizer: Vec<u8>,
    pub(crate) special_tokens: SpecialTokens,
    pub(crate) chat_template: String,
}

pub(crate) fn write_text(out: &Path, config: &Value, text: &TextFiles) -> Result<(), ImportError> {
    let put = |name: &str, bytes: &[u8]| {
        let path = out.join(name);
        std::fs::write(&path, bytes).map_err(ImportError::io(&path))
    };
    put(files::CONFIG, format!("{config:#}\n").as_bytes())?;
    put(tokenizer::files::TOKENIZER, &text.tokenizer)?;
    put(tokenizer::files::CHAT_TEMPLATE, text.chat_template.as_bytes())?;
    let specials = serde_json::to_vec_pretty(&text.special_tokens)
        .map_err(|e| ImportError::format(tokenizer::files::SPECIAL_TOKENS, e.to_string()))?;
    put(tokenizer::files::SPECIAL_TOKENS, &specials)
}

pub(crate) fn write_weights(out: &Path, architecture: &Architecture, source: &impl TensorSource) -> Result<(), ImportError> {
    let path = out.join(files::WEIGHTS);
    let failure = RefCell::new(None);
    let mut views = Vec::new();
    for tensor in architecture.tensors() {
        let dtype = source.dtype(&tensor)?;
        views.push((tensor.name.clone(), TensorView { tensor, dtype, source, failure: &failure }));
    }
    safetensors::serialize_to_file(views, None, &path).map_err(|e| ImportError::format(files::WEIGHTS, e.to_string()))?;
    failure.into_inner().map_or(Ok(()), Err)
}

/// What the writer asks for, one tensor after the other. Its trait cannot fail, so a failure is kept aside, zeros are
/// written in the tensor's place, and the import ends with the failure.
struct TensorView<'a, S> {
    tensor: ExpectedTensor,
    dtype: Dtype,
    source: &'a S,
    failure: &'a RefCell<Option<ImportError>>,
}

impl<S: TensorSource> View for TensorView<'_, S> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let outcome = if self.failure.borrow().is_some() {
            return Cow::Owned(vec![0; self.data_len()]);
        } else {
            self.source.bytes(&self.tensor)
        };
        outcome.unwrap_or_else(|e| {
            *self.failure.borrow_mut() = Some(e);
            Cow::Owned(vec![0; self.data_len()])
        })
    }

    fn data_len(&self) -> usize {
        self.tensor.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Opens what was written the way the trainer will.
pub(crate) fn verify(out: &Path, architecture: &Architecture) -> Result<(), ImportError> {
    let tokenizer = ChatTokenizer::load(out)?;
    let weights = WeightFile::open(&out.join(files::WEIGHTS))?;
    for tensor in architecture.tensors() {
        weights.expect(&tensor)?;
    }
    let ids = tokenizer.vocabulary_size();
    if ids > architecture.vocab_size {
        return Err(ImportError::Vocabulary { tokenizer: ids, embedding: architecture.vocab_size });
    }
    Ok(())
}
