//! One file a resource.

pub(crate) mod adapters;
pub(crate) mod files;
pub(crate) mod health;
pub(crate) mod jobs;
pub(crate) mod models;
