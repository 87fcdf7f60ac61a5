//! A log on a disk in memory, and a model of what must be in it: for the tests
//! beside it, and for what fuzzing does to a log.

#![allow(clippy::unwrap_used, reason = "a log that is not as it must be fails its test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    io, mem,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use analytics_relay_providers::{Event, EventId, EventKind, EventParts, Properties};
use fastrand::Rng;

use super::{
    SpoolError,
    cursor::{CursorFile, EndedAs},
    frame::{Frame, Kind, SEALED_HEADER_BYTES},
    fs::SpoolFs,
    head::Head,
    index::Segment,
    layout::{LogDirs, UNFINISHED},
    log::{AppendError, Log, LogKeys, LogLimits, Recovery},
    reader::{Chunk, LogReader},
    scan::{Item, Scanner},
    sim::SimFs,
};
use crate::{queue::Durability, sealing::test_keys};

pub(crate) const PROVIDERS: [&str; 2] = ["mixpanel", "segment"];
pub(crate) const OUTCOMES: [&str; 3] = ["delivered", "dead_lettered/invalid", "dropped/retries_exhausted"];
/// Room for four events or so.
pub(crate) const SMALL: LogLimits = LogLimits { segment_bytes: 512, bytes_max: 16 * 512 };

/// Most steps of a reader before it counts as stuck.
const READS_MAX: usize = 10_000;

/// Numbers of events, or their serials.
pub(crate) type Set = BTreeSet<u64>;

/// A log, its disk, and what its user was told.
pub(crate) struct Rig {
    pub(crate) fs: SimFs,
    limits: LogLimits,
    /// The next time it is opened.
    pub(crate) keys: LogKeys,
    /// Keys, of which some are taken each time.
    pub(crate) switches: Option<&'static [&'static str]>,
    log: Option<Log>,
    /// One for each provider, and where it goes on.
    readers: Vec<(LogReader, u64)>,
    pub(crate) model: Model,
    /// The machine has died since the log was open.
    machine_died: bool,
    /// What was damaged since the log was open: events, by their numbers, and cursors.
    touched: Set,
    cursors_touched: bool,
}

/// What must be true of a log.
#[derive(Clone, Default)]
pub(crate) struct Model {
    next_serial: u64,
    /// What was appended and may not be gone, by its number.
    pub(crate) events: BTreeMap<u64, Told>,
    /// What the log was told to have ended, for each provider: at all, and so
    /// that it survives the process, and the machine.
    pub(crate) ended: [Set; 2],
    written: [Set; 2],
    synced: [Set; 2],
    /// The serials of all that ever ended at each: an old cursor can come back.
    ended_once: [Set; 2],
    /// Serials that were refused because there was no room: nobody may ever
    /// read them.
    refused: Set,
    /// Numbers of what may be in the log or not, by serial.
    unsure: BTreeMap<u64, u64>,
    pub(crate) tally: Tally,
}

/// An event that the log has taken.
#[derive(Clone, Copy)]
pub(crate) struct Told {
    /// Tells it from every other event, whatever its number. Its upper half is how many
    /// bytes fill it up.
    serial: u64,
    /// It survives the machine.
    synced: bool,
}

/// What happened to a log.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    pub(crate) appended: u64,
    pub(crate) full: u64,
    pub(crate) failed: u64,
    pub(crate) recoveries: u64,
    pub(crate) torn_tails: u64,
    pub(crate) quarantined: u64,
    pub(crate) removed_segments: u64,
    /// Events that a machine lost, which nobody was promised.
    pub(crate) lost_unsynced: u64,
    pub(crate) lost_to_damage: u64,
    /// Events of failed groups that were found after all.
    pub(crate) found: u64,
    /// Ends that a crash made the log forget.
    pub(crate) forgotten_ends: u64,
    pub(crate) read_errors: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.appended += other.appended;
        self.full += other.full;
        self.failed += other.failed;
        self.recoveries += other.recoveries;
        self.torn_tails += other.torn_tails;
        self.quarantined += other.quarantined;
        self.removed_segments += other.removed_segments;
        self.lost_unsynced += other.lost_unsynced;
        self.lost_to_damage += other.lost_to_damage;
        self.found += other.found;
        self.forgotten_ends += other.forgotten_ends;
        self.read_errors += other.read_errors;
    }
}

/// All that one look at a log finds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Serials by number.
    pub(crate) events: BTreeMap<u64, u64>,
    pub(crate) missing: Set,
    /// Segment, place and bytes.
    pub(crate) damaged: BTreeSet<(u64, u64, u64)>,
}

pub(crate) fn dirs() -> LogDirs {
    LogDirs::new(Path::new("/spool"))
}

pub(crate) fn cursor_path(provider: &str) -> PathBuf {
    CursorFile::path(&dirs().cursors, provider)
}

fn event(serial: u64) -> Event {
    let filler = "x".repeat((serial >> 32) as usize);
    Event::pack(&EventParts {
        id: EventId::new(format!("e{serial}")).unwrap(),
        kind: EventKind::Identify,
        user_id: Some(&*filler).filter(|filler| !filler.is_empty()),
        anonymous_id: None,
        time_ms: 1,
        accepted_ms: 2,
        ip: None,
        user_agent: None,
        properties: Properties::empty(),
        more: None,
    })
}

pub(crate) fn serial(id: &[u8]) -> u64 {
    str::from_utf8(&id[1..]).unwrap().parse().unwrap()
}

/// Keys by their names.
pub(crate) fn sealed(kids: &str) -> LogKeys {
    LogKeys { sealing: test_keys(kids), passes_unreadable: false }
}

/// A complete frame.
fn event_frame(seq: u64, serial: u64) -> Vec<u8> {
    let payload = serde_json::to_vec(&event(serial)).unwrap();
    let id = format!("e{serial}");
    let frame = Frame {
        kind: Kind::Event,
        durability: Some(Durability::Synced),
        seq,
        time_ms: 2,
        id: id.as_bytes(),
        payload: &payload,
        is_sealed: false,
    };
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

fn attempt_frame(seq: u64) -> Vec<u8> {
    let payload = br#"{"provider":"mixpanel","attempt":1,"verdict":"unavailable","events":[[1,2]]}"#;
    let frame =
        Frame { kind: Kind::Attempt, durability: None, seq, time_ms: 3, id: &[], payload, is_sealed: false };
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

impl Rig {
    /// An empty disk.
    pub(crate) fn new(seed: u64, limits: LogLimits) -> Self {
        Self {
            fs: SimFs::new(seed),
            limits,
            keys: LogKeys::default(),
            switches: None,
            log: None,
            readers: Vec::new(),
            model: Model { next_serial: 1, ..Model::default() },
            machine_died: false,
            touched: Set::new(),
            cursors_touched: false,
        }
    }

    /// The same with another way to keep what is written, from the next opening on. Where
    /// that is sealed there is room for as many events in a segment.
    pub(crate) fn keeping(mut self, keys: LogKeys) -> Self {
        if keys.sealing.keyring().is_some() {
            let segments = self.limits.bytes_max / self.limits.segment_bytes;
            self.limits.segment_bytes += SEALED_HEADER_BYTES as u64 + 4 * 27;
            self.limits.bytes_max = segments * self.limits.segment_bytes;
        }
        self.keys = keys;
        self
    }

    /// An empty log that is sealed.
    pub(crate) fn opened_sealed(seed: u64, limits: LogLimits) -> Self {
        let mut rig = Self::new(seed, limits).keeping(sealed("a"));
        rig.open().unwrap();
        rig
    }

    pub(crate) fn limits(&self) -> LogLimits {
        self.limits
    }

    /// An empty log.
    pub(crate) fn opened(seed: u64, limits: LogLimits) -> Self {
        let mut rig = Self::new(seed, limits);
        rig.open().unwrap();
        rig
    }

    /// The same on a disk that goes its own way; the log is closed there.
    pub(crate) fn fork(&self) -> Self {
        Self {
            fs: self.fs.fork(),
            limits: self.limits,
            keys: self.keys.clone(),
            switches: self.switches,
            log: None,
            readers: Vec::new(),
            model: self.model.clone(),
            machine_died: self.machine_died,
            touched: self.touched.clone(),
            cursors_touched: self.cursors_touched,
        }
    }

    pub(crate) fn log(&mut self) -> &mut Log {
        self.log.as_mut().expect("the log is open")
    }

    pub(crate) fn is_open(&self) -> bool {
        self.log.is_some()
    }

    pub(crate) fn close(&mut self) {
        self.log = None;
        self.readers.clear();
    }

    pub(crate) fn crash_process(&mut self) {
        self.close();
        self.fs.crash_process();
    }

    pub(crate) fn crash_machine(&mut self, rng: &mut Rng) {
        self.close();
        self.fs.crash_machine(rng);
        self.machine_died = true;
    }

    /// To be called before bytes of a file of a closed log are changed: the frames that
    /// they are in may be gone then, and nothing else.
    pub(crate) fn touch(&mut self, path: &Path, range: &Range<usize>) {
        assert!(!self.is_open());
        self.cursors_touched |= path.parent() == Some(&dirs().cursors);
        if path.parent() != Some(&dirs().segments) {
            return;
        }
        let fs = self.fs.clone();
        fs.unharmed(|| {
            let file = fs.open(path).unwrap();
            let end = file.len().unwrap();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap();
            let head = Head::read(&*file, Segment::parse_name(name).unwrap_or_default()).unwrap();
            let loses_its_key = head.blocks.is_some() && (0..2).all(|place| head.loses_block(place, range));
            let mut scanner = Scanner::new(&*file, end.min(head.frames_at()), end);
            loop {
                let (at, frame) = match scanner.next().unwrap() {
                    Item::Frame { at, frame } => (at as usize, frame),
                    Item::Damage { .. } => continue,
                    Item::End { .. } => break,
                };
                let is_hit = at < range.end && range.start < at + frame.len();
                if (is_hit || loses_its_key) && frame.kind == Kind::Event {
                    self.model.doubt(frame.seq, serial(frame.id), &mut self.touched);
                }
            }
        });
    }

    /// Flips a bit of a log that is closed.
    pub(crate) fn flip_bit(&mut self, path: &Path, bit: usize) {
        self.touch(path, &(bit / 8..bit / 8 + 1));
        self.fs.flip_bit(path, bit);
    }

    /// Opens the log and holds it against the model.
    pub(crate) fn open(&mut self) -> Result<Recovery, SpoolError> {
        let recovery = self.open_unheld()?;
        self.model.tally.recoveries += 1;
        self.model.tally.torn_tails += u64::from(recovery.torn_bytes > 0);
        let fs = self.fs.clone();
        fs.unharmed(|| self.hold_recovered());
        Ok(recovery)
    }

    /// Opens the log, whatever may be in it.
    pub(crate) fn open_unheld(&mut self) -> Result<Recovery, SpoolError> {
        let fs = Arc::new(self.fs.clone());
        let (log, recovery) = Log::open(fs.clone(), &dirs(), self.limits, &self.keys, &PROVIDERS, 1)?;
        let reader = |file: &CursorFile| {
            let index = log.index().clone();
            (LogReader::new(fs.clone(), dirs(), index), file.cursor.lowest())
        };
        self.readers = log.cursors().iter().map(reader).collect();
        self.log = Some(log);
        Ok(recovery)
    }

    /// As [`Rig::open`], after a process that was killed or failed to open.
    pub(crate) fn restart(&mut self) -> Recovery {
        self.crash_process();
        self.open().unwrap()
    }

    /// Holds what a recovery has found against what it must find.
    fn hold_recovered(&mut self) {
        let machine_died = mem::take(&mut self.machine_died);
        let reading = self.read_all();
        self.adopt(&reading, machine_died);
        self.hold_cursors(machine_died);
        let next_seq = self.log().next_seq();
        let oldest_seq = self.log().index().oldest_seq();
        let hold_told = |seq| {
            let told_of = reading.missing.contains(&seq) || !(oldest_seq..next_seq).contains(&seq);
            assert!(told_of, "event {seq} is lost and nobody is told");
        };
        for (seq, told) in self.pending_events() {
            if !reading.events.contains_key(&seq) {
                assert!(machine_died && !told.synced, "event {seq} is lost");
                hold_told(seq);
                self.model.events.remove(&seq);
                self.model.tally.lost_unsynced += 1;
            }
        }
        for seq in mem::take(&mut self.touched) {
            if !reading.events.contains_key(&seq) && !self.model.ended_everywhere(seq) {
                hold_told(seq);
                self.model.tally.lost_to_damage += 1;
            }
        }
        if machine_died {
            // So may be events that had ended: should their cursor be damaged one day, it
            // will not be that bit which has cost them.
            self.model.events.retain(|seq, told| told.synced || reading.events.contains_key(seq));
        }
        self.check();
    }

    /// Takes up what a recovery found that nobody was sure of, and what is now safe.
    fn adopt(&mut self, reading: &Reading, machine_died: bool) {
        let newest = self.newest_segment().filter(|(_, path)| machine_died || !self.fs.sync_failed(path));
        let safe_from = newest.map_or(u64::MAX, |(first_seq, _)| first_seq);
        let model = &mut self.model;
        for (seq, serial) in reading.events.iter().map(|(seq, serial)| (*seq, *serial)) {
            assert!(!model.refused.contains(&serial), "event {seq} had been refused");
            let told = model.events.entry(seq).or_insert_with(|| {
                assert_eq!(model.unsure.get(&serial), Some(&seq), "event {seq} was never appended");
                model.tally.found += 1;
                Told { serial, synced: false }
            });
            assert_eq!(serial, told.serial, "another event has number {seq}");
            told.synced |= machine_died || seq >= safe_from;
        }
    }

    /// No end is made up; none is forgotten that must survive.
    fn hold_cursors(&mut self, machine_died: bool) {
        let touched = mem::take(&mut self.cursors_touched);
        for (place, provider) in PROVIDERS.into_iter().enumerate() {
            let sync_failed = self.fs.sync_failed(&cursor_path(provider));
            let now = self.ended(place);
            let Model { events, ended, written, synced, ended_once, tally, .. } = &mut self.model;
            let known = if machine_died { &synced[place] } else { &written[place] };
            for seq in known.iter().filter(|_| !touched) {
                assert!(now.contains(seq), "{provider} forgot that {seq} had ended");
            }
            // Numbers without an event may count as ended.
            for (seq, told) in now.iter().filter_map(|seq| events.get_key_value(seq)) {
                assert!(ended_once[place].contains(&told.serial), "{provider} never ended {seq}");
            }
            tally.forgotten_ends += ended[place].difference(&now).count() as u64;
            // A cursor that was found is synced, unless that says nothing.
            if machine_died || touched || !sync_failed {
                synced[place].clone_from(&now);
            } else {
                synced[place].retain(|seq| now.contains(seq));
            }
            written[place].clone_from(&now);
            ended[place] = now;
        }
    }

    /// Everything that must be there is there, and nothing else is.
    pub(crate) fn check(&mut self) {
        let fs = self.fs.clone();
        let reading = fs.unharmed(|| self.read_all());
        for (seq, told) in self.pending_events() {
            assert_eq!(reading.events.get(&seq), Some(&told.serial), "event {seq}");
        }
        for (seq, serial) in &reading.events {
            let told = self.model.events.get(seq).map(|told| told.serial);
            assert_eq!(told, Some(*serial), "event {seq} should not be there");
        }
        let next_seq = self.log().next_seq();
        let known = self.log().cursors().iter().map(|file| file.cursor.end_seq()).max();
        assert!(known <= Some(next_seq), "a number that a cursor knows will be given again");
    }

    /// Recovery after recovery finds nothing more to do.
    pub(crate) fn check_idempotent(&mut self) {
        self.fs.heal();
        self.crash_process();
        self.open().unwrap();
        self.check_found_again(|_| {});
        let files = [dirs().segments, dirs().cursors].map(|dir| self.fs.files(&dir));
        // What a failed sync of an earlier process left is not known.
        if !files.iter().flatten().any(|path| self.fs.sync_failed(path)) {
            // Nothing of what a recovery does may hang in the air.
            self.check_found_again(|rig| rig.crash_machine(&mut Rng::with_seed(7)));
        }
    }

    /// Opened once more there is nothing left to repair, and the same comes out.
    pub(crate) fn check_found_again(&mut self, crash: impl FnOnce(&mut Self)) {
        let found = self.found();
        crash(self);
        assert_eq!(self.restart(), Recovery::default());
        assert_eq!(self.found(), found);
    }

    /// Copies of damaged ranges, all that can be read, and what has ended.
    pub(crate) fn found(&mut self) -> (Vec<PathBuf>, Reading, [Set; 2]) {
        let reading = self.read_all();
        (self.quarantined(), reading, [0, 1].map(|place| self.ended(place)))
    }

    /// Once nothing fails any more, events are taken at once, however the log
    /// was left, and what everybody has passed is removed.
    pub(crate) fn check_takes_again(&mut self) {
        self.fs.heal();
        self.end_everything();
        assert_eq!(self.append(2, true, false), Ok(()));
        assert!(!self.log().is_broken());
        self.check();
        self.end_everything();
        let left = self.fs.files(&dirs().segments);
        assert_eq!(left.len(), 1, "what everybody has passed is removed: {left:?}");
    }

    /// Ends all events at all providers and removes what is done with.
    pub(crate) fn end_everything(&mut self) {
        for place in 0..PROVIDERS.len() {
            self.end(place, 1..u64::MAX, 0);
        }
        // Once for each slot.
        self.sync_cursors();
        self.sync_cursors();
    }

    /// Events that have not ended at some provider.
    fn pending_events(&self) -> Vec<(u64, Told)> {
        let pending = self.model.events.iter().filter(|(seq, _)| !self.model.ended_everywhere(**seq));
        pending.map(|(seq, told)| (*seq, *told)).collect()
    }

    /// The first number of the newest segment, and its file. There is none
    /// while the disk has no room for it.
    fn newest_segment(&self) -> Option<(u64, PathBuf)> {
        let files = self.fs.files(&dirs().segments);
        let first_seq = |path: &PathBuf| Segment::parse_name(path.file_name()?.to_str()?);
        let mut segments = files.into_iter().filter_map(|path| Some((first_seq(&path)?, path)));
        segments.next_back()
    }

    /// Copies of damaged ranges, complete ones.
    pub(crate) fn quarantined(&self) -> Vec<PathBuf> {
        let mut files = self.fs.files(&dirs().quarantine);
        files.retain(|path| !path.to_string_lossy().ends_with(UNFINISHED));
        files
    }

    /// Reads the log from its start to its end.
    pub(crate) fn read_all(&mut self) -> Reading {
        let oldest_seq = self.log().index().oldest_seq();
        self.read_from(oldest_seq, 1000, 1 << 20)
    }

    /// Reads the log from a number to its end, as a lane does, and keeps what is damaged.
    pub(crate) fn read_from(&mut self, mut seq: u64, events_max: usize, bytes_max: u64) -> Reading {
        let fs = Arc::new(self.fs.clone());
        let index = self.log().index().clone();
        let lowest = self.log().cursors().iter().map(|file| file.cursor.lowest()).min().unwrap();
        let mut reader = LogReader::new(fs, dirs(), index.clone());
        let mut reading = Reading::default();
        // Where there is no event it may come on in the file only.
        let mut reads = 0;
        while seq < index.next_seq() {
            reads += 1;
            assert!(reads < READS_MAX, "the reader stands still at {seq}");
            let chunk = match reader.read(seq, events_max, bytes_max) {
                Ok(chunk) => chunk,
                // Its removal is not through.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let segment = index.find(seq).unwrap();
                    assert!(segment.end_seq <= lowest, "{segment:?} is gone");
                    seq = segment.end_seq;
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            assert!(chunk.events.len() <= events_max);
            reading.add(&chunk, seq);
            reading.damaged.extend(self.keep(&chunk));
            seq = chunk.next_seq;
        }
        reading
    }

    /// Keeps what a reader found damaged.
    fn keep(&mut self, chunk: &Chunk) -> BTreeSet<(u64, u64, u64)> {
        let mut damaged = BTreeSet::new();
        for range in &chunk.damaged {
            let new = self.log().quarantine(range.segment, range.at, range.bytes);
            self.model.tally.quarantined += u64::from(new);
            damaged.insert((range.segment, range.at, range.bytes));
        }
        damaged
    }

    /// Reads on as one provider.
    pub(crate) fn read(&mut self, place: usize, events_max: usize, bytes_max: u64) {
        let quiet = Quiet::new(&self.fs);
        let lowest = self.log().cursors()[place].cursor.lowest();
        let (reader, seq) = &mut self.readers[place];
        *seq = lowest.max(*seq);
        let Ok(chunk) = reader.read(*seq, events_max, bytes_max) else {
            assert!(!quiet.holds(&self.fs), "reading fails for no reason");
            self.model.tally.read_errors += 1;
            return;
        };
        let mut reading = Reading::default();
        reading.add(&chunk, *seq);
        *seq = chunk.next_seq;
        let ended = &self.model.ended[place];
        for (seq, serial) in &reading.events {
            let told = self.model.events.get(seq).map(|told| told.serial);
            assert_eq!(told, Some(*serial), "event {seq} should not be there");
        }
        for seq in reading.missing.iter().filter(|seq| !ended.contains(seq)) {
            assert!(!self.model.events.contains_key(seq), "event {seq} is said to be missing");
        }
        self.keep(&chunk);
    }

    /// Lets a provider begin again.
    pub(crate) fn rewind(&mut self, place: usize) {
        self.readers[place].1 = self.log.as_ref().unwrap().cursors()[place].cursor.lowest();
    }

    /// Appends a group of new events, perhaps with an attempt behind them.
    pub(crate) fn append(&mut self, count: u64, sync: bool, attempt: bool) -> Result<(), AppendError> {
        self.append_filled(count, 0, sync, attempt)
    }

    /// The same with so many bytes in each event that fill it up.
    pub(crate) fn append_filled(
        &mut self,
        count: u64,
        filler: usize,
        sync: bool,
        attempt: bool,
    ) -> Result<(), AppendError> {
        let first_seq = self.log().next_seq();
        let first_serial = (filler as u64) << 32 | self.model.next_serial;
        let serials = first_serial..first_serial + count;
        self.model.next_serial += count;
        let seqs = first_seq..first_seq + count;
        let mut group: Vec<u8> = Vec::new();
        for (seq, serial) in seqs.clone().zip(serials.clone()) {
            group.extend(event_frame(seq, serial));
        }
        if attempt {
            group.extend(attempt_frame(seqs.end));
        }
        let appended = self.log().append(&group, count, sync, 1);
        match appended {
            Ok(()) => {
                assert_eq!(self.log().next_seq(), seqs.end);
                self.model.tally.appended += count;
                for (seq, serial) in seqs.zip(serials) {
                    let reused = self.model.ended.iter().any(|ended| ended.contains(&seq));
                    assert!(!reused, "number {seq} is used twice: a cursor knows it");
                    let before = self.model.events.insert(seq, Told { serial, synced: sync });
                    assert!(before.is_none(), "number {seq} is used twice");
                }
                if sync {
                    self.newest_is_synced();
                }
            }
            Err(error) => {
                assert_eq!(self.log().next_seq(), first_seq, "a group that failed takes no numbers");
                match error {
                    AppendError::Full => {
                        self.model.refused.extend(serials);
                        self.model.tally.full += 1;
                    }
                    AppendError::Failed => {
                        self.model.unsure.extend(serials.zip(seqs));
                        self.model.tally.failed += 1;
                    }
                }
            }
        }
        appended
    }

    pub(crate) fn sync(&mut self) {
        let quiet = Quiet::new(&self.fs);
        let is_synced = self.log().sync();
        if quiet.holds(&self.fs) {
            assert!(is_synced);
            self.newest_is_synced();
        }
    }

    /// Notes that all of the newest segment survives the machine: it does, as a
    /// segment is left when a sync of it fails.
    fn newest_is_synced(&mut self) {
        if let Some((newest, path)) = self.newest_segment()
            && !self.fs.sync_failed(&path)
        {
            let events = self.model.events.range_mut(newest..);
            events.for_each(|(_, told)| told.synced = true);
        }
    }

    /// Ends events, as far as there are such events.
    pub(crate) fn end(&mut self, place: usize, range: Range<u64>, outcome: usize) {
        let end = range.end.min(self.log().next_seq());
        let range = range.start.min(end)..end;
        let serials = self.model.events.range(range.clone()).map(|(_, told)| told.serial);
        self.model.ended_once[place].extend(serials);
        let before = self.model.ended[place].len();
        // Numbers that were lost end too: as dropped.
        self.model.ended[place].extend(range.clone());
        let new = self.model.ended[place].len() - before;
        let ended = self.log().end(place, range, &EndedAs::from(OUTCOMES[outcome]));
        assert_eq!(ended, new as u64, "each event ends once");
    }

    pub(crate) fn write_cursors(&mut self) {
        let quiet = Quiet::new(&self.fs);
        self.log().write_cursors();
        let Model { ended, written, synced, .. } = &mut self.model;
        // A slot that is not synced is written in its place: if that fails half
        // way, only the other one is left.
        written.clone_from(if quiet.holds(&self.fs) { ended } else { synced });
    }

    pub(crate) fn sync_cursors(&mut self) {
        let quiet = Quiet::new(&self.fs);
        let before = self.fs.files(&dirs().segments).len();
        self.log().sync_cursors();
        let after = self.fs.files(&dirs().segments).len();
        self.model.tally.removed_segments += (before - after) as u64;
        let Model { ended, written, synced, .. } = &mut self.model;
        if !quiet.holds(&self.fs) {
            written.clone_from(synced);
            return;
        }
        written.clone_from(ended);
        for (place, provider) in PROVIDERS.into_iter().enumerate() {
            if !self.fs.sync_failed(&cursor_path(provider)) {
                synced[place].clone_from(&ended[place]);
            }
        }
    }

    /// What has ended at a provider.
    pub(crate) fn ended(&mut self, place: usize) -> Set {
        let cursor = self.log().cursors()[place].cursor.clone();
        (1..cursor.end_seq()).filter(|seq| cursor.has_ended(*seq)).collect()
    }
}

impl Model {
    fn ended_everywhere(&self, seq: u64) -> bool {
        self.ended.iter().all(|ended| ended.contains(&seq))
    }

    /// Promises nothing more of an event.
    fn doubt(&mut self, seq: u64, serial: u64, doubted: &mut Set) {
        if self.events.get(&seq).is_some_and(|told| told.serial == serial) {
            self.events.remove(&seq);
            self.unsure.insert(serial, seq);
            doubted.insert(seq);
        }
    }
}

impl Reading {
    /// Adds what was read from a number on: every number is there once, as an
    /// event or as missing.
    fn add(&mut self, chunk: &Chunk, from: u64) {
        let mut numbers: Vec<u64> = chunk.missing.iter().flat_map(|missing| missing.seqs.clone()).collect();
        self.missing.extend(&numbers);
        for logged in &chunk.events {
            let serial = serial(logged.event.id().as_str().as_bytes());
            assert_eq!(logged.event, event(serial), "the payload is the one that was accepted");
            self.events.insert(logged.seq, serial);
            numbers.push(logged.seq);
        }
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(from..chunk.next_seq), "numbers are skipped or come twice: {chunk:?}");
    }
}

/// Tells whether some calls met no trouble.
struct Quiet(u64);

impl Quiet {
    fn new(fs: &SimFs) -> Self {
        Self(Self::troubles(fs))
    }

    fn holds(&self, fs: &SimFs) -> bool {
        !fs.stopped() && Self::troubles(fs) == self.0
    }

    fn troubles(fs: &SimFs) -> u64 {
        let mishaps = fs.mishaps();
        mishaps.faults + mishaps.out_of_room
    }
}
