//! A directory as Hugging Face's hub ships it.

use std::borrow::Cow;
use std::path::Path;

use holdfast_base_model::architecture::ExpectedTensor;
use holdfast_base_model::{Architecture, Shards, files};
use holdfast_dataset::tokenizer::{SpecialTokens, files as text_files};
use safetensors::Dtype;
use serde_json::Value;

use crate::ImportError;
use crate::folder::{self, TensorSource, TextFiles};

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

pub(crate) fn import(source: &Path, out: &Path) -> Result<Architecture, ImportError> {
    let config = read_json(source, files::CONFIG)?
        .ok_or_else(|| ImportError::format(files::CONFIG, "is missing; is this a model directory?"))?;
    let architecture = Architecture::from_config(&config)?;
    let text = read_text(source, &config)?;
    let weights = Shards::open(source)?;
    folder::write_text(out, &config, &text)?;
    folder::write_weights(out, &architecture, &weights)?;
    Ok(architecture)
}

/// A JSON file of the directory; `None` when there is none.
fn read_json(source: &Path, name: &str) -> Result<Option<Value>, ImportError> {
    let path = source.join(name);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(ImportError::io(&path)(e)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| ImportError::format(name, format!("not valid JSON: {e}")))
}

fn read_text(source: &Path, config: &Value) -> Result<TextFiles, ImportError> {
    let path = source.join(text_files::TOKENIZER);
    let tokenizer = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(ImportError::format(
                text_files::TOKENIZER,
                "is missing; a SentencePiece tokenizer.model alone is not supported: save the fast tokenizer with transformers first",
            ));
        }
        Err(e) => return Err(ImportError::io(&path)(e)),
    };
    let tokenizer_config = read_json(source, TOKENIZER_CONFIG)?.unwrap_or(Value::Null);
    let generation_config = read_json(source, GENERATION_CONFIG)?.unwrap_or(Value::Null);
    let stop_ids = [&generation_config, config].into_iter().map(|c| token_ids(&c["eos_token_id"])).find(|ids| !ids.is_empty());
    Ok(TextFiles {
        tokenizer,
        special_tokens: SpecialTokens {
            bos_token: token_text(&tokenizer_config["bos_token"]),
            eos_token: token_text(&tokenizer_config["eos_token"]),
            stop_ids: stop_ids.unwrap_or_default(),
        },
        chat_template: chat_template(source, &tokenizer_config)?,
    })
}

/// A special token stands as a string, or as an object that describes it.
fn token_text(value: &Value) -> String {
    value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
}

/// One id, or a list of them.
fn token_ids(value: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

fn chat_template(source: &Path, tokenizer_config: &Value) -> Result<String, ImportError> {
    let path = source.join(text_files::CHAT_TEMPLATE);
    match std::fs::read_to_string(&path) {
        Ok(template) => return Ok(template),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(ImportError::io(&path)(e)),
    }
    let default = match &tokenizer_config["chat_template"] {
        Value::Array(named) => {
            named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str()).map(ToOwned::to_owned)
        }
        template => template.as_str().map(ToOwned::to_owned),
    };
    default.ok_or_else(|| {
        ImportError::format(
            TOKENIZER_CONFIG,
            "has no chat_template, and there is no chat_template.jinja: import the instruct variant of the model",
        )
    })
}

impl TensorSource for Shards {
    fn dtype(&self, tensor: &ExpectedTensor) -> Result<Dtype, ImportError> {
        Ok(self.expect(tensor)?.dtype)
    }

    fn bytes(&self, tensor: &ExpectedTensor) -> Result<Cow<'_, [u8]>, ImportError> {
        Ok(Cow::Borrowed(self.expect(tensor)?.bytes))
    }
}
