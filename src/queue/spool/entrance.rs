//! The way into a log: what admission holds.

use std::sync::{Arc, atomic::Ordering, mpsc};

use analytics_relay_providers::Event;
use tokio::sync::oneshot;

use super::{
    command::{Append, Command},
    frame::{Frame, Kind},
    settings::SpoolSettings,
    status::SharedStatus,
};
use crate::queue::{Durability, QueueLimits, Refused, Room, Row, Taken};

/// The entrance to a log; held by admission.
#[derive(Debug, Clone)]
pub(crate) struct Spool {
    commands: mpsc::Sender<Command>,
    default_level: Durability,
    intake: QueueLimits,
    status: Arc<SharedStatus>,
}

impl Spool {
    pub(super) fn new(
        commands: mpsc::Sender<Command>,
        settings: &SpoolSettings,
        status: Arc<SharedStatus>,
    ) -> Self {
        Self { commands, default_level: settings.default_level, intake: settings.intake, status }
    }

    /// The way to the thread.
    pub(super) fn commands(&self) -> &mpsc::Sender<Command> {
        &self.commands
    }

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
            self.status.leave(event_bytes);
            return Err(Refused::Full);
        }
        // Its frame counts too, but who is to be refused must not wait for it: so
        // what comes at the same moment may be too much by its frames.
        let frame = encode(&event, wanted);
        self.status.intake_bytes.fetch_add(frame.len(), Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        let mut waits = wanted > Durability::Queued;
        let row = row.map(|row| {
            // Behind one that may be refused it must not be answered yet.
            row.waits |= waits;
            waits = row.waits;
            row.refused.clone()
        });
        let append = Append { event, frame, wanted, row, answer: waits.then_some(answer) };
        if !waits {
            self.status.answer();
        }
        if let Err(mpsc::SendError(command)) = self.commands.send(Command::Append(append)) {
            if let Command::Append(append) = command {
                self.status.leave(append.memory_bytes());
            }
            if !waits {
                self.status.take_answered();
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

    /// See [`Queue::has_room_for`](crate::queue::Queue::has_room_for): room before the writer.
    pub(crate) fn has_room_for(&self, events: usize, bytes: usize) -> bool {
        let status = &self.status;
        let held =
            (status.intake_events.load(Ordering::Relaxed), status.intake_bytes.load(Ordering::Relaxed));
        !self.intake.is_full_for(held, (events, bytes))
    }

    /// Told when events leave for the log.
    pub(crate) fn room(&self) -> &Room {
        &self.status.room
    }

    /// See [`Queue::room_for`](crate::queue::Queue::room_for): room before the writer.
    pub(crate) async fn room_for(&self, events: usize, bytes: usize) {
        self.status.room.wait_while(|| !self.has_room_for(events, bytes)).await;
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
        is_sealed: false,
    };
    let mut bytes = Vec::with_capacity(frame.len());
    frame.encode_incomplete(&mut bytes);
    bytes
}
