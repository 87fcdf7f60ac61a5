//! Cuts what comes in pieces into lines, in memory that is bounded.

use memchr::memchr;

/// Longest line: longer than any event.
pub(super) const LINE_BYTES_MAX: usize = 16 << 20;

/// A line without its end.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// All of it.
    Whole(&'a [u8]),
    /// One that was too long to be kept.
    TooLong,
}

/// What is not a whole line yet.
#[derive(Debug, Default)]
pub(super) struct Lines {
    begun: Vec<u8>,
    is_too_long: bool,
    /// Lines that were handed on.
    count: u64,
}

impl Lines {
    /// How many lines were handed on.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Hands on each line that ends in this piece, with its number from 1.
    pub(super) fn push(&mut self, mut piece: &[u8], mut each: impl FnMut(u64, Line<'_>)) {
        while let Some(end) = memchr(b'\n', piece) {
            let (line, rest) = piece.split_at(end);
            if self.begun.is_empty() && !self.is_too_long && line.len() <= LINE_BYTES_MAX {
                self.count += 1;
                each(self.count, Line::Whole(line));
            } else {
                self.keep(line);
                self.hand_on(&mut each);
            }
            piece = &rest[1..];
        }
        self.keep(piece);
    }

    /// Hands on the last line, if it has no end.
    pub(super) fn finish(&mut self, mut each: impl FnMut(u64, Line<'_>)) {
        if self.is_too_long || !self.begun.is_empty() {
            self.hand_on(&mut each);
        }
    }

    fn keep(&mut self, part: &[u8]) {
        self.is_too_long |= self.begun.len() + part.len() > LINE_BYTES_MAX;
        if self.is_too_long {
            self.begun = Vec::new();
        } else {
            self.begun.extend_from_slice(part);
        }
    }

    fn hand_on(&mut self, each: &mut impl FnMut(u64, Line<'_>)) {
        self.count += 1;
        let line = if self.is_too_long { Line::TooLong } else { Line::Whole(&self.begun) };
        each(self.count, line);
        self.begun.clear();
        self.is_too_long = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &[u8], piece_bytes: usize) -> Vec<(u64, Option<Vec<u8>>)> {
        let (mut lines, mut all) = (Lines::default(), Vec::new());
        let mut note = |number, line: Line<'_>| {
            let whole = if let Line::Whole(line) = line { Some(line.to_vec()) } else { None };
            all.push((number, whole));
        };
        text.chunks(piece_bytes).for_each(|piece| lines.push(piece, &mut note));
        lines.finish(&mut note);
        assert_eq!(lines.count() as usize, all.len());
        all
    }

    #[test]
    fn lines_are_the_same_wherever_the_pieces_end() {
        let text = b"one\n\ntwo and more\n\nlast";
        let want: Vec<_> =
            (1..).zip(text.split(|byte| *byte == b'\n').map(|line| Some(line.to_vec()))).collect();
        for piece_bytes in 1..=text.len() {
            assert_eq!(cut(text, piece_bytes), want, "{piece_bytes}");
        }
        assert_eq!(cut(b"a\n", 1), [(1, Some(b"a".to_vec()))]);
        assert_eq!(cut(b"", 1), []);
    }

    #[test]
    fn a_line_that_is_too_long_is_passed_over_and_not_kept() {
        let mut text = vec![b'x'; LINE_BYTES_MAX + 1];
        text.extend(b"\nshort\n");
        for piece_bytes in [1 << 20, text.len()] {
            assert_eq!(cut(&text, piece_bytes), [(1, None), (2, Some(b"short".to_vec()))]);
        }
        let mut lines = Lines::default();
        for _ in 0..40 {
            lines.push(&[b'x'; 1 << 20], |_, _| panic!("it has no end"));
        }
        assert!(lines.begun.capacity() <= 2 * LINE_BYTES_MAX);
    }
}
