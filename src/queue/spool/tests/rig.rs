//! A log on a disk in memory, and a model of what must be in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use analytics_relay_providers::{Event, EventId, EventKind, EventParts, Properties};
use fastrand::Rng;

use super::super::{
    SpoolError,
    cursor::{CursorFile, EndedAs},
    frame::{Frame, Kind, seal},
    index::Segment,
    layout::{LogDirs, UNFINISHED},
    log::{AppendError, Log, LogLimits, Recovery},
    reader::{Chunk, LogReader},
    sim::SimFs,
};
use crate::queue::Durability;

pub(super) const PROVIDERS: [&str; 2] = ["mixpanel", "segment"];
pub(super) const OUTCOMES: [&str; 3] = ["delivered", "dead_lettered/invalid", "dropped/retries_exhausted"];
/// Room for four events or so.
pub(super) const SMALL: LogLimits = LogLimits { segment_bytes: 512, bytes_max: 16 * 512 };

/// Numbers of events, or their serials.
pub(super) type Set = BTreeSet<u64>;

/// A log, its disk, and what its user was told.
pub(super) struct Rig {
    pub(super) fs: SimFs,
    limits: LogLimits,
    log: Option<Log>,
    /// One for each provider, and where it goes on.
    readers: Vec<(LogReader, u64)>,
    pub(super) model: Model,
    /// The machine has died since the log was open.
    machine_died: bool,
    /// A bit was flipped since the log was open.
    flipped: bool,
}

/// What must be true of a log.
#[derive(Clone, Default)]
pub(super) struct Model {
    next_serial: u64,
    /// What was appended and may not be gone, by its number.
    pub(super) events: BTreeMap<u64, Told>,
    /// What the log was told to have ended, for each provider: at all, and so
    /// that it survives the process, and the machine.
    pub(super) ended: [Set; 2],
    written: [Set; 2],
    synced: [Set; 2],
    /// Serials that were refused because there was no room: nobody may ever
    /// read them.
    refused: Set,
    /// Serials that may be in the log or not.
    failed: Set,
    pub(super) tally: Tally,
}

/// An event that the log has taken.
#[derive(Clone, Copy)]
pub(super) struct Told {
    /// Tells it from every other event, whatever its number.
    serial: u64,
    /// It survives the machine.
    synced: bool,
}

/// What happened to a log.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tally {
    pub(super) appended: u64,
    pub(super) full: u64,
    pub(super) failed: u64,
    pub(super) recoveries: u64,
    pub(super) torn_tails: u64,
    pub(super) quarantined: u64,
    pub(super) removed_segments: u64,
    /// Events that a machine lost, which nobody was promised.
    pub(super) lost_unsynced: u64,
    pub(super) lost_to_flips: u64,
    /// Events of failed groups that were found after all.
    pub(super) found: u64,
    /// Ends that a crash made the log forget.
    pub(super) forgotten_ends: u64,
    pub(super) read_errors: u64,
}

impl Tally {
    pub(super) fn add(&mut self, other: &Self) {
        self.appended += other.appended;
        self.full += other.full;
        self.failed += other.failed;
        self.recoveries += other.recoveries;
        self.torn_tails += other.torn_tails;
        self.quarantined += other.quarantined;
        self.removed_segments += other.removed_segments;
        self.lost_unsynced += other.lost_unsynced;
        self.lost_to_flips += other.lost_to_flips;
        self.found += other.found;
        self.forgotten_ends += other.forgotten_ends;
        self.read_errors += other.read_errors;
    }
}

/// All that one look at a log finds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Reading {
    /// Serials by number.
    pub(super) events: BTreeMap<u64, u64>,
    pub(super) missing: Set,
    /// Segment, place and bytes.
    pub(super) damaged: Vec<(u64, u64, u64)>,
}

pub(super) fn dirs() -> LogDirs {
    LogDirs::new(Path::new("/spool"))
}

pub(super) fn cursor_path(provider: &str) -> PathBuf {
    CursorFile::path(&dirs().cursors, provider)
}

fn event(serial: u64) -> Event {
    Event::pack(&EventParts {
        id: EventId::new(format!("e{serial}")).unwrap(),
        kind: EventKind::Identify,
        user_id: None,
        anonymous_id: None,
        time_ms: 1,
        accepted_ms: 2,
        ip: None,
        user_agent: None,
        properties: Properties::empty(),
    })
}

/// A sealed frame.
pub(super) fn event_frame(seq: u64, serial: u64) -> Vec<u8> {
    let payload = serde_json::to_vec(&event(serial)).unwrap();
    let id = format!("e{serial}");
    let frame = Frame {
        kind: Kind::Event,
        durability: Some(Durability::Synced),
        seq,
        time_ms: 2,
        id: id.as_bytes(),
        payload: &payload,
    };
    let mut bytes = Vec::new();
    frame.encode_unsealed(&mut bytes);
    seal(&mut bytes, seq);
    bytes
}

pub(super) fn attempt_frame(seq: u64) -> Vec<u8> {
    let payload = br#"{"provider":"mixpanel","attempt":1,"verdict":"unavailable","events":[[1,2]]}"#;
    let frame = Frame { kind: Kind::Attempt, durability: None, seq, time_ms: 3, id: &[], payload };
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

impl Rig {
    /// An empty disk.
    pub(super) fn new(seed: u64, limits: LogLimits) -> Self {
        Self {
            fs: SimFs::new(seed),
            limits,
            log: None,
            readers: Vec::new(),
            model: Model { next_serial: 1, ..Model::default() },
            machine_died: false,
            flipped: false,
        }
    }

    /// An empty log.
    pub(super) fn opened(seed: u64, limits: LogLimits) -> Self {
        let mut rig = Self::new(seed, limits);
        rig.open().unwrap();
        rig
    }

    /// The same on a disk that goes its own way; the log is closed there.
    pub(super) fn fork(&self) -> Self {
        Self {
            fs: self.fs.fork(),
            limits: self.limits,
            log: None,
            readers: Vec::new(),
            model: self.model.clone(),
            machine_died: self.machine_died,
            flipped: self.flipped,
        }
    }

    pub(super) fn log(&mut self) -> &mut Log {
        self.log.as_mut().expect("the log is open")
    }

    pub(super) fn is_open(&self) -> bool {
        self.log.is_some()
    }

    pub(super) fn close(&mut self) {
        self.log = None;
        self.readers.clear();
    }

    pub(super) fn crash_process(&mut self) {
        self.close();
        self.fs.crash_process();
    }

    pub(super) fn crash_machine(&mut self, rng: &mut Rng) {
        self.close();
        self.fs.crash_machine(rng);
        self.machine_died = true;
    }

    /// Flips a bit of a log that is closed.
    pub(super) fn flip_bit(&mut self, path: &Path, bit: usize) {
        assert!(!self.is_open() && !self.flipped);
        self.fs.flip_bit(path, bit);
        self.flipped = true;
    }

    /// Opens the log and holds it against the model.
    pub(super) fn open(&mut self) -> Result<Recovery, SpoolError> {
        let known = self.quarantined().len();
        let recovery = self.open_unheld()?;
        self.model.tally.recoveries += 1;
        if super::TRACE {
            println!("TRACE open {recovery:?} struck {:?}", self.fs.struck());
            for path in self.fs.files(&dirs().segments) {
                let b = self.fs.bytes(&path);
                println!("TRACE   {path:?} len {} content {:?}", b.len(), b.iter().rposition(|b| *b != 0));
            }
        }
        self.model.tally.torn_tails += u64::from(recovery.torn_bytes > 0);
        let fs = self.fs.clone();
        fs.unharmed(|| self.hold_recovered(known, recovery.torn_bytes));
        Ok(recovery)
    }

    /// Opens the log, whatever may be in it.
    pub(super) fn open_unheld(&mut self) -> Result<Recovery, SpoolError> {
        let fs = Arc::new(self.fs.clone());
        let (log, recovery) = Log::open(fs.clone(), &dirs(), self.limits, &PROVIDERS, 1)?;
        let reader = |file: &CursorFile| {
            let index = log.index().clone();
            (LogReader::new(fs.clone(), dirs(), index), file.cursor.lowest())
        };
        self.readers = log.cursors().iter().map(reader).collect();
        self.log = Some(log);
        Ok(recovery)
    }

    /// As [`Rig::open`], after a process that was killed or failed to open.
    pub(super) fn restart(&mut self) -> Recovery {
        self.crash_process();
        self.open().unwrap()
    }

    /// Holds what a recovery has found against what it must find.
    fn hold_recovered(&mut self, known: usize, torn_bytes: u64) {
        let (machine_died, flipped) = (self.machine_died, std::mem::take(&mut self.flipped));
        self.machine_died = false;
        self.hold_cursors(machine_died, flipped);
        let reading = self.read_all();
        let counted = self.quarantined().len() > known || torn_bytes > 0;
        let pending = self.pending_events();
        let mut lost_to_flip = 0;
        for (seq, told) in pending {
            match reading.events.get(&seq) {
                Some(serial) => assert_eq!(*serial, told.serial, "another event has number {seq}"),
                None => {
                    let unpromised = machine_died && !told.synced;
                    if unpromised {
                        self.model.tally.lost_unsynced += 1;
                    } else {
                        assert!(flipped, "event {seq} is lost");
                        assert!(counted, "event {seq} is lost to a flipped bit and nobody counts it");
                        lost_to_flip += 1;
                    }
                    let next_seq = self.log().next_seq();
                    let told_of = reading.missing.contains(&seq) || seq >= next_seq;
                    assert!(told_of, "event {seq} is lost and nobody is told");
                    self.model.events.remove(&seq);
                }
            }
        }
        if machine_died {
            // So may be events that had ended: should their cursor be damaged one day, it
            // will not be that bit which has cost them.
            self.model.events.retain(|seq, told| told.synced || reading.events.contains_key(seq));
        }
        assert!(lost_to_flip <= 1, "one flipped bit cost {lost_to_flip} events");
        self.model.tally.lost_to_flips += lost_to_flip;
        self.adopt(&reading, machine_died);
        self.check();
    }

    /// No end is made up; none is forgotten that must survive.
    fn hold_cursors(&mut self, machine_died: bool, flipped: bool) {
        for (place, provider) in PROVIDERS.into_iter().enumerate() {
            let sync_failed = self.fs.sync_failed(&cursor_path(provider));
            let now = self.ended(place);
            let Model { ended, written, synced, tally, .. } = &mut self.model;
            let known = if machine_died { &synced[place] } else { &written[place] };
            for seq in known.iter().filter(|_| !flipped) {
                assert!(now.contains(seq), "{provider} forgot that {seq} had ended");
            }
            if let Some(seq) = now.difference(&ended[place]).next() {
                panic!("{provider} never ended {seq}");
            }
            tally.forgotten_ends += ended[place].len() as u64 - now.len() as u64;
            // A cursor that was found is synced, unless that says nothing.
            if machine_died || flipped || !sync_failed {
                synced[place].clone_from(&now);
            } else {
                synced[place].retain(|seq| now.contains(seq));
            }
            written[place].clone_from(&now);
            ended[place] = now;
        }
    }

    /// Takes up what a recovery found of groups that had failed, and what is
    /// now safe.
    fn adopt(&mut self, reading: &Reading, machine_died: bool) {
        let newest = self.newest_segment().filter(|(_, path)| machine_died || !self.fs.sync_failed(path));
        let safe_from = newest.map_or(u64::MAX, |(first_seq, _)| first_seq);
        let model = &mut self.model;
        for (seq, serial) in &reading.events {
            let serial = *serial;
            assert!(!model.refused.contains(&serial), "event {seq} had been refused");
            if !model.events.contains_key(seq) {
                assert!(model.failed.contains(&serial), "event {seq} was never appended");
                model.events.insert(*seq, Told { serial, synced: false });
                model.tally.found += 1;
            }
        }
        for (seq, told) in &mut model.events {
            told.synced |= machine_died || *seq >= safe_from;
        }
    }

    /// Everything that must be there is there, and nothing else is.
    pub(super) fn check(&mut self) {
        let fs = self.fs.clone();
        let reading = fs.unharmed(|| self.read_all());
        for (seq, told) in self.pending_events() {
            assert_eq!(reading.events.get(&seq), Some(&told.serial), "event {seq}");
        }
        for (seq, serial) in &reading.events {
            let told = self.model.events.get(seq).map(|told| told.serial);
            assert_eq!(told, Some(*serial), "event {seq} should not be there");
        }
    }

    /// Recovery after recovery finds nothing more to do.
    pub(super) fn check_idempotent(&mut self) {
        self.fs.heal();
        self.crash_process();
        self.open().unwrap();
        let (names, reading) = (self.quarantined(), self.read_all());
        let files = [dirs().segments, dirs().cursors].map(|dir| self.fs.files(&dir));
        // What a failed sync of an earlier process left is not known.
        let sure = !files.iter().flatten().any(|path| self.fs.sync_failed(path));
        for machine_dies in [false, true].into_iter().filter(|machine_dies| sure || !machine_dies) {
            self.close();
            if machine_dies {
                // Nothing of what a recovery does may hang in the air.
                self.crash_machine(&mut Rng::with_seed(7));
            }
            assert_eq!(self.restart(), Recovery::default());
            assert_eq!(self.quarantined(), names);
            assert_eq!(self.read_all(), reading);
        }
    }

    /// Once nothing fails any more, events are taken at once, however the log
    /// was left, and what everybody has passed is removed.
    pub(super) fn check_takes_again(&mut self) {
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
    pub(super) fn end_everything(&mut self) {
        for place in 0..PROVIDERS.len() {
            self.end(place, 1..u64::MAX, 0);
        }
        // Once for each slot.
        self.sync_cursors();
        self.sync_cursors();
    }

    /// Events that have not ended at some provider.
    fn pending_events(&self) -> Vec<(u64, Told)> {
        let ended_everywhere = |seq| self.model.ended.iter().all(|ended| ended.contains(seq));
        let pending = self.model.events.iter().filter(|(seq, _)| !ended_everywhere(seq));
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
    pub(super) fn quarantined(&self) -> Vec<PathBuf> {
        let mut files = self.fs.files(&dirs().quarantine);
        files.retain(|path| !path.to_string_lossy().ends_with(UNFINISHED));
        files
    }

    /// Reads the log from its start to its end, as a lane does, and keeps what
    /// is damaged.
    pub(super) fn read_all(&mut self) -> Reading {
        let fs = Arc::new(self.fs.clone());
        let index = self.log().index().clone();
        let lowest = self.log().cursors().iter().map(|file| file.cursor.lowest()).min().unwrap();
        let mut reader = LogReader::new(fs, dirs(), index.clone());
        let mut reading = Reading::default();
        let mut seq = index.oldest_seq();
        while seq < index.next_seq() {
            let chunk = match reader.read(seq, 1000, 1 << 20) {
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
            assert!(chunk.next_seq > seq, "the reader stands still at {seq}");
            reading.add(&chunk, seq);
            for damage in &chunk.damaged {
                let new = self.log().quarantine(damage.segment, damage.at, damage.bytes);
                self.model.tally.quarantined += u64::from(new);
                reading.damaged.push((damage.segment, damage.at, damage.bytes));
            }
            seq = chunk.next_seq;
        }
        reading
    }

    /// Reads on as one provider.
    pub(super) fn read(&mut self, place: usize, events_max: usize, bytes_max: u64) {
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
        for damage in &chunk.damaged {
            let new = self.log().quarantine(damage.segment, damage.at, damage.bytes);
            self.model.tally.quarantined += u64::from(new);
        }
    }

    /// Lets a provider begin again.
    pub(super) fn rewind(&mut self, place: usize) {
        self.readers[place].1 = self.log.as_ref().unwrap().cursors()[place].cursor.lowest();
    }

    /// Appends a group of new events, perhaps with an attempt behind them.
    pub(super) fn append(&mut self, count: u64, sync: bool, attempt: bool) -> Result<(), AppendError> {
        let first_seq = self.log().next_seq();
        let serials = self.model.next_serial..self.model.next_serial + count;
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
                let (serials_of, count) = match error {
                    AppendError::Full => (&mut self.model.refused, &mut self.model.tally.full),
                    AppendError::Failed => (&mut self.model.failed, &mut self.model.tally.failed),
                };
                serials_of.extend(serials);
                *count += 1;
            }
        }
        appended
    }

    pub(super) fn sync(&mut self) {
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
    pub(super) fn end(&mut self, place: usize, range: Range<u64>, outcome: usize) {
        let range = range.start..range.end.min(self.log().next_seq());
        let before = self.model.ended[place].len();
        // Numbers that were lost end too: as dropped.
        self.model.ended[place].extend(range.clone());
        let new = self.model.ended[place].len() - before;
        let ended = self.log().end(place, range, &EndedAs::from(OUTCOMES[outcome]));
        assert_eq!(ended, new as u64, "each event ends once");
    }

    pub(super) fn write_cursors(&mut self) {
        let quiet = Quiet::new(&self.fs);
        self.log().write_cursors();
        let Model { ended, written, synced, .. } = &mut self.model;
        // A slot that is not synced is written in its place: if that fails half
        // way, only the other one is left.
        written.clone_from(if quiet.holds(&self.fs) { ended } else { synced });
    }

    pub(super) fn sync_cursors(&mut self) {
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
    pub(super) fn ended(&mut self, place: usize) -> Set {
        let cursor = self.log().cursors()[place].cursor.clone();
        (1..cursor.end_seq()).filter(|seq| cursor.has_ended(*seq)).collect()
    }
}

impl Reading {
    /// Adds what was read from a number on: every number is there once, as an
    /// event or as missing.
    fn add(&mut self, chunk: &Chunk, from: u64) {
        let mut numbers: Vec<u64> = chunk.missing.iter().cloned().flatten().collect();
        self.missing.extend(&numbers);
        for logged in &chunk.events {
            let serial = logged.event.id().as_str()[1..].parse().unwrap();
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
