//! Directories as Hugging Face's hub ships them, and how they can be wrong.

use std::fs;
use std::path::Path;

use anyhow::Result;
use holdfast_base_model::{Architecture, WeightFile, files};
use holdfast_import::import;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

fn config() -> Value {
    json!({"model_type": "llama", "vocab_size": 4, "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1,
           "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": true, "eos_token_id": 2})
}

/// Writes the tensors `keep` accepts, each filled with its own place in the model.
fn write_shard(path: &Path, keep: impl Fn(usize) -> bool) -> Result<Vec<String>> {
    let tensors = Architecture::from_config(&config())?.tensors();
    let stored: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .enumerate()
        .filter(|(place, _)| keep(*place))
        .map(|(place, t)| {
            let count = t.shape.iter().product();
            (t.name, t.shape, std::iter::repeat_n((place as f32).to_le_bytes(), count).flatten().collect())
        })
        .collect();
    let views = stored.iter().map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    safetensors::serialize_to_file(views.collect::<Result<Vec<_>>>()?, None, path)?;
    Ok(stored.into_iter().map(|(name, ..)| name).collect())
}

/// A whole model directory in one file.
fn model() -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let put = |name: &str, value: &Value| fs::write(folder.path().join(name), value.to_string());
    put("config.json", &config())?;
    put(
        "tokenizer.json",
        &json!({"version": "1.0", "added_tokens": [{"id": 2, "content": "<e>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}], "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "<e>": 2}, "merges": []}}),
    )?;
    put("tokenizer_config.json", &json!({"eos_token": {"content": "<e>"}, "chat_template": "{{ messages[0].content }}"}))?;
    write_shard(&folder.path().join(files::WEIGHTS), |_| true)?;
    Ok(folder)
}

/// Turns the one weight file into two with an index.
fn shard(folder: &Path) -> Result<()> {
    fs::remove_file(folder.join(files::WEIGHTS))?;
    let mut map = serde_json::Map::new();
    for (name, odd) in [("model-00001-of-00002.safetensors", 0), ("model-00002-of-00002.safetensors", 1)] {
        for tensor in write_shard(&folder.join(name), |place| place % 2 == odd)? {
            map.insert(tensor, name.into());
        }
    }
    Ok(fs::write(folder.join(files::INDEX), json!({ "weight_map": map }).to_string())?)
}

fn refusal(folder: &Path) -> Result<String> {
    let out = tempfile::tempdir()?;
    Ok(import(folder, out.path()).map_or_else(|e| e.to_string(), |_| "accepted".into()))
}

#[test]
fn one_file_and_several_with_an_index_give_the_same_model() -> Result<()> {
    let (single, sharded) = (model()?, model()?);
    shard(sharded.path())?;
    let mut weights = Vec::new();
    for folder in [&single, &sharded] {
        let out = tempfile::tempdir()?;
        let imported = import(folder.path(), out.path())?;
        assert_eq!(imported.architecture, Architecture::from_config(&config())?);
        WeightFile::open(&out.path().join(files::WEIGHTS))?;
        weights.push(fs::read(out.path().join(files::WEIGHTS))?);
        let specials: Value = serde_json::from_slice(&fs::read(out.path().join("special_tokens.json"))?)?;
        assert_eq!((&specials["eos_token"], &specials["stop_ids"]), (&json!("<e>"), &json!([2])));
    }
    assert_eq!(weights[0], weights[1]);
    Ok(())
}

#[test]
fn what_is_missing_is_named() -> Result<()> {
    for (file, words) in [
        ("config.json", "config.json: is missing"),
        ("tokenizer.json", "tokenizer.json: is missing"),
        ("tokenizer_config.json", "has no chat_template"),
        (files::WEIGHTS, "pickled weights (.bin, .pt, .pth) are never read"),
    ] {
        let folder = model()?;
        fs::remove_file(folder.path().join(file))?;
        let message = refusal(folder.path())?;
        assert!(message.contains(words), "{message}");
    }
    Ok(())
}

#[test]
fn an_index_that_lies_or_leaves_its_folder_is_refused() -> Result<()> {
    for (value, words) in [
        (json!("../elsewhere.safetensors"), "names no file of this folder"),
        (json!("/etc/passwd"), "names no file of this folder"),
        (json!("model-00009-of-00002.safetensors"), "No such file"),
        (json!(7), "names no file of this folder"),
        (
            json!("model-00002-of-00002.safetensors"),
            "places tensor model.embed_tokens.weight in model-00002-of-00002.safetensors, which does not hold it",
        ),
    ] {
        let folder = model()?;
        shard(folder.path())?;
        let path = folder.path().join(files::INDEX);
        let mut index: Value = serde_json::from_slice(&fs::read(&path)?)?;
        index["weight_map"]["model.embed_tokens.weight"] = value;
        fs::write(&path, index.to_string())?;
        let message = refusal(folder.path())?;
        assert!(message.contains(words), "{message}");
    }
    Ok(())
}

#[test]
fn weights_that_are_cut_or_do_not_fit_are_refused() -> Result<()> {
    let folder = model()?;
    let path = folder.path().join(files::WEIGHTS);
    let whole = fs::read(&path)?;
    for length in [0, 4, 100, whole.len() - 1] {
        fs::write(&path, &whole[..length])?;
        assert!(refusal(folder.path())?.contains("not a sound safetensors file"), "cut to {length} bytes");
    }
    write_shard(&path, |place| place != 3)?;
    assert!(refusal(folder.path())?.contains("self_attn.k_proj.weight is missing"));
    fs::write(&path, &whole)?;
    let mut wider = config();
    wider["vocab_size"] = 5.into();
    fs::write(folder.path().join("config.json"), wider.to_string())?;
    assert!(refusal(folder.path())?.contains("has shape [4, 4], and config.json says [5, 4]"));
    Ok(())
}

#[test]
fn a_tokenizer_larger_than_the_embedding_is_refused() -> Result<()> {
    let folder = model()?;
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path)?)?;
    tokenizer["model"]["vocab"]["c"] = 9.into();
    fs::write(&path, tokenizer.to_string())?;
    assert!(refusal(folder.path())?.contains("the tokenizer has 10 ids, but the embedding has only 4 rows"));
    Ok(())
}
