//! The REST API: OpenAI's fine-tuning contract, with our extensions.
//!
//! `routes.rs` is the table of contents. A handler checks what came in, calls the store once or twice, and turns a row into
//! the wire's shape; the shapes (`wire/`) are known nowhere else. No SQL, no libtorch, no training rows in logs.

use std::sync::Arc;

use holdfast_domain::safety::Floor;
use holdfast_store::Store;

mod auth;
mod error;
mod extract;
mod handlers;
mod routes;
mod wire;

pub use error::ApiError;
pub use routes::{openapi, router};

/// What every handler can reach.
#[derive(Debug, Clone)]
pub struct AppState {
    /// Rows and objects.
    pub store: Store,
    /// What the operator decided.
    pub settings: Arc<Settings>,
}

/// What the operator decided.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The least safety a job trains under.
    pub safety_floor: Floor,
    /// The largest file.
    pub max_upload_bytes: u64,
}
