//! Why a line did not parse. Runs only on lines that failed, so it can afford to read them again: serde's own messages name
//! no path and may quote what they found. Values are looked at one by one as raw text, so that a hostile line costs no more
//! memory than its own length.

use std::fmt;

use holdfast_domain::limits::MAX_MESSAGES_PER_ROW;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::row::{Role, RowError};

#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow, default)]
    messages: Option<&'a RawValue>,
    #[serde(borrow, default)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow, default)]
    completion: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct MessageFields<'a> {
    #[serde(borrow, default)]
    role: Option<&'a RawValue>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tool_call_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    weight: Option<&'a RawValue>,
}

const TWICE: &str = "a key stands twice in one object";

/// What is wrong with `text`, which serde refused with `error`.
pub(crate) fn explain(text: &str, error: &serde_json::Error) -> RowError {
    if text.trim().is_empty() {
        return whole("is empty; remove it");
    }
    if serde_json::from_str::<IgnoredAny>(text).is_err() {
        let what = if error.is_eof() {
            "the line ends inside it; was the file cut, or is one object spread over several lines?"
        } else {
            "check quotes, commas and escapes"
        };
        return whole(format!("not valid JSON at column {}: {what}", error.column()));
    }
    if kind(text) != Kind::Object {
        return whole(format!("expected a JSON object, found {}", kind(text)));
    }
    let Ok(row) = serde_json::from_str::<Fields<'_>>(text) else { return whole(TWICE) };
    for (field, value) in [("prompt", row.prompt), ("completion", row.completion)] {
        if let Some(found) = value.filter(|v| kind(v.get()) != Kind::String) {
            return mistyped(field, "a string", found);
        }
    }
    match row.messages {
        Some(list) if kind(list.get()) == Kind::Array => {
            serde_json::Deserializer::from_str(list.get()).deserialize_seq(FirstMistake).ok().flatten().unwrap_or(whole(TWICE))
        }
        Some(found) => mistyped("messages", "an array", found),
        None => whole(TWICE),
    }
}

/// The first message that is wrong, if one is.
struct FirstMistake;

impl<'de> Visitor<'de> for FirstMistake {
    type Value = Option<RowError>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let (mut mistake, mut count) = (None, 0);
        while let Some(message) = list.next_element::<&RawValue>()? {
            if mistake.is_none() {
                mistake = message_mistake(count, message);
            }
            count += 1;
        }
        if count > MAX_MESSAGES_PER_ROW {
            let message = format!("has {count} entries; at most {MAX_MESSAGES_PER_ROW} are accepted");
            return Ok(Some(RowError { path: "messages".into(), message }));
        }
        Ok(mistake)
    }
}

fn message_mistake(index: usize, message: &RawValue) -> Option<RowError> {
    if kind(message.get()) != Kind::Object {
        return Some(mistyped(format!("messages[{index}]"), "an object with role and content", message));
    }
    let Ok(fields) = serde_json::from_str::<MessageFields<'_>>(message.get()) else {
        return Some(RowError { path: format!("messages[{index}]"), message: TWICE.into() });
    };
    let at = |field: &str| format!("messages[{index}].{field}");
    let Some(role) = fields.role else {
        return Some(RowError { path: at("role"), message: format!("missing; expected {}", Role::NAMES) });
    };
    let texts = [("role", Some(role)), ("content", fields.content), ("name", fields.name), ("tool_call_id", fields.tool_call_id)];
    for (field, value) in texts {
        if let Some(found) = value.filter(|v| kind(v.get()) != Kind::String) {
            let parts = field == "content" && kind(found.get()) == Kind::Array;
            let expected = if parts { "a string; content in parts is not supported" } else { "a string" };
            return Some(mistyped(at(field), expected, found));
        }
    }
    fields.weight.filter(|v| kind(v.get()) != Kind::Number).map(|found| mistyped(at("weight"), "0 or 1", found))
}

fn whole(message: impl Into<String>) -> RowError {
    RowError { path: String::new(), message: message.into() }
}

fn mistyped(path: impl Into<String>, expected: &str, found: &RawValue) -> RowError {
    RowError { path: path.into(), message: format!("expected {expected}, found {}", kind(found.get())) }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Null,
    Boolean,
    Number,
    String,
    Array,
    Object,
}

/// What a JSON value is, by its first character.
fn kind(json: &str) -> Kind {
    match json.trim_start().as_bytes().first() {
        Some(b'{') => Kind::Object,
        Some(b'[') => Kind::Array,
        Some(b'"') => Kind::String,
        Some(b't' | b'f') => Kind::Boolean,
        Some(b'n') | None => Kind::Null,
        Some(_) => Kind::Number,
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "null",
            Self::Boolean => "a boolean",
            Self::Number => "a number",
            Self::String => "a string",
            Self::Array => "an array",
            Self::Object => "an object",
        })
    }
}
