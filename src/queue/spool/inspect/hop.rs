//! Steps through a segment from frame to frame by their lengths. What is in a
//! frame is looked at, and its CRC checked, only by who asks for it: so a search
//! costs little more than reading the file.
//!
//! A length without its CRC may lie. What keeps the search right all the same:
//! the next header must be one, and have the number that follows, and no frame
//! may hold another one's marker: attempts have no numbers of their own, so a
//! length that reaches past one to the next event would hide it. If not, it is
//! gone back to the last frame, and the [`Scanner`] says where frames begin.

use std::{collections::VecDeque, io};

use crate::queue::spool::{
    frame::{FRAME_HEADER_BYTES, Frame, Kind, Parsed, find_mark, is_sealed, parse, u64_at},
    fs::SpoolFile,
    index::Segment,
    scan::{Item, Scanner},
    sealed,
};

/// Bytes that are read at once.
const WINDOW_BYTES: usize = 1024 * 1024;

/// See the module.
pub(super) struct Hopper<'f> {
    file: &'f dyn SpoolFile,
    /// Where the next frame should begin.
    at: u64,
    end: u64,
    /// Where the frame before it begins.
    before: u64,
    /// The number that the next event should have.
    expected: u64,
    /// Where frames begin for certain.
    certain: VecDeque<u64>,
    window: Vec<u8>,
    window_at: u64,
}

/// A frame whose CRC nobody has checked.
pub(super) struct Hop<'a>(&'a [u8]);

impl<'a> Hop<'a> {
    pub(super) fn is_event(&self) -> bool {
        self.0[5] == Kind::Event as u8
    }

    pub(super) fn seq(&self) -> u64 {
        u64_at(self.0, 16)
    }

    pub(super) fn id(&self) -> &'a [u8] {
        &self.0[FRAME_HEADER_BYTES..self.payload_at()]
    }

    /// The payload, or what is readable of it.
    pub(super) fn clear(&self) -> &'a [u8] {
        let payload = &self.0[self.payload_at()..];
        if is_sealed(self.0) { sealed::clear(payload) } else { payload }
    }

    /// The frame, if its CRC is right.
    pub(super) fn checked(&self) -> Option<Frame<'a>> {
        match parse(self.0) {
            Parsed::Frame(frame) => Some(frame),
            Parsed::Short(_) | Parsed::Invalid => None,
        }
    }

    /// True if the marker of another frame stands in it: its length is wrong.
    fn holds_another(&self) -> bool {
        find_mark(self.0, 1).is_some()
    }

    fn payload_at(&self) -> usize {
        FRAME_HEADER_BYTES + usize::from(self.0[7])
    }
}

impl<'f> Hopper<'f> {
    /// The first frame begins at `at`; `window` is any buffer, to be used again.
    pub(super) fn new(file: &'f dyn SpoolFile, segment: Segment, at: u64, mut window: Vec<u8>) -> Self {
        window.clear();
        let (end, expected) = (segment.used, segment.first_seq);
        Self { file, at, end, before: at, expected, certain: VecDeque::new(), window, window_at: at }
    }

    pub(super) fn into_window(self) -> Vec<u8> {
        self.window
    }

    /// The next frame, or what looks like one; `None` at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<Hop<'_>>> {
        let Some((at, bytes)) = self.advance()? else { return Ok(None) };
        Ok(Some(Hop(self.bytes(at, bytes)?)))
    }

    /// Place and bytes of the next frame.
    fn advance(&mut self) -> io::Result<Option<(u64, usize)>> {
        loop {
            let certain = self.certain.pop_front();
            let at = certain.unwrap_or(self.at);
            if at >= self.end {
                return Ok(None);
            }
            let expected = self.expected;
            if let Some(hop) = self.look(at)?
                && (certain.is_some() || (hop.seq() == expected && !hop.holds_another()))
            {
                let (bytes, next_seq) = (hop.0.len(), hop.seq().saturating_add(u64::from(hop.is_event())));
                (self.before, self.at, self.expected) = (at, at + bytes as u64, next_seq);
                return Ok(Some((at, bytes)));
            }
            self.resync()?;
        }
    }

    /// What stands at a place, if its header is one and all of it is there.
    fn look(&mut self, at: u64) -> io::Result<Option<Hop<'_>>> {
        let bytes = match parse(self.bytes(at, FRAME_HEADER_BYTES)?) {
            Parsed::Short(bytes) if bytes > FRAME_HEADER_BYTES => bytes,
            Parsed::Frame(frame) => frame.len(),
            Parsed::Short(_) | Parsed::Invalid => return Ok(None),
        };
        let frame = self.bytes(at, bytes)?;
        Ok((frame.len() == bytes).then_some(Hop(frame)))
    }

    /// Looks for frames from the last one on, until one begins behind the place
    /// that is in doubt.
    fn resync(&mut self) -> io::Result<()> {
        let in_doubt = self.at;
        let is_first = self.before == in_doubt;
        // A writer may have gone on since it was read.
        self.window.clear();
        self.certain.clear();
        let mut scanner = Scanner::new(self.file, self.before, self.end).reading_around();
        loop {
            match scanner.next()? {
                Item::Frame { at, .. } => {
                    if at > self.before || is_first {
                        self.certain.push_back(at);
                    }
                    if at > in_doubt {
                        return Ok(());
                    }
                }
                Item::Damage { .. } => {}
                Item::End { at } => {
                    (self.at, self.end) = (at, at);
                    return Ok(());
                }
            }
        }
    }

    /// At least `wanted` bytes at a place, or what there is up to the end.
    fn bytes(&mut self, at: u64, wanted: usize) -> io::Result<&[u8]> {
        let until = self.end.min(at.saturating_add(wanted as u64));
        let covered = at >= self.window_at && until <= self.window_at + self.window.len() as u64;
        if !covered {
            let left = usize::try_from(self.end.saturating_sub(at)).unwrap_or(usize::MAX);
            self.window.resize(left.min(WINDOW_BYTES.max(wanted)), 0);
            // What the disk does not give back is gone over as any other damage.
            let (read, _) = self.file.read_around(&mut self.window, at)?;
            if read < self.window.len() {
                // The file is shorter than it was said to be.
                self.window.truncate(read);
                self.end = at + read as u64;
            }
            self.window_at = at;
        }
        let start = usize::try_from(at - self.window_at).unwrap_or(usize::MAX);
        let bytes = self.window.get(start..).unwrap_or_default();
        Ok(&bytes[..wanted.min(bytes.len())])
    }
}
