//! placeholder until the page is drawn
use std::collections::BTreeMap;

use super::Report;

impl Report {
    /// The report as a page.
    #[must_use]
    pub fn html(&self, texts: &BTreeMap<u64, String>) -> String {
        format!("<!doctype html><title>{}</title>{}", self.job, texts.len())
    }
}
