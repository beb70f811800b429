//! The service as its clients and operators meet it.

mod access;
mod bad_input;
mod clients;
mod files;
mod jobs;
mod queue;
mod up;
