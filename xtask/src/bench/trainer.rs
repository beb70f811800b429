//! The trainer beside what a user would otherwise pick: PEFT on transformers, and TRL. Both sides run in turns, each
//! measurement in a process of its own, on the same model, rows and two threads.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Figure, Wanted};
use crate::setup::{self, Libtorch};
use crate::shell::{self, cargo, output, root};
use crate::trainer::{program, watch};

/// The peers, pinned.
const PEERS: [&str; 6] =
    ["torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "trl==1.16.0", "datasets==5.2.0", "accelerate==1.15.0"];

/// What is made for the bench, and kept for its next run.
const FOLDER: &str = ".bench";

/// Turns of both sides for each figure.
const TURNS: usize = 2;

/// Both sides and the rows they take.
struct Bench {
    ours: PathBuf,
    python: PathBuf,
    peer: PathBuf,
    model: PathBuf,
    rows: PathBuf,
}

pub(super) const PARTS: [&str; 7] = ["limits", "steps", "memory", "prediction", "growth", "epoch", "oracle"];

pub(super) fn run(wanted: &Wanted<'_>, figures: &mut Vec<Figure>) -> Result<()> {
    let bench = Bench::prepare()?;
    type Part = fn(&Bench, &mut Vec<Figure>) -> Result<()>;
    let parts: [Part; 7] =
        [Bench::limits, Bench::steps, Bench::memory, Bench::prediction, Bench::growth, Bench::epoch, Bench::oracle];
    for (_, part) in PARTS.iter().zip(parts).filter(|(name, _)| wanted.has(name)) {
        part(&bench, figures)?;
    }
    Ok(())
}

impl Bench {
    fn prepare() -> Result<Self> {
        setup::run(Libtorch::Cpu)?;
        let python = setup::python_environment(&format!("{FOLDER}/python"), &PEERS)?;
        shell::run(cargo().args([
            "build",
            "--release",
            "--quiet",
            "-p",
            "holdfast-trainer",
            "--bins",
            "--example",
            "bench-trainer",
        ]))?;
        let folder = root().join(FOLDER);
        let rows = folder.join("rows");
        std::fs::create_dir_all(&rows)?;
        let bench = Self {
            ours: shell::target().join("release/examples/bench-trainer"),
            python,
            peer: root().join("bench/trainer/peer.py"),
            model: folder.join("smollm2"),
            rows,
        };
        let files = [
            ("user", 8, 128),
            ("align", 8, 128),
            ("long", 4, 1024),
            ("256", 8, 256),
            ("512", 4, 512),
            ("1024", 2, 1024),
            ("2048", 1, 2048),
        ];
        for (seed, (name, count, tokens)) in (0..).zip(files) {
            write_rows(&bench.file(name), count, tokens, seed)?;
        }
        bench.write_reviews("reviews", 1000)?;
        bench.write_reviews("many", 100_000)?;
        Ok(bench)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.rows.join(format!("{name}.jsonl"))
    }

    /// So many film reviews, beginning again where they end.
    fn write_reviews(&self, name: &str, count: usize) -> Result<()> {
        let folder = root().join(setup::FILM_REVIEWS);
        let mut lines = Vec::new();
        for part in ["train.jsonl", "validation.jsonl"] {
            let text = std::fs::read_to_string(folder.join(part))?;
            lines.extend(text.lines().map(ToOwned::to_owned));
        }
        let text: String = lines.iter().cycle().take(count).map(|line| format!("{line}\n")).collect();
        Ok(std::fs::write(self.file(name), text)?)
    }

    /// One measurement of ours.
    fn ours(&self, arguments: &[&str]) -> Result<Value> {
        let gguf = root().join(setup::MODEL);
        let mut command = Command::new(&self.ours);
        command.arg("--import").arg(gguf).arg("--model").arg(&self.model).args(arguments);
        last_line(&output(&mut command)?)
    }

    /// One measurement of the peer.
    fn peer(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.python);
        command.arg(&self.peer).arg("--model").arg(&self.model).args(arguments).env("HF_HUB_OFFLINE", "1");
        last_line(&output(&mut command)?)
    }

    /// The machine's own limit: matrix products and nothing else.
    fn limits(&self, _: &mut Vec<Figure>) -> Result<()> {
        println!("billions of operations a second of the matrix products alone, and what a plain step reaches of them");
        for precision in ["f32", "bf16"] {
            let products = self.ours(&["--work", "products", "--rows", "-", "--precision", precision])?;
            let (limit, libtorch) = (number(&products, "gflops")?, number(&products, "libtorch_gflops")?);
            let rows = self.file("user").display().to_string();
            let step = self.ours(&["--work", "sft", "--precision", precision, "--rows", &rows])?;
            let reached = number(&step, "operations")? / median(&seconds(&step)?) / 1e9;
            println!(
                "  {precision:5} limit {limit:6.0} (libtorch's own {libtorch:.0})   step {reached:6.0}   {:3.0} %",
                100.0 * reached / limit
            );
        }
        Ok(())
    }

    fn steps(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let (user, align) = (self.file("user").display().to_string(), self.file("align").display().to_string());
        println!("seconds of a step, 8 rows of 128 tokens, half of them supervised");
        for (precision, bars) in [("f32", [0.80, 0.60]), ("bf16", [0.65, 0.50])] {
            let mut ours_by_work = Vec::new();
            for (work, bar) in ["sft", "safegrad"].into_iter().zip(bars) {
                let mut arguments = vec!["--work", work, "--precision", precision, "--rows", &user, "--steps", "4"];
                if work == "safegrad" {
                    arguments.extend(["--align", &align]);
                }
                let (mut ours, mut peers) = (Vec::new(), Vec::new());
                for _ in 0..TURNS {
                    ours.extend(seconds(&self.ours(&arguments)?)?);
                    peers.extend(seconds(&self.peer(&arguments)?)?);
                }
                let (ours, peer) = (median(&ours), median(&peers));
                println!("  {work:9} {precision:5} {ours:7.2}   PEFT {peer:7.2}   {:.2}x", ours / peer);
                let name = match (work, precision) {
                    ("sft", "f32") => "sft_step_f32_over_peft",
                    ("sft", _) => "sft_step_bf16_over_peft",
                    (_, "f32") => "safegrad_step_f32_over_peft",
                    _ => "safegrad_step_bf16_over_peft",
                };
                figures.push(Figure::at_most(name, ours / peer, bar));
                ours_by_work.push(ours);
            }
            let &[sft, safegrad] = ours_by_work.as_slice() else { continue };
            let name = if precision == "f32" { "safegrad_over_sft_f32" } else { "safegrad_over_sft_bf16" };
            figures.push(Figure::at_most(name, safegrad / sft, 2.05));
        }
        Ok(())
    }

    fn memory(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let rows = self.file("long").display().to_string();
        let arguments = ["--work", "sft", "--precision", "f32", "--rows", &rows, "--steps", "3"];
        let peer = number(&self.peer(&arguments)?, "peak_rss_bytes")?;
        println!("peak memory and time, 4 rows of 1,024 tokens, float32   PEFT {:.2} GB", peer / 1e9);
        const RECOMPUTE: [&str; 3] = ["nothing", "feed-forward", "layers"];
        let (mut most, mut times) = ([0.0_f64; 3], [const { Vec::new() }; 3]);
        for _ in 0..TURNS {
            for ((recompute, most), times) in RECOMPUTE.into_iter().zip(&mut most).zip(&mut times) {
                let found = self.ours(&[&arguments[..], &["--recompute", recompute]].concat())?;
                *most = most.max(number(&found, "peak_rss_bytes")?);
                times.extend(seconds(&found)?);
            }
        }
        let mut whole = 0.0;
        for ((recompute, bytes), times) in RECOMPUTE.into_iter().zip(most).zip(&times) {
            let took = median(times);
            println!("  computes again {recompute:13} {:6.2} GB {:.2}x   {took:6.1} s", bytes / 1e9, bytes / peer);
            match recompute {
                "nothing" => {
                    whole = took;
                    figures.push(Figure::at_most("peak_memory_over_peft", bytes / peer, 0.70));
                }
                "feed-forward" => {
                    figures.push(Figure::at_most("peak_memory_checkpointing_over_peft", bytes / peer, 0.35));
                    figures.push(Figure::at_most("checkpointing_time", took / whole, 1.3));
                }
                _ => {
                    figures.push(Figure::at_most("peak_memory_checkpointing_layers_over_peft", bytes / peer, 0.35));
                    figures.push(Figure::at_most("checkpointing_layers_time", took / whole, 1.3));
                }
            }
        }
        Ok(())
    }

    /// What a run says it will need, beside the most it had, of the real program on job folders.
    fn prediction(&self, figures: &mut Vec<Figure>) -> Result<()> {
        println!("peak memory of a run, predicted and measured");
        let mut furthest = 0.0_f64;
        for (precision, defense, reviews, recompute) in [
            ("f32", "none", 30, "nothing"),
            ("bf16", "none", 30, "nothing"),
            ("f32", "safegrad", 1, "nothing"),
            ("f32", "none", 30, "layers"),
        ] {
            let folder = self.rows.join("job");
            let _ = std::fs::remove_dir_all(&folder);
            std::fs::create_dir_all(&folder)?;
            self.write_job(&folder, precision, defense, reviews, recompute)?;
            let (status, measured) = watch(Command::new(program()).arg("train").arg(&folder).spawn()?, || Ok(()))?;
            ensure!(status.success(), "the trainer ended with {status}");
            let progress = std::fs::read_to_string(folder.join(holdfast_domain::plan::paths::PROGRESS))?;
            let line = progress.lines().find(|line| line.contains("weights_bytes")).context("no memory line")?;
            let line: Value = serde_json::from_str(line)?;
            let parts = line.as_object().context("no object")?.iter().filter(|(name, _)| name.ends_with("_bytes"));
            let predicted: f64 = parts.filter_map(|(_, bytes)| bytes.as_f64()).sum();
            let off = predicted / measured as f64 - 1.0;
            println!(
                "  {precision:5} {defense:9} {reviews:3} reviews a row, recomputes {recompute:8} {:6.2} GB of {:6.2} GB   {:+.0} %",
                predicted / 1e9,
                measured as f64 / 1e9,
                100.0 * off
            );
            furthest = furthest.max(off.abs());
        }
        figures.push(Figure::at_most("memory_prediction_off", furthest, 0.25));
        Ok(())
    }

    /// A job folder of eight rows that each hold so many film reviews.
    fn write_job(&self, folder: &Path, precision: &str, defense: &str, reviews: usize, recompute: &str) -> Result<()> {
        std::os::unix::fs::symlink(&self.model, folder.join("base"))?;
        let text = std::fs::read_to_string(self.file("reviews"))?;
        let contents: Vec<String> = text
            .lines()
            .filter_map(|line| Some(serde_json::from_str::<Value>(line).ok()?["messages"][0]["content"].as_str()?.to_owned()))
            .collect();
        let rows: String = (0..8)
            .map(|row| {
                let joined: Vec<&str> = contents.iter().skip(row * reviews).take(reviews).map(String::as_str).collect();
                let joined = joined.join(" ");
                format!(
                    "{}\n",
                    json!({"messages": [{"role": "user", "content": joined}, {"role": "assistant", "content": joined}]})
                )
            })
            .collect();
        std::fs::write(folder.join("train.jsonl"), rows)?;
        let refusal = json!({"messages": [{"role": "user", "content": "Say what must not be said."}, {"role": "assistant", "content": "I can't help with that, but I can help with something else."}]});
        std::fs::write(folder.join("alignment.jsonl"), format!("{refusal}\n").repeat(8))?;
        let plan = json!({
            "format": holdfast_domain::plan::FORMAT, "base_model": "m", "validation": false, "seed": 1, "checkpoint_steps": 100, "device": "cpu",
            "hyperparameters": {
                "n_epochs": 1, "batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "lr_schedule": "constant",
                "warmup_ratio": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_length": 2048, "long_rows": "truncate",
                "precision": precision, "lora_rank": 8, "lora_alpha": 16.0, "lora_dropout": 0.0,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                "activation_checkpointing": recompute
            },
            "safety": {"defense": defense, "rho": 1.0, "alignment_set": null}
        });
        Ok(std::fs::write(folder.join("plan.json"), plan.to_string())?)
    }

    /// Time per token by the length of rows, 2,048 tokens a step; and by the number of rows in the file.
    fn growth(&self, figures: &mut Vec<Figure>) -> Result<()> {
        for (precision, name) in
            [("f32", "time_per_operation_2048_over_256_f32"), ("bf16", "time_per_operation_2048_over_256_bf16")]
        {
            println!("milliseconds a token by tokens a row, {precision}");
            // Everything but attention asks as many operations of each token, and attention as many more as stand before it: what
            // must stay flat is the time of an operation.
            let mut of_operations = Vec::new();
            for length in ["256", "512", "1024", "2048"] {
                let rows = self.file(length).display().to_string();
                let found = self.ours(&["--work", "sft", "--precision", precision, "--rows", &rows, "--steps", "5"])?;
                let (took, operations) = (median(&seconds(&found)?), number(&found, "operations")?);
                println!(
                    "  {length:>6} {:7.3}   attention's share of the operations {:4.1} %   {:4.0} billion operations a second",
                    1e3 * took / number(&found, "tokens_per_step")?,
                    100.0 * number(&found, "attention_operations")? / operations,
                    operations / took / 1e9
                );
                of_operations.push(took / operations);
            }
            let (Some(short), Some(long)) = (of_operations.first(), of_operations.last()) else { continue };
            figures.push(Figure::at_most(name, long / short, 1.10));
        }

        let mut by_rows = Vec::new();
        for name in ["reviews", "many"] {
            let rows = self.file(name).display().to_string();
            let found = self.ours(&["--work", "epoch", "--precision", "bf16", "--rows", &rows, "--most-steps", "40"])?;
            by_rows.push(median(&seconds(&found)?) / number(&found, "tokens")?);
        }
        let &[few, many] = by_rows.as_slice() else { return Ok(()) };
        println!("milliseconds a token of the first 40 steps   1,000 rows {:.3}   100,000 rows {:.3}", 1e3 * few, 1e3 * many);
        figures.push(Figure::at_most("time_per_token_100000_over_1000_rows", many / few, 1.10));
        Ok(())
    }

    fn epoch(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let rows = self.file("reviews").display().to_string();
        let arguments = ["--work", "epoch", "--precision", "f32", "--rows", &rows];
        let ours = median(&seconds(&self.ours(&arguments)?)?);
        let peer = median(&seconds(&self.peer(&arguments)?)?);
        println!("seconds of an epoch of 1,000 film reviews, batch 10   {ours:.0}   TRL {peer:.0}   {:.2}x", ours / peer);
        figures.push(Figure::at_most("epoch_over_trl", ours / peer, 0.50));
        Ok(())
    }

    fn oracle(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let (mut count, mut off) = (0.0, 0.0);
        let cases = root().join("crates/trainer/tests/fixtures");
        for entry in std::fs::read_dir(&cases)? {
            let case = entry?.path();
            if !case.join("case.json").exists() {
                continue;
            }
            let found = Command::new(shell::target().join("release/holdfast-trainer")).arg("oracle").arg(&case).output()?;
            let text = String::from_utf8_lossy(&found.stdout).into_owned();
            ensure!(!text.is_empty(), "{}: {}", case.display(), String::from_utf8_lossy(&found.stderr));
            count += text.lines().count() as f64;
            off += text.lines().filter(|line| line.ends_with(" off")).count() as f64;
        }
        println!("figures of the reference cases   {count}, of them off {off}");
        figures.push(Figure::at_most("oracle_figures_off", off, 0.0));
        Ok(())
    }
}

/// Rows of random tokens, the second half of each supervised; the same in every run.
fn write_rows(path: &Path, rows: usize, tokens: usize, seed: u64) -> Result<()> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64 ^ seed;
    let mut text = String::new();
    for _ in 0..rows {
        let ids: Vec<u64> = (0..tokens)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                3 + (state >> 33) % 49_000
            })
            .collect();
        let supervised: Vec<u8> = (0..tokens).map(|at| u8::from(at >= tokens / 2)).collect();
        text.push_str(&format!("{}\n", json!({"ids": ids, "supervised": supervised})));
    }
    Ok(std::fs::write(path, text)?)
}

fn last_line(printed: &[u8]) -> Result<Value> {
    let text = String::from_utf8_lossy(printed);
    let line = text.trim().lines().last().context("it printed nothing")?;
    serde_json::from_str(line).with_context(|| format!("it printed no JSON: {line}"))
}

fn number(found: &Value, name: &str) -> Result<f64> {
    found[name].as_f64().with_context(|| format!("the measurement lacks {name}"))
}

fn seconds(found: &Value) -> Result<Vec<f64>> {
    let list = found["seconds"].as_array().context("the measurement lacks seconds")?;
    Ok(list.iter().filter_map(Value::as_f64).collect())
}

fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
