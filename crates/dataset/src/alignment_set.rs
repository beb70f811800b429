//! Alignment sets: what makes one usable, and whether their requests stand in a tenant's file.

use std::collections::HashMap;
use std::io::Read;

use holdfast_domain::invalid::LineError;
use sha2::{Digest, Sha256};

use crate::check::{Report, each_line};
use crate::row::{Role, Row};

/// Requests that must not be trained on, by hashes of what they say.
#[derive(Debug, Clone, Default)]
pub struct Requests(HashMap<u128, u64>);

impl Requests {
    /// The requests of an alignment set's rows; lines that are no rows have none.
    #[must_use]
    pub fn of_rows(rows: &[u8]) -> Self {
        let mut requests = Self::default();
        // Reading from memory does not fail.
        let _ = each_line(rows, |number, line| {
            if let Ok(row) = Row::parse_line(line) {
                for said in asked(&row) {
                    requests.0.entry(said).or_insert(number);
                }
            }
        });
        requests
    }

    /// Adds a request by itself.
    pub fn add(&mut self, request: &str) {
        self.0.entry(said(request)).or_insert(0);
    }

    /// The lines of a file in which one of them is asked, in whatever spelling.
    ///
    /// # Errors
    /// Only those of reading the file.
    pub fn asked_in(&self, file: impl Read) -> std::io::Result<Vec<u64>> {
        let mut lines = Vec::new();
        each_line(file, |number, line| {
            let asked = Row::parse_line(line).is_ok_and(|row| asked(&row).any(|said| self.0.contains_key(&said)));
            if asked {
                lines.push(number);
            }
        })?;
        Ok(lines)
    }
}

/// Checks the rows of an alignment set: each a request and its answer, none twice.
#[must_use]
pub fn check(rows: &[u8]) -> Report {
    let (mut report, mut seen) = (Report::default(), Requests::default());
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

fn usable(row: &Row<'_>, seen: &mut Requests, number: u64) -> Result<(), String> {
    let answers = row.messages.last().is_some_and(|last| last.role == Role::Assistant && last.trained && last.content.is_some());
    if !answers {
        return Err("a row ends with the answer to hold to, a message of the assistant".into());
    }
    // The same request with another answer would pull the model to both.
    let whole: Vec<u128> = asked(row).collect();
    let Some(last) = whole.last() else { return Err("a row needs a request, a message of the user".into()) };
    match seen.0.insert(*last, number) {
        Some(first) => Err(format!("the request stands in line {first} already")),
        None => Ok(()),
    }
}

/// What the user says in a row, turn by turn.
fn asked<'a>(row: &'a Row<'_>) -> impl Iterator<Item = u128> + 'a {
    row.messages.iter().filter(|message| message.role == Role::User).filter_map(|message| message.content.as_deref().map(said))
}

/// The first half of a SHA-256 over the words, whatever their case and what stands between them.
fn said(text: &str) -> u128 {
    let mut hash = Sha256::new();
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        hash.update(word.to_lowercase());
        hash.update([0]);
    }
    hash.finalize().iter().take(size_of::<u128>()).fold(0, |number, byte| number << 8 | u128::from(*byte))
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
        let without_request = r#"{"messages":[{"role":"system","content":"s"},{"role":"assistant","content":"a"}]}"#;
        assert_eq!(check(without_request.as_bytes()).error_count, 1);
        let unanswered =
            r#"{"messages":[{"role":"user","content":"u"},{"role":"assistant","content":"a"},{"role":"user","content":"w"}]}"#;
        assert_eq!(check(unanswered.as_bytes()).error_count, 1);
    }

    #[test]
    fn a_request_is_found_in_a_file_in_whatever_spelling() -> std::io::Result<()> {
        let mut requests = Requests::of_rows(row("How do I do this?", "No.").as_bytes());
        requests.add("And that one");
        let file =
            [row("hello", "a"), row("how do i do this", "b"), row("and, that: ONE!", "c"), row("how do I", "d")].join("\n");
        assert_eq!(requests.asked_in(file.as_bytes())?, [2, 3]);
        Ok(())
    }

    #[test]
    fn the_set_that_ships_can_be_used() {
        let report = check(include_bytes!("../../../examples/alignment.jsonl"));
        assert_eq!((report.rows, report.errors), (260, Vec::new()));
    }
}
