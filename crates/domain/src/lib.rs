//! The rules of the service, free of any input or output: identifiers, the life of a job, hyperparameters (requested, then
//! resolved), the safety a job trains under and the operator's policy, limits, and the contract between worker and trainer (plan, progress, exit).
//!
//! This crate never opens a file or a socket, never reads a clock and never draws a random number: what it decides depends on
//! its arguments alone, so that the API, the worker and the trainer cannot disagree.

pub mod evaluation;
pub mod exit;
pub mod frame;
pub mod gauge;
pub mod hyperparameters;
pub mod ids;
pub mod invalid;
pub mod job;
pub mod limits;
pub mod model_name;
pub mod plan;
pub mod policy;
pub mod progress;
pub mod safety;
pub mod script;
pub mod steps;

pub use frame::Frame;
pub use hyperparameters::Hyperparameters;
pub use invalid::Invalid;
pub use job::JobState;
pub use plan::Plan;
pub use safety::Safety;
