//! Cuts a stream of bytes into lines in constant memory.

use holdfast_domain::limits::MAX_LINE_BYTES;

/// A line without its end, or the news that it was too long to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line<'a> {
    /// The bytes between two line ends.
    Whole(&'a [u8]),
    /// Longer than [`MAX_LINE_BYTES`]; its bytes are gone.
    TooLong,
}

/// Joins the pieces of a stream into lines. Holds at most one line, and never more than [`MAX_LINE_BYTES`] of it.
#[derive(Debug, Default)]
pub struct LineSplitter {
    partial: Vec<u8>,
    overlong: bool,
    number: u64,
}

impl LineSplitter {
    /// Takes the next bytes of the stream and calls `each` with the number (from 1) of every line that ends in them.
    pub fn push(&mut self, mut bytes: &[u8], mut each: impl FnMut(u64, Line<'_>)) {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let (head, rest) = (&bytes[..end], &bytes[end + 1..]);
            if self.partial.is_empty() && !self.overlong && head.len() <= MAX_LINE_BYTES {
                self.number += 1;
                each(self.number, Line::Whole(without_carriage_return(head)));
            } else {
                self.keep(head);
                self.emit(&mut each);
            }
            bytes = rest;
        }
        self.keep(bytes);
    }

    /// The stream has ended: what follows the last line end is a line too, when it is not empty.
    pub fn finish(mut self, mut each: impl FnMut(u64, Line<'_>)) {
        if !self.partial.is_empty() || self.overlong {
            self.emit(&mut each);
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.overlong || self.partial.len() + bytes.len() > MAX_LINE_BYTES {
            self.overlong = true;
            self.partial = Vec::new();
        } else {
            self.partial.extend_from_slice(bytes);
        }
    }

    fn emit(&mut self, each: &mut impl FnMut(u64, Line<'_>)) {
        self.number += 1;
        if std::mem::take(&mut self.overlong) {
            each(self.number, Line::TooLong);
        } else {
            each(self.number, Line::Whole(without_carriage_return(&self.partial)));
        }
        self.partial.clear();
    }
}

fn without_carriage_return(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(pieces: &[&[u8]]) -> Vec<(u64, Option<Vec<u8>>)> {
        let mut found = Vec::new();
        let mut take = |number: u64, line: Line<'_>| {
            found.push((
                number,
                match line {
                    Line::Whole(bytes) => Some(bytes.to_vec()),
                    Line::TooLong => None,
                },
            ));
        };
        let mut splitter = LineSplitter::default();
        for piece in pieces {
            splitter.push(piece, &mut take);
        }
        splitter.finish(&mut take);
        found
    }

    #[test]
    fn a_line_may_arrive_in_pieces_and_end_in_either_way() {
        let lines = split(&[b"on", b"e\r", b"\ntwo\n\nfo", b"ur"]);
        let expected = [(1, "one"), (2, "two"), (3, ""), (4, "four")];
        assert_eq!(lines, expected.map(|(n, text)| (n, Some(text.as_bytes().to_vec()))));
    }

    #[test]
    fn an_overlong_line_is_reported_and_the_next_one_is_whole() {
        let long = vec![b'x'; MAX_LINE_BYTES + 1];
        assert_eq!(split(&[b"a\n", &long, b"\nb\n"]), [(1, Some(b"a".to_vec())), (2, None), (3, Some(b"b".to_vec()))]);
    }

    proptest! {
        #[test]
        fn where_the_stream_is_cut_makes_no_difference(bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), any::<u8>()], 0..200), cut in 1_usize..20) {
            let pieces: Vec<&[u8]> = bytes.chunks(cut).collect();
            prop_assert_eq!(split(&pieces), split(&[&bytes]));
        }
    }
}
