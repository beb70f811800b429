//! The tokenizer a GGUF file carries in its metadata, rebuilt as a `tokenizer.json`.

use candle_core::quantized::gguf_file::Value;
use holdfast_dataset::tokenizer::SpecialTokens;
use serde_json::{Map, json};

use crate::ImportError;
use crate::folder::TextFiles;
use crate::gguf::Gguf;

/// llama.cpp's kinds of tokens that never come out of merging.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

pub(crate) fn rebuild(gguf: &Gguf) -> Result<TextFiles, ImportError> {
    match gguf.text("tokenizer.ggml.model") {
        Some("gpt2") => {}
        other => {
            let found = other.unwrap_or("(none)");
            return Err(
                gguf.wrong(format!("tokenizer.ggml.model {found:?} is not supported; supported: \"gpt2\" (byte-level BPE)"))
            );
        }
    }
    let tokens = strings(gguf, "tokenizer.ggml.tokens")?;
    let merges = strings(gguf, "tokenizer.ggml.merges")?;
    let kinds = kinds(gguf, tokens.len())?;
    let added: Vec<_> = tokens
        .iter()
        .zip(&kinds)
        .enumerate()
        .filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(id, (content, kind))| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": *kind == CONTROL})
        })
        .collect();
    let splitting = Splitting::of(gguf)?;
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": splitting.byte_level_regex});
    let vocabulary: Map<_, _> = tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    if vocabulary.len() != tokens.len() {
        return Err(gguf.wrong("tokenizer.ggml.tokens holds a token twice"));
    }
    let pre: Vec<_> = splitting.first.into_iter().chain([byte_level.clone()]).collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": splitting.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre},
        "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": splitting.ignore_merges, "vocab": vocabulary, "merges": merges},
    });
    let named = |key: &str| {
        let id = usize::try_from(gguf.whole(key)?).ok()?;
        tokens.get(id).map(|token| (*token).to_owned())
    };
    let stop = |key: &str| gguf.whole(key).and_then(|id| u32::try_from(id).ok());
    Ok(TextFiles {
        tokenizer: tokenizer.to_string().into_bytes(),
        special_tokens: SpecialTokens {
            bos_token: named("tokenizer.ggml.bos_token_id").unwrap_or_default(),
            eos_token: named("tokenizer.ggml.eos_token_id").unwrap_or_default(),
            stop_ids: ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"].into_iter().filter_map(stop).collect(),
        },
        chat_template: gguf
            .text("tokenizer.chat_template")
            .ok_or_else(|| gguf.wrong("tokenizer.chat_template is missing: import the instruct variant of the model"))?
            .to_owned(),
    })
}

fn strings<'a>(gguf: &'a Gguf, key: &str) -> Result<Vec<&'a str>, ImportError> {
    let wrong = || gguf.wrong(format!("{key} is missing or no list of strings"));
    let Some(Value::Array(values)) = gguf.get(key) else { return Err(wrong()) };
    values.iter().map(|v| v.to_string().map(String::as_str)).collect::<Result<_, _>>().map_err(|_| wrong())
}

fn kinds(gguf: &Gguf, tokens: usize) -> Result<Vec<i64>, ImportError> {
    let wrong = || gguf.wrong("tokenizer.ggml.token_type is missing or not one whole number for each token");
    let Some(Value::Array(values)) = gguf.get("tokenizer.ggml.token_type") else { return Err(wrong()) };
    let kinds: Option<Vec<i64>> = values
        .iter()
        .map(|v| match v {
            Value::I32(n) => Some(i64::from(*n)),
            other => other.to_i64().ok(),
        })
        .collect();
    kinds.filter(|k| k.len() == tokens).ok_or_else(wrong)
}

/// How text is cut before merging; GGUF only names it.
struct Splitting {
    normalizer: serde_json::Value,
    first: Option<serde_json::Value>,
    byte_level_regex: bool,
    ignore_merges: bool,
}

impl Splitting {
    fn of(gguf: &Gguf) -> Result<Self, ImportError> {
        let split =
            |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let plain = Self { normalizer: json!(null), first: None, byte_level_regex: true, ignore_merges: false };
        Ok(match gguf.text("tokenizer.ggml.pre") {
            Some("smollm") => Self { first: Some(json!({"type": "Digits", "individual_digits": true})), ..plain },
            Some("gpt-2") => plain,
            Some("llama-bpe") => Self {
                first: Some(split(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
                )),
                byte_level_regex: false,
                ignore_merges: true,
                ..plain
            },
            other => {
                let found = other.unwrap_or("(none)");
                return Err(
                    gguf.wrong(format!("tokenizer.ggml.pre {found:?} is not supported; supported: smollm, gpt-2, llama-bpe"))
                );
            }
        })
    }
}
