//! What the log promises, tried at every byte, every bit and every call, and
//! against a model by random schedules. No threads and no real disk; see
//! [`sim`](super::sim).

use std::{
    collections::BTreeMap,
    env,
    ops::Range,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use fastrand::Rng;

use super::{
    SpoolError,
    cursor::SLOT_BYTES,
    frame::{
        Kind, Parsed, SEALED_HEADER_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentStart, crc_without,
        parse, u32_at,
    },
    fs::SpoolFs,
    log::{AppendError, LogLimits, Recovery},
    model::{OUTCOMES, PROVIDERS, Reading, Rig, SMALL, Set, Tally, cursor_path, dirs, sealed, serial},
    sim::{Call, Fault, Mishaps},
};

/// One thing that is done to a log.
#[derive(Debug, Clone)]
enum Op {
    Append { count: u64, sync: bool, attempt: bool },
    End { place: usize, range: Range<u64>, outcome: usize },
    Read { place: usize, events_max: usize },
    Rewind { place: usize },
    WriteCursors,
    Sync,
    SyncCursors,
}

fn apply(rig: &mut Rig, op: &Op) {
    match op.clone() {
        Op::Append { count, sync, attempt } => {
            // The rig keeps account of what is refused.
            let _ = rig.append(count, sync, attempt);
        }
        Op::End { place, range, outcome } => rig.end(place, range, outcome),
        Op::Read { place, events_max } => rig.read(place, events_max, 400),
        Op::Rewind { place } => rig.rewind(place),
        Op::WriteCursors => rig.write_cursors(),
        Op::Sync => rig.sync(),
        Op::SyncCursors => rig.sync_cursors(),
    }
}

/// All that a log does in its life, in a few calls.
fn reference_workload() -> Vec<Op> {
    let append = |count, sync| Op::Append { count, sync, attempt: false };
    let end = |place, range| Op::End { place, range, outcome: place };
    vec![
        append(2, true),
        append(1, false),
        Op::Read { place: 0, events_max: 10 },
        Op::Append { count: 1, sync: true, attempt: true },
        end(0, 1..3),
        Op::WriteCursors,
        // Begins a segment.
        append(3, true),
        end(1, 1..2),
        end(0, 4..6),
        Op::SyncCursors,
        append(1, false),
        Op::Sync,
        Op::Read { place: 1, events_max: 3 },
        end(0, 3..4),
        end(1, 2..6),
        Op::SyncCursors,
        // Removes one.
        Op::SyncCursors,
        append(3, false),
        end(1, 7..9),
        Op::WriteCursors,
        Op::Read { place: 1, events_max: 10 },
        append(2, true),
        end(0, 6..13),
        end(1, 6..10),
        Op::SyncCursors,
        Op::SyncCursors,
        append(1, false),
        append(1, true),
    ]
}

/// An empty disk, for a log that is sealed or not.
fn new_rig(seed: u64, is_sealed: bool) -> Rig {
    let rig = Rig::new(seed, SMALL);
    if is_sealed { rig.keeping(sealed("a")) } else { rig }
}

/// The calls of the reference workload, the opening of the log included.
fn reference_calls(is_sealed: bool) -> u64 {
    let mut rig = new_rig(0, is_sealed);
    rig.open().unwrap();
    reference_workload().iter().for_each(|op| apply(&mut rig, op));
    let tally = rig.model.tally;
    assert!(tally.removed_segments >= 2 && tally.full + tally.failed == 0, "{tally:?}");
    rig.fs.calls()
}

/// Runs the reference workload until the process is dead. False if it is not.
fn run_until_stopped(rig: &mut Rig, after: u64, fault: Fault) -> bool {
    rig.fs.fail_after(after, fault);
    if rig.open().is_err() {
        return true;
    }
    for op in reference_workload() {
        apply(rig, &op);
        if rig.fs.stopped() {
            return true;
        }
    }
    false
}

#[test]
fn every_call_may_fail_in_every_way_and_nothing_taken_is_lost() {
    every_call_may_fail(false);
}

#[test]
fn every_call_may_fail_in_every_way_and_nothing_taken_is_lost_sealed() {
    every_call_may_fail(true);
}

fn every_call_may_fail(is_sealed: bool) {
    let calls = reference_calls(is_sealed);
    let mut struck: BTreeMap<Call, u64> = BTreeMap::new();
    let (mut runs, mut tally, mut failed_syncs) = (0, Tally::default(), 0);
    for fault in Fault::ALL {
        for after in 0..calls {
            let _told = Told(format!("after {after} calls: {fault:?}"));
            let mut rig = new_rig(after, is_sealed);
            let fs = rig.fs.clone();
            fs.fail_after(after, fault);
            while rig.open().is_err() {
                assert!(fs.struck().is_some(), "opening fails for no reason");
                rig.crash_process();
            }
            for op in reference_workload() {
                apply(&mut rig, &op);
                if fs.stopped() {
                    rig.restart();
                }
            }
            let Some(call) = fs.struck() else { continue };
            *struck.entry(call).or_default() += 1;
            runs += 1;

            rig.check();
            for machine_dies in [false, true] {
                let mut after_crash = rig.fork();
                if machine_dies {
                    after_crash.crash_machine(&mut Rng::with_seed(after));
                }
                after_crash.restart();
                after_crash.check_takes_again();
                after_crash.check_idempotent();
            }
            rig.check_takes_again();
            tally.add(&rig.model.tally);
            failed_syncs += fs.mishaps().failed_syncs;
        }
    }
    println!("{calls} calls, {runs} runs, struck {struck:?}, {failed_syncs} failed syncs, {tally:?}");
    assert_eq!(struck.len(), 13, "every kind of call failed once");
    assert!(tally.full > 0 && tally.failed > 0 && tally.torn_tails > 0 && failed_syncs > 0);
}

#[test]
fn a_crash_at_every_call_loses_nothing_that_was_promised() {
    crash_at_every_call(false);
}

#[test]
fn a_crash_at_every_call_loses_nothing_that_was_promised_sealed() {
    crash_at_every_call(true);
}

fn crash_at_every_call(is_sealed: bool) {
    let calls = reference_calls(is_sealed);
    let (mut runs, mut tally, mut mishaps) = (0, Tally::default(), Mishaps::default());
    for fault in [Fault::StopBefore, Fault::StopMiddle] {
        for after in 0..calls {
            let mut rig = new_rig(after, is_sealed);
            if !run_until_stopped(&mut rig, after, fault) {
                assert_eq!(fault, Fault::StopMiddle, "only writes have a middle");
                continue;
            }
            // The disk of a machine can be left in many ways.
            for seed in 0..8 {
                let _told = Told(format!("after {after} calls: {fault:?}, seed {seed}"));
                let mut after_crash = rig.fork();
                if seed > 0 {
                    after_crash.crash_machine(&mut Rng::with_seed(seed));
                }
                after_crash.restart();
                // What is taken now must not hang on what the crash left.
                after_crash.append(1, true, false).unwrap();
                after_crash.crash_machine(&mut Rng::with_seed(seed));
                after_crash.restart();
                after_crash.check_idempotent();
                after_crash.check_takes_again();
                tally.add(&after_crash.model.tally);
                mishaps.add(&after_crash.fs.mishaps());
                runs += 1;
            }
        }
    }
    println!("{calls} calls, {runs} crashes, {mishaps:?}, {tally:?}");
    assert!(tally.torn_tails > 0 && tally.lost_unsynced > 0 && tally.forgotten_ends > 0);
    assert!(mishaps.lost_writes > 0 && mishaps.lost_names > 0);
}

#[test]
fn a_crash_at_every_call_of_a_recovery_is_recovered_from() {
    crash_at_every_call_of_a_recovery(false);
}

#[test]
fn a_crash_at_every_call_of_a_recovery_is_recovered_from_sealed() {
    crash_at_every_call_of_a_recovery(true);
}

fn crash_at_every_call_of_a_recovery(is_sealed: bool) {
    let calls = reference_calls(is_sealed);
    let (mut recoveries, mut crashes, mut torn) = (0, 0, 0);
    for first in 0..calls {
        let fault = if first % 2 == 0 { Fault::StopBefore } else { Fault::StopMiddle };
        let mut rig = new_rig(first, is_sealed);
        if !run_until_stopped(&mut rig, first, fault) {
            continue;
        }
        let mut rng = Rng::with_seed(first);
        if first % 4 < 2 {
            rig.crash_machine(&mut rng);
        }
        rig.crash_process();
        let recovery_calls = {
            let mut whole = rig.fork();
            let before = whole.fs.calls();
            let recovery = whole.open().unwrap();
            torn += u64::from(recovery.torn_bytes > 0);
            whole.fs.calls() - before
        };
        recoveries += 1;
        for second in 0..recovery_calls {
            let _told = Told(format!("after {first} calls: {fault:?}, then after {second}"));
            let mut cut_short = rig.fork();
            let fault = if rng.bool() { Fault::StopBefore } else { Fault::StopMiddle };
            cut_short.fs.fail_after(second, fault);
            if cut_short.open().is_ok() {
                continue;
            }
            if rng.bool() {
                cut_short.crash_machine(&mut rng);
            }
            cut_short.restart();
            cut_short.check_idempotent();
            crashes += 1;
        }
    }
    println!("{recoveries} recoveries, {crashes} of them cut short, {torn} with a torn end");
    assert!(crashes > recoveries && torn > 0);
}

/// A log of three segments with attempts among the events and two cursors that
/// have come some way; closed, and on the disk for certain. Each slot of a
/// cursor says something else.
fn seasoned(is_sealed: bool) -> Rig {
    let mut rig = new_rig(1, is_sealed);
    rig.open().unwrap();
    for (count, attempt) in [(2, true), (1, false), (3, true), (2, false), (1, true)] {
        rig.append(count, true, attempt).unwrap();
    }
    for (place, ranges) in [(0, [1..2, 4..5, 2..3, 8..9]), (1, [1..2, 3..4, 7..8, 5..6])] {
        for range in ranges {
            rig.end(place, range, place);
            rig.sync_cursors();
        }
    }
    rig.close();
    rig.fs.settle();
    assert_eq!(rig.fs.files(&dirs().segments).len(), 3);
    rig
}

/// Where the frames of a segment begin.
fn header_bytes(segment: &[u8]) -> usize {
    match SegmentHeader::decode(segment) {
        SegmentStart::Header(header) if header.is_sealed => SEALED_HEADER_BYTES,
        _ => SEGMENT_HEADER_BYTES,
    }
}

/// The frames of a segment: where they are, and the number and the serial of an
/// event.
#[expect(clippy::type_complexity, reason = "the frames' places, and number and serial of events")]
fn frames(bytes: &[u8]) -> Vec<(Range<usize>, Option<(u64, u64)>)> {
    let mut frames = Vec::new();
    let mut at = header_bytes(bytes);
    while let Parsed::Frame(frame) = parse(&bytes[at..]) {
        let event = (frame.kind == Kind::Event).then(|| (frame.seq, serial(frame.id)));
        frames.push((at..at + frame.len(), event));
        at += frame.len();
    }
    assert!(bytes[at..].iter().all(|byte| *byte == 0));
    frames
}

/// All that a log should hold.
fn whole_reading(rig: &Rig) -> Reading {
    let segments = rig.fs.files(&dirs().segments);
    let events = segments.iter().flat_map(|path| frames(&rig.fs.bytes(path))).filter_map(|(_, event)| event);
    Reading { events: events.collect(), ..Reading::default() }
}

/// Opens a damaged log, reads it, and does both again: the same comes out, and
/// nothing is left to repair.
fn recover_twice(rig: &mut Rig) -> (Recovery, Reading) {
    let recovery = rig.open_unheld().unwrap();
    let found = rig.found();
    rig.crash_process();
    assert_eq!(rig.open_unheld().unwrap(), Recovery::default());
    assert_eq!(rig.found(), found);
    (recovery, found.1)
}

#[test]
fn recovery_after_truncation_at_every_byte_keeps_every_whole_frame() {
    truncate_at_every_byte(false);
}

#[test]
fn recovery_after_truncation_at_every_byte_keeps_every_whole_frame_sealed() {
    truncate_at_every_byte(true);
}

fn truncate_at_every_byte(is_sealed: bool) {
    let seasoned = seasoned(is_sealed);
    let whole = whole_reading(&seasoned);
    let segments = seasoned.fs.files(&dirs().segments);
    // A cursor that knows event 8 keeps the numbers up to it from being used
    // again.
    let known_end = 9;
    let (mut cuts, mut torn, mut missing) = (0, 0, 0);
    for path in &segments {
        let bytes = seasoned.fs.bytes(path);
        let newest = path == segments.last().unwrap();
        let header = header_bytes(&bytes);
        // A block of a key is a block of a key.
        for cut in (0..=bytes.len()).filter(|cut| *cut >= header || !is_sealed || cut % 61 == 0) {
            let mut rig = seasoned.fork();
            rig.fs.truncate(path, cut);
            let (recovery, reading) = recover_twice(&mut rig);

            let mut expected = whole.clone();
            let gone = frames(&bytes).into_iter().filter(|(range, _)| range.end > cut);
            for (seq, _) in gone.filter_map(|(_, event)| event) {
                expected.events.remove(&seq);
            }
            let last = *expected.events.last_key_value().unwrap().0;
            let next_seq = if newest { known_end.max(last + 1) } else { 10 };
            expected.missing = (1..next_seq).filter(|seq| !expected.events.contains_key(seq)).collect();
            assert_eq!(rig.log().next_seq(), next_seq, "{path:?} cut at {cut}");
            assert_eq!(reading.events, expected.events, "{path:?} cut at {cut}");
            assert_eq!(reading.missing, expected.missing, "{path:?} cut at {cut}");

            let in_a_frame = frames(&bytes).iter().any(|(range, _)| range.start < cut && cut < range.end);
            let in_the_header = cut < header;
            assert_eq!(recovery.torn_bytes > 0, newest && in_a_frame, "{path:?} cut at {cut}");
            let kept = rig.quarantined();
            if is_sealed && in_the_header {
                assert!((1..=3).contains(&kept.len()), "{path:?} cut at {cut}");
            } else {
                assert_eq!(kept.len(), usize::from(in_a_frame || in_the_header), "{path:?} cut at {cut}");
            }
            // What is cut off is kept, to the last byte that is not zero.
            if let Some((range, _)) =
                frames(&bytes).iter().find(|(range, _)| range.contains(&cut) && in_a_frame)
            {
                let copy = rig.fs.bytes(&kept[0]);
                assert!(bytes[range.start..cut].starts_with(&copy));
                assert!(bytes[range.start + copy.len()..cut].iter().all(|byte| *byte == 0));
            }
            cuts += 1;
            torn += u64::from(recovery.torn_bytes > 0);
            missing += u64::from(!reading.missing.is_empty());
        }
    }
    println!("{cuts} cuts, {torn} with a torn end, {missing} with missing numbers");
    assert!(torn > 300 && missing > 900);
}

#[test]
fn a_flipped_bit_of_a_segment_costs_at_most_one_event_and_is_counted() {
    flip_every_bit(false);
}

#[test]
fn a_flipped_bit_of_a_segment_costs_at_most_one_event_and_is_counted_sealed() {
    flip_every_bit(true);
}

fn flip_every_bit(is_sealed: bool) {
    let seasoned = seasoned(is_sealed);
    let whole = whole_reading(&seasoned);
    let (mut flips, mut lost, mut torn) = (0, 0, 0);
    for path in seasoned.fs.files(&dirs().segments) {
        let bytes = seasoned.fs.bytes(&path);
        // Most of a key block is blanks.
        let counts = |byte: usize| {
            byte >= header_bytes(&bytes) || !is_sealed || byte % 4096 < 40 || byte.is_multiple_of(67)
        };
        for bit in (0..bytes.len() * 8).filter(|bit| counts(bit / 8)) {
            let mut rig = seasoned.fork();
            rig.fs.flip_bit(&path, bit);
            let recovery = rig.open_unheld().unwrap();
            let reading = rig.read_all();
            assert_eq!(rig.quarantined().len(), 1, "{path:?} bit {bit}");
            let gone: Set =
                whole.events.keys().filter(|seq| !reading.events.contains_key(seq)).copied().collect();
            assert!(gone.len() <= 1, "{path:?} bit {bit} cost {gone:?}");
            assert_eq!(reading.events.len(), whole.events.len() - gone.len(), "{path:?} bit {bit}");
            assert!(reading.events.iter().all(|(seq, serial)| whole.events.get(seq) == Some(serial)));
            // The last event of all can be taken for a torn end.
            let told: Set = reading.missing.iter().copied().chain(rig.log().next_seq()..10).collect();
            assert_eq!(told, gone, "{path:?} bit {bit}");
            flips += 1;
            lost += gone.len();
            torn += u64::from(recovery.torn_bytes > 0);
        }
    }
    println!("{flips} flips, {lost} cost an event, {torn} were a torn end");
    assert!(flips > 10_000 && lost > 5000 && torn > 0);
}

/// The bytes of each slot that count.
fn used_of_slots(cursor: &[u8]) -> [Range<usize>; 2] {
    [0, SLOT_BYTES].map(|at| {
        let header = &cursor[at..at + SEGMENT_HEADER_BYTES];
        at..at + SEGMENT_HEADER_BYTES + u32_at(header, 24) as usize
    })
}

#[test]
fn a_damaged_cursor_costs_duplicates_and_no_event() {
    let mut seasoned = seasoned(false);
    let whole = whole_reading(&seasoned);
    seasoned.open().unwrap();
    let ended = [seasoned.ended(0), seasoned.ended(1)];
    seasoned.close();
    seasoned.fs.settle();
    let (mut flips, mut cuts, mut duplicates) = (0, 0, 0);
    let mut hold = |rig: &mut Rig, place: usize, counts: bool, what: &str| {
        let (recovery, reading) = recover_twice(rig);
        assert_eq!(reading, whole, "{what}");
        assert_eq!(rig.ended(1 - place), ended[1 - place], "{what}");
        let now = rig.ended(place);
        assert!(now.is_subset(&ended[place]), "{what}");
        assert_eq!(rig.quarantined().len(), usize::from(counts), "{what}");
        assert_eq!(recovery.damaged, u64::from(counts), "{what}");
        assert!(counts || now == ended[place], "{what}");
        duplicates += ended[place].len() - now.len();
    };
    for (place, provider) in PROVIDERS.into_iter().enumerate() {
        let path = cursor_path(provider);
        let bytes = seasoned.fs.bytes(&path);
        let used = used_of_slots(&bytes);
        let is_used = |byte: usize| used.iter().any(|used| used.contains(&byte));
        let rest = (0..bytes.len() * 8).step_by(4099).filter(|bit| !is_used(bit / 8));
        for bit in used.iter().flat_map(|used| used.start * 8..used.end * 8).chain(rest) {
            let mut rig = seasoned.fork();
            rig.fs.flip_bit(&path, bit);
            hold(&mut rig, place, is_used(bit / 8), &format!("{provider}: bit {bit}"));
            flips += 1;
        }
        let rest = (0..bytes.len()).step_by(1021).filter(|byte| !is_used(*byte));
        for cut in used.iter().cloned().flatten().chain(rest) {
            let mut rig = seasoned.fork();
            rig.fs.truncate(&path, cut);
            hold(&mut rig, place, cut < used[1].end, &format!("{provider}: cut at {cut}"));
            cuts += 1;
        }
    }
    println!("{flips} flips and {cuts} cuts cost {duplicates} duplicates");
    assert!(flips > 5000 && cuts > 800 && duplicates > 1000);
}

#[test]
fn a_provider_whose_cursor_is_lost_begins_at_the_oldest_event() {
    let mut rig = Rig::opened(1, SMALL);
    for _ in 0..4 {
        rig.append(3, true, false).unwrap();
    }
    rig.end(0, 1..9, 0);
    rig.end(1, 1..6, 0);
    rig.sync_cursors();
    rig.sync_cursors();
    assert!(rig.model.tally.removed_segments > 0);
    let oldest = rig.log().index().oldest_seq();
    rig.close();
    rig.fs.delete(&cursor_path("mixpanel"));
    let recovery = rig.open_unheld().unwrap();
    assert_eq!(recovery.new_cursors, ["mixpanel"]);
    let lowest: Vec<u64> = rig.log().cursors().iter().map(|file| file.cursor.lowest()).collect();
    assert_eq!(lowest, [oldest, 6]);
    assert!(rig.read_all().events.keys().copied().eq(oldest..13));
    rig.crash_process();
    assert_eq!(rig.open_unheld().unwrap().new_cursors, Vec::<String>::new());
}

#[test]
fn what_a_newer_relay_wrote_is_refused_and_left_as_it_is() {
    let seasoned = seasoned(false);
    let files = |rig: &Rig| {
        let dirs = dirs();
        let paths = [&dirs.segments, &dirs.cursors, &dirs.quarantine].map(|dir| rig.fs.files(dir));
        paths.into_iter().flatten().map(|path| (path.clone(), rig.fs.bytes(&path))).collect::<Vec<_>>()
    };
    let mut newer: Vec<(PathBuf, Range<usize>)> = Vec::new();
    for path in seasoned.fs.files(&dirs().segments) {
        newer.push((path, 0..SEGMENT_HEADER_BYTES));
    }
    for path in seasoned.fs.files(&dirs().cursors) {
        let used = used_of_slots(&seasoned.fs.bytes(&path));
        newer.extend(used.map(|used| (path.clone(), used)));
    }
    assert_eq!(newer.len(), 3 + 4);
    for (path, range) in newer {
        let mut rig = seasoned.fork();
        let mut bytes = rig.fs.bytes(&path);
        let part = &mut bytes[range];
        part[8] = 3;
        let crc = crc_without(part, 12..16);
        part[12..16].copy_from_slice(&crc.to_le_bytes());
        rig.fs.set_bytes(&path, &bytes);
        let before = files(&rig);
        let error = rig.open_unheld().unwrap_err();
        assert!(matches!(error, SpoolError::Newer { version: 3, .. }), "{path:?}: {error:?}");
        assert_eq!(files(&rig), before, "{path:?}");
    }
}

#[test]
fn a_log_that_is_full_takes_events_again_once_old_ones_have_ended() {
    fill_and_free(false);
}

#[test]
fn a_log_that_is_full_takes_events_again_once_old_ones_have_ended_sealed() {
    fill_and_free(true);
}

fn fill_and_free(is_sealed: bool) {
    let mut rig = Rig::new(1, LogLimits { bytes_max: 4 * SMALL.segment_bytes, ..SMALL });
    if is_sealed {
        rig = rig.keeping(sealed("a"));
    }
    let bytes_max = rig.limits().bytes_max;
    rig.open().unwrap();
    for round in 0..5 {
        while rig.append(2, round % 2 == 0, false).is_ok() {
            let files = rig.fs.files(&dirs().segments);
            let bytes: usize = files.iter().map(|path| rig.fs.bytes(path).len()).sum();
            let (counted, _) = rig.log().index().size();
            assert!(bytes as u64 <= bytes_max && counted == bytes as u64, "{bytes} {counted}");
        }
        assert_eq!(rig.append(1, true, false), Err(AppendError::Full));
        assert!(rig.log().is_nearly_full() && !rig.log().is_broken());
        rig.check();
        let index = rig.log().index().clone();
        let oldest = index.find(index.oldest_seq()).unwrap();
        rig.end(0, 1..oldest.end_seq, 0);
        rig.end(1, 1..oldest.end_seq - 1, 0);
        rig.sync_cursors();
        rig.sync_cursors();
        assert_eq!(rig.append(1, true, false), Err(AppendError::Full), "one event is left");
        rig.end(1, 1..oldest.end_seq, 0);
        rig.sync_cursors();
        rig.sync_cursors();
    }
    assert_eq!(rig.model.tally.removed_segments, 5);
    rig.check_takes_again();
    rig.check_idempotent();
}

#[test]
fn on_a_full_disk_progress_is_noted_and_room_is_made() {
    let mut rig = Rig::opened(1, SMALL);
    let cursors = (2 * PROVIDERS.len() * SLOT_BYTES) as u64;
    rig.fs.set_room(Some(cursors + 3 * SMALL.segment_bytes + 100));
    for _ in 0..4 {
        while rig.append(2, true, false).is_ok() {}
        assert_eq!(rig.append(1, true, false), Err(AppendError::Full));
        assert!(!rig.log().is_broken());
        let index = rig.log().index().clone();
        let oldest = index.find(index.oldest_seq()).unwrap();
        rig.end(0, 1..oldest.end_seq, 0);
        rig.end(1, 1..oldest.end_seq, 0);
        rig.sync_cursors();
        rig.sync_cursors();
        // As many as before, so that one segment makes room for one.
        assert_eq!(rig.append(2, true, false), Ok(()));
        rig.check();
    }
    assert!(rig.fs.mishaps().out_of_room > 0 && rig.model.tally.removed_segments == 4);
    rig.check_idempotent();
    rig.check_takes_again();
}

#[test]
fn two_failures_in_a_row_are_told_and_one_success_heals() {
    let mut rig = Rig::opened(1, SMALL);
    rig.append(2, true, false).unwrap();
    rig.fs.fail_after(0, Fault::Error);
    assert_eq!(rig.append(1, true, false), Err(AppendError::Failed));
    assert!(!rig.log().is_broken());
    rig.fs.fail_after(0, Fault::Error);
    assert_eq!(rig.append(1, true, false), Err(AppendError::Failed));
    assert!(rig.log().is_broken());
    rig.check();
    rig.append(1, true, false).unwrap();
    assert!(!rig.log().is_broken());
    rig.check();
    rig.check_idempotent();
}

/// A machine that died with events that were only written: some of them had
/// ended, so their numbers are used up.
fn with_numbers_that_are_gone() -> Rig {
    for seed in 0.. {
        let mut rig = Rig::opened(seed, SMALL);
        rig.append(2, true, false).unwrap();
        rig.append(2, false, false).unwrap();
        rig.end(0, 1..5, 0);
        rig.sync_cursors();
        rig.crash_machine(&mut Rng::with_seed(seed));
        rig.restart();
        if rig.read_all().events.len() == 2 {
            return rig;
        }
    }
    unreachable!()
}

#[test]
fn a_number_that_a_cursor_knows_is_never_used_again() {
    let mut rig = with_numbers_that_are_gone();
    assert_eq!(rig.log().next_seq(), 5);
    assert_eq!(rig.read_all().missing, Set::from([3, 4]));
    rig.append(1, true, false).unwrap();
    let reading = rig.read_all();
    assert_eq!(reading.events.keys().copied().collect::<Vec<_>>(), [1, 2, 5]);
    assert_eq!(reading.missing, Set::from([3, 4]));
}

#[test]
fn a_reader_sees_the_segment_that_took_the_place_of_an_empty_one() {
    let mut rig = with_numbers_that_are_gone();
    rig.read(1, 10, 1000);
    // The second one begins a segment, and cannot write to it.
    for calls_before in [0, 7] {
        rig.fs.fail_after(calls_before, Fault::Error);
        assert_eq!(rig.append(1, true, false), Err(AppendError::Failed));
    }
    assert_eq!(rig.log().index().segment(5).map(|segment| segment.end_seq), Some(5));
    // Looks into it: the numbers before it are gone.
    rig.read(1, 10, 1000);
    rig.append(1, true, false).unwrap();
    rig.read(1, 10, 1000);
    rig.check();
}

#[test]
fn a_segment_that_could_not_be_begun_is_not_taken_for_damage() {
    let calls = reference_calls(false);
    let mut met = 0;
    for after in 0..calls {
        let mut rig = Rig::new(1, SMALL);
        rig.fs.fail_after(after, Fault::Error);
        while rig.open().is_err() {
            rig.crash_process();
        }
        for op in reference_workload() {
            apply(&mut rig, &op);
            if rig.fs.struck() == Some(Call::SyncDir) {
                met += 1;
                assert_eq!(rig.restart().damaged, 0, "call {after}");
                break;
            }
        }
    }
    assert!(met > 3, "{met}");
}

#[test]
fn each_torn_end_is_kept_even_if_it_is_as_long_as_one_before() {
    let mut rig = Rig::opened(1, SMALL);
    rig.append(2, true, false).unwrap();
    let path = rig.fs.files(&dirs().segments).remove(0);
    let used = frames(&rig.fs.bytes(&path)).last().unwrap().0.end as u64;
    for (round, torn) in [b"one torn end", b"two torn end"].into_iter().enumerate() {
        rig.close();
        rig.fs.open(&path).unwrap().write_all_at(torn, used).unwrap();
        let recovery = rig.restart();
        assert_eq!((recovery.torn_bytes, recovery.damaged), (torn.len() as u64, 1));
        let kept: Vec<Vec<u8>> = rig.quarantined().iter().map(|path| rig.fs.bytes(path)).collect();
        assert!(kept.len() == round + 1 && kept.contains(&torn.to_vec()));
    }
    rig.check_idempotent();
}

#[test]
fn a_torn_end_is_kept_whatever_fails_in_the_recovery() {
    let (mut runs, mut struck) = (0, 0);
    for events in 1..3 {
        let mut damaged = Rig::opened(1, SMALL);
        damaged.append(events, true, false).unwrap();
        damaged.close();
        damaged.fs.settle();
        let path = damaged.fs.files(&dirs().segments).remove(0);
        let torn = frames(&damaged.fs.bytes(&path)).pop().unwrap().0;
        damaged.fs.flip_bit(&path, torn.start * 8 + 300);
        let torn = damaged.fs.bytes(&path)[torn].to_vec();
        for fault in Fault::ALL {
            for after in 0..60 {
                let _told = Told(format!("{events} events, after {after} calls: {fault:?}"));
                let mut rig = damaged.fork();
                rig.fs.fail_after(after, fault);
                while rig.open_unheld().is_err() {
                    rig.crash_process();
                }
                struck += u64::from(rig.fs.struck().is_some());
                runs += 1;
                rig.fs.heal();
                // The model does not know that bit.
                rig.model.events.clear();
                rig.append(1, true, false).unwrap();
                rig.crash_process();
                rig.open_unheld().unwrap();
                rig.read_all();
                let kept: Vec<_> = rig.quarantined().iter().map(|path| rig.fs.bytes(path)).collect();
                assert_eq!(kept, std::slice::from_ref(&torn));
            }
        }
    }
    println!("{runs} runs, {struck} of them with a fault");
    assert!(struck > 100);
}

/// A sync writes a cursor once more into the slot that holds what was written last. If
/// that fails half way, the next write is one, though nothing has changed since.
#[test]
fn a_cursor_that_was_half_written_for_a_sync_is_written_again() {
    let mut struck = 0;
    // Only a write that ends within the few bytes that differ does harm.
    for (seed, fault) in (0..300).flat_map(|seed| [(seed, Fault::ShortWrite), (seed, Fault::TornWrite)]) {
        let mut rig = Rig::opened(seed, SMALL);
        rig.append(2, true, false).unwrap();
        rig.end(0, 1..2, 0);
        rig.write_cursors();
        rig.fs.fail_after(0, fault);
        rig.sync_cursors();
        struck += rig.fs.mishaps().faults;
        rig.fs.heal();
        rig.write_cursors();
        rig.restart();
    }
    assert_eq!(struck, 600);
}

#[test]
fn random_schedules_keep_what_was_promised() {
    let number = |name: &str| env::var(name).ok().map(|number| number.parse::<u64>().unwrap());
    // The same each time; `make test-durability` goes on from another seed.
    let base = number("RELAY_SEED").unwrap_or(0x5eed);
    let schedules = number("RELAY_SPOOL_SCHEDULES").unwrap_or(10_000);
    println!("RELAY_SEED={base} RELAY_SPOOL_SCHEDULES={schedules}");
    let next = AtomicU64::new(0);
    let work = || {
        let (mut tally, mut mishaps) = (Tally::default(), Mishaps::default());
        loop {
            let turn = next.fetch_add(1, Ordering::Relaxed);
            if turn >= schedules {
                return (tally, mishaps);
            }
            if turn > 0 && turn.is_multiple_of(50_000) {
                println!("{turn} schedules");
            }
            let seed = base.wrapping_add(turn);
            let _told = Told(format!("RELAY_SEED={seed} RELAY_SPOOL_SCHEDULES=1 repeats it"));
            let rig = run_schedule(seed);
            tally.add(&rig.model.tally);
            mishaps.add(&rig.fs.mishaps());
        }
    };
    let (mut tally, mut mishaps) = (Tally::default(), Mishaps::default());
    thread::scope(|scope| {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            let done = worker.join().expect("a schedule failed; its seed is above");
            tally.add(&done.0);
            mishaps.add(&done.1);
        }
    });
    println!("{schedules} schedules: {tally:?} {mishaps:?}");
    if schedules >= 1000 {
        let happened = [
            tally.full,
            tally.failed,
            tally.torn_tails,
            tally.quarantined,
            tally.removed_segments,
            tally.lost_unsynced,
            tally.lost_to_damage,
            tally.found,
            tally.forgotten_ends,
            tally.read_errors,
            mishaps.failed_syncs,
            mishaps.torn_writes,
            mishaps.machine_crashes,
            mishaps.lost_writes,
            mishaps.lost_names,
            mishaps.out_of_room,
            mishaps.flipped_bits,
        ];
        assert!(happened.iter().all(|count| *count > 0), "something never happened");
    }
}

/// Says what was tried if it fails.
struct Told(String);

impl Drop for Told {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("{}", self.0);
        }
    }
}

/// How a schedule's log is kept.
#[derive(Clone, Copy)]
enum Sort {
    Plain,
    Sealed,
    /// Another way each time that it is opened.
    Switched,
}

impl Sort {
    fn of(seed: u64) -> Self {
        [Self::Plain, Self::Sealed, Self::Plain, Self::Switched][(seed % 4) as usize]
    }
}

fn run_schedule(seed: u64) -> Rig {
    let mut rng = Rng::with_seed(seed);
    let segment_bytes = rng.u64(300..700);
    let limits = LogLimits { segment_bytes, bytes_max: segment_bytes * rng.u64(3..9) };
    let mut rig = Rig::new(seed, limits);
    if let Sort::Sealed | Sort::Switched = Sort::of(seed) {
        rig = rig.keeping(sealed("a,b"));
    }
    if let Sort::Switched = Sort::of(seed) {
        rig.switches = Some(&["a,b", "b,a", "none,a,b"]);
    }
    // Where bits flip, the other promises are weaker.
    let flips = rng.u8(..8) == 0;
    reopen(&mut rig, &mut rng);
    for _ in 0..rng.u32(10..50) {
        let op = match rng.u8(..100) {
            0..30 => Op::Append { count: rng.u64(..4), sync: rng.bool(), attempt: rng.u8(..4) == 0 },
            30..45 => some_end(&mut rig, &mut rng),
            45..50 => {
                let range = 1..rig.log().next_seq().saturating_sub(rng.u64(..4));
                rig.end(0, range.clone(), 0);
                Op::End { place: 1, range, outcome: 1 }
            }
            50..56 => Op::WriteCursors,
            56..61 => Op::Sync,
            61..71 => Op::SyncCursors,
            71..80 => Op::Read { place: rng.usize(..2), events_max: rng.usize(1..6) },
            80..82 => Op::Rewind { place: rng.usize(..2) },
            82..85 => {
                rig.sync();
                rig.sync_cursors();
                rig.close();
                reopen(&mut rig, &mut rng);
                continue;
            }
            85..93 => {
                crash(&mut rig, &mut rng);
                reopen(&mut rig, &mut rng);
                continue;
            }
            93..98 => {
                let fault = *rng.choice(&Fault::ALL).unwrap();
                let after = rng.u64(..15);
                rig.fs.fail_after(after, fault);
                continue;
            }
            98 => {
                rig.fs.set_room(Some(rig.fs.bytes_used() + rng.u64(..600)));
                continue;
            }
            _ if flips => {
                flip_some_bit(&mut rig, &mut rng);
                continue;
            }
            _ => continue,
        };
        apply(&mut rig, &op);
        if rig.fs.stopped() {
            crash(&mut rig, &mut rng);
            reopen(&mut rig, &mut rng);
        }
    }
    rig.check();
    rig.check_takes_again();
    if rng.u8(..4) == 0 {
        rig.check_idempotent();
    }
    rig
}

fn some_end(rig: &mut Rig, rng: &mut Rng) -> Op {
    let place = rng.usize(..2);
    let start = rig.log().cursors()[place].cursor.lowest() + rng.u64(..4);
    Op::End { place, range: start..start + rng.u64(1..6), outcome: rng.usize(..OUTCOMES.len()) }
}

fn crash(rig: &mut Rig, rng: &mut Rng) {
    if rng.bool() {
        rig.crash_machine(rng);
    } else {
        rig.crash_process();
    }
}

/// Starts until a start succeeds.
fn reopen(rig: &mut Rig, rng: &mut Rng) {
    rig.fs.crash_process();
    if let Some(kids) = rig.switches {
        rig.keys = sealed(kids[rng.usize(..kids.len())]);
    }
    if rng.u8(..4) == 0 {
        rig.fs.fail_after(rng.u64(..40), *rng.choice(&Fault::ALL).unwrap());
    }
    while let Err(error) = rig.open() {
        assert!(matches!(error, SpoolError::File { .. }), "{error:?}");
        assert!(rig.fs.has_faults(), "opening fails for no reason: {error:?}");
        rig.fs.heal();
        crash(rig, rng);
    }
}

fn flip_some_bit(rig: &mut Rig, rng: &mut Rng) {
    rig.fs.heal();
    rig.crash_process();
    // What an earlier crash left is dealt with first.
    rig.open().unwrap();
    rig.crash_process();
    let mut files = rig.fs.files(&dirs().segments);
    files.extend(rig.fs.files(&dirs().cursors));
    let path = rng.choice(files).unwrap();
    let bytes = rig.fs.bytes(&path);
    // Few bytes of a cursor are in use.
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1);
    let start = if rng.bool() { end.saturating_sub(300) } else { 0 };
    if !bytes.is_empty() {
        rig.flip_bit(&path, rng.usize(start * 8..(start + 300).min(bytes.len()).max(start + 1) * 8));
    }
    let (kept, lost) = (rig.quarantined().len(), rig.model.tally.lost_to_damage);
    let torn = rig.open().unwrap().torn_bytes > 0;
    let lost = rig.model.tally.lost_to_damage - lost;
    let counted = torn || rig.quarantined().len() > kept;
    assert!(lost == 0 || lost == 1 && counted, "{lost} events are lost to a flipped bit, counted: {counted}");
}
