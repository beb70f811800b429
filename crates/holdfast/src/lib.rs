//! The service's commands: wiring and nothing else. A library, so that the tests run what an operator runs.

pub mod admin;
pub mod cli;
pub mod connect;
pub mod first_start;
pub mod serve;
pub mod settings;
