//! How events come into a lane.

use std::panic::{AssertUnwindSafe, catch_unwind};

use analytics_relay_providers::Endpoint;
use tracing::error;

use super::{Lane, Line, letters::Dead};
use crate::{
    delivery::{Batch, spill::Spilled},
    queue::{Place, Queued, spool::reader::Chunk},
    reasons::{DeadLetterReason, DropReason, Outcome},
};

/// Memory of events that a lane reads ahead, about: a backlog of any size is
/// delivered with no more.
const READ_AHEAD_BYTES: usize = 6 * 1024 * 1024;
/// What a full lane holds beyond its capacity, in events that become dead letters and
/// wait for their disk: a share of it, and enough for a disk that is quick.
const OVERFLOW_SHARE: usize = 4;
const OVERFLOW_EVENTS_MIN: usize = 10_000;
const OVERFLOW_BYTES_MIN: usize = 8 * 1024 * 1024;

impl Lane {
    /// Takes in what an earlier run left, before anything new.
    pub(crate) fn reload(&mut self, spilled: Spilled) {
        self.reloaded = super::Reloaded { left: spilled.events.len(), files: spilled.files };
        for event in spilled.events {
            self.push(Queued { event, place: Place::SPILL_FILE });
        }
        self.finish_reloaded(0);
    }

    pub(super) fn take_in(&mut self, batches: &mut Vec<Batch>) {
        let mut overflow = 0;
        for queued in batches.drain(..).flat_map(|batch| batch.to_vec()) {
            let has_room = self.has_room(queued.event.memory_bytes());
            let Some(queued) = self.source.take(queued, has_room) else { continue };
            if has_room {
                self.push(queued);
            } else {
                self.overflow(queued);
                overflow += 1;
            }
        }
        if overflow > 0 && !self.full && self.lines.take(Line::Full, overflow) {
            error!(
                provider = self.provider.name(),
                lane_events = self.backlog.events(),
                "lane is full: new events become dead letters"
            );
        }
        self.full = overflow > 0;
    }

    /// There is no room: the event becomes a dead letter.
    fn overflow(&mut self, Queued { event, place }: Queued) {
        let capacity = self.settings.capacity;
        let more_events = (capacity.events_max / OVERFLOW_SHARE).max(OVERFLOW_EVENTS_MIN);
        let events_max = capacity.events_max.saturating_add(more_events);
        let more_bytes = (capacity.bytes_max / OVERFLOW_SHARE).max(OVERFLOW_BYTES_MIN);
        let bytes_max = capacity.bytes_max.saturating_add(more_bytes);
        if self.backlog.events() >= events_max || self.backlog.bytes() >= bytes_max {
            return self.drop_events(DropReason::DeadLettersStalled, 1);
        }
        let detail = format!("{} events waited", self.backlog.events());
        let waiting = self.backlog.push_out(event, place);
        let (endpoint, reason) = (Endpoint::DEFAULT, DeadLetterReason::LaneFull);
        self.letters.push([Dead { endpoint, waiting, reason, detail }]);
    }

    fn has_room(&self, bytes: usize) -> bool {
        let capacity = self.settings.capacity;
        self.backlog.events() < capacity.events_max && self.backlog.bytes() + bytes <= capacity.bytes_max
    }

    /// Reads on in the log, as long as there is less to send than requests can
    /// take, and little in memory. Where nothing can be sent, because all of it
    /// waits for something, as much as the lane may hold.
    pub(super) fn read_on(&mut self) {
        let is_little = self.backlog.bytes() < READ_AHEAD_BYTES || self.backlog.ready_events() == 0;
        if self.draining || !is_little || !self.has_room(0) {
            return;
        }
        let wanted = self.limits.events_max.saturating_mul(self.limits.requests_max);
        let room = self.settings.capacity.events_max - self.backlog.events();
        self.source.read_on(wanted.saturating_sub(self.backlog.ready_events()).min(room));
    }

    pub(super) fn take_chunk(&mut self, chunk: Chunk) {
        let recent = self.source.take_read(&chunk);
        for logged in chunk.events {
            self.push(Queued { event: logged.event, place: Place::log(logged.seq) });
        }
        recent.for_each(|queued| self.push(queued));
        let lost: u64 = chunk.missing.iter().map(|range| range.end - range.start).sum();
        if let Some(reports) = self.source.reports() {
            chunk.damaged.into_iter().for_each(|range| reports.damaged(range));
            if lost > 0 {
                reports.ended_ranges(Outcome::Dropped(DropReason::SpoolDamaged), chunk.missing);
            }
        }
        if lost > 0 {
            self.drop_events(DropReason::SpoolDamaged, usize::try_from(lost).unwrap_or(usize::MAX));
        }
    }

    pub(super) fn push(&mut self, Queued { event, place }: Queued) {
        // The provider's own code: a panic in it must not end the lane.
        let endpoint = catch_unwind(AssertUnwindSafe(|| self.provider.endpoint(&event)));
        self.backlog.push(event, endpoint.unwrap_or(Endpoint::DEFAULT), place);
    }
}
