//! Loss and token accuracy over a file.

use holdfast_dataset::Example;
use holdfast_dataset::batch::Batch;
use tch::Tensor;

use crate::adapter::Adapter;
use crate::gradient::numbers;
use crate::loss::{self, Loss};
use crate::model::Model;
use crate::packed::Packed;
use crate::stop::{Stop, Stopped};

/// What a model makes of some rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean negative log-likelihood of the supervised tokens, in nats.
    pub loss: f64,
    /// The share of them the model ranks first.
    pub token_accuracy: f64,
}

/// Each row's mean negative log-likelihood, in nats, without dropout.
///
/// # Errors
/// [`Stopped`], between two passes.
pub fn row_losses(
    model: &Model,
    adapter: Option<&Adapter>,
    examples: &[Example],
    rows_per_pass: usize,
    stop: &Stop,
) -> Result<Vec<f64>, Stopped> {
    let mut losses = Vec::with_capacity(examples.len());
    for (rows, loss) in passes(model, adapter, examples, rows_per_pass) {
        stop.check()?;
        let at = numbers::<f32>(&loss.at);
        let mut rest = at.as_slice();
        for row in rows {
            let (of_row, others) = rest.split_at(row.supervised_count().min(rest.len()));
            rest = others;
            losses.push(of_row.iter().map(|loss| f64::from(*loss)).sum::<f64>() / of_row.len().max(1) as f64);
        }
    }
    Ok(losses)
}

/// Evaluates `examples`, `rows_per_pass` at a time, without dropout.
///
/// # Errors
/// [`Stopped`], between two passes.
pub fn evaluate(
    model: &Model,
    adapter: Option<&Adapter>,
    examples: &[Example],
    rows_per_pass: usize,
    stop: &Stop,
) -> Result<Evaluation, Stopped> {
    let (mut sum, mut correct, mut supervised) = (0.0, 0, 0);
    for (rows, loss) in passes(model, adapter, examples, rows_per_pass) {
        stop.check()?;
        sum += loss.sum();
        correct += loss.correct;
        supervised += rows.iter().map(Example::supervised_count).sum::<usize>();
    }
    Ok(Evaluation { loss: sum / supervised as f64, token_accuracy: correct as f64 / supervised as f64 })
}

/// The rows of each forward pass over `examples`, with their task loss.
fn passes<'a>(
    model: &'a Model,
    adapter: Option<&'a Adapter>,
    examples: &'a [Example],
    rows_per_pass: usize,
) -> impl Iterator<Item = (&'a [Example], Loss)> {
    examples.chunks(rows_per_pass.max(1)).map(move |rows| {
        let batch = Batch::new(rows);
        let targets = Tensor::from_slice(&batch.targets).to_device(model.device);
        let hidden = model.hidden(&Packed::new(&[(&batch, 0)], model.device), adapter);
        (rows, loss::task(&hidden, &model.head, &targets))
    })
}
