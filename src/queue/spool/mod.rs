//! A write-ahead log under the queue: an event is on disk before its caller is
//! answered, and stays there until every provider is done with it.
//!
//! ```text
//!            append            offer                     report
//! admission ───────► writer ─────────► queue ─► … lanes ────────► writer
//!           ◄─────── (thread)                      ▲              (cursors)
//!            answer     │   segments               │ read
//!                       └────────────► reader ─────┘ what the queue had no room for
//! ```
//!
//! - [`frame`] says what the bytes of a segment are, [`cursor`] those of a
//!   cursor, [`quarantine`] how damaged bytes are kept. All three formats have
//!   a version; a file of a newer one makes the relay refuse to start.
//! - [`log`] is the log as a value: appending, recovery, cursors, removal.
//! - [`writer`] is the one thread that owns the files: group commit.
//! - [`scan`] and [`reader`] read; [`index`] tells them how far they may.
//! - [`fs`] is the seam to the file system.
//!
//! **Durability.** `written` answers once the group is written, which survives
//! the process; `synced` once `fdatasync` returned, which survives the machine;
//! `queued` as soon as the event is in the writer's hands. All three go through
//! the log, and one that is full or fails refuses all three. What was only
//! written is synced once a second.
//!
//! **A failed sync is final.** Nobody knows what is on disk then, and asking
//! again would not tell: the callers get UNAVAILABLE, the group is cut off, the
//! segment is left and a new one is begun. If that fails too, no event is
//! accepted until a segment can be begun; delivery goes on.

use std::{
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use analytics_relay_providers::Event;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::{Semaphore, oneshot, watch};
use tracing::{info, warn};

pub(crate) mod cursor;
pub(crate) mod frame;
pub(crate) mod fs;
pub(crate) mod index;
pub(crate) mod inspect;
pub(crate) mod log;
pub(crate) mod quarantine;
pub(crate) mod reader;
pub(crate) mod scan;
pub(crate) mod settings;
#[cfg(any(test, fuzzing))]
pub(crate) mod sim;
#[cfg(test)]
mod tests;
mod writer;

use self::{
    frame::{Frame, Kind},
    fs::{RealFs, SpoolFs},
    index::Index,
    log::{Log, LogDirs, LogLimits},
    reader::{Chunk, DamagedRange, LogReader},
    writer::{Append, Command, Writer},
};
use super::{Durability, QueueLimits, Refused, Room, Row, Taken, memory::QueueSender};
use crate::{delivery::files::Lock, ledger::Ledger, reasons::Outcome, telemetry::SpoolMetrics, time::Clock};

/// Ending of files that are not complete.
pub(crate) const UNFINISHED: &str = ".unfinished";
/// Name of the file whose lock says that a relay is writing.
const LOCK: &str = "spool.lock";
/// How often a lock that is held is tried again, and after which pause.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Attempts of one lane that may wait for the writer.
const ATTEMPTS_MAX: usize = 256;
/// Most ranges of events that one attempt names.
const ATTEMPT_RANGES_MAX: usize = 2000;
/// Most characters of a provider's words that are kept with an attempt.
const DETAIL_CHARS_MAX: usize = 200;

/// What the log needs to know.
#[derive(Debug, Clone)]
pub(crate) struct SpoolSettings {
    pub(crate) dir: PathBuf,
    /// What a caller gets who asks for nothing.
    pub(crate) default_level: Durability,
    pub(crate) limits: LogLimits,
    /// Most bytes of each provider's share, in the order of the providers.
    pub(crate) provider_bytes_max: Vec<u64>,
    pub(crate) when_full: WhenFull,
    /// How long a group waits for callers that came with the last one.
    pub(crate) group_window: Duration,
    /// Bytes at which a group waits no more.
    pub(crate) group_bytes: usize,
    /// What may wait for the writer.
    pub(crate) intake: QueueLimits,
}

/// What happens when the log has used up its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// New events are refused.
    Reject,
    /// The slowest provider's oldest events become its dead letters.
    DeadLetterOldest,
}

/// Why a log cannot be used.
#[derive(Debug, Error)]
pub enum SpoolError {
    /// The file system says no.
    #[error("{path} cannot be used")]
    File {
        /// Which file or directory.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// Another process has it.
    #[error("another relay is using the spool {0}")]
    Busy(String),
    /// Nothing would keep a second relay from writing to it.
    #[error(
        "{dir} cannot be locked, and two relays would destroy one log: put it on a file system with locks \
(flock), such as a local disk or NFS 4, or set DURABILITY=memory"
    )]
    NoLocks {
        /// Where it is.
        dir: String,
        /// What the system says.
        source: io::Error,
    },
    /// It is newer than this program.
    #[error("{path}: got format version {version}, want at most {max}: a newer relay wrote it", max = frame::FORMAT_VERSION)]
    Newer {
        /// Which file.
        path: String,
        /// What it says.
        version: u16,
    },
}

impl SpoolError {
    fn at(path: &Path, source: io::Error) -> Self {
        Self::File { path: path.display().to_string(), source }
    }
}

/// The name under which a file is made before it is complete.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(UNFINISHED);
    PathBuf::from(name)
}

/// One request to a provider and what came of it, as the log keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attempt {
    pub(crate) provider: String,
    /// Counted from 1 in each delivery cycle.
    pub(crate) attempt: u32,
    /// `delivered`, `unavailable`, or how the event ended.
    pub(crate) verdict: String,
    /// The provider's words, without secrets.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) detail: String,
    /// Numbers of the events: first and end, exclusive.
    pub(crate) events: Vec<(u64, u64)>,
}

/// What others may see of a log.
#[derive(Debug)]
pub(crate) struct SharedStatus {
    pub(crate) bytes: AtomicU64,
    pub(crate) segments: AtomicU64,
    pub(crate) unsynced_events: AtomicU64,
    pub(crate) damaged_ranges: AtomicU64,
    /// No event can be accepted because the disk fails.
    pub(crate) broken: watch::Sender<bool>,
    /// No event can be accepted because there is no room.
    pub(crate) full: AtomicBool,
    /// A provider's share is used up.
    over_cap: AtomicBool,
    /// In the order of the log's cursors.
    pub(crate) cursors: Vec<CursorStatus>,
    intake_events: AtomicUsize,
    intake_bytes: AtomicUsize,
    room: Room,
    /// The newest event that the queue had no room for.
    skipped: watch::Sender<u64>,
}

impl SharedStatus {
    /// The state in which events are accepted.
    pub(crate) const WRITING: &'static str = "writing";
    /// All states.
    pub(crate) const STATES: [&'static str; 3] = [Self::WRITING, "full", "failed"];

    /// Events that a power cut would lose, at most: those on their way to the
    /// disk included.
    pub(crate) fn events_at_risk(&self) -> u64 {
        self.unsynced_events.load(Ordering::Relaxed) + self.intake_events.load(Ordering::Relaxed) as u64
    }

    /// How the log is doing.
    pub(crate) fn state(&self) -> &'static str {
        if *self.broken.borrow() {
            Self::STATES[2]
        } else if self.full.load(Ordering::Relaxed) {
            Self::STATES[1]
        } else {
            Self::WRITING
        }
    }

    /// An event leaves the writer's hands.
    fn leave(&self, event: &Event) {
        self.intake_events.fetch_sub(1, Ordering::Relaxed);
        self.intake_bytes.fetch_sub(event.memory_bytes(), Ordering::Relaxed);
        self.room.changed();
    }
}

/// What others may see of a provider's place in the log.
#[derive(Debug)]
pub(crate) struct CursorStatus {
    pub(crate) provider: String,
    pub(crate) lowest: AtomicU64,
    /// Events that have not ended.
    pub(crate) pending: AtomicU64,
    /// Bytes from `lowest` on.
    pub(crate) bytes: AtomicU64,
    pub(crate) bytes_max: u64,
    surplus: watch::Sender<u64>,
}

impl CursorStatus {
    fn give_up(&self, seq: u64) {
        self.surplus.send_if_modified(|surplus| std::mem::replace(surplus, seq) != seq);
    }
}

/// Keeps a second process away from a log, as long as it lives.
#[derive(Debug)]
pub(crate) struct SpoolLock(#[expect(dead_code, reason = "held for its lock")] File);

impl SpoolLock {
    /// Creates the directory if need be and locks it.
    pub(crate) fn acquire(dir: &Path) -> Result<Self, SpoolError> {
        RealFs.create_dir(dir).map_err(|source| SpoolError::at(dir, source))?;
        let path = dir.join(LOCK);
        let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = open.map_err(|source| SpoolError::at(&path, source))?;
        // A command that looks whether a relay is running holds it for a moment.
        for attempt in 0.. {
            match Lock::of(file.try_lock()).map_err(|source| SpoolError::at(&path, source))? {
                Lock::Ours => break,
                Lock::Theirs if attempt < LOCK_ATTEMPTS => thread::sleep(LOCK_PAUSE),
                Lock::Theirs => return Err(SpoolError::Busy(dir.display().to_string())),
                // Two that write would destroy each other's events.
                Lock::None(source) => {
                    return Err(SpoolError::NoLocks { dir: dir.display().to_string(), source });
                }
            }
        }
        Ok(Self(file))
    }
}

/// A log that was opened and whose thread does not run yet.
pub(crate) struct OpenedSpool {
    log: Log,
    fs: Arc<dyn SpoolFs>,
    dirs: LogDirs,
    settings: SpoolSettings,
    lock: SpoolLock,
    commands: mpsc::Receiver<Command>,
    spool: Spool,
}

/// The entrance to a log; held by admission.
#[derive(Debug, Clone)]
pub(crate) struct Spool {
    commands: mpsc::Sender<Command>,
    default_level: Durability,
    intake: QueueLimits,
    status: Arc<SharedStatus>,
}

/// A log's thread.
#[derive(Debug)]
pub(crate) struct SpoolThread {
    commands: mpsc::Sender<Command>,
    running: JoinHandle<()>,
}

impl OpenedSpool {
    /// Locks, opens and, if need be, repairs a log. Blocks on the disk.
    pub(crate) fn open(settings: SpoolSettings, providers: &[&str], now_ms: i64) -> Result<Self, SpoolError> {
        let lock = SpoolLock::acquire(&settings.dir)?;
        let (fs, dirs) = (Arc::new(RealFs), LogDirs::new(&settings.dir));
        let (log, recovery) = Log::open(fs.clone(), &dirs, settings.limits, providers, now_ms)?;
        info!(
            dir = %settings.dir.display(),
            next_seq = log.next_seq(),
            torn_bytes = recovery.torn_bytes,
            damaged_ranges = log.damaged_ranges(),
            "spool opened"
        );
        let (next_seq, oldest_seq) = (log.next_seq(), log.index().oldest_seq());
        for provider in recovery.new_cursors.iter().filter(|_| next_seq > oldest_seq) {
            let event_count = next_seq - oldest_seq;
            warn!(provider, event_count, "no cursor: the provider gets everything that is in the spool");
        }
        for file in &log.cursors()[providers.len()..] {
            let (provider, event_count) = (&file.provider, file.cursor.pending(next_seq));
            warn!(
                provider,
                event_count,
                "the spool keeps events of a provider that is not named: name it, or remove its cursor"
            );
        }
        let cursor = |(place, file): (usize, &cursor::CursorFile)| CursorStatus {
            provider: file.provider.clone(),
            lowest: AtomicU64::new(file.cursor.lowest()),
            pending: AtomicU64::new(file.cursor.pending(next_seq)),
            bytes: AtomicU64::new(log.index().bytes_from(file.cursor.lowest())),
            bytes_max: settings.provider_bytes_max.get(place).copied().unwrap_or(u64::MAX),
            surplus: watch::Sender::new(0),
        };
        let (bytes, segments) = log.index().size();
        let status = Arc::new(SharedStatus {
            bytes: AtomicU64::new(bytes),
            segments: AtomicU64::new(segments as u64),
            unsynced_events: AtomicU64::new(0),
            damaged_ranges: AtomicU64::new(log.damaged_ranges()),
            broken: watch::Sender::new(false),
            full: AtomicBool::new(false),
            over_cap: AtomicBool::new(false),
            cursors: log.cursors().iter().enumerate().map(cursor).collect(),
            intake_events: AtomicUsize::new(0),
            intake_bytes: AtomicUsize::new(0),
            room: Room::default(),
            skipped: watch::Sender::new(0),
        });
        let (sender, commands) = mpsc::channel();
        let (default_level, intake) = (settings.default_level, settings.intake);
        let spool = Spool { commands: sender, default_level, intake, status };
        Ok(Self { log, fs, dirs, settings, lock, commands, spool })
    }

    /// The entrance.
    pub(crate) fn spool(&self) -> &Spool {
        &self.spool
    }

    /// The log as one provider sees it, by its place among the providers.
    pub(crate) fn lane_log(&self, place: usize) -> LaneLog {
        let file = &self.log.cursors()[place];
        LaneLog {
            provider: file.provider.clone(),
            cursor: place,
            done: file.cursor.clone(),
            recovered_seq: self.log.next_seq(),
            index: self.log.index().clone(),
            reader: LogReader::new(self.fs.clone(), self.dirs.clone(), self.log.index().clone()),
            commands: self.spool.commands.clone(),
            permits: Arc::new(Semaphore::new(ATTEMPTS_MAX)),
            skipped: self.spool.status.skipped.subscribe(),
            surplus: self.spool.status.cursors[place].surplus.subscribe(),
        }
    }

    /// Starts the thread. It drops `watched` when it ends.
    pub(crate) fn run(
        self,
        queue: QueueSender,
        ledgers: Vec<Ledger>,
        metrics: SpoolMetrics,
        clock: Clock,
        watched: impl Send + 'static,
    ) -> io::Result<SpoolThread> {
        let Self { log, settings, lock, commands, spool, .. } = self;
        let writer = Writer::new(log, settings, queue, ledgers, spool.status.clone(), metrics, clock);
        let running = thread::Builder::new().name("spool".to_owned()).spawn(move || {
            let _watched = watched;
            writer.run(&commands);
            drop(lock);
        })?;
        Ok(SpoolThread { commands: spool.commands, running })
    }
}

impl Spool {
    /// Hands an event to the writer, or refuses it.
    pub(crate) fn append(
        &self,
        event: Event,
        wanted: Durability,
        row: Option<&mut Row>,
    ) -> Result<Taken, Refused> {
        // It is answered before the writer sees it, so it must not be refused
        // then.
        if wanted == Durability::Queued && self.status.state() != SharedStatus::WRITING {
            return Err(Refused::SpoolFull);
        }
        let event_bytes = event.memory_bytes();
        let events = self.status.intake_events.fetch_add(1, Ordering::Relaxed);
        let bytes = self.status.intake_bytes.fetch_add(event_bytes, Ordering::Relaxed);
        if events >= self.intake.events_max || bytes + event_bytes > self.intake.bytes_max {
            self.status.leave(&event);
            return Err(Refused::Full);
        }
        let frame = encode(&event, wanted);
        let (answer, answered) = oneshot::channel();
        let mut waits = wanted > Durability::Queued;
        let row = row.map(|row| {
            // Behind one that may be refused it must not be answered yet.
            row.waits |= waits;
            waits = row.waits;
            row.refused.clone()
        });
        let append = Append { event, frame, wanted, row, answer: waits.then_some(answer) };
        if let Err(mpsc::SendError(command)) = self.commands.send(Command::Append(append)) {
            if let Command::Append(Append { event, .. }) = command {
                self.status.leave(&event);
            }
            return Err(Refused::Closed);
        }
        Ok(if waits { Taken::Appended(answered) } else { Taken::Done })
    }

    pub(crate) fn default_level(&self) -> Durability {
        self.default_level
    }

    /// What others may see.
    pub(crate) fn status(&self) -> &Arc<SharedStatus> {
        &self.status
    }

    /// See [`Queue::room_for`](super::Queue::room_for): room before the writer.
    pub(crate) async fn room_for(&self, events: usize, bytes: usize) {
        let status = &self.status;
        let held =
            || (status.intake_events.load(Ordering::Relaxed), status.intake_bytes.load(Ordering::Relaxed));
        status.room.wait_while(|| self.intake.is_full_for(held(), (events, bytes))).await;
    }

    /// Events that wait for the writer.
    pub(crate) fn intake_events(&self) -> usize {
        self.status.intake_events.load(Ordering::Relaxed)
    }
}

/// An event's frame, without its number.
fn encode(event: &Event, wanted: Durability) -> Vec<u8> {
    let payload = event.to_json();
    let event_id = event.id();
    let frame = Frame {
        kind: Kind::Event,
        durability: Some(wanted),
        seq: 0,
        time_ms: event.accepted_ms(),
        id: event_id.as_str().as_bytes(),
        payload: &payload,
    };
    let mut bytes = Vec::with_capacity(frame.len());
    frame.encode_unsealed(&mut bytes);
    bytes
}

impl SpoolThread {
    /// From here on every event is refused. Returns when those before are in
    /// the queue.
    pub(crate) async fn close_intake(&self) {
        let (answer, answered) = oneshot::channel();
        if self.commands.send(Command::CloseIntake(answer)).is_ok() {
            let _ = answered.await;
        }
    }

    /// Syncs everything and ends the thread. Returns the events that are left,
    /// in the order of the providers; `None` if the thread failed.
    pub(crate) async fn close(self) -> Option<Vec<u64>> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command::Close(answer)).ok()?;
        let left = answered.await.ok()?;
        // It has nothing left to do but to let go of the lock.
        self.running.join().ok()?;
        Some(left)
    }
}

/// The log as one lane sees it.
pub(crate) struct LaneLog {
    provider: String,
    cursor: usize,
    /// What had ended when the log was opened.
    done: cursor::Cursor,
    /// The end of the log then.
    recovered_seq: u64,
    index: Arc<Index>,
    reader: LogReader,
    commands: mpsc::Sender<Command>,
    permits: Arc<Semaphore>,
    skipped: watch::Receiver<u64>,
    surplus: watch::Receiver<u64>,
}

impl LaneLog {
    /// The first event that has not ended.
    pub(crate) fn first_seq(&self) -> u64 {
        self.done.lowest()
    }

    /// Events that an earlier run has left.
    pub(crate) fn left(&self) -> u64 {
        self.done.pending(self.recovered_seq)
    }

    /// Where the log ends, now and when it was opened.
    pub(crate) fn view(&self) -> LogView {
        LogView { index: self.index.clone(), recovered_seq: self.recovered_seq }
    }

    /// Reads events from number `seq` on that have not ended. Blocks on the
    /// disk.
    pub(crate) fn read(&mut self, seq: u64, events_max: usize, bytes_max: u64) -> io::Result<Chunk> {
        let mut chunk = self.reader.read(seq, events_max, bytes_max)?;
        if seq < self.recovered_seq {
            chunk.events.retain(|logged| !self.done.has_ended(logged.seq));
            chunk.missing =
                chunk.missing.iter().flat_map(|range| self.done.not_ended(range.clone())).collect();
        }
        Ok(chunk)
    }

    /// See [`LogReader::read_around`].
    pub(crate) fn read_around(&mut self, reads_around: bool) {
        self.reader.read_around(reads_around);
    }

    /// Lets go of files, until the next read.
    pub(crate) fn close(&mut self) {
        self.reader.close();
    }

    /// The lane's way to report.
    pub(crate) fn reports(&self) -> LaneReports {
        let (commands, permits) = (self.commands.clone(), self.permits.clone());
        LaneReports { provider: self.provider.clone(), cursor: self.cursor, commands, permits }
    }

    /// Changes when the queue had no room for an event: its number.
    pub(crate) fn skipped(&self) -> watch::Receiver<u64> {
        self.skipped.clone()
    }

    /// Changes when the oldest events must make room: the number of the first
    /// that may stay.
    pub(crate) fn surplus(&self) -> watch::Receiver<u64> {
        self.surplus.clone()
    }
}

/// Where a log ends.
#[derive(Debug, Clone)]
pub(crate) struct LogView {
    index: Arc<Index>,
    recovered_seq: u64,
}

impl LogView {
    /// The number of the next event that will be accepted.
    pub(crate) fn next_seq(&self) -> u64 {
        self.index.next_seq()
    }

    /// True for an event that was there when the log was opened.
    pub(crate) fn is_left(&self, seq: u64) -> bool {
        seq < self.recovered_seq
    }
}

/// Tells the log what became of a lane's events.
#[derive(Debug, Clone)]
pub(crate) struct LaneReports {
    provider: String,
    cursor: usize,
    commands: mpsc::Sender<Command>,
    permits: Arc<Semaphore>,
}

impl LaneReports {
    /// Notes an attempt to deliver events, for `explain`.
    pub(crate) fn attempted(&self, at_ms: i64, attempt: u32, verdict: &str, detail: &str, seqs: &[u64]) {
        for part in ranges(seqs).chunks(ATTEMPT_RANGES_MAX) {
            let attempt = Attempt {
                provider: self.provider.clone(),
                attempt,
                verdict: verdict.to_owned(),
                detail: detail.chars().take(DETAIL_CHARS_MAX).collect(),
                events: part.iter().map(|range| (range.start, range.end)).collect(),
            };
            let Ok(permit) = self.permits.clone().try_acquire_owned() else { return };
            let _ = self.commands.send(Command::Attempted { at_ms, attempt, _permit: permit });
        }
    }

    /// Notes how events ended. What waits here is bounded by the events that a
    /// lane holds.
    pub(crate) fn ended(&self, outcome: Outcome, seqs: &[u64]) {
        self.ended_ranges(outcome, ranges(seqs));
    }

    /// Notes how ranges of events ended.
    pub(crate) fn ended_ranges(&self, outcome: Outcome, ranges: Vec<Range<u64>>) {
        let ended_as = outcome.key();
        // Without its thread the log notes nothing: the events go again.
        let _ = self.commands.send(Command::Ended { cursor: self.cursor, ended_as, ranges });
    }

    /// Notes a damaged range.
    pub(crate) fn damaged(&self, range: DamagedRange) {
        let _ = self.commands.send(Command::Damaged(range));
    }
}

/// Numbers as ranges, in order.
fn ranges(seqs: &[u64]) -> Vec<Range<u64>> {
    let mut seqs = seqs.to_vec();
    seqs.sort_unstable();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for seq in seqs {
        match ranges.last_mut() {
            Some(last) if last.end == seq => last.end += 1,
            _ => ranges.push(seq..seq + 1),
        }
    }
    ranges
}
