//! What an adapter answers to suites of requests, beside what its base does.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use holdfast_base_model::files;
use holdfast_dataset::batch::Batch;
use holdfast_dataset::{ChatTokenizer, Example, Row};
use holdfast_domain::evaluation::{self, Answer, Evaluation, Figures, paths};
use holdfast_domain::plan;
use holdfast_domain::progress::Phase;

use super::failure::bad_setup;
use super::inputs::{Inputs, read_plan};
use super::memory;
use crate::adapter::Adapter;
use crate::model::{Model, read_architecture};
use crate::packed::Packed;
use crate::progress::ProgressLog;
use crate::stop::Stop;
use crate::{adapter_files, device, generate, loss, whole_file};

/// Prompts that are answered together.
const PROMPTS_AT_ONCE: usize = 64;
/// Tokens of a pass that compares the two models.
const TOKENS_AT_ONCE: usize = 2048;

/// Asks the adapter of a job folder, or its base alone, everything that its `evaluation.json` names.
pub(super) fn evaluate(folder: &Path) -> Result<()> {
    let stop = Stop::on_sigterm()?;
    let plan = read_plan(folder)?;
    let asked = read_request(folder)?;
    let out = folder.join(paths::OUT);
    std::fs::create_dir_all(&out).context("cannot make the folder of the answers")?;
    let mut log = ProgressLog::open(folder)?;
    log.phase(Phase::Evaluating)?;
    let in_base = |error: &dyn std::fmt::Display| bad_setup(format!("{}: {error}", plan::paths::BASE));
    let base = folder.join(plan::paths::BASE);
    let tokenizer = ChatTokenizer::load(&base).map_err(|error| in_base(&error))?;
    let architecture = read_architecture(&base.join(files::CONFIG)).map_err(|error| in_base(&format!("{error:#}")))?;
    let device = device::parse(&plan.device).map_err(|error| bad_setup(format!("{}: {error}", plan::paths::PLAN)))?;
    if asked.adapter.is_none() {
        // What the training would be refused for is not found out after minutes of asking, nor by a machine that runs out of memory.
        memory::check(&Inputs::read(folder, &plan, &stop)?, &plan, None)?;
    }
    let model = Model::load_as(architecture, &base, device::kind(plan.hyperparameters.precision), device, &stop);
    stop.check()?;
    let model = model.map_err(|error| in_base(&format!("{error:#}")))?;
    let adapter = asked.adapter.as_ref().map(|adapter| adapter_files::read(&folder.join(adapter), &model)).transpose()?;
    let asks = Asks { model: &model, tokenizer: &tokenizer, max_tokens: asked.max_tokens as usize, stop: &stop };
    let mut figures = Figures::default();
    for suite in &asked.suites {
        let suites = folder.join(paths::SUITES);
        let prompts = read_prompts(&suites.join(paths::suite(suite)), &tokenizer)?;
        let known = suites.join(paths::base(suite));
        let base = if known.exists() {
            read_answers(&known, prompts.len())?
        } else {
            let answers = asks.answers(None, &prompts, &mut log)?;
            write_lines(&out.join(paths::base(suite)), &answers)?;
            answers
        };
        let Some(adapter) = &adapter else { continue };
        write_lines(&out.join(paths::suite(suite)), &asks.answers(Some(adapter), &prompts, &mut log)?)?;
        if asked.without_kl.contains(suite) {
            continue;
        }
        figures.kl.insert(suite.clone(), Some(asks.mean_kl(adapter, &prompts, &base, &mut log)?).filter(|kl| kl.is_finite()));
    }
    whole_file::write(&folder.join(paths::FIGURES), &serde_json::to_vec(&figures)?)
}

fn read_request(folder: &Path) -> Result<Evaluation> {
    let fault = |error: &dyn std::fmt::Display| bad_setup(format!("{}: {error}", paths::EVALUATION));
    let bytes = std::fs::read(folder.join(paths::EVALUATION)).map_err(|error| fault(&error))?;
    let asked: Evaluation = serde_json::from_slice(&bytes).map_err(|error| fault(&error))?;
    if asked.format != evaluation::FORMAT {
        let message = format!("format {} is not {}; use the trainer of the worker's version", asked.format, evaluation::FORMAT);
        return Err(fault(&message));
    }
    Ok(asked)
}

/// The tokens of a suite's requests. A fault names its line and never quotes it.
fn read_prompts(path: &Path, tokenizer: &ChatTokenizer) -> Result<Vec<Vec<u32>>> {
    let fault = |error: String| bad_setup(format!("{}: {error}", name(path)));
    let lines = lines_of(path)?;
    let prompts = lines.iter().enumerate().map(|(number, line)| {
        let at = |error: &dyn std::fmt::Display| fault(format!("line {}: {error}", number + 1));
        let row = Row::parse_prompt(line.as_bytes()).map_err(|error| at(&error))?;
        tokenizer.encode_prompt(&row).map_err(|error| at(&error))
    });
    let prompts: Vec<Vec<u32>> = prompts.collect::<Result<_>>()?;
    if prompts.is_empty() {
        return Err(fault("the suite holds no requests".into()));
    }
    Ok(prompts)
}

fn read_answers(path: &Path, count: usize) -> Result<Vec<Answer>> {
    let answers: Vec<Answer> = lines_of(path)?
        .iter()
        .map(|line| serde_json::from_str(line))
        .collect::<Result<_, _>>()
        .map_err(|error| bad_setup(format!("{}: {error}", name(path))))?;
    if answers.len() != count {
        return Err(bad_setup(format!("{} holds {} answers to {count} requests", name(path), answers.len())));
    }
    Ok(answers)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn lines_of(path: &Path) -> Result<Vec<String>> {
    let file = File::open(path).map_err(|error| bad_setup(format!("{}: {error}", name(path))))?;
    let lines = BufReader::new(file).lines().filter(|line| !line.as_ref().is_ok_and(|line| line.trim().is_empty()));
    lines.collect::<Result<_, _>>().with_context(|| format!("cannot read {}", name(path)))
}

fn write_lines(path: &Path, answers: &[Answer]) -> Result<()> {
    let mut bytes = Vec::new();
    for answer in answers {
        serde_json::to_writer(&mut bytes, answer)?;
        bytes.push(b'\n');
    }
    whole_file::write(path, &bytes)
}

/// A model that is asked, with an adapter and without.
struct Asks<'a> {
    model: &'a Model,
    tokenizer: &'a ChatTokenizer,
    max_tokens: usize,
    stop: &'a Stop,
}

impl Asks<'_> {
    fn answers(&self, adapter: Option<&Adapter>, prompts: &[Vec<u32>], log: &mut ProgressLog) -> Result<Vec<Answer>> {
        let stop_ids = &self.tokenizer.special_tokens.stop_ids;
        let read = |ids: Vec<u32>| Ok(Answer { text: self.tokenizer.decode(&ids).map_err(anyhow::Error::msg)?, ids });
        let mut answers = Vec::new();
        for some in prompts.chunks(PROMPTS_AT_ONCE) {
            // Whoever watches for a run that stands still sees that this one does not.
            log.phase(Phase::Evaluating)?;
            let ids = generate::greedy(self.model, adapter, some, stop_ids, self.max_tokens, self.stop)?;
            answers.extend(ids.into_iter().map(read).collect::<Result<Vec<_>>>()?);
        }
        Ok(answers)
    }

    /// The mean over the tokens of `answers` of KL(base ‖ adapted), in nats.
    fn mean_kl(&self, adapter: &Adapter, prompts: &[Vec<u32>], answers: &[Answer], log: &mut ProgressLog) -> Result<f64> {
        let examples: Vec<Example> = prompts.iter().zip(answers).map(|(prompt, answer)| answered(prompt, &answer.ids)).collect();
        let (mut sum, mut count) = (0.0, 0);
        let mut rest = examples.as_slice();
        while !rest.is_empty() {
            self.stop.check()?;
            log.phase(Phase::Evaluating)?;
            let mut tokens = 0;
            let fits = |example: &&Example| {
                tokens += example.ids.len();
                tokens <= TOKENS_AT_ONCE
            };
            let together = rest.iter().take_while(fits).count().max(1);
            let (pass, others) = rest.split_at(together);
            rest = others;
            let positions: usize = pass.iter().map(Example::supervised_count).sum();
            if positions == 0 {
                continue;
            }
            let batch = Batch::new(pass);
            let packed = Packed::new(&[(&batch, 0)], self.model.device);
            let base = self.model.hidden(&packed, None);
            let adapted = self.model.hidden(&packed, Some(adapter));
            sum += loss::kl(&adapted, &self.model.head, &base).sum();
            count += positions;
        }
        ensure!(count > 0, "the base's answers have no tokens to compare the models on");
        Ok(sum / count as f64)
    }
}

fn answered(prompt: &[u32], answer: &[u32]) -> Example {
    let ids: Vec<u32> = prompt.iter().chain(answer).copied().collect();
    let supervised = (0..ids.len()).map(|at| at >= prompt.len()).collect();
    Example { ids, supervised }
}
