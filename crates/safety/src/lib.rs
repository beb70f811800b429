//! Evidence: what a model answers to requests that it should refuse and to such as only look like them, judged and counted. No
//! libtorch, no database, no network.

pub mod bootstrap;
pub mod hash;
pub mod judge;
pub mod manifest;
pub mod report;
pub mod share;
pub mod suite;
