//! What is frequent among the rows of a file, however many it has.

use std::cmp::Reverse;
use std::collections::HashMap;

/// Bytes of what is counted at most; of a longer text it is the beginning.
pub(super) const LONGEST: usize = 16 * 1024;
/// Texts that are counted at a time. Of a file with more of them, each that more than one in so many rows has is found.
const COUNTED: usize = 1024;

/// Texts with how many rows have them and when the first was seen. Holds no more than [`COUNTED`] of them: one more takes a row
/// from each (Misra and Gries, "Finding repeated elements", 1982).
pub(super) struct Frequent<T> {
    counts: HashMap<String, Counted<T>>,
    /// Texts that were seen, each time.
    seen: u64,
}

/// A text that is counted.
pub(super) struct Counted<T> {
    /// Rows that have it at least.
    pub(super) count: u64,
    first: u64,
    /// What is known of it besides.
    pub(super) known: T,
}

impl<T> Default for Frequent<T> {
    fn default() -> Self {
        Self { counts: HashMap::new(), seen: 0 }
    }
}

impl<T: Default> Frequent<T> {
    /// Counts a row that has this text. What is known of it comes back, where it is counted.
    pub(super) fn add(&mut self, text: &str) -> Option<&mut T> {
        let text = beginning(text);
        self.seen += 1;
        if self.counts.len() == COUNTED && !self.counts.contains_key(text) {
            self.counts.retain(|_, counted| {
                counted.count -= 1;
                counted.count > 0
            });
            return None;
        }
        let new = || Counted { count: 0, first: self.seen, known: T::default() };
        let counted = self.counts.entry(text.to_owned()).or_insert_with(new);
        counted.count += 1;
        Some(&mut counted.known)
    }

    /// Those that most rows have come first, of equally many the one that was seen first.
    pub(super) fn most_frequent(self) -> Vec<(String, Counted<T>)> {
        let mut texts: Vec<_> = self.counts.into_iter().collect();
        texts.sort_by_key(|(_, counted)| (Reverse(counted.count), counted.first));
        texts
    }
}

/// What is looked at of a text.
pub(super) fn beginning(text: &str) -> &str {
    text.get(..text.floor_char_boundary(LONGEST)).unwrap_or(text)
}
