//! Where to compute, as one word: `cpu`, `cuda` or `cuda:N`.

use anyhow::{Result, bail};
use safetensors::Dtype;
use tch::{Cuda, Device, Kind};

use holdfast_domain::hyperparameters::Precision;

/// Reads the word and makes sure that the device is there.
///
/// # Errors
/// When the word is none of the three, or this build or machine has no such GPU.
pub fn parse(word: &str) -> Result<Device> {
    let index = match word.split_once(':') {
        None if word == "cpu" => return Ok(Device::Cpu),
        None if word == "cuda" => 0,
        Some(("cuda", index)) => {
            index.parse::<usize>().map_err(|_| anyhow::anyhow!("device {word:?}: {index:?} is no GPU number"))?
        }
        _ => bail!("device {word:?} is none of cpu, cuda, cuda:N"),
    };
    if !Cuda::is_available() {
        bail!(
            "device {word:?}: this libtorch finds no CUDA; run on cpu, or install libtorch for GPUs with `cargo xtask setup --cuda`"
        );
    }
    let count = Cuda::device_count();
    if i64::try_from(index).is_ok_and(|index| index < count) {
        return Ok(Device::Cuda(index));
    }
    bail!("device {word:?}: this machine has {count} GPUs, numbered from 0")
}

/// libtorch's name for the numbers the base computes in.
#[must_use]
pub const fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::F32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    }
}

/// libtorch's name for the numbers a file's tensor is stored in; `None` for those that no weights have.
#[must_use]
pub const fn kind_of(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}
