use std::collections::BTreeMap;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::queue::{
    Durability,
    spool::{
        command::Attempt,
        frame::{FRAME_HEADER_BYTES, SEGMENT_HEADER_BYTES, crc_without, find_mark},
        scan::last_not_zero,
    },
};

const LIMITS: LogLimits = LogLimits { segment_bytes: 4096, bytes_max: 1 << 30 };

/// A log that was written and closed.
struct Written {
    root: TempDir,
}

impl Written {
    fn dir(&self) -> SpoolDir {
        SpoolDir::open(self.root.path()).unwrap()
    }

    fn segments(&self) -> Vec<PathBuf> {
        let dir = self.dir();
        dir.segments().unwrap().into_iter().map(|segment| dir.segment_path(segment)).collect()
    }

    fn quarantine(&self) -> Vec<String> {
        RealFs.list(&self.root.path().join("quarantine")).unwrap()
    }

    fn change(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }

    /// Flips a bit of the frame of an event.
    fn damage(&self, seq: u64) {
        let dir = self.dir();
        for segment in dir.segments().unwrap() {
            let file = dir.open_segment(segment).unwrap().unwrap();
            let mut place = None;
            dir.read(segment, SEGMENT_HEADER_BYTES as u64, &*file, |step| {
                if let Step::Frame { at, frame } = step
                    && frame.seq == seq
                    && frame.kind == Kind::Event
                {
                    place = Some(usize::try_from(at).unwrap() + frame.len() - 3);
                }
                Ok::<_, SpoolError>(true)
            })
            .unwrap();
            if let Some(place) = place {
                return self.change(&dir.segment_path(segment), |bytes| bytes[place] ^= 4);
            }
        }
        panic!("no event {seq}");
    }
}

/// Writes a log of one provider.
struct Writing {
    root: TempDir,
    log: Log,
}

impl Writing {
    fn new() -> Self {
        Self::with(LIMITS.segment_bytes)
    }

    fn with(segment_bytes: u64) -> Self {
        let root = tempfile::tempdir().unwrap();
        let dirs = LogDirs::new(root.path());
        let limits = LogLimits { segment_bytes, ..LIMITS };
        let (log, _) =
            Log::open(Arc::new(RealFs), &dirs, limits, &LogKeys::default(), &["mixpanel", "segment"], 5)
                .unwrap();
        Self { root, log }
    }

    fn event(&mut self, id: &str) -> u64 {
        let seq = self.log.next_seq();
        let payload = format!(r#"{{"id":"{id}"}}"#);
        let mut bytes = Vec::new();
        Frame {
            kind: Kind::Event,
            durability: Some(Durability::Synced),
            seq,
            time_ms: i64::try_from(seq).unwrap() * 1000,
            id: id.as_bytes(),
            payload: payload.as_bytes(),
            is_sealed: false,
        }
        .encode(&mut bytes);
        self.log.append(&bytes, 1, false, 7).unwrap();
        seq
    }

    fn events(&mut self, count: usize) {
        for _ in 0..count {
            self.event(&format!("id-{}", self.log.next_seq()));
        }
    }

    fn attempt(&mut self, verdict: &str, events: &[(u64, u64)]) {
        let attempt = Attempt {
            provider: "mixpanel".to_owned(),
            attempt: 1,
            verdict: verdict.to_owned(),
            detail: String::new(),
            events: events.to_vec(),
        };
        let payload = serde_json::to_vec(&attempt).unwrap();
        let mut bytes = Vec::new();
        let seq = self.log.next_seq();
        Frame {
            kind: Kind::Attempt,
            durability: None,
            seq,
            time_ms: 1,
            id: &[],
            payload: &payload,
            is_sealed: false,
        }
        .encode(&mut bytes);
        self.log.append(&bytes, 0, false, 7).unwrap();
    }

    /// As a relay that stops: everything synced.
    fn close(mut self) -> Written {
        self.log.sync();
        self.log.sync_cursors();
        Written { root: self.root }
    }
}

fn hundred_events() -> Written {
    let mut writing = Writing::new();
    writing.events(100);
    writing.close()
}

fn verify_all(dir: &SpoolDir) -> Vec<SegmentReport> {
    dir.segments().unwrap().into_iter().filter_map(|segment| dir.verify(segment, |_| {}).unwrap()).collect()
}

fn numbers(ranges: &[Range<u64>]) -> Vec<u64> {
    ranges.iter().cloned().flatten().collect()
}

#[test]
fn the_overview_counts_exactly() {
    let mut writing = Writing::new();
    writing.events(100);
    writing.log.end(0, 1..101, &"delivered".into());
    writing.log.end(1, 1..3, &"delivered".into());
    writing.log.end(1, 5..7, &"dead_lettered/invalid".into());
    let written = writing.close();
    let overview = written.dir().overview().unwrap();
    assert!(!overview.in_use);
    assert_eq!(overview.next_seq, 101);
    let segments: Vec<Segment> = overview.segments.iter().map(|info| info.segment).collect();
    assert!(segments.len() > 1);
    assert_eq!((segments[0].first_seq, segments.last().unwrap().end_seq), (1, 101));
    assert!(segments.windows(2).all(|pair| pair[0].end_seq == pair[1].first_seq));
    assert!(segments.last().unwrap().used < segments.last().unwrap().allocated);
    let [mixpanel, segment] = &overview.cursors[..] else { panic!("two cursors") };
    assert_eq!(mixpanel.cursor.as_ref().unwrap().pending(101), 0);
    assert_eq!((mixpanel.pending_bytes, mixpanel.oldest_accepted_ms), (0, None));
    assert_eq!(segment.cursor.as_ref().unwrap().pending(101), 96);
    assert_eq!(segment.oldest_accepted_ms, Some(3000));
    assert!(segment.pending_bytes > 4096);
}

#[test]
fn an_oldest_event_that_is_damaged_gives_way_to_the_next() {
    let written = hundred_events();
    written.damage(1);
    let overview = written.dir().overview().unwrap();
    assert_eq!(overview.cursors[0].oldest_accepted_ms, Some(2000));
}

#[test]
fn a_lock_that_is_held_is_seen_and_not_kept() {
    let written = hundred_events();
    assert!(!written.dir().is_in_use().unwrap(), "there is no file yet");
    let lock = SpoolLock::acquire(written.root.path()).unwrap();
    assert!(written.dir().is_in_use().unwrap());
    drop(lock);
    assert!(!written.dir().is_in_use().unwrap());
    SpoolLock::acquire(written.root.path()).unwrap();
}

#[test]
fn damage_is_found_to_the_byte_and_the_event_in_it_is_missing() {
    let written = hundred_events();
    assert!(verify_all(&written.dir()).iter().all(SegmentReport::is_clean));
    written.damage(3);
    let reports = verify_all(&written.dir());
    assert_eq!(numbers(&reports[0].missing), [3]);
    let [range] = &reports[0].damaged[..] else { panic!("one range: {:?}", reports[0]) };
    let frame_bytes = 32 + 4 + r#"{"id":"id-3"}"#.len() as u64;
    assert_eq!(range.clone(), 32 + 2 * frame_bytes..32 + 3 * frame_bytes);
    assert!(reports[1..].iter().all(SegmentReport::is_clean));
    let events: u64 = reports.iter().map(|report| report.events).sum();
    assert_eq!((events, reports.last().unwrap().end_seq), (99, 101));
}

#[test]
fn the_last_event_of_an_old_segment_is_missed_too() {
    let written = hundred_events();
    let last = written.dir().segments().unwrap()[0].end_seq - 1;
    written.damage(last);
    assert_eq!(numbers(&verify_all(&written.dir())[0].missing), [last]);
}

#[test]
fn a_torn_end_is_told_from_one_that_is_being_written() {
    let written = hundred_events();
    let newest = written.segments().pop().unwrap();
    let used = written.dir().overview().unwrap().segments.pop().unwrap().segment.used;
    // The beginning of a frame.
    let at = usize::try_from(used).unwrap();
    written.change(&newest, |bytes| bytes.copy_within(32..72, at));
    let report = verify_all(&written.dir()).pop().unwrap();
    assert_eq!(report.torn.map(|range| range.start), Some(used));
    assert!(report.damaged.is_empty() && report.missing.is_empty());
    let _lock = SpoolLock::acquire(written.root.path()).unwrap();
    assert!(verify_all(&written.dir()).pop().unwrap().is_clean());
}

#[test]
fn a_damaged_header_or_slot_is_told_and_the_rest_is_read() {
    let written = hundred_events();
    written.change(&written.segments()[0], |bytes| bytes[20] ^= 1);
    let report = verify_all(&written.dir()).remove(0);
    assert_eq!(report.start, SegmentStart::Damaged);
    assert_eq!(numbers(&report.damaged), (0..32).collect::<Vec<_>>());
    assert!(report.events > 1 && report.missing.is_empty());

    let cursor = written.root.path().join("cursors/segment.cursor");
    written.change(&cursor, |bytes| bytes[40] ^= 1);
    let cursors = written.dir().cursors().unwrap();
    assert!(!cursors[0].is_damaged() && cursors[1].is_damaged());
    assert_eq!(cursors[1].slots[0], Slot::Damaged);
}

#[test]
fn what_a_newer_relay_wrote_is_refused() {
    let written = hundred_events();
    written.change(&written.segments()[1], |bytes| {
        bytes[8] = 9;
        let crc = crc_without(&bytes[..32], 12..16);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    });
    let dir = written.dir();
    let is_newer = |error: SpoolError| matches!(error, SpoolError::Newer { version: 9, .. });
    assert!(is_newer(dir.trace("id-1").unwrap_err()));
    assert!(is_newer(dir.events(0, |_| Ok::<_, SpoolError>(true)).unwrap_err()));
    assert!(is_newer(dir.repair(LIMITS).unwrap_err()));
    let report = verify_all(&dir).remove(1);
    assert!(matches!(report.start, SegmentStart::Newer(9)) && !report.is_clean());
}

#[test]
fn events_are_read_from_a_number_on_past_damage() {
    let written = hundred_events();
    written.damage(98);
    let read = |since: u64, most: usize| {
        let mut seqs = Vec::new();
        let passed_over = written.dir().events(since, |frame| {
            seqs.push(frame.seq);
            Ok::<_, SpoolError>(seqs.len() < most)
        });
        (seqs, passed_over.unwrap().damaged_ranges)
    };
    assert_eq!(read(96, 9), (vec![96, 97, 99, 100], 1));
    assert_eq!(read(0, 2), (vec![1, 2], 0));
    assert_eq!(read(0, 1000).0.len(), 99);
    assert!(read(101, 9).0.is_empty());
}

#[test]
fn an_event_is_traced_with_each_of_its_acceptances_and_attempts() {
    let mut writing = Writing::new();
    writing.events(10);
    let first = writing.event("asked \"twice\"");
    writing.attempt("unavailable", &[(1, 5), (first, first + 1)]);
    writing.events(100);
    let second = writing.event("asked \"twice\"");
    writing.attempt("delivered", &[(5, second)]);
    writing.events(100);
    writing.attempt("resend", &[(second, second + 1)]);
    let written = writing.close();
    assert!(written.segments().len() > 2);
    let segments = written.dir().segments().unwrap();
    for threads in [1, 2, 9] {
        let found = trace::trace(&written.dir(), &segments, "asked \"twice\"", threads).unwrap();
        let told: Vec<_> = found
            .iter()
            .map(|accepted| {
                let verdicts: Vec<_> =
                    accepted.attempts.iter().map(|noted| noted.attempt.verdict.as_str()).collect();
                (accepted.seq, accepted.durability, verdicts)
            })
            .collect();
        let level = Some(Durability::Synced);
        let wanted = [(first, level, vec!["unavailable", "delivered"]), (second, level, vec!["resend"])];
        assert_eq!(told, wanted, "{threads} threads");
        assert_eq!(found[0].accepted_ms, i64::try_from(first).unwrap() * 1000);
        assert_eq!(found[0].segment, segments[0].name());
    }
    assert_eq!(written.dir().trace("id-999").unwrap(), []);
    assert_eq!(written.dir().trace("asked").unwrap(), []);
}

/// Where frames begin, and where the last one ends.
fn borders(segment: &[u8]) -> Vec<usize> {
    let mut borders = Vec::new();
    while let Some(mark) = find_mark(segment, borders.last().map_or(0, |at| at + 1)) {
        borders.push(mark);
    }
    borders.extend(last_not_zero(segment).map(|last| last + 1));
    borders
}

/// Lets the first of some frames say that it is as long as all of them.
fn stretch(frames: &mut [u8]) {
    let payload_bytes = frames.len() - FRAME_HEADER_BYTES - usize::from(frames[7]);
    frames[8..12].copy_from_slice(&u32::try_from(payload_bytes).unwrap().to_le_bytes());
}

#[test]
fn a_length_that_reaches_past_an_attempt_does_not_hide_it() {
    let mut writing = Writing::new();
    writing.event("one");
    writing.event("two");
    writing.attempt("delivered", &[(1, 2)]);
    writing.event("three");
    writing.attempt("delivered", &[(1, 2)]);
    writing.attempt("delivered", &[(1, 2)]);
    let written = writing.close();
    let path = &written.segments()[0];
    let intact = fs::read(path).unwrap();
    let borders = borders(&intact);
    // Event two up to event three, and the second attempt up to the end.
    for (from, until, attempts_left) in [(1, 3, 3), (4, 6, 2)] {
        written.change(path, |bytes| stretch(&mut bytes[borders[from]..borders[until]]));
        let traced = written.dir().trace("one").unwrap();
        assert_eq!(traced[0].attempts.len(), attempts_left, "frame {from} reaches up to {until}");
        fs::write(path, &intact).unwrap();
    }
}

/// The numbers that a reader of every byte finds for an id, and the attempts
/// for each.
fn read_all(dir: &SpoolDir, id: &str) -> BTreeMap<u64, usize> {
    let mut found = BTreeMap::new();
    for segment in dir.segments().unwrap() {
        let file = dir.open_segment(segment).unwrap().unwrap();
        dir.read(segment, SEGMENT_HEADER_BYTES as u64, &*file, |step| {
            let Step::Frame { frame, .. } = step else { return Ok(true) };
            if frame.kind == Kind::Event && frame.id == id.as_bytes() && frame.seq < segment.end_seq {
                found.insert(frame.seq, 0);
            }
            if frame.kind == Kind::Attempt {
                let attempt: Attempt = serde_json::from_slice(frame.payload).unwrap();
                for (first, end) in attempt.events {
                    found.range_mut(first..end).for_each(|(_, attempts)| *attempts += 1);
                }
            }
            Ok::<_, SpoolError>(true)
        })
        .unwrap();
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Hopping over frames finds what reading every byte finds, whatever is
    /// damaged: lengths, numbers and markers too.
    #[test]
    fn damage_anywhere_hides_nothing_else(
        steps in prop::collection::vec((0_u8..4, 0_u64..5), 20..300),
        lies in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 2_usize..6), 0..4),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1_u8..=255), 0..12),
    ) {
        // Few segments: each costs syncs.
        let mut writing = Writing::with(8192);
        for (kind, number) in steps {
            let next = writing.log.next_seq();
            match kind {
                0 => writing.attempt("delivered", &[(next.saturating_sub(number), next)]),
                // Of different lengths.
                _ => { writing.event(&"x".repeat(usize::try_from(number).unwrap() + 1)); }
            }
        }
        let written = writing.close();
        let paths = written.segments();
        for (path, frame, frames) in lies {
            let path = path.get(&paths);
            written.change(path, |bytes| {
                let borders = borders(bytes);
                let Some(last) = borders.len().checked_sub(2) else { return };
                let first = frame.index(last + 1);
                stretch(&mut bytes[borders[first]..borders[(first + frames).min(last + 1)]]);
            });
        }
        for (path, place, bits) in flips {
            let path = path.get(&paths);
            // Where frames are: the newest segment is mostly zeros.
            written.change(path, |bytes| {
                let used = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0) + 1;
                let place = place.index(used);
                // Another header's version would be a newer relay's.
                if place >= 32 { bytes[place] ^= bits; }
            });
        }
        let dir = written.dir();
        let segments = dir.segments().unwrap();
        for length in 1..=5 {
            let id = "x".repeat(length);
            for threads in [1, 3] {
                let traced = trace::trace(&dir, &segments, &id, threads).unwrap();
                let traced: BTreeMap<_, _> =
                    traced.into_iter().map(|accepted| (accepted.seq, accepted.attempts.len())).collect();
                prop_assert_eq!(traced, read_all(&dir, &id));
            }
        }
    }

    #[test]
    fn no_bytes_are_too_strange(
        segment in prop::collection::vec(any::<u8>(), 0..600),
        cursor in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let written = hundred_events();
        let old = &written.segments()[0];
        fs::write(old, segment).unwrap();
        fs::write(written.root.path().join("cursors/strange.cursor"), cursor).unwrap();
        let dir = written.dir();
        dir.overview().unwrap();
        dir.trace("id-99").unwrap();
        dir.events(0, |_| Ok::<_, SpoolError>(true)).unwrap();
        prop_assert!(!verify_all(&dir)[0].missing.is_empty());
        prop_assert!(dir.cursors().unwrap().iter().any(CursorSlots::is_damaged));
        dir.repair(LIMITS).unwrap();
    }
}

#[test]
fn repair_keeps_what_is_damaged_once_and_removes_nothing() {
    let mut writing = Writing::new();
    writing.events(100);
    // Nobody needs any of it, and yet.
    writing.log.end(0, 1..101, &"delivered".into());
    writing.log.end(1, 1..101, &"delivered".into());
    writing.log.write_cursors();
    let written = Written { root: writing.root };
    written.damage(3);
    written.damage(100);
    let cursor = written.root.path().join("cursors/segment.cursor");
    written.change(&cursor, |bytes| bytes[40] ^= 1);
    let segments = written.segments();
    let first = fs::read(&segments[0]).unwrap();

    let repair = written.dir().repair(LIMITS).unwrap();
    assert!(repair.recovery.unwrap().torn_bytes > 0, "the last event is torn");
    assert_eq!(repair.cursors, [("segment".to_owned(), true)]);
    let kept: Vec<_> = repair.kept.iter().map(|kept| (kept.segment.clone(), kept.new)).collect();
    assert_eq!(kept, [(segments[0].file_name().unwrap().to_str().unwrap().to_owned(), true)]);
    assert_eq!(written.segments(), segments);
    assert_eq!(fs::read(&segments[0]).unwrap(), first);
    let quarantine = written.quarantine();
    assert_eq!(quarantine.len(), 3, "event, torn end, cursor: {quarantine:?}");
    let damaged = fs::read(written.root.path().join("quarantine").join(&quarantine[0])).unwrap();
    let at = usize::try_from(repair.kept[0].at).unwrap();
    assert_eq!(damaged, first[at..at + damaged.len()]);
    assert!(verify_all(&written.dir()).last().unwrap().is_clean());
    assert!(!written.dir().cursors().unwrap()[1].is_damaged());

    let again = written.dir().repair(LIMITS).unwrap();
    assert_eq!(again.recovery.unwrap(), Recovery::default());
    assert!(again.cursors.is_empty() && !again.kept[0].new);
    assert_eq!(written.quarantine(), quarantine);
    assert_eq!(written.segments(), segments);
}

#[test]
fn beside_a_relay_repair_leaves_the_newest_segment_and_the_cursors_alone() {
    let written = hundred_events();
    written.damage(3);
    let newest = written.dir().segments().unwrap().last().unwrap().first_seq;
    written.damage(newest);
    let cursor = written.root.path().join("cursors/segment.cursor");
    written.change(&cursor, |bytes| bytes[40] ^= 1);
    let _lock = SpoolLock::acquire(written.root.path()).unwrap();
    let all = || {
        let paths = written.segments().into_iter().chain([cursor.clone()]);
        paths.map(|path| fs::read(path).unwrap()).collect::<Vec<_>>()
    };
    let before = all();
    let repair = written.dir().repair(LIMITS).unwrap();
    assert!(repair.recovery.is_none() && repair.cursors.is_empty());
    assert_eq!(repair.kept.len(), 1);
    assert!(repair.kept[0].new);
    let name = format!("{}-{}-{}-", repair.kept[0].segment, repair.kept[0].at, repair.kept[0].bytes);
    assert!(written.quarantine().iter().all(|kept| kept.starts_with(&name)), "{:?}", written.quarantine());
    assert_eq!(written.quarantine().len(), 1);
    assert_eq!(all(), before);
}
