//! A real instruct model, read from its GGUF file, against figures that transformers computed from the same file: see
//! `fixtures/real/make_smollm2.py`. `cargo xtask setup` downloads the model.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result};
use holdfast_dataset::encode::{EncodeError, EncodeOptions};
use holdfast_dataset::{ChatTokenizer, Row};
use holdfast_domain::hyperparameters::LongRows;
use holdfast_trainer::model::Model;
use holdfast_trainer::stop::Stop;
use holdfast_trainer::{evaluate, generate};
use serde_json::Value;
use tch::{Device, Kind};

mod support;

const OPTIONS: EncodeOptions = EncodeOptions { max_length: 1024, long_rows: LongRows::Error };

/// The one conversation whose text holds a special token; the reference tokenises it, this service refuses it.
const FORGED_TURN: usize = 5;

/// The imported model, shared by the tests of this file.
fn base() -> Result<&'static Path> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let imported = FOLDER.get_or_init(|| support::import_model("smollm2").map_err(|e| format!("{e:#}")));
    imported.as_deref().map_err(|e| anyhow::anyhow!(e.clone()))
}

fn expected() -> Result<Value> {
    Ok(serde_json::from_str(include_str!("fixtures/real/smollm2.json"))?)
}

fn list<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    value[key].as_array().with_context(|| format!("no list {key}"))
}

fn ids(value: &Value, key: &str) -> Result<Vec<u32>> {
    Ok(serde_json::from_value(value[key].clone())?)
}

#[test]
fn token_ids_and_loss_masks_equal_those_of_transformers() -> Result<()> {
    let tokenizer = ChatTokenizer::load(base()?)?;
    for (index, conversation) in list(&expected()?, "conversations")?.iter().enumerate() {
        let line = serde_json::json!({ "messages": conversation["messages"] }).to_string();
        let encoded = tokenizer.encode(&Row::parse(line.as_bytes())?, OPTIONS);
        if index == FORGED_TURN {
            assert_eq!(
                encoded,
                Err(EncodeError::SpecialToken { place: "messages[0].content".into(), token: "<|im_end|>".into() })
            );
            continue;
        }
        let encoded = encoded?;
        assert_eq!(encoded.ids, ids(conversation, "ids")?, "conversation {index}");
        let supervised: Vec<bool> = ids(conversation, "supervised")?.into_iter().map(|s| s == 1).collect();
        assert_eq!(encoded.supervised, supervised, "conversation {index}");
    }
    Ok(())
}

#[test]
fn a_preview_marks_what_transformers_counts_towards_the_loss() -> Result<()> {
    let tokenizer = ChatTokenizer::load(base()?)?;
    for (index, conversation) in list(&expected()?, "conversations")?.iter().enumerate().filter(|(i, _)| *i != FORGED_TURN) {
        let line = serde_json::json!({ "messages": conversation["messages"] }).to_string();
        let preview = tokenizer.preview(&Row::parse(line.as_bytes())?, OPTIONS)?;
        let marked: Vec<u32> = preview.tokens.iter().map(|token| u32::from(token.supervised)).collect();
        assert_eq!(marked, ids(conversation, "supervised")?, "conversation {index}");
        let (of_segments, of_tokens): (String, String) = (
            preview.segments.into_iter().map(|segment| segment.text).collect(),
            preview.tokens.into_iter().map(|token| token.text).collect(),
        );
        assert_eq!(of_segments, of_tokens, "conversation {index}");
        for message in list(conversation, "messages")? {
            let content = message["content"].as_str().context("content")?;
            assert!(of_segments.contains(content.trim()), "conversation {index}");
        }
    }
    Ok(())
}

#[test]
fn task_losses_equal_those_of_transformers() -> Result<()> {
    let tokenizer = ChatTokenizer::load(base()?)?;
    let model = Model::load(base()?, Kind::Float, Device::Cpu)?;
    for (index, conversation) in list(&expected()?, "conversations")?.iter().enumerate().filter(|(i, _)| *i != FORGED_TURN) {
        let line = serde_json::json!({ "messages": conversation["messages"] }).to_string();
        let example = tokenizer.encode(&Row::parse(line.as_bytes())?, OPTIONS)?;
        let loss = evaluate::evaluate(&model, None, &[example], 1, &Stop::default())?.loss;
        let expected = conversation["task_loss"].as_f64().context("task_loss")?;
        assert!((loss - expected).abs() < 1e-3, "conversation {index}: {loss} is not {expected}");
    }
    Ok(())
}

#[test]
fn greedy_continuations_equal_those_of_transformers() -> Result<()> {
    let tokenizer = ChatTokenizer::load(base()?)?;
    let model = Model::load(base()?, Kind::Float, Device::Cpu)?;
    let expected = expected()?;
    let cases = list(&expected, "greedy")?;
    let mut prompts = Vec::new();
    for case in cases {
        let line = serde_json::json!({"messages": [{"role": "user", "content": case["prompt"]}]}).to_string();
        let prompt = tokenizer.encode_prompt(&Row::parse_prompt(line.as_bytes())?)?;
        assert_eq!(prompt, ids(case, "prompt_ids")?);
        prompts.push(prompt);
    }
    let answers = generate::greedy(&model, None, &prompts, &tokenizer.special_tokens.stop_ids, 24, &Stop::default())?;
    for (answer, case) in answers.iter().zip(cases) {
        assert_eq!(*answer, ids(case, "next_ids")?);
    }
    Ok(())
}
