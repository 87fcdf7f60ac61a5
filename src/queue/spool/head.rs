//! What stands before the frames of a segment: whether it is sealed, and its key.

use std::{io, ops::Range};

use super::{
    frame::{SEALED_HEADER_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentStart, find_mark},
    fs::SpoolFile,
};
use crate::sealing::{FileKind, KEY_BLOCK_BYTES, KeyBlocks, Keyring, Rewrap, RewrapError};

/// See the module.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) start: SegmentStart,
    /// Bytes of the plain header that the file has.
    pub(crate) header_bytes: usize,
    /// Of a sealed segment.
    pub(crate) blocks: Option<KeyBlocks>,
}

impl Head {
    /// Reads it. What the disk does not give back is damage. A header that belongs to
    /// another file is damaged too; whether the segment is sealed is told by its key
    /// blocks then.
    pub(crate) fn read(file: &dyn SpoolFile, first_seq: u64) -> io::Result<Self> {
        let mut header = [0; SEGMENT_HEADER_BYTES];
        let (header_bytes, _) = file.read_around(&mut header, 0)?;
        let start = match SegmentHeader::decode(&header[..header_bytes]) {
            SegmentStart::Header(header) if header.first_seq != first_seq => SegmentStart::Damaged,
            start => start,
        };
        let read_blocks = || {
            let mut bytes = vec![0; SEALED_HEADER_BYTES];
            let (read, _) = file.read_around(&mut bytes, 0)?;
            bytes.truncate(read);
            io::Result::Ok(bytes)
        };
        let blocks = match start {
            SegmentStart::Header(header) if header.is_sealed => {
                Some(KeyBlocks::parse_sealed(&read_blocks()?, SEGMENT_HEADER_BYTES))
            }
            // What callers send may look like a key: where a frame begins is none.
            SegmentStart::Damaged => Some(read_blocks()?)
                .filter(|bytes| find_mark(bytes, 0).is_none())
                .and_then(|bytes| KeyBlocks::parse(&bytes, SEGMENT_HEADER_BYTES)),
            SegmentStart::Header(_) | SegmentStart::Newer(_) => None,
        };
        Ok(Self { start, header_bytes, blocks })
    }

    /// Where the first frame begins.
    pub(crate) fn frames_at(&self) -> u64 {
        let bytes = if self.blocks.is_some() { SEALED_HEADER_BYTES } else { SEGMENT_HEADER_BYTES };
        bytes as u64
    }

    /// Key blocks that are not as they were written: where they begin, and their bytes.
    pub(crate) fn damaged_blocks(&self) -> Vec<(u64, u64)> {
        let bytes_at = |block: Range<usize>| (block.start as u64, block.len() as u64);
        self.blocks.iter().flat_map(KeyBlocks::damaged).map(block_at).map(bytes_at).collect()
    }

    /// True if one of the two key blocks is damaged, or will be once a range of the file is
    /// changed.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn loses_block(&self, place: usize, changed: &Range<usize>) -> bool {
        let block = block_at(place);
        let is_hit = block.start < changed.end && changed.start < block.end;
        is_hit || self.blocks.iter().flat_map(KeyBlocks::damaged).any(|damaged| damaged == place)
    }
}

/// Where the first or the second key block is.
fn block_at(place: usize) -> Range<usize> {
    match place {
        0 => SEGMENT_HEADER_BYTES..KEY_BLOCK_BYTES,
        _ => KEY_BLOCK_BYTES..SEALED_HEADER_BYTES,
    }
}

/// Seals the key of a segment with the first key of the ring. It can be killed anywhere, and
/// beside a relay that writes to the segment, which never touches the blocks.
pub(crate) fn rewrap(file: &dyn SpoolFile, first_seq: u64, keyring: &Keyring) -> Result<Rewrap, RewrapError> {
    let Some(blocks) = Head::read(file, first_seq)?.blocks else { return Ok(Rewrap::NotSealed) };
    let writes = blocks.rewrap(keyring, FileKind::Segment, SEGMENT_HEADER_BYTES)?;
    for (at, bytes) in &writes {
        file.write_all_at(bytes, *at)?;
        file.sync_data()?;
    }
    Ok(Rewrap::of(&writes))
}
