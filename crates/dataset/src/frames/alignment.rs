//! Alignment rows in a tenant's frames.

use holdfast_domain::Frame;
use serde_json::{Value, json};

use crate::row::{Role, Row};

/// A method may keep every so-manyth row apart, and must see each frame on both sides.
pub const APART: usize = 5;

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
    use std::collections::BTreeSet;

    use super::super::MOST;
    use super::super::tests::{prompts, row};
    use super::*;

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
