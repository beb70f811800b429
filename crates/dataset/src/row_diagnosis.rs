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
    // Named so that a second one is noticed.
    #[serde(borrow, default, rename = "tools")]
    _tools: Option<&'a RawValue>,
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
    #[serde(borrow, default, rename = "tool_calls")]
    _tool_calls: Option<&'a RawValue>,
}

const HALF_CHARACTER: &str =
    "an escape from \\ud800 to \\udfff stands without its other half; write the whole character or remove it";

/// Why a line is not UTF-8.
pub(crate) fn not_utf8(line: &[u8]) -> RowError {
    let at = std::str::from_utf8(line).map_or_else(|e| e.valid_up_to(), str::len) + 1;
    let utf16 = line.starts_with(b"\xff\xfe") || line.starts_with(b"\xfe\xff");
    let fix = if utf16 { "; it is UTF-16, save the file as UTF-8" } else { "" };
    whole(format!("not UTF-8 at byte {at} of the line{fix}"))
}

/// What is wrong with `text`, which is no row by its types or by its syntax.
pub(crate) fn explain(text: &str) -> RowError {
    if text.starts_with('\u{feff}') {
        return whole("begins with a byte order mark; save the file as UTF-8 without one");
    }
    if text.trim().is_empty() {
        return whole("is empty; remove it");
    }
    if let Err(error) = serde_json::from_str::<IgnoredAny>(text) {
        return whole(format!("not valid JSON at column {}: {}", error.column(), syntax_mistake(text, &error)));
    }
    if kind(text) != Kind::Object {
        return whole(format!("expected a JSON object, found {}", kind(text)));
    }
    let row = match serde_json::from_str::<Fields<'_>>(text) {
        Ok(row) => row,
        Err(error) => return key_mistake("", &error),
    };
    for (field, value) in [("prompt", row.prompt), ("completion", row.completion)] {
        if let Some(mistake) = value.and_then(|found| text_mistake(field, "a string", found)) {
            return mistake;
        }
    }
    let mistake = match row.messages {
        Some(list) if kind(list.get()) == Kind::Array => {
            serde_json::Deserializer::from_str(list.get()).deserialize_seq(FirstMistake).ok().flatten()
        }
        Some(found) => Some(mistyped("messages", "an array", found)),
        None => None,
    };
    mistake.unwrap_or_else(|| whole("is no conversation"))
}

/// What is wrong with `json`, tools or calls of them at `path`, which serde refused with `error`.
pub(crate) fn explain_tools(json: &RawValue, error: &serde_json::Error, path: String) -> RowError {
    if kind(json.get()) != Kind::Array {
        return mistyped(path, "an array", json);
    }
    let said = error.to_string();
    let message = if said.starts_with("recursion limit") {
        "is nested deeper than 127 levels"
    } else if said.starts_with("number out of range") {
        "holds a number that is too large for 64 bits"
    } else {
        HALF_CHARACTER
    };
    RowError { path, message: message.into() }
}

/// What is wrong with the syntax of a line. serde's words for it are fixed ones; where it stopped says the rest.
fn syntax_mistake(text: &str, error: &serde_json::Error) -> &'static str {
    let said = error.to_string();
    if error.is_eof() {
        "the line ends inside it; was the file cut, or is one object spread over several lines?"
    } else if said.starts_with("control character") {
        "a control character stands in a string; write it as an escape, as \\n or \\u0000"
    } else if !said.starts_with("trailing characters") {
        "check quotes, commas and escapes"
    } else if text.get(..error.column()).is_some_and(|before| before.contains('\r')) {
        "the row before it ends with a carriage return alone; end every row with a line feed"
    } else {
        "the object ends before it; put every row on a line of its own"
    }
}

/// What is wrong with the keys of the object at `path`. The names that serde repeats are those that rows may have.
fn key_mistake(path: &str, error: &serde_json::Error) -> RowError {
    let said = error.to_string();
    let twice = said.strip_prefix("duplicate field `").and_then(|rest| rest.split_once('`'));
    let message = twice.map_or_else(|| HALF_CHARACTER.to_owned(), |(key, _)| format!("the key {key:?} stands twice; keep one"));
    RowError { path: path.into(), message }
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
    let fields = match serde_json::from_str::<MessageFields<'_>>(message.get()) {
        Ok(fields) => fields,
        Err(error) => return Some(key_mistake(&format!("messages[{index}]"), &error)),
    };
    let at = |field: &str| format!("messages[{index}].{field}");
    let Some(role) = fields.role else {
        return Some(RowError { path: at("role"), message: format!("missing; expected {}", Role::NAMES) });
    };
    let texts = [("role", Some(role)), ("content", fields.content), ("name", fields.name), ("tool_call_id", fields.tool_call_id)];
    let mut texts = texts.into_iter().filter_map(|(field, value)| Some((field, value?)));
    let mistake = texts.find_map(|(field, found)| {
        let parts = field == "content" && kind(found.get()) == Kind::Array;
        text_mistake(at(field), if parts { "a string; content in parts is not supported" } else { "a string" }, found)
    });
    mistake.or_else(|| {
        let weight = fields.weight?;
        match kind(weight.get()) {
            // One that is too large for 64 bits.
            Kind::Number if serde_json::from_str::<f64>(weight.get()).is_err() => {
                Some(RowError { path: at("weight"), message: "expected 0 or 1".into() })
            }
            Kind::Number => None,
            _ => Some(mistyped(at("weight"), "0 or 1", weight)),
        }
    })
}

/// What is wrong with a value that should be a string.
fn text_mistake(path: impl Into<String>, expected: &str, found: &RawValue) -> Option<RowError> {
    if kind(found.get()) != Kind::String {
        return Some(mistyped(path, expected, found));
    }
    let halved = serde_json::from_str::<String>(found.get()).is_err();
    halved.then(|| RowError { path: path.into(), message: HALF_CHARACTER.into() })
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
