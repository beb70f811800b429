//! Rows of a job's validation file as something to ask: what the model makes of the task itself.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use holdfast_domain::evaluation::Answer;
use holdfast_domain::plan::paths;
use holdfast_store::queue::Claim;
use serde_json::{Value, json};

/// What its files are called in the job folder. Its answers are made of its owner's rows, and go with the folder.
pub(crate) const TASK: &str = "task";
/// Rows that are asked at most.
const MOST_ROWS: usize = 100;
/// Bytes of an answer that can be compared: a longer one may not end within the tokens of an answer.
const LONGEST_ANSWER: usize = 96;
/// Bytes of a row: what is measured in passing must not take longer than what decides.
const LONGEST_ROW: usize = 1000;

/// Rows to ask, and what they say.
pub(crate) struct Task {
    /// JSON lines without their last message.
    pub(crate) prompts: String,
    /// That message of each.
    pub(crate) expected: Vec<String>,
}

impl Task {
    /// The first rows of the job's validation file that end in a short answer; `None` where there are none.
    pub(crate) async fn of(claim: &Claim, folder: &Path) -> std::io::Result<Option<Self>> {
        if claim.validation.is_none() {
            return Ok(None);
        }
        let path = folder.join(paths::VALIDATION);
        // A tenant's file may be large, and the lease is renewed on this thread.
        tokio::task::spawn_blocking(move || Self::read(path)).await.map_err(std::io::Error::other)?
    }

    fn read(path: PathBuf) -> std::io::Result<Option<Self>> {
        let mut task = Self { prompts: String::new(), expected: Vec::new() };
        for line in BufReader::new(File::open(path)?).lines() {
            if let Some((prompt, answer)) = taken_apart(&line?) {
                task.prompts += &prompt;
                task.prompts.push('\n');
                task.expected.push(answer);
            }
            if task.expected.len() == MOST_ROWS {
                break;
            }
        }
        Ok((!task.expected.is_empty()).then_some(task))
    }

    /// Which answers say what the rows do.
    pub(crate) fn right(&self, answers: &[Answer]) -> Vec<bool> {
        self.expected.iter().zip(answers).map(|(expected, answer)| words(expected) == words(&answer.text)).collect()
    }
}

/// A row without its last message, and that message, where it is a short answer in words.
fn taken_apart(line: &str) -> Option<(String, String)> {
    if line.len() > LONGEST_ROW {
        return None;
    }
    let row: Value = serde_json::from_str(line).ok()?;
    let mut row = match (&row["prompt"], &row["completion"]) {
        (Value::String(prompt), Value::String(completion)) => json!({"messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]}),
        _ => row,
    };
    let last = row.get_mut("messages")?.as_array_mut()?.pop()?;
    let answer = last["content"]
        .as_str()
        .filter(|_| last["role"] == "assistant" && last["tool_calls"].is_null() && last["weight"] != 0)?;
    let fits = !answer.trim().is_empty() && answer.len() <= LONGEST_ANSWER;
    let answer = answer.to_owned();
    let asks = row["messages"].as_array().and_then(|rest| rest.last()).is_some_and(|message| message["role"] == "user");
    (fits && asks).then(|| (row.to_string(), answer))
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_with_short_answers_are_asked_and_compared_but_for_case_and_spaces() -> std::io::Result<()> {
        let row = |answer: &str| {
            json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}).to_string()
        };
        let file = tempfile::NamedTempFile::new()?;
        let unusable = [row(&"long ".repeat(40)), "nonsense".to_owned()];
        let last = r#"{"prompt":"q","completion":"bad"}"#.to_owned();
        std::fs::write(file.path(), [&[row("Good film")], &unusable[..], &[last]].concat().join("\n"))?;
        let task = Task::read(file.path().to_owned())?.ok_or(std::io::ErrorKind::NotFound)?;
        assert_eq!(task.expected, ["Good film", "bad"]);
        for prompt in task.prompts.lines() {
            assert_eq!(serde_json::from_str::<Value>(prompt)?, json!({"messages": [{"role": "user", "content": "q"}]}));
        }
        let said = |text: &str| Answer { text: text.into(), ids: Vec::new() };
        assert_eq!(task.right(&[said(" good\nFILM"), said("bad one")]), [true, false]);
        Ok(())
    }
}
