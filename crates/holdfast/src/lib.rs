//! The service's commands: wiring and nothing else. A library, so that the tests run what an operator runs.

pub mod admin;
pub mod check_store;
pub mod cli;
pub mod connect;
pub mod first_start;
pub mod health;
mod private_file;
pub mod serve;
pub mod settings;
pub mod signing;
pub mod telemetry;
pub mod verify;
