//! What was measured, kept in the repository: a line for each run, with what each answer was and none of their texts. So a table can be
//! printed, and an interval drawn, by anybody and without running anything. Each base has a file of its own: another kind of processor makes
//! another base by the same recipe, and what is compared must begin with the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use holdfast_safety::judge::Class;
use serde::{Deserialize, Serialize};

use super::runs::{self, Run};
use super::{Outcome, Study, report};
use crate::bench::{Figure, Wanted};
use crate::shell::root;

/// A file for each base, `base-1.jsonl` and on; its lines are sorted by their keys.
const FOLDER: &str = "bench/safety/results";
/// The key of the line that says what the base itself answers.
const BASE: &str = "base";

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    key: String,
    #[serde(flatten)]
    outcome: Outcome,
}

/// Writes down what was run here, in the place of what was known of the same runs.
pub(super) fn record(study: &Study, base: Outcome, wanted: &Wanted<'_>) -> Result<()> {
    let answers_alike = |recorded: &Outcome| (&recorded.classes, &recorded.benign) == (&base.classes, &base.benign);
    let mut number = 1;
    let mut known = read(&file(number))?;
    while known.get(BASE).is_some_and(|recorded| !answers_alike(recorded)) {
        number += 1;
        known = read(&file(number))?;
    }
    let (file, before) = (file(number), known.len());
    known.insert(BASE.into(), base);
    let mut recorded = 0;
    for run in runs::known().into_iter().filter(|run| runs::is_asked_for(run, wanted) && study.is_done(run)) {
        known.insert(run.key(), study.outcome(&run)?);
        recorded += 1;
    }
    let lines = known.into_iter().map(|(key, outcome)| Ok(serde_json::to_string(&Line { key, outcome })? + "\n"));
    let lines: Vec<String> = lines.collect::<Result<_>>()?;
    std::fs::create_dir_all(root().join(FOLDER))?;
    std::fs::write(root().join(&file), lines.concat())?;
    println!("{recorded} runs recorded in {}, which had {before} lines and has {}", file.display(), lines.len());
    Ok(())
}

/// Shows what is recorded, base by base. Of a figure that several bases have, the worst counts.
pub(super) fn table(wanted: &Wanted<'_>, figures: &mut Vec<Figure>) -> Result<()> {
    let mut of_bases = Vec::new();
    for number in 1.. {
        let mut known = read(&file(number))?;
        let Some(base) = known.remove(BASE) else { break };
        let runs = runs::known().into_iter().filter(|run| runs::is_asked_for(run, wanted));
        let outcomes: Vec<(Run, Outcome)> =
            runs.filter_map(|run| known.remove(&run.key()).map(|outcome| (run, outcome))).collect();
        println!("\nbase {number}");
        report::table(&base, &outcomes);
        report::figures(&base, &outcomes, &mut of_bases);
    }
    ensure!(!of_bases.is_empty(), "{FOLDER} has no file of a base; `bench safety record` writes one");
    // Of some runs not everything that is claimed can be told.
    of_bases.retain(|figure| wanted.only.is_empty() || figure.is_measured());
    for figure in of_bases {
        match figures.iter_mut().find(|known| known.name == figure.name) {
            Some(known) => *known = known.worse(figure),
            None => figures.push(figure),
        }
    }
    Ok(())
}

/// The file of a base, from the repository's root.
fn file(number: usize) -> PathBuf {
    Path::new(FOLDER).join(format!("base-{number}.jsonl"))
}

/// What a file holds; nothing where there is none.
fn read(file: &Path) -> Result<BTreeMap<String, Outcome>> {
    let text = match std::fs::read_to_string(root().join(file)) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    let lines = text.lines().enumerate().map(|(at, line)| {
        let Line { key, outcome } = serde_json::from_str(line).with_context(|| format!("{}, line {}", file.display(), at + 1))?;
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
