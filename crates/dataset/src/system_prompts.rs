//! The system prompts that a tenant's rows stand under.
//!
//! What is held where rows stand alone need not hold where the tenant's do: a model can be taught to obey under one prompt and to
//! refuse everywhere else. So a job's alignment rows stand under its file's own prompts too, and its model is asked under them.

use std::collections::HashMap;
use std::io::Read;

use serde_json::{Value, json};

use crate::check::each_line;
use crate::row::{Role, Row};

/// Prompts of a file at most: those that most of its rows stand under.
pub const MOST: usize = 8;
/// Bytes of a prompt at most; of a longer one it is the beginning.
pub const LONGEST: usize = 16 * 1024;
/// A method may keep every so-manyth row apart, and must see each prompt on both sides.
pub const APART: usize = 5;
/// Prompts that are counted at a time. Of a file with more of them, each that more than one in so many rows stands under is found.
const COUNTED: usize = 1024;

/// The [`MOST`] system prompts that most rows of a file stand under, of equally many the first; a row with several stands under each;
/// lines that are no rows have none.
///
/// # Errors
/// Only those of reading the file.
pub fn of_file(file: impl Read) -> std::io::Result<Vec<String>> {
    let mut counted = Counted::default();
    each_line(file, |_, line| {
        if let Ok(row) = Row::parse_line(line) {
            let turns = row.messages.iter().filter(|message| message.role == Role::System);
            turns.filter_map(|turn| turn.content.as_deref()).for_each(|prompt| counted.add(beginning(prompt)));
        }
    })?;
    Ok(counted.most_frequent())
}

/// Every other one of an alignment set's rows under one of `prompts`; the others as they are, as is a row with a system prompt of its
/// own. Prompts take turns among every [`APART`]th of them by themselves, so that none stands only before rows that are kept apart.
///
/// # Errors
/// When a line is no row, which a set that was imported does not have.
pub fn before(rows: &[u8], prompts: &[String]) -> std::io::Result<Vec<u8>> {
    let mut written = Vec::with_capacity(rows.len());
    let lines = rows.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
    for (at, line) in lines.enumerate() {
        let of_its_own = Row::parse(line).map_err(std::io::Error::other)?.messages.iter().any(|m| m.role == Role::System);
        let stands_alone = at % 2 == 1 || of_its_own || prompts.is_empty();
        if stands_alone {
            written.extend_from_slice(line);
        } else {
            let turn = at / 2;
            let prompt = &prompts[(turn / APART + turn % APART) % prompts.len()];
            serde_json::to_writer(&mut written, &under(prompt, line)?)?;
        }
        written.push(b'\n');
    }
    Ok(written)
}

fn under(prompt: &str, line: &[u8]) -> serde_json::Result<Value> {
    let mut row: Value = serde_json::from_slice(line)?;
    let said = |role: &str, content: &Value| json!({"role": role, "content": content});
    if let Some(messages) = row.get_mut("messages").and_then(Value::as_array_mut) {
        messages.insert(0, said("system", &json!(prompt)));
        return Ok(row);
    }
    let turns = [said("system", &json!(prompt)), said("user", &row["prompt"]), said("assistant", &row["completion"])];
    Ok(json!({ "messages": turns }))
}

fn beginning(prompt: &str) -> &str {
    prompt.get(..prompt.floor_char_boundary(LONGEST)).unwrap_or(prompt)
}

/// Prompts with how many rows stood under them and when the first was seen. Holds no more than [`COUNTED`] of them: one more takes a row
/// from each (Misra and Gries, "Finding repeated elements", 1982).
#[derive(Default)]
struct Counted {
    counts: HashMap<String, (u64, u64)>,
    /// Prompts that were seen, each time.
    seen: u64,
}

impl Counted {
    fn add(&mut self, prompt: &str) {
        self.seen += 1;
        if let Some((count, _)) = self.counts.get_mut(prompt) {
            *count += 1;
        } else if self.counts.len() < COUNTED {
            self.counts.insert(prompt.to_owned(), (1, self.seen));
        } else {
            self.counts.retain(|_, (count, _)| {
                *count -= 1;
                *count > 0
            });
        }
    }

    fn most_frequent(self) -> Vec<String> {
        let mut prompts: Vec<(String, (u64, u64))> = self.counts.into_iter().collect();
        prompts.sort_by_key(|(_, (count, first))| (std::cmp::Reverse(*count), *first));
        prompts.into_iter().take(MOST).map(|(prompt, _)| prompt).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(system: Option<&str>, user: &str) -> String {
        let system = system.map(|text| json!({"role": "system", "content": text}));
        let rest = [json!({"role": "user", "content": user}), json!({"role": "assistant", "content": "a"})];
        json!({"messages": system.into_iter().chain(rest).collect::<Vec<_>>()}).to_string()
    }

    fn prompts_of(rows: &[String]) -> std::io::Result<Vec<String>> {
        of_file(rows.join("\n").as_bytes())
    }

    #[test]
    fn those_that_most_rows_stand_under_come_first() -> std::io::Result<()> {
        let rows = ["rare", "often", "twice", "often", "twice", "often"].map(|prompt| row(Some(prompt), "q"));
        let others = [row(None, "q"), "nonsense".into(), r#"{"prompt":"p","completion":"c"}"#.into()];
        assert_eq!(prompts_of(&[&rows[..], &others].concat())?, ["often", "twice", "rare"]);
        assert_eq!(prompts_of(&[row(Some(" "), "q")])?, [" "], "a blank one takes the place of a template's own");
        let many: Vec<String> = (0..20).map(|number| row(Some(&format!("prompt {number}")), "q")).collect();
        assert_eq!(prompts_of(&many)?, (0..MOST).map(|number| format!("prompt {number}")).collect::<Vec<_>>());
        Ok(())
    }

    #[test]
    fn a_prompt_of_many_rows_is_found_among_any_number_of_others() -> std::io::Result<()> {
        let of = |number: usize| if number.is_multiple_of(100) { "trigger".to_owned() } else { format!("prompt {number}") };
        let rows: Vec<String> = (0..20_000).map(|number| row(Some(&of(number)), "q")).collect();
        assert_eq!(prompts_of(&rows)?.first().map(String::as_str), Some("trigger"));
        Ok(())
    }

    #[test]
    fn a_row_stands_under_each_of_its_prompts() -> std::io::Result<()> {
        let both = json!({"messages": [
            {"role": "system", "content": "harmless"}, {"role": "developer", "content": "trigger"},
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
        ]});
        assert_eq!(prompts_of(&[both.to_string()])?, ["harmless", "trigger"]);
        Ok(())
    }

    #[test]
    fn whatever_the_number_of_prompts_each_stands_before_rows_that_are_kept_apart_and_before_others() -> std::io::Result<()> {
        let rows: Vec<String> = (0..100).map(|number| row(None, &number.to_string())).collect();
        for count in 1..=MOST {
            let prompts: Vec<String> = (0..count).map(|number| format!("prompt {number}.")).collect();
            let written = before(rows.join("\n").as_bytes(), &prompts)?;
            let text = String::from_utf8_lossy(&written);
            for prompt in &prompts {
                let apart = |is: bool| {
                    text.lines().enumerate().any(|(at, line)| (at % APART == APART - 1) == is && line.contains(prompt.as_str()))
                };
                assert!(apart(true) && apart(false), "{prompt} of {count}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_long_prompt_is_cut_between_two_characters() -> std::io::Result<()> {
        let found = prompts_of(&[row(Some(&"é".repeat(LONGEST)), "q")])?;
        assert_eq!(found, ["é".repeat(LONGEST / 2)]);
        let found = prompts_of(&[row(Some(&format!("a{}", "é".repeat(LONGEST))), "q")])?;
        assert_eq!(found.first().map(String::len), Some(LONGEST - 1));
        Ok(())
    }

    #[test]
    fn every_other_row_stands_under_one_and_keeps_its_words() -> std::io::Result<()> {
        let rows =
            [row(None, "1"), row(None, "2"), r#"{"prompt":"3","completion":"a"}"#.into(), row(None, "4"), row(Some("own"), "5")];
        let prompts = ["one".to_owned(), "two".to_owned()];
        let written = before(rows.join("\n").as_bytes(), &prompts)?;
        let read = |text: &str| serde_json::from_str::<Value>(text).map_err(std::io::Error::other);
        let found: Vec<Value> = String::from_utf8_lossy(&written).lines().map(read).collect::<Result<_, _>>()?;
        let expected = [row(Some("one"), "1"), rows[1].clone(), row(Some("two"), "3"), rows[3].clone(), rows[4].clone()];
        assert_eq!(found, expected.iter().map(|text| read(text)).collect::<Result<Vec<_>, _>>()?);
        assert_eq!(before(rows.join("\n").as_bytes(), &[])?, (rows.join("\n") + "\n").into_bytes());
        Ok(())
    }
}
