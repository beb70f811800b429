//! What a base model is to this service: an architecture the trainer knows, the tensors it must have, where their bytes are,
//! and the memory it takes to train. Shared by the importer, which writes a base model's folder, the trainer, which reads it, and
//! whoever must know beforehand whether a job fits.
//!
//! The folder holds `config.json` (Hugging Face's names), `model.safetensors` (one file, only the tensors the architecture
//! needs) and the text files of `holdfast-dataset`. Nothing in it can execute.

pub mod architecture;
mod config;
pub mod family;
pub mod memory;
pub mod shards;
pub mod weights;

pub use architecture::{Architecture, Unsupported};
pub use family::Family;
pub use shards::Shards;
pub use weights::{WeightFile, WeightsError};

/// The names of the files this crate reads.
pub mod files {
    /// The architecture's numbers.
    pub const CONFIG: &str = "config.json";
    /// The weights.
    pub const WEIGHTS: &str = "model.safetensors";
    /// Which of several weight files holds which tensor, in a folder as the hub ships it.
    pub const INDEX: &str = "model.safetensors.index.json";
}
