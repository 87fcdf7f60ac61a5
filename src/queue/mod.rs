//! Between the front doors and the batch worker: a bounded queue in memory, and
//! under it, if the relay is durable, a write-ahead log.
//!
//! [`memory`] is the channel that every event goes through. [`spool`] writes an
//! event to disk first and offers it to the channel then; what the channel has
//! no room for, the lanes read from the log.

use std::{
    fmt,
    pin::pin,
    sync::{Arc, OnceLock},
};

use analytics_relay_providers::Event;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{Notify, futures::Notified, oneshot};

pub(crate) mod memory;
pub(crate) mod spool;

use memory::QueueSender;
use spool::{Spool, frame::SEQ_MAX};

use crate::settings::Reader;

/// How far an event has come when its caller is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Durability {
    /// In a bounded queue in memory.
    Queued = 1,
    /// Written to the log: survives the death of the process.
    Written = 2,
    /// Synced to the disk: survives the death of the machine.
    Synced = 3,
}

impl Durability {
    /// The level of a number in a file.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [Self::Queued, Self::Written, Self::Synced].into_iter().find(|level| *level as u8 == number)
    }

    pub(crate) fn read(reader: &mut Reader) -> Self {
        let levels = [("memory", Self::Queued), ("written", Self::Written), ("synced", Self::Synced)];
        reader.one_of("DURABILITY", &levels)
    }

    /// The level's name in logs and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Written => "written",
            Self::Synced => "synced",
        }
    }
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How much a queue holds at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Most events.
    pub events_max: usize,
    /// Most bytes of memory that its events hold.
    pub bytes_max: usize,
}

impl QueueLimits {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        Self {
            events_max: reader.number("QUEUE_MAX_EVENTS", 1..=10_000_000),
            bytes_max: reader.number("QUEUE_MAX_BYTES", 65_536..=1 << 36),
        }
    }

    /// Whether events may find no room beside what is held; each is a number of
    /// events and of bytes. For what is large half of the queue is enough.
    fn is_full_for(&self, held: (usize, usize), wanted: (usize, usize)) -> bool {
        let over =
            |held: usize, wanted: usize, max: usize| held.saturating_add(wanted.min((max / 2).max(1))) > max;
        over(held.0, wanted.0, self.events_max) || over(held.1, wanted.1, self.bytes_max)
    }
}

/// Where those wait for whom a queue has no room.
#[derive(Debug, Default)]
pub(crate) struct Room(Notify);

impl Room {
    /// Events have left, or nobody needs to wait any more.
    pub(crate) fn changed(&self) {
        self.0.notify_waiters();
    }

    /// Ends when events have left since this was enabled.
    pub(crate) fn some_left(&self) -> Notified<'_> {
        self.0.notified()
    }

    /// Waits while there is none.
    pub(crate) async fn wait_while(&self, is_full: impl Fn() -> bool) {
        loop {
            let mut told = pin!(self.0.notified());
            told.as_mut().enable();
            if !is_full() {
                return;
            }
            told.await;
        }
    }
}

/// Why a queue did not take an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It holds as much as it may.
    Full,
    /// The log has used up its bytes, or the disk is full.
    SpoolFull,
    /// The log cannot be written. Whether the event is in it is not known.
    SpoolFailed,
    /// It is closed: the relay is stopping.
    Closed,
}

/// Where an event is kept while it waits to be delivered. One number, because every
/// event that waits has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place(u64);

impl Place {
    /// In memory only.
    pub(crate) const MEMORY: Self = Self(u64::MAX);
    /// In a spill file of an earlier run.
    pub(crate) const SPILL_FILE: Self = Self(u64::MAX - 1);

    /// In the log, with this number.
    pub(crate) fn log(seq: u64) -> Self {
        assert!(seq <= SEQ_MAX, "the log gives no such number");
        Self(seq)
    }

    /// Its number, if it is in the log.
    pub(crate) fn log_seq(self) -> Option<u64> {
        Some(self.0).filter(|seq| *seq <= SEQ_MAX)
    }
}

/// Events that are put one behind the other and must not change places: when one
/// is refused, those behind it are too, so that all of them can be put again.
#[derive(Debug, Default)]
pub(crate) struct Row {
    refused: Arc<OnceLock<Refused>>,
    /// One of them waits for the disk, and may still be refused.
    waits: bool,
}

/// An event that was taken, and may have to become durable yet. Dropping it does
/// not take the event back.
#[derive(Debug)]
pub(crate) enum Taken {
    /// It is in memory, and no more was wanted.
    Done,
    /// The log will say.
    Appended(oneshot::Receiver<Result<Durability, Refused>>),
}

impl Taken {
    /// Waits for the disk, if it has to, and returns how durable the event is.
    pub(crate) async fn durable(self) -> Result<Durability, Refused> {
        match self {
            Self::Done => Ok(Durability::Queued),
            Self::Appended(answer) => answer.await.unwrap_or(Err(Refused::SpoolFailed)),
        }
    }
}

/// An event in the queue.
#[derive(Debug, Clone)]
pub(crate) struct Queued {
    pub(crate) event: Event,
    pub(crate) place: Place,
}

/// The way in; held by admission.
#[derive(Debug, Clone)]
pub(crate) enum Queue {
    /// Into memory. Counts what it takes.
    Memory(QueueSender, Counter),
    /// Into the log, then into memory.
    Spool(Spool),
}

impl Queue {
    /// Takes an event, to be at least as durable as `wanted`, or refuses it; in a
    /// row, refuses it also if one before it is. Never waits; events keep the
    /// order in which they were put.
    pub(crate) fn put(
        &self,
        event: Event,
        wanted: Durability,
        row: Option<&mut Row>,
    ) -> Result<Taken, Refused> {
        match self {
            Self::Memory(queue, accepted) => {
                queue.offer(Queued { event, place: Place::MEMORY })?;
                accepted.inc();
                Ok(Taken::Done)
            }
            Self::Spool(spool) => spool.append(event, wanted, row),
        }
    }

    /// True if so many events of so many bytes may find room now. For what is large half
    /// of the queue is enough.
    pub(crate) fn has_room_for(&self, events: usize, bytes: usize) -> bool {
        match self {
            Self::Memory(queue, _) => queue.has_room_for(events, bytes),
            Self::Spool(spool) => spool.has_room_for(events, bytes),
        }
    }

    /// Where those wait for whom it has none.
    pub(crate) fn room(&self) -> &Room {
        match self {
            Self::Memory(queue, _) => queue.room(),
            Self::Spool(spool) => spool.room(),
        }
    }

    /// Waits until so many events of so many bytes may find room; others may take
    /// it meanwhile.
    pub(crate) async fn room_for(&self, events: usize, bytes: usize) {
        match self {
            Self::Memory(queue, _) => queue.room_for(events, bytes).await,
            Self::Spool(spool) => spool.room_for(events, bytes).await,
        }
    }

    /// Events that wait in it, or, with a log, to be written.
    pub(crate) fn events(&self) -> usize {
        match self {
            Self::Memory(queue, _) => queue.events(),
            Self::Spool(spool) => spool.intake_events(),
        }
    }

    /// The level that a caller gets who asks for none.
    pub(crate) fn default_level(&self) -> Durability {
        match self {
            Self::Memory(..) => Durability::Queued,
            Self::Spool(spool) => spool.default_level(),
        }
    }

    /// The highest level that a caller can ask for.
    pub(crate) fn highest_level(&self) -> Durability {
        match self {
            Self::Memory(..) => Durability::Queued,
            Self::Spool(_) => Durability::Synced,
        }
    }
}
