//! The alignment reference as a file, so that one job computes it and every later one on the same base and set uses it.
//!
//! The worker names it by a hash over the base, the alignment set and the numbers it was computed in; a file of another name, or
//! of other rows, is not used.

use std::path::Path;

use anyhow::{Context, Result};
use holdfast_base_model::WeightFile;
use holdfast_dataset::Example;
use holdfast_domain::plan::{Plan, paths};
use holdfast_domain::safety::KlPositions;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::methods::Objective;
use crate::model::Model;
use crate::reference::Reference;
use crate::stop::Stop;

/// The reference on `alignment`: read where the job folder has it, else computed, and then left for later jobs.
///
/// # Errors
/// When it cannot be written, or the run is asked to stop.
pub(crate) fn get(folder: &Path, plan: &Plan, model: &Model, alignment: &[Example], stop: &Stop) -> Result<Reference> {
    let (rows, positions) = (alignment.to_vec(), plan.safety.kl_positions);
    let needs_states = crate::methods::of(&plan.safety, plan.hyperparameters.precision)
        .asks(0)
        .alignment
        .is_some_and(|(objective, _)| objective != Objective::Task);
    if !needs_states {
        return Ok(Reference::with_hidden(rows, positions, None));
    }
    let Some(name) = plan.reference.as_ref().filter(|_| positions != KlPositions::All) else {
        return Ok(Reference::new(model, rows, positions, stop)?);
    };
    let tensor = tensor_name(name, alignment);
    let path = folder.join(paths::REFERENCE);
    match read(&path, &tensor, model, alignment) {
        Ok(Some(hidden)) => return Ok(Reference::with_hidden(rows, positions, Some(hidden))),
        Ok(None) => {}
        Err(error) => eprintln!("{}: {error:#}; computing it anew", path.display()),
    }
    let reference = Reference::new(model, rows, positions, stop)?;
    if let Some(hidden) = reference.hidden() {
        write(&folder.join(paths::REFERENCE_OUT), &tensor, hidden)?;
    }
    Ok(reference)
}

/// What the tensor is called: the reference's name and a hash of the rows' token ids and masks, which tokenizer and template
/// decide.
fn tensor_name(name: &str, alignment: &[Example]) -> String {
    let mut hash = Sha256::new();
    for example in alignment {
        hash.update((example.ids.len() as u64).to_le_bytes());
        for (id, supervised) in example.ids.iter().zip(&example.supervised) {
            hash.update(id.to_le_bytes());
            hash.update([u8::from(*supervised)]);
        }
    }
    format!("{name}.{}", hex::encode(hash.finalize()))
}

fn read(path: &Path, tensor: &str, model: &Model, alignment: &[Example]) -> Result<Option<Tensor>> {
    if !path.exists() {
        return Ok(None);
    }
    let file = WeightFile::open(path)?;
    let Some(stored) = file.get(tensor) else { return Ok(None) };
    let positions: usize = alignment.iter().map(Example::supervised_count).sum();
    let expected = if model.kind == Kind::BFloat16 { Dtype::BF16 } else { Dtype::F32 };
    if stored.shape != [positions, model.architecture.hidden_size] || stored.dtype != expected {
        return Ok(None);
    }
    let shape = [positions as i64, model.architecture.hidden_size as i64];
    Ok(Some(Tensor::from_data_size(stored.bytes, &shape, model.kind).to_device(model.device)))
}

fn write(path: &Path, tensor: &str, hidden: &Tensor) -> Result<()> {
    let shape: Vec<usize> = hidden.size().into_iter().map(usize::try_from).collect::<Result<_, _>>()?;
    // bfloat16 has no type of Rust's own; its bits are the upper half of a float32's.
    let numbers = Vec::<f32>::try_from(&hidden.to_kind(Kind::Float).reshape(-1))?;
    let (dtype, bytes): (Dtype, Vec<u8>) = if hidden.kind() == Kind::BFloat16 {
        (Dtype::BF16, numbers.iter().flat_map(|number| ((number.to_bits() >> 16) as u16).to_le_bytes()).collect())
    } else {
        (Dtype::F32, numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
    };
    let unfinished = path.with_extension("partial");
    let view = TensorView::new(dtype, shape, &bytes)?;
    safetensors::serialize_to_file([(tensor, view)], None, &unfinished)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(std::fs::rename(unfinished, path)?)
}
