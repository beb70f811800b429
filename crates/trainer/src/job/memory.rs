//! Whether a job fits into memory, before its first step.

use anyhow::Result;
use holdfast_base_model::memory::{predict, smallest_change};
use holdfast_dataset::Example;
use holdfast_domain::Hyperparameters;
use holdfast_domain::plan::Plan;
use holdfast_domain::progress::Progress;

use super::failure::BadInput;
use super::inputs::Inputs;
use crate::memory;
use crate::progress::ProgressLog;

/// Says what the run will need, where there is a log for it, and refuses one that cannot fit.
pub(super) fn check(inputs: &Inputs, plan: &Plan, log: Option<&mut ProgressLog>) -> Result<()> {
    let rows = |examples: &[Example]| -> Vec<(u64, u64)> {
        examples.iter().map(|row| (row.ids.len() as u64, row.supervised_count() as u64)).collect()
    };
    let (training, alignment) = (rows(&inputs.examples), rows(&inputs.alignment));
    let needs = |h: &Hyperparameters| predict(&inputs.architecture, h, &plan.safety, &training, &alignment);
    let needed = needs(&plan.hyperparameters);
    if let Some(log) = log {
        log.write(&Progress::Memory(needed))?;
    }
    // A GPU's memory is not the machine's; there only a limit of the plan's own counts.
    let machine = if plan.device == "cpu" { memory::available_bytes() } else { None };
    let Some(limit) = [plan.memory_limit_bytes, machine].into_iter().flatten().min() else { return Ok(()) };
    if needed.total_bytes() <= limit {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let advice = match smallest_change(&plan.hyperparameters, limit, needs) {
        Some(smaller) => format!("it would fit with {} ({} MiB)", smaller.change, mib(smaller.plan.total_bytes())),
        None => "no smaller setting of this model fits; it needs a larger machine or a smaller model".into(),
    };
    Err(BadInput::Memory(format!(
        "the run needs {} MiB and {} MiB are there: weights {}, activations {}, logits {}, adapter and optimiser {}, alignment states {}, program {}; {advice}",
        mib(needed.total_bytes()),
        mib(limit),
        mib(needed.weights_bytes),
        mib(needed.activations_bytes),
        mib(needed.logits_bytes),
        mib(needed.optimizer_bytes),
        mib(needed.reference_bytes),
        mib(needed.program_bytes),
    ))
    .into())
}
