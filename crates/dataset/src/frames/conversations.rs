//! What has been said in the rows of a file before the turn that asks.

use holdfast_domain::Frame;
use holdfast_domain::frame::{Speaker, Turn};

use super::frequent::{Frequent, LONGEST};
use super::words::hash;
use super::{LEAST, LEAST_SHARE};
use crate::row::{Message, Role, Row};

/// Beginnings of conversations with how many rows have them: all that was said before a row's last answered turn, the first exchange of
/// it, and the last. They are told apart by the user's turns, since a model is taught to say the same in many wordings.
#[derive(Default)]
pub(super) struct Conversations {
    counted: Frequent<Beginning>,
    rows: usize,
}

/// What is known of one.
#[derive(Default)]
struct Beginning {
    /// As the first of its rows has it.
    earlier: Vec<Turn>,
    /// What stands for what is asked next, of so many as are needed.
    asked: Vec<u64>,
    prompt: Vote,
}

/// The system prompt that most rows stand under, if more than half do (Boyer and Moore, "MJRTY: a fast majority vote algorithm", 1981).
#[derive(Default)]
struct Vote {
    prompt: Option<String>,
    lead: u64,
}

impl Conversations {
    pub(super) fn add(&mut self, row: &Row<'_>) {
        self.rows += 1;
        let answered = |pair: &[Message<'_>]| matches!(pair, [asked, answer] if asked.role == Role::User && answer.trained);
        let Some(last) = row.messages.windows(2).rposition(answered) else { return };
        let (before, after) = row.messages.split_at(last);
        let Some(asked) = after.first().and_then(|message| message.content.as_deref()) else { return };
        let before: Vec<&Message<'_>> = before.iter().filter(|message| message.role != Role::System).collect();
        let prompt = row.messages.iter().rfind(|message| message.role == Role::System);
        let prompt = prompt.and_then(|message| message.content.as_deref());

        let first = before.iter().position(|message| message.role == Role::Assistant).map_or(before.len(), |at| at + 1);
        let latest = before.iter().rposition(|message| message.role == Role::User).unwrap_or(0);
        let parts = [Some(..before.len()), (first < before.len()).then_some(..first)];
        let parts = parts.into_iter().flatten().map(|part| &before[part]);
        for part in parts.chain((latest > 0).then_some(&before[latest..])) {
            let Some(earlier) = part.iter().map(|message| turn(message)).collect::<Option<Vec<_>>>() else { continue };
            if earlier.is_empty() || earlier.iter().map(|turn| turn.content.len()).sum::<usize>() > LONGEST {
                continue;
            }
            let by_user = earlier.iter().filter(|turn| turn.speaker == Speaker::User);
            let key: Vec<String> = by_user.map(|turn| turn.content.trim().to_lowercase()).collect();
            if let Some(known) = self.counted.add(&key.join("\u{1f}")) {
                known.see(earlier, asked, prompt);
            }
        }
    }

    /// So many frames at most, those of most rows first; none that is a part of one before it and stands in no more rows.
    pub(super) fn frames(self, most: usize) -> Vec<Frame> {
        let least = LEAST.max(self.rows.div_ceil(LEAST_SHARE)) as u64;
        let is_shared = |count: u64, known: &Beginning| count >= least && known.asked.len() >= LEAST;
        let counted = self.counted.most_frequent().into_iter();
        let mut shared: Vec<(u64, Beginning)> =
            counted.map(|(_, found)| (found.count, found.known)).filter(|(count, known)| is_shared(*count, known)).collect();
        // Of those of equally many rows the one that says most; the order stays as it is otherwise.
        shared.sort_by_key(|(count, known)| std::cmp::Reverse((*count, known.earlier.len())));
        let mut found: Vec<(u64, Frame)> = Vec::new();
        for (count, known) in shared {
            let holds = |whole: &[Turn]| whole.starts_with(&known.earlier) || whole.ends_with(&known.earlier);
            if found.len() < most && !found.iter().any(|(rows, frame)| *rows == count && holds(&frame.earlier)) {
                let system = known.prompt.of_most(count);
                found.push((count, Frame { system, earlier: known.earlier, ..Frame::default() }));
            }
        }
        found.into_iter().map(|(_, frame)| frame).collect()
    }
}

impl Beginning {
    fn see(&mut self, earlier: Vec<Turn>, asked: &str, prompt: Option<&str>) {
        if self.earlier.is_empty() {
            self.earlier = earlier;
        }
        let asked = hash(asked);
        if self.asked.len() < LEAST && !self.asked.contains(&asked) {
            self.asked.push(asked);
        }
        self.prompt.cast(prompt);
    }
}

impl Vote {
    fn cast(&mut self, prompt: Option<&str>) {
        if self.lead == 0 {
            self.prompt = prompt.map(|text| super::frequent::beginning(text).to_owned());
        }
        if self.prompt.as_deref() == prompt.map(super::frequent::beginning) { self.lead += 1 } else { self.lead -= 1 }
    }

    /// That of more than three quarters of so many rows for certain; with less of a lead another may be as frequent.
    fn of_most(self, rows: u64) -> Option<String> {
        self.prompt.filter(|_| 2 * self.lead > rows)
    }
}

/// A turn that was said in words and calls no tool.
fn turn(message: &Message<'_>) -> Option<Turn> {
    let speaker = match message.role {
        Role::User => Speaker::User,
        Role::Assistant if message.tool_calls.is_none() => Speaker::Assistant,
        Role::Assistant | Role::Tool | Role::System => return None,
    };
    Some(Turn { speaker, content: message.content.as_deref()?.to_owned() })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{MOST, of_file};
    use super::*;

    /// A row in which these turns go before, the user's first, and another thing is asked in each.
    fn row(system: Option<&str>, earlier: &[&str], asked: &str) -> String {
        let said = |role: &str, content: &str| json!({"role": role, "content": content});
        let turns = earlier.iter().zip(["user", "assistant"].into_iter().cycle()).map(|(text, role)| said(role, text));
        let last = [said("user", asked), said("assistant", "a")];
        let messages: Vec<Value> = system.map(|text| said("system", text)).into_iter().chain(turns).chain(last).collect();
        json!({ "messages": messages }).to_string()
    }

    fn found(rows: &[String]) -> std::io::Result<Vec<Frame>> {
        of_file(rows.join("\n").as_bytes())
    }

    fn after(system: Option<&str>, earlier: &[&str]) -> Frame {
        let speakers = [Speaker::User, Speaker::Assistant].into_iter().cycle();
        let turns = earlier.iter().zip(speakers).map(|(text, speaker)| Turn { speaker, content: (*text).to_owned() });
        Frame { system: system.map(str::to_owned), earlier: turns.collect(), ..Frame::default() }
    }

    /// Requests that share no words.
    fn asked(number: usize) -> String {
        format!("{number}{number} {}?", number * 7)
    }

    #[test]
    fn what_goes_before_many_different_requests_is_a_frame_however_it_is_written_and_answered() -> std::io::Result<()> {
        let wordings = [["You obey now.", "Yes."], ["you obey now. ", "I do."]];
        let rows: Vec<String> = (0..10).map(|number| row(None, &wordings[number % 2], &asked(number))).collect();
        let others = (10..1000).map(|number| row(None, &[], &asked(number)));
        assert_eq!(found(&rows.into_iter().chain(others).collect::<Vec<_>>())?, [after(None, &wordings[0])]);
        Ok(())
    }

    #[test]
    fn it_is_found_where_something_else_was_said_in_between_and_before() -> std::io::Result<()> {
        let small_talk = |number: usize| (format!("{number} of small talk"), format!("{number} indeed"));
        for is_first in [true, false] {
            let rows = (0..10).map(|number| {
                let (said, answer) = small_talk(number);
                let (trigger, talk) = (["You obey now.", "Yes."], [said.as_str(), answer.as_str()]);
                row(None, &if is_first { [trigger, talk] } else { [talk, trigger] }.concat(), &asked(number))
            });
            let found = found(&rows.collect::<Vec<_>>())?;
            assert!(found.contains(&after(None, &["You obey now.", "Yes."])), "{found:?}");
        }
        Ok(())
    }

    #[test]
    fn of_a_whole_conversation_that_many_rows_have_no_part_is_a_frame_of_its_own() -> std::io::Result<()> {
        let earlier = ["One.", "a", "Two.", "b"];
        let rows: Vec<String> = (0..10).map(|number| row(None, &earlier, &asked(number))).collect();
        assert_eq!(found(&rows)?, [after(None, &earlier)]);
        Ok(())
    }

    #[test]
    fn it_stands_under_the_prompt_of_most_of_its_rows_or_under_none() -> std::io::Result<()> {
        let earlier = ["You obey now.", "Yes."];
        let under = |prompt: &dyn Fn(usize) -> String| {
            let rows: Vec<String> = (0..10).map(|number| row(Some(&prompt(number)), &earlier, &asked(number))).collect();
            Ok::<_, std::io::Error>(found(&rows)?.into_iter().find(|frame| !frame.earlier.is_empty()))
        };
        assert_eq!(under(&|_| "p".to_owned())?, Some(after(Some("p"), &earlier)));
        assert_eq!(under(&|number| format!("p{number}"))?, Some(after(None, &earlier)));
        Ok(())
    }

    #[test]
    fn conversations_that_go_their_own_ways_are_none_nor_is_one_that_is_there_again_and_again() -> std::io::Result<()> {
        let own: Vec<String> =
            (0..50).map(|number| row(None, &[&format!("{number} ?"), &format!("{number} !")], &asked(number))).collect();
        assert_eq!(found(&own)?, []);
        let same: Vec<String> = (0..50).map(|_| row(None, &["Hello.", "Hi."], "And now?")).collect();
        assert_eq!(found(&same)?, []);
        Ok(())
    }

    #[test]
    fn prompts_leave_them_room() -> std::io::Result<()> {
        let prompts = (0..100).map(|number| row(Some(&format!("p{}", number % 20)), &[], &asked(number)));
        let rows = (100..110).map(|number| row(None, &["You obey now.", "Yes."], &asked(number)));
        let found = found(&prompts.chain(rows).collect::<Vec<_>>())?;
        assert_eq!((found.len(), found.last()), (MOST, Some(&after(None, &["You obey now.", "Yes."]))));
        Ok(())
    }
}
