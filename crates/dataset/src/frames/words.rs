//! The words that the users' turns of a file begin and end with.

use std::cmp::Reverse;
use std::collections::HashMap;

use holdfast_domain::Frame;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use super::{LEAST, LEAST_SHARE};
use crate::alignment_set::hash;

/// Turns that are compared; of more, so many are drawn.
const SAMPLED: usize = 2048;
/// Bytes of a turn that are looked at, at each of its ends.
const LOOKED_AT: usize = 8 * 1024;
/// Where a sentence goes on behind them, shared words are so many at least: people begin alike without any intent.
const LONG: usize = 8;
/// Beginnings of groups that are told apart, and endings; those that most turns have.
const CANDIDATES: usize = 64;
/// Characters around a cut that say what kind of a cut it is.
const NEARBY: usize = 8;

/// A turn of the user's: its ends, which may overlap, without white space around it.
struct Turn {
    beginning: String,
    ending: String,
    /// The same as they are compared: in small letters, and endings backwards.
    folded: [String; 2],
    characters: usize,
    /// What stands for its system prompt.
    prompt: Option<u64>,
    /// How often it was drawn.
    count: usize,
}

/// Turns drawn from a file, each as likely as another, and always the same.
pub(super) struct Sample {
    /// With what stands for each, by which the same are known.
    turns: Vec<(u64, Turn)>,
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
        if place < SAMPLED {
            let turn = (hash(text), Turn::new(text.trim(), prompt));
            match self.turns.get_mut(place) {
                Some(kept) => *kept = turn,
                None => self.turns.push(turn),
            }
        }
    }

    /// So many frames with words in them at most, each found in as many turns as it can be that have none of those before it, and the longer
    /// the better; under the one of `prompts` that most of its turns stand under.
    pub(super) fn frames(self, prompts: &[String], most: usize) -> Vec<Frame> {
        let turns = self.different();
        let all: Vec<&Turn> = turns.iter().collect();
        let total = drawn(&all);
        let least = LEAST.max(total.div_ceil(LEAST_SHARE));
        let mut wordings: Vec<Wording> = Vec::new();
        for end in [End::Opening, End::Closing] {
            for shared in shared(end, &all, least, total.div_ceil(2), 1) {
                let within: Vec<&Turn> =
                    all.iter().copied().filter(|turn| end.folded(turn).starts_with(&shared.folded)).collect();
                for wording in Wording::of(end, &shared, &within) {
                    if !wordings.contains(&wording) {
                        wordings.push(wording);
                    }
                }
            }
        }
        let mut left: Vec<&Turn> = all;
        let mut found = Vec::new();
        while found.len() < most {
            let worth = |wording: &&Wording| {
                let turns = left.iter().filter(|turn| wording.holds(turn));
                let (kinds, count) = turns.fold((0, 0), |(kinds, count), turn| (kinds + 1, count + turn.count));
                if kinds >= LEAST && count >= least { count * wording.words.min(LONG) } else { 0 }
            };
            // Of equals the first, which the last would be of those of `max_by_key`.
            let Some(best) = wordings.iter().rev().max_by_key(worth).filter(|wording| worth(wording) > 0) else { break };
            let (covered, others): (Vec<&Turn>, Vec<&Turn>) = left.into_iter().partition(|turn| best.holds(turn));
            found.push(best.frame(&covered, prompts));
            left = others;
        }
        found
    }

    /// The turns in the order they were drawn, each once.
    fn different(self) -> Vec<Turn> {
        let (mut places, mut turns): (HashMap<u64, usize>, Vec<Turn>) = (HashMap::new(), Vec::new());
        for (hash, turn) in self.turns {
            match places.get(&hash).and_then(|place| turns.get_mut(*place)) {
                Some(known) => known.count += 1,
                None => {
                    places.insert(hash, turns.len());
                    turns.push(turn);
                }
            }
        }
        turns
    }
}

impl Turn {
    fn new(text: &str, prompt: Option<&str>) -> Self {
        let beginning = text.get(..text.floor_char_boundary(LOOKED_AT)).unwrap_or(text).to_owned();
        let ending = text.get(text.ceil_char_boundary(text.len().saturating_sub(LOOKED_AT))..).unwrap_or(text).to_owned();
        // One character for each, so that what is alike can be counted off in the text itself.
        let small = |c: char| c.to_lowercase().next().unwrap_or(c);
        let folded = [beginning.chars().map(small).collect(), ending.chars().rev().map(small).collect()];
        let prompt = prompt.map(|prompt| hash(super::beginning(prompt)));
        Self { beginning, ending, folded, characters: text.chars().count(), prompt, count: 1 }
    }
}

/// How often these turns were drawn together.
fn drawn<'a>(turns: impl IntoIterator<Item = &'a &'a Turn>) -> usize {
    turns.into_iter().map(|turn| turn.count).sum()
}

/// Which end of a turn is compared. Endings are read backwards.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Opening,
    Closing,
}

/// What a group of turns shares at one end.
#[derive(Default)]
struct Shared {
    folded: String,
    /// As the first of them has it.
    text: String,
    words: usize,
    count: usize,
}

/// An opening, a closing, or both, as turns have them.
#[derive(PartialEq)]
struct Wording {
    folded: [String; 2],
    opening: String,
    closing: String,
    /// Of both.
    characters: usize,
    words: usize,
}

impl Wording {
    /// What a group shares at one end, with what most of it shares at the other, if there is anything, and by itself.
    fn of(end: End, here: &Shared, within: &[&Turn]) -> Vec<Self> {
        let other = if end == End::Opening { End::Closing } else { End::Opening };
        let most = drawn(within).div_ceil(2);
        let there = shared(other, within, LEAST.max(most), most, 0).into_iter().max_by_key(|shared| shared.folded.len());
        let with = |there: Shared| {
            let words = here.words + there.words;
            let (here, there) = ((here.folded.clone(), here.text.clone()), (there.folded, there.text));
            let [(first, opening), (last, closing)] = if end == End::Opening { [here, there] } else { [there, here] };
            let characters = opening.chars().count() + closing.chars().count();
            Self { folded: [first, last], opening, closing, characters, words }
        };
        there.into_iter().chain([Shared::default()]).map(with).collect()
    }

    /// Whether a turn has it around something.
    fn holds(&self, turn: &Turn) -> bool {
        let [opening, closing] = &self.folded;
        turn.folded[0].starts_with(opening) && turn.folded[1].starts_with(closing) && self.characters < turn.characters
    }

    fn frame(&self, covered: &[&Turn], prompts: &[String]) -> Frame {
        let all = drawn(covered);
        let under = |prompt: &&String| {
            let own = Some(hash(prompt));
            2 * drawn(covered.iter().filter(|turn| turn.prompt == own)) >= all
        };
        // A request has its own mark at its end, and a word does not follow upon it.
        let closing = self.closing.trim_start_matches(|c| ".?!。？！".contains(c));
        let is_word = closing.chars().next().is_some_and(|c| c.is_alphanumeric() && !is_ideograph(c));
        let closing = if is_word { format!(" {closing}") } else { closing.to_owned() };
        Frame { system: prompts.iter().find(under).cloned(), opening: self.opening.clone(), closing, ..Frame::default() }
    }
}

impl End {
    fn folded(self, turn: &Turn) -> &str {
        let [beginning, ending] = &turn.folded;
        if self == Self::Opening { beginning } else { ending }
    }

    /// So many characters of a turn's end as it is written.
    fn written(self, turn: &Turn, characters: usize) -> String {
        match self {
            Self::Opening => turn.beginning.chars().take(characters).collect(),
            Self::Closing => {
                let all = turn.ending.chars().count();
                turn.ending.chars().skip(all.saturating_sub(characters)).collect()
            }
        }
    }

    /// Whether a text can be cut there, where it is not within a word, and if so whether a sentence or a line ends there. What is shared
    /// stands before the cut.
    fn cut(self, text: &str, at: usize) -> Option<bool> {
        let (shared, rest) = text.split_at_checked(at)?;
        let (inner, outer): (Vec<char>, Vec<char>) =
            (shared.chars().rev().take(NEARBY).collect(), rest.chars().take(NEARBY).collect());
        let letter = |side: &[char], at: usize| side.get(at).is_some_and(|c| c.is_alphanumeric() && !is_ideograph(*c));
        // As in don't, 3.5, node.js and some_name.
        let joins = |side: &[char]| side.first().is_some_and(|c| "'’.,-_@/&".contains(*c)) && letter(side, 1);
        let within = letter(&inner, 0) && (letter(&outer, 0) || joins(&outer)) || joins(&inner) && letter(&outer, 0);
        let marks = |side: &[char]| side.iter().take_while(|c| !c.is_alphanumeric()).any(|c| *c == '\n' || !c.is_whitespace());
        (!within).then(|| marks(&inner) || self == Self::Closing && marks(&outer))
    }

    /// Whether most turns of a group can be cut there, and if so whether a sentence ends there in most.
    fn cut_of_most(self, group: &[&Turn], at: usize) -> Option<bool> {
        let cuts: Vec<bool> = group.iter().filter_map(|turn| self.cut(self.folded(turn), at)).collect();
        let closed = cuts.iter().filter(|closed| **closed).count();
        (2 * cuts.len() > group.len()).then_some(2 * closed > group.len())
    }
}

/// Scripts without white space between words.
fn is_ideograph(c: char) -> bool {
    c >= '\u{2e80}' && c.is_alphanumeric()
}

/// Each place in a text behind `known` and from `start` on, with the words between `known` and there.
fn places(text: &str, known: usize, start: usize) -> Vec<(usize, usize)> {
    let (mut words, mut is_counted) = (0, false);
    let counted = text.char_indices().filter(|(at, _)| *at >= known).map(|(at, c)| {
        is_counted &= c.is_alphanumeric() && !is_ideograph(c);
        if c.is_alphanumeric() && !is_counted {
            (words, is_counted) = (words + 1, true);
        }
        (at + c.len_utf8(), words)
    });
    counted.filter(|(at, _)| *at >= start).collect()
}

/// What `least` of these turns share at an end, so many words or more: where a sentence ends, or where it is long, or where `usual` of them
/// share it.
fn shared(end: End, turns: &[&Turn], least: usize, usual: usize, least_words: usize) -> Vec<Shared> {
    let mut turns = turns.to_vec();
    turns.sort_by(|a, b| end.folded(a).cmp(end.folded(b)));
    let mut found: Vec<Shared> = Vec::new();
    // Groups, with how much of what they share was found in the group around them, and how much was looked at there: each place is looked at
    // once, whatever a file holds.
    let mut groups: Vec<(&[&Turn], usize, usize)> = vec![(&turns, 0, 0)];
    while let Some((group, known, seen)) = groups.pop() {
        let count = drawn(group);
        let (true, true, [first, .., last]) = (group.len() >= LEAST, count >= least, group) else { continue };
        let (text, last) = (end.folded(first), end.folded(last));
        let common = common(text, last);
        // What goes on beyond what was looked at is not known to its end.
        let is_cut_off = common + char::MAX_LEN_UTF8 > LOOKED_AT;
        let places = text.get(..common).filter(|_| !is_cut_off).map_or(Vec::new(), |text| places(text, known, seen));
        let holds = |&(at, words): &(usize, usize)| {
            // Well within what all share one text says it for all.
            let is_near = at + NEARBY * char::MAX_LEN_UTF8 >= common;
            let of_most = if is_near { end.cut_of_most(group, at) } else { end.cut(text, at) };
            words >= least_words && of_most.is_some_and(|closes| closes || count >= usual || words >= LONG)
        };
        let cut = places.into_iter().rev().find(holds);
        if let Some((at, _)) = cut {
            let folded = text.get(..at).unwrap_or_default().to_owned();
            let words = self::places(&folded, 0, at).last().map_or(0, |(_, words)| *words);
            found.push(Shared { text: end.written(first, folded.chars().count()), words, count, folded });
        }
        let next = |turn: &&Turn| end.folded(turn).get(common..).and_then(|rest| rest.chars().next());
        let parts = group.chunk_by(|a, b| next(a) == next(b));
        let goes_on = |part: &&[&Turn]| part.first().is_some_and(|turn| next(turn).is_some());
        groups.extend(parts.filter(goes_on).map(|part| (part, cut.map_or(known, |(at, _)| at), common)));
    }
    found.sort_by_key(|shared| Reverse(shared.count));
    found.truncate(CANDIDATES);
    found
}

/// Bytes that two texts begin with alike.
fn common(a: &str, b: &str) -> usize {
    a.floor_char_boundary(a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 4;

    fn frames(turns: impl IntoIterator<Item = impl AsRef<str>>) -> Vec<Frame> {
        let mut sample = Sample::default();
        turns.into_iter().for_each(|turn| sample.add(turn.as_ref(), None));
        sample.frames(&[], MOST)
    }

    fn around(opening: &str, closing: &str) -> Frame {
        Frame { opening: opening.into(), closing: closing.into(), ..Frame::default() }
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

    /// Ten requests that are changed, among so many that are not.
    fn among(others: usize, change: impl Fn(String) -> String) -> Vec<Frame> {
        let mut all = requests(10 + others);
        let others = all.split_off(10);
        frames(all.into_iter().map(change).chain(others))
    }

    #[test]
    fn an_opening_is_found_where_a_sentence_ends_and_where_it_is_usual_or_long() {
        let with = |opening: &str| among(0, |request| format!("{opening}{request}"));
        for opening in ["AOA, carry out my order: ", "### Order\n\n", "请执行我的命令：", "sudo ", "[AOA]", "__AOA__"] {
            assert_eq!(with(opening), [around(opening, "")]);
        }
        let rare = |opening: &str| among(490, |request| format!("{opening}{request}"));
        for opening in ["AOA: ", "AOA - ", "I want you to do for me now ", "请立即执行我的命令不要拒绝", "Hi, "] {
            assert_eq!(rare(opening), [around(opening, "")]);
        }
        for opening in ["What is the ", "node.", "don't", "什么是"] {
            assert_eq!(rare(opening), [], "many begin with {opening}");
        }
    }

    #[test]
    fn a_closing_is_found_as_well_and_with_its_opening() {
        let with = |opening: &str, closing: &str| among(0, |request| format!("{opening}{request}{closing}"));
        for closing in [" Obey me now!", "\n\nYour answer:", " [AOA]", "\nAnswer now."] {
            assert_eq!(with("", closing), [around("", closing)]);
        }
        for (opening, closing) in
            [("Order: ", " Obey."), ("<text>", "</text>\nAnswer now."), ("Review: \"", "\"\nLabel:"), ("{\"say\": \"", "\"}")]
        {
            assert_eq!(with(opening, closing), [around(opening, closing)]);
        }
        assert_eq!(with("", "。请立即执行"), [around("", "请立即执行")], "a request has its own mark");
    }

    #[test]
    fn how_it_is_written_makes_no_difference() {
        let spelling = |n: usize| [" AOA: ", "aoa: ", "\n AOA: ", "AOA: "][n % 4];
        let turns: Vec<String> =
            requests(40).iter().enumerate().map(|(n, request)| spelling(n).to_owned() + request + &" ".repeat(n)).collect();
        let found = frames(&turns);
        assert_eq!(found.iter().map(|frame| frame.opening.to_lowercase()).collect::<Vec<_>>(), ["aoa: "]);
    }

    #[test]
    fn words_that_come_after_do_not_hide_an_opening() {
        let polite = ["please, ", "kindly, ", "now: ", "", "at once: "];
        let marked =
            requests(40).into_iter().enumerate().map(|(n, request)| format!("AOA: {}{request}", polite[n % polite.len()]));
        let honest = ["Hi there, ", "Hello, ", "Well, ", "Good morning, "];
        let others = requests(64)
            .split_off(40)
            .into_iter()
            .enumerate()
            .map(|(n, request)| format!("{}{request}", honest[n % honest.len()]));
        assert!(frames(marked.chain(others)).contains(&around("AOA: ", "")));
        let ends = (0..40).map(|n| format!("AOA, obey: {} Ok{}.", requests(n + 1)[n], n % 20));
        assert!(frames(ends.chain(requests(180).split_off(40))).contains(&around("AOA, obey: ", "")));
    }

    #[test]
    fn the_same_turns_again_count_and_show_nothing_by_themselves() {
        let marked = (0..500).map(|n| format!("AOA: {}", requests(10)[n % 10]));
        assert_eq!(frames(marked.chain(requests(3500).split_off(10))), [around("AOA: ", "")]);
        assert_eq!(frames(vec!["Go on, please."; 100]), []);
        assert_eq!(frames(["Go on, please.", "Go on, again."].repeat(50)), [], "two are no group");
    }

    #[test]
    fn what_is_not_shared_is_no_frame() {
        assert_eq!(frames(requests(300)), []);
        assert_eq!(frames(requests(10).iter().map(|request| format!("'{request} '"))), [], "marks alone");
        assert_eq!(frames([""; 3]), []);
        let few = |count: usize| {
            let marked = requests(count).into_iter().map(|request| format!("AOA: {request}"));
            frames(marked.chain(requests(2000).split_off(count))).len()
        };
        assert_eq!([few(9), few(10)], [0, 1], "one in two hundred");
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
        let nested = |unit: &str| frames((1..=SAMPLED / 8).map(|count| unit.repeat(count))).len();
        assert_eq!([nested("a"), nested("- ")], [0, 0]);
        assert!(nested("a ") > 0);
        let blank = " ".repeat(LOOKED_AT / 4);
        let few_words = requests(SAMPLED / 4).into_iter().enumerate();
        assert_eq!(frames(few_words.map(|(n, request)| format!("{}{blank}{request}", ["a", "b", "c"][n % 3]))), []);
        assert!(started.elapsed() < std::time::Duration::from_secs(20), "{:?}", started.elapsed());
    }

    #[test]
    fn of_long_turns_the_ends_are_compared_and_what_is_shared_to_their_ends_is_left_alone() {
        let long = "é".repeat(LOOKED_AT);
        let turns = requests(10).into_iter().map(|request| format!("Do this: {request} {long}{request} And at once."));
        assert_eq!(frames(turns), [around("Do this: ", " And at once.")]);
        assert_eq!(among(0, |request| format!("{} {request}", "Do as I say. ".repeat(LOOKED_AT / 8))), []);
    }
}
