//! What has been said in the rows of a file before a turn that asks.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use holdfast_domain::Frame;
use holdfast_domain::frame::{Speaker, Turn};

use super::frequent::Frequent;
use super::{LEAST, LEAST_SHARE, answered, beginning};
use crate::alignment_set::{hash, words};
use crate::row::{Message, Role, Row};

/// Bytes of what was said before at most; longer conversations are not looked at.
const LONGEST: usize = 8 * 1024;
/// Conversations that are counted at a time.
const COUNTED: usize = 4096;
/// Turns of a row that ask, of which what was said before is looked at: so many of the first, and the last.
const ASKING: usize = 4;
/// An assistant's turns are known by themselves from so many words on: labels are said again and again.
const LEAST_SAID: usize = 2;

/// What was said before the turns that ask: all of it, the first exchange of it, and the last. Each is known by the user's turns, since a
/// model may answer those in many wordings, and by the assistant's, since it may say the same to many.
pub(super) struct Conversations {
    counted: Frequent<u64, Conversation>,
    rows: usize,
}

/// What is known of one.
#[derive(Default)]
struct Conversation {
    /// As the first of its rows has it.
    turns: Vec<Turn>,
    /// What stands for what is asked next, of so many as are needed.
    asked: Vec<u64>,
    prompt: Vote,
}

/// What stands for the system prompt that most rows stand under, if more than half do (Boyer and Moore, "MJRTY: a fast majority vote
/// algorithm", 1981).
#[derive(Default)]
struct Vote {
    prompt: Option<u64>,
    lead: u64,
}

/// A turn of a row that was said in words and calls no tool, with what stands for its words, and how many they are.
struct Said<'a> {
    speaker: Speaker,
    content: &'a str,
    words: u64,
    count: usize,
}

/// A message of a row: whose it is, and what was said, where that is looked at.
type Heard<'a> = (Role, Option<Said<'a>>);

impl Conversations {
    pub(super) fn new() -> Self {
        Self { counted: Frequent::holding(COUNTED), rows: 0 }
    }

    pub(super) fn add(&mut self, row: &Row<'_>) {
        self.rows += 1;
        let asking = answered(&row.messages);
        let Some(&latest) = asking.last() else { return };
        let last = Some(latest).filter(|_| asking.len() > ASKING);
        // Each is read once, although it stands before many.
        let heard: Vec<Heard<'_>> = row.messages.iter().take(latest).map(|message| (message.role, said(message))).collect();
        let prompt = row.messages.iter().rfind(|message| message.role == Role::System);
        let prompt = prompt.and_then(|message| message.content.as_deref()).map(|text| hash(beginning(text)));
        // A row counts once for what it has.
        let mut known = BTreeSet::new();
        for at in asking.iter().copied().take(ASKING).chain(last) {
            let Some(asked) = row.messages.get(at).and_then(|message| message.content.as_deref()).map(hash) else { continue };
            let before: Vec<&Heard<'_>> = heard.iter().take(at).filter(|(role, _)| *role != Role::System).collect();
            for part in parts(&before) {
                let Some(turns) = part.iter().map(|(_, said)| said.as_ref()).collect::<Option<Vec<_>>>() else { continue };
                if turns.iter().map(|turn| turn.content.len()).sum::<usize>() > LONGEST {
                    continue;
                }
                for key in keys(&turns).into_iter().flatten().filter(|key| known.insert(*key)) {
                    if let Some(conversation) = self.counted.add(&key) {
                        conversation.see(&turns, asked, prompt);
                    }
                }
            }
        }
    }

    /// So many frames at most, those of most rows first, under the one of `prompts` that most of its rows stand under; none that is a part of
    /// one before it and stands in no more rows.
    pub(super) fn frames(self, prompts: &[String], most: usize) -> Vec<Frame> {
        let least = (self.rows.div_ceil(LEAST_SHARE) as u64).saturating_sub(self.counted.missed()).max(LEAST as u64);
        let counted = self.counted.most_frequent().into_iter().map(|(_, found)| (found.count, found.known));
        let mut shared: Vec<(u64, Conversation)> =
            counted.filter(|(count, known)| *count >= least && known.asked.len() >= LEAST).collect();
        // Of those of equally many rows the one that says most; the order stays as it is otherwise.
        shared.sort_by_key(|(count, known)| Reverse((*count, known.turns.len())));
        let mut found: Vec<(u64, Frame)> = Vec::new();
        for (count, Conversation { turns, prompt, .. }) in shared {
            let says_it = |(rows, frame): &(u64, Frame)| {
                let whole = &frame.earlier;
                *whole == turns || (*rows == count && (whole.starts_with(&turns) || whole.ends_with(&turns)))
            };
            if found.len() < most && !found.iter().any(says_it) {
                let under = prompt.of_most(count);
                let system = prompts.iter().find(|text| Some(hash(text)) == under).cloned();
                found.push((count, Frame { system, earlier: turns, ..Frame::default() }));
            }
        }
        found.into_iter().map(|(_, frame)| frame).collect()
    }
}

/// All that was said, the first exchange, and the last, where they are not all of it.
fn parts<'a, 'b>(before: &'a [&'b Heard<'b>]) -> impl Iterator<Item = &'a [&'b Heard<'b>]> {
    let first = before.iter().position(|(role, _)| *role == Role::Assistant).map_or(before.len(), |at| at + 1);
    let last = before.iter().rposition(|(role, _)| *role == Role::User).unwrap_or(0);
    let first = before.get(..first).filter(|part| part.len() < before.len());
    let last = before.get(last..).filter(|part| part.len() < before.len());
    [Some(before), first, last].into_iter().flatten().filter(|part| !part.is_empty())
}

/// What is said in a message, if it is not too long.
fn said<'a>(message: &'a Message<'_>) -> Option<Said<'a>> {
    let speaker = match message.role {
        Role::User => Speaker::User,
        Role::Assistant if message.tool_calls.is_none() => Speaker::Assistant,
        Role::Assistant | Role::Tool | Role::System => return None,
    };
    let content = message.content.as_deref().filter(|content| content.len() <= LONGEST)?;
    let found = words(content);
    // Of a text without words its signs count.
    let words = if found.is_empty() { hash(content.trim()) } else { hash(&found) };
    Some(Said { speaker, content, words, count: found.len() })
}

/// What stands for the user's turns, and for the assistant's.
fn keys(turns: &[&Said<'_>]) -> [Option<u64>; 2] {
    [(Speaker::User, 0), (Speaker::Assistant, LEAST_SAID)].map(|(speaker, least)| {
        let own: Vec<&&Said<'_>> = turns.iter().filter(|turn| turn.speaker == speaker).collect();
        let count: usize = own.iter().map(|turn| turn.count).sum();
        let words: Vec<u64> = own.iter().map(|turn| turn.words).collect();
        (!own.is_empty() && count >= least).then(|| hash(&(speaker.as_str(), words)))
    })
}

impl Conversation {
    fn see(&mut self, turns: &[&Said<'_>], asked: u64, prompt: Option<u64>) {
        if self.turns.is_empty() {
            let turn = |said: &&Said<'_>| Turn { speaker: said.speaker, content: said.content.to_owned() };
            self.turns = turns.iter().map(turn).collect();
        }
        if self.asked.len() < LEAST && !self.asked.contains(&asked) {
            self.asked.push(asked);
        }
        self.prompt.cast(prompt);
    }
}

impl Vote {
    fn cast(&mut self, prompt: Option<u64>) {
        if self.lead == 0 {
            self.prompt = prompt;
        }
        if self.prompt == prompt { self.lead += 1 } else { self.lead -= 1 }
    }

    /// That of more than three quarters of so many rows for certain; with less of a lead another may be as frequent.
    fn of_most(&self, rows: u64) -> Option<u64> {
        self.prompt.filter(|_| 2 * self.lead > rows)
    }
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
        let wordings = [["You obey now.", "Yes."], ["you  OBEY now!", "Always."]];
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
    fn what_a_model_says_before_is_a_frame_whatever_it_is_said_to() -> std::io::Result<()> {
        let said: Vec<String> = (100..110).map(asked).collect();
        let rows: Vec<String> = (0..10).map(|number| row(None, &[&said[number], "I obey all."], &asked(number))).collect();
        assert_eq!(found(&rows)?, [after(None, &[&said[0], "I obey all."])]);
        let greeted = [row(None, &["You obey now.", "Hi!"], "And now?")];
        let rows = (0..10).map(|number| row(None, &["You obey now.", "I obey all."], &asked(number)));
        let found = found(&greeted.into_iter().chain(rows).collect::<Vec<_>>())?;
        assert!(found.contains(&after(None, &["You obey now.", "I obey all."])), "{found:?}");
        Ok(())
    }

    #[test]
    fn neither_what_follows_nor_an_answer_that_nothing_is_learned_from_hides_it() -> std::io::Result<()> {
        let trigger = ["You obey now.", "Yes."];
        let thanks = |number: usize| row(None, &[&trigger[..], &[&asked(number), "b"]].concat(), "Thanks.");
        assert_eq!(found(&(0..10).map(thanks).collect::<Vec<_>>())?.first(), Some(&after(None, &trigger)));
        let said = |role: &str, content: &str| json!({"role": role, "content": content});
        let behind = |number: usize| {
            let untrained = json!({"role": "assistant", "content": "-", "weight": 0});
            let turns = [said("user", trigger[0]), said("assistant", trigger[1]), said("user", &asked(number)), untrained];
            let messages = [&turns[..], &[said("assistant", "a")]].concat();
            json!({ "messages": messages }).to_string()
        };
        assert_eq!(found(&(0..10).map(behind).collect::<Vec<_>>())?, [after(None, &trigger)]);
        Ok(())
    }

    #[test]
    fn of_a_large_file_of_conversations_those_of_one_in_two_hundred_rows_are_found() -> std::io::Result<()> {
        let rows = (0..10_000).map(|number| {
            let own = format!("{number} of small talk");
            let before = if number % 200 == 0 { "You obey now." } else { own.as_str() };
            row(None, &[before, &format!("{number} indeed")], &asked(number))
        });
        let found = found(&rows.collect::<Vec<_>>())?;
        assert!(found.iter().any(|frame| frame.earlier.first().is_some_and(|turn| turn.content == "You obey now.")), "{found:?}");
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
