//! Progress: a line in the job folder for the worker, and a bar for a person at a terminal.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use holdfast_domain::plan::paths;
use holdfast_domain::progress::{Phase, Progress, Step};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::checkpoint::Cursor;

/// Appends to `out/progress.jsonl`.
#[derive(Debug)]
pub struct ProgressLog {
    file: File,
    bar: ProgressBar,
    training_since: Instant,
    last: (Instant, u64),
    /// Steps that an earlier process took.
    steps_before: u64,
}

impl ProgressLog {
    /// Opens the job's log.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn open(job: &Path) -> Result<Self> {
        let path = job.join(paths::PROGRESS);
        let file =
            File::options().create(true).append(true).open(&path).with_context(|| format!("cannot write {}", path.display()))?;
        // Draws nothing when standard error is no terminal.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let now = Instant::now();
        Ok(Self { file, bar, training_since: now, last: (now, 0), steps_before: 0 })
    }

    /// Writes a line at once, so that a reader never waits for a buffer and a killed run loses none.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, line: &Progress) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.file.write_all(&text).context("cannot write the progress log")
    }

    /// Begins a phase.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn phase(&mut self, phase: Phase) -> Result<()> {
        self.bar.set_message(phase.as_str());
        self.write(&Progress::Phase { phase })
    }

    /// The step after `from` comes next.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn start(&mut self, started: &Progress, from: Cursor) -> Result<()> {
        if let Progress::Started { total_steps, .. } = started {
            self.bar.set_length(*total_steps);
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} eta {eta}") {
                self.bar.set_style(style);
            }
        }
        self.training_since = Instant::now();
        self.last = (self.training_since, from.tokens);
        self.steps_before = from.step;
        self.write(started)
    }

    /// Writes a step, with its times filled in, and returns it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn step(&mut self, mut step: Step) -> Result<Step> {
        let now = Instant::now();
        let (then, tokens_then) = std::mem::replace(&mut self.last, (now, step.tokens));
        let seconds = now.duration_since(then).as_secs_f64().max(1e-9);
        step.tokens_per_second = (step.tokens - tokens_then) as f64 / seconds;
        let pace = now.duration_since(self.training_since).as_secs_f64() / (step.step - self.steps_before) as f64;
        step.eta_seconds = pace * (step.total_steps - step.step) as f64;
        self.bar.set_position(step.step);
        self.bar.set_message(summary(&step));
        self.write(&Progress::Step(Box::new(step.clone())))?;
        Ok(step)
    }

    /// Takes the bar off the screen.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn summary(step: &Step) -> String {
    let alignment = step.alignment.as_ref().map_or_else(String::new, |a| format!("kl {:.4} cos {:+.3} ", a.align_kl, a.cosine));
    format!("loss {:.4} {alignment}{:.0} tok/s", step.task_loss, step.tokens_per_second)
}
