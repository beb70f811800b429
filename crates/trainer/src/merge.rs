//! An adapter put into its base: `W + (α / r) · B A` in place of every `W` that it adapts, as a model's folder of its own.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use holdfast_base_model::{Shards, files};
use safetensors::{Dtype, View};
use tch::{Device, Kind, Tensor};

use crate::adapter::Factor;
use crate::model::{Model, to_tensor};
use crate::{adapter_files, device};

/// A tensor as it is written: the base's own bytes, or merged ones in the base's numbers.
struct Merged<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl View for &Merged<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes to `out`, which must not exist, what `base` and the adapter in `adapter` are together, in the base's numbers.
///
/// # Errors
/// When a folder is not what it should be, or `out` exists or cannot be written.
pub fn merge(base: &Path, adapter: &Path, out: &Path) -> Result<()> {
    ensure!(!out.exists(), "{} exists; name a folder that does not", out.display());
    let model = Model::load(base, Kind::Float, Device::Cpu)?;
    let adapter = adapter_files::read(adapter, &model)?;
    let scale = adapter.config.alpha / adapter.config.rank as f64;
    let (mut downs, mut ups) = (BTreeMap::new(), BTreeMap::new());
    for (name, factor) in adapter.factors() {
        let of = if name.factor == Factor::Down { &mut downs } else { &mut ups };
        of.insert(format!("{}.weight", name.module()), factor);
    }
    let shards = Shards::open(base)?;
    let mut tensors = Vec::new();
    for expected in model.architecture.tensors() {
        let stored = shards.expect(&expected)?;
        let (dtype, shape) = (stored.dtype, stored.shape.to_vec());
        let bytes = match (downs.get(&expected.name), ups.get(&expected.name)) {
            (Some(down), Some(up)) => {
                let kind = device::kind_of(dtype).with_context(|| format!("weights of {dtype:?} cannot be merged into"))?;
                let weight = to_tensor(&expected.name, stored, Kind::Float, Device::Cpu)?;
                Cow::Owned(bytes_of(&(weight + up.mm(down) * scale).to_kind(kind))?)
            }
            _ => Cow::Borrowed(stored.bytes),
        };
        tensors.push((expected.name, Merged { dtype, shape, bytes }));
    }
    // Its whole name, since what stands behind a dot may be a part of it (`llama-3.1`); and whatever is there already is not ours.
    let mut beside = out.components().collect::<PathBuf>().into_os_string();
    beside.push(format!(".partial-{}", std::process::id()));
    let beside = PathBuf::from(beside);
    if let Some(parent) = out.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    std::fs::create_dir(&beside).with_context(|| format!("cannot make {}", beside.display()))?;
    for entry in std::fs::read_dir(base)? {
        let path = entry?.path();
        let Some(name) = path.file_name() else { continue };
        let holds_weights = path.extension().is_some_and(|extension| extension == "safetensors") || name == files::INDEX;
        if path.is_file() && !holds_weights {
            std::fs::copy(&path, beside.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    let views = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    safetensors::serialize_to_file(views, None, &beside.join(files::WEIGHTS)).context("cannot write the weights")?;
    std::fs::rename(&beside, out).with_context(|| format!("cannot make {}", out.display()))
}

fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    let tensor = tensor.contiguous();
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok(bytes)
}
