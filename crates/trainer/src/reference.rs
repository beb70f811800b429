//! The alignment reference: what the base says on the alignment rows, which the adapted model is held to.
//!
//! The rows and the base are both fixed, so the base runs over them once and keeps its final hidden states at the positions
//! that count: `hidden` numbers each, where logits would be a vocabulary.

use holdfast_dataset::Example;
use holdfast_dataset::batch::Batch;
use holdfast_domain::safety::KlPositions;
use tch::{Kind, Tensor};

use crate::model::Model;

/// Alignment rows with the base's final hidden states on them.
#[derive(Debug)]
pub struct Reference {
    examples: Vec<Example>,
    positions: KlPositions,
    /// One tensor a row, `[supervised positions, hidden]`; empty where every position counts, because padding counts too and
    /// depends on which rows stand together.
    hidden: Vec<Tensor>,
}

/// Alignment rows of one forward pass.
#[derive(Debug)]
pub struct ReferenceBatch {
    /// Token ids, `[rows, time]`.
    pub ids: Tensor,
    /// Where the KL is taken, as indices into `rows * time`, `[positions]`.
    pub positions: Tensor,
    /// The base's final hidden states there, `[positions, hidden]`.
    pub hidden: Tensor,
}

impl Reference {
    /// Runs the base over `examples`, one row at a time, so that memory does not grow with their number.
    #[must_use]
    pub fn new(model: &Model, examples: Vec<Example>, positions: KlPositions) -> Self {
        let hidden = match positions {
            KlPositions::All => Vec::new(),
            KlPositions::Response => examples.iter().map(|example| base_hidden(model, &Batch::new([example]), None)).collect(),
        };
        Self { examples, positions, hidden }
    }

    /// The number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.examples.len()
    }

    /// Supervised tokens of some rows: what the KL's sum over them is divided by, in either mode.
    #[must_use]
    pub fn supervised(&self, rows: &[usize]) -> usize {
        match self.positions {
            KlPositions::Response => rows.iter().map(|&row| self.examples[row].supervised_count()).sum(),
            // The released code counts labels, so a supervised first token counts although nothing predicts it.
            KlPositions::All => rows.iter().map(|&row| self.examples[row].supervised.iter().filter(|s| **s).count()).sum(),
        }
    }

    /// The rows of one forward pass.
    #[must_use]
    pub fn batch(&self, model: &Model, rows: &[usize]) -> ReferenceBatch {
        let batch = Batch::new(rows.iter().map(|&row| &self.examples[row]));
        let ids = ids(&batch, model);
        match self.positions {
            KlPositions::Response => ReferenceBatch {
                ids,
                positions: Tensor::from_slice(&batch.positions).to_device(model.device),
                hidden: Tensor::cat(&rows.iter().map(|&row| &self.hidden[row]).collect::<Vec<_>>(), 0),
            },
            KlPositions::All => {
                let positions = Tensor::arange((batch.rows * batch.width) as i64, (Kind::Int64, model.device));
                let hidden = base_hidden(model, &batch, Some(&positions));
                ReferenceBatch { ids, positions, hidden }
            }
        }
    }
}

/// The token ids of a batch on the model's device, `[rows, time]`.
pub fn ids(batch: &Batch, model: &Model) -> Tensor {
    Tensor::from_slice(&batch.ids).view([batch.rows as i64, batch.width as i64]).to_device(model.device)
}

/// Final hidden states at `positions`, or at the supervised ones, with the adapter off.
fn base_hidden(model: &Model, batch: &Batch, positions: Option<&Tensor>) -> Tensor {
    tch::no_grad(|| {
        let supervised = Tensor::from_slice(&batch.positions).to_device(model.device);
        at_positions(&model.hidden(&ids(batch, model), None, false), positions.unwrap_or(&supervised))
    })
}

/// `[rows, time, hidden]` to `[positions, hidden]`.
pub fn at_positions(hidden: &Tensor, positions: &Tensor) -> Tensor {
    hidden.flatten(0, 1).index_select(0, positions)
}
