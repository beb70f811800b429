//! Chat templates: the Jinja a model ships with, rendered the way Hugging Face renders it.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};

use crate::row::{Message, Row};

/// Instructions a rendering may take, so that a template from outside cannot loop for ever.
const FUEL: u64 = 5_000_000;

/// A compiled chat template with the special tokens it may write.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// Why a template did not compile or render.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template itself is at fault.
    #[error("the model's chat template does not compile: {0}")]
    Compile(String),
    /// The template refused this conversation, as by `raise_exception`.
    #[error("the model's chat template refuses this conversation: {0}")]
    Render(String),
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Compiles a template. `bos_token` and `eos_token` are what it may refer to by these names.
    ///
    /// # Errors
    /// When it is not a template minijinja understands.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        // As transformers sets them; without these, templates that were written for it render other white space.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| TemplateError::Compile(first_line(&e)))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, source.to_owned()).map_err(|e| TemplateError::Compile(first_line(&e)))?;
        Ok(Self { environment, bos_token: bos_token.to_owned(), eos_token: eos_token.to_owned() })
    }

    /// The text of the first `turns` messages; with `add_generation_prompt`, the header of the assistant's next turn follows.
    ///
    /// # Errors
    /// When the template refuses the conversation.
    pub fn render(&self, row: &Row<'_>, turns: usize, add_generation_prompt: bool) -> Result<String, TemplateError> {
        let turns = row.messages.get(..turns).unwrap_or(&row.messages);
        let tools = row.tools.map(|json| serde_json::from_str(json.get())).transpose();
        let context = Context {
            messages: Turns(turns),
            tools: tools.map_err(|e| TemplateError::Render(format!("tools: {e}")))?,
            add_generation_prompt,
            bos_token: &self.bos_token,
            eos_token: &self.eos_token,
        };
        let template = self.environment.get_template(NAME).map_err(|e| TemplateError::Compile(first_line(&e)))?;
        template.render(Serde(context)).map_err(|error| TemplateError::Render(reason(&error, template.source())))
    }
}

// `strftime_now` is left undefined on purpose: templates that know it fall back to a fixed date, and the text of a row must
// not depend on the day it is trained on.
#[derive(Serialize)]
struct Context<'a> {
    messages: Turns<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tools: Option<serde_json::Value>,
    add_generation_prompt: bool,
    bos_token: &'a str,
    eos_token: &'a str,
}

struct Turns<'a>(&'a [Message<'a>]);

impl Serialize for Turns<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for message in self.0 {
            list.serialize_element(&Turn(message))?;
        }
        list.end()
    }
}

struct Turn<'a>(&'a Message<'a>);

impl Serialize for Turn<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Message { role, content, tool_calls, tool_call_id, name, trained: _ } = self.0;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("role", role.as_str())?;
        map.serialize_entry("content", content)?;
        if let Some(calls) = tool_calls {
            let calls: serde_json::Value = serde_json::from_str(calls.get()).map_err(serde::ser::Error::custom)?;
            map.serialize_entry("tool_calls", &calls)?;
        }
        if let Some(id) = tool_call_id {
            map.serialize_entry("tool_call_id", id)?;
        }
        if let Some(name) = name {
            map.serialize_entry("name", name)?;
        }
        map.end()
    }
}

/// Why a template gave up. Its own words are repeated only when they stand in its source: what it put together may quote the
/// conversation.
fn reason(error: &Error, source: &str) -> String {
    match error.detail() {
        Some(words) if source.contains(words) => words.to_owned(),
        _ => error.kind().to_string(),
    }
}

fn raise_exception(message: &str) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// `json.dumps(value, ensure_ascii=False)`: Python's separators, and none of the escapes minijinja adds for HTML.
#[expect(clippy::needless_pass_by_value, reason = "minijinja hands a filter its arguments by value")]
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, "tojson").with_source(e);
    let mut text = Vec::new();
    if let Some(width) = indent {
        let spaces = " ".repeat(width.min(16));
        let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter)).map_err(failed)?;
    } else {
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, PythonSeparators)).map_err(failed)?;
    }
    String::from_utf8(text).map_err(|e| Error::new(ErrorKind::BadSerialization, "tojson").with_source(e))
}

struct PythonSeparators;

impl serde_json::ser::Formatter for PythonSeparators {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The reason without the source excerpt that minijinja's debug mode appends.
fn first_line(error: &Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), ToOwned::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    fn row(json: &str) -> Row<'_> {
        Row::parse(json.as_bytes()).expect("a good row")
    }

    #[test]
    fn a_conversation_is_rendered_with_and_without_the_next_header() -> Result<(), TemplateError> {
        let template = ChatTemplate::new(CHATML, "<s>", "</s>")?;
        let row = row(r#"{"prompt":"p","completion":"c"}"#);
        assert_eq!(template.render(&row, 1, true)?, "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(template.render(&row, 2, false)?, "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n");
        Ok(())
    }

    #[test]
    fn python_methods_and_json_behave_as_in_python() -> Result<(), TemplateError> {
        let template = ChatTemplate::new("{{ messages[0].content.strip() }}|{{ tools | tojson }}", "", "")?;
        let row = row(
            r#"{"messages":[{"role":"user","content":" <a> "},{"role":"assistant","content":"b"}],"tools":[{"n":"é<","k":1}]}"#,
        );
        assert_eq!(template.render(&row, 2, false)?, r#"<a>|[{"n": "é<", "k": 1}]"#);
        Ok(())
    }

    #[test]
    fn what_a_template_quotes_of_the_conversation_is_not_repeated() -> Result<(), TemplateError> {
        let template = ChatTemplate::new("{{ raise_exception('odd: ' + messages[0].content) }}", "", "")?;
        let error = template.render(&row(r#"{"prompt":"secret","completion":"c"}"#), 2, false);
        assert_eq!(error, Err(TemplateError::Render("invalid operation".into())));
        Ok(())
    }

    #[test]
    fn a_template_that_raises_says_why() -> Result<(), TemplateError> {
        let template = ChatTemplate::new("{{ raise_exception('roles must alternate') }}", "", "")?;
        let error = template.render(&row(r#"{"prompt":"p","completion":"c"}"#), 2, false);
        assert_eq!(error, Err(TemplateError::Render("roles must alternate".into())));
        Ok(())
    }

    #[test]
    fn an_endless_template_is_stopped() -> Result<(), TemplateError> {
        let template =
            ChatTemplate::new("{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}", "", "")?;
        assert!(template.render(&row(r#"{"prompt":"p","completion":"c"}"#), 2, false).is_err());
        Ok(())
    }
}
