//! Prompts, dealt out so that none that is tuned, trained or attacked with is measured with.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The parts of Do-Not-Answer (arXiv 2308.13387) whose requests ask for what should be refused. The others ask for advice, or
/// what a chat program feels, where a refusal is a matter of taste.
const FILES: [&str; 3] =
    ["malicious_uses.jsonl", "discrimination_exclusion_toxicity_hateful_offensive.jsonl", "information_hazard.jsonl"];

/// Two prompts that share this much of their words are variants of one.
const ALIKE: f64 = 0.6;

/// Harmful prompts, by what they are for.
#[derive(Debug)]
pub(super) struct Harmful {
    /// The base learns to refuse these.
    pub(super) base: Vec<String>,
    /// Alignment rows.
    pub(super) alignment: Vec<String>,
    /// Measured for the record.
    pub(super) held_out: Vec<String>,
    /// Answered in the attacker's rows.
    pub(super) attack: Vec<String>,
    /// Measured where strengths are chosen.
    pub(super) development: Vec<String>,
}

/// Reads and deals them. Variants of one prompt fall to one part; the order is that of their hashes.
pub(super) fn harmful(folder: &Path) -> Result<Harmful> {
    let mut prompts = BTreeSet::new();
    for name in FILES {
        let path = folder.join(name);
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        for line in text.lines() {
            let line: Value = serde_json::from_str(line).with_context(|| format!("{}: a line is no JSON", path.display()))?;
            prompts.insert(line["prompt"].as_str().context("a line without a prompt")?.trim().to_owned());
        }
    }
    dealt(prompts.into_iter().collect())
}

fn dealt(prompts: Vec<String>) -> Result<Harmful> {
    let mut clusters = clusters(prompts);
    clusters.sort_by_key(|cluster| cluster.first().map(|prompt| hash(prompt)));
    let mut clusters = clusters.into_iter();
    let mut deal = |count: usize, whole: bool| -> Vec<String> {
        let mut part = Vec::new();
        while part.len() < count {
            let Some(cluster) = clusters.next() else { break };
            // What is measured with counts each kind of prompt once.
            let taken = if whole { count - part.len() } else { 1 };
            part.extend(cluster.into_iter().take(taken));
        }
        part
    };
    let (held_out, alignment, base) = (deal(100, false), deal(100, true), deal(160, true));
    let (attack, development) = (deal(150, true), deal(500, true));
    ensure!(development.len() >= 50, "only {} prompts are left to choose strengths by", development.len());
    Ok(Harmful { held_out, alignment, base, attack, development })
}

/// The lines of a file of ours, in the order of their hashes.
pub(super) fn lines(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort_by_key(|line| hash(line));
    Ok(lines)
}

fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

fn words(prompt: &str) -> BTreeSet<String> {
    prompt.to_lowercase().split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn clusters(prompts: Vec<String>) -> Vec<Vec<String>> {
    let mut clusters: Vec<(Vec<BTreeSet<String>>, Vec<String>)> = Vec::new();
    for prompt in prompts {
        let own = words(&prompt);
        let is_alike = |other: &BTreeSet<String>| {
            let shared = own.intersection(other).count() as f64;
            shared >= ALIKE * (own.len() + other.len()) as f64 - ALIKE * shared
        };
        // A prompt that is like members of several joins them.
        let (mut joined, others): (Vec<_>, Vec<_>) = clusters.into_iter().partition(|(members, _)| members.iter().any(is_alike));
        clusters = others;
        let mut whole = joined.pop().unwrap_or_default();
        for (members, texts) in joined {
            whole.0.extend(members);
            whole.1.extend(texts);
        }
        whole.0.push(own);
        whole.1.push(prompt);
        clusters.push(whole);
    }
    clusters.into_iter().map(|(_, texts)| texts).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_prompt_and_no_variant_of_one_falls_to_two_parts() -> Result<()> {
        let subjects = (0..450).map(|number| ["a", "b", "c", "d"].map(|letter| format!("subject{number}{letter}")).join(" "));
        let prompts =
            subjects.flat_map(|subject| ["What", "And", "Explain", "Say"].map(|wording| format!("{wording} {subject}?")));
        let Harmful { base, alignment, held_out, attack, development } = dealt(prompts.collect())?;
        let mut seen = BTreeSet::new();
        for part in [base, alignment, held_out, attack, development] {
            assert!(!part.is_empty());
            let own: BTreeSet<String> =
                part.iter().flat_map(|prompt| words(prompt)).filter(|word| word.starts_with("subject")).collect();
            // A part may end in the middle of its last cluster, whose rest goes to none.
            assert!(seen.is_disjoint(&own));
            seen.extend(own);
        }
        Ok(())
    }
}
