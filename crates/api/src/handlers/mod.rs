//! One file a resource.

pub(crate) mod adapters;
pub(crate) mod admin;
pub(crate) mod checkpoints;
pub(crate) mod estimate;
pub(crate) mod events;
pub(crate) mod files;
pub(crate) mod form;
pub(crate) mod health;
pub(crate) mod jobs;
pub(crate) mod metrics;
pub(crate) mod models;
pub(crate) mod preview;
pub(crate) mod safety;
pub(crate) mod uploads;
pub(crate) mod webhooks;
