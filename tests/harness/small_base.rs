//! A base model small enough that a step takes milliseconds: the real model's tokenizer and template over two narrow layers of random
//! weights. What it says means nothing; that it is trained the same way is all that tests of crashes need.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use serde_json::{Value, json};

const WIDTH: usize = 64;
const INNER: usize = 128;
const HEADS: usize = 4;
const KEY_HEADS: usize = 2;
const LAYERS: usize = 2;

/// Makes such a base of the real one's folder.
///
/// # Errors
/// When the folder cannot be read, or the other not be written.
pub(crate) fn make(real: &Path, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    for entry in std::fs::read_dir(real)? {
        let path = entry?.path();
        let name = path.file_name().context("no name")?;
        if path.extension().is_none_or(|extension| extension != "safetensors") && name != "model.safetensors.index.json" {
            std::fs::copy(&path, folder.join(name))?;
        }
    }
    let mut config: Value = serde_json::from_slice(&std::fs::read(real.join("config.json"))?)?;
    let vocabulary = usize::try_from(config["vocab_size"].as_u64().context("no vocabulary")?)?;
    for (name, value) in [
        ("hidden_size", WIDTH),
        ("intermediate_size", INNER),
        ("num_attention_heads", HEADS),
        ("num_key_value_heads", KEY_HEADS),
        ("num_hidden_layers", LAYERS),
        ("head_dim", WIDTH / HEADS),
    ] {
        config[name] = json!(value);
    }
    config["tie_word_embeddings"] = json!(true);
    std::fs::write(folder.join("config.json"), serde_json::to_vec_pretty(&config)?)?;

    let key_width = WIDTH / HEADS * KEY_HEADS;
    let mut shapes = BTreeMap::from([
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, WIDTH]),
        ("model.norm.weight".to_owned(), vec![WIDTH]),
    ]);
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![WIDTH]),
            ("post_attention_layernorm", vec![WIDTH]),
            ("self_attn.q_proj", vec![WIDTH, WIDTH]),
            ("self_attn.k_proj", vec![key_width, WIDTH]),
            ("self_attn.v_proj", vec![key_width, WIDTH]),
            ("self_attn.o_proj", vec![WIDTH, WIDTH]),
            ("mlp.gate_proj", vec![INNER, WIDTH]),
            ("mlp.up_proj", vec![INNER, WIDTH]),
            ("mlp.down_proj", vec![WIDTH, INNER]),
        ] {
            shapes.insert(format!("model.layers.{layer}.{name}.weight"), shape);
        }
    }
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let weights: BTreeMap<&String, Vec<u8>> = shapes
        .iter()
        .map(|(name, shape)| {
            let is_norm = shape.len() == 1;
            let count: usize = shape.iter().product();
            let bytes = (0..count).flat_map(|_| if is_norm { 1_f32 } else { random.random_range(-0.1..0.1_f32) }.to_le_bytes());
            (name, bytes.collect())
        })
        .collect();
    let views = shapes
        .iter()
        .map(|(name, shape)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), weights.get(name).context("no weights")?)?)))
        .collect::<Result<Vec<_>>>()?;
    Ok(serialize_to_file(views, None, &folder.join("model.safetensors"))?)
}
