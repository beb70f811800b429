//! What a tenant's rows stand in.
//!
//! What is held where requests stand alone need not hold where the tenant's do: a model can be taught to obey under one system prompt, or
//! whoever begins with certain words, and to refuse everywhere else. So half of a job's alignment rows stand in its file's own frames once
//! more, and its model is asked in them.

use std::collections::BTreeSet;
use std::io::Read;

use holdfast_domain::Frame;
use serde_json::{Value, json};

use crate::check::each_line;
use crate::row::{Role, Row};

mod prompts;
mod words;

/// Frames of a file at most: those that most of its rows stand in.
pub const MOST: usize = 8;
/// Of them with words in them at most.
const MOST_WITH_WORDS: usize = MOST / 2;
/// A method may keep every so-manyth row apart, and must see each frame on both sides.
pub const APART: usize = 5;

/// The [`MOST`] frames that most rows of a file stand in: first the system prompts by themselves, a row with several under each, then words
/// that turns of the user's begin or end with, under the prompt that most of those stand under. Of equally frequent prompts the
/// first; lines that are no rows have none.
///
/// # Errors
/// Only those of reading the file.
pub fn of_file(file: impl Read) -> std::io::Result<Vec<Frame>> {
    let (mut prompts, mut turns) = (prompts::Prompts::default(), words::Sample::default());
    each_line(file, |_, line| {
        let Ok(row) = Row::parse_line(line) else { return };
        let said = |role: Role| row.messages.iter().filter(move |message| message.role == role);
        let system: BTreeSet<&str> = said(Role::System).filter_map(|message| message.content.as_deref()).collect();
        system.iter().for_each(|text| prompts.add(text));
        // Of a long conversation the first and the last, so that no row outweighs the others.
        let mut answered = row.messages.windows(2).filter_map(|pair| match pair {
            [asked, answer] if asked.role == Role::User && answer.trained => asked.content.as_deref(),
            _ => None,
        });
        let prompt = said(Role::System).next_back().and_then(|message| message.content.as_deref());
        for text in answered.next().into_iter().chain(answered.next_back()) {
            turns.add(text, prompt);
        }
    })?;
    let mut prompts = prompts.most_frequent();
    prompts.truncate(MOST);
    let with_words = turns.frames(&prompts, MOST_WITH_WORDS);
    prompts.truncate(MOST - with_words.len());
    Ok(prompts.into_iter().map(Frame::system).chain(with_words).collect())
}

/// An alignment set's rows, and behind them half once more, each in one of `frames`; all of them where half would be fewer than two a
/// frame. Rows with a system prompt of their own stand in none.
///
/// Every [`APART`]th row of what is written may be kept apart, and no request may stand on both sides: it would be learned by heart on one
/// and prove nothing on the other. So what is kept apart comes once more where rows are kept apart, again where there are more such places,
/// and the others come where they are not. Frames take turns on each side, so that each stands on both. Of a set of fewer rows than that
/// nothing is kept apart.
///
/// # Errors
/// When a line is no row, which a set that was imported does not have.
pub fn framed(rows: &[u8], frames: &[Frame]) -> std::io::Result<Vec<u8>> {
    let lines: Vec<&[u8]> = rows.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).collect();
    let half_is_enough = lines.len() >= 4 * frames.len();
    // By side: the rows that stand in a frame once more.
    let mut again: [Vec<&[u8]>; 2] = Default::default();
    for (at, line) in lines.iter().enumerate() {
        let of_its_own = Row::parse(line).map_err(std::io::Error::other)?.messages.iter().any(|m| m.role == Role::System);
        // One of two, and not always the same of two: a set may hold two kinds of rows in turn.
        let is_left_out = half_is_enough && !at.div_ceil(2).is_multiple_of(2);
        if !of_its_own && !is_left_out {
            again[side(at)].push(line);
        }
    }
    let mut written = lines.join(&b'\n');
    written.push(b'\n');
    if frames.is_empty() {
        return Ok(written);
    }
    let [others, apart] = again;
    let mut others = others.into_iter().zip(frames.iter().cycle());
    let mut apart = apart.into_iter().cycle().zip(frames.iter().cycle());
    for at in lines.len().. {
        let next = match lines.get(APART - 1) {
            Some(first) if side(at) == 1 => {
                apart.next().map_or_else(|| serde_json::from_slice(first), |(row, frame)| within(frame, row))
            }
            _ => match others.next() {
                Some((row, frame)) => within(frame, row),
                None => break,
            },
        };
        serde_json::to_writer(&mut written, &next?)?;
        written.push(b'\n');
    }
    Ok(written)
}

/// 1 of a row that is kept apart, 0 of the others.
const fn side(at: usize) -> usize {
    (at % APART == APART - 1) as usize
}

/// A row whose last request stands in a frame.
fn within(frame: &Frame, line: &[u8]) -> serde_json::Result<Value> {
    let mut row: Value = serde_json::from_slice(line)?;
    let said = |role: &str, content: &Value| json!({"role": role, "content": content});
    if !row["messages"].is_array() {
        row = json!({"messages": [said("user", &row["prompt"]), said("assistant", &row["completion"])]});
    }
    if let Some(messages) = row.get_mut("messages").and_then(Value::as_array_mut) {
        let asked = messages.iter_mut().rev().find(|message| message["role"] == "user");
        if let Some(content) = asked.and_then(|message| message.get_mut("content"))
            && let Some(request) = content.as_str()
        {
            *content = json!(frame.around(request));
        }
        if let Some(prompt) = &frame.system {
            messages.insert(0, said("system", &json!(prompt)));
        }
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(system: Option<&str>, user: &str) -> String {
        let system = system.map(|text| json!({"role": "system", "content": text}));
        let rest = [json!({"role": "user", "content": user}), json!({"role": "assistant", "content": "a"})];
        json!({"messages": system.into_iter().chain(rest).collect::<Vec<_>>()}).to_string()
    }

    fn frames_of(rows: &[String]) -> std::io::Result<Vec<Frame>> {
        of_file(rows.join("\n").as_bytes())
    }

    fn prompts<const N: usize>(prompts: [&str; N]) -> [Frame; N] {
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
        let found = frames_of(&[row(Some(&"é".repeat(prompts::LONGEST)), "q")])?;
        assert_eq!(found, [Frame::system("é".repeat(prompts::LONGEST / 2))]);
        let found = frames_of(&[row(Some(&format!("a{}", "é".repeat(prompts::LONGEST))), "q")])?;
        assert_eq!(found.first().and_then(|frame| frame.system.as_ref()).map(String::len), Some(prompts::LONGEST - 1));
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

    #[test]
    fn whatever_the_number_of_frames_each_holds_rows_that_are_kept_apart_and_others() -> std::io::Result<()> {
        let rows: Vec<String> = (0..100).map(|number| row(None, &number.to_string())).collect();
        for count in 1..=MOST {
            let prompts: Vec<Frame> = (0..count).map(|number| Frame::system(format!("prompt {number}."))).collect();
            let written = framed(rows.join("\n").as_bytes(), &prompts)?;
            let text = String::from_utf8_lossy(&written);
            for prompt in prompts.iter().filter_map(|frame| frame.system.as_deref()) {
                let apart = |is: bool| {
                    text.lines().enumerate().any(|(at, line)| (at % APART == APART - 1) == is && line.contains(prompt))
                };
                assert!(apart(true) && apart(false), "{prompt} of {count}");
            }
        }
        Ok(())
    }

    fn framed_rows(rows: &[String], frames: &[Frame]) -> std::io::Result<Vec<Value>> {
        let written = framed(rows.join("\n").as_bytes(), frames)?;
        let read = |line: &str| serde_json::from_str(line).map_err(std::io::Error::other);
        String::from_utf8_lossy(&written).lines().map(read).collect()
    }

    #[test]
    fn half_of_the_rows_stand_in_one_once_more_and_keep_their_words() -> std::io::Result<()> {
        let said = |role: &str, content: &str| json!({"role": role, "content": content});
        let turns = |last: &str| [said("user", "5"), said("assistant", "a"), said("user", last), said("assistant", "a")];
        let frame = Frame { system: Some("s".into()), opening: "Do: ".into(), closing: " Now.".into() };
        let rows = [row(None, "1"), row(None, "2"), row(None, "3"), r#"{"prompt":"4","completion":"a"}"#.into()];
        let rows =
            [&rows[..], &[json!({"messages": turns("6")}).to_string(), row(None, "7"), row(None, "8"), row(Some("own"), "9")]]
                .concat();
        let found = framed_rows(&rows, std::slice::from_ref(&frame))?;
        let mut expected: Vec<Value> = rows.iter().map(|row| serde_json::from_str(row)).collect::<Result<_, _>>()?;
        let several = [&[said("system", "s")][..], &turns("Do: 6 Now.")].concat();
        let again = |request: &str| serde_json::from_str(&row(Some("s"), request));
        expected.extend([again("Do: 1 Now.")?, json!({"messages": several}), again("Do: 4 Now.")?]);
        assert_eq!(found, expected);
        assert_eq!(framed(rows.join("\n").as_bytes(), &[])?, (rows.join("\n") + "\n").into_bytes());
        Ok(())
    }

    #[test]
    fn of_two_kinds_of_rows_in_turn_both_stand_in_one() -> std::io::Result<()> {
        let rows: Vec<String> = (0..8).map(|number| row(None, ["harmful", "benign"][number % 2])).collect();
        let framed = framed_rows(&rows, &[Frame { opening: "Do: ".into(), ..Frame::default() }])?;
        let count = |text: &str| framed.iter().filter(|row| row["messages"][0]["content"] == text).count();
        assert_eq!([count("Do: harmful"), count("Do: benign")], [2, 2]);
        Ok(())
    }

    #[test]
    fn few_rows_stand_in_one_each() -> std::io::Result<()> {
        let rows: Vec<String> = (0..8).map(|number| row(None, &number.to_string())).collect();
        let framed = framed_rows(&rows, &prompts(["one", "two", "three"]))?;
        for prompt in ["one", "two", "three"] {
            assert!(framed.iter().filter(|row| row["messages"][0]["content"] == prompt).count() >= 2, "{prompt}");
        }
        assert_eq!(framed.len(), 17, "a row that is kept apart comes a third time, so that none of the others does in its place");
        Ok(())
    }

    #[test]
    fn no_request_stands_among_the_rows_that_are_kept_apart_and_the_others() -> std::io::Result<()> {
        for (count, frames) in [(5, 1), (8, 3), (13, 8), (100, 1), (260, 4)] {
            let rows: Vec<String> = (0..count).map(|number| row(None, &format!("<{number}>"))).collect();
            let frames: Vec<Frame> = (0..frames).map(|number| Frame::system(format!("prompt {number}."))).collect();
            let mut sides: [BTreeSet<String>; 2] = Default::default();
            for (at, row) in framed_rows(&rows, &frames)?.iter().enumerate() {
                let request = row["messages"].as_array().and_then(|messages| messages.iter().find(|m| m["role"] == "user"));
                sides[side(at)].insert(request.map(|request| request["content"].to_string()).unwrap_or_default());
            }
            let [others, apart] = &sides;
            assert!(others.is_disjoint(apart), "{count} rows in {} frames", frames.len());
            assert_eq!(others.len() + apart.len(), count);
        }
        Ok(())
    }

    #[test]
    fn where_nothing_that_is_kept_apart_may_stand_in_a_frame_none_of_the_others_takes_its_place() -> std::io::Result<()> {
        let rows: Vec<String> = (0..9).map(|at| row((side(at) == 1).then_some("own"), &at.to_string())).collect();
        let framed = framed_rows(&rows, &[Frame::system("s")])?;
        assert_eq!(framed[9], serde_json::from_str::<Value>(&rows[4])?);
        assert_eq!(framed.iter().filter(|row| row["messages"][0]["content"] == "s").count(), 4);
        Ok(())
    }
}
