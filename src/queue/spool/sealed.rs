//! Frames whose payload is sealed.
//!
//! | bytes | what |
//! |---|---|
//! | 2 | bytes of what is readable |
//! | | what is readable: nothing of an event, all but the provider's words of an attempt |
//! | | the [seal](crate::sealing::seal) of the rest |
//!
//! All of the frame that stands before the seal is authenticated with it, but for the CRC:
//! kind, durability, number, time, event id, and lengths. So no payload is moved to another
//! number, or to another event.
//!
//! No marker of a frame stands in a seal: one in which it would, which is one in seven
//! million, is made again under the next counter.

use super::{
    command::Attempt,
    frame::{Frame, Kind, Parsed, SEQ, complete, find_mark, parse_unchecked},
};
use crate::sealing::{BrokenSeal, FileKey, SEAL_BYTES, Sealer};

/// What a sealed payload is longer than the same in the clear.
pub(super) const SEALED_MORE_BYTES: usize = CLEAR_BYTES + SEAL_BYTES;
const CLEAR_BYTES: usize = 2;

/// Bytes that a group of complete frames takes sealed, at most.
pub(crate) fn bytes_max(group: &[u8]) -> usize {
    group.len() + frames(group).count() * SEALED_MORE_BYTES
}

/// Seals a group of complete frames. `out` becomes the same frames, sealed.
pub(crate) fn seal_group(sealer: &mut Sealer, group: &[u8], out: &mut Vec<u8>) {
    out.clear();
    out.reserve(bytes_max(group));
    let mut sealed = Vec::new();
    for frame in frames(group) {
        match frame.kind {
            Kind::Event => seal(sealer, &frame, b"", frame.payload, &mut sealed, out),
            Kind::Attempt => {
                let (clear, words) = split_attempt(frame.payload);
                seal(sealer, &frame, &clear, &words, &mut sealed, out);
            }
        }
    }
}

/// What is hidden in a sealed frame: an event, or the provider's words of an attempt.
pub(crate) fn open(frame: &Frame<'_>, key: &FileKey, secret: &mut Vec<u8>) -> Result<(), BrokenSeal> {
    // One in the clear is none that was written beside those that are sealed.
    let (clear, seal) = parts(frame.payload).filter(|_| frame.is_sealed).ok_or(BrokenSeal)?;
    let mut before = Vec::with_capacity(256);
    frame.encode_head(frame.payload.len(), &mut before);
    before[SEQ].copy_from_slice(&frame.seq.to_le_bytes());
    before.extend_from_slice(&frame.payload[..CLEAR_BYTES + clear.len()]);
    key.open(&before, seal, secret).map(|_| ())
}

/// What is readable in a sealed payload; nothing of one that is none.
pub(crate) fn clear(payload: &[u8]) -> &[u8] {
    parts(payload).map_or(b"", |(clear, _)| clear)
}

/// What is readable, and the seal.
fn parts(payload: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = payload.split_first_chunk::<CLEAR_BYTES>()?;
    rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))
}

fn frames(group: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    let mut rest = group;
    std::iter::from_fn(move || match parse_unchecked(rest) {
        Parsed::Frame(frame) => {
            rest = &rest[frame.len()..];
            Some(frame)
        }
        Parsed::Short(_) | Parsed::Invalid => {
            debug_assert!(rest.is_empty(), "a group is made of whole frames");
            None
        }
    })
}

fn seal(
    sealer: &mut Sealer,
    frame: &Frame<'_>,
    clear: &[u8],
    secret: &[u8],
    sealed: &mut Vec<u8>,
    out: &mut Vec<u8>,
) {
    let start = out.len();
    let payload_bytes = SEALED_MORE_BYTES + clear.len() + secret.len();
    Frame { is_sealed: true, ..*frame }.encode_head(payload_bytes, out);
    out[start..][SEQ].copy_from_slice(&frame.seq.to_le_bytes());
    out.extend_from_slice(&u16::try_from(clear.len()).expect("it was split for that").to_le_bytes());
    out.extend_from_slice(clear);
    // The CRC's place is zeros yet.
    sealer.seal(&out[start..], secret, |sealed| find_mark(sealed, 0).is_some(), sealed);
    out.extend_from_slice(sealed);
    complete(&mut out[start..], frame.seq);
}

/// What may be read of an attempt, and the provider's words, which may tell of the event.
fn split_attempt(payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
    if let Ok(mut attempt) = serde_json::from_slice::<Attempt>(payload) {
        let words = std::mem::take(&mut attempt.detail);
        let clear = serde_json::to_vec(&attempt).expect("an attempt is JSON");
        if u16::try_from(clear.len()).is_ok() && clear.len() + words.len() <= payload.len() {
            return (clear, words.into_bytes());
        }
    }
    // None of ours. It is hidden as it is, and `explain` does without.
    (Vec::new(), payload.to_vec())
}

#[cfg(test)]
mod tests {
    use super::{
        super::frame::{crc_without, parse},
        *,
    };
    use crate::{
        queue::Durability,
        sealing::{FileKind, test_keys as sealing},
    };

    const EVENT: &[u8] = br#"{"event":"canary"}"#;
    const ATTEMPT: &[u8] =
        br#"{"provider":"p","attempt":2,"verdict":"unavailable","detail":"503 \"canary\"","events":[[7,8]]}"#;

    fn frame(kind: Kind, seq: u64, payload: &'static [u8]) -> Frame<'static> {
        let is_event = kind == Kind::Event;
        Frame {
            kind,
            durability: is_event.then_some(Durability::Synced),
            seq,
            time_ms: -5,
            id: if is_event { b"id-1" } else { b"" },
            payload,
            is_sealed: false,
        }
    }

    fn group() -> Vec<u8> {
        let mut group = Vec::new();
        for frame in
            [frame(Kind::Event, 7, EVENT), frame(Kind::Event, 8, b"{}"), frame(Kind::Attempt, 9, ATTEMPT)]
        {
            frame.encode(&mut group);
        }
        group
    }

    fn sealed(group: &[u8]) -> (Vec<u8>, std::sync::Arc<FileKey>) {
        let (mut sealer, _) = sealing("a").begin(FileKind::Segment).unwrap().unwrap();
        let mut out = b"old".to_vec();
        seal_group(&mut sealer, group, &mut out);
        (out, sealer.key())
    }

    fn parsed(bytes: &[u8]) -> Vec<Frame<'_>> {
        let mut frames = Vec::new();
        let mut rest = bytes;
        while let Parsed::Frame(frame) = parse(rest) {
            rest = &rest[frame.len()..];
            frames.push(frame);
        }
        assert!(rest.is_empty());
        frames
    }

    #[test]
    fn frames_are_found_without_the_key_and_their_payloads_are_not() {
        let group = group();
        let (bytes, key) = sealed(&group);
        assert!(bytes.len() <= bytes_max(&group));
        assert!(memchr::memmem::find(&bytes, b"canary").is_none());
        let (plain, frames) = (parsed(&group), parsed(&bytes));
        let mut secret = Vec::new();
        for (plain, frame) in plain.iter().zip(&frames) {
            assert!(frame.is_sealed);
            assert_eq!(Frame { payload: plain.payload, is_sealed: false, ..*frame }, *plain);
            open(frame, &key, &mut secret).unwrap();
            match frame.kind {
                Kind::Event => assert_eq!((&secret[..], clear(frame.payload)), (plain.payload, &b""[..])),
                Kind::Attempt => {
                    let attempt: Attempt = serde_json::from_slice(clear(frame.payload)).unwrap();
                    assert_eq!((&*attempt.verdict, &*attempt.events), ("unavailable", &[(7, 8)][..]));
                    assert_eq!(secret, br#"503 "canary""#);
                }
            }
        }
    }

    /// With the CRC mended, as only somebody does who means to.
    #[test]
    fn every_bit_of_a_frame_is_authenticated_but_for_those_that_say_nothing() {
        let (bytes, key) = sealed(&group());
        let mut secret = Vec::new();
        for whole in parsed(&bytes) {
            let mut frame = Vec::new();
            whole.encode(&mut frame);
            let (mut broken, mut invalid) = (0, 0);
            for bit in (0..frame.len() * 8).filter(|bit| !(12..16).contains(&(bit / 8))) {
                let mut flipped = frame.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let crc = crc_without(&flipped, 12..16);
                flipped[12..16].copy_from_slice(&crc.to_le_bytes());
                match parse(&flipped) {
                    Parsed::Frame(flipped) if flipped == whole => assert_eq!(bit / 8, 6, "a level of none"),
                    Parsed::Frame(flipped) if !flipped.is_sealed => invalid += 1,
                    Parsed::Frame(flipped) => {
                        assert_eq!(open(&flipped, &key, &mut secret), Err(BrokenSeal), "bit {bit}");
                        broken += 1;
                    }
                    Parsed::Short(_) | Parsed::Invalid => invalid += 1,
                }
            }
            assert!(broken > frame.len() * 6 && invalid > 0, "{broken} of {}", frame.len() * 8);
        }
    }

    #[test]
    fn a_payload_under_another_number_or_of_another_file_is_refused() {
        let (bytes, key) = sealed(&group());
        let (others, _) = sealed(&group());
        let mut secret = Vec::new();
        let (frames, others) = (parsed(&bytes), parsed(&others));
        let swapped = Frame { payload: frames[1].payload, ..frames[0] };
        for frame in [swapped, Frame { seq: 8, ..frames[0] }, Frame { id: b"id-2", ..frames[0] }, others[0]] {
            assert_eq!(open(&frame, &key, &mut secret), Err(BrokenSeal));
        }
        for payload in [&b""[..], b"\0", b"\xFF\xFF", b"\0\0", b"\0\0\x01"] {
            assert_eq!(open(&Frame { payload, ..frames[0] }, &key, &mut secret), Err(BrokenSeal));
            assert_eq!(clear(payload), b"");
        }
        open(&frames[0], &key, &mut secret).unwrap();
    }

    #[test]
    fn what_is_no_attempt_of_ours_is_hidden_as_a_whole() {
        let mut group = Vec::new();
        frame(Kind::Attempt, 1, b"canary \xFF\xFF\xFF").encode(&mut group);
        let (bytes, _) = sealed(&group);
        assert!(bytes.len() <= bytes_max(&group), "room is made for so many and no more");
        assert_eq!(clear(parsed(&bytes)[0].payload), b"");
        assert!(memchr::memmem::find(&bytes, b"canary").is_none());
        assert_eq!(find_mark(&bytes, 1), None);
    }
}
