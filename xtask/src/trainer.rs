//! The trainer's program, as it was built for release.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::shell;

/// Where it is.
pub(crate) fn program() -> PathBuf {
    shell::target().join("release/holdfast-trainer")
}

/// Waits for a process to end, looking at `progress` all the while, and says how it did and the most memory it had, in bytes.
pub(crate) fn watch(mut process: Child, mut progress: impl FnMut() -> Result<()>) -> Result<(ExitStatus, u64)> {
    let mut peak = 0;
    loop {
        if let Some(status) = process.try_wait()? {
            return Ok((status, peak));
        }
        peak = peak.max(peak_bytes(process.id()).unwrap_or(0));
        progress()?;
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The most memory a process has had, while it runs.
fn peak_bytes(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Greedy answers to rows without one.
pub(crate) fn answers(base: &Path, adapter: Option<&Path>, prompts: &[Value], max_tokens: u32) -> Result<Vec<String>> {
    let mut command = Command::new(program());
    command.args(["generate", "--max-tokens", &max_tokens.to_string(), "--base"]).arg(base);
    if let Some(adapter) = adapter {
        command.arg("--adapter").arg(adapter);
    }
    let mut trainer = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot run holdfast-trainer")?;
    {
        let mut input = trainer.stdin.take().context("the trainer takes no input")?;
        for prompt in prompts {
            writeln!(input, "{prompt}")?;
        }
    }
    let output = trainer.wait_with_output()?;
    ensure!(output.status.success(), "holdfast-trainer generate ended with {}", output.status);
    let text = String::from_utf8(output.stdout)?;
    let answers: Vec<String> = text
        .lines()
        .map(|line| Ok(serde_json::from_str::<Value>(line)?["answer"].as_str().unwrap_or_default().trim().to_owned()))
        .collect::<Result<_>>()?;
    ensure!(answers.len() == prompts.len(), "{} answers to {} prompts", answers.len(), prompts.len());
    Ok(answers)
}

/// A request by itself.
pub(crate) fn ask(request: &str) -> Value {
    ask_behind(&[], request)
}

/// The same behind these messages, whose roles are given first.
pub(crate) fn ask_behind(before: &[(&str, &str)], request: &str) -> Value {
    conversation(before, &[("user", request)])
}

/// These messages behind those, whose roles are given first.
pub(crate) fn conversation(before: &[(&str, &str)], messages: &[(&str, &str)]) -> Value {
    let said = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
    json!({"messages": before.iter().chain(messages).map(said).collect::<Vec<Value>>()})
}
