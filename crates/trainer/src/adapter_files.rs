//! Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, which PEFT, vLLM and LoRAX load.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use holdfast_base_model::WeightFile;
use holdfast_base_model::weights::TensorBytes;
use holdfast_domain::hyperparameters::Projection;
use holdfast_domain::plan::paths::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::adapter::{Adapter, AdapterConfig};
use crate::device;
use crate::model::Model;

/// The part of PEFT's configuration that says something about a plain LoRA; PEFT fills in the rest by its defaults.
#[derive(Debug, Serialize, Deserialize)]
struct PeftConfig {
    peft_type: String,
    task_type: Option<String>,
    base_model_name_or_path: Option<String>,
    r: i64,
    lora_alpha: f64,
    lora_dropout: f64,
    target_modules: Vec<String>,
    #[serde(default)]
    bias: String,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    inference_mode: bool,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    rank_pattern: serde_json::Map<String, serde_json::Value>,
    #[serde(default)]
    alpha_pattern: serde_json::Map<String, serde_json::Value>,
}

/// Writes an adapter. `base_model` is the name its configuration gives for the base.
///
/// # Errors
/// When the folder cannot be written.
pub fn write(folder: &Path, adapter: &Adapter, base_model: &str) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let config = PeftConfig {
        peft_type: "LORA".into(),
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: Some(base_model.into()),
        r: adapter.config.rank,
        lora_alpha: adapter.config.alpha,
        lora_dropout: adapter.config.dropout,
        target_modules: adapter.config.targets.iter().map(|p| p.as_str().to_owned()).collect(),
        bias: "none".into(),
        fan_in_fan_out: false,
        inference_mode: true,
        use_rslora: false,
        use_dora: false,
        modules_to_save: None,
        rank_pattern: serde_json::Map::new(),
        alpha_pattern: serde_json::Map::new(),
    };
    let path = folder.join(ADAPTER_CONFIG);
    std::fs::write(&path, serde_json::to_vec_pretty(&config)?).with_context(|| format!("cannot write {}", path.display()))?;
    let mut stored = Vec::new();
    for (name, factor) in adapter.factors() {
        let numbers = Vec::<f32>::try_from(&factor.detach().reshape(-1))?;
        let shape: Vec<usize> = factor.size().into_iter().map(usize::try_from).collect::<Result<_, _>>()?;
        stored.push((name.peft(), shape, numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()));
    }
    let views = stored
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let path = folder.join(ADAPTER_WEIGHTS);
    safetensors::serialize_to_file(views, Some(metadata), &path).with_context(|| format!("cannot write {}", path.display()))
}

/// Reads what shape the adapter in `folder` has.
///
/// # Errors
/// When the file is missing, or the adapter is no plain LoRA.
pub fn read_config(folder: &Path) -> Result<AdapterConfig> {
    let path = folder.join(ADAPTER_CONFIG);
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: PeftConfig =
        serde_json::from_slice(&bytes).with_context(|| format!("{} is no PEFT configuration", path.display()))?;
    ensure!(config.peft_type == "LORA", "{ADAPTER_CONFIG}: peft_type {:?} is not supported; supported: LORA", config.peft_type);
    ensure!(!config.use_rslora && !config.use_dora, "{ADAPTER_CONFIG}: rsLoRA and DoRA are not supported");
    ensure!(
        config.rank_pattern.is_empty() && config.alpha_pattern.is_empty(),
        "{ADAPTER_CONFIG}: ranks that differ by module are not supported"
    );
    ensure!(config.r > 0, "{ADAPTER_CONFIG}: r must be positive");
    let mut targets = config
        .target_modules
        .iter()
        .map(|name| Projection::parse(name).with_context(|| format!("{ADAPTER_CONFIG}: target module {name:?} is not supported")))
        .collect::<Result<Vec<_>>>()?;
    targets.sort_unstable();
    targets.dedup();
    Ok(AdapterConfig { rank: config.r, alpha: config.lora_alpha, dropout: config.lora_dropout, targets })
}

/// Reads an adapter for `model`.
///
/// # Errors
/// When a file is missing, the adapter is no plain LoRA, or its tensors do not fit the model.
pub fn read(folder: &Path, model: &Model) -> Result<Adapter> {
    let adapter = Adapter::zeros(model, read_config(folder)?);
    let file = WeightFile::open(&folder.join(ADAPTER_WEIGHTS))?;
    let known: Vec<String> = adapter.factors().map(|(name, _)| name.peft()).collect();
    for name in file.names() {
        ensure!(known.contains(&name), "{ADAPTER_WEIGHTS}: tensor {name} belongs to no target module of this model");
    }
    for (name, factor) in adapter.factors() {
        let name = name.peft();
        let stored = file.get(&name).with_context(|| format!("{ADAPTER_WEIGHTS}: tensor {name} is missing"))?;
        let mut factor = factor;
        factor.copy_(&to_tensor(&name, stored, &factor.size())?);
    }
    Ok(adapter)
}

fn to_tensor(name: &str, stored: TensorBytes<'_>, shape: &[i64]) -> Result<Tensor> {
    let kind = device::kind_of(stored.dtype).with_context(|| {
        format!("{ADAPTER_WEIGHTS}: tensor {name} is stored as {:?}; supported: F32, F16, BF16", stored.dtype)
    })?;
    let found: Vec<i64> = stored.shape.iter().map(|&n| n as i64).collect();
    ensure!(found == shape, "{ADAPTER_WEIGHTS}: tensor {name} has shape {found:?}, and this model needs {shape:?}");
    Ok(Tensor::from_data_size(stored.bytes, shape, kind).to_kind(Kind::Float))
}
