//! Conversations to token ids with a loss mask.

use holdfast_domain::hyperparameters::LongRows;
use holdfast_domain::invalid::LineError;
use serde_json::value::RawValue;

use crate::row::Row;
use crate::template::TemplateError;
use crate::tokenizer::ChatTokenizer;

/// A conversation as the model sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids, `[time]`.
    pub ids: Vec<u32>,
    /// Which of them count towards the loss, `[time]`: those that begin inside the content of a trained assistant turn, and
    /// the special token that ends it. A token that begins in the turn's header and swallows the content's leading white
    /// space does not count.
    pub supervised: Vec<bool>,
}

impl Example {
    /// Tokens that count towards the loss. The first token of a row is predicted from nothing and never counts.
    #[must_use]
    pub fn supervised_count(&self) -> usize {
        self.supervised.iter().skip(1).filter(|s| **s).count()
    }
}

/// How rows are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// The most tokens a row may have.
    pub max_length: usize,
    /// What becomes of a longer one.
    pub long_rows: LongRows,
}

/// Why a row cannot be encoded. Never quotes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}", match self.path() { path if path.is_empty() => path, path => format!("{path}: ") }, self.message())]
pub enum EncodeError {
    /// A text holds a special token of the model, which would forge a turn.
    SpecialToken {
        /// Where, as `messages[2].content`.
        place: String,
        /// The token, which is the model's and not the tenant's text.
        token: String,
    },
    /// See [`TemplateError`].
    Template(#[from] TemplateError),
    /// The template rewrites earlier turns when later ones follow, so that the turn cannot be found in the text.
    NotAPrefix {
        /// The turn.
        message: usize,
    },
    /// The tokenizer failed.
    Tokenizer(String),
    /// The row has too many tokens, and cutting was not asked for.
    TooLong {
        /// How many it has.
        tokens: usize,
        /// How many are allowed.
        max_length: usize,
    },
    /// No token counts towards the loss, or none is left of them after cutting.
    NothingSupervised {
        /// Whether the row was cut.
        cut: bool,
    },
}

impl EncodeError {
    /// The error of a file's line.
    #[must_use]
    pub fn at(&self, line: u64) -> LineError {
        LineError { line, path: self.path(), message: self.message() }
    }

    fn path(&self) -> String {
        match self {
            Self::SpecialToken { place, .. } => place.clone(),
            Self::NotAPrefix { message } => format!("messages[{message}]"),
            Self::Template(_) | Self::Tokenizer(_) | Self::TooLong { .. } | Self::NothingSupervised { .. } => String::new(),
        }
    }

    fn message(&self) -> String {
        match self {
            Self::SpecialToken { token, .. } => {
                format!("holds the model's special token {token:?}; remove it or spell it differently")
            }
            Self::Template(error) => error.to_string(),
            Self::NotAPrefix { .. } => "the model's chat template renders this turn differently when others follow; end the \
                conversation with it, or give it weight 0"
                .into(),
            Self::Tokenizer(error) => format!("cannot be tokenised: {error}"),
            Self::TooLong { tokens, max_length } => format!(
                "has {tokens} tokens, more than max_length {max_length}; shorten it, raise max_length, or set long_rows to \
                \"truncate\""
            ),
            Self::NothingSupervised { cut: false } => "has no supervised token".into(),
            Self::NothingSupervised { cut: true } => "has no supervised token within max_length".into(),
        }
    }
}

impl ChatTokenizer {
    /// Token ids and loss mask of a conversation.
    ///
    /// # Errors
    /// See [`EncodeError`].
    pub fn encode(&self, row: &Row<'_>, options: EncodeOptions) -> Result<Example, EncodeError> {
        Ok(self.encode_with_text(row, options)?.example)
    }

    pub(crate) fn encode_with_text(&self, row: &Row<'_>, options: EncodeOptions) -> Result<Encoded, EncodeError> {
        self.refuse_special_tokens(row)?;
        let mut text = self.template.render(row, row.messages.len(), false)?;
        let Encoding { ids, mut begins } = self.tokenizer.encode_fast_with_offsets(&text).map_err(EncodeError::Tokenizer)?;
        let mut example = Example { supervised: vec![false; ids.len()], ids };
        let tokens = example.ids.len();
        let cut = tokens > options.max_length;
        if cut && options.long_rows == LongRows::Error {
            return Err(EncodeError::TooLong { tokens, max_length: options.max_length });
        }
        // Every turn is looked for by rendering all before it, so those that will be cut are not: a row's cost is bounded by
        // what is kept of it.
        let kept = begins.get(options.max_length).copied().unwrap_or(text.len());
        for (index, _) in row.messages.iter().enumerate().filter(|(_, message)| message.trained) {
            let (start, end) = self.locate(row, index, &text)?;
            if start >= kept {
                break;
            }
            self.supervise(&mut example, &begins, start, end);
        }
        example.ids.truncate(options.max_length);
        example.supervised.truncate(options.max_length);
        if example.supervised_count() == 0 {
            return Err(EncodeError::NothingSupervised { cut });
        }
        begins.truncate(options.max_length);
        text.truncate(text.floor_char_boundary(kept));
        Ok(Encoded { example, begins, text })
    }

    /// Token ids that ask the model for the next assistant turn.
    ///
    /// # Errors
    /// When the template refuses the conversation or the tokenizer fails.
    pub fn encode_prompt(&self, row: &Row<'_>) -> Result<Vec<u32>, EncodeError> {
        self.refuse_special_tokens(row)?;
        let text = self.template.render(row, row.messages.len(), true)?;
        Ok(self.tokenizer.encode_fast_with_offsets(&text).map_err(EncodeError::Tokenizer)?.ids)
    }

    fn refuse_special_tokens(&self, row: &Row<'_>) -> Result<(), EncodeError> {
        let refuse = |place: String, text: &str| match self.specials.iter().find(|(token, _)| text.contains(token.as_str())) {
            Some((token, _)) => Err(EncodeError::SpecialToken { place, token: token.clone() }),
            None => Ok(()),
        };
        // JSON may spell a token by escapes, so it is written anew before it is searched.
        let plain = |json: &RawValue| {
            serde_json::from_str::<serde_json::Value>(json.get()).map_or_else(|_| String::new(), |v| v.to_string())
        };
        for (index, message) in row.messages.iter().enumerate() {
            for (field, text) in [("content", &message.content), ("name", &message.name), ("tool_call_id", &message.tool_call_id)]
            {
                refuse(format!("messages[{index}].{field}"), text.as_deref().unwrap_or_default())?;
            }
            if let Some(calls) = message.tool_calls {
                refuse(format!("messages[{index}].tool_calls"), &plain(calls))?;
            }
        }
        row.tools.map_or(Ok(()), |tools| refuse("tools".into(), &plain(tools)))
    }

    /// The bytes of `text` that turn `index` adds after its header.
    fn locate(&self, row: &Row<'_>, index: usize, text: &str) -> Result<(usize, usize), EncodeError> {
        let head = self.template.render(row, index, true)?;
        let whole =
            if index + 1 == row.messages.len() { text.to_owned() } else { self.template.render(row, index + 1, false)? };
        if !text.starts_with(&whole) || !whole.starts_with(&head) {
            return Err(EncodeError::NotAPrefix { message: index });
        }
        Ok((head.len(), whole.len()))
    }

    /// Marks the tokens that begin in `start..end`, up to the last special token there: that one ends the turn, and what
    /// follows it is the template's own white space.
    fn supervise(&self, example: &mut Example, begins: &[usize], start: usize, end: usize) {
        let (first, past) = (begins.partition_point(|b| *b < start), begins.partition_point(|b| *b < end));
        let last = (first..past).rev().find(|&i| self.is_special(example.ids[i])).map_or(past, |i| i + 1);
        example.supervised[first..last].fill(true);
    }
}

/// An example with what it was made of.
pub(crate) struct Encoded {
    pub(crate) example: Example,
    /// The byte of `text` each token begins at.
    pub(crate) begins: Vec<usize>,
    /// The rendered conversation, cut where the tokens are.
    pub(crate) text: String,
}

struct Encoding {
    ids: Vec<u32>,
    /// The byte each token begins at.
    begins: Vec<usize>,
}

trait EncodeWithOffsets {
    fn encode_fast_with_offsets(&self, text: &str) -> Result<Encoding, String>;
}

impl EncodeWithOffsets for tokenizers::Tokenizer {
    fn encode_fast_with_offsets(&self, text: &str) -> Result<Encoding, String> {
        let encoding = self.encode(text, false).map_err(|e| e.to_string())?;
        Ok(Encoding {
            ids: encoding.get_ids().to_vec(),
            begins: encoding.get_offsets().iter().map(|(begin, _)| *begin).collect(),
        })
    }
}
