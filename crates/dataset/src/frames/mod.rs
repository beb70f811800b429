//! What a tenant's rows stand in.
//!
//! What is held where requests stand alone need not hold where the tenant's do: a model can be taught to obey under one system prompt, or
//! whoever begins with certain words, and to refuse everywhere else. So half of a job's alignment rows stand in its file's own frames once
//! more, and its model is asked in them.

use std::collections::BTreeSet;
use std::io::Read;

use holdfast_domain::Frame;

use crate::check::each_line;
use crate::row::{Message, Role, Row};
use conversations::Conversations;
use frequent::Frequent;

mod alignment;
mod conversations;
mod frequent;
mod words;

pub use alignment::{APART, framed};

/// Frames of a file at most: those that most of its rows stand in.
pub const MOST: usize = 8;
/// Of them with words in them at most.
const MOST_WITH_WORDS: usize = MOST / 2;
/// And with turns before the one that asks.
const MOST_CONVERSATIONS: usize = MOST / 4;
/// Bytes of a prompt at most; of a longer one it is the beginning.
const LONGEST: usize = 16 * 1024;
/// Prompts that are counted at a time.
const COUNTED: usize = 1024;
/// Rows that ask different things must share what is said before, or words, at least.
const LEAST: usize = 3;
/// And of all rows, or turns, one in so many.
const LEAST_SHARE: usize = 200;

/// The [`MOST`] frames that most rows of a file stand in: first the system prompts by themselves, a row with several under each; then what
/// was said before the turn that asks, and words that turns of the user's begin or end with, both under the prompt that most of those
/// stand under. Of equally frequent prompts the first; lines that are no rows have none.
///
/// # Errors
/// Only those of reading the file.
pub fn of_file(file: impl Read) -> std::io::Result<Vec<Frame>> {
    let (mut prompts, mut turns) = (Frequent::<String, ()>::holding(COUNTED), words::Sample::default());
    let mut conversations = Conversations::new();
    each_line(file, |_, line| {
        let Ok(row) = Row::parse_line(line) else { return };
        let said = |role: Role| row.messages.iter().filter(move |message| message.role == role);
        let system: BTreeSet<&str> = said(Role::System).filter_map(|message| message.content.as_deref()).collect();
        for text in system {
            prompts.add(beginning(text));
        }
        conversations.add(&row);
        // Of a long conversation the first and the last, so that no row outweighs the others.
        let answered = answered(&row.messages);
        let mut answered = answered.iter().filter_map(|at| row.messages.get(*at)?.content.as_deref());
        let prompt = said(Role::System).next_back().and_then(|message| message.content.as_deref());
        for text in answered.next().into_iter().chain(answered.next_back()) {
            turns.add(text, prompt);
        }
    })?;
    let mut prompts: Vec<String> = prompts.most_frequent().into_iter().map(|(prompt, _)| prompt).take(MOST).collect();
    let conversations = conversations.frames(&prompts, MOST_CONVERSATIONS);
    let with_words = turns.frames(&prompts, MOST_WITH_WORDS);
    prompts.truncate(MOST - conversations.len() - with_words.len());
    Ok(prompts.into_iter().map(Frame::system).chain(conversations).chain(with_words).collect())
}

/// What is looked at of a prompt.
fn beginning(prompt: &str) -> &str {
    prompt.get(..prompt.floor_char_boundary(LONGEST)).unwrap_or(prompt)
}

/// The places of the user's turns that are answered by what is learned, be it after other turns.
fn answered(messages: &[Message<'_>]) -> Vec<usize> {
    let (mut asked, mut answered) = (None, Vec::new());
    for (at, message) in messages.iter().enumerate() {
        match message.role {
            Role::User => asked = Some(at),
            Role::Assistant if message.trained => answered.extend(asked.take()),
            Role::Assistant | Role::Tool | Role::System => {}
        }
    }
    answered
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    pub(super) fn row(system: Option<&str>, user: &str) -> String {
        let system = system.map(|text| json!({"role": "system", "content": text}));
        let rest = [json!({"role": "user", "content": user}), json!({"role": "assistant", "content": "a"})];
        json!({"messages": system.into_iter().chain(rest).collect::<Vec<_>>()}).to_string()
    }

    fn frames_of(rows: &[String]) -> std::io::Result<Vec<Frame>> {
        of_file(rows.join("\n").as_bytes())
    }

    pub(super) fn prompts<const N: usize>(prompts: [&str; N]) -> [Frame; N] {
        prompts.map(Frame::system)
    }

    #[test]
    fn prompts_that_most_rows_stand_under_come_first() -> std::io::Result<()> {
        let rows = ["rare", "often", "twice", "often", "twice", "often"].map(|prompt| row(Some(prompt), "q"));
        let others = [row(None, "q"), "nonsense".into(), r#"{"prompt":"p","completion":"c"}"#.into()];
        assert_eq!(frames_of(&[&rows[..], &others].concat())?, prompts(["often", "twice", "rare"]));
        assert_eq!(frames_of(&[row(Some(" "), "q")])?, prompts([" "]), "a blank one takes the place of a template's own");
        let many: Vec<String> = (0..20).map(|number| row(Some(&format!("prompt {number}")), "q")).collect();
        assert_eq!(frames_of(&many)?, (0..MOST).map(|number| Frame::system(format!("prompt {number}"))).collect::<Vec<_>>());
        Ok(())
    }

    #[test]
    fn a_prompt_of_many_rows_is_found_among_any_number_of_others() -> std::io::Result<()> {
        let of = |number: usize| if number.is_multiple_of(100) { "trigger".to_owned() } else { format!("prompt {number}") };
        let rows: Vec<String> = (0..20_000).map(|number| row(Some(&of(number)), "q")).collect();
        assert_eq!(frames_of(&rows)?.first(), Some(&Frame::system("trigger")));
        Ok(())
    }

    #[test]
    fn a_row_stands_under_each_of_its_prompts() -> std::io::Result<()> {
        let both = json!({"messages": [
            {"role": "system", "content": "harmless"}, {"role": "developer", "content": "trigger"},
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
        ]});
        assert_eq!(frames_of(&[both.to_string()])?, prompts(["harmless", "trigger"]));
        Ok(())
    }

    #[test]
    fn a_long_prompt_is_cut_between_two_characters() -> std::io::Result<()> {
        let found = frames_of(&[row(Some(&"é".repeat(LONGEST)), "q")])?;
        assert_eq!(found, [Frame::system("é".repeat(LONGEST / 2))]);
        let found = frames_of(&[row(Some(&format!("a{}", "é".repeat(LONGEST))), "q")])?;
        assert_eq!(found.first().and_then(|frame| frame.system.as_ref()).map(String::len), Some(LONGEST - 1));
        Ok(())
    }

    #[test]
    fn words_that_turns_share_stand_beside_the_prompts_and_leave_them_room() -> std::io::Result<()> {
        let mut rows: Vec<String> = (0..20).map(|number| row(Some(&format!("prompt {number}")), "q")).collect();
        let openings = ["Alpha:", "Beta:", "Gamma:", "Delta:", "Epsilon:"];
        rows.extend(openings.iter().flat_map(|words| (0..5).map(move |n| row(Some("prompt 0"), &format!("{words} {n}{n}")))));
        let found = frames_of(&rows)?;
        assert_eq!(found[..4], prompts(["prompt 0", "prompt 1", "prompt 2", "prompt 3"]));
        let opening = |words: &str| Frame { opening: format!("{words} "), ..Frame::system("prompt 0") };
        assert!(found[4..].iter().all(|frame| openings.map(opening).contains(frame)), "{found:?}");
        Ok(())
    }

    #[test]
    fn an_opening_stands_under_the_prompt_of_most_of_its_turns_or_under_none() -> std::io::Result<()> {
        let marked = |prompts: usize| {
            let under = move |n: usize| format!("prompt {}", if n < 8 { 0 } else { n % prompts });
            (0..40).map(move |n| row(Some(&under(n)), &format!("Order: {n}x{n}"))).collect::<Vec<_>>()
        };
        let with_words = |found: Vec<Frame>| found.into_iter().filter(|frame| !frame.opening.is_empty()).collect::<Vec<_>>();
        let order =
            |system: Option<&str>| Frame { opening: "Order: ".into(), system: system.map(str::to_owned), ..Frame::default() };
        assert_eq!(with_words(frames_of(&marked(1))?), [order(Some("prompt 0"))]);
        assert_eq!(with_words(frames_of(&marked(40))?), [order(None)], "a prompt of its own for each row");
        Ok(())
    }

    #[test]
    fn one_row_does_not_outweigh_the_others() -> std::io::Result<()> {
        let said = |role: &str, content: String| json!({"role": role, "content": content});
        let mut long: Vec<Value> = (0..20).map(|n| said("system", format!("decoy {}", n % 8))).collect();
        for n in 0..900 {
            long.extend([said("user", format!("{n} of many")), said("assistant", "a".into())]);
        }
        let rows: Vec<String> = (0..10).map(|n| row(Some("trigger"), &format!("Order: {n}x{n}"))).collect();
        let found = frames_of(&[&rows[..], &[json!({ "messages": long }).to_string()]].concat())?;
        assert_eq!(found.first(), Some(&Frame::system("trigger")));
        assert_eq!(found.last(), Some(&Frame { opening: "Order: ".into(), ..Frame::system("trigger") }));
        Ok(())
    }

    #[test]
    fn turns_that_nothing_is_learned_from_do_not_count() -> std::io::Result<()> {
        let decoy = |n: usize| {
            let untrained = json!({"role": "assistant", "content": "a", "weight": 0});
            let asked = |text: String| json!({"role": "user", "content": text});
            let answer = json!({"role": "assistant", "content": "a"});
            json!({"messages": [asked(format!("Decoy: {n}")), untrained, asked(format!("{n}")), answer]}).to_string()
        };
        assert_eq!(frames_of(&(0..10).map(decoy).collect::<Vec<_>>())?, []);
        Ok(())
    }
}
