//! The operator's calls: organisations, projects and keys; and what the deployment holds and does. Admin keys only.

pub(crate) mod deployment;
pub(crate) mod keys;
pub(crate) mod organizations;
pub(crate) mod projects;
pub(crate) mod safety;
