//! The methods, and what can be chosen of each.

use serde::{Deserialize, Serialize};

/// How training is kept from working against the base model's alignment. The trainer's `methods` have each one's formula.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Defense {
    /// Plain fine-tuning.
    None,
    /// The alignment rows are mixed into training (`SafeInstr`, arXiv 2309.07875); their tokens weigh `ρ`.
    SafeMix,
    /// Training alternates between alignment rows and the tenant's (Lisa, arXiv 2405.18641), held together by `ρ`.
    Lisa,
    /// The KL to the base as a penalty of weight `ρ`, without projection.
    KlPenalty,
    /// The final hidden state at the end of each alignment prompt is held to the base's (arXiv 2605.05995).
    Sbr,
    /// Both gradients are projected where they conflict (arXiv 2001.06782).
    Pcgrad,
    /// `SafeGrad` (arXiv 2508.07172): the part of the task's gradient that works against the alignment is projected away.
    Safegrad,
    /// `SafeGrad` with feedback: `ρ` follows a budget of KL, and no checkpoint leaves it.
    Held,
}

impl Defense {
    /// Every method.
    pub const ALL: [Self; 8] =
        [Self::None, Self::SafeMix, Self::Lisa, Self::KlPenalty, Self::Sbr, Self::Pcgrad, Self::Safegrad, Self::Held];

    /// The word the wire and the plan use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::SafeMix => "safe_mix",
            Self::Lisa => "lisa",
            Self::KlPenalty => "kl_penalty",
            Self::Sbr => "sbr",
            Self::Pcgrad => "pcgrad",
            Self::Safegrad => "safegrad",
            Self::Held => "held",
        }
    }

    /// Reads [`Self::as_str`] back.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|defense| defense.as_str() == word)
    }

    /// Whether it needs an alignment set.
    #[must_use]
    pub const fn needs_alignment(self) -> bool {
        !matches!(self, Self::None)
    }

    /// Whether it computes an alignment gradient in every step, which rows can be compared with.
    #[must_use]
    pub const fn compares_gradients(self) -> bool {
        matches!(self, Self::KlPenalty | Self::Pcgrad | Self::Safegrad | Self::Held)
    }

    /// Whether it takes away what conflicts, and so knows how often the gradients do.
    #[must_use]
    pub const fn projects(self) -> bool {
        matches!(self, Self::Pcgrad | Self::Safegrad | Self::Held)
    }

    /// Whether it holds a KL over positions that can be chosen.
    #[must_use]
    pub const fn chooses_positions(self) -> bool {
        matches!(self, Self::KlPenalty | Self::Pcgrad | Self::Safegrad)
    }

    /// The positions its KL covers where nobody says which.
    #[must_use]
    pub const fn usual_positions(self) -> KlPositions {
        match self {
            Self::Safegrad => KlPositions::Deciding,
            _ => KlPositions::Response,
        }
    }

    /// Whether it is known to hold at least what `floor` holds. Methods that differ in kind hold different things, so most pairs
    /// are not comparable, and then the answer is no.
    #[must_use]
    pub const fn holds_at_least(self, floor: Self) -> bool {
        matches!(
            (floor, self),
            (Self::None, _)
                | (Self::SafeMix, Self::SafeMix)
                | (Self::Lisa, Self::Lisa)
                | (Self::KlPenalty, Self::KlPenalty | Self::Safegrad | Self::Held)
                | (Self::Sbr, Self::Sbr)
                | (Self::Pcgrad, Self::Pcgrad | Self::Safegrad | Self::Held)
                | (Self::Safegrad, Self::Safegrad | Self::Held)
                | (Self::Held, Self::Held)
        )
    }
}

/// Over which positions the KL is summed, and so how strong `ρ` is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlPositions {
    /// Supervised positions, divided by their number.
    #[default]
    Response,
    /// Every position of the padded rectangle, divided by the number of supervised tokens: the released code's strength.
    All,
    /// Supervised positions, those that decide a response (its first five tokens, what stands before them, and its end) five times as
    /// much, and of the rows the worse half: what [`Defense::Held`] always looks at.
    Deciding,
}

impl KlPositions {
    /// The word the wire and the plan use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Response => "response",
            Self::All => "all",
            Self::Deciding => "deciding",
        }
    }
}

/// Whose gradient is projected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProjectionOf {
    /// The step's: one test of conflict.
    #[default]
    Batch,
    /// Each row's by itself, so that harmless rows of a poisoned batch keep all of theirs.
    PerRow,
}

/// Where the projection takes place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProjectionSpace {
    /// In the gradient, before the optimiser: the paper's.
    #[default]
    Gradient,
    /// In the update the optimiser makes: what raises the alignment loss to first order is removed from it.
    Update,
}

/// At which weights the alignment gradient is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlignmentPoint {
    /// At the weights as they are.
    #[default]
    Current,
    /// Where the task's gradient alone would take them.
    Lookahead,
}
