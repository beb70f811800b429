//! What a model is shown of a row, and what of it is learnt.

use crate::encode::{EncodeError, EncodeOptions, Encoded};
use crate::row::Row;
use crate::tokenizer::ChatTokenizer;

/// A row as it is trained on: the text its template renders, cut where [`ChatTokenizer::encode`] cuts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preview {
    /// The text in pieces as long as can be; one behind the other they are the text.
    pub segments: Vec<Segment>,
    /// The tokens; their texts one behind the other are the text too.
    pub tokens: Vec<Token>,
}

/// A piece of text that counts towards the loss as a whole, or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The piece.
    pub text: String,
    /// Whether it counts.
    pub supervised: bool,
}

/// A token and where it is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The text from where it begins to where the next one does. A character of several tokens is the last one's.
    pub text: String,
    /// Whether it counts towards the loss.
    pub supervised: bool,
}

impl Preview {
    /// Tokens.
    #[must_use]
    pub fn token_count(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens that count towards the loss.
    #[must_use]
    pub fn supervised_count(&self) -> usize {
        self.tokens.iter().filter(|token| token.supervised).count()
    }
}

impl ChatTokenizer {
    /// What [`Self::encode`] makes of a row, as text. Marked is exactly what counts towards the loss: the first token never
    /// does.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn preview(&self, row: &Row<'_>, options: EncodeOptions) -> Result<Preview, EncodeError> {
        let Encoded { example, begins, text } = self.encode_with_text(row, options)?;
        let ends = begins.iter().skip(1).map(|&begin| text.floor_char_boundary(begin)).chain([text.len()]);
        let (mut segments, mut tokens) = (Vec::<Segment>::new(), Vec::new());
        let mut begin = 0;
        for (time, ((&id, &supervised), end)) in example.ids.iter().zip(&example.supervised).zip(ends).enumerate() {
            let supervised = supervised && time > 0;
            let piece = text.get(begin..end).unwrap_or_default();
            begin += piece.len();
            tokens.push(Token { id, text: piece.to_owned(), supervised });
            match segments.last_mut() {
                Some(last) if last.supervised == supervised => last.text.push_str(piece),
                _ if piece.is_empty() => {}
                _ => segments.push(Segment { text: piece.to_owned(), supervised }),
            }
        }
        Ok(Preview { segments, tokens })
    }
}

#[cfg(test)]
mod tests {
    use holdfast_domain::hyperparameters::LongRows;
    use proptest::prelude::*;

    use super::*;
    use crate::tiny;

    const OPTIONS: EncodeOptions = EncodeOptions { max_length: 10_000, long_rows: LongRows::Truncate };

    fn segments(line: &str, options: EncodeOptions) -> Result<Vec<(String, bool)>, EncodeError> {
        let row = Row::parse(line.as_bytes()).expect("a good row");
        let preview = tiny::tokenizer().preview(&row, options)?;
        Ok(preview.segments.into_iter().map(|Segment { text, supervised }| (text, supervised)).collect())
    }

    #[test]
    fn trained_turns_are_marked_from_their_content_to_the_token_that_ends_them() -> Result<(), EncodeError> {
        let line = r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"no","weight":0},
            {"role":"user","content":"é"},{"role":"assistant","content":"日本"}]}"#;
        let expected =
            [("<begin>user\nhi<end>\nassistant\nno<end>\nuser\né<end>\nassistant\n", false), ("日本<end>", true), ("\n", false)];
        assert_eq!(segments(line, OPTIONS)?, expected.map(|(text, supervised)| (text.to_owned(), supervised)));
        Ok(())
    }

    #[test]
    fn a_long_row_is_shown_as_far_as_it_is_trained_on() -> Result<(), EncodeError> {
        // Before the answer are 20 tokens; after two letters the cut is inside the third, which has three tokens.
        let line = r#"{"prompt":"hi","completion":"ab日本"}"#;
        let options = EncodeOptions { max_length: 24, ..OPTIONS };
        let expected = [("<begin>user\nhi<end>\nassistant\n", false), ("ab", true)];
        assert_eq!(segments(line, options)?, expected.map(|(text, supervised)| (text.to_owned(), supervised)));
        let row = Row::parse(line.as_bytes()).expect("a good row");
        let preview = tiny::tokenizer().preview(&row, options)?;
        assert_eq!((preview.token_count(), preview.supervised_count()), (24, 4));
        assert_eq!(
            segments(line, EncodeOptions { max_length: 20, ..OPTIONS }),
            Err(EncodeError::NothingSupervised { cut: true })
        );
        Ok(())
    }

    proptest! {
        #[test]
        fn a_preview_is_the_text_and_marks_what_the_mask_does(
            turns in proptest::collection::vec(("\\PC{1,12}", "\\PC{1,12}", any::<bool>()), 1..4),
            max_length in 20_usize..200,
        ) {
            let messages: Vec<serde_json::Value> = turns
                .iter()
                .flat_map(|(user, assistant, trained)| [
                    serde_json::json!({"role": "user", "content": user}),
                    serde_json::json!({"role": "assistant", "content": assistant, "weight": u8::from(*trained)}),
                ])
                .collect();
            let line = serde_json::json!({"messages": messages}).to_string();
            let tokenizer = tiny::tokenizer();
            let options = EncodeOptions { max_length, ..OPTIONS };
            let Ok(row) = Row::parse(line.as_bytes()) else { return Ok(()) };
            let (example, preview) = match (tokenizer.encode(&row, options), tokenizer.preview(&row, options)) {
                (Ok(example), Ok(preview)) => (example, preview),
                (refused, also) => {
                    prop_assert_eq!(refused.err(), also.err());
                    return Ok(());
                }
            };
            let whole = tokenizer.template.render(&row, row.messages.len(), false).expect("it was rendered before");
            let of_segments: String = preview.segments.iter().map(|segment| segment.text.as_str()).collect();
            let of_tokens: String = preview.tokens.iter().map(|token| token.text.as_str()).collect();
            prop_assert_eq!(&of_segments, &of_tokens);
            prop_assert!(whole.starts_with(&of_segments));
            prop_assert_eq!(&preview.tokens.iter().map(|token| token.id).collect::<Vec<_>>(), &example.ids);
            let marked: Vec<bool> = preview.tokens.iter().map(|token| token.supervised).collect();
            prop_assert_eq!(&marked, &example.supervised);
            prop_assert_eq!(preview.supervised_count(), example.supervised_count());
            // A byte a token: the marked text is as long as the marked tokens are many, where no character is cut.
            if example.ids.len() < max_length {
                prop_assert_eq!(&of_segments, &whole);
                let bytes: usize = preview.segments.iter().filter(|s| s.supervised).map(|s| s.text.replace("<end>", "e").len()).sum();
                prop_assert_eq!(bytes, preview.supervised_count());
            }
        }
    }
}
