//! The bytes of a segment: a header, then frames, then zeros.
//!
//! Numbers are little-endian. Every byte is covered by a CRC-32 (IEEE), a
//! frame's own length included. In a [sealed](super::sealed) segment that is the CRC of
//! what is on the disk, so it is checked without a key.
//!
//! **Segment header**, 32 bytes:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `ARSPOOL` and 0xFE |
//! | 8 | 2 | format version: 1, or 2 if the segment is sealed |
//! | 10 | 2 | bytes of this header: where the first frame begins |
//! | 12 | 4 | CRC of the other 28 bytes |
//! | 16 | 8 | sequence number of its first event; the file's name says it too |
//! | 24 | 8 | when it was made: Unix milliseconds |
//!
//! A sealed segment's header is 8192 bytes long: two
//! [key blocks](crate::sealing::seal) stand in it, at 32 and at 4096.
//!
//! **Frame**, 32 bytes and what follows:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 4 | 0xA7, `RF`, 0xFE: no text in UTF-8 holds these bytes |
//! | 4 | 1 | version of the frame: 1, or 2 if its payload is sealed |
//! | 5 | 1 | kind: 1 an event, 2 an attempt to deliver some |
//! | 6 | 1 | the durability that was asked for: 1 queued, 2 written, 3 synced; 0 for an attempt |
//! | 7 | 1 | bytes of the event id, at most 100; 0 for an attempt |
//! | 8 | 4 | bytes of the payload, at most 65,536, and 27 more if it is sealed |
//! | 12 | 4 | CRC of all other bytes of the frame |
//! | 16 | 8 | sequence number; of an attempt: that of the next event |
//! | 24 | 8 | accepted at, or attempted at: Unix milliseconds |
//! | 32 | | the event id, then the payload: one JSON object, an `Event` as in dead letters, or an [`Attempt`](super::command::Attempt) |
//!
//! Events are numbered without gaps, so what is missing can be counted. The
//! bytes of the markers occur in no payload, so after a damaged range the next
//! frame is found by its marker.

use memchr::memchr_iter;

use super::sealed::SEALED_MORE_BYTES;
use crate::{queue::Durability, sealing::KEY_BLOCK_BYTES};

/// Bytes of a segment's header.
pub(crate) const SEGMENT_HEADER_BYTES: usize = 32;
/// Bytes of a sealed segment's header.
pub(crate) const SEALED_HEADER_BYTES: usize = 2 * KEY_BLOCK_BYTES;
/// Bytes of a frame before its id.
pub(crate) const FRAME_HEADER_BYTES: usize = 32;
/// Most bytes of a payload. An admitted event needs a quarter of it.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 65_536;
/// Most bytes of a frame.
pub(crate) const FRAME_BYTES_MAX: usize = FRAME_HEADER_BYTES + 255 + PAYLOAD_BYTES_MAX + SEALED_MORE_BYTES;
/// Numbers above this are damage: counting on from them must not overflow.
pub(crate) const SEQ_MAX: u64 = u64::MAX / 4;
/// The newest format that is understood.
pub(crate) const FORMAT_VERSION: u16 = SEALED_FORMAT;
const PLAIN_FORMAT: u16 = 1;
/// Relays that cannot open seals would take them for damage: they must not start.
const SEALED_FORMAT: u16 = 2;

const SEGMENT_MARK: [u8; 8] = *b"ARSPOOL\xFE";
const FRAME_MARK: [u8; 4] = [0xA7, b'R', b'F', 0xFE];
const PLAIN_FRAME: u8 = 1;
const SEALED_FRAME: u8 = 2;
const CRC: std::ops::Range<usize> = 12..16;
pub(super) const SEQ: std::ops::Range<usize> = 16..24;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An accepted event.
    Event = 1,
    /// An attempt to deliver events, for `explain`.
    Attempt = 2,
}

/// One record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) kind: Kind,
    /// None for an attempt.
    pub(crate) durability: Option<Durability>,
    pub(crate) seq: u64,
    pub(crate) time_ms: i64,
    pub(crate) id: &'a [u8],
    pub(crate) payload: &'a [u8],
    /// The payload is: see [`sealed`](super::sealed).
    pub(crate) is_sealed: bool,
}

impl Frame<'_> {
    /// Bytes on disk.
    pub(crate) fn len(&self) -> usize {
        FRAME_HEADER_BYTES + self.id.len() + self.payload.len()
    }

    /// Appends the frame's bytes.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        self.encode_incomplete(out);
        complete(&mut out[start..], self.seq);
    }

    /// Appends the frame's bytes without its number and CRC, which [`complete`]
    /// adds: the number is known only when it is the frame's turn to be written.
    pub(crate) fn encode_incomplete(&self, out: &mut Vec<u8>) {
        debug_assert!(self.payload.len() <= PAYLOAD_BYTES_MAX + SEALED_MORE_BYTES);
        out.reserve(self.len());
        self.encode_head(self.payload.len(), out);
        out.extend_from_slice(self.payload);
    }

    /// Appends what stands before a payload of so many bytes, without number and CRC.
    pub(super) fn encode_head(&self, payload_bytes: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(&FRAME_MARK);
        out.push(if self.is_sealed { SEALED_FRAME } else { PLAIN_FRAME });
        out.push(self.kind as u8);
        out.push(self.durability.map_or(0, |level| level as u8));
        out.push(u8::try_from(self.id.len()).expect("an event id is short"));
        out.extend_from_slice(&u32::try_from(payload_bytes).expect("a payload is short").to_le_bytes());
        out.extend_from_slice(&[0; 12]);
        out.extend_from_slice(&self.time_ms.to_le_bytes());
        out.extend_from_slice(self.id);
    }
}

/// Completes one encoded frame with its number and CRC.
pub(crate) fn complete(frame: &mut [u8], seq: u64) {
    frame[SEQ].copy_from_slice(&seq.to_le_bytes());
    let crc = crc_without(frame, CRC);
    frame[CRC].copy_from_slice(&crc.to_le_bytes());
}

/// CRC of all bytes but those of the CRC itself.
pub(super) fn crc_without(bytes: &[u8], crc: std::ops::Range<usize>) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..crc.start]);
    hasher.update(&bytes[crc.end..]);
    hasher.finalize()
}

/// What stands at the start of some bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed<'a> {
    /// A whole frame.
    Frame(Frame<'a>),
    /// What may become a frame with this many bytes in all.
    Short(usize),
    /// No frame.
    Invalid,
}

/// Reads the frame at the start of some bytes.
pub(crate) fn parse(bytes: &[u8]) -> Parsed<'_> {
    match parse_unchecked(bytes) {
        Parsed::Frame(frame) if crc_without(&bytes[..frame.len()], CRC) != u32_at(bytes, CRC.start) => {
            Parsed::Invalid
        }
        parsed => parsed,
    }
}

/// The same for a frame that we have made ourselves: its CRC is not looked at.
pub(super) fn parse_unchecked(bytes: &[u8]) -> Parsed<'_> {
    let Some(header) = bytes.get(..FRAME_HEADER_BYTES) else {
        let begins = bytes.len().min(FRAME_MARK.len());
        let may_be = bytes[..begins] == FRAME_MARK[..begins];
        return if may_be { Parsed::Short(FRAME_HEADER_BYTES) } else { Parsed::Invalid };
    };
    let kind = match header[5] {
        1 => Kind::Event,
        2 => Kind::Attempt,
        _ => return Parsed::Invalid,
    };
    let payload_bytes = u32_at(header, 8) as usize;
    let seq = u64_at(header, SEQ.start);
    let (is_sealed, payload_bytes_max) = match header[4] {
        PLAIN_FRAME => (false, PAYLOAD_BYTES_MAX),
        SEALED_FRAME => (true, PAYLOAD_BYTES_MAX + SEALED_MORE_BYTES),
        _ => return Parsed::Invalid,
    };
    if header[..4] != FRAME_MARK || payload_bytes > payload_bytes_max || seq > SEQ_MAX {
        return Parsed::Invalid;
    }
    let payload_at = FRAME_HEADER_BYTES + usize::from(header[7]);
    let Some(frame) = bytes.get(..payload_at + payload_bytes) else {
        return Parsed::Short(payload_at + payload_bytes);
    };
    Parsed::Frame(Frame {
        kind,
        durability: Durability::from_number(header[6]),
        seq,
        time_ms: u64_at(frame, 24).cast_signed(),
        id: &frame[FRAME_HEADER_BYTES..payload_at],
        payload: &frame[payload_at..],
        is_sealed,
    })
}

/// True for the header of a frame whose payload is sealed.
pub(super) fn is_sealed(frame: &[u8]) -> bool {
    frame[4] == SEALED_FRAME
}

/// Where the next marker of a frame begins, at or after a place; `None` if
/// there is none in these bytes.
pub(crate) fn find_mark(bytes: &[u8], from: usize) -> Option<usize> {
    // Its last byte stands in no text, so it is hardly ever found in vain.
    let last = FRAME_MARK.len() - 1;
    memchr_iter(FRAME_MARK[last], bytes.get(from + last..)?)
        .map(|place| from + place)
        .find(|place| bytes[*place..=place + last] == FRAME_MARK)
}

/// A segment's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) first_seq: u64,
    pub(crate) created_ms: i64,
    pub(crate) is_sealed: bool,
}

/// What the start of a segment says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SegmentStart {
    Header(SegmentHeader),
    /// Written by a newer relay, of this format version.
    Newer(u16),
    /// Not what was written.
    Damaged,
}

impl SegmentHeader {
    /// The header's bytes; key blocks stand behind them.
    pub(crate) fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let (format, header_bytes) = match self.is_sealed {
            true => (SEALED_FORMAT, SEALED_HEADER_BYTES),
            false => (PLAIN_FORMAT, SEGMENT_HEADER_BYTES),
        };
        let mut header = [0; SEGMENT_HEADER_BYTES];
        header[..8].copy_from_slice(&SEGMENT_MARK);
        header[8..10].copy_from_slice(&format.to_le_bytes());
        header[10..12].copy_from_slice(&(header_bytes as u16).to_le_bytes());
        header[16..24].copy_from_slice(&self.first_seq.to_le_bytes());
        header[24..32].copy_from_slice(&self.created_ms.to_le_bytes());
        let crc = crc_without(&header, CRC);
        header[CRC].copy_from_slice(&crc.to_le_bytes());
        header
    }

    /// Reads a header.
    pub(crate) fn decode(bytes: &[u8]) -> SegmentStart {
        let Some(header) = bytes.get(..SEGMENT_HEADER_BYTES) else { return SegmentStart::Damaged };
        if header[..8] != SEGMENT_MARK || crc_without(header, CRC) != u32_at(header, CRC.start) {
            return SegmentStart::Damaged;
        }
        match u16::from_le_bytes([header[8], header[9]]) {
            format @ (PLAIN_FORMAT | SEALED_FORMAT) => SegmentStart::Header(Self {
                first_seq: u64_at(header, 16),
                created_ms: u64_at(header, 24).cast_signed(),
                is_sealed: format == SEALED_FORMAT,
            }),
            newer => SegmentStart::Newer(newer),
        }
    }
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Frame<'static> {
        Frame {
            kind: Kind::Event,
            durability: Some(Durability::Synced),
            seq: 7,
            time_ms: -5,
            id: b"id-1",
            payload: br#"{"a":1}"#,
            is_sealed: false,
        }
    }

    fn encoded() -> Vec<u8> {
        let mut bytes = Vec::new();
        frame().encode(&mut bytes);
        bytes
    }

    #[test]
    fn a_frame_comes_back_and_its_length_is_known_early() {
        let bytes = encoded();
        assert_eq!(bytes.len(), frame().len());
        assert_eq!(parse(&bytes), Parsed::Frame(frame()));
        for cut in 0..bytes.len() {
            let wants = if cut < FRAME_HEADER_BYTES { FRAME_HEADER_BYTES } else { bytes.len() };
            assert_eq!(parse(&bytes[..cut]), Parsed::Short(wants), "cut at {cut}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_frame_and_of_a_header_is_noticed() {
        let bytes = encoded();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(!matches!(parse(&flipped), Parsed::Frame(_)), "bit {bit}");
        }
        let header = SegmentHeader { first_seq: 9, created_ms: 3, is_sealed: true };
        assert_eq!(SegmentHeader::decode(&header.encode()), SegmentStart::Header(header));
        for bit in 0..SEGMENT_HEADER_BYTES * 8 {
            let mut flipped = header.encode();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentHeader::decode(&flipped), SegmentStart::Damaged, "bit {bit}");
        }
    }

    #[test]
    fn a_newer_format_is_told_from_damage() {
        let mut header = SegmentHeader { first_seq: 9, created_ms: 3, is_sealed: false }.encode();
        header[8] = 3;
        let crc = crc_without(&header, CRC);
        header[CRC].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(SegmentHeader::decode(&header), SegmentStart::Newer(3));
    }

    /// The format is a promise: these bytes must be readable for ever.
    #[test]
    fn the_bytes_are_pinned() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let head = &encoded()[..FRAME_HEADER_BYTES];
        assert_eq!(&hex(head)[..24], "a75246fe0101030407000000");
        assert_eq!(&hex(head)[32..], "0700000000000000fbffffffffffffff");
        assert_eq!(
            hex(&SegmentHeader { first_seq: 1, created_ms: 2, is_sealed: false }.encode()[..12]),
            "415253504f4f4cfe01002000"
        );
        assert_eq!(
            hex(&SegmentHeader { first_seq: 1, created_ms: 2, is_sealed: true }.encode()[..12]),
            "415253504f4f4cfe02000020"
        );
    }
}
