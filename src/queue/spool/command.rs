//! What the log's thread is asked to do, by admission and by the lanes.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use analytics_relay_providers::Event;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{cursor::EndedAs, quarantine::DamagedRange};
use crate::queue::{Durability, Refused};

/// What the thread is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    Append(Append),
    /// For `explain`.
    Attempted {
        at_ms: i64,
        attempt: Attempt,
        _permit: OwnedSemaphorePermit,
    },
    /// How events ended at the provider of a cursor.
    Ended {
        cursor: usize,
        ended_as: EndedAs,
        ranges: Vec<Range<u64>>,
    },
    /// Damage that a reader met.
    Damaged(DamagedRange),
    /// Take no more events; answered when those before are in the queue.
    CloseIntake(oneshot::Sender<()>),
    /// Sync everything and end; answered with the events that are left, by
    /// cursor.
    Close(oneshot::Sender<Vec<u64>>),
}

/// An event to append.
#[derive(Debug)]
pub(crate) struct Append {
    pub(crate) event: Event,
    /// Encoded, without its number.
    pub(crate) frame: Vec<u8>,
    pub(crate) wanted: Durability,
    /// Why one before it in its row was refused, if one was.
    pub(crate) row: Option<Arc<OnceLock<Refused>>>,
    /// Gone if the caller was answered already.
    pub(crate) answer: Option<oneshot::Sender<Result<Durability, Refused>>>,
}

impl Append {
    /// Memory that it holds while it waits.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.event.memory_bytes() + self.frame.len()
    }
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
