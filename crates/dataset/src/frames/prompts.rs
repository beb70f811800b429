//! The system prompts of a file.

use std::collections::HashMap;

/// Bytes of a prompt at most; of a longer one it is the beginning.
pub(super) const LONGEST: usize = 16 * 1024;
/// Prompts that are counted at a time. Of a file with more of them, each that more than one in so many rows stands under is found.
const COUNTED: usize = 1024;

/// Prompts with how many rows stood under them and when the first was seen. Holds no more than [`COUNTED`] of them: one more takes a row
/// from each (Misra and Gries, "Finding repeated elements", 1982).
#[derive(Default)]
pub(super) struct Prompts {
    counts: HashMap<String, (u64, u64)>,
    /// Prompts that were seen, each time.
    seen: u64,
}

impl Prompts {
    pub(super) fn add(&mut self, prompt: &str) {
        let prompt = beginning(prompt);
        self.seen += 1;
        if let Some((count, _)) = self.counts.get_mut(prompt) {
            *count += 1;
        } else if self.counts.len() < COUNTED {
            self.counts.insert(prompt.to_owned(), (1, self.seen));
        } else {
            self.counts.retain(|_, (count, _)| {
                *count -= 1;
                *count > 0
            });
        }
    }

    /// Those that most rows stand under come first, of equally many the one that was seen first.
    pub(super) fn most_frequent(self) -> Vec<String> {
        let mut prompts: Vec<(String, (u64, u64))> = self.counts.into_iter().collect();
        prompts.sort_by_key(|(_, (count, first))| (std::cmp::Reverse(*count), *first));
        prompts.into_iter().map(|(prompt, _)| prompt).collect()
    }
}

/// What is looked at of a prompt.
pub(super) fn beginning(prompt: &str) -> &str {
    prompt.get(..prompt.floor_char_boundary(LONGEST)).unwrap_or(prompt)
}
