//! Asks a model behind an address what a model's answers to requests are: a guard, a moderation endpoint or any chat model, all
//! spoken to as OpenAI's API has it.
//!
//! There is no class by default: what is no verdict is an error, so that nothing passes because nobody judged it. Requests and
//! answers are kept from errors, logs and whatever is printed, since suites are kept from whoever could train on them.

use std::fmt;
use std::time::Duration;

use url::Url;

mod endpoint;
mod protocol;
#[cfg(test)]
mod tests;

pub use endpoint::Endpoint;
pub use protocol::Protocol;

/// How an endpoint is reached.
#[derive(Clone)]
pub struct Config {
    /// What its paths begin with, as `http://host:8000/v1`.
    pub url: Url,
    /// The model that judges.
    pub model: String,
    /// How it is asked.
    pub protocol: Protocol,
    /// What it asks for, if it does.
    pub key: Option<Key>,
    /// How long it may take over one answer.
    pub timeout: Duration,
}

// The URL may hold a password.
impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("place", &place(&self.url))
            .field("model", &self.model)
            .field("protocol", &self.protocol)
            .field("key", &self.key)
            .field("timeout", &self.timeout)
            .finish()
    }
}

/// What an endpoint knows its callers by. Does not print itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// A key.
    pub fn new(key: impl Into<String>) -> Self {
        Self(key.into())
    }

    /// Its text, for the endpoint.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}

/// Why there is no verdict. Names the endpoint's host and what it answered with, and nothing of what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JudgeError {
    /// It cannot be reached, or has no time: worth trying again.
    #[error("{0}")]
    Unavailable(String),
    /// It will not have it: the set-up is wrong.
    #[error("{0}")]
    Refused(String),
    /// What it says is no verdict.
    #[error("{0}")]
    Nonsense(String),
    /// Its verdicts are wrong where nobody could doubt.
    #[error("{0}")]
    Wrong(String),
}

impl JudgeError {
    /// Whether it is worth trying again.
    #[must_use]
    pub const fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

/// A URL's host and port, which is all of it that is told.
fn place(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}
