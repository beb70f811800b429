//! The trainer against figures that transformers, PEFT and torch computed: see `fixtures/make_fixtures.py`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use holdfast_base_model::{WeightFile, files};
use holdfast_trainer::oracle;
use safetensors::tensor::TensorView;

fn fixture(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(case)
}

/// `count` is what the case holds, so that no figure is left out unnoticed.
fn every_figure_holds(case: &Path, count: usize) -> Result<()> {
    let figures = oracle::check(case, None)?;
    let off: Vec<_> = figures.iter().filter(|figure| !figure.is_ok()).collect();
    assert!(off.is_empty(), "{} of {} figures are off: {off:#?}", off.len(), figures.len());
    assert_eq!(figures.len(), count);
    Ok(())
}

#[test]
fn a_tied_llama_with_plain_rotary_positions_computes_every_reference_figure() -> Result<()> {
    every_figure_holds(&fixture("smollm2"), 422)
}

#[test]
fn an_untied_llama_with_scaled_rotary_positions_computes_every_reference_figure() -> Result<()> {
    every_figure_holds(&fixture("llama3"), 422)
}

#[test]
fn a_mistral_with_a_sliding_window_computes_every_reference_figure() -> Result<()> {
    every_figure_holds(&fixture("mistral"), 278)
}

#[test]
fn a_qwen2_with_biases_computes_every_reference_figure() -> Result<()> {
    every_figure_holds(&fixture("qwen2"), 230)
}

#[test]
fn a_qwen3_with_head_norms_computes_every_reference_figure() -> Result<()> {
    every_figure_holds(&fixture("qwen3"), 422)
}

#[test]
fn a_gemma3_with_both_kinds_of_layers_computes_every_reference_figure() -> Result<()> {
    every_figure_holds(&fixture("gemma3"), 422)
}

#[test]
fn a_gemma3_with_capped_logits_and_stretched_positions_computes_every_reference_figure() -> Result<()> {
    every_figure_holds(&fixture("gemma3_capped"), 182)
}

#[test]
fn a_qwen2_with_windows_on_its_later_layers_computes_every_reference_figure() -> Result<()> {
    every_figure_holds(&fixture("qwen2_windowed"), 182)
}

/// As Gemma 3 ships from 4B on: a nested configuration, and prefixed weights beside those of an eye.
#[test]
fn the_text_part_of_a_gemma_that_sees_images_computes_the_same_figures() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for entry in std::fs::read_dir(fixture("gemma3"))? {
        let entry = entry?;
        std::fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
    }
    let config = folder.path().join(files::CONFIG);
    let text: serde_json::Value = serde_json::from_slice(&std::fs::read(&config)?)?;
    let nested = serde_json::json!({"model_type": "gemma3", "vision_config": {}, "text_config": text});
    std::fs::write(&config, nested.to_string())?;

    let weights = WeightFile::open(&fixture("gemma3").join(files::WEIGHTS))?;
    let views = weights.names().into_iter().map(|name| {
        let tensor = weights.get(&name).ok_or_else(|| anyhow::anyhow!("no {name}"))?;
        Ok((format!("language_model.{name}"), TensorView::new(tensor.dtype, tensor.shape.to_vec(), tensor.bytes)?))
    });
    safetensors::serialize_to_file(views.collect::<Result<Vec<_>>>()?, None, &folder.path().join(files::WEIGHTS))?;
    every_figure_holds(folder.path(), 422)
}
