//! The service as its clients and operators meet it.

mod access;
mod bad_input;
mod chaos;
mod clients;
mod control;
mod files;
mod hostile;
mod idempotency;
mod isolation;
mod jobs;
mod lifecycle;
mod notices;
mod operations;
mod outages;
mod queue;
mod remote_objects;
mod safety;
mod start;
mod tenancy;
mod up;
mod uploads;
