//! The adapter that a run begins with.

use std::path::Path;

use anyhow::{Result, ensure};
use holdfast_domain::hyperparameters::Projection;
use holdfast_domain::plan::{Plan, paths};

use super::failure::bad_setup;
use crate::adapter::{Adapter, AdapterConfig};
use crate::adapter_files;
use crate::model::Model;

/// The adapter of the job folder's `start` where the plan names one, else a fresh one.
///
/// # Errors
/// When it cannot be read, does not fit the model, or has another shape than the plan says.
pub(super) fn adapter(folder: &Path, plan: &Plan, model: &Model) -> Result<Adapter> {
    let config = AdapterConfig::from(&plan.hyperparameters);
    if plan.start.is_none() {
        return Ok(Adapter::init(model, config, plan.seed));
    }
    read(&folder.join(paths::START), config, model).map_err(|e| bad_setup(format!("{}: {e:#}", paths::START)))
}

fn read(folder: &Path, config: AdapterConfig, model: &Model) -> Result<Adapter> {
    let differences = differences(&adapter_files::read_config(folder)?, &config);
    ensure!(differences.is_empty(), "the adapter to go on from does not fit the hyperparameters: {}", differences.join(", "));
    let mut adapter = adapter_files::read(folder, model)?;
    let is_finite = adapter.flat().isfinite().all().int64_value(&[]) == 1;
    ensure!(is_finite, "{} holds NaN or infinite numbers", paths::ADAPTER_WEIGHTS);
    // Dropout is no part of an adapter's shape, so this run's counts.
    adapter.config = config;
    Ok(adapter)
}

/// What differs between the shape of an adapter and the one that is wanted, in the words of the hyperparameters.
fn differences(found: &AdapterConfig, wanted: &AdapterConfig) -> Vec<String> {
    let names = |targets: &[Projection]| targets.iter().map(|target| target.as_str()).collect::<Vec<_>>().join(", ");
    let mut differences = Vec::new();
    let mut compare = |name: &str, is_same: bool, found: String, wanted: String| {
        if !is_same {
            differences.push(format!("its {name} is {found} and not {wanted}"));
        }
    };
    compare("lora_rank", found.rank == wanted.rank, found.rank.to_string(), wanted.rank.to_string());
    // A number that went through a text may have changed in its last digit.
    let is_same_alpha = (found.alpha - wanted.alpha).abs() <= 1e-9 * wanted.alpha;
    compare("lora_alpha", is_same_alpha, found.alpha.to_string(), wanted.alpha.to_string());
    let all_in = |some: &[Projection], others: &[Projection]| some.iter().all(|target| others.contains(target));
    let is_same_targets = all_in(&found.targets, &wanted.targets) && all_in(&wanted.targets, &found.targets);
    compare("target_modules", is_same_targets, format!("[{}]", names(&found.targets)), format!("[{}]", names(&wanted.targets)));
    differences
}
