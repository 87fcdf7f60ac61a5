//! The frames of a segment, and the scan over them.

use analytics_relay_providers::fuzzing::Input;

use super::{NOW_MS, memory::Memory};
use crate::queue::{
    Durability,
    spool::{
        frame::{
            FRAME_BYTES_MAX, Frame, Kind, Parsed, SEGMENT_HEADER_BYTES, SEQ_MAX, SegmentHeader, SegmentStart,
            find_mark, parse,
        },
        scan::{Item, Scanner},
        sealed,
    },
};
use crate::sealing::{BrokenSeal, FileKind, test_keys};

/// Most bytes of a made-up segment: a few windows of the scanner.
const SEGMENT_BYTES_MAX: usize = 1 << 20;

/// A segment: one frame at its start, and a scan of all of it, against a scanner
/// that holds everything in memory.
pub fn frame(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let content = match input.below(4) {
        0 => input.rest().to_vec(),
        _ => made_up_segment(&mut input),
    };
    check_header(&content);
    check_parse(&content);
    check_seals(&content);
    let start = SEGMENT_HEADER_BYTES.min(content.len());
    for (from, end, step) in [
        (0, content.len(), usize::MAX),
        (start, content.len(), 65_521),
        (0, content.len() / 2, usize::MAX),
        (start, content.len() + 100, usize::MAX),
    ]
    .into_iter()
    .take(if content.len() > 64 * 1024 { 2 } else { 4 })
    {
        check_scan(&content, from, end.max(from), step);
    }
}

fn made_up_segment(input: &mut Input<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    while !input.is_empty() && out.len() < SEGMENT_BYTES_MAX {
        let start = out.len();
        match input.below(9) {
            0 => {
                let bytes = input.below(256);
                out.extend_from_slice(input.take(bytes));
            }
            1 | 2 => made_up_frame(input, &mut out),
            3 => {
                let payload = vec![input.byte(); made_up_size(input) + usize::from(input.flag())];
                let frame = Frame {
                    kind: Kind::Event,
                    durability: Some(Durability::Synced),
                    seq: input.u64() % (SEQ_MAX + 2),
                    time_ms: 0,
                    id: b"big",
                    payload: &payload,
                    is_sealed: false,
                };
                frame.encode(&mut out);
            }
            4 => {
                made_up_frame(input, &mut out);
                out.truncate(start + usize::from(input.u16()) % (out.len() - start));
            }
            5 => {
                made_up_frame(input, &mut out);
                let at = start + usize::from(input.u16()) % (out.len() - start);
                out[at] ^= 1 << input.below(8);
            }
            6 => out.resize(start + input.below(256), 0),
            7 => out.resize(start + 5 * made_up_size(input), input.byte()),
            // The head of a frame that is not there.
            _ => {
                out.extend_from_slice(b"\xA7RF\xFE\x01");
                out.extend_from_slice(&[1 + input.byte() % 2, 1, input.byte()]);
                out.extend_from_slice(&u32::from(input.u16()).to_le_bytes());
                out.resize(out.len() + 20, input.byte());
            }
        }
    }
    out
}

/// Mostly small, which is quick.
fn made_up_size(input: &mut Input<'_>) -> usize {
    let size = usize::from(input.u16());
    if input.below(16) == 1 { size } else { size % 600 }
}

fn made_up_frame(input: &mut Input<'_>, out: &mut Vec<u8>) {
    let kind = if input.flag() { Kind::Event } else { Kind::Attempt };
    let durability = Durability::from_number(input.byte() % 4);
    let (seq, time_ms) = (input.u64() % (SEQ_MAX + 2), input.u64().cast_signed());
    let (id_bytes, payload_bytes) = (input.below(256), input.below(256));
    let (id, payload) = (input.take(id_bytes), input.take(payload_bytes));
    let is_sealed = input.flag();
    Frame { kind, durability, seq, time_ms, id, payload, is_sealed }.encode(out);
}

fn check_header(content: &[u8]) {
    if let SegmentStart::Header(header) = SegmentHeader::decode(content) {
        assert_eq!(SegmentHeader::decode(&header.encode()), SegmentStart::Header(header));
    }
    let is_sealed = content.len() % 2 == 1;
    let header = SegmentHeader { first_seq: content.len() as u64, created_ms: NOW_MS, is_sealed };
    assert_eq!(SegmentHeader::decode(&header.encode()), SegmentStart::Header(header));
}

fn check_parse(content: &[u8]) {
    match parse(content) {
        Parsed::Frame(frame) => {
            assert!(frame.len() <= content.len() && frame.len() <= FRAME_BYTES_MAX);
            let mut again = Vec::new();
            frame.encode(&mut again);
            assert_eq!(parse(&again), Parsed::Frame(frame));
            // A level that means nothing is read as none.
            if content[6] <= 3 {
                assert_eq!(again, content[..frame.len()]);
            }
        }
        Parsed::Short(bytes) => assert!(bytes > content.len() && bytes <= FRAME_BYTES_MAX),
        Parsed::Invalid => {}
    }
}

/// Whatever a sealed frame holds, it is opened, or refused: only what was sealed comes out.
fn check_seals(content: &[u8]) {
    let (mut sealer, _) = test_keys("a").begin(FileKind::Segment).expect("there is a key").expect("it seals");
    let key = sealer.key();
    let mut secret = Vec::new();
    let Parsed::Frame(frame) = parse(content) else { return };
    let _ = sealed::clear(frame.payload);
    if frame.is_sealed {
        assert_eq!(sealed::open(&frame, &key, &mut secret), Err(BrokenSeal));
        return;
    }
    let mut out = Vec::new();
    sealed::seal_group(&mut sealer, &content[..frame.len()], &mut out);
    assert!(out.len() <= sealed::bytes_max(&content[..frame.len()]));
    let Parsed::Frame(again) = parse(&out) else { panic!("a sealed frame is a frame") };
    let head = |frame: &Frame<'_>| (frame.kind, frame.seq, frame.time_ms, frame.id.to_vec());
    assert_eq!((head(&again), again.len()), (head(&frame), out.len()));
    assert_eq!(sealed::open(&again, &key, &mut secret), Ok(()));
    if frame.kind == Kind::Event {
        assert_eq!(secret, frame.payload);
    }
    let changed = Frame { seq: frame.seq ^ 1, ..again };
    assert_eq!(sealed::open(&changed, &key, &mut secret), Err(BrokenSeal));
}

fn check_scan(content: &[u8], from: usize, end: usize, step: usize) {
    let file = Memory { content, step };
    let seen = &content[..end.min(content.len())];
    let mut scanner = Scanner::new(&file, from as u64, end as u64);
    let mut at = from.min(seen.len());
    loop {
        let expected = next_item(seen, at);
        let found = scanner.next().expect("memory does not fail");
        assert_eq!(found, expected, "from {from} to {end}");
        at += match found {
            Item::Frame { frame, .. } => frame.len(),
            Item::Damage { bytes, .. } => usize::try_from(bytes).expect("it is in memory"),
            Item::End { .. } => break,
        };
    }
    assert_eq!(scanner.next().expect("memory does not fail"), Item::End { at: at as u64 });
}

/// What a scanner has to find at a place.
fn next_item(content: &[u8], at: usize) -> Item<'_> {
    let is_frame = |at: &usize| matches!(parse(&content[*at..]), Parsed::Frame(_));
    if let Parsed::Frame(frame) = parse(&content[at..]) {
        return Item::Frame { at: at as u64, frame };
    }
    let mut marks = std::iter::successors(find_mark(content, at + 1), |mark| find_mark(content, mark + 1));
    let content_end = || content.iter().rposition(|byte| *byte != 0).map_or(at, |last| last + 1).max(at);
    let damage_end = marks.find(is_frame).unwrap_or_else(content_end);
    match damage_end - at {
        0 => Item::End { at: at as u64 },
        bytes => Item::Damage { at: at as u64, bytes: bytes as u64 },
    }
}
