//! Safetensors files: headers checked before any byte of a tensor is touched, bytes mapped rather than read.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};

use crate::architecture::ExpectedTensor;

/// One safetensors file.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    data_start: usize,
}

/// A tensor's place in a file.
#[derive(Debug, Clone, Copy)]
pub struct TensorBytes<'a> {
    /// In what numbers.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: &'a [usize],
    /// Its numbers, little-endian, row-major.
    pub bytes: &'a [u8],
}

/// Why weights cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file cannot be opened or mapped.
    #[error("{path}: {cause}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: std::io::Error,
    },
    /// The file is not a whole safetensors file.
    #[error("{path} is not a sound safetensors file (truncated, or its header lies): {reason}")]
    Header {
        /// The file.
        path: PathBuf,
        /// What its reader said.
        reason: String,
    },
    /// The folder has neither a weight file nor an index of several.
    #[error(
        "{}: there is neither {} nor {}; pickled weights (.bin, .pt, .pth) are never read: save the model as safetensors",
        folder.display(), crate::files::WEIGHTS, crate::files::INDEX
    )]
    NoWeights {
        /// The folder.
        folder: PathBuf,
    },
    /// The index of several weight files is malformed, or says what is not so.
    #[error("{path} {reason}")]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The architecture needs a tensor the file does not have.
    #[error("{path}: tensor {name} is missing")]
    Missing {
        /// The file, or the folder.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape than the architecture says.
    #[error("tensor {name} has shape {found:?}, and config.json says {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// In the file.
        found: Vec<usize>,
        /// By the architecture.
        expected: Vec<usize>,
    },
    /// A tensor is stored in numbers the trainer does not take.
    #[error("tensor {name} is stored as {dtype:?}; supported: F32, F16, BF16")]
    Dtype {
        /// The tensor.
        name: String,
        /// In the file.
        dtype: Dtype,
    },
}

impl WeightFile {
    /// Opens a file and checks its header against its length.
    ///
    /// # Errors
    /// When it cannot be opened, or is no whole safetensors file.
    #[expect(
        unsafe_code,
        reason = "mapping a file is unsafe because another process may cut it; base models are never written in place"
    )]
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let at = |cause| WeightsError::Open { path: path.to_owned(), cause };
        let file = File::open(path).map_err(at)?;
        let map = unsafe { Mmap::map(&file) }.map_err(at)?;
        let (header_length, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|e| WeightsError::Header { path: path.to_owned(), reason: e.to_string() })?;
        Ok(Self { path: path.to_owned(), map, metadata, data_start: header_length + size_of::<u64>() })
    }

    /// The names of all tensors.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// A tensor by its name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<TensorBytes<'_>> {
        let info = self.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        let bytes = self.map.get(self.data_start + start..self.data_start + end)?;
        Some(TensorBytes { dtype: info.dtype, shape: &info.shape, bytes })
    }

    /// A tensor the architecture needs, in the shape it needs and in numbers the trainer takes.
    ///
    /// # Errors
    /// When it is missing, or has another shape or other numbers.
    pub fn expect(&self, expected: &ExpectedTensor) -> Result<TensorBytes<'_>, WeightsError> {
        let name = expected.name.clone();
        let Some(tensor) = expected.spellings().iter().find_map(|name| self.get(name)) else {
            return Err(WeightsError::Missing { path: self.path.clone(), name });
        };
        if tensor.shape != expected.shape {
            return Err(WeightsError::Shape { name, found: tensor.shape.to_vec(), expected: expected.shape.clone() });
        }
        if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(WeightsError::Dtype { name, dtype: tensor.dtype });
        }
        Ok(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(bytes: &[u8]) -> Result<WeightFile, String> {
        let folder = std::env::temp_dir().join(format!("holdfast-weights-{}-{}", std::process::id(), bytes.len()));
        std::fs::write(&folder, bytes).map_err(|e| e.to_string())?;
        let opened = WeightFile::open(&folder).map_err(|e| e.to_string());
        std::fs::remove_file(&folder).map_err(|e| e.to_string())?;
        opened
    }

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    #[test]
    fn a_sound_file_gives_its_tensors() -> Result<(), String> {
        let file = open(&file(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &1.0_f32.to_le_bytes()))?;
        assert_eq!(file.get("a").map(|t| t.bytes.to_vec()), Some(1.0_f32.to_le_bytes().to_vec()));
        Ok(())
    }

    #[test]
    fn truncated_and_hostile_files_are_refused() {
        let hostile = [
            vec![],
            vec![1, 2, 3],
            u64::MAX.to_le_bytes().to_vec(),
            file("{", &[]),
            file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, &[0; 4]),
            file(r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}"#, &[0; 4]),
            file(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, &[0; 4]),
            file(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}"#, &[0; 4]),
        ];
        for bytes in hostile {
            assert!(open(&bytes).is_err(), "{bytes:?}");
        }
    }
}
