//! Reads a segment's frames in order, past what is damaged. Holds a window of
//! the file, whatever the segment's size.

use std::io;

use super::{
    frame::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES, Frame, Parsed, find_mark, parse},
    fs::SpoolFile,
};

/// Bytes that are read at once.
const WINDOW_BYTES: usize = 256 * 1024;

/// What comes next in a segment.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item<'a> {
    /// A whole frame.
    Frame { at: u64, frame: Frame<'a> },
    /// Bytes that are no frame, up to the next frame, or up to the last byte
    /// that is not zero.
    Damage { at: u64, bytes: u64 },
    /// Nothing but zeros follow, or nothing.
    End { at: u64 },
}

/// See the module.
pub(crate) struct Scanner<'f> {
    file: &'f dyn SpoolFile,
    /// Where the next item begins.
    at: u64,
    /// Where the file is read to.
    end: u64,
    window: Vec<u8>,
    window_at: u64,
    /// What the disk does not give back is damage, and no error.
    reads_around: bool,
    /// Where the last of that ends.
    unreadable_until: u64,
}

impl<'f> Scanner<'f> {
    /// Reads from `at`, where a frame begins or nothing does, to `end`.
    pub(crate) fn new(file: &'f dyn SpoolFile, at: u64, end: u64) -> Self {
        let window = Vec::new();
        Self { file, at, end, window, window_at: at, reads_around: false, unreadable_until: 0 }
    }

    /// Takes what the disk does not give back as damage, from here on.
    pub(crate) fn reading_around(mut self) -> Self {
        self.reads_around = true;
        self
    }

    /// True if the disk did not give back everything.
    pub(crate) fn met_unreadable(&self) -> bool {
        self.unreadable_until > 0
    }

    /// The next item. After [`Item::End`] always that.
    pub(crate) fn next(&mut self) -> io::Result<Item<'_>> {
        let at = self.at;
        let mut wanted = FRAME_HEADER_BYTES;
        let frame_bytes = loop {
            let bytes = self.bytes(at, wanted)?;
            match parse(bytes) {
                Parsed::Frame(frame) => break Some(frame.len()),
                Parsed::Short(whole) if whole > wanted => wanted = whole,
                Parsed::Short(_) | Parsed::Invalid => break None,
            }
        };
        let Some(frame_bytes) = frame_bytes else { return self.damage() };
        self.at += frame_bytes as u64;
        match parse(self.bytes(at, frame_bytes)?) {
            Parsed::Frame(frame) => Ok(Item::Frame { at, frame }),
            // The file changed between two looks: a writer is at work there.
            Parsed::Short(_) | Parsed::Invalid => Ok(Item::Damage { at, bytes: frame_bytes as u64 }),
        }
    }

    /// Steps over what is no frame.
    fn damage(&mut self) -> io::Result<Item<'_>> {
        let at = self.at;
        let mut content_end = at;
        let mut look = at;
        'windows: loop {
            let end = self.end;
            let bytes = self.bytes(look, FRAME_BYTES_MAX)?;
            if bytes.is_empty() {
                break;
            }
            let mut from = usize::from(look == at);
            while let Some(mark) = find_mark(bytes, from) {
                match parse(&bytes[mark..]) {
                    Parsed::Frame(_) => {
                        self.at = look + mark as u64;
                        return Ok(Item::Damage { at, bytes: self.at - at });
                    }
                    // Cut by the window and not by the file: look at all of it.
                    Parsed::Short(_) if mark > 0 && look + (bytes.len() as u64) < end => {
                        if let Some(last) = last_not_zero(&bytes[..mark]) {
                            content_end = look + last as u64 + 1;
                        }
                        look += mark as u64;
                        continue 'windows;
                    }
                    Parsed::Short(_) | Parsed::Invalid => from = mark + 1,
                }
            }
            if let Some(last) = last_not_zero(bytes) {
                content_end = look + last as u64 + 1;
            }
            // A mark may stand across the border of two windows.
            let step = bytes.len().saturating_sub(3).max(1);
            if look + bytes.len() as u64 >= end {
                break;
            }
            look += step as u64;
        }
        content_end = content_end.max(self.unreadable_until.min(self.end));
        self.at = content_end;
        Ok(if content_end > at { Item::Damage { at, bytes: content_end - at } } else { Item::End { at } })
    }

    /// At least `wanted` bytes at a place, or what there is up to the end.
    fn bytes(&mut self, at: u64, wanted: usize) -> io::Result<&[u8]> {
        let until = self.end.min(at + wanted as u64);
        let covered = at >= self.window_at && until <= self.window_at + self.window.len() as u64;
        if !covered {
            let left = usize::try_from(self.end.saturating_sub(at)).unwrap_or(usize::MAX);
            self.window.resize(left.min(WINDOW_BYTES.max(wanted)), 0);
            let read = if self.reads_around {
                let (read, unreadable) = self.file.read_around(&mut self.window, at)?;
                self.unreadable_until = self.unreadable_until.max(unreadable.unwrap_or(0));
                read
            } else {
                self.file.read_full_at(&mut self.window, at)?
            };
            if read < self.window.len() {
                // The file is shorter than it was said to be.
                self.window.truncate(read);
                self.end = at + read as u64;
            }
            self.window_at = at;
        }
        let start = usize::try_from(at - self.window_at).expect("the window is in memory");
        Ok(self.window.get(start..).unwrap_or_default())
    }
}

/// Place of the last byte that is not zero.
pub(super) fn last_not_zero(bytes: &[u8]) -> Option<usize> {
    // Comparing whole pages is quick, and most of a new segment is zeros.
    const ZEROS: [u8; 4096] = [0; 4096];
    let page = bytes.chunks(ZEROS.len()).rposition(|page| page != &ZEROS[..page.len()])?;
    let start = page * ZEROS.len();
    let page = &bytes[start..bytes.len().min(start + ZEROS.len())];
    Some(start + page.iter().rposition(|byte| *byte != 0)?)
}
