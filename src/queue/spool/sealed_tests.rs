//! What is promised of a log that is sealed, beside what holds for every log: see
//! [`tests`](super::tests), which runs over sealed ones too.

use std::{ops::Range, path::PathBuf, sync::Arc};

use fastrand::Rng;

use super::{
    SpoolError,
    frame::{Parsed, SEALED_HEADER_BYTES, crc_without, parse},
    fs::SpoolFs,
    head,
    log::{LogKeys, LogLimits},
    model::{PROVIDERS, Rig, SMALL, Set, dirs, sealed},
    reader::{Chunk, LogReader},
    scan::last_not_zero,
    sim::Fault,
};
use crate::{
    reasons::DropReason,
    sealing::{Locked, Rewrap, Sealing},
};

/// A sealed log with so many events in one segment; closed, and on the disk for certain.
fn with_events(events: u64) -> (Rig, PathBuf) {
    let mut rig = Rig::opened_sealed(1, SMALL);
    rig.append(events, true, false).unwrap();
    rig.close();
    rig.fs.settle();
    let mut segments = rig.fs.files(&dirs().segments);
    assert_eq!(segments.len(), 1);
    (rig, segments.remove(0))
}

/// Where the frames of a segment are.
fn frames(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut frames = Vec::new();
    let mut at = SEALED_HEADER_BYTES;
    while let Parsed::Frame(frame) = parse(&bytes[at..]) {
        assert!(frame.is_sealed);
        frames.push(at..at + frame.len());
        at += frame.len();
    }
    frames
}

fn mend_crc(frame: &mut [u8]) {
    let crc = crc_without(frame, 12..16);
    frame[12..16].copy_from_slice(&crc.to_le_bytes());
}

fn read(rig: &mut Rig) -> Chunk {
    let index = rig.log().index().clone();
    let mut reader = LogReader::new(Arc::new(rig.fs.clone()), dirs(), index.clone());
    let mut all = Chunk { next_seq: index.oldest_seq(), ..Chunk::default() };
    while all.next_seq < index.next_seq() {
        let chunk = reader.read(all.next_seq, 1000, 1 << 20).unwrap();
        all.events.extend(chunk.events);
        all.missing.extend(chunk.missing);
        all.damaged.extend(chunk.damaged);
        all.next_seq = chunk.next_seq;
    }
    all
}

fn seqs(chunk: &Chunk) -> Vec<u64> {
    chunk.events.iter().map(|logged| logged.seq).collect()
}

fn missing(chunk: &Chunk) -> Vec<(Range<u64>, DropReason)> {
    chunk.missing.iter().map(|missing| (missing.seqs.clone(), missing.why)).collect()
}

/// Somebody changes what is sealed, and mends the checksums.
#[test]
fn flipped_bits_and_swapped_payloads_are_refused_and_counted_and_the_rest_is_read() {
    let (mut rig, path) = with_events(4);
    let mut bytes = rig.fs.bytes(&path);
    let frames = frames(&bytes);
    let [one, two, three, _] = &frames[..] else { panic!("{frames:?}") };
    // The last byte of the first, and the payloads of the others, which are as long.
    bytes[one.end - 1] ^= 1;
    let payload = |frame: &Range<usize>| frame.start + 32 + 2..frame.end;
    assert_eq!(payload(two).len(), payload(three).len());
    let second = bytes[payload(two)].to_vec();
    bytes.copy_within(payload(three), payload(two).start);
    bytes[payload(three)].copy_from_slice(&second);
    for frame in [one, two, three] {
        mend_crc(&mut bytes[frame.clone()]);
    }
    rig.fs.set_bytes(&path, &bytes);
    let recovery = rig.open_unheld().unwrap();
    assert_eq!((recovery.torn_bytes, recovery.damaged), (0, 0), "its checksums are right");
    let chunk = read(&mut rig);
    assert_eq!(seqs(&chunk), [4]);
    assert_eq!(missing(&chunk), [(1..4, DropReason::SealBroken)]);
    assert_eq!(chunk.damaged.len(), 3);
    for range in chunk.damaged {
        assert!(rig.log().quarantine(range.segment, range.at, range.bytes));
    }
    assert_eq!(rig.quarantined().len(), 3, "a copy of each is kept");
}

#[test]
fn frames_in_another_order_or_under_other_numbers_give_no_event_twice_and_none_in_silence() {
    let (rig, path) = with_events(4);
    let bytes = rig.fs.bytes(&path);
    let places = frames(&bytes);
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut rig = rig.fork();
        let mut bytes = bytes.clone();
        change(&mut bytes);
        rig.fs.set_bytes(&path, &bytes);
        rig.open_unheld().unwrap();
        read(&mut rig)
    };
    let second = bytes[places[1].clone()].to_vec();
    let third = bytes[places[2].clone()].to_vec();
    let swapped = with(&|bytes| {
        bytes[places[1].clone()].copy_from_slice(&third);
        bytes[places[2].clone()].copy_from_slice(&second);
    });
    assert_eq!(seqs(&swapped), [1, 3, 4]);
    assert_eq!(missing(&swapped), [(2..3, DropReason::SpoolDamaged)]);
    let renumbered = with(&|bytes| {
        let frame = &mut bytes[places[1].clone()];
        frame.copy_from_slice(&third);
        frame[16] = 2;
        mend_crc(frame);
    });
    assert_eq!(seqs(&renumbered), [1, 3, 4]);
    assert_eq!(missing(&renumbered), [(2..3, DropReason::SealBroken)]);
    let in_the_clear = with(&|bytes| {
        let frame = &mut bytes[places[1].clone()];
        frame.copy_from_slice(&second);
        frame[4] = 1;
        mend_crc(frame);
    });
    assert_eq!(seqs(&in_the_clear), [1, 3, 4]);
    assert_eq!(missing(&in_the_clear), [(2..3, DropReason::SealBroken)]);
    let twice = with(&|bytes| bytes[places[1].clone()].copy_from_slice(&third));
    assert_eq!((seqs(&twice), missing(&twice).len()), (vec![1, 3, 4], 1));
}

/// The number is given again, the nonce is not: it is another key's.
#[test]
fn a_number_whose_frame_was_torn_is_sealed_again_under_another_key() {
    let (rig, path) = with_events(3);
    let bytes = rig.fs.bytes(&path);
    let last = frames(&bytes).pop().unwrap();
    // What is sealed ends with any byte, a zero too; and the number of the event with zeros for certain.
    for torn in [last.start..last.end - 1, last.start..last.start + 20] {
        let mut rig = rig.fork();
        rig.fs.truncate(&path, torn.end);
        let recovery = rig.open_unheld().unwrap();
        let without_zeros = 1 + last_not_zero(&bytes[torn]).unwrap();
        assert_eq!(recovery.torn_bytes as usize, without_zeros);
        assert_eq!(rig.log().next_seq(), 3);
        rig.model.events.remove(&3);
        rig.append(1, true, false).unwrap();
        let segments = rig.fs.files(&dirs().segments);
        assert_eq!(segments.len(), 2, "a new file is begun");
        assert_eq!(rig.fs.bytes(&path).len(), last.start, "the old one is not written to");
        let key_of = |path: &PathBuf| rig.fs.bytes(path)[32..4096].to_vec();
        assert_ne!(key_of(&segments[0]), key_of(&segments[1]));
        let chunk = read(&mut rig);
        assert_eq!((seqs(&chunk), missing(&chunk)), (vec![1, 2, 3], vec![]));
    }
}

/// A write that failed is tried again at the same place of the same file.
#[test]
fn a_frame_that_is_written_again_in_its_place_has_another_nonce() {
    let mut rig = Rig::opened_sealed(1, SMALL);
    rig.append(1, true, false).unwrap();
    let path = rig.fs.files(&dirs().segments).remove(0);
    let counters = |rig: &Rig| {
        let bytes = rig.fs.bytes(&path);
        let place = |frame: &Range<usize>| frame.start + 32 + usize::from(bytes[frame.start + 7]) + 2 + 1;
        let counter = |frame: &Range<usize>| bytes[place(frame)..place(frame) + 8].to_vec();
        frames(&bytes).iter().map(counter).collect::<Vec<_>>()
    };
    let full = rig.fs.bytes_used() - (rig.limits().segment_bytes - rig.fs.bytes(&path).len() as u64);
    rig.fs.set_room(Some(full));
    rig.fs.fail_after(0, Fault::ShortWrite);
    rig.append(1, true, false).unwrap_err();
    rig.fs.heal();
    rig.append(1, true, false).unwrap();
    assert_eq!(counters(&rig), [[0; 8].to_vec(), [2, 0, 0, 0, 0, 0, 0, 0].to_vec()]);
    rig.check();
}

fn files(rig: &Rig) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = [dirs().segments, dirs().cursors, dirs().quarantine].map(|dir| rig.fs.files(&dir));
    paths.into_iter().flatten().map(|path| (path.clone(), rig.fs.bytes(&path))).collect()
}

#[test]
fn a_log_whose_key_is_missing_is_not_opened_and_left_as_it_is() {
    let (mut rig, path) = with_events(3);
    let before = files(&rig);
    for (keys, given) in [(LogKeys::default(), "none"), (sealed("b,c"), "b, c"), (sealed("none,b"), "b")] {
        rig.keys = keys;
        let error = rig.open_unheld().unwrap_err();
        let SpoolError::Locked { path: named, locked } = error else { panic!("{error:?}") };
        assert_eq!(PathBuf::from(named), path);
        assert_eq!(locked, Locked::NoKey { kid: "a".into(), given: given.into() });
        assert_eq!(files(&rig), before);
    }
    rig.keys = sealed("b,a");
    rig.open_unheld().unwrap();
    assert_eq!(seqs(&read(&mut rig)), [1, 2, 3]);
}

#[test]
fn without_the_key_events_are_counted_and_their_file_is_set_aside() {
    let (mut rig, path) = with_events(3);
    let used = frames(&rig.fs.bytes(&path)).pop().unwrap().end;
    let before = rig.fs.bytes(&path)[..used].to_vec();
    rig.keys = LogKeys { passes_unreadable: true, ..sealed("b") };
    rig.open_unheld().unwrap();
    rig.model.events.clear();
    rig.append(2, true, false).unwrap();
    let chunk = read(&mut rig);
    assert_eq!((seqs(&chunk), missing(&chunk)), (vec![4, 5], vec![(1..4, DropReason::Undecryptable)]));
    assert!(chunk.damaged.is_empty(), "all of it is kept");
    for place in 0..PROVIDERS.len() {
        rig.end(place, 1..4, 2);
    }
    // A start before it is noted asks for the key again.
    let mut killed = rig.fork();
    killed.fs.crash_process();
    killed.keys = sealed("b");
    assert!(matches!(killed.open_unheld(), Err(SpoolError::Locked { .. })));
    killed.keys = sealed("b,a");
    killed.open_unheld().unwrap();
    assert_eq!(seqs(&read(&mut killed)), [1, 2, 3, 4, 5], "or gets it");

    rig.sync_cursors();
    rig.sync_cursors();
    let aside = dirs().segments.join("00000000000000000001.log.unreadable");
    assert_eq!(rig.fs.bytes(&aside), before);
    rig.close();
    rig.keys = sealed("b");
    rig.open_unheld().unwrap();
    assert_eq!(seqs(&read(&mut rig)), [4, 5]);
    assert_eq!(rig.fs.bytes(&aside), before, "nobody removes it");
}

#[test]
fn a_segment_that_lost_both_of_its_keys_is_set_aside_and_holds_up_nothing() {
    let (mut rig, path) = with_events(3);
    rig.fs.flip_bit(&path, 8 * 60);
    rig.fs.flip_bit(&path, 8 * (4096 + 60));
    rig.open_unheld().unwrap();
    let chunk = read(&mut rig);
    assert_eq!(missing(&chunk), [(1..4, DropReason::Undecryptable)]);
    assert_eq!(rig.quarantined().len(), 2, "both blocks are kept");
}

/// An event that says what a key block says, where one would stand, in a segment whose header
/// is damaged.
#[test]
fn what_callers_send_is_never_taken_for_a_key() {
    let limits = LogLimits { segment_bytes: 1 << 16, bytes_max: 1 << 20 };
    let (_, block) = sealed("a").sealing.begin(crate::sealing::FileKind::Segment).unwrap().unwrap();
    let mut rig = Rig::opened(1, limits);
    rig.append_filled(4, 3000, true, false).unwrap();
    rig.close();
    rig.fs.settle();
    let path = rig.fs.files(&dirs().segments).remove(0);
    let mut bytes = rig.fs.bytes(&path);
    let block = block.encode(300);
    bytes[4096..4096 + block.len()].copy_from_slice(&block);
    bytes[20] ^= 1;
    rig.fs.set_bytes(&path, &bytes);
    rig.open_unheld().unwrap();
    assert_eq!(seqs(&read(&mut rig)), [1, 3, 4], "the one that was written over is damaged, and no more");
}

#[test]
fn a_log_is_sealed_from_one_day_on_and_not_any_more_from_another_on() {
    let limits = LogLimits { segment_bytes: 1 << 14, bytes_max: 1 << 20 };
    let mut rig = Rig::opened(1, limits);
    let is_sealed = |rig: &Rig| -> Vec<bool> {
        let segments = rig.fs.files(&dirs().segments);
        segments.iter().map(|path| rig.fs.bytes(path)[8] == 2).collect()
    };
    rig.append(1, true, false).unwrap();
    for (keys, now) in
        [(sealed("a"), true), (sealed("b,a"), true), (sealed("none,b,a"), false), (sealed("none,b,a"), false)]
    {
        rig.close();
        rig.keys = keys;
        rig.open().unwrap();
        rig.append(1, true, true).unwrap();
        rig.check();
        assert_eq!(is_sealed(&rig).pop(), Some(now));
    }
    assert_eq!(is_sealed(&rig), [false, true, true, false], "a file that is not sealed is written on");
    assert_eq!(seqs(&read(&mut rig)), [1, 2, 3, 4, 5]);
}

#[test]
fn many_starts_make_a_full_log_no_larger_than_it_may_be() {
    let mut rig = Rig::opened_sealed(1, SMALL);
    for _ in 0..40 {
        while rig.append(1, true, false).is_ok() {}
        let (bytes, _) = rig.log().index().size();
        assert!(bytes <= rig.limits().bytes_max, "{bytes}");
        rig.restart();
    }
    rig.check_takes_again();
}

/// Killed, or without power, at every call; and once more in its second try.
#[test]
fn a_rewrap_that_dies_anywhere_loses_nothing() {
    let (rig, path) = with_events(3);
    let (both, new) = (sealed("b,a"), sealed("b"));
    let rewrap = |rig: &Rig| {
        let file = rig.fs.open(&path)?;
        head::rewrap(&*file, 1, both.sealing.keyring().unwrap()).map_err(std::io::Error::other)
    };
    let mut died = 0;
    for (fault, after) in Fault::ALL.into_iter().flat_map(|fault| (0..20).map(move |after| (fault, after))) {
        for machine_dies in [false, true] {
            let mut rig = rig.fork();
            for seed in 0..2 {
                rig.fs.fail_after(after, fault);
                died += u64::from(rewrap(&rig).is_err());
                rig.fs.heal();
                if machine_dies {
                    rig.fs.crash_machine(&mut Rng::with_seed(seed + after));
                }
                rig.fs.crash_process();
                let mut opened = rig.fork();
                opened.keys = both.clone();
                opened.open_unheld().unwrap();
                assert_eq!(seqs(&read(&mut opened)), [1, 2, 3], "{fault:?} after {after} calls");
            }
            assert!(matches!(rewrap(&rig).unwrap(), Rewrap::Rewrapped | Rewrap::UpToDate));
            assert_eq!(rewrap(&rig).unwrap(), Rewrap::UpToDate);
            rig.keys = new.clone();
            rig.open_unheld().unwrap();
            assert_eq!(seqs(&read(&mut rig)), [1, 2, 3]);
        }
    }
    assert!(died > 100, "{died}");
}

/// It has the keys of its segments since it was opened.
#[test]
fn a_relay_reads_on_beside_a_rewrap_with_a_key_that_it_does_not_know() {
    let mut rig = Rig::opened_sealed(1, SMALL);
    rig.append(2, true, false).unwrap();
    let path = rig.fs.files(&dirs().segments).remove(0);
    let file = rig.fs.open(&path).unwrap();
    assert_eq!(head::rewrap(&*file, 1, sealed("b,a").sealing.keyring().unwrap()).unwrap(), Rewrap::Rewrapped);
    rig.append(1, true, false).unwrap();
    assert_eq!(seqs(&read(&mut rig)), [1, 2, 3]);
    rig.close();
    rig.keys = sealed("b");
    rig.open().unwrap();
    assert_eq!(rig.read_all().events.keys().copied().collect::<Set>(), Set::from([1, 2, 3]));
}

#[test]
fn nothing_of_an_event_is_on_the_disk_but_what_may_be() {
    let mut rig = Rig::opened_sealed(1, SMALL);
    rig.append_filled(1, 64, true, true).unwrap();
    for (path, bytes) in files(&rig) {
        assert!(memchr::memmem::find(&bytes, b"xxxxxxxx").is_none(), "{path:?}");
    }
    let segment = rig.fs.files(&dirs().segments).remove(0);
    let bytes = rig.fs.bytes(&segment);
    assert!(memchr::memmem::find(&bytes, b"unavailable").is_some(), "an attempt can be read");
    assert!(rig.keys.sealing.seals() && !Sealing::default().seals());
}
