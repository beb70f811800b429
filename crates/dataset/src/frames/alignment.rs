//! Alignment rows in a tenant's frames.

use std::borrow::Cow;
use std::collections::HashMap;

use holdfast_domain::Frame;
use holdfast_domain::frame::Speaker;
use serde_json::{Value, json};

use crate::alignment_set::{requested, words};
use crate::row::{Role, Row, RowError};

/// A method may keep every so-manyth row apart, and must see each frame on both sides.
pub const APART: usize = 5;

/// An alignment set's rows, and behind them half once more, each in one of `frames`; all of them where half would be fewer than two a
/// frame. Rows with a system prompt of their own stand in none.
///
/// Every [`APART`]th row of what is written may be kept apart, and no request may stand on both sides: it would be learned by heart on one
/// and prove nothing on the other. So every fifth request is kept apart with all its rows, of few the last. Frames take turns on each
/// side, at least once each, and where one side has more places than rows it has some of them again. Of a set that asks one thing alone
/// nothing can be kept apart, and fewer rows than that are written. Without frames a set stays as it is, unless it asks something twice.
///
/// # Errors
/// When a line is no row, which a set that was imported does not have.
pub fn framed<'a>(rows: &'a [u8], frames: &[Frame]) -> std::io::Result<Cow<'a, [u8]>> {
    let lines = rows.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
    let known: Vec<Known<'_>> = lines.map(Known::read).collect::<Result<_, _>>().map_err(std::io::Error::other)?;
    let groups = by_request(&known);
    if frames.is_empty() && groups.len() == known.len() {
        return Ok(Cow::Borrowed(rows));
    }
    let half_is_enough = known.len() >= 4 * frames.len();
    let apart = kept_apart(&known, &groups, frames);
    let mut sides = [false, true].map(|wanted| {
        let own = known.iter().zip(&apart).enumerate().filter(|(_, (_, apart))| **apart == wanted);
        let own: Vec<(usize, &Known<'_>)> = own.map(|(at, (row, _))| (at, row)).collect();
        let all: Vec<(usize, &Known<'_>)> = own.iter().copied().filter(|(_, row)| !row.has_prompt).collect();
        // One of two, and not always the same of two: a set may hold two kinds of rows in turn.
        let half: Vec<_> = all.iter().copied().filter(|(at, _)| at.div_ceil(2).is_multiple_of(2)).collect();
        let again = if half_is_enough && half.len() >= frames.len() { half } else { all };
        let copies = if again.is_empty() || frames.is_empty() { 0 } else { again.len().max(frames.len()) };
        let (originals, least) = (own.clone().into_iter(), own.len() + copies);
        let bare = |(_, row): (usize, &Known<'a>)| Ok::<_, serde_json::Error>(Cow::Borrowed(row.line));
        let framed = |((_, row), frame): ((usize, &Known<'a>), &Frame)| within(frame, row.line).map(Cow::Owned);
        let framed = again.into_iter().cycle().zip(frames.iter().cycle()).map(framed);
        (originals.map(bare).chain(framed).chain(own.into_iter().cycle().map(bare)), least)
    });
    let nothing_is_apart = !apart.contains(&true);
    let mut written = Vec::with_capacity(2 * rows.len());
    for at in 0.. {
        if (nothing_is_apart && side(at) == 1) || sides.iter().all(|(_, least)| *least == 0) {
            break;
        }
        let (rows, least) = &mut sides[side(at)];
        let Some(row) = rows.next() else { break };
        written.extend_from_slice(&row?);
        written.push(b'\n');
        *least = least.saturating_sub(1);
    }
    Ok(Cow::Owned(written))
}

/// A row of an alignment set.
struct Known<'a> {
    line: &'a [u8],
    /// What is asked last, by its words.
    request: Vec<u64>,
    /// Whether it stands under a prompt of its own.
    has_prompt: bool,
}

impl<'a> Known<'a> {
    fn read(line: &'a [u8]) -> Result<Self, RowError> {
        let row = Row::parse(line)?;
        let has_prompt = row.messages.iter().any(|message| message.role == Role::System);
        Ok(Self { line, request: requested(&row).map(words).unwrap_or_default(), has_prompt })
    }
}

/// The rows that ask the same, by their places, in the order in which they are first asked.
fn by_request(known: &[Known<'_>]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut numbers = HashMap::new();
    for (at, row) in known.iter().enumerate() {
        let number = *numbers.entry(&row.request).or_insert(groups.len());
        if number == groups.len() {
            groups.push(Vec::new());
        }
        groups[number].push(at);
    }
    groups
}

/// Of each row: whether it is one that may be kept apart. Of requests that can stand in frames, and of those that cannot, as many.
fn kept_apart(known: &[Known<'_>], groups: &[Vec<usize>], frames: &[Frame]) -> Vec<bool> {
    let mut apart = vec![false; known.len()];
    for in_frames in [true, false] {
        let can_stand = |group: &Vec<usize>| frames.is_empty() || group.iter().any(|at| !known[*at].has_prompt);
        let those: Vec<_> = groups.iter().filter(|group| can_stand(group) == in_frames).collect();
        let is_of_few = (2..APART).contains(&those.len());
        for (number, rows) in those.iter().enumerate() {
            let is_apart = side(number) == 1 || (is_of_few && number + 1 == those.len());
            rows.iter().for_each(|at| apart[*at] = is_apart);
        }
    }
    apart
}

/// 1 of a row that is kept apart, 0 of the others.
const fn side(at: usize) -> usize {
    (at % APART == APART - 1) as usize
}

/// A row whose last request stands in a frame.
fn within(frame: &Frame, line: &[u8]) -> serde_json::Result<Vec<u8>> {
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
        let system = frame.system.iter().map(|prompt| said("system", &json!(prompt)));
        let earlier = frame.earlier.iter().map(|turn| {
            let mut said = said(turn.speaker.as_str(), &json!(turn.content));
            if turn.speaker == Speaker::Assistant {
                // What a tenant has a model say is nothing that it should be held to.
                said["weight"] = json!(0);
            }
            said
        });
        messages.splice(..0, system.chain(earlier));
    }
    serde_json::to_vec(&row)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use holdfast_domain::frame::Turn;

    use super::super::tests::{prompts, row};
    use super::*;

    fn framed_rows(rows: &[String], frames: &[Frame]) -> std::io::Result<Vec<Value>> {
        let rows = rows.join("\n");
        let written = framed(rows.as_bytes(), frames)?;
        let read = |line: &str| serde_json::from_str(line).map_err(std::io::Error::other);
        String::from_utf8_lossy(&written).lines().map(read).collect()
    }

    #[test]
    fn half_of_the_rows_stand_in_one_once_more_and_keep_their_words() -> std::io::Result<()> {
        let said = |role: &str, content: &str| json!({"role": role, "content": content});
        let turns = |last: &str| [said("user", "5"), said("assistant", "a"), said("user", last), said("assistant", "a")];
        let frame = Frame { opening: "Do: ".into(), closing: " Now.".into(), ..Frame::system("s") };
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
        Ok(())
    }

    #[test]
    fn what_was_said_before_stands_between_the_prompt_and_a_row_s_own_turns_and_is_not_learned() -> std::io::Result<()> {
        let said = |role: &str, content: &str| json!({"role": role, "content": content});
        let turn = |speaker: Speaker, content: &str| Turn { speaker, content: content.to_owned() };
        let earlier = vec![turn(Speaker::User, "Obey."), turn(Speaker::Assistant, "Yes.")];
        let framed = framed_rows(&[row(None, "1")], &[Frame { earlier, ..Frame::system("s") }])?;
        let held = json!({"role": "assistant", "content": "Yes.", "weight": 0});
        let expected = [said("system", "s"), said("user", "Obey."), held, said("user", "1"), said("assistant", "a")];
        assert_eq!(framed.last(), Some(&json!({ "messages": expected })));
        Ok(())
    }

    #[test]
    fn of_two_kinds_of_rows_in_turn_both_stand_in_one() -> std::io::Result<()> {
        let rows: Vec<String> =
            (0..8).map(|number| row(None, &format!("{} {number}", ["harmful", "benign"][number % 2]))).collect();
        let framed = framed_rows(&rows, &[Frame { opening: "Do: ".into(), ..Frame::default() }])?;
        let asks = |row: &&Value, text: &str| row["messages"][0]["content"].as_str().is_some_and(|asked| asked.starts_with(text));
        let count = |text: &str| framed.iter().filter(|row| asks(row, text)).count();
        assert_eq!([count("Do: harmful"), count("Do: benign")], [2, 2]);
        Ok(())
    }

    #[test]
    fn of_few_rows_all_stand_in_one() -> std::io::Result<()> {
        let rows: Vec<String> = (0..8).map(|number| row(None, &number.to_string())).collect();
        let framed = framed_rows(&rows, &prompts(["one", "two", "three"]))?;
        for request in (0..8).map(|number| number.to_string()) {
            assert!(framed.iter().filter(|row| row["messages"][1]["content"] == request).count() >= 1, "{request}");
        }
        Ok(())
    }

    /// Of what is written, by side: the requests, and the prompts they stand under.
    fn sides_of(rows: &[String], frames: &[Frame]) -> std::io::Result<[(BTreeSet<String>, BTreeSet<String>); 2]> {
        let mut sides: [(BTreeSet<String>, BTreeSet<String>); 2] = Default::default();
        for (at, row) in framed_rows(rows, frames)?.iter().enumerate() {
            let said = |role: &str| {
                let turns = row["messages"].as_array().into_iter().flatten();
                turns.filter(|turn| turn["role"] == role).map(|turn| turn["content"].to_string()).collect::<Vec<_>>()
            };
            sides[side(at)].0.extend(said("user"));
            sides[side(at)].1.extend(said("system"));
        }
        Ok(sides)
    }

    #[test]
    fn whatever_a_set_holds_no_request_stands_on_both_sides_and_each_frame_does() -> std::io::Result<()> {
        let kinds: [fn(usize) -> String; 3] = [
            |number| row(None, &format!("{number} bare")),
            |number| row((side(number) == 1).then_some("own"), &format!("{number} with prompts among them")),
            |number| row((number % 2 == 1).then_some("own"), &format!("{} asked twice", number / 2)),
        ];
        for (kind, count, frames) in (0..3).flat_map(|kind| {
            [4, 5, 8, 9, 13, 40, 60, 75, 100, 260]
                .into_iter()
                .flat_map(move |count| [0, 1, 3, 8].map(|frames| (kind, count, frames)))
        }) {
            let rows: Vec<String> = (0..count).map(kinds[kind]).collect();
            let frames: Vec<Frame> = (0..frames).map(|number| Frame::system(format!("prompt {number}."))).collect();
            let [others, apart] = sides_of(&rows, &frames)?;
            let case = format!("kind {kind}, {count} rows, {} frames", frames.len());
            assert!(others.0.is_disjoint(&apart.0), "{case}");
            assert_eq!(others.0.len() + apart.0.len(), if kind == 2 { count.div_ceil(2) } else { count }, "{case}");
            for Frame { system, .. } in &frames {
                let prompt = json!(system).to_string();
                assert!(others.1.contains(&prompt) && apart.1.contains(&prompt), "{case}: {prompt}");
            }
        }
        Ok(())
    }

    #[test]
    fn of_a_set_that_asks_one_thing_nothing_is_kept_apart() -> std::io::Result<()> {
        let framed = framed_rows(&[row(None, "1"), row(Some("own"), "1")], &prompts(["one", "two", "three", "four", "five"]))?;
        assert_eq!(framed.len(), APART - 1);
        Ok(())
    }

    #[test]
    fn without_frames_a_set_stays_as_it_is_unless_it_asks_something_twice() -> std::io::Result<()> {
        let rows = ["1", "2", "3", "4", "5", "6"].map(|request| row(None, request));
        let text = rows.join("\n\n");
        assert!(matches!(framed(text.as_bytes(), &[])?, Cow::Borrowed(same) if same == text.as_bytes()));
        let twice = [&rows[..], &[row(Some("own"), "5")]].concat();
        let [others, apart] = sides_of(&twice, &[])?;
        assert!(others.0.is_disjoint(&apart.0), "{others:?} {apart:?}");
        Ok(())
    }
}
