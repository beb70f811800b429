//! What stands around the requests of a tenant's rows.

use serde::{Deserialize, Serialize};

/// What rows of a file have in common around what is asked in them: a system prompt, turns before the one that asks, and words that this
/// one begins or ends with. At least one of the four is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frame {
    /// The system prompt.
    pub system: Option<String>,
    /// What was said before, the first first.
    pub earlier: Vec<Turn>,
    /// What the user's turn begins with, up to the request.
    pub opening: String,
    /// What it ends with, from the request's last word on.
    pub closing: String,
}

/// A turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Whose it is.
    pub speaker: Speaker,
    /// What is said.
    pub content: String,
}

/// Who speaks in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaker {
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Speaker {
    /// As rows have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

impl Frame {
    /// A system prompt alone.
    #[must_use]
    pub fn system(prompt: impl Into<String>) -> Self {
        Self { system: Some(prompt.into()), ..Self::default() }
    }

    /// The user's turn that asks this.
    #[must_use]
    pub fn around(&self, request: &str) -> String {
        format!("{}{request}{}", self.opening, self.closing)
    }

    /// What can be said of it to anybody.
    #[must_use]
    pub fn shape(&self) -> Shape {
        let words = |text: &str| text.split_whitespace().count();
        Shape {
            system_prompt: self.system.is_some(),
            earlier_turns: self.earlier.len(),
            opening_words: words(&self.opening),
            closing_words: words(&self.closing),
        }
    }
}

/// What a frame is made of; none of a tenant's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Whether there is a system prompt.
    pub system_prompt: bool,
    /// How many turns stand before the one that asks.
    #[serde(default)]
    pub earlier_turns: usize,
    /// How many words the user's turn begins with.
    pub opening_words: usize,
    /// How many it ends with.
    pub closing_words: usize,
}
