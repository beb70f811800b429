//! Loss and token accuracy over a file.

use holdfast_dataset::Example;
use holdfast_dataset::batch::Batch;
use tch::Tensor;

use crate::adapter::Adapter;
use crate::loss;
use crate::model::Model;
use crate::reference;

/// What a model makes of some rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean negative log-likelihood of the supervised tokens, in nats.
    pub loss: f64,
    /// The share of them the model ranks first.
    pub token_accuracy: f64,
}

/// Evaluates `examples`, `rows_per_pass` at a time, without dropout.
#[must_use]
pub fn evaluate(model: &Model, adapter: Option<&Adapter>, examples: &[Example], rows_per_pass: usize) -> Evaluation {
    tch::no_grad(|| {
        let (mut sum, mut correct, mut supervised) = (0.0, 0, 0);
        for rows in examples.chunks(rows_per_pass.max(1)) {
            let batch = Batch::new(rows);
            let positions = Tensor::from_slice(&batch.positions).to_device(model.device);
            let targets = Tensor::from_slice(&batch.targets).to_device(model.device);
            let hidden = model.hidden(&reference::ids(&batch, model), adapter, false);
            let loss = loss::task(&reference::at_positions(&hidden, &positions), &model.head, &targets, 1.0);
            sum += loss.sum;
            correct += loss.correct;
            supervised += batch.targets.len();
        }
        Evaluation { loss: sum / supervised as f64, token_accuracy: correct as f64 / supervised as f64 }
    })
}
