//! Lists in pages. A page begins after an id, not at an offset, so rows that come or go in between shift nothing.

use uuid::Uuid;

/// Which page.
#[derive(Debug, Clone, Copy)]
pub struct PageRequest {
    /// The last id of the page before.
    pub after: Option<Uuid>,
    /// Rows at most.
    pub limit: u32,
    /// Oldest first.
    pub ascending: bool,
}

impl PageRequest {
    /// One more than the page holds, to learn whether another follows.
    pub(crate) fn fetch(&self) -> i64 {
        i64::from(self.limit) + 1
    }
}

/// One page.
#[derive(Debug, Clone)]
pub struct Page<T> {
    /// Its rows.
    pub items: Vec<T>,
    /// Whether another page follows.
    pub has_more: bool,
}

impl<T> Page<T> {
    pub(crate) fn new(mut items: Vec<T>, request: &PageRequest) -> Self {
        let limit = request.limit as usize;
        let has_more = items.len() > limit;
        items.truncate(limit);
        Self { items, has_more }
    }
}
