//! What was measured, kept in the repository: a line for each run, with what each answer was and none of their texts. So a table can be
//! printed, and an interval drawn, by anybody and without running anything.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use holdfast_safety::judge::Class;
use serde::{Deserialize, Serialize};

use super::runs::{self, Run};
use super::{Outcome, Study, report};
use crate::bench::{Figure, Wanted};
use crate::shell::root;

/// The lines, sorted by their keys.
const FILE: &str = "bench/safety/results.jsonl";
/// The key of the base's.
const BASE: &str = "base";

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    key: String,
    #[serde(flatten)]
    outcome: Outcome,
}

/// Writes down what was run here, in the place of what was known of the same runs.
pub(super) fn record(study: &Study, base: Outcome, wanted: &Wanted<'_>) -> Result<()> {
    let mut known = read()?;
    let is_same = |recorded: &Outcome| (&recorded.classes, &recorded.benign) == (&base.classes, &base.benign);
    ensure!(
        known.get(BASE).is_none_or(is_same),
        "{FILE} is of another base, made by another processor or recipe; what is compared must begin with the same. Remove the file to begin anew"
    );
    let before = known.len();
    known.insert(BASE.into(), base);
    let mut recorded = 0;
    for run in runs::known().into_iter().filter(|run| runs::is_asked_for(run, wanted) && study.is_done(run)) {
        known.insert(run.key(), study.outcome(&run)?);
        recorded += 1;
    }
    let lines = known.into_iter().map(|(key, outcome)| Ok(serde_json::to_string(&Line { key, outcome })? + "\n"));
    let lines: Vec<String> = lines.collect::<Result<_>>()?;
    std::fs::write(path(), lines.concat())?;
    println!("{recorded} runs recorded in {FILE}, which had {before} lines and has {}", lines.len());
    Ok(())
}

/// Shows what is recorded.
pub(super) fn table(wanted: &Wanted<'_>, figures: &mut Vec<Figure>) -> Result<()> {
    let mut known = read()?;
    let Some(base) = known.remove(BASE) else { bail!("{FILE} has no line of the base; `bench safety record` writes one") };
    let runs = runs::known().into_iter().filter(|run| runs::is_asked_for(run, wanted));
    let outcomes: Vec<(Run, Outcome)> = runs.filter_map(|run| known.remove(&run.key()).map(|outcome| (run, outcome))).collect();
    report::table(&base, &outcomes);
    report::figures(&base, &outcomes, figures);
    Ok(())
}

fn path() -> PathBuf {
    root().join(FILE)
}

fn read() -> Result<BTreeMap<String, Outcome>> {
    let text = match std::fs::read_to_string(path()) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {FILE}")),
    };
    let lines = text.lines().enumerate().map(|(at, line)| {
        let Line { key, outcome } = serde_json::from_str(line).with_context(|| format!("{FILE}, line {}", at + 1))?;
        Ok((key, outcome))
    });
    lines.collect()
}

/// One letter for each answer.
pub(super) mod letters {
    use serde::de::Error as _;
    use serde::{Deserializer, Serializer};

    use super::{Class, Deserialize};

    const LETTERS: [(Class, char); 3] = [(Class::Refusal, 'r'), (Class::Compliance, 'c'), (Class::Degenerate, 'd')];

    pub(in super::super) fn serialize<S: Serializer>(classes: &[Class], serializer: S) -> Result<S::Ok, S::Error> {
        let letter = |class: &Class| LETTERS.iter().find(|(known, _)| known == class).map(|(_, letter)| letter);
        serializer.collect_str(&classes.iter().filter_map(letter).collect::<String>())
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Class>, D::Error> {
        let class = |letter| LETTERS.iter().find(|(_, known)| *known == letter).map(|(class, _)| *class);
        let text = String::deserialize(deserializer)?;
        text.chars().map(|letter| class(letter).ok_or_else(|| D::Error::custom(format!("no class {letter:?}")))).collect()
    }
}

/// A 1 for each that is right, else a 0.
pub(super) mod bits {
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(in super::super) fn serialize<S: Serializer>(right: &[bool], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&right.iter().map(|right| if *right { '1' } else { '0' }).collect::<String>())
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<bool>, D::Error> {
        Ok(String::deserialize(deserializer)?.chars().map(|bit| bit == '1').collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_it_was_written() -> Result<()> {
        let text = r#"{"key":"poison0.1","program":"1e207bc","classes":"rcd","base_classes":"rrr","benign":"c","correct":"101","step_seconds":1.5,"peak_bytes":2000000000.0,"conflict_rate":0.5,"cosine":null,"final_kl":null,"probe_kl":0.25,"ranking":null,"kept_of_budget":null}"#;
        let line: Line = serde_json::from_str(text)?;
        assert_eq!(line.outcome.classes, [Class::Refusal, Class::Compliance, Class::Degenerate]);
        assert_eq!(line.outcome.correct, [true, false, true]);
        assert_eq!(serde_json::to_string(&line)?, text);
        assert!(serde_json::from_str::<Line>(&text.replace("rcd", "rcx")).is_err());
        Ok(())
    }
}
