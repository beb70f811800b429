//! Tells the outside what happened, as Standard Webhooks has it: takes notices from the store's outbox, signs and sends them, and
//! writes down how that ended. What is sent where stands in the store; this crate knows nothing of who asked for it.
//!
//! A receiver's address is the tenant's word. Nothing is sent to an address that is not public, unless the operator allows it:
//! names are resolved here, once, and the connection goes to what was looked at.

use std::time::Duration;

mod address;
mod sender;
mod signature;

use address::check_url;
pub use sender::{Sender, run};
pub use signature::sign;

/// How notices are sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Whether addresses of private networks and plain http are allowed.
    pub allow_private: bool,
}

/// How long a receiver may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
