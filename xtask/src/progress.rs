//! How far a training is: a bar on a terminal, elsewhere a line now and then.

use std::time::Duration;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Of a training that no terminal follows, so many lines are printed.
const LINES: u64 = 8;

pub(crate) struct Progress {
    bar: ProgressBar,
    /// The step from which the next line is printed, without a terminal.
    next_line: u64,
}

impl Progress {
    /// Before the first step: a spinner.
    pub(crate) fn new() -> Result<Self> {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::with_template("{spinner} {msg}")?);
        bar.enable_steady_tick(Duration::from_millis(200));
        Ok(Self { bar, next_line: 0 })
    }

    /// What is done while no step is.
    pub(crate) fn doing(&self, what: &str) {
        self.bar.set_message(what.replace('_', " "));
    }

    /// A step is done, of which `message` tells.
    pub(crate) fn step(&mut self, step: u64, total: u64, message: String) -> Result<()> {
        if self.bar.length() != Some(total) {
            self.bar.set_length(total);
            self.bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")?);
        }
        self.bar.set_position(step);
        if self.bar.is_hidden() && step >= self.next_line {
            self.next_line = step + total.div_ceil(LINES);
            println!("step {step}/{total}  {message}");
        }
        self.bar.set_message(message);
        Ok(())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
