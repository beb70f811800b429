//! The data plane: trains a LoRA adapter with libtorch while `SafeGrad` keeps the model's alignment.
//!
//! Reads a job folder and writes into it; opens no socket and knows no database. `train.rs` is the method, and reads like the
//! paper; everything else is a piece of it.
//!
//! Tensor code uses tch's panicking operations, because shapes are checked when a model is loaded and formulas full of `?`
//! cannot be read; what libtorch can still refuse at run time, memory above all, is caught once at the top (`job/mod.rs`) and
//! becomes an exit record.

pub mod adapter;
pub mod adapter_files;
pub mod allocator;
mod attention;
mod block;
pub mod checkpoint;
pub mod conflicts;
pub mod device;
pub mod divergence;
pub mod evaluate;
pub mod generate;
pub mod gradient;
pub mod head;
pub mod job;
mod kernels;
pub mod linear;
pub mod loss;
pub mod memory;
pub mod merge;
pub mod methods;
pub mod model;
pub mod objective;
pub mod optimizer;
pub mod oracle;
pub mod packed;
pub mod product;
pub mod progress;
pub mod reference;
mod reference_files;
pub mod rotary;
pub mod schedule;
pub mod stop;
pub mod surgery;
pub mod train;
mod whole_file;
