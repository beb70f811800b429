//! Bytes to checked rows, rows to token ids with a loss mask, examples to batches.
//!
//! Used by the API (the shape of a file while it streams in), by the worker (the file against a model's template and
//! tokenizer) and by the trainer (the same code again, so that what was accepted is what is trained on). Everything here is
//! pure: bytes come in as slices, and no message ever quotes a row.

pub mod batch;
pub mod check;
pub mod encode;
pub mod lines;
pub mod order;
pub mod row;
mod row_diagnosis;
pub mod structure;
pub mod template;
pub mod tokenizer;

pub use check::Report;
pub use encode::Example;
pub use row::Row;
pub use template::ChatTemplate;
pub use tokenizer::ChatTokenizer;
