//! The lines a trainer appends to `out/progress.jsonl`.

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Progress {
    /// The run begins to do something else.
    Phase {
        /// What it does now.
        phase: Phase,
    },
    /// The run is about to take its first step.
    Started {
        /// Steps it will take.
        total_steps: u64,
        /// Rows of the training file.
        rows: u64,
        /// Rows of the alignment set.
        alignment_rows: u64,
        /// Numbers that are trained.
        trainable_parameters: u64,
    },
    /// What the run will need, known before its first step.
    Memory(MemoryPlan),
    /// Something its owner should know.
    Note {
        /// Steps taken before it.
        step: u64,
        /// In words; never quotes a row.
        message: String,
    },
    /// One optimiser step.
    Step(Box<Step>),
    /// The checkpoint after a step stands in its place, whole and durable. One that is left while the loss is on its way up is not
    /// named: it is no place to go back to. A step is named again where the run came to it again, and its checkpoint is another
    /// one then.
    Checkpoint {
        /// Steps taken before it.
        step: u64,
        /// Whose best adapter it needs beside it to go on from, where a validation file was measured.
        best: Option<u64>,
        /// Whether everything that follows a step was done before it was left, a review among it: one that is left because the run
        /// is stopped is there to go on from, and its adapter is not one to serve.
        settled: bool,
    },
    /// A measurement over the whole validation file.
    Validation {
        /// Steps taken before it; 0 is what the run begins with.
        step: u64,
        /// Mean negative log-likelihood of the supervised tokens, in nats.
        loss: f64,
        /// The share of supervised tokens that the model ranks first.
        token_accuracy: f64,
    },
}

/// Memory a run needs, by what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// The frozen base.
    pub weights_bytes: u64,
    /// The adapter, its gradients and the optimiser.
    pub optimizer_bytes: u64,
    /// What the forward pass keeps, and the way back makes.
    pub activations_bytes: u64,
    /// The chunk of logits that exists at one time.
    pub logits_bytes: u64,
    /// The base's states on the alignment rows.
    pub reference_bytes: u64,
    /// The program and its libraries.
    pub program_bytes: u64,
}

impl MemoryPlan {
    /// All of it.
    #[must_use]
    pub const fn total_bytes(&self) -> u64 {
        self.weights_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
            + self.reference_bytes
            + self.program_bytes
    }
}

/// What a trainer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reads the base model.
    LoadingModel,
    /// Runs the base over the alignment rows.
    AlignmentReference,
    /// Takes optimiser steps.
    Training,
    /// Writes the adapter.
    Exporting,
    /// Asks the base, and later the adapter, what they should and should not answer.
    Evaluating,
}

impl Phase {
    /// The word the wire uses.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LoadingModel => "loading_model",
            Self::AlignmentReference => "alignment_reference",
            Self::Training => "training",
            Self::Exporting => "exporting",
            Self::Evaluating => "evaluating",
        }
    }
}

/// One optimiser step: `u` is the task's gradient, `a` the alignment gradient, `g` what the method made of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// From 1.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Mean negative log-likelihood of the supervised tokens, in nats, before the step.
    pub task_loss: f64,
    /// The share of supervised tokens that the model ranked first.
    pub token_accuracy: f64,
    /// The surgery's facts; absent under plain fine-tuning.
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub alignment: Option<AlignmentFacts>,
    /// ‖u‖.
    pub norm_user: f64,
    /// ‖g‖ before clipping.
    pub gradient_norm: f64,
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// Tokens of the training file read so far, padding not counted.
    pub tokens: u64,
    /// Tokens of the training file per second since the last line.
    pub tokens_per_second: f64,
    /// Seconds the rest of the run will take at the mean pace so far.
    pub eta_seconds: f64,
    /// What a method that reviews its steps found after this one. Where a stop came between the two, the step is told of again once it is
    /// reviewed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reviews: Vec<Review>,
}

/// A look at the alignment loss on rows that no gradient is taken on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Review {
    /// Steps taken before it.
    pub step: u64,
    /// That loss after the step, in nats; absent where it was no number.
    pub probe_loss: Option<f64>,
    /// Whether it was more than the method keeps, so that the steps since the review before were taken back.
    pub taken_back: bool,
}

/// How the two gradients of a step stood to each other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AlignmentFacts {
    /// Mean KL(base ‖ adapted) in nats, before the step; under a method with another alignment loss, that loss.
    pub align_kl: f64,
    /// ⟨u, a⟩.
    pub dot: f64,
    /// ⟨u, a⟩ / (‖u‖ ‖a‖); 0 where `a` is.
    pub cosine: f64,
    /// ‖a‖.
    pub norm_align: f64,
    /// What `a` is multiplied by: SafeGrad's `c`, and under `held` λ.
    pub coefficient: f64,
    /// Whether the user gradient worked against the alignment, and so was projected.
    pub conflict: bool,
    /// The share of the run's steps so far, this one among them, in which they conflicted.
    pub conflict_rate: f64,
    /// The length of what the projection took away, as a share of the length of what it was taken from: of `u`, or of the optimiser's
    /// update where that is projected. Under SafeGrad |⟨u, a⟩| / (‖u‖ ‖a‖) where they conflict, else 0.
    pub removed_fraction: f64,
    /// ⟨a, Δθ⟩: how the step that was applied changes the alignment loss to first order.
    pub alignment_change: f64,
}
