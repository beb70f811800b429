//! Whether a job fits into memory, before its first step.

use anyhow::Result;
use holdfast_dataset::Example;
use holdfast_domain::Hyperparameters;
use holdfast_domain::plan::Plan;
use holdfast_domain::progress::Progress;
use holdfast_domain::safety::{Defense, KlPositions, ProjectionOf};

use super::failure::BadInput;
use super::inputs::Inputs;
use crate::memory::{self, LargestPass};
use crate::progress::ProgressLog;
use crate::{model, objective};

/// Says what the run will need, and refuses one that cannot fit.
pub(super) fn check(inputs: &Inputs, plan: &Plan, log: &mut ProgressLog) -> Result<()> {
    let parameters = |h: &Hyperparameters| -> u64 {
        let sizes = h.target_modules.iter().map(|&projection| {
            let (input, output) = model::projection_size(&inputs.architecture, projection);
            (input + output).cast_unsigned() * u64::from(h.lora_rank)
        });
        sizes.sum::<u64>() * inputs.architecture.layers.len() as u64
    };
    let needs = |h: &Hyperparameters| {
        let pass = largest_pass(inputs, h, plan.safety.kl_positions == KlPositions::All);
        let positions = inputs.alignment.iter().map(|row| row.supervised_count() as u64).sum();
        // A step that asks for each row's gradient has those of a whole pass at once; a method may remember vectors of its own.
        let by_row = h.row_conflicts || plan.safety.projection == ProjectionOf::PerRow;
        let vectors = u64::from(by_row) * u64::from(h.batch_size)
            + u64::from(h.row_conflicts)
            + match plan.safety.defense {
                Defense::Held => 4,
                Defense::Lisa => 1,
                _ => 0,
            };
        memory::plan(&inputs.architecture, h, parameters(h), vectors, pass, positions)
    };
    let needed = needs(&plan.hyperparameters);
    log.write(&Progress::Memory(needed))?;
    // A GPU's memory is not the machine's; there only a limit of the plan's own counts.
    let machine = if plan.device == "cpu" { memory::available_bytes() } else { None };
    let Some(limit) = [plan.memory_limit_bytes, machine].into_iter().flatten().min() else { return Ok(()) };
    if needed.total_bytes() <= limit {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let advice = match memory::smallest_change(&plan.hyperparameters, limit, needs) {
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

/// The largest pass that the order of rows could make: the longest rows together.
fn largest_pass(inputs: &Inputs, h: &Hyperparameters, all_positions: bool) -> LargestPass {
    /// The longest rows of a batch: how many, their tokens and positions, and the longest.
    fn largest(rows: &[Example], batch_size: usize) -> [u64; 4] {
        let mut rows: Vec<(u64, u64)> = rows.iter().map(|row| (row.ids.len() as u64, row.supervised_count() as u64)).collect();
        rows.sort_unstable_by(|x, y| y.cmp(x));
        rows.truncate(batch_size);
        let sum = |of: fn(&(u64, u64)) -> u64| rows.iter().map(of).sum();
        [rows.len() as u64, sum(|row| row.0), sum(|row| row.1), rows.first().map_or(0, |row| row.0)]
    }
    let batch_size = h.batch_size as usize;
    let (user, align) = (largest(&inputs.examples, batch_size), largest(&inputs.alignment, batch_size));
    let shared = user[1] + align[1] <= objective::SHARED_PASS_TOKENS;
    let both = |of: usize| if shared { user[of] + align[of] } else { user[of].max(align[of]) };
    LargestPass {
        tokens: both(1),
        // Attention pads every row to the longest of its pass.
        rectangle: both(0) * user[3].max(align[3]),
        positions: if all_positions { both(1) } else { both(2) },
        two_logits: !inputs.alignment.is_empty(),
    }
}
