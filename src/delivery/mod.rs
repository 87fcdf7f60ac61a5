//! One lane per provider: what happens to a batch after it left the batch
//! worker.
//!
//! A [`lane`] owns everything that one provider has not got yet. It keeps it in
//! a [`backlog`], a pure value that decides what goes into the next request; it
//! asks a [`gate`] what may be sent now, a [`doubt`] what a refusal is about, and
//! [`retry`] when to try again; and it ends each event in the ledger, in
//! [`dead_letter`]s, or, when the relay stops, in a [`spill`] file. What the log
//! holds for a provider that has no lane any more is looked after by [`unnamed`].

use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::error;

use crate::queue::Queued;

pub(crate) mod backlog;
pub(crate) mod dead_letter;
pub(crate) mod doubt;
pub(crate) mod gate;
pub(crate) mod lane;
pub(crate) mod recorder;
pub(crate) mod replay;
pub(crate) mod retry;
pub(crate) mod routes;
pub(crate) mod spill;
pub(crate) mod suspension;
pub(crate) mod unnamed;

/// Events that left the batch worker together, shared by all lanes.
pub(crate) type Batch = Arc<[Queued]>;

/// Events, in whole batches, that may wait before a lane looks at them. It looks
/// at once.
const INBOX_EVENTS_MAX: usize = 4000;

/// A lane's entrance; held by the batch worker. When the last one is dropped
/// the lane knows that nothing more will come.
#[derive(Debug, Clone)]
pub(crate) struct LaneInbox(mpsc::Sender<Batch>);

impl LaneInbox {
    /// Makes an entrance for batches of that size and the end that the lane
    /// holds.
    pub(crate) fn new(batch_events: usize) -> (Self, mpsc::Receiver<Batch>) {
        let (sender, receiver) = mpsc::channel((INBOX_EVENTS_MAX / batch_events).max(1));
        (Self(sender), receiver)
    }

    /// Hands a batch over.
    pub(crate) async fn send(&self, batch: Batch) {
        if self.0.send(batch).await.is_err() {
            // The balance will show these events as in flight for ever.
            error!("a defect: a lane ended before the batch worker");
        }
    }
}

#[cfg(test)]
pub(crate) mod test_support {
    use analytics_relay_providers::{Event, EventId, EventKind, EventParts, Properties};

    use super::*;
    use crate::queue::Place;

    pub(crate) fn inbox() -> (LaneInbox, mpsc::Receiver<Batch>) {
        LaneInbox::new(50)
    }

    pub(crate) fn queued(name: &str) -> Queued {
        Queued { event: track(name), place: Place::MEMORY }
    }

    pub(crate) fn track(name: &str) -> Event {
        track_of(name, "user-1")
    }

    pub(crate) fn track_of(name: &str, user: &str) -> Event {
        event(EventKind::Track { name }, user)
    }

    pub(crate) fn identify(user: &str) -> Event {
        event(EventKind::Identify, user)
    }

    pub(crate) fn group(group_id: &str, user: &str) -> Event {
        event(EventKind::Group { group_id }, user)
    }

    pub(crate) fn alias(previous_id: &str, user: &str) -> Event {
        event(EventKind::Alias { previous_id }, user)
    }

    /// The same event, accepted at another time.
    pub(crate) fn accepted_at(event: &Event, accepted_ms: i64) -> Event {
        Event::pack(&EventParts { accepted_ms, ..event.parts() })
    }

    fn event(kind: EventKind<'_>, user: &str) -> Event {
        Event::pack(&EventParts {
            id: EventId::assign(),
            kind,
            user_id: Some(user),
            anonymous_id: None,
            time_ms: 1_767_225_600_000,
            accepted_ms: 1_767_225_600_000,
            ip: None,
            user_agent: None,
            properties: Properties::empty(),
            more: None,
        })
    }
}
