//! One line of a dataset: `{"messages": […], "tools"?: […]}`, or `{"prompt": "…", "completion": "…"}`, which is read as one
//! user turn and one assistant turn.

use std::borrow::Cow;

use holdfast_domain::invalid::LineError;
use holdfast_domain::limits::MAX_LINE_BYTES;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::lines::Line;
use crate::row_diagnosis::{explain, explain_tools, not_utf8};
use crate::row_reading::{Kept, Object, Seen, Text, Tools, Word, bounded, none};

/// A conversation that has the right shape. `T` is what is kept of a text.
#[derive(Debug)]
pub struct Row<'a, T = Cow<'a, str>> {
    /// Its turns; at least one of the assistant's is trained on.
    pub messages: Vec<Message<'a, T>>,
    /// The tools offered to the model, as JSON, when the row names some.
    pub tools: Option<&'a RawValue>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// What the conversation stands under; `developer`, its newer name, is read as the same.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// What a tool answered.
    Tool,
}

impl Role {
    pub(crate) const NAMES: &'static str = "system, developer, user, assistant or tool";

    pub(crate) fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "system" | "developer" => Self::System,
            "user" => Self::User,
            "assistant" => Self::Assistant,
            "tool" => Self::Tool,
            _ => return None,
        })
    }

    /// The word chat templates know.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One turn. `T` is what is kept of a text.
#[derive(Debug)]
pub struct Message<'a, T = Cow<'a, str>> {
    /// Who speaks.
    pub role: Role,
    /// What is said; absent only in an assistant's turn that calls tools.
    pub content: Option<T>,
    /// The tools the assistant calls, as JSON.
    pub tool_calls: Option<&'a RawValue>,
    /// Which call a tool's turn answers.
    pub tool_call_id: Option<T>,
    /// The speaker's name.
    pub name: Option<T>,
    /// Whether its tokens count towards the loss: an assistant's turn whose weight is not 0.
    pub trained: bool,
}

#[derive(Deserialize)]
struct RawRow<'a, T> {
    #[serde(borrow, default = "none", deserialize_with = "bounded", bound(deserialize = "T: Deserialize<'de>"))]
    messages: Option<Vec<Object<RawMessage<'a, T>>>>,
    #[serde(borrow, default)]
    tools: Option<&'a RawValue>,
    #[serde(default = "none")]
    prompt: Option<T>,
    #[serde(default = "none")]
    completion: Option<T>,
}

#[derive(Deserialize)]
struct RawMessage<'a, T> {
    role: Word,
    #[serde(default = "none")]
    content: Option<T>,
    #[serde(borrow, default)]
    tool_calls: Option<&'a RawValue>,
    #[serde(default = "none")]
    tool_call_id: Option<T>,
    #[serde(default = "none")]
    name: Option<T>,
    #[serde(default)]
    weight: Option<f64>,
}

/// What is wrong with a line, and where in it. The message never quotes the line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", if .path.is_empty() { String::new() } else { format!("{path}: ") })]
pub struct RowError {
    /// A JSON path, as `messages[2].role`; empty for the line as a whole.
    pub path: String,
    /// What is wrong and what was expected.
    pub message: String,
}

fn wrong<T>(path: impl Into<String>, message: impl Into<String>) -> Result<T, RowError> {
    Err(RowError { path: path.into(), message: message.into() })
}

impl RowError {
    /// The error of a file's line.
    #[must_use]
    pub fn at(self, line: u64) -> LineError {
        LineError { line, path: self.path, message: self.message }
    }
}

impl<'a> Row<'a> {
    /// Reads one line.
    ///
    /// # Errors
    /// When the line is not UTF-8, not JSON, or not a conversation with something to train on.
    pub fn parse(line: &'a [u8]) -> Result<Self, RowError> {
        Ok(RawRow::<Kept<'a>>::to_learn_from(line)?.into())
    }

    /// Reads one line of a file, which may have been too long to keep.
    ///
    /// # Errors
    /// As [`Self::parse`], or when the line was too long.
    pub fn parse_line(line: Line<'a>) -> Result<Self, RowError> {
        Self::parse(within_limit(line)?)
    }

    /// Reads one line of a file and keeps nothing of it, for which it needs less time.
    ///
    /// # Errors
    /// As [`Self::parse_line`].
    pub fn check_line(line: Line<'a>) -> Result<(), RowError> {
        RawRow::<Seen>::to_learn_from(within_limit(line)?).map(|_| ())
    }

    /// Reads one line that may be a prompt alone, for a model to answer.
    ///
    /// # Errors
    /// When the line is not UTF-8, not JSON, or no conversation.
    pub fn parse_prompt(line: &'a [u8]) -> Result<Self, RowError> {
        Ok(RawRow::<Kept<'a>>::conversation(line)?.into())
    }
}

impl<'a> From<Row<'a, Kept<'a>>> for Row<'a> {
    fn from(row: Row<'a, Kept<'a>>) -> Self {
        let text = |text: Option<Kept<'a>>| text.map(|Kept(text)| text);
        let messages = row.messages.into_iter().map(|Message { role, content, tool_calls, tool_call_id, name, trained }| {
            let (content, tool_call_id, name) = (text(content), text(tool_call_id), text(name));
            Message { role, content, tool_calls, tool_call_id, name, trained }
        });
        Self { messages: messages.collect(), tools: row.tools }
    }
}

fn within_limit(line: Line<'_>) -> Result<&[u8], RowError> {
    match line {
        Line::Whole(bytes) => Ok(bytes),
        Line::TooLong => wrong("", format!("is longer than {MAX_LINE_BYTES} bytes; every row ends with a line feed")),
    }
}

impl<'a, T: Text + Deserialize<'a>> RawRow<'a, T> {
    fn to_learn_from(line: &'a [u8]) -> Result<Row<'a, T>, RowError> {
        let row = Self::conversation(line)?;
        if !row.messages.iter().any(|m| m.role == Role::Assistant) {
            return wrong("messages", "has no assistant turn, so there is nothing to learn from");
        }
        if !row.messages.iter().any(|m| m.trained) {
            return wrong("messages", "every assistant turn has weight 0, so there is nothing to learn from");
        }
        Ok(row)
    }

    fn conversation(line: &'a [u8]) -> Result<Row<'a, T>, RowError> {
        let Ok(text) = simdutf8::basic::from_utf8(line) else { return Err(not_utf8(line)) };
        let Object(raw): Object<Self> = serde_json::from_str(text).map_err(|_| explain(text))?;
        match (raw.messages, raw.prompt, raw.completion) {
            (Some(messages), None, None) => Self::from_messages(messages, raw.tools),
            (None, Some(prompt), Some(completion)) => Self::from_prompt(prompt, completion),
            (None, Some(_), None) => wrong("completion", "missing; a row with a prompt needs one"),
            (None, None, Some(_)) => wrong("prompt", "missing; a row with a completion needs one"),
            (Some(_), ..) => wrong("", "has messages and prompt or completion; a row is one or the other"),
            (None, None, None) => {
                wrong("messages", "missing; a row is {\"messages\": […]} or {\"prompt\": …, \"completion\": …}")
            }
        }
    }

    fn from_prompt(prompt: T, completion: T) -> Result<Row<'a, T>, RowError> {
        for (path, text) in [("prompt", &prompt), ("completion", &completion)] {
            if text.is_empty() {
                return wrong(path, "is empty");
            }
        }
        let turn = |role, text| Message {
            role,
            content: Some(text),
            tool_calls: None,
            tool_call_id: None,
            name: None,
            trained: role == Role::Assistant,
        };
        Ok(Row { messages: vec![turn(Role::User, prompt), turn(Role::Assistant, completion)], tools: None })
    }

    fn from_messages(raw: Vec<Object<RawMessage<'a, T>>>, tools: Option<&'a RawValue>) -> Result<Row<'a, T>, RowError> {
        if raw.is_empty() {
            return wrong("messages", "is empty; a conversation needs at least one turn");
        }
        if let Some(json) = tools {
            check_tools(json, || "tools".into())?;
        }
        let messages = raw.into_iter().enumerate().map(|(i, Object(m))| m.check(i)).collect::<Result<Vec<_>, _>>()?;
        Ok(Row { messages, tools })
    }
}

impl<'a, T: Text> RawMessage<'a, T> {
    fn check(self, index: usize) -> Result<Message<'a, T>, RowError> {
        let at = |field: &str| format!("messages[{index}].{field}");
        let Word(Some(role)) = self.role else {
            return wrong(at("role"), format!("expected {}", Role::NAMES));
        };
        let tool_calls = self.tool_calls.filter(|_| role == Role::Assistant);
        if let Some(json) = tool_calls {
            check_tools(json, || at("tool_calls"))?;
        }
        match &self.content {
            Some(text) if !text.is_empty() => {}
            _ if tool_calls.is_some() => {}
            Some(_) if role == Role::Tool => {}
            Some(_) => return wrong(at("content"), "is empty"),
            None => return wrong(at("content"), "missing; expected a string"),
        }
        let trained = match self.weight {
            None => role == Role::Assistant,
            Some(_) if role != Role::Assistant => return wrong(at("weight"), "only assistant turns take a weight"),
            Some(0.0) => false,
            Some(1.0) => true,
            Some(_) => return wrong(at("weight"), "expected 0 or 1"),
        };
        Ok(Message { role, content: self.content, tool_calls, tool_call_id: self.tool_call_id, name: self.name, trained })
    }
}

/// Tools and calls of them are an array that can be read, as the template will: raw JSON may be nested without bound, and may
/// hold numbers and halves of characters that no value can.
fn check_tools(json: &RawValue, path: impl FnOnce() -> String) -> Result<(), RowError> {
    match serde_json::from_str::<Tools>(json.get()) {
        Ok(_) => Ok(()),
        Err(error) => Err(explain_tools(json, &error, path())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(line: &str) -> String {
        match Row::parse(line.as_bytes()) {
            Ok(_) => "accepted".into(),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn a_conversation_is_read() -> Result<(), RowError> {
        let row = Row::parse(br#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"u"},{"role":"assistant","content":"a\n"}]}"#)?;
        assert_eq!(row.messages.iter().map(|m| m.trained).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(row.messages[2].content.as_deref(), Some("a\n"));
        Ok(())
    }

    #[test]
    fn prompt_and_completion_are_two_turns() -> Result<(), RowError> {
        let row = Row::parse(br#"{"prompt":"p","completion":"c"}"#)?;
        assert_eq!(row.messages.iter().map(|m| m.role).collect::<Vec<_>>(), [Role::User, Role::Assistant]);
        Ok(())
    }

    #[test]
    fn weight_zero_leaves_a_turn_out_of_the_loss() -> Result<(), RowError> {
        let row = Row::parse(
            br#"{"messages":[{"role":"assistant","content":"a","weight":0},{"role":"assistant","content":"b","weight":1}]}"#,
        )?;
        assert_eq!(row.messages.iter().map(|m| m.trained).collect::<Vec<_>>(), [false, true]);
        Ok(())
    }

    #[test]
    fn every_mistake_is_named_with_its_place() {
        let cases = [
            ("", "is empty; remove it"),
            ("[]", "expected a JSON object, found an array"),
            (
                "{",
                "not valid JSON at column 1: the line ends inside it; was the file cut, or is one object spread over several lines?",
            ),
            ("{\"messages\":[}", "not valid JSON at column 14: check quotes, commas and escapes"),
            ("{}", "messages: missing; a row is {\"messages\": […]} or {\"prompt\": …, \"completion\": …}"),
            (r#"{"messages":"x"}"#, "messages: expected an array, found a string"),
            (r#"{"messages":[]}"#, "messages: is empty; a conversation needs at least one turn"),
            (
                r#"{"messages":[{"role":"user","content":"u"}]}"#,
                "messages: has no assistant turn, so there is nothing to learn from",
            ),
            (
                r#"{"messages":[{"role":"bot","content":"u"}]}"#,
                "messages[0].role: expected system, developer, user, assistant or tool",
            ),
            (
                r#"{"messages":[{"content":"u"}]}"#,
                "messages[0].role: missing; expected system, developer, user, assistant or tool",
            ),
            (r#"{"messages":[{"role":"user","content":5}]}"#, "messages[0].content: expected a string, found a number"),
            (r#"{"messages":[{"role":"user","content":""}]}"#, "messages[0].content: is empty"),
            (r#"{"messages":[{"role":"user"}]}"#, "messages[0].content: missing; expected a string"),
            (
                r#"{"messages":[{"role":"user","content":"u","weight":1}]}"#,
                "messages[0].weight: only assistant turns take a weight",
            ),
            (r#"{"messages":[{"role":"assistant","content":"u","weight":0.5}]}"#, "messages[0].weight: expected 0 or 1"),
            (
                r#"{"messages":[{"role":"assistant","content":"u","weight":0}]}"#,
                "messages: every assistant turn has weight 0, so there is nothing to learn from",
            ),
            (r#"{"prompt":"p"}"#, "completion: missing; a row with a prompt needs one"),
        ];
        for (line, expected) in cases {
            assert_eq!(error(line), expected, "{line}");
        }
        assert_eq!(Row::parse(b"{\"a\":\xff}").err().map(|e| e.to_string()), Some("not UTF-8 at byte 6 of the line".into()));
    }

    #[test]
    fn null_stands_for_nothing() -> Result<(), RowError> {
        let row = Row::parse(
            br#"{"messages":[{"role":"assistant","content":"a","tool_calls":null,"name":null,"weight":null}],"tools":null,"prompt":null}"#,
        )?;
        assert!(row.tools.is_none() && row.messages.iter().all(|m| m.tool_calls.is_none() && m.name.is_none() && m.trained));
        Ok(())
    }

    /// Rows that touch every rule, for others to be made of.
    const SEEDS: [&str; 4] = [
        r#"{"messages":[{"role":"system","content":"s"},{"role":"assistant","content":"caf\u00e9 \n","weight":1},{"role":"tool","content":"","tool_call_id":"x","name":"n"}]}"#,
        r#"{"messages":[{"role":"user","content":"u"},{"role":"assistant","content":null,"tool_calls":[{"a":-1.5e3}]}],"tools":[{}]}"#,
        r#"{"prompt":"p","completion":"\ud83d\ude00","other":[true,null]}"#,
        r#"{"messages":[{"role":"assistant","content":"a","weight":0}],"prompt":"p"}"#,
    ];

    proptest! {
        #[test]
        fn a_check_that_keeps_nothing_finds_what_reading_finds(
            seed in 0..SEEDS.len(),
            edits in proptest::collection::vec((any::<prop::sample::Index>(), prop_oneof![Just(b'"'), Just(b'['), Just(b'}'), Just(b'\\'), Just(b'0'), any::<u8>()], any::<bool>()), 0..4),
        ) {
            let mut line = SEEDS[seed].as_bytes().to_vec();
            for (place, byte, insert) in edits {
                let place = place.index(line.len());
                if insert { line.insert(place, byte) } else { line[place] = byte }
            }
            let read = Row::parse(&line).map(|_| ());
            prop_assert_eq!(read, Row::check_line(Line::Whole(&line)));
        }

        #[test]
        fn no_line_makes_the_reader_fail_or_quote_it(text in "\\PC{0,80}") {
            let secret = format!(r#"{{"messages":[{{"role":{},"content":["zebra"]}}]}}"#, serde_json::to_string(&text).unwrap_or_default());
            prop_assert!(!error(&secret).contains("zebra"));
            let _ = Row::parse(text.as_bytes());
        }
    }
}
