//! What makes two rows the same: what the model is shown and learns from, not how the JSON is spelled.

use serde_json::Value;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::row::{Message, Row};

impl Row<'_> {
    /// The first half of the SHA-256 of the row's content: of every turn its role, content, tool calls, name, the call it
    /// answers and whether it is trained on; and the tools offered. Two spellings of one conversation have the same.
    #[must_use]
    pub fn identity(&self) -> u128 {
        let mut hash = Canonical(Sha256::new());
        hash.json(self.tools);
        for Message { role, content, tool_calls, tool_call_id, name, trained } in &self.messages {
            hash.text(Some(role.as_str()));
            hash.text(content.as_deref());
            hash.json(*tool_calls);
            hash.text(tool_call_id.as_deref());
            hash.text(name.as_deref());
            hash.mark(u8::from(*trained));
        }
        let digest = hash.0.finalize();
        digest.iter().take(size_of::<u128>()).fold(0, |number, byte| number << 8 | u128::from(*byte))
    }
}

/// A hash that takes values so that no two sequences of them give the same bytes: each begins with its kind or its length.
struct Canonical(Sha256);

impl Canonical {
    fn mark(&mut self, mark: u8) {
        self.0.update([mark]);
    }

    fn length(&mut self, length: usize) {
        self.0.update((length as u64).to_le_bytes());
    }

    fn text(&mut self, text: Option<&str>) {
        self.mark(u8::from(text.is_some()));
        if let Some(text) = text {
            self.length(text.len());
            self.0.update(text);
        }
    }

    fn json(&mut self, json: Option<&RawValue>) {
        // A row's raw JSON has been read once, so that null never stands for what could not be.
        let value = json.map(|json| serde_json::from_str(json.get()).unwrap_or(Value::Null));
        self.mark(u8::from(value.is_some()));
        if let Some(value) = value {
            self.value(&value);
        }
    }

    /// Keys in their order by name, numbers as serde_json writes them. A value is nested no deeper than serde_json reads.
    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.mark(b'n'),
            Value::Bool(truth) => self.mark(if *truth { b't' } else { b'f' }),
            Value::Number(number) => {
                self.mark(b'#');
                self.text(Some(&number.to_string()));
            }
            Value::String(text) => {
                self.mark(b'"');
                self.text(Some(text));
            }
            Value::Array(list) => {
                self.mark(b'[');
                self.length(list.len());
                list.iter().for_each(|value| self.value(value));
            }
            Value::Object(map) => {
                self.mark(b'{');
                self.length(map.len());
                let mut entries: Vec<(&String, &Value)> = map.iter().collect();
                entries.sort_unstable_by_key(|(key, _)| *key);
                for (key, value) in entries {
                    self.text(Some(key));
                    self.value(value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(line: &str) -> u128 {
        Row::parse(line.as_bytes()).expect("a good row").identity()
    }

    const PLAIN: &str = r#"{"prompt":"caf\u00e9","completion":"c"}"#;

    #[test]
    fn spellings_of_one_conversation_are_the_same_row() {
        for other in [
            r#"{ "completion": "c", "prompt": "café", "extra": 1 }"#,
            r#"{"messages":[{"role":"user","content":"café"},{"content":"c","role":"assistant","weight":1.0}]}"#,
        ] {
            assert_eq!(identity(other), identity(PLAIN), "{other}");
        }
        let tools = |tools: &str| {
            identity(&format!(
                r#"{{"messages":[{{"role":"user","content":"u"}},{{"role":"assistant","tool_calls":{tools}}}],"tools":{tools}}}"#
            ))
        };
        assert_eq!(tools(r#"[{"a":1,"b":"\u0041"}]"#), tools(r#"[ {"b":"A", "a":1} ]"#));
        assert_ne!(tools(r#"[{"a":1}]"#), tools(r#"[{"a":2}]"#));
    }

    #[test]
    fn whatever_the_model_sees_or_learns_tells_rows_apart() {
        let rows = [
            PLAIN,
            r#"{"prompt":"cafe","completion":"c"}"#,
            r#"{"prompt":"café","completion":"C"}"#,
            r#"{"messages":[{"role":"system","content":"café"},{"role":"assistant","content":"c"}]}"#,
            r#"{"messages":[{"role":"user","content":"café","name":"n"},{"role":"assistant","content":"c"}]}"#,
            r#"{"messages":[{"role":"user","content":"café"},{"role":"assistant","content":"c"}],"tools":[]}"#,
            r#"{"messages":[{"role":"user","content":"café"},{"role":"assistant","content":"c","tool_calls":[]}]}"#,
            r#"{"messages":[{"role":"user","content":"café"},{"role":"assistant","content":"c"},{"role":"assistant","content":"c"}]}"#,
            r#"{"messages":[{"role":"user","content":"café"},{"role":"assistant","content":"c"},{"role":"assistant","content":"c","weight":0}]}"#,
        ];
        let identities: std::collections::HashSet<u128> = rows.iter().map(|row| identity(row)).collect();
        assert_eq!(identities.len(), rows.len());
    }
}
