//! Training as the worker runs it: job folders in, adapters out.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use holdfast_domain::hyperparameters::Precision;
use holdfast_domain::plan::paths;
use holdfast_domain::safety::DEFAULT_BUDGET;
use serde_json::{Value, json};

use crate::progress::Progress;
use crate::shell;
use crate::trainer::{conversation, program, watch};

/// What a run is trained with, beside its rows.
#[derive(Debug, Clone)]
pub(super) struct Training {
    pub(super) epochs: u32,
    pub(super) learning_rate: f64,
    pub(super) warmup: f64,
    pub(super) rank: u32,
    pub(super) seed: u64,
    pub(super) precision: Precision,
    pub(super) safety: Value,
    pub(super) row_conflicts: bool,
}

/// What a run of the trainer said, and the memory it took.
#[derive(Debug)]
pub(super) struct Trained {
    pub(super) peak_bytes: u64,
    /// The lines of its steps.
    pub(super) steps: Vec<Value>,
}

/// A chat row of one request and one answer.
pub(super) fn row(request: &str, answer: &str) -> String {
    row_behind(&[], request, answer)
}

/// The same behind these messages, whose roles are given first.
pub(super) fn row_behind(before: &[(&str, &str)], request: &str, answer: &str) -> String {
    conversation(before, &[("user", request), ("assistant", answer)]).to_string()
}

/// Trains in a fresh `folder`.
pub(super) fn train(folder: &Path, base: &Path, rows: &[String], alignment: &[String], training: &Training) -> Result<Trained> {
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(folder)?;
    std::os::unix::fs::symlink(base.canonicalize()?, folder.join("base"))?;
    let write = |name: &str, rows: &[String]| std::fs::write(folder.join(name), rows.join("\n") + "\n");
    write("train.jsonl", rows)?;
    if !alignment.is_empty() {
        write("alignment.jsonl", alignment)?;
    }
    let plan = json!({
        "format": holdfast_domain::plan::FORMAT, "base_model": "bench", "validation": false, "seed": training.seed, "checkpoint_steps": 1_000_000, "device": "cpu",
        "hyperparameters": {
            "n_epochs": training.epochs, "batch_size": 10, "gradient_accumulation_steps": 1,
            "learning_rate": training.learning_rate, "lr_schedule": "constant", "warmup_ratio": training.warmup, "weight_decay": 0.0,
            "max_grad_norm": 1.0, "max_length": 512, "long_rows": "truncate", "precision": training.precision,
            "lora_rank": training.rank, "lora_alpha": f64::from(2 * training.rank), "lora_dropout": 0.0,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "row_conflicts": training.row_conflicts
        },
        "safety": training.safety
    });
    std::fs::write(folder.join("plan.json"), plan.to_string())?;
    let log = File::create(folder.join("trainer.log"))?;
    let trainer = Command::new(program()).arg("train").arg(folder).stdout(log.try_clone()?).stderr(log).spawn()?;
    let mut shown = Following::new(folder)?;
    let (status, peak_bytes) = watch(trainer, || shown.look())?;
    let said = || std::fs::read_to_string(folder.join("trainer.log")).unwrap_or_default();
    ensure!(status.success(), "the trainer ended with {status} in {}: {}", folder.display(), said());
    Ok(Trained { peak_bytes, steps: steps(folder)? })
}

/// Shows how far a run is, by the lines it writes.
struct Following {
    path: PathBuf,
    /// How much of it was read.
    read: u64,
    shown: Progress,
}

impl Following {
    fn new(folder: &Path) -> Result<Self> {
        let shown = Progress::new()?;
        shown.doing("loading the model");
        Ok(Self { path: folder.join(paths::PROGRESS), read: 0, shown })
    }

    /// Reads what was written since, but for a line that is not ended yet.
    fn look(&mut self) -> Result<()> {
        let Ok(mut file) = File::open(&self.path) else { return Ok(()) };
        file.seek(SeekFrom::Start(self.read))?;
        let mut new = String::new();
        file.read_to_string(&mut new)?;
        let new = new.get(..new.rfind('\n').map_or(0, |at| at + 1)).unwrap_or_default();
        self.read += new.len() as u64;
        let last =
            new.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find(|line| line["type"] == "step");
        let Some(line) = last else { return Ok(()) };
        let (Some(step), Some(total)) = (line["step"].as_u64(), line["total_steps"].as_u64()) else { return Ok(()) };
        let mut message = String::new();
        for (name, value) in [("loss", &line["task_loss"]), ("KL", &line["align_kl"])] {
            if let Some(value) = value.as_f64() {
                message += &format!("{name} {value:.4}  ");
            }
        }
        if let Some(seconds) = line["eta_seconds"].as_f64() {
            message += &format!("{seconds:.0} s left");
        }
        self.shown.step(step, total, message)
    }
}

/// The lines of a run's steps.
fn steps(folder: &Path) -> Result<Vec<Value>> {
    let progress = std::fs::read_to_string(folder.join(paths::PROGRESS))?;
    let lines = progress.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(lines.filter(|line| line["task_loss"].is_number()).collect())
}

/// The largest alignment loss that a review of a run kept, as a share of what it may keep; `None` where nothing was reviewed.
pub(super) fn kept_of_budget(steps: &[Value]) -> Option<f64> {
    let reviews = steps.iter().filter_map(|step| step["reviews"].as_array()).flatten();
    let kept = reviews.filter(|review| review["taken_back"] == false);
    let largest = kept.filter_map(|review| review["probe_loss"].as_f64()).max_by(f64::total_cmp)?;
    Some(largest / (2.0 * DEFAULT_BUDGET))
}

/// How many threads the trainer computes on.
pub(super) fn threads() -> Option<u64> {
    let told = std::env::var("OMP_NUM_THREADS").ok().and_then(|told| told.parse().ok());
    told.or_else(|| u64::try_from(std::thread::available_parallelism().ok()?.get()).ok())
}

/// Seconds of a step of a run, the median; a mean would count what else ran on the machine, and the run's own pauses.
pub(super) fn step_seconds(folder: &Path) -> Option<f64> {
    let (mut seconds, mut tokens_then) = (Vec::new(), 0.0);
    for step in steps(folder).ok()? {
        let (tokens, pace) = (step["tokens"].as_f64()?, step["tokens_per_second"].as_f64()?);
        // A step on alignment rows alone counts none of the user's tokens, so their pace tells nothing of it.
        if tokens > tokens_then {
            seconds.push((tokens - tokens_then) / pace);
        }
        tokens_then = tokens;
    }
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied()
}

/// Puts an adapter into a base.
pub(super) fn merge(base: &Path, adapter: &Path, out: &Path) -> Result<()> {
    shell::run(Command::new(program()).arg("merge").arg("--base").arg(base).arg("--adapter").arg(adapter).arg("--out").arg(out))
}
