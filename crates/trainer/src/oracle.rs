//! The proof against a reference: computes every figure of a case that transformers, PEFT and torch computed before, and says
//! how far each is off.
//!
//! A case is a folder with the base model, an adapter whose `B` is not zero, `case.safetensors` (inputs and expected tensors)
//! and `case.json` (expected scalars and settings); the script beside the committed cases makes them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use holdfast_base_model::{WeightFile, files};
use holdfast_dataset::Example;
use holdfast_dataset::batch::Batch;
use holdfast_domain::Safety;
use holdfast_domain::hyperparameters::{Precision, Recompute};
use holdfast_domain::plan::paths;
use holdfast_domain::safety::{Defense, KlPositions};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::adapter::Adapter;
use crate::adapter_files;
use crate::gradient::Gradient;
use crate::methods::{self, Objective, Side, Sides};
use crate::model::{Model, read_architecture};
use crate::objective::{AlignmentRows, Engine};
use crate::optimizer::AdamW;
use crate::packed::Packed;
use crate::reference::Reference;
use crate::stop::Stop;
use crate::surgery::{Facts, Merged};

/// Logits, losses, gradients and facts of a single step.
const EXACT: f64 = 1e-4;
/// What several steps lead to.
const HISTORY: f64 = 1e-3;

/// One figure.
#[derive(Debug, Clone)]
pub struct Figure {
    /// Its name in the case.
    pub name: String,
    /// The largest difference, relative to the largest expected number, and of a sum to the largest of what is summed; of a trained factor, see
    /// `distance`.
    pub error: f64,
    /// The most it may be.
    pub bar: f64,
}

impl Figure {
    /// Whether the figure is as close as it must be.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.error <= self.bar
    }
}

/// Computes every figure of the case in `folder`. `config` replaces its `config.json`.
///
/// # Errors
/// When the folder is no case, or its model is not supported.
pub fn check(folder: &Path, config: Option<&Path>) -> Result<Vec<Figure>> {
    let case = Case::open(folder, config)?;
    let mut figures = Figures::default();
    case.forward(&mut figures)?;
    case.single_step(&mut figures)?;
    for method in ["sft", "safegrad"] {
        case.history(method, &mut figures)?;
    }
    case.round_trip(&mut figures)?;
    Ok(figures.0)
}

#[derive(Default)]
struct Figures(Vec<Figure>);

impl Figures {
    fn number(&mut self, name: impl Into<String>, got: f64, expected: &Value, bar: f64) -> Result<()> {
        let scale = expected.as_f64().map_or(1.0, f64::abs);
        self.scaled(name, got, expected, scale, bar)
    }

    fn scaled(&mut self, name: impl Into<String>, got: f64, expected: &Value, scale: f64, bar: f64) -> Result<()> {
        let name = name.into();
        let expected = expected.as_f64().with_context(|| format!("case.json has no number for {name}"))?;
        let error = (got - expected).abs() / scale.max(f64::MIN_POSITIVE);
        let error = if error.is_nan() { f64::INFINITY } else { error };
        self.0.push(Figure { name, error, bar });
        Ok(())
    }

    fn tensor(&mut self, name: impl Into<String>, got: &Tensor, expected: &Tensor, bar: f64) {
        self.scaled_tensor(name, got, expected, largest(expected), bar);
    }

    fn scaled_tensor(&mut self, name: impl Into<String>, got: &Tensor, expected: &Tensor, scale: f64, bar: f64) {
        let error = if got.size() == expected.size() {
            largest(&(got.detach() - expected)) / scale.max(f64::MIN_POSITIVE)
        } else {
            f64::INFINITY
        };
        // A NaN compares as off.
        let error = if error.is_nan() { f64::INFINITY } else { error };
        self.0.push(Figure { name: name.into(), error, bar });
    }
}

fn largest(of: &Tensor) -> f64 {
    of.abs().max().double_value(&[])
}

/// How far a trained factor is off: the length of the difference, relative to the expected factor's.
///
/// Not its largest number: Adam's first steps move a weight by the learning rate in the direction of its gradient's sign, however
/// small the gradient, so where that is rounding noise float32 does not decide the number. (Run in float64, the reference itself
/// is off by 3.6e-3 in one number of the smollm2 case.)
fn distance(got: &Tensor, expected: &Tensor) -> f64 {
    if got.size() != expected.size() {
        return f64::INFINITY;
    }
    let length = |x: &Tensor| x.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]).sqrt();
    let error = length(&(got - expected)) / length(expected).max(f64::MIN_POSITIVE);
    if error.is_nan() { f64::INFINITY } else { error }
}

struct Case {
    model: Model,
    folder: std::path::PathBuf,
    scalars: Value,
    tensors: BTreeMap<String, Tensor>,
    user: Vec<Example>,
    align: Vec<Example>,
}

impl Case {
    fn open(folder: &Path, config: Option<&Path>) -> Result<Self> {
        let config = config.map_or_else(|| folder.join(files::CONFIG), Path::to_owned);
        let model = Model::load_as(read_architecture(&config)?, folder, Kind::Float, Device::Cpu, &Stop::default())?;
        let path = folder.join("case.json");
        let scalars = serde_json::from_slice(&std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?)?;
        let file = WeightFile::open(&folder.join("case.safetensors"))?;
        let mut tensors = BTreeMap::new();
        for name in file.names() {
            let stored = file.get(&name).with_context(|| format!("{name} is missing"))?;
            let shape: Vec<i64> = stored.shape.iter().map(|&n| n as i64).collect();
            let kind = if stored.dtype == safetensors::Dtype::I64 { Kind::Int64 } else { Kind::Float };
            tensors.insert(name, Tensor::from_data_size(stored.bytes, &shape, kind));
        }
        let examples = |side: &str| -> Result<Vec<Example>> {
            let get = |part: &str| {
                tensors.get(&format!("{side}_{part}")).with_context(|| format!("case.safetensors lacks {side}_{part}"))
            };
            examples(get("ids")?, get("labels")?)
        };
        Ok(Self { user: examples("user")?, align: examples("align")?, model, folder: folder.to_owned(), scalars, tensors })
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).with_context(|| format!("case.safetensors lacks {name}"))
    }

    fn adapter(&self) -> Result<Adapter> {
        adapter_files::read(&self.folder, &self.model)
    }

    fn setting(&self, name: &str) -> Result<f64> {
        self.scalars["settings"][name].as_f64().with_context(|| format!("case.json: settings lack {name}"))
    }

    fn safety(&self, defense: Defense, kl_positions: KlPositions) -> Result<Safety> {
        Ok(Safety { kl_positions, ..Safety::new(defense, self.setting("rho")?) })
    }

    fn forward(&self, figures: &mut Figures) -> Result<()> {
        let adapter = self.adapter()?;
        let logits = |ids: &str, adapter: Option<&Adapter>| -> Result<Tensor> {
            let ids = self.tensor(ids)?;
            let shape = [ids.size(), vec![-1]].concat();
            let batch = Batch::padded(&examples(ids, &ids.full_like(-100))?).everywhere();
            let hidden = self.model.hidden(&Packed::new(&[(&batch, 0)], self.model.device), adapter);
            Ok(self.model.head.logits(&hidden).view(shape.as_slice()))
        };
        figures.tensor("base_logits", &logits("user_ids", None)?, self.tensor("base_logits")?, EXACT);
        figures.tensor("base_align_logits", &logits("align_ids", None)?, self.tensor("base_align_logits")?, EXACT);
        figures.tensor("adapted_logits", &logits("user_ids", Some(&adapter))?, self.tensor("adapted_logits")?, EXACT);
        Ok(())
    }

    fn single_step(&self, figures: &mut Figures) -> Result<()> {
        let adapter = self.adapter()?;
        let (task, mut user) = self.user_gradient(&adapter);
        figures.number("task_loss", task, &self.scalars["task_loss"], EXACT)?;
        self.gradient(figures, &adapter, "g_user", &user)?;
        for (mode, positions) in [("response", KlPositions::Response), ("paper", KlPositions::All)] {
            let (kl, align) = self.align_gradient(&adapter, positions)?;
            figures.number(format!("{mode}/kl"), kl, &self.scalars[mode]["kl"], EXACT)?;
            self.gradient(figures, &adapter, &format!("{mode}/g_align"), &align)?;
            let merged = merge(&adapter, user, Some(align), &self.safety(Defense::Safegrad, positions)?);
            user = self.user_gradient(&adapter).1;
            facts(figures, mode, merged.facts, &self.scalars[mode], EXACT)?;
            self.merged(figures, &adapter, [&format!("{mode}/g_final"), "g_user"], &merged.gradient)?;
        }
        let against = self.expected_gradient(&adapter, "forced_conflict/g_user")?;
        let align = self.align_gradient(&adapter, KlPositions::Response)?.1;
        let merged = merge(&adapter, against, Some(align), &self.safety(Defense::Safegrad, KlPositions::Response)?);
        facts(figures, "forced_conflict", merged.facts, &self.scalars["forced_conflict"], EXACT)?;
        self.merged(figures, &adapter, ["forced_conflict/g_final", "forced_conflict/g_user"], &merged.gradient)
    }

    fn history(&self, method: &str, figures: &mut Figures) -> Result<()> {
        let adapter = self.adapter()?;
        let mut optimizer = AdamW::new(&adapter, 0.0);
        let learning_rate = self.setting("learning_rate")?;
        let defense = if method == "safegrad" { Defense::Safegrad } else { Defense::None };
        let safety = self.safety(defense, KlPositions::Response)?;
        let key = format!("{method}_history");
        let steps = self.scalars[&key].as_array().with_context(|| format!("case.json lacks {key}"))?;
        for (step, expected) in steps.iter().enumerate() {
            let at = format!("{key}[{step}]");
            let (task, user) = self.user_gradient(&adapter);
            figures.number(format!("{at}/task_loss"), task, &expected["task_loss"], HISTORY)?;
            let align = if defense.needs_alignment() {
                let (kl, align) = self.align_gradient(&adapter, KlPositions::Response)?;
                figures.number(format!("{at}/kl"), kl, &expected["kl"], HISTORY)?;
                Some(align)
            } else {
                None
            };
            let merged = merge(&adapter, user, align, &safety);
            if defense.needs_alignment() {
                facts(figures, &at, merged.facts, expected, HISTORY)?;
            }
            adapter.shift(&optimizer.update(&adapter, &merged.gradient, learning_rate));
        }
        for (name, factor) in adapter.factors() {
            let name = format!("{method}_after/{}", name.peft());
            let error = distance(&factor, self.tensor(&name)?);
            figures.0.push(Figure { name, error, bar: HISTORY });
        }
        Ok(())
    }

    /// Writes the start adapter and compares the file with the one PEFT wrote: names, shapes and values must be equal.
    fn round_trip(&self, figures: &mut Figures) -> Result<()> {
        let folder = std::env::temp_dir().join(format!("holdfast-oracle-{}", std::process::id()));
        adapter_files::write(&folder, &self.adapter()?, "base")?;
        let ours = WeightFile::open(&folder.join(paths::ADAPTER_WEIGHTS))?;
        let theirs = WeightFile::open(&self.folder.join(paths::ADAPTER_WEIGHTS))?;
        std::fs::remove_dir_all(&folder)?;
        let names = |file: &WeightFile| {
            let mut names = file.names();
            names.sort();
            names
        };
        let same = names(&ours) == names(&theirs)
            && theirs.names().iter().all(|name| match (ours.get(name), theirs.get(name)) {
                (Some(x), Some(y)) => x.shape == y.shape && x.dtype == y.dtype && x.bytes == y.bytes,
                _ => false,
            });
        figures.0.push(Figure { name: "adapter_written_back".into(), error: if same { 0.0 } else { f64::INFINITY }, bar: 0.0 });
        Ok(())
    }

    fn user_gradient(&self, adapter: &Adapter) -> (f64, Gradient) {
        let task = self.engine(adapter).task(&[Batch::new(&self.user)]);
        (task.side.loss, task.side.gradient)
    }

    fn align_gradient(&self, adapter: &Adapter, positions: KlPositions) -> Result<(f64, Gradient)> {
        let reference = Reference::new(&self.model, self.align.clone(), positions, &Stop::default())?;
        let rows: Vec<usize> = (0..self.align.len()).collect();
        let rows = AlignmentRows { reference: &reference, objective: Objective::Kl, passes: &[rows] };
        let alignment = self.engine(adapter).alignment(rows);
        Ok((alignment.loss, alignment.gradient))
    }

    fn engine<'a>(&'a self, adapter: &'a Adapter) -> Engine<'a> {
        Engine { model: &self.model, adapter, dropout_key: None, recompute: Recompute::Nothing }
    }

    fn expected_gradient(&self, adapter: &Adapter, prefix: &str) -> Result<Gradient> {
        let parts = adapter
            .places()
            .map(|place| Ok(self.tensor(&format!("{prefix}/{}", place.name.peft()))?.reshape(-1)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Gradient(Tensor::cat(&parts, 0)))
    }

    /// Compares what was made of a user's gradient, of the second name: a sum with it, whose rounding is that of what is summed where the sum
    /// itself is next to nothing.
    fn merged(&self, figures: &mut Figures, adapter: &Adapter, [prefix, user]: [&str; 2], got: &Gradient) -> Result<()> {
        for place in adapter.places() {
            let [name, user] = [prefix, user].map(|prefix| format!("{prefix}/{}", place.name.peft()));
            let expected = self.tensor(&name)?;
            let scale = largest(expected).max(largest(self.tensor(&user)?));
            figures.scaled_tensor(&name, &place.of(&got.0), expected, scale, EXACT);
        }
        Ok(())
    }

    /// Compares a gradient factor by factor, so that a small factor's error does not hide behind a large one.
    fn gradient(&self, figures: &mut Figures, adapter: &Adapter, prefix: &str, got: &Gradient) -> Result<()> {
        for place in adapter.places() {
            let name = format!("{prefix}/{}", place.name.peft());
            figures.tensor(&name, &place.of(&got.0), self.tensor(&name)?, EXACT);
        }
        Ok(())
    }
}

/// What the method makes of two gradients.
fn merge(adapter: &Adapter, user: Gradient, align: Option<Gradient>, safety: &Safety) -> Merged {
    let side = |gradient| Side { loss: 0.0, tokens: 1.0, gradient };
    let align = align.map(side);
    let sides = Sides { user: Some(side(user)), align: align.as_ref(), row_dots: &[], weights: adapter.flat() };
    methods::of(safety, Precision::F32).merge(sides)
}

fn facts(figures: &mut Figures, at: &str, got: Option<Facts>, expected: &Value, bar: f64) -> Result<()> {
    let got = got.with_context(|| format!("{at}: the surgery reported nothing"))?;
    let number = |name: &str| expected[name].as_f64().unwrap_or(f64::NAN).abs();
    // Two gradients that stand nearly at right angles have a dot near zero, all cancellation: what it can be exact to is the
    // product of their norms, and the cosine to 1.
    for (name, value, scale) in [
        ("dot", got.dot, number("norm_user") * number("norm_align")),
        ("norm_user", got.norm_user, number("norm_user")),
        ("norm_align", got.norm_align, number("norm_align")),
        ("cosine", got.cosine, 1.0),
        ("coefficient", got.coefficient, number("coefficient")),
    ] {
        figures.scaled(format!("{at}/{name}"), value, &expected[name], scale, bar)?;
    }
    Ok(())
}

/// The rows of `ids` and `labels`, both `[rows, time]`, with −100 where nothing is supervised. Rows keep their padding: the
/// reference computes over the whole rectangle.
fn examples(ids: &Tensor, labels: &Tensor) -> Result<Vec<Example>> {
    let rows = |t: &Tensor| Vec::<Vec<i64>>::try_from(t).context("expected whole numbers, [rows, time]");
    rows(ids)?
        .into_iter()
        .zip(rows(labels)?)
        .map(|(ids, labels)| {
            let ids = ids.into_iter().map(u32::try_from).collect::<Result<_, _>>()?;
            Ok(Example { ids, supervised: labels.iter().map(|label| *label != -100).collect() })
        })
        .collect()
}
