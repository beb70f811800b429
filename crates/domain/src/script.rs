//! How scripts write words.

/// Whether a character is of a script that does not part its words by spaces: Thai, Lao, Burmese, kana and Han.
#[must_use]
pub const fn is_unspaced(character: char) -> bool {
    matches!(character, '\u{e00}'..='\u{eff}' | '\u{1000}'..='\u{109f}' | '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}')
}
