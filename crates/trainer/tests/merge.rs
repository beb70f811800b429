//! A base with an adapter put into it is what the two are together.

use std::path::Path;

use anyhow::Result;
use holdfast_dataset::batch::Batch;
use holdfast_trainer::model::Model;
use holdfast_trainer::packed::Packed;
use holdfast_trainer::{adapter_files, merge};
use tch::{Device, Kind};

#[test]
fn a_merged_model_computes_what_base_and_adapter_do() -> Result<()> {
    for family in ["llama3", "gemma3", "qwen2"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family);
        let out = tempfile::tempdir()?;
        let merged = out.path().join("merged");
        merge::merge(&folder, &folder, &merged)?;
        let (base, merged) = (Model::load(&folder, Kind::Float, Device::Cpu)?, Model::load(&merged, Kind::Float, Device::Cpu)?);
        let adapter = adapter_files::read(&folder, &base)?;
        let batch = Batch { lengths: vec![6], ids: vec![3, 1, 4, 1, 5, 9], positions: (0..6).collect(), targets: Vec::new() };
        let packed = Packed::new(&[(&batch, 0)], Device::Cpu);
        let together = base.hidden(&packed, Some(&adapter));
        let off = (merged.hidden(&packed, None) - &together).abs().max().double_value(&[]);
        let moved = (base.hidden(&packed, None) - &together).abs().max().double_value(&[]);
        assert!(off < 1e-4 && moved > 100.0 * off, "{family}: {off} of {moved}");
    }
    Ok(())
}

#[test]
fn a_folder_that_exists_is_not_written_over() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama3");
    let refused = merge::merge(&folder, &folder, &folder).unwrap_err().to_string();
    assert!(refused.contains("exists"), "{refused}");
}
