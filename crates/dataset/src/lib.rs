//! Bytes to checked rows, rows to token ids with a loss mask, examples to batches.
//!
//! Used by the API (the shape of a file while it streams in), by the worker (the file against a model's template and
//! tokenizer) and by the trainer (the same code again, so that what was accepted is what is trained on). Everything here is
//! pure: bytes come in as slices, and no message ever quotes a row.

pub mod alignment_set;
pub mod batch;
pub mod check;
pub mod encode;
pub mod files;
pub mod frames;
#[cfg(test)]
mod hostile;
mod identity;
pub mod lines;
pub mod order;
pub mod preview;
pub mod row;
mod row_diagnosis;
mod row_reading;
pub mod structure;
pub mod template;
#[cfg(test)]
mod tiny;
pub mod tokenizer;

pub use check::Report;
pub use encode::Example;
pub use preview::Preview;
pub use row::Row;
pub use template::ChatTemplate;
pub use tokenizer::ChatTokenizer;
