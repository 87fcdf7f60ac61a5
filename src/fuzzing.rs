//! What must hold for any bytes on the disk and from callers. Each function
//! takes a fuzzer's bytes and panics when something does not hold; `fuzz/` calls
//! them.
//!
//! Formats with a checksum are fuzzed behind it too: the bytes then say what a
//! file holds, and the checksum is put right.

#![allow(missing_docs, clippy::missing_panics_doc, reason = "called by fuzz/ and nobody else")]

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use analytics_relay_providers::{
    Event, EventKind,
    event::{ID_BYTES_MAX, NAME_BYTES_MAX, USER_AGENT_BYTES_MAX},
    fuzzing::{Input, check_properties, encode_everywhere},
};
use axum::body::{Body, Bytes, to_bytes};
use fastrand::Rng;
use futures_util::FutureExt;
use prost::Message;
use tonic::{Code, Status, codegen::http, service::Routes};
use tonic_types::StatusExt;

use crate::{
    admission::Admission,
    delivery::dead_letter::DeadLetter,
    health::Health,
    ingest::{grpc::FrontDoor, service::AnalyticsService, unary::AnswerBody},
    proto::v1::{
        self, EventContext, IdentifyUserRequest, PropertyList, PropertyObject, PropertyValue, TrackBatchItem,
        TrackBatchRequest, TrackBatchResponse, TrackEventRequest, TrackEventResponse, property_value::Value,
        track_batch_answer::Answer, track_batch_item::Item as BatchItem,
    },
    queue::{
        Durability, Queue, QueueLimits,
        memory::{self, QueueReceiver},
        spool::{
            SpoolError,
            cursor::{Cursor, CursorFile, SLOT_BYTES, Slot, decode_slot},
            frame::{
                FRAME_BYTES_MAX, Frame, Kind, PAYLOAD_BYTES_MAX, Parsed, SEGMENT_HEADER_BYTES, SEQ_MAX,
                SegmentHeader, SegmentStart, find_mark, parse,
            },
            fs::{SpoolFile, SpoolFs},
            index::Segment,
            layout::LogDirs,
            log::{AppendError, Log, LogLimits, Recovery},
            quarantine::{DamagedRange, Quarantine},
            reader::LogReader,
            scan::{Item, Scanner},
            sim::{Fault, SimFs},
        },
    },
    shutdown::Stop,
    telemetry::Telemetry,
    time::Clock,
};

const NOW_MS: i64 = 1_767_225_600_000;
/// Most bytes of a made-up segment: a few windows of the scanner.
const SEGMENT_BYTES_MAX: usize = 1 << 20;
/// No cursor is written so often, and none counts so many events.
const COUNT_MAX: u64 = 1 << 60;

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
    Frame { kind, durability, seq, time_ms, id, payload }.encode(out);
}

fn check_header(content: &[u8]) {
    if let SegmentStart::Header(header) = SegmentHeader::decode(content) {
        assert_eq!(SegmentHeader::decode(&header.encode()), SegmentStart::Header(header));
    }
    let header = SegmentHeader { first_seq: content.len() as u64, created_ms: NOW_MS };
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

/// A file that is read in small steps.
#[derive(Debug)]
struct Memory<'a> {
    content: &'a [u8],
    step: usize,
}

impl SpoolFile for Memory<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let offset = usize::try_from(offset).expect("offsets are small");
        let left = self.content.get(offset..).unwrap_or_default();
        let read = left.len().min(buffer.len()).min(self.step);
        buffer[..read].copy_from_slice(&left[..read]);
        Ok(read)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<usize> {
        unreachable!("it is only read")
    }

    fn allocate(&self, _: u64) -> io::Result<()> {
        unreachable!("it is only read")
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        unreachable!("it is only read")
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.content.len() as u64)
    }

    fn sync_data(&self) -> io::Result<()> {
        unreachable!("it is only read")
    }
}

/// A cursor's slot, and its life after it was read.
pub fn cursor(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let steps_bytes = input.below(128);
    let mode = input.below(3);
    let mut steps = Input::new(input.take(steps_bytes));
    let slot = match mode {
        0 => input.rest().to_vec(),
        1 => {
            let (generation, version) = (input.u64(), 1 + u16::from(input.byte() == 0xFF));
            sealed_slot(generation, version, input.rest())
        }
        _ => sealed_slot(input.u64(), 1, made_up_cursor(&mut input).as_bytes()),
    };
    let Slot::Cursor { generation, cursor } = decode_slot(&slot) else { return };
    assert_eq!(decode_slot(&slot), Slot::Cursor { generation, cursor: cursor.clone() });
    if generation >= COUNT_MAX || counted_events(&cursor) >= u128::from(COUNT_MAX) {
        return;
    }
    let mut cursor = cursor;
    check_cursor(&cursor);
    let mut file = slot.clone();
    file.resize(2 * SLOT_BYTES, 0);
    let mut on_disk = DiskCursor::new(&file);
    assert_eq!(on_disk.file.cursor, cursor);
    while !steps.is_empty() {
        let near = cursor.since() + (cursor.end_seq() - cursor.since()) / 2;
        let start = match steps.below(3) {
            0 => cursor.lowest(),
            1 => cursor.end_seq(),
            _ => near,
        };
        let start = (start + u64::from(steps.byte())).saturating_sub(64).min(SEQ_MAX);
        let range = start..(start + u64::from(steps.byte())).min(SEQ_MAX);
        let ended_as = ["delivered", "dead_lettered/invalid", "dropped/spool_damaged"][steps.below(3)].into();

        let before: u128 = counted_events(&cursor);
        let ended = cursor.end(range.clone(), &ended_as);
        assert_eq!(counted_events(&cursor), before + u128::from(ended));
        assert!(ended <= range.end - range.start);
        assert!(range.clone().all(|seq| cursor.has_ended(seq)));
        assert_eq!(cursor.end(range.clone(), &ended_as), 0, "an event ends once");
        check_cursor(&cursor);
        assert_eq!(on_disk.file.end(range, &ended_as), ended);
        on_disk.step(steps.below(8));
    }
    on_disk.file.sync().expect("the disk is well");
    on_disk.step(7);
    assert_eq!(on_disk.file.cursor, cursor);
}

fn check_cursor(cursor: &Cursor) {
    assert!(cursor.since() <= cursor.lowest() && cursor.lowest() <= cursor.end_seq());
    assert!(!cursor.has_ended(cursor.lowest()), "the lowest has not ended");
    assert!(!cursor.has_ended(cursor.end_seq()));
    assert!(cursor.lowest() == 0 || cursor.has_ended(cursor.lowest() - 1));
    assert!(cursor.pending(cursor.end_seq()) <= cursor.end_seq() - cursor.lowest());
    assert_eq!(cursor.pending(cursor.end_seq() + 5), cursor.pending(cursor.end_seq()) + 5);
}

fn counted_events(cursor: &Cursor) -> u128 {
    cursor.totals().values().map(|events| u128::from(*events)).sum()
}

fn sealed_slot(generation: u64, version: u16, payload: &[u8]) -> Vec<u8> {
    let payload = &payload[..payload.len().min(SLOT_BYTES - 32)];
    let mut slot = b"ARCURSR\xFE".to_vec();
    slot.extend_from_slice(&version.to_le_bytes());
    slot.extend_from_slice(&[0; 6]);
    slot.extend_from_slice(&generation.to_le_bytes());
    slot.extend_from_slice(&u32::try_from(payload.len()).expect("a slot is small").to_le_bytes());
    slot.extend_from_slice(&[0; 4]);
    slot.extend_from_slice(payload);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&slot[..12]);
    crc.update(&slot[16..]);
    slot[12..16].copy_from_slice(&crc.finalize().to_le_bytes());
    slot
}

fn made_up_cursor(input: &mut Input<'_>) -> String {
    let since = if input.flag() { input.u64() % (SEQ_MAX + 2) } else { u64::from(input.byte()) };
    let lowest = (since + u64::from(input.byte())).saturating_sub(u64::from(input.flag()));
    let runs: Vec<u8> = (0..input.below(32)).map(|_| input.byte() % 16).collect();
    let ahead: u64 = runs.iter().skip(1).step_by(2).map(|run| u64::from(*run)).sum();
    let delivered = lowest.saturating_sub(since) + ahead;
    format!(
        r#"{{"provider":"p","since":{since},"lowest":{lowest},"totals":{{"delivered":{delivered}}},"ahead":{runs:?}}}"#
    )
}

/// A cursor in its file on a disk.
struct DiskCursor {
    fs: SimFs,
    dirs: LogDirs,
    file: CursorFile,
}

impl DiskCursor {
    fn new(bytes: &[u8]) -> Self {
        let fs = SimFs::new(0);
        let dirs = LogDirs::new(Path::new("/spool"));
        for dir in [&dirs.cursors, &dirs.quarantine] {
            fs.create_dir(dir).expect("the disk is well");
        }
        fs.set_bytes(&CursorFile::path(&dirs.cursors, "p"), bytes);
        let file = Self::open(&fs, &dirs);
        Self { fs, dirs, file }
    }

    fn open(fs: &SimFs, dirs: &LogDirs) -> CursorFile {
        let mut quarantine = Quarantine::open(fs, &dirs.quarantine, u64::MAX).expect("the disk is well");
        let opened = CursorFile::open(fs, &dirs.cursors, "p", 0, &mut quarantine);
        let (file, is_new) = opened.expect("the cursor can be read");
        assert!(!is_new, "a slot is good at any time");
        file
    }

    /// Writes, syncs or dies. What is written survives the process, what is
    /// synced survives the machine, and what may be removed stays removed.
    fn step(&mut self, step: usize) {
        let before = self.file.cursor.clone();
        let safe = self.file.safe_lowest();
        match step {
            0..3 => self.file.write().expect("the disk is well"),
            3 => self.file.sync().expect("the disk is well"),
            4 => {
                self.file.write().expect("the disk is well");
                self.fs.crash_process();
                self.file = Self::open(&self.fs, &self.dirs);
                assert_eq!(self.file.cursor, before);
            }
            // The power fails after a sync: nothing is lost.
            7 => {
                self.file.sync().expect("the disk is well");
                self.fs.crash_machine(&mut Rng::with_seed(safe));
                self.file = Self::open(&self.fs, &self.dirs);
                assert_eq!(self.file.cursor, before);
                assert!(self.file.cursor.lowest() >= safe);
            }
            _ => {}
        }
    }
}

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

/// A call of the gRPC service, from its message's bytes to the queue.
pub fn grpc_admission(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let tracks = input.flag();
    let body = match input.below(8) {
        // All of the body, framing included.
        0 => input.rest().to_vec(),
        1 | 2 => framed(input.rest()),
        3 => framed(&nested(usize::from(input.u16()) % 16_384, input.flag())),
        _ if tracks => framed(&made_up_track(&mut input).encode_to_vec()),
        _ => framed(&made_up_identify(&mut input).encode_to_vec()),
    };
    let method = if tracks { "TrackEvent" } else { "IdentifyUser" };
    let (answer, admitted) = Served::with(|served| served.call(method, body));
    assert!(admitted.len() <= 1);
    let admitted = admitted.into_iter().next();
    match answer {
        Ok(answer) => {
            // Both answers have the same fields.
            let answer = TrackEventResponse::decode(answer).expect("it was encoded by us");
            let event = admitted.expect("an accepted event is in the queue");
            assert!(answer.success);
            assert_eq!(answer.event_id, event.id().as_str());
            assert_eq!(answer.durability, i32::from(v1::Durability::Queued));
            assert_eq!(event.is_identify(), !tracks);
            check_event(&event);
        }
        Err(status) => {
            assert_eq!(admitted, None, "a refused event is in the queue");
            check_refusal(&status);
        }
    }
}

/// A batch: each item has its answer, and what was accepted is in the queue.
pub fn grpc_batch(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let items_max = input.below(QUEUE_EVENTS_MAX * 2);
    let mut items = Vec::new();
    while items.len() < items_max && !input.is_empty() {
        let item = match input.below(8) {
            0 => None,
            1 | 2 => Some(BatchItem::Identify(made_up_identify(&mut input))),
            _ => Some(BatchItem::Track(made_up_track(&mut input))),
        };
        items.push(TrackBatchItem { item });
    }
    let item_count = items.len();
    let message = TrackBatchRequest { items }.encode_to_vec();
    let (answer, admitted) = Served::with(|served| served.call("TrackBatch", framed(&message)));
    let answer = match answer {
        Ok(answer) => TrackBatchResponse::decode(answer).expect("it was encoded by us"),
        Err(status) => {
            assert!(admitted.is_empty(), "an event of a refused batch is in the queue");
            return check_refusal(&status);
        }
    };
    assert_eq!(answer.answers.len(), item_count);
    let (mut accepted, mut longest_delay_ms) = (Vec::new(), 0);
    for answer in answer.answers {
        match answer.answer.expect("each item has an answer") {
            Answer::Accepted(event) => {
                assert_eq!(longest_delay_ms, 0, "taken behind one that has to come again");
                accepted.push(event.event_id);
            }
            Answer::Refused(refused) => assert!(!refused.violations.is_empty()),
            Answer::Deferred(deferred) => {
                assert_eq!(deferred.reason, "QUEUE_FULL");
                longest_delay_ms = longest_delay_ms.max(deferred.retry_delay_ms);
            }
        }
    }
    assert_eq!(answer.retry_delay_ms, longest_delay_ms);
    let queued: Vec<_> = admitted.iter().map(|event| event.id().to_string()).collect();
    assert_eq!(queued, accepted, "in the order of the items");
    admitted.iter().for_each(check_event);
}

/// An admitted event obeys every limit and comes back from every file.
fn check_event(event: &Event) {
    if let EventKind::Track { name } = event.kind() {
        assert!((1..=NAME_BYTES_MAX).contains(&name.len()));
    } else {
        assert!(event.user_id().is_some());
    }
    for id in [event.user_id(), event.anonymous_id()].into_iter().flatten() {
        assert!((1..=ID_BYTES_MAX).contains(&id.len()));
    }
    let user_agent = event.user_agent();
    assert!(user_agent.is_none_or(|agent| (1..=USER_AGENT_BYTES_MAX).contains(&agent.len())));
    assert!((946_684_800_000..=NOW_MS + 24 * 3600 * 1000).contains(&event.time_ms()));
    assert_eq!(event.accepted_ms(), NOW_MS);
    check_properties(&event.properties());
    let json = event.to_json();
    assert_eq!(json, serde_json::to_vec(event).expect("an event is JSON"));
    assert!(json.len() <= PAYLOAD_BYTES_MAX / 2, "{} bytes", json.len());
    assert!(!json.contains(&b'\n'), "a line holds it");
    assert_eq!(find_mark(&json, 0), None);
    assert_eq!(&serde_json::from_slice::<Event>(&json).expect("it was written by us"), event);
    encode_everywhere(event);
}

/// A refusal says why, and callers' libraries can take it.
fn check_refusal(status: &Status) {
    const HEADER_BYTES_MAX: usize = 8 * 1024;
    assert!(!status.message().is_empty(), "{status:?}");
    assert!(
        status.message().len() + status.details().len() / 3 * 4 < HEADER_BYTES_MAX,
        "{} and {} bytes",
        status.message().len(),
        status.details().len()
    );
    if status.code() != Code::InvalidArgument {
        // The library's own: a message that is too long, cut or compressed.
        let codes = [Code::OutOfRange, Code::Internal, Code::Unimplemented];
        return assert!(codes.contains(&status.code()), "{status:?}");
    }
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
    assert!(!reason.is_empty() && !violations.is_empty(), "{status:?}");
    for violation in violations {
        assert!(!violation.reason.is_empty() && !violation.description.is_empty(), "{violation:?}");
        assert!(!violation.field.is_empty() || violation.reason == "MESSAGE_MALFORMED", "{violation:?}");
        assert!(!violation.description.contains("got ,"), "{violation:?}");
    }
}

/// Less than a batch may hold.
const QUEUE_EVENTS_MAX: usize = 10;

/// The service, and the queue behind it.
struct Served {
    service: Arc<AnalyticsService>,
    queue: QueueReceiver,
}

impl Served {
    fn with<R>(run: impl FnOnce(&mut Self) -> R) -> R {
        thread_local! {
            static SERVED: RefCell<Option<Served>> = const { RefCell::new(None) };
        }
        SERVED.with(|served| run(served.borrow_mut().get_or_insert_with(Self::new)))
    }

    fn new() -> Self {
        let mut telemetry = Telemetry::new(NOW_MS);
        let (sender, queue) =
            memory::bounded(QueueLimits { events_max: QUEUE_EVENTS_MAX, bytes_max: 1 << 20 });
        let health = Health::new(Stop::default(), sender.clone(), Vec::new(), None);
        let clock = Clock::from_fn(|| NOW_MS);
        let accepted = telemetry.accepted();
        let admission = Admission::new(Queue::Memory(sender, accepted), clock, telemetry.admission());
        let door = FrontDoor::new(Arc::new(admission), Arc::new(health));
        let service = AnalyticsService::new(door, Routes::default, telemetry.ingest());
        Self { service: Arc::new(service), queue }
    }

    /// The bytes of the answer's message, and what came into the queue.
    fn call(&mut self, method: &str, body: Vec<u8>) -> (Result<Bytes, Status>, Vec<Event>) {
        let request = http::Request::post(format!("/analytics.v1.AnalyticsService/{method}"))
            .header("content-type", "application/grpc")
            .body(Body::from(body))
            .expect("a legal request");
        let answer = self.service.clone().answer(request).now_or_never().expect("nothing is waited for");
        let status = Status::from_header_map(answer.headers());
        let answer = match status.filter(|status| status.code() != Code::Ok) {
            Some(status) => Err(status),
            None => Ok(read_answer(answer.into_body())),
        };
        let mut admitted = Vec::new();
        self.queue.recv_many(&mut admitted, QUEUE_EVENTS_MAX).now_or_never();
        (answer, admitted.into_iter().map(|queued| queued.event).collect())
    }
}

fn read_answer(body: AnswerBody) -> Bytes {
    let bytes = to_bytes(Body::new(body), 1 << 20)
        .now_or_never()
        .expect("nothing is waited for")
        .expect("an answer has a body");
    bytes.slice(5..)
}

fn framed(message: &[u8]) -> Vec<u8> {
    let mut body = vec![0];
    body.extend_from_slice(&u32::try_from(message.len()).expect("a message is small").to_be_bytes());
    body.extend_from_slice(message);
    body
}

/// A request whose property is that many lists or objects deep.
fn nested(levels: usize, objects: bool) -> Vec<u8> {
    // From the inside out and back to front, so that lengths are known.
    let mut backwards = Vec::new();
    let wrap = |backwards: &mut Vec<u8>, tag: u8, from: usize| {
        let mut length = backwards.len() - from;
        let mut varint = Vec::new();
        loop {
            let more = length > 0x7f;
            varint.push((length & 0x7f) as u8 | if more { 0x80 } else { 0 });
            length >>= 7;
            if !more {
                break;
            }
        }
        backwards.extend(varint.iter().rev());
        backwards.push(tag);
    };
    let name = |backwards: &mut Vec<u8>| backwards.extend_from_slice(&[b'k', 1, 0x0A]);
    for _ in 0..levels {
        if objects {
            wrap(&mut backwards, 0x12, 0);
            name(&mut backwards);
            wrap(&mut backwards, 0x0A, 0);
            wrap(&mut backwards, 0x32, 0);
        } else {
            wrap(&mut backwards, 0x0A, 0);
            wrap(&mut backwards, 0x2A, 0);
        }
    }
    wrap(&mut backwards, 0x12, 0);
    name(&mut backwards);
    // Properties are field 3 of a track and field 2 of an identify.
    let entry = backwards.clone();
    wrap(&mut backwards, 0x1A, 0);
    let track_bytes = backwards.len();
    backwards.extend_from_slice(&entry);
    wrap(&mut backwards, 0x12, track_bytes);
    backwards.reverse();
    backwards
}

fn made_up_track(input: &mut Input<'_>) -> TrackEventRequest {
    TrackEventRequest {
        event_name: made_up_text(input),
        user_id: made_up_text(input),
        anonymous_id: made_up_text(input),
        event_id: made_up_text(input),
        timestamp: made_up_time(input) / 1000,
        timestamp_ms: made_up_time(input),
        durability: i32::from(input.byte() % 8),
        context: made_up_context(input),
        properties_json: made_up_json(input),
        properties: made_up_fields(input, 0),
    }
}

fn made_up_identify(input: &mut Input<'_>) -> IdentifyUserRequest {
    IdentifyUserRequest {
        user_id: made_up_text(input),
        anonymous_id: made_up_text(input),
        event_id: made_up_text(input),
        timestamp_ms: made_up_time(input),
        durability: i32::from(input.byte() % 8),
        context: made_up_context(input),
        properties_json: made_up_json(input),
        properties: made_up_fields(input, 0),
    }
}

/// Mostly none: it excludes the other properties.
fn made_up_json(input: &mut Input<'_>) -> Vec<u8> {
    match input.below(8) {
        0 => {
            let bytes = input.below(256);
            input.take(bytes).to_vec()
        }
        1 => br#" {"a": [1.50, {"b": null}], "": 1e999, "a": "twice"}"#.to_vec(),
        2 => br#"{"total":19.5,"id":9007199254740993}"#.to_vec(),
        _ => Vec::new(),
    }
}

fn made_up_context(input: &mut Input<'_>) -> Option<EventContext> {
    let ip = match input.below(6) {
        0 => return None,
        1 => "203.0.113.9".to_owned(),
        2 => "2001:db8::1".to_owned(),
        3 => made_up_text(input),
        _ => String::new(),
    };
    Some(EventContext { ip, user_agent: made_up_text(input) })
}

fn made_up_time(input: &mut Input<'_>) -> i64 {
    match input.below(6) {
        0 => input.u64().cast_signed(),
        1 => NOW_MS + i64::from(input.u16()) * 4096,
        2 => 946_684_800_000 - i64::from(input.u16()) + i64::from(input.u16()),
        _ => 0,
    }
}

/// Short, or as long as the limits, or longer.
fn made_up_text(input: &mut Input<'_>) -> String {
    match input.below(8) {
        0 => String::new(),
        1 => {
            let pattern = input.text();
            let times = 1 + input.below(64);
            pattern.repeat(times)
        }
        2 => char::from(input.byte()).to_string().repeat(usize::from(input.u16()) % 1100),
        3 => "time".to_owned(),
        _ => input.text(),
    }
}

fn made_up_fields(input: &mut Input<'_>, depth: usize) -> std::collections::HashMap<String, PropertyValue> {
    let count = match input.below(8) {
        0 => usize::from(input.u16()) % 300,
        count => count - 1,
    };
    let field = |input: &mut Input<'_>, index: usize| {
        let key = if input.flag() { format!("{index}") } else { made_up_text(input) };
        (key, made_up_value(input, depth + 1))
    };
    (0..count).map_while(|index| (!input.is_empty()).then(|| field(input, index))).collect()
}

fn made_up_value(input: &mut Input<'_>, depth: usize) -> PropertyValue {
    // Deeper than what is allowed, and than what can be decoded.
    const DEPTH_MAX: usize = 120;
    let value = match input.below(9) {
        0 => None,
        1 => Some(Value::StringValue(made_up_text(input))),
        2 => Some(Value::NumberValue(f64::from_bits(input.u64()))),
        3 => Some(Value::NumberValue(f64::from(input.byte()) / 4.0)),
        4 => Some(Value::BoolValue(input.flag())),
        5 => Some(Value::IntegerValue(input.u64().cast_signed())),
        _ if depth >= DEPTH_MAX || input.is_empty() => None,
        6 | 7 => {
            let items = input.below(12);
            let item = |input: &mut Input<'_>| made_up_value(input, depth + 1);
            Some(Value::ListValue(PropertyList { values: (0..items).map(|_| item(input)).collect() }))
        }
        _ => Some(Value::ObjectValue(PropertyObject { fields: made_up_fields(input, depth) })),
    };
    PropertyValue { value }
}

/// Lines of a file of dead letters, or of a spill file.
pub fn dead_letter(bytes: &[u8]) {
    for line in bytes.split(|byte| *byte == b'\n') {
        if let Ok(letter) = serde_json::from_slice::<DeadLetter>(line) {
            let json = serde_json::to_vec(&letter).expect("a letter is JSON");
            assert_eq!(serde_json::from_slice::<DeadLetter>(&json).expect("it was written by us"), letter);
        }
        let Ok(event) = serde_json::from_slice::<Event>(line) else { continue };
        let json = serde_json::to_vec(&event).expect("an event is JSON");
        assert!(!json.contains(&b'\n'), "a line holds it");
        assert_eq!(serde_json::from_slice::<Event>(&json).expect("it was written by us"), event);
        check_properties(&event.properties());
        encode_everywhere(&event);
    }
}
