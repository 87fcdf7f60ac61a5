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
//! - [`sealed`] says what is hidden of a frame, if it is, and [`head`] where a segment has its
//!   key. Nothing but the end of an event's way through a log needs one.
//! - [`log`] is the log as a value: appending, recovery, cursors, removal.
//! - [`writer`] is the one thread that owns the files: group commit. It is
//!   asked by [`command`]s, and what others may see of it is in [`status`].
//! - [`entrance`] is what admission holds, [`lane_log`] and [`reports`] what a
//!   lane does.
//! - [`scan`] and [`reader`] read; [`index`] tells them how far they may.
//! - [`fs`] is the seam to the file system, [`layout`] where the files are.
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
    io,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
};

use tokio::sync::oneshot;
use tracing::{info, warn};

pub(crate) mod command;
pub(crate) mod cursor;
mod entrance;
mod error;
pub(crate) mod frame;
pub(crate) mod fs;
pub(crate) mod head;
pub(crate) mod index;
pub(crate) mod inspect;
mod lane_log;
pub(crate) mod layout;
mod lock;
pub(crate) mod log;
#[cfg(any(test, fuzzing))]
pub(crate) mod model;
pub(crate) mod quarantine;
pub(crate) mod reader;
mod reports;
pub(crate) mod scan;
pub(crate) mod sealed;
#[cfg(test)]
mod sealed_tests;
pub(crate) mod settings;
#[cfg(any(test, fuzzing))]
pub(crate) mod sim;
mod status;
mod syncer;
#[cfg(test)]
mod tests;
mod writer;

use self::{
    command::Command,
    fs::{RealFs, SpoolFs},
    layout::LogDirs,
    lock::SpoolLock,
    log::{Log, Recovery},
    reader::LogReader,
    writer::Writer,
};
pub(crate) use self::{
    entrance::Spool,
    lane_log::{LaneLog, LogView},
    reports::LaneReports,
    settings::SpoolSettings,
    status::{CursorStatus, SharedStatus},
};
pub use self::{error::SpoolError, settings::WhenFull};
use super::memory::QueueSender;
use crate::{
    ledger::Ledger,
    telemetry::SpoolMetrics,
    time::{Clock, WallCheck},
};

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
        let (log, recovery) =
            Log::open(fs.clone(), &dirs, settings.limits, &settings.keys, providers, now_ms)?;
        info!(
            dir = %settings.dir.display(),
            next_seq = log.next_seq(),
            torn_bytes = recovery.torn_bytes,
            damaged_ranges = log.damaged_ranges(),
            "spool opened"
        );
        warn_of_cursors(&log, &recovery, providers.len());
        let status = Arc::new(SharedStatus::new(&log, &settings));
        let (sender, commands) = mpsc::channel();
        let spool = Spool::new(sender, &settings, status);
        Ok(Self { log, fs, dirs, settings, lock, commands, spool })
    }

    /// The entrance.
    pub(crate) fn spool(&self) -> &Spool {
        &self.spool
    }

    /// The log as one provider sees it, by its place among the cursors: the named
    /// ones come first, in their order.
    pub(crate) fn lane_log(&self, place: usize) -> LaneLog {
        let file = &self.log.cursors()[place];
        let reader = || LogReader::new(self.fs.clone(), self.dirs.clone(), self.log.index().clone());
        let surplus = self.spool.status().cursors[place].surplus();
        LaneLog {
            done: file.cursor.clone(),
            recovered_seq: self.log.next_seq(),
            index: self.log.index().clone(),
            reader: reader(),
            second_reader: reader(),
            reports: LaneReports::new(file.provider.clone(), place, self.spool.commands().clone()),
            skipped: self.spool.status().skipped(),
            surplus,
            wall: WallCheck::of_log(self.log.last_seen_ms(), self.settings.retention),
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
        let writer = Writer::new(log, settings, queue, ledgers, spool.status().clone(), metrics, clock);
        let running = thread::Builder::new().name("spool".to_owned()).spawn(move || {
            let _watched = watched;
            writer.run(&commands);
            drop(lock);
        })?;
        Ok(SpoolThread { commands: spool.commands().clone(), running })
    }
}

/// Says which cursors were not there, and which belong to nobody.
fn warn_of_cursors(log: &Log, recovery: &Recovery, named: usize) {
    let (next_seq, oldest_seq) = (log.next_seq(), log.index().oldest_seq());
    for provider in recovery.new_cursors.iter().filter(|_| next_seq > oldest_seq) {
        let event_count = next_seq - oldest_seq;
        warn!(provider, event_count, "no cursor: the provider gets everything that is in the spool");
    }
    for file in &log.cursors()[named..] {
        let (provider, event_count) = (&file.provider, file.cursor.pending(next_seq));
        warn!(
            provider,
            event_count,
            "the spool keeps events of a provider that is not named: name it, or have it forgotten"
        );
    }
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
