//! Alignment sets: what makes one usable, and whether their requests stand in a tenant's file.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;

use holdfast_domain::hyperparameters::LongRows;
use holdfast_domain::invalid::LineError;
use holdfast_domain::script::is_unspaced;
use serde_json::Value;
use serde_json::value::RawValue;
use unicode_normalization::UnicodeNormalization;

use crate::check::{Report, each_line, encode_file};
use crate::encode::EncodeOptions;
use crate::row::{Role, Row};
use crate::tokenizer::ChatTokenizer;

/// Requests that must not be trained on. They are found wherever their words stand one behind the other, whatever is said before and
/// after them.
#[derive(Debug, Clone, Default)]
pub struct Requests {
    /// Hashes of runs of words, by how many words they are.
    by_length: BTreeMap<usize, HashSet<u64>>,
}

/// Requests of fewer words are found only where nothing else is said: a file may well hold them in passing.
const FEWEST_WORDS: usize = 4;

impl Requests {
    /// The requests of an alignment set's rows, what each user says last; lines that are no rows have none.
    #[must_use]
    pub fn of_rows(rows: &[u8]) -> Self {
        let mut requests = Self::default();
        // Reading from memory does not fail.
        let _ = each_line(rows, |_, line| {
            if let Ok(row) = Row::parse_line(line)
                && let Some(request) = requested(&row)
            {
                requests.add(request);
            }
        });
        requests
    }

    /// Adds a request by itself.
    pub fn add(&mut self, request: &str) {
        let words = words(request);
        if let Some(run) = Runs::new(&words).hashes(words.len()).next().filter(|_| !words.is_empty()) {
            self.by_length.entry(words.len()).or_default().insert(run);
        }
    }

    /// The lines of a file in which one of them is asked.
    ///
    /// # Errors
    /// Only those of reading the file.
    pub fn asked_in(&self, file: impl Read) -> std::io::Result<Vec<u64>> {
        let mut lines = Vec::new();
        each_line(file, |number, line| {
            if Row::parse_line(line).is_ok_and(|row| self.are_asked(&row)) {
                lines.push(number);
            }
        })?;
        Ok(lines)
    }

    /// Whether a row asks one of them: in any of its turns, whoever speaks, in what two of the user's say one after the other, or in what all
    /// of the user's do, or everybody's; or anywhere in what it says of tools and of who speaks, which templates may write out as well.
    fn are_asked(&self, row: &Row<'_>) -> bool {
        let said = |role: Option<Role>| {
            let turns = row.messages.iter().filter(move |message| role.is_none_or(|role| message.role == role));
            turns.filter_map(|message| message.content.as_deref())
        };
        let asked: Vec<&str> = said(Some(Role::User)).collect();
        let joined = |turns: &[&str]| self.stand_in(&turns.join(" "));
        let all: Vec<&str> = said(None).collect();
        // One of the user's stands among all turns, and two are a window.
        all.iter().any(|turn| self.stand_in(turn))
            || asked.windows(2).any(joined)
            || (asked.len() > 2 && joined(&asked))
            || (all.len() > 1 && joined(&all))
            || self.are_asked_aside(row)
    }

    /// Whether one of them stands in a text of a row that is no turn's.
    fn are_asked_aside(&self, row: &Row<'_>) -> bool {
        let names = row.messages.iter().flat_map(|message| [&message.name, &message.tool_call_id]).flatten();
        let json = row.messages.iter().filter_map(|message| message.tool_calls).chain(row.tools);
        names.map(|name| &**name).any(|name| self.stand_in(name)) || json.map(RawValue::get).any(|json| self.stand_in_json(json))
    }

    fn stand_in_json(&self, json: &str) -> bool {
        serde_json::from_str(json).is_ok_and(|value| self.stand_within(&value))
    }

    /// In any text within, and in what is JSON itself there, as a call's arguments are.
    fn stand_within(&self, value: &Value) -> bool {
        match value {
            Value::String(text) => self.stand_in(text) || self.stand_in_json(text),
            Value::Array(values) => values.iter().any(|value| self.stand_within(value)),
            Value::Object(fields) => fields.iter().any(|(name, value)| self.stand_in(name) || self.stand_within(value)),
            Value::Null | Value::Bool(_) | Value::Number(_) => false,
        }
    }

    fn stand_in(&self, turn: &str) -> bool {
        let words = words(turn);
        let runs = Runs::new(&words);
        self.by_length.iter().any(|(&length, known)| {
            (length >= FEWEST_WORDS || length == words.len()) && runs.hashes(length).any(|run| known.contains(&run))
        })
    }
}

/// Hashes of all runs of words of a text: each run's is had from two sums.
struct Runs {
    /// Of the first so many words.
    sums: Vec<u64>,
    powers: Vec<u64>,
}

/// Any odd number of many bits.
const BASE: u64 = 0x9e37_79b9_7f4a_7c15;

impl Runs {
    fn new(words: &[u64]) -> Self {
        let (mut sums, mut powers) = (vec![0_u64], vec![1_u64]);
        let (mut sum, mut power) = (0_u64, 1_u64);
        for word in words {
            sum = sum.wrapping_mul(BASE).wrapping_add(*word);
            power = power.wrapping_mul(BASE);
            sums.push(sum);
            powers.push(power);
        }
        Self { sums, powers }
    }

    /// Of every run of `length` words, from the first.
    fn hashes(&self, length: usize) -> impl Iterator<Item = u64> + '_ {
        let power = self.powers.get(length).copied().unwrap_or(0);
        let ends = self.sums.iter().skip(length);
        self.sums.iter().zip(ends).map(move |(start, end)| end.wrapping_sub(start.wrapping_mul(power)))
    }
}

/// The words of a text by hashes, whatever their case, how their letters are composed, and what stands between them. Where words are not
/// parted by spaces, each character is one. What nobody sees (a soft hyphen, a joiner) parts nothing.
pub(crate) fn words(text: &str) -> Vec<u64> {
    let (mut words, mut word) = (Vec::new(), String::new());
    for character in text.nfkd().flat_map(char::to_lowercase).filter(|character| !is_unseen(*character)) {
        let unspaced = is_unspaced(character);
        if (unspaced || !character.is_alphanumeric()) && !word.is_empty() {
            words.push(hash(word.as_str()));
            word.clear();
        }
        if unspaced {
            words.push(hash(&*character.encode_utf8(&mut [0; 4])));
        } else if character.is_alphanumeric() {
            word.push(character);
        }
    }
    words.extend((!word.is_empty()).then(|| hash(word.as_str())));
    words
}

/// What stands for a value where it need not be kept.
pub(crate) fn hash<T: Hash + ?Sized>(value: &T) -> u64 {
    let mut hash = DefaultHasher::new();
    value.hash(&mut hash);
    hash.finish()
}

/// Marks that belong to the letter before them and make no other word of it, and what has no width.
const fn is_unseen(character: char) -> bool {
    matches!(
        character,
        '\u{300}'..='\u{36f}' | '\u{483}'..='\u{489}' | '\u{591}'..='\u{5bd}' | '\u{610}'..='\u{61a}' | '\u{64b}'..='\u{65f}'
            | '\u{ad}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{180b}'..='\u{180e}' | '\u{1ab0}'..='\u{1aff}'
            | '\u{1dc0}'..='\u{1dff}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{20d0}'..='\u{20ff}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{fe20}'..='\u{fe2f}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff9}'..='\u{fffb}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e01ef}'
    )
}

/// What the user says last.
pub(crate) fn requested<'a>(row: &'a Row<'_>) -> Option<&'a str> {
    row.messages.iter().rev().find(|message| message.role == Role::User)?.content.as_deref()
}

/// The lines of an alignment set that ask one of `measured`, or what one of them asks among other words.
#[must_use]
pub fn in_common(rows: &[u8], measured: &[&str]) -> Vec<u64> {
    if measured.is_empty() {
        return Vec::new();
    }
    let (held_to, mut asked) = (Requests::of_rows(rows), Requests::default());
    measured.iter().for_each(|request| asked.add(request));
    let holding: Vec<&&str> = measured.iter().filter(|request| held_to.stand_in(request)).collect();
    let mut lines = Vec::new();
    // Reading from memory does not fail.
    let _ = each_line(rows, |number, line| {
        let Ok(row) = Row::parse_line(line) else { return };
        let is_held = || {
            let mut own = Requests::default();
            requested(&row).into_iter().for_each(|request| own.add(request));
            holding.iter().any(|request| own.stand_in(request))
        };
        if asked.are_asked(&row) || !holding.is_empty() && is_held() {
            lines.push(number);
        }
    });
    lines
}

/// Checks the rows of an alignment set against a model's template and tokenizer, however long they are.
///
/// # Errors
/// Only those of reading, of which memory has none; bad rows are in the report.
pub fn check_template(rows: &[u8], tokenizer: &ChatTokenizer) -> std::io::Result<Report> {
    let options = EncodeOptions { max_length: usize::MAX, long_rows: LongRows::Error };
    encode_file(rows, tokenizer, options, |_, _| {})
}

/// Checks the rows of an alignment set: each a request and its answer, none twice.
#[must_use]
pub fn check(rows: &[u8]) -> Report {
    let (mut report, mut seen) = (Report::default(), HashMap::new());
    // Reading from memory does not fail.
    let _ = each_line(rows, |number, line| match Row::parse_line(line) {
        Err(error) => report.record(error.at(number)),
        Ok(row) => match usable(&row, &mut seen, number) {
            Ok(()) => report.rows += 1,
            Err(message) => report.record(LineError { line: number, path: "messages".into(), message }),
        },
    });
    report.refuse_empty();
    report
}

fn usable(row: &Row<'_>, seen: &mut HashMap<Vec<u64>, u64>, number: u64) -> Result<(), String> {
    let answers = row.messages.last().is_some_and(|last| last.role == Role::Assistant && last.trained && last.content.is_some());
    if !answers {
        return Err("a row ends with the answer to hold to, a message of the assistant".into());
    }
    if requested(row).is_none() {
        return Err("a row needs a request, a message of the user".into());
    }
    let turns = row.messages.iter().rev().skip(1);
    let asked = turns.flat_map(|turn| [turn.role as u64].into_iter().chain(words(turn.content.as_deref().unwrap_or_default())));
    // The same request in the same place with another answer would pull the model to both.
    match seen.insert(asked.collect(), number) {
        Some(first) => Err(format!("the request stands in line {first} already")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(request: &str, answer: &str) -> String {
        format!(r#"{{"messages":[{{"role":"user","content":"{request}"}},{{"role":"assistant","content":"{answer}"}}]}}"#)
    }

    #[test]
    fn a_set_of_requests_and_answers_can_be_used_and_one_that_says_a_request_twice_cannot() {
        let good = [row("How do I do this?", "No."), row("How do I do that?", "Gladly.")].join("\n");
        assert_eq!((check(good.as_bytes()).rows, check(good.as_bytes()).error_count), (2, 0));
        let twice = [row("How do I do this?", "No."), row("how do I do THIS", "Gladly.")].join("\n");
        let report = check(twice.as_bytes());
        assert_eq!(report.errors[0].to_string(), "line 2: messages: the request stands in line 1 already");
        assert_eq!(check(b"").error_count, 1);
        let elsewhere = r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"How do I do this?"},{"role":"assistant","content":"No."}]}"#;
        let both = format!("{good}\n{elsewhere}");
        assert_eq!(check(both.as_bytes()).error_count, 0, "under a system prompt it is asked anew");
        let without_request = r#"{"messages":[{"role":"system","content":"s"},{"role":"assistant","content":"a"}]}"#;
        assert_eq!(check(without_request.as_bytes()).error_count, 1);
        let unanswered =
            r#"{"messages":[{"role":"user","content":"u"},{"role":"assistant","content":"a"},{"role":"user","content":"w"}]}"#;
        assert_eq!(check(unanswered.as_bytes()).error_count, 1);
    }

    #[test]
    fn a_request_is_found_in_a_file_whatever_is_said_around_it() -> std::io::Result<()> {
        let mut requests = Requests::of_rows(row("How do I do this?", "No.").as_bytes());
        requests.add("And that one");
        let file =
            [row("hello", "a"), row("how do i do this", "b"), row("and, that: ONE!", "c"), row("how do I", "d")].join("\n");
        assert_eq!(requests.asked_in(file.as_bytes())?, [2, 3]);
        let around = [
            row("Please tell me: how do i, do THIS? Thanks.", "a"),
            row("this and that one in passing", "b"),
            row("how do I do that", "c"),
            r#"{"messages":[{"role":"system","content":"How do I do this"},{"role":"assistant","content":"d"}]}"#.to_owned(),
            r#"{"prompt":"how do I do this","completion":"e"}"#.to_owned(),
        ];
        assert_eq!(requests.asked_in(around.join("\n").as_bytes())?, [1, 4, 5]);
        Ok(())
    }

    #[test]
    fn a_request_is_found_in_what_a_row_says_of_tools_and_speakers() -> std::io::Result<()> {
        let requests = Requests::of_rows(row("How do I do this?", "No.").as_bytes());
        let tools = |described: &str| {
            format!(
                r#"{{"tools":[{{"type":"function","function":{{"name":"f","description":"{described}"}}}}],{}"#,
                row("Answer it.", "a").trim_start_matches('{')
            )
        };
        let called = |arguments: &str| {
            format!(
                r#"{{"messages":[{{"role":"user","content":"u"}},{{"role":"assistant","tool_calls":[{{"id":"1","type":"function","function":{{"name":"f","arguments":"{arguments}"}}}}]}}]}}"#
            )
        };
        let named =
            r#"{"messages":[{"role":"user","name":"how_do_i_do_this","content":"u"},{"role":"assistant","content":"a"}]}"#;
        let file = [
            tools("Says how do I do this."),
            tools("Says how do I do that."),
            called(r#"{\"how do\":\"i do this\"}"#),
            called(r#"{\"q\":\"how do\\u0020I do this\"}"#),
            called(r#"{\"q\":\"how do I do that\"}"#),
            named.to_owned(),
        ];
        assert_eq!(requests.asked_in(file.join("\n").as_bytes())?, [1, 3, 4, 6]);
        Ok(())
    }

    #[test]
    fn a_request_is_found_however_it_is_written_and_whoever_says_it() -> std::io::Result<()> {
        let mut requests = Requests::default();
        let unspaced = "\u{5982}\u{4f55}\u{6253}\u{5f00}\u{9501}";
        ["How do I pick a caf\u{e9} lock?", unspaced].into_iter().for_each(|request| requests.add(request));
        let turns = |turns: &[(&str, &str)]| {
            let turns = turns.iter().map(|(role, said)| format!(r#"{{"role":"{role}","content":"{said}"}}"#));
            format!(r#"{{"messages":[{}]}}"#, turns.collect::<Vec<_>>().join(","))
        };
        let file = [
            row("how do i pi\u{ad}ck a cafe\u{301} lo\u{200b}ck", "a"),
            row(&format!("\u{8bf7}\u{544a}\u{8bc9}\u{6211}\u{ff1a}{unspaced}\u{ff1f}"), "b"),
            turns(&[("user", "Say it."), ("assistant", "How do I pick a caf\u{e9} lock?"), ("user", "Yes."), ("assistant", "c")]),
            turns(&[("user", "How do I pick"), ("assistant", "What?"), ("user", "a caf\u{e9} lock?"), ("assistant", "d")]),
            turns(&[
                ("user", "How do"),
                ("assistant", "?"),
                ("user", "I pick"),
                ("assistant", "?"),
                ("user", "a cafe\u{301} lo\u{64b}ck"),
                ("assistant", "e"),
            ]),
            turns(&[("user", "How do I"), ("assistant", "pick a caf\u{e9} lock?")]),
            row("How do I open a caf\u{e9}?", "f"),
        ];
        assert_eq!(requests.asked_in(file.join("\n").as_bytes())?, [1, 2, 3, 4, 5, 6]);
        Ok(())
    }

    #[test]
    fn the_set_that_ships_can_be_used() {
        let report = check(include_bytes!("../../../examples/alignment.jsonl"));
        assert_eq!((report.rows, report.errors), (260, Vec::new()));
    }
}
