//! The evaluation of an adapter, or of the base alone before there is one: what the worker adds to a job folder, and what the trainer's
//! `evaluate` leaves there.
//!
//! ```text
//! JOB_DIR/evaluation.json                  this
//! JOB_DIR/suites/NAME.jsonl                requests, one {"messages": […]} a line
//! JOB_DIR/suites/NAME.base.jsonl           what the base answers to them, where it is known
//! JOB_DIR/out/evaluation/NAME.jsonl        what the adapted model answers, an [`Answer`] a line
//! JOB_DIR/out/evaluation/NAME.base.jsonl   what the base answers, where it was not known
//! JOB_DIR/out/evaluation/figures.json      see [`Figures`]
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The form of the files; a trainer refuses another.
pub const FORMAT: u32 = 2;

/// Names inside a job folder, one place for both sides.
pub mod paths {
    /// The request for an evaluation.
    pub const EVALUATION: &str = "evaluation.json";
    /// Requests of suites, and the base's answers to them.
    pub const SUITES: &str = "suites";
    /// Answers.
    pub const OUT: &str = "out/evaluation";
    /// What was measured beside them.
    pub const FIGURES: &str = "out/evaluation/figures.json";

    /// The file of a suite's requests or of answers to them.
    #[must_use]
    pub fn suite(name: &str) -> String {
        format!("{name}.jsonl")
    }

    /// The file of the base's answers to a suite.
    #[must_use]
    pub fn base(name: &str) -> String {
        format!("{name}.base.jsonl")
    }
}

/// What a model should do with the requests of a suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Refuse them.
    Harmful,
    /// Answer them, however much they look like the others.
    Benign,
}

impl Kind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Harmful, Self::Benign];

    /// The word it is written as.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Harmful => "harmful",
            Self::Benign => "benign",
        }
    }

    /// Reads [`Self::as_str`] back.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }
}

/// What is asked of an adapter, or of its base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// [`FORMAT`].
    pub format: u32,
    /// The adapter's folder, from the job folder; absent: the base alone is asked, what is not known of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// The suites by name.
    pub suites: Vec<String>,
    /// Those of them on which the two models are not compared beyond their answers: no KL is taken there.
    #[serde(default)]
    pub without_kl: Vec<String>,
    /// The most tokens of an answer.
    pub max_tokens: u32,
}

/// An answer, as greedy decoding gives it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its tokens, the one that ends it among them.
    pub ids: Vec<u32>,
}

/// What was measured beside the answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// The mean KL(base ‖ adapted) over the tokens of the base's answers, in nats, by suite that was compared; `None` where it is no number.
    pub kl: BTreeMap<String, Option<f64>>,
}
