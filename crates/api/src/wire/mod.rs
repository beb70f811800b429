//! The shapes of the wire, as the public contract has them; our extensions are optional fields.

pub(crate) mod admin;
pub(crate) mod checkpoint;
pub(crate) mod estimate;
pub(crate) mod event;
pub(crate) mod evidence;
pub(crate) mod file;
pub(crate) mod job;
pub(crate) mod job_request;
pub(crate) mod list;
pub(crate) mod model;
pub(crate) mod policy;
pub(crate) mod preview;
pub(crate) mod suite;
pub(crate) mod upload;
pub(crate) mod webhook;
pub(crate) mod words;
