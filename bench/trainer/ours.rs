//! One measurement of the trainer, as one line of JSON: what `peer.py` prints of PEFT, for the same rows.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use holdfast_dataset::batch::Batch;
use holdfast_dataset::check::encode_file;
use holdfast_dataset::encode::EncodeOptions;
use holdfast_dataset::order::RowOrder;
use holdfast_dataset::{ChatTokenizer, Example};
use holdfast_domain::Safety;
use holdfast_domain::hyperparameters::{LongRows, Precision, Projection, Recompute};
use holdfast_domain::safety::{Defense, KlPositions};
use holdfast_trainer::adapter::{Adapter, AdapterConfig};
use holdfast_trainer::methods::{self, Objective, Sides};
use holdfast_trainer::model::Model;
use holdfast_trainer::objective::{AlignmentRows, Engine};
use holdfast_trainer::optimizer::AdamW;
use holdfast_trainer::reference::Reference;
use holdfast_trainer::stop::Stop;
use holdfast_trainer::{allocator, device, product};
use serde_json::{Value, json};
use tch::Device;

#[derive(Parser)]
struct Cli {
    /// The base model's folder.
    #[arg(long)]
    model: PathBuf,
    /// Makes the folder of this .gguf file first, unless it is there.
    #[arg(long)]
    import: Option<PathBuf>,
    /// What to measure.
    #[arg(long)]
    work: Work,
    #[arg(long, default_value = "f32")]
    precision: Numbers,
    /// `sft` and `safegrad`: rows {"ids": […], "supervised": […]}, all of them in every step. `epoch`: chat rows, ten a step.
    #[arg(long)]
    rows: PathBuf,
    /// The alignment rows of `safegrad`.
    #[arg(long)]
    align: Option<PathBuf>,
    /// Steps that are timed; an epoch has as many as its rows make.
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Steps before them.
    #[arg(long, default_value_t = 1)]
    warmup: usize,
    #[arg(long, default_value_t = 2)]
    threads: i32,
    /// Of an epoch's file, how many rows.
    #[arg(long)]
    limit: Option<usize>,
    /// Of an epoch, how many steps at most.
    #[arg(long)]
    most_steps: Option<u64>,
    /// What is computed again instead of kept.
    #[arg(long, default_value = "nothing")]
    recompute: Again,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Work {
    /// Plain fine-tuning steps.
    Sft,
    /// Steps with the alignment gradient and the surgery.
    Safegrad,
    /// One pass over a file of real rows.
    Epoch,
    /// Matrix products as large as a step's, and nothing else: the machine's limit.
    Products,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Numbers {
    F32,
    Bf16,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Again {
    Nothing,
    FeedForward,
    Layers,
}

const ROWS_PER_STEP: usize = 10;

fn main() -> Result<()> {
    let cli = Cli::parse();
    allocator::keep_freed_memory();
    tch::set_num_threads(cli.threads);
    if let Some(source) = cli.import.as_ref().filter(|_| !cli.model.exists()) {
        let unfinished = cli.model.with_extension("partial");
        let _ = std::fs::remove_dir_all(&unfinished);
        std::fs::create_dir_all(&unfinished)?;
        holdfast_import::import(source, &unfinished)?;
        std::fs::rename(&unfinished, &cli.model)?;
    }
    let precision = if cli.precision == Numbers::F32 { Precision::F32 } else { Precision::Bf16 };
    let model = Model::load(&cli.model, device::kind(precision), Device::Cpu)?;
    let config = AdapterConfig { rank: 8, alpha: 16.0, dropout: 0.0, targets: Projection::ALL.to_vec() };
    let mut trainer = Trainer {
        adapter: Adapter::init(&model, config, 0),
        precision,
        recompute: match cli.recompute {
            Again::Nothing => Recompute::Nothing,
            Again::FeedForward => Recompute::FeedForward,
            Again::Layers => Recompute::Layers,
        },
        model: &model,
        optimizer: None,
    };
    let found = match cli.work {
        Work::Products => products(&model, cli.steps),
        Work::Sft | Work::Safegrad => {
            let rows = read_rows(&cli.rows)?;
            let reference = match (cli.work, &cli.align) {
                (Work::Safegrad, Some(align)) => {
                    Some(Reference::new(&model, read_rows(align)?, KlPositions::Response, &Stop::default())?)
                }
                (Work::Safegrad, None) => anyhow::bail!("safegrad needs --align"),
                _ => None,
            };
            let batch = [Batch::new(&rows)];
            let (mut seconds, mut losses) = (Vec::new(), Vec::new());
            for step in 0..cli.warmup + cli.steps {
                let since = Instant::now();
                losses.push(trainer.step(&batch, reference.as_ref()));
                if step >= cli.warmup {
                    seconds.push(since.elapsed().as_secs_f64());
                }
            }
            let attention = attention_operations(&model, &batch[0].lengths);
            json!({
                "seconds": seconds,
                "losses": losses,
                "tokens_per_step": batch[0].tokens(),
                "operations": operations(&model, batch[0].tokens() as f64, batch[0].positions.len() as f64) + attention,
                "attention_operations": attention,
            })
        }
        Work::Epoch => epoch(&cli, &mut trainer)?,
    };
    let mut found = found;
    found["peak_rss_bytes"] = peak_rss_bytes()?.into();
    println!("{found}");
    Ok(())
}

struct Trainer<'a> {
    model: &'a Model,
    adapter: Adapter,
    precision: Precision,
    recompute: Recompute,
    optimizer: Option<AdamW>,
}

impl Trainer<'_> {
    /// One optimiser step as the training loop takes it; returns the task loss before it.
    fn step(&mut self, batches: &[Batch], reference: Option<&Reference>) -> f64 {
        let engine = Engine { model: self.model, adapter: &self.adapter, dropout_key: None, recompute: self.recompute };
        let passes = [(0..reference.map_or(0, Reference::rows)).collect::<Vec<_>>()];
        let rows = reference.map(|reference| AlignmentRows { reference, objective: Objective::Kl, passes: &passes });
        let (user, align) = engine.gradients(batches, rows);
        let defense = if align.is_some() { Defense::Safegrad } else { Defense::None };
        let mut method = methods::of(&Safety::new(defense, 1.0), self.precision);
        let loss = user.side.loss;
        let sides = Sides { user: Some(user.side), align: align.as_ref(), row_dots: &[], weights: self.adapter.flat() };
        let mut merged = method.merge(sides);
        merged.gradient.clip(1.0);
        let optimizer = self.optimizer.get_or_insert_with(|| AdamW::new(&self.adapter, 0.0));
        self.adapter.shift(&optimizer.update(&self.adapter, &merged.gradient, 1e-4));
        loss
    }
}

fn read_rows(path: &Path) -> Result<Vec<Example>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line)?;
            let ids: Vec<u32> = serde_json::from_value(row["ids"].clone())?;
            let supervised: Vec<u8> = serde_json::from_value(row["supervised"].clone())?;
            Ok(Example { ids, supervised: supervised.iter().map(|s| *s == 1).collect() })
        })
        .collect()
}

fn epoch(cli: &Cli, trainer: &mut Trainer<'_>) -> Result<Value> {
    let tokenizer = ChatTokenizer::load(&cli.model)?;
    let mut rows = Vec::new();
    let options = EncodeOptions { max_length: 1024, long_rows: LongRows::Truncate };
    let report = encode_file(std::fs::File::open(&cli.rows)?, &tokenizer, options, |_, example| rows.push(example))?;
    ensure!(report.error_count == 0, report.summary());
    rows.truncate(cli.limit.unwrap_or(rows.len()));
    let mut order = RowOrder::new(0, rows.len(), ROWS_PER_STEP);
    let steps = cli.most_steps.map_or(order.steps_per_epoch(), |most| most.min(order.steps_per_epoch()));
    let (mut losses, mut tokens) = (Vec::new(), 0);
    let since = Instant::now();
    for step in 0..steps {
        let batch = [Batch::new(order.step(step).into_iter().map(|row| &rows[row]))];
        losses.push(trainer.step(&batch, None));
        tokens += batch[0].tokens();
    }
    let seconds = since.elapsed().as_secs_f64();
    Ok(json!({"seconds": [seconds], "losses": losses, "tokens": tokens, "rows": rows.len()}))
}

/// Operations of the matrix products that a plain fine-tuning step cannot do without, beside attention's: the frozen maps forward
/// and back, and the output matrix at the supervised positions.
fn operations(model: &Model, tokens: f64, positions: f64) -> f64 {
    let maps: i64 = Projection::ALL
        .into_iter()
        .map(|projection| {
            let (input, output) = model.projection_size(projection);
            input * output
        })
        .sum();
    let a = &model.architecture;
    4.0 * (maps * a.layers.len() as i64) as f64 * tokens + 4.0 * (a.vocab_size * a.hidden_size) as f64 * positions
}

/// Those of attention: two products forward and four back, over each query and the keys up to it.
fn attention_operations(model: &Model, lengths: &[usize]) -> f64 {
    let a = &model.architecture;
    let pairs: f64 = lengths.iter().map(|&length| (length * (length + 1) / 2) as f64).sum();
    12.0 * (a.layers.len() * a.num_attention_heads * a.head_dim) as f64 * pairs
}

/// The matrix products of a forward and a backward pass over 1,024 tokens, as billions of operations a second: libtorch's own,
/// and ours, which may take another way to them.
fn products(model: &Model, rounds: usize) -> Value {
    let options = (model.kind, Device::Cpu);
    let a = &model.architecture;
    let (hidden, inner) = (a.hidden_size as i64, a.intermediate_size as i64);
    let qkv = ((a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim) as i64;
    let random =
        |rows: i64, columns: i64| tch::Tensor::randn([rows, columns], (tch::Kind::Float, Device::Cpu)).to_kind(options.0);
    let (mut operations, mut seconds) = (0.0, [0.0; 2]);
    for (input, output) in [(hidden, qkv), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)] {
        let (x, y, matrix) = (random(1024, input), random(1024, output), random(output, input));
        for round in 0..=rounds {
            let since = Instant::now();
            let _ = (x.mm(&matrix.tr()), y.mm(&matrix));
            let libtorch = since.elapsed().as_secs_f64();
            let _ = (product::forward(&x, &matrix, None), product::backward(&y, &matrix));
            if round > 0 {
                seconds[0] += libtorch;
                seconds[1] += since.elapsed().as_secs_f64() - libtorch;
                operations += 4.0 * 1024.0 * (input * output) as f64;
            }
        }
    }
    let [libtorch, ours] = seconds.map(|seconds| operations / seconds / 1e9);
    json!({"gflops": libtorch.max(ours), "libtorch_gflops": libtorch, "seconds": seconds})
}

fn peak_rss_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = line.split_whitespace().next().context("no number")?.parse()?;
    Ok(kib * 1024)
}
