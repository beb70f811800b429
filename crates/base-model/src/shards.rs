//! The weights of a model's folder: one safetensors file, or several with an index.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::architecture::ExpectedTensor;
use crate::weights::TensorBytes;
use crate::{WeightFile, WeightsError, files};

/// The files that hold a model's tensors, and which tensor is in which.
#[derive(Debug)]
pub struct Shards {
    folder: PathBuf,
    files: Vec<WeightFile>,
    /// Tensor name to the file that holds it.
    place: BTreeMap<String, usize>,
}

impl Shards {
    /// Opens those of `folder`: the one file there is, or what its index names.
    ///
    /// # Errors
    /// When there are none, one is no whole safetensors file, or the index is malformed or names a file elsewhere.
    pub fn open(folder: &Path) -> Result<Self, WeightsError> {
        let mut shards = Self { folder: folder.to_owned(), files: Vec::new(), place: BTreeMap::new() };
        let (single, path) = (folder.join(files::WEIGHTS), folder.join(files::INDEX));
        // As transformers looks for them: an index counts only where there is no whole file.
        if single.exists() {
            let file = WeightFile::open(&single)?;
            shards.place = file.names().into_iter().map(|name| (name, 0)).collect();
            shards.files.push(file);
            return Ok(shards);
        }
        match std::fs::read(&path) {
            Ok(index) => shards.open_indexed(&path, &index)?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(WeightsError::NoWeights { folder: folder.to_owned() });
            }
            Err(cause) => return Err(WeightsError::Open { path, cause }),
        }
        Ok(shards)
    }

    fn open_indexed(&mut self, path: &Path, index: &[u8]) -> Result<(), WeightsError> {
        let lies = |reason: String| WeightsError::Index { path: path.to_owned(), reason };
        let index: Value = serde_json::from_slice(index).map_err(|e| lies(format!("is not valid JSON: {e}")))?;
        let map = index["weight_map"].as_object().ok_or_else(|| lies("has no weight_map".into()))?;
        let mut opened = BTreeMap::new();
        for (tensor, file) in map {
            let name = file.as_str().filter(|name| is_plain(name));
            let name = name.ok_or_else(|| lies(format!("names no file of this folder for tensor {tensor}")))?;
            let at = match opened.get(name) {
                Some(&at) => at,
                None => {
                    self.files.push(WeightFile::open(&self.folder.join(name))?);
                    opened.insert(name, self.files.len() - 1);
                    self.files.len() - 1
                }
            };
            if self.files.get(at).is_none_or(|file| file.get(tensor).is_none()) {
                return Err(lies(format!("places tensor {tensor} in {name}, which does not hold it")));
            }
            self.place.insert(tensor.clone(), at);
        }
        Ok(())
    }

    /// A tensor the architecture needs, in the shape it needs and in numbers the trainer takes.
    ///
    /// # Errors
    /// When it is missing, or has another shape or other numbers.
    pub fn expect(&self, tensor: &ExpectedTensor) -> Result<TensorBytes<'_>, WeightsError> {
        let place = tensor.spellings().iter().find_map(|name| self.place.get(name).copied());
        let missing = || WeightsError::Missing { path: self.folder.clone(), name: tensor.name.clone() };
        place.and_then(|at| self.files.get(at)).ok_or_else(missing)?.expect(tensor)
    }
}

/// Whether a name from an index stays inside its folder.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}
