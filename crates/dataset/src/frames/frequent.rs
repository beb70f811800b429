//! What is frequent among the rows of a file, however many it has.

use std::borrow::Borrow;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::hash::Hash;

/// What rows have, with how many of them do and when the first was seen. Holds no more than so many at a time: one more takes a row from
/// each (Misra and Gries, "Finding repeated elements", 1982), so that what more than one in so many rows has is found.
pub(super) struct Frequent<K, T> {
    counts: HashMap<K, Counted<T>>,
    most: usize,
    /// How often something was seen.
    seen: u64,
    /// How often a row was taken from each.
    taken: u64,
}

/// Something that is counted.
pub(super) struct Counted<T> {
    /// Rows that have it at least.
    pub(super) count: u64,
    first: u64,
    /// What is known of it besides.
    pub(super) known: T,
}

impl<K: Eq + Hash, T: Default> Frequent<K, T> {
    /// Holds `most` at a time.
    pub(super) fn holding(most: usize) -> Self {
        Self { counts: HashMap::new(), most, seen: 0, taken: 0 }
    }

    /// Counts a row that has this. What is known of it comes back, where it is counted.
    pub(super) fn add<Q>(&mut self, key: &Q) -> Option<&mut T>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.seen += 1;
        if self.counts.len() == self.most && !self.counts.contains_key(key) {
            self.taken += 1;
            self.counts.retain(|_, counted| {
                counted.count -= 1;
                counted.count > 0
            });
            return None;
        }
        let new = || Counted { count: 0, first: self.seen, known: T::default() };
        let counted = self.counts.entry(key.to_owned()).or_insert_with(new);
        counted.count += 1;
        Some(&mut counted.known)
    }

    /// Rows that may have more of something than are counted.
    pub(super) const fn missed(&self) -> u64 {
        self.taken
    }

    /// What most rows have comes first, of equally many what was seen first.
    pub(super) fn most_frequent(self) -> Vec<(K, Counted<T>)> {
        let mut found: Vec<_> = self.counts.into_iter().collect();
        found.sort_by_key(|(_, counted)| (Reverse(counted.count), counted.first));
        found
    }
}
