//! A log that dies, is damaged, and is opened again.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use analytics_relay_providers::fuzzing::Input;
use fastrand::Rng;

use super::{NOW_MS, memory::Memory};
use crate::queue::{
    Durability,
    spool::{
        SpoolError,
        cursor::SLOT_BYTES,
        frame::{Frame, Kind, SEGMENT_HEADER_BYTES},
        fs::SpoolFs,
        index::Segment,
        layout::LogDirs,
        log::{AppendError, Log, LogLimits, Recovery},
        quarantine::DamagedRange,
        reader::LogReader,
        scan::{Item, Scanner},
        sim::{Fault, SimFs},
    },
};

/// A small log that is used, crashes, and is damaged. It can always be opened
/// again; nothing is read that was not written; what was promised and not
/// touched by the damage is there.
pub fn recovery(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut spool = Spool::new(&mut input);
    while !input.is_empty() {
        spool.step(&mut input);
    }
    spool.reopen(Death::Process);
}

const PROVIDERS: [&str; 2] = ["a", "b"];
/// Most steps of a reader before it counts as stuck.
const READS_MAX: usize = 10_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Death {
    Process,
    Machine,
}

struct Spool {
    fs: SimFs,
    dirs: LogDirs,
    limits: LogLimits,
    rng: Rng,
    log: Log,
    /// Ids count up, so that each is there once.
    ids: u64,
    /// All that can be at a number.
    tried: BTreeMap<u64, BTreeSet<String>>,
    /// Refused for want of room: never to be read.
    refused: BTreeSet<String>,
    /// What must be read until all providers are done with it, and whether it
    /// survives the machine.
    promised: BTreeMap<u64, (String, bool)>,
    /// What each provider was done with at some time.
    ended: [BTreeSet<(u64, String)>; 2],
}

impl Spool {
    fn new(input: &mut Input<'_>) -> Self {
        let fs = SimFs::new(u64::from(input.byte()));
        let dirs = LogDirs::new(Path::new("/spool"));
        let limits = LogLimits {
            segment_bytes: [300, 1024, 4096][input.below(3)],
            bytes_max: [2048, 8192, 1 << 20][input.below(3)],
        };
        let rng = Rng::with_seed(u64::from(input.byte()));
        let (log, _) = open(&fs, &dirs, limits).expect("an empty disk takes a log");
        let (tried, refused, promised) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        Self { fs, dirs, limits, rng, log, ids: 0, tried, refused, promised, ended: Default::default() }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(16) {
            0..5 => self.append(input),
            5 | 6 => self.end(input),
            7 => self.log.write_cursors(),
            8 => {
                self.log.sync();
                self.log.sync_cursors();
            }
            9 => {
                let fault = Fault::ALL[input.below(Fault::ALL.len())];
                self.fs.fail_after(u64::from(input.byte() % 64), fault);
            }
            10 => self.fs.set_room(input.flag().then(|| 4 * SLOT_BYTES as u64 + 16 * u64::from(input.u16()))),
            11 => self.reopen(Death::Process),
            12 => self.reopen(Death::Machine),
            13 => self.reopen_with_fault(input),
            _ => self.damage(input),
        }
    }

    fn append(&mut self, input: &mut Input<'_>) {
        let events = input.below(5) as u64;
        let (sync, padding) = (input.flag(), "x".repeat(input.below(256)));
        let first = self.log.next_seq();
        let mut group = Vec::new();
        let mut added = Vec::new();
        for seq in first..first + events {
            self.ids += 1;
            let id = format!("id-{}", self.ids);
            let payload = format!(
                r#"{{"id":"{id}","kind":"identify","time_ms":1,"accepted_ms":1,"properties":{{"x":"{padding}"}}}}"#
            );
            let frame = Frame {
                kind: Kind::Event,
                durability: Some(if sync { Durability::Synced } else { Durability::Written }),
                seq,
                time_ms: 1,
                id: id.as_bytes(),
                payload: payload.as_bytes(),
            };
            frame.encode(&mut group);
            self.tried.entry(seq).or_default().insert(id.clone());
            added.push((seq, id));
        }
        if events == 0 || input.flag() {
            let (seq, payload) = (first + events, br#"{"provider":"a"}"#);
            let kind = Kind::Attempt;
            Frame { kind, durability: None, seq, time_ms: 1, id: &[], payload }.encode(&mut group);
        }
        match self.log.append(&group, events, sync, NOW_MS) {
            Ok(()) => {
                assert_eq!(self.log.next_seq(), first + events);
                self.promised.extend(added.into_iter().map(|(seq, id)| (seq, (id, sync))));
            }
            Err(AppendError::Full) => self.refused.extend(added.into_iter().map(|(_, id)| id)),
            Err(AppendError::Failed) => {}
        }
    }

    /// A provider is done with some events that are in the log.
    fn end(&mut self, input: &mut Input<'_>) {
        let provider = input.below(2);
        let (oldest, next) = (self.log.index().oldest_seq(), self.log.next_seq());
        let start = (oldest + u64::from(input.byte())).min(next);
        let range = start..(start + u64::from(input.byte() % 16)).min(next);
        for (seq, (id, _)) in self.promised.range(range.clone()) {
            self.ended[provider].insert((*seq, id.clone()));
        }
        self.log.end(provider, range, &"delivered".into());
    }

    fn die(&mut self, death: Death) {
        match death {
            Death::Process => self.fs.crash_process(),
            Death::Machine => {
                self.fs.crash_machine(&mut self.rng);
                self.promised.retain(|_, (_, synced)| *synced);
            }
        }
        self.fs.heal();
        self.fs.set_room(None);
    }

    fn reopen(&mut self, death: Death) {
        self.die(death);
        self.open();
    }

    /// Recovery itself is cut short.
    fn reopen_with_fault(&mut self, input: &mut Input<'_>) {
        let death = if input.flag() { Death::Process } else { Death::Machine };
        self.die(death);
        let fault = Fault::ALL[input.below(Fault::ALL.len())];
        self.fs.fail_after(u64::from(input.byte() % 96), fault);
        // It may succeed all the same.
        let _ = open(&self.fs, &self.dirs, self.limits);
        self.reopen(death);
    }

    fn open(&mut self) {
        let (log, _) = open(&self.fs, &self.dirs, self.limits).expect("whatever is damaged, it opens");
        self.log = log;
        let found = (self.extent(), self.check());
        // Once more: there is nothing left to repair.
        self.fs.crash_process();
        let (log, recovery) = open(&self.fs, &self.dirs, self.limits).expect("it opened before");
        assert_eq!(recovery, Recovery::default());
        self.log = log;
        let (events, _) = self.read(found.0.start, usize::MAX, u64::MAX);
        assert_eq!((self.extent(), events), found);
    }

    /// The numbers that the log holds.
    fn extent(&self) -> Range<u64> {
        self.log.index().oldest_seq()..self.log.next_seq()
    }

    /// Reads everything in two ways and compares it with what was promised.
    /// Returns the events.
    fn check(&mut self) -> Vec<(u64, String)> {
        let Range { start: oldest, end: next } = self.extent();
        let all = self.read(oldest, usize::MAX, u64::MAX);
        if self.rng.bool() {
            let (events_max, bytes_max) = (1 + self.rng.usize(..3), 1 + self.rng.u64(..600));
            let (events, damaged) = self.read(oldest, events_max, bytes_max);
            // Behind the last event nothing is looked for.
            assert!(events == all.0 && damaged.is_subset(&all.1), "{events:?} {damaged:?}, not {all:?}");
        } else {
            let middle = self.rng.u64(oldest..=next);
            let (events, _) = self.read(middle, usize::MAX, u64::MAX);
            let expected = all.0.iter().filter(|(seq, _)| *seq >= middle);
            assert!(events.iter().eq(expected), "{events:?} from {middle} on, not {all:?}");
        }

        let (events, damaged) = all;
        for range in &damaged {
            self.log.quarantine(range.0, range.1, range.2);
            assert!(!self.log.quarantine(range.0, range.1, range.2), "damage counts once");
        }
        for (seq, id) in &events {
            assert!(self.tried.get(seq).is_some_and(|ids| ids.contains(id)), "{id} was never number {seq}");
            assert!(!self.refused.contains(id), "{id} was refused");
        }
        let read: BTreeMap<u64, &String> = events.iter().map(|(seq, id)| (*seq, id)).collect();
        for (seq, (id, _)) in &self.promised {
            let mut needed = false;
            for (place, file) in self.log.cursors().iter().take(PROVIDERS.len()).enumerate() {
                let ended = file.cursor.has_ended(*seq);
                let was_ended = self.ended[place].contains(&(*seq, id.clone()));
                assert!(!ended || was_ended, "{id}, number {seq}, never ended at {}", file.provider);
                needed |= !ended;
            }
            assert!(!needed || read.get(seq) == Some(&id), "{id}, number {seq}, is lost");
            assert!(*seq < next, "number {seq} will be given again");
        }
        for file in self.log.cursors() {
            assert!(file.cursor.end_seq() <= next);
        }
        events
    }

    /// All events from a number on, and the damage that was met.
    fn read(
        &self,
        from: u64,
        events_max: usize,
        bytes_max: u64,
    ) -> (Vec<(u64, String)>, BTreeSet<(u64, u64, u64)>) {
        let next = self.log.next_seq();
        let fs: Arc<dyn SpoolFs> = Arc::new(self.fs.clone());
        let mut reader = LogReader::new(fs, self.dirs.clone(), self.log.index().clone());
        let (mut events, mut damaged) = (Vec::new(), BTreeSet::new());
        let mut at = from;
        for reads in 0.. {
            assert!(reads < READS_MAX, "a reader is stuck at {at} of {next}");
            let chunk = reader.read(at, events_max, bytes_max).expect("the disk is well");
            let seqs = chunk.events.iter().map(|logged| logged.seq..logged.seq + 1);
            let mut ranges: Vec<Range<u64>> = seqs.chain(chunk.missing).collect();
            ranges.sort_by_key(|range| range.start);
            for range in ranges {
                assert_eq!(range.start, at, "each number is read or missing");
                assert!(range.end > range.start);
                at = range.end;
            }
            assert_eq!(chunk.next_seq, at);
            assert!(chunk.events.len() <= events_max);
            events.extend(
                chunk.events.into_iter().map(|logged| (logged.seq, logged.event.id().as_str().to_owned())),
            );
            let range = |DamagedRange { segment, at, bytes }| (segment, at, bytes);
            damaged.extend(chunk.damaged.into_iter().map(range));
            if at >= next {
                break;
            }
        }
        (events, damaged)
    }

    /// The process or the machine dies, and then a file is damaged.
    fn damage(&mut self, input: &mut Input<'_>) {
        let death = if input.flag() { Death::Process } else { Death::Machine };
        self.die(death);
        self.fs.settle();
        let segments = self.fs.files(&self.dirs.segments);
        let mut files = segments.clone();
        files.extend(self.fs.files(&self.dirs.cursors));
        files.extend(self.fs.files(&self.dirs.quarantine));
        let Some(path) = files.get(input.below(files.len().clamp(1, 256))).cloned() else {
            return self.open();
        };
        let before = self.fs.bytes(&path);
        let mut after = before.clone();
        let at = usize::from(input.u16()) % (before.len() + 1);
        let touched = match input.below(8) {
            0 if at < after.len() => {
                after[at] ^= 1 << input.below(8);
                at..at + 1
            }
            1 | 2 => {
                let end = (at + usize::from(input.byte())).min(after.len());
                let (byte, random) = (input.byte(), input.flag());
                after[at..end].fill_with(|| if random { self.rng.u8(..) } else { byte });
                at..end
            }
            3 => {
                after.truncate(at);
                at..usize::MAX
            }
            4 => {
                let bytes = input.below(256);
                after.extend_from_slice(input.take(bytes));
                before.len()..after.len()
            }
            5 => {
                // A write that went astray.
                let other = files.get(input.below(files.len().min(256))).expect("one is there").clone();
                let other = self.fs.bytes(&other);
                let from = usize::from(input.u16()) % (other.len() + 1);
                let bytes = (other.len() - from).min(after.len() - at).min(usize::from(input.u16()));
                after[at..at + bytes].copy_from_slice(&other[from..from + bytes]);
                // Whole frames in the wrong place hide those that are right.
                0..usize::MAX
            }
            6 => {
                self.fs.delete(&path);
                self.forget(&path, &before, 0..usize::MAX);
                return self.open();
            }
            _ => {
                self.add_foreign_file(input);
                return self.open();
            }
        };
        self.forget(&path, &before, touched);
        self.fs.set_bytes(&path, &after);
        self.open();
    }

    /// Promises nothing more of the frames in a range of a file.
    fn forget(&mut self, path: &Path, content: &[u8], range: Range<usize>) {
        if path.parent() != Some(&self.dirs.segments) {
            return;
        }
        let file = Memory { content, step: usize::MAX };
        let start = content.len().min(SEGMENT_HEADER_BYTES) as u64;
        let mut scanner = Scanner::new(&file, start, content.len() as u64);
        while let item @ (Item::Frame { .. } | Item::Damage { .. }) =
            scanner.next().expect("memory does not fail")
        {
            let Item::Frame { at, frame } = item else { continue };
            let at = usize::try_from(at).expect("it is in memory");
            if at < range.end && range.start < at + frame.len() {
                let id = |(id, _): &(String, bool)| id.as_bytes() == frame.id;
                if self.promised.get(&frame.seq).is_some_and(id) {
                    self.promised.remove(&frame.seq);
                }
            }
        }
    }

    /// A file that no relay made, or one that came from somewhere else.
    fn add_foreign_file(&mut self, input: &mut Input<'_>) {
        let dir = [&self.dirs.segments, &self.dirs.cursors, &self.dirs.quarantine][input.below(3)].clone();
        let first_seq = self.log.next_seq() + u64::from(input.byte());
        let segment = Segment { first_seq, end_seq: 0, used: 0, allocated: 0 };
        let name = match input.below(8) {
            0 | 1 => segment.name(),
            2 => "x.log".to_owned(),
            3 => format!("{}.unfinished", segment.name()),
            4 => "c.cursor".to_owned(),
            5 => ".cursor".to_owned(),
            6 => "99999999999999999999.log".to_owned(),
            _ => "note.bin".to_owned(),
        };
        let path: PathBuf = dir.join(name);
        if !self.fs.files(&dir).contains(&path) {
            let bytes = input.below(256);
            self.fs.set_bytes(&path, input.take(bytes));
        }
    }
}

fn open(fs: &SimFs, dirs: &LogDirs, limits: LogLimits) -> Result<(Log, Recovery), SpoolError> {
    fs.create_dir(&dirs.root).map_err(|source| SpoolError::File { path: "/spool".to_owned(), source })?;
    Log::open(Arc::new(fs.clone()), dirs, limits, &PROVIDERS, NOW_MS)
}
