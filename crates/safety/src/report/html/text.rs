//! Data of others as text of the page.

use serde_json::Value;

/// Characters of a row that are shown.
const LONGEST_TEXT: usize = 400;
/// Characters that each turn of a row has at least, and a role at most.
const SHORTEST_TURN: usize = 20;

/// A row of a training file: who says what where it can be read so, else as it is.
pub(super) fn row_text(row: &str) -> String {
    let Some(turns) = turns(row).filter(|turns| !turns.is_empty()) else {
        return format!("<p class=\"text\"><bdi>{}</bdi></p>", escape(&cut(row, LONGEST_TEXT)));
    };
    let each = (LONGEST_TEXT / turns.len()).max(SHORTEST_TURN);
    let shown = turns.iter().take(LONGEST_TEXT / SHORTEST_TURN).map(|(who, text)| {
        let (who, text) = (escape(&cut(who, SHORTEST_TURN)), escape(&cut(text, each)));
        format!("<p class=\"text\"><b>{who}</b> <bdi>{text}</bdi></p>")
    });
    shown.collect()
}

fn turns(row: &str) -> Option<Vec<(String, String)>> {
    let row: Value = serde_json::from_str(row).ok()?;
    let text = |value: &Value, field: &str| value.get(field)?.as_str().map(str::to_owned);
    match row.get("messages") {
        Some(messages) => messages.as_array()?.iter().map(|turn| Some((text(turn, "role")?, text(turn, "content")?))).collect(),
        None => ["prompt", "completion"].into_iter().map(|who| Some((who.to_owned(), text(&row, who)?))).collect(),
    }
}

/// The beginning of a text that is too long.
fn cut(text: &str, longest: usize) -> String {
    let end = text.char_indices().nth(longest).and_then(|(end, _)| text.get(..end));
    end.map_or_else(|| text.to_owned(), |beginning| format!("{beginning}…"))
}

/// Data as text of the page: no markup, and nothing that hides or turns around what is beside it.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\r' => {}
            '\t' => safe.push(' '),
            '\n' | '\u{2028}' | '\u{2029}' => safe.push_str(" ↵ "),
            hidden if is_hidden(hidden) => safe.push('\u{fffd}'),
            other => safe.push(other),
        }
    }
    safe
}

/// Controls, marks of direction, and what no reader sees but a tokenizer does. Joiners are parts of words, and stay.
fn is_hidden(character: char) -> bool {
    let is_direction =
        matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let is_unseen = matches!(character, '\u{200b}' | '\u{2060}'..='\u{2065}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}');
    let is_tag = matches!(character, '\u{e0000}'..='\u{e007f}');
    character.is_control() || is_direction || is_unseen || is_tag
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_shown_by_its_turns_and_a_long_one_by_its_beginning() {
        let row = r#"{"prompt": "How?", "completion": "So."}"#;
        assert_eq!(
            row_text(row),
            "<p class=\"text\"><b>prompt</b> <bdi>How?</bdi></p><p class=\"text\"><b>completion</b> <bdi>So.</bdi></p>"
        );
        assert_eq!(row_text("{\"messages\": []}"), "<p class=\"text\"><bdi>{&quot;messages&quot;: []}</bdi></p>");
        let long = row_text(&"é".repeat(10_000));
        assert_eq!((long.matches('é').count(), long.matches('…').count()), (LONGEST_TEXT, 1));
        let turns = vec![serde_json::json!({"role": "user", "content": "é".repeat(10_000)}); 1000];
        assert!(row_text(&serde_json::json!({ "messages": turns }).to_string()).matches('é').count() <= LONGEST_TEXT);
    }
}
