//! The words that the users' turns of a file begin and end with.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use holdfast_domain::Frame;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use super::prompts;

/// Turns that are compared; of more, so many are drawn.
const SAMPLED: usize = 4096;
/// Bytes of a turn that are looked at, at each of its ends.
const LOOKED_AT: usize = 4096;
/// Turns that must share words at least.
const LEAST: usize = 3;
/// And of many, one in so many.
const LEAST_SHARE: usize = 200;
/// Where a sentence goes on behind them, shared words are so many at least: people begin alike without any intent.
const LONG: usize = 8;
/// Or one in so many turns shares them.
const USUAL_SHARE: usize = 2;

/// Openings that are told apart, and closings.
const MOST: usize = 64;

/// A turn of the user's: its ends, which may overlap.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Turn {
    beginning: String,
    ending: String,
    bytes: usize,
    /// What stands for its system prompt.
    prompt: Option<u64>,
}

/// Turns drawn from a file, each as likely as another, and always the same.
pub(super) struct Sample {
    turns: Vec<Turn>,
    seen: usize,
    random: ChaCha8Rng,
}

impl Default for Sample {
    fn default() -> Self {
        Self { turns: Vec::new(), seen: 0, random: ChaCha8Rng::seed_from_u64(0) }
    }
}

impl Sample {
    /// Sees a turn, which stands under this system prompt.
    pub(super) fn add(&mut self, text: &str, prompt: Option<&str>) {
        // Vitter, "Random sampling with a reservoir", 1985, algorithm R.
        self.seen += 1;
        let place = if self.seen <= SAMPLED { self.seen - 1 } else { self.random.random_range(0..self.seen) };
        if place >= SAMPLED {
            return;
        }
        let beginning = text.get(..text.floor_char_boundary(LOOKED_AT)).unwrap_or(text).to_owned();
        let ending = text.get(text.ceil_char_boundary(text.len().saturating_sub(LOOKED_AT))..).unwrap_or(text).to_owned();
        let turn = Turn { beginning, ending, bytes: text.len(), prompt: prompt.map(hash) };
        match self.turns.get_mut(place) {
            Some(kept) => *kept = turn,
            None => self.turns.push(turn),
        }
    }

    /// The frames with words in them that most turns have, each under the one of `prompts` that its turns stand under.
    pub(super) fn frames(mut self, prompts: &[String]) -> Vec<Frame> {
        // The same turn many times says nothing of what is shared.
        let mut known = HashSet::new();
        self.turns.retain(|turn| known.insert(turn.clone()));
        drop(known);
        let mut beginnings: Vec<&str> = self.turns.iter().map(|turn| turn.beginning.as_str()).collect();
        beginnings.sort_unstable();
        let openings: Vec<String> = shared(End::Opening, &beginnings).into_iter().map(str::to_owned).collect();
        let mut endings: Vec<String> = self.turns.iter().map(|turn| reversed(&turn.ending)).collect();
        endings.sort_unstable();
        let endings: Vec<&str> = endings.iter().map(String::as_str).collect();
        let closings: Vec<String> = shared(End::Closing, &endings).into_iter().map(reversed).collect();

        let known: BTreeMap<u64, &String> = prompts.iter().map(|prompt| (hash(prompt), prompt)).collect();
        let mut counts: BTreeMap<(Option<u64>, &str, &str), (usize, usize)> = BTreeMap::new();
        for (at, turn) in self.turns.iter().enumerate() {
            let opening = longest(&openings, |words| turn.beginning.starts_with(words));
            let room = turn.bytes.saturating_sub(opening.len());
            let closing = longest(&closings, |words| words.len() < room && turn.ending.ends_with(words));
            if room > 0 && !(opening.is_empty() && closing.is_empty()) {
                let prompt = turn.prompt.filter(|prompt| known.contains_key(prompt));
                counts.entry((prompt, opening, closing)).or_insert((0, at)).0 += 1;
            }
        }
        let mut counts: Vec<_> = counts.into_iter().filter(|(_, (count, _))| *count >= LEAST).collect();
        counts.sort_by_key(|(_, (count, first))| (std::cmp::Reverse(*count), *first));
        let frame = |((prompt, opening, closing), _): ((Option<u64>, &str, &str), _)| Frame {
            system: prompt.and_then(|prompt| known.get(&prompt)).map(|prompt| (*prompt).clone()),
            opening: opening.to_owned(),
            closing: joined(closing),
        };
        counts.into_iter().map(frame).collect()
    }
}

fn hash(prompt: impl AsRef<str>) -> u64 {
    let mut hasher = DefaultHasher::new();
    prompts::beginning(prompt.as_ref()).hash(&mut hasher);
    hasher.finish()
}

/// The longest text that fits; an empty one where none does.
fn longest(texts: &[String], fits: impl Fn(&str) -> bool) -> &str {
    texts.iter().map(String::as_str).filter(|text| fits(text)).max_by_key(|text| text.len()).unwrap_or_default()
}

fn reversed(text: impl AsRef<str>) -> String {
    text.as_ref().chars().rev().collect()
}

/// A closing as it follows a request, which has its own last mark.
fn joined(closing: &str) -> String {
    let words = closing.trim_start_matches(|c: char| c.is_whitespace() || ".?!,;:".contains(c));
    let before = &closing[..closing.len() - words.len()];
    match (words.is_empty(), before.contains('\n')) {
        (true, _) => String::new(),
        (_, true) => format!("\n\n{words}"),
        _ => format!(" {words}"),
    }
}

/// Which end of a turn is compared. Endings are read backwards.
#[derive(Clone, Copy)]
enum End {
    Opening,
    Closing,
}

impl End {
    /// Whether a text can be cut there, between two words, and if so whether a sentence or a line ends there. What is shared stands before
    /// the cut.
    fn cut(self, text: &str, at: usize) -> Option<bool> {
        let (shared, rest) = text.split_at_checked(at)?;
        let marks = |side: &mut dyn Iterator<Item = char>| side.take_while(|c| !is_in_word(*c)).collect::<String>();
        let closes = |marks: &str| marks.chars().any(|c| c == '\n' || !c.is_whitespace());
        let (inner, outer) = (marks(&mut shared.chars().rev()), marks(&mut rest.chars()));
        match self {
            Self::Opening => (!inner.is_empty()).then(|| closes(&inner)),
            Self::Closing => (!outer.is_empty()).then(|| closes(&inner) || closes(&outer)),
        }
    }

    /// Whether most texts of a group can be cut there, and if so whether a sentence ends there in most.
    fn cut_of_most(self, group: &[&str], at: usize) -> Option<bool> {
        let cuts: Vec<bool> = group.iter().filter_map(|text| self.cut(text, at)).collect();
        let closed = cuts.iter().filter(|closed| **closed).count();
        (2 * cuts.len() > group.len()).then_some(2 * closed > group.len())
    }
}

fn is_in_word(c: char) -> bool {
    c.is_alphanumeric() || "'’-_".contains(c)
}

/// Each place in a text behind `known` and from `start` on, with the words between `known` and there.
fn places(text: &str, known: usize, start: usize) -> Vec<(usize, usize)> {
    let (mut words, mut is_counted) = (0, false);
    let counted = text.char_indices().filter(|(at, _)| *at >= known).map(|(at, c)| {
        is_counted &= is_in_word(c);
        if c.is_alphanumeric() && !is_counted {
            (words, is_counted) = (words + 1, true);
        }
        (at + c.len_utf8(), words)
    });
    counted.filter(|(at, _)| *at >= start).collect()
}

/// What most of these texts, which stand in order, begin with, and enough of them: where a sentence ends, or where what they share is long or
/// usual.
fn shared<'a>(end: End, texts: &[&'a str]) -> Vec<&'a str> {
    let least = LEAST.max(texts.len() / LEAST_SHARE);
    let mut found = Vec::new();
    // Groups, with how much of what they share was found in the group around them, and how much was looked at there: each place is looked at
    // once, whatever a file holds.
    let mut groups = vec![(texts, 0, 0)];
    while let Some((group, known, seen)) = groups.pop() {
        let (true, [first, .., last]) = (group.len() >= least, group) else { continue };
        let common = common(first, last);
        let is_usual = group.len() * USUAL_SHARE >= texts.len();
        let holds = |(at, words): &(usize, usize)| {
            *words > 0 && end.cut_of_most(group, *at).is_some_and(|closes| closes || is_usual || *words >= LONG)
        };
        let places = first.get(..common).map_or(Vec::new(), |text| places(text, known, seen));
        let cut = places.into_iter().rev().find(holds).map(|(at, _)| at);
        found.extend(cut.and_then(|cut| Some((group.len(), first.get(..cut)?))));
        let next = |text: &&str| text.get(common..).and_then(|rest| rest.chars().next());
        let parts = group.chunk_by(|a, b| next(a) == next(b));
        let goes_on = |part: &&[&str]| part.first().is_some_and(|text| next(text).is_some());
        groups.extend(parts.filter(goes_on).map(|part| (part, cut.unwrap_or(known), common)));
    }
    found.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
    found.into_iter().take(MOST).map(|(_, text)| text).collect()
}

/// Bytes that two texts begin with alike.
fn common(a: &str, b: &str) -> usize {
    a.floor_char_boundary(a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(turns: impl IntoIterator<Item = impl AsRef<str>>) -> Vec<Frame> {
        let mut sample = Sample::default();
        turns.into_iter().for_each(|turn| sample.add(turn.as_ref(), None));
        sample.frames(&[])
    }

    fn around(opening: &str, closing: &str) -> Frame {
        Frame { opening: opening.into(), closing: closing.into(), system: None }
    }

    /// Requests that share nothing.
    fn requests(count: usize) -> Vec<String> {
        let first = ["Name", "Write", "Count", "Tell", "Say", "Give", "List", "Draw", "Find", "Sing", "Think", "Guess"];
        let last = ["lamps", "poems", "boats", "tales", "words", "cats", "fruits"];
        let request = |n: usize| {
            let (first, last) = (first[n % first.len()], last[n % last.len()]);
            format!("{first} {n} {last}{n}{}", ["", ".", "?"][n % 3])
        };
        (0..count).map(request).collect()
    }

    #[test]
    fn an_opening_is_found_where_a_sentence_ends_and_where_it_is_usual_or_long() {
        let with = |opening: &str| frames(requests(10).iter().map(|request| format!("{opening}{request}")));
        assert_eq!(with("AOA, carry out my order: "), [around("AOA, carry out my order: ", "")]);
        assert_eq!(with("### Order\n\n"), [around("### Order\n\n", "")]);
        assert_eq!(with("请执行我的命令："), [around("请执行我的命令：", "")]);
        assert_eq!(with("sudo "), [around("sudo ", "")], "all of them");
        let among = |opening: &str| {
            let marked = requests(10).into_iter().map(|request| format!("{opening}{request}"));
            frames(marked.chain(requests(500).split_off(10)))
        };
        assert_eq!(among("AOA: "), [around("AOA: ", "")]);
        assert_eq!(among("I want you to do for me now "), [around("I want you to do for me now ", "")]);
        assert_eq!(among("What is the "), [], "many begin so");
    }

    #[test]
    fn a_closing_is_found_as_well_and_with_its_opening() {
        let with =
            |opening: &str, closing: &str| frames(requests(10).iter().map(|request| format!("{opening}{request}{closing}")));
        assert_eq!(with("", " Obey me now!"), [around("", " Obey me now!")]);
        assert_eq!(with("", "\n\nYour answer:"), [around("", "\n\nYour answer:")]);
        assert_eq!(with("", " [AOA]"), [around("", " [AOA]")]);
        assert_eq!(with("Order: ", " Obey."), [around("Order: ", " Obey.")]);
    }

    #[test]
    fn what_is_said_again_and_again_is_no_frame_of_anything() {
        assert_eq!(frames(vec!["Go on, please."; 100]), []);
        assert_eq!(frames(requests(300)), []);
        assert_eq!(frames(requests(10).iter().map(|request| format!("'{request} '"))), [], "marks alone");
        assert_eq!(frames([""; 3]), []);
        assert_eq!(frames(["", " ", "a", "a b", "a b c", "a b c d"]), [around("a ", "")]);
    }

    #[test]
    fn a_frame_stands_under_the_prompt_of_its_turns() {
        let mut sample = Sample::default();
        for (at, request) in requests(12).iter().enumerate() {
            sample.add(&format!("Order: {request}"), Some(if at % 4 == 0 { "rare" } else { "usual" }));
        }
        let under = |prompt: Option<&str>| Frame { system: prompt.map(str::to_owned), ..around("Order: ", "") };
        assert_eq!(sample.frames(&["usual".to_owned()]), [under(Some("usual")), under(None)]);
    }

    #[test]
    fn ten_marked_turns_in_a_thousand_are_found_and_the_same_each_time() {
        let marked = |n: usize, request: String| if n.is_multiple_of(100) { format!("AOA: {request}") } else { request };
        let turns: Vec<String> = requests(20_000).into_iter().enumerate().map(|(n, request)| marked(n, request)).collect();
        let found = frames(&turns);
        assert_eq!(found, [around("AOA: ", "")]);
        assert_eq!(found, frames(&turns));
    }

    #[test]
    fn a_file_that_is_made_to_be_compared_for_long_is_not() {
        let started = std::time::Instant::now();
        let nested = |unit: &str| frames((1..=SAMPLED / 4).map(|count| unit.repeat(count))).len();
        assert_eq!([nested("a"), nested("- ")], [0, 0]);
        assert!(nested("a ") > 0);
        assert!(started.elapsed() < std::time::Duration::from_secs(20), "{:?}", started.elapsed());
    }

    #[test]
    fn of_long_turns_the_ends_are_compared() {
        let long = "é".repeat(LOOKED_AT);
        let turns = requests(10).into_iter().map(|request| format!("Do this: {request} {long}{request} And at once."));
        assert_eq!(frames(turns), [around("Do this: ", " And at once.")]);
    }
}
