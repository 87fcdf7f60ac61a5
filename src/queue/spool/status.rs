//! What others may see of a log while its thread is at work.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use tokio::sync::watch;

use super::{
    log::Log,
    settings::{SpoolSettings, WhenFull},
};
use crate::queue::Room;

/// What others may see of a log.
#[derive(Debug)]
pub(crate) struct SharedStatus {
    pub(crate) bytes: AtomicU64,
    pub(crate) segments: AtomicU64,
    pub(crate) unsynced_events: AtomicU64,
    pub(crate) damaged_ranges: AtomicU64,
    pub(crate) quarantine_bytes: AtomicU64,
    /// No event can be accepted because the disk fails.
    pub(crate) broken: watch::Sender<bool>,
    /// No event can be accepted because there is no room.
    pub(crate) full: AtomicBool,
    /// A provider's share is used up.
    pub(super) over_cap: AtomicBool,
    pub(crate) when_full: WhenFull,
    /// Providers that are named.
    named: usize,
    /// In the order of the log's cursors: those of the named providers first.
    pub(crate) cursors: Vec<CursorStatus>,
    pub(super) intake_events: AtomicUsize,
    pub(super) intake_bytes: AtomicUsize,
    /// Events that were answered and that the writer has not taken yet: they are in
    /// memory, and in no ledger.
    answered: AtomicUsize,
    pub(super) room: Room,
    /// The newest event that the queue had no room for.
    pub(super) skipped: watch::Sender<u64>,
}

impl SharedStatus {
    /// Of a log that was just opened.
    pub(super) fn new(log: &Log, settings: &SpoolSettings) -> Self {
        let (bytes, segments) = log.index().size();
        let cursor = |place: usize| {
            let file = &log.cursors()[place];
            CursorStatus {
                provider: file.provider.clone(),
                lowest: AtomicU64::new(file.cursor.lowest()),
                pending: AtomicU64::new(file.cursor.pending(log.next_seq())),
                bytes: AtomicU64::new(log.index().bytes_from(file.cursor.lowest())),
                bytes_max: settings
                    .provider_bytes_max
                    .get(place)
                    .map_or(u64::MAX, |max| settings.limits.bytes_max.min(*max)),
                is_filling: AtomicBool::new(false),
                is_forgotten: AtomicBool::new(false),
                surplus: watch::Sender::new(0),
            }
        };
        Self {
            bytes: AtomicU64::new(bytes),
            segments: AtomicU64::new(segments as u64),
            unsynced_events: AtomicU64::new(0),
            damaged_ranges: AtomicU64::new(log.damaged_ranges()),
            quarantine_bytes: AtomicU64::new(log.quarantine_status().bytes()),
            broken: watch::Sender::new(false),
            full: AtomicBool::new(false),
            over_cap: AtomicBool::new(false),
            when_full: settings.when_full,
            named: settings.provider_bytes_max.len(),
            cursors: (0..log.cursors().len()).map(cursor).collect(),
            intake_events: AtomicUsize::new(0),
            intake_bytes: AtomicUsize::new(0),
            answered: AtomicUsize::new(0),
            room: Room::default(),
            skipped: watch::Sender::new(0),
        }
    }

    /// Changes when the queue had no room for an event: its number.
    pub(super) fn skipped(&self) -> watch::Receiver<u64> {
        self.skipped.subscribe()
    }

    /// The state in which events are accepted.
    pub(crate) const WRITING: &'static str = "writing";
    /// All states.
    pub(crate) const STATES: [&'static str; 3] = [Self::WRITING, "full", "failed"];

    /// Events that a power cut would lose, at most: those on their way to the
    /// disk included.
    pub(crate) fn events_at_risk(&self) -> u64 {
        self.unsynced_events.load(Ordering::Relaxed) + self.intake_events.load(Ordering::Relaxed) as u64
    }

    /// Providers that are named.
    pub(crate) fn named(&self) -> &[CursorStatus] {
        &self.cursors[..self.named]
    }

    /// Providers that are not named, and whose events are in the log.
    pub(crate) fn unnamed(&self) -> &[CursorStatus] {
        &self.cursors[self.named..]
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

    /// Events that were answered and that the writer has not taken yet.
    pub(crate) fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// An event is answered before the writer takes it.
    pub(super) fn answer(&self) {
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    /// The writer has taken it, and it is counted.
    pub(super) fn take_answered(&self) {
        self.answered.fetch_sub(1, Ordering::Relaxed);
    }

    /// An event leaves the writer's hands, with the memory that it held.
    pub(super) fn leave(&self, bytes: usize) {
        self.intake_events.fetch_sub(1, Ordering::Relaxed);
        self.intake_bytes.fetch_sub(bytes, Ordering::Relaxed);
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
    /// Most of them: its own share, or the whole log.
    pub(crate) bytes_max: u64,
    /// More than half of that is used up.
    pub(crate) is_filling: AtomicBool,
    is_forgotten: AtomicBool,
    surplus: watch::Sender<u64>,
}

impl CursorStatus {
    /// Changes when the oldest events must make room: the number of the first
    /// that may stay.
    pub(super) fn surplus(&self) -> watch::Receiver<u64> {
        self.surplus.subscribe()
    }

    /// True once its cursor is gone: nothing in the log is for it any more.
    pub(crate) fn is_forgotten(&self) -> bool {
        self.is_forgotten.load(Ordering::Relaxed)
    }

    pub(super) fn forget(&self) {
        self.is_forgotten.store(true, Ordering::Relaxed);
        // Wakes whoever looks after it.
        self.give_up(u64::MAX);
    }

    /// The share that its backlog takes of what it may.
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    pub(crate) fn share(&self) -> f64 {
        self.bytes.load(Ordering::Relaxed) as f64 / self.bytes_max as f64
    }

    /// Notes the bytes of its backlog. Returns true if it has begun to fill its
    /// share: more than half is used up, and not long ago less was.
    pub(super) fn set_bytes(&self, bytes: u64) -> bool {
        self.bytes.store(bytes, Ordering::Relaxed);
        let was_filling = self.is_filling.load(Ordering::Relaxed);
        let fills_from = if was_filling { self.bytes_max / 5 * 2 } else { self.bytes_max / 2 };
        let is_filling = bytes > fills_from;
        self.is_filling.store(is_filling, Ordering::Relaxed);
        is_filling && !was_filling
    }

    pub(super) fn give_up(&self, seq: u64) {
        self.surplus.send_if_modified(|surplus| std::mem::replace(surplus, seq) != seq);
    }
}
