//! One line of a dataset: `{"messages": […], "tools"?: […]}`, or `{"prompt": "…", "completion": "…"}`, which is read as one
//! user turn and one assistant turn.

use std::borrow::Cow;

use holdfast_domain::limits::{MAX_LINE_BYTES, MAX_MESSAGES_PER_ROW};
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::lines::Line;
use crate::row_diagnosis::explain;

/// A conversation that has the right shape.
#[derive(Debug)]
pub struct Row<'a> {
    /// Its turns; at least one of the assistant's is trained on.
    pub messages: Vec<Message<'a>>,
    /// The tools offered to the model, as JSON, when the row names some.
    pub tools: Option<&'a RawValue>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The frame of the conversation; `developer`, its newer name, is read as the same.
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

    fn parse(word: &str) -> Option<Self> {
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

/// One turn.
#[derive(Debug)]
pub struct Message<'a> {
    /// Who speaks.
    pub role: Role,
    /// What is said; absent only in an assistant's turn that calls tools.
    pub content: Option<Cow<'a, str>>,
    /// The tools the assistant calls, as JSON.
    pub tool_calls: Option<&'a RawValue>,
    /// Which call a tool's turn answers.
    pub tool_call_id: Option<Cow<'a, str>>,
    /// The speaker's name.
    pub name: Option<Cow<'a, str>>,
    /// Whether its tokens count towards the loss: an assistant's turn whose weight is not 0.
    pub trained: bool,
}

#[derive(Deserialize)]
struct RawRow<'a> {
    #[serde(borrow, default, deserialize_with = "bounded")]
    messages: Option<Vec<Object<RawMessage<'a>>>>,
    #[serde(borrow, default)]
    tools: Option<&'a RawValue>,
    #[serde(borrow, default)]
    prompt: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    completion: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct RawMessage<'a> {
    #[serde(borrow)]
    role: Cow<'a, str>,
    #[serde(borrow, default)]
    content: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    tool_calls: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tool_call_id: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    name: Option<Cow<'a, str>>,
    #[serde(default)]
    weight: Option<f64>,
}

/// A struct that is written as a JSON object. Derived code would take an array of its fields as well.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FromMap<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for FromMap<T> {
            type Value = T;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_map(FromMap(std::marker::PhantomData)).map(Self)
    }
}

/// Messages, as long as there are not too many of them to keep.
fn bounded<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Object<RawMessage<'de>>>>, D::Error> {
    struct Messages;
    impl<'de> Visitor<'de> for Messages {
        type Value = Option<Vec<Object<RawMessage<'de>>>>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "at most {MAX_MESSAGES_PER_ROW} messages")
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut messages = Vec::new();
            while let Some(message) = list.next_element()? {
                if messages.len() == MAX_MESSAGES_PER_ROW {
                    return Err(serde::de::Error::invalid_length(messages.len() + 1, &self));
                }
                messages.push(message);
            }
            Ok(Some(messages))
        }
    }
    deserializer.deserialize_any(Messages)
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

impl<'a> Row<'a> {
    /// Reads one line.
    ///
    /// # Errors
    /// When the line is not UTF-8, not JSON, or not a conversation with something to train on.
    pub fn parse(line: &'a [u8]) -> Result<Self, RowError> {
        let row = Self::parse_prompt(line)?;
        if !row.messages.iter().any(|m| m.role == Role::Assistant) {
            return wrong("messages", "has no assistant turn, so there is nothing to learn from");
        }
        if !row.messages.iter().any(|m| m.trained) {
            return wrong("messages", "every assistant turn has weight 0, so there is nothing to learn from");
        }
        Ok(row)
    }

    /// Reads one line of a file, which may have been too long to keep.
    ///
    /// # Errors
    /// As [`Self::parse`], or when the line was too long.
    pub fn parse_line(line: Line<'a>) -> Result<Self, RowError> {
        match line {
            Line::Whole(bytes) => Self::parse(bytes),
            Line::TooLong => wrong("", format!("is longer than {MAX_LINE_BYTES} bytes")),
        }
    }

    /// Reads one line that may be a prompt alone, for a model to answer.
    ///
    /// # Errors
    /// When the line is not UTF-8, not JSON, or no conversation.
    pub fn parse_prompt(line: &'a [u8]) -> Result<Self, RowError> {
        let text = match std::str::from_utf8(line) {
            Ok(text) => text,
            Err(e) => return wrong("", format!("not UTF-8 at byte {} of the line", e.valid_up_to() + 1)),
        };
        let Object(raw): Object<RawRow<'a>> = serde_json::from_str(text).map_err(|e| explain(text, &e))?;
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

    fn from_prompt(prompt: Cow<'a, str>, completion: Cow<'a, str>) -> Result<Self, RowError> {
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
        Ok(Self { messages: vec![turn(Role::User, prompt), turn(Role::Assistant, completion)], tools: None })
    }

    fn from_messages(raw: Vec<Object<RawMessage<'a>>>, tools: Option<&'a RawValue>) -> Result<Self, RowError> {
        if raw.is_empty() {
            return wrong("messages", "is empty; a conversation needs at least one turn");
        }
        if tools.is_some_and(|json| !json.get().starts_with('[') && json.get() != "null") {
            return wrong("tools", "expected an array");
        }
        let messages = raw.into_iter().enumerate().map(|(i, Object(m))| m.check(i)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { messages, tools: tools.filter(|json| json.get() != "null") })
    }
}

impl<'a> RawMessage<'a> {
    fn check(self, index: usize) -> Result<Message<'a>, RowError> {
        let at = |field: &str| format!("messages[{index}].{field}");
        let Some(role) = Role::parse(&self.role) else {
            return wrong(at("role"), format!("expected {}", Role::NAMES));
        };
        let calls_tools = role == Role::Assistant && self.tool_calls.is_some_and(|json| json.get() != "null");
        match &self.content {
            Some(text) if !text.is_empty() => {}
            _ if calls_tools => {}
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
        Ok(Message {
            role,
            content: self.content,
            tool_calls: self.tool_calls.filter(|_| calls_tools),
            tool_call_id: self.tool_call_id,
            name: self.name,
            trained,
        })
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

    proptest! {
        #[test]
        fn no_line_makes_the_reader_fail_or_quote_it(text in "\\PC{0,80}") {
            let secret = format!(r#"{{"messages":[{{"role":{},"content":["zebra"]}}]}}"#, serde_json::to_string(&text).unwrap_or_default());
            prop_assert!(!error(&secret).contains("zebra"));
            let _ = Row::parse(text.as_bytes());
        }
    }
}
