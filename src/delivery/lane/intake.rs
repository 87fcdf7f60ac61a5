//! How events come into a lane.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
};

use analytics_relay_providers::{Endpoint, Event};
use tokio::time::Instant;
use tracing::error;

use super::{Lane, Line, aside::Aside, letters::Dead};
use crate::{
    delivery::{
        Batch,
        gate::Gate,
        routes::{Flow, Route},
        spill::Spilled,
    },
    queue::{Place, QueueLimits, Queued, spool::reader::Chunk},
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

/// Events that are not for the provider, or of nobody any more: how they end, and where
/// they are kept.
type PassedOver = Vec<(Outcome, Place)>;

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
        let (mut overflow, mut passed_over) = (0, PassedOver::default());
        let limited = self.limited_routes();
        for queued in batches.drain(..).flat_map(|batch| batch.to_vec()) {
            let (flow, bytes) = (self.flow_of(&queued.event), queued.event.memory_bytes());
            let (has_room, is_aside) = match flow {
                Ok(flow) => {
                    let is_beyond_share = self.is_beyond_share(flow, bytes, &limited);
                    let stays = self.is_left_aside(queued.place, flow, is_beyond_share);
                    let has_room = !stays && !is_beyond_share && self.has_room(bytes);
                    (has_room, stays && self.has_aside_room())
                }
                // It needs none.
                Err(_) => (true, false),
            };
            let Some(queued) = self.source.take(queued, has_room || is_aside) else { continue };
            match flow {
                Ok(flow) if has_room || is_aside => self.admit(queued, flow, is_aside),
                Ok(flow) => {
                    self.overflow(queued, flow);
                    overflow += 1;
                }
                Err(why) => passed_over.push((why, queued.place)),
            }
        }
        if overflow > 0 && !self.full && self.lines.take(Line::Full, overflow) {
            error!(
                provider = self.provider.name(),
                lane_events = self.backlog.load().events,
                "lane is full: new events become dead letters"
            );
        }
        self.full = overflow > 0;
        self.pass_over(passed_over);
    }

    /// Ends events that are not for the provider.
    fn pass_over(&mut self, passed_over: PassedOver) {
        if passed_over.is_empty() {
            return;
        }
        let mut by_outcome: HashMap<Outcome, Vec<Place>> = HashMap::new();
        for (outcome, place) in passed_over {
            by_outcome.entry(outcome).or_default().push(place);
        }
        for (outcome, places) in by_outcome {
            match outcome {
                Outcome::NotFor(reason) => self.recorder.not_for(reason, places.len()),
                _ => self.tell_erased(places.len()),
            }
            let logged: Vec<u64> = places.iter().filter_map(|place| place.log_seq()).collect();
            self.source.ended(outcome, &logged);
            self.finish_reloaded(places.iter().filter(|place| **place == Place::SPILL_FILE).count());
        }
    }

    /// There is no room: the event becomes a dead letter.
    fn overflow(&mut self, Queued { event, place }: Queued, flow: Flow) {
        let capacity = self.settings.capacity;
        let more_events = (capacity.events_max / OVERFLOW_SHARE).max(OVERFLOW_EVENTS_MIN);
        let events_max = capacity.events_max.saturating_add(more_events);
        let more_bytes = (capacity.bytes_max / OVERFLOW_SHARE).max(OVERFLOW_BYTES_MIN);
        let bytes_max = capacity.bytes_max.saturating_add(more_bytes);
        let load = self.backlog.load();
        if load.events >= events_max || load.bytes >= bytes_max {
            return self.drop_events(DropReason::DeadLettersStalled, 1);
        }
        let detail = format!("{} events waited", load.events);
        let waiting = self.backlog.push_out(event, flow, place);
        self.letters.push([Dead { waiting, reason: DeadLetterReason::LaneFull, detail }]);
    }

    fn has_room(&self, bytes: usize) -> bool {
        let (capacity, load) = (self.settings.capacity, self.backlog.load());
        load.events < capacity.events_max && load.bytes + bytes <= capacity.bytes_max
    }

    /// Routes on which nothing gets through while it does on another one. What goes by
    /// them has a share of the lane and no more: the rest is for the others.
    fn limited_routes(&self) -> Vec<Route> {
        // Not itself: what was under way when it refused may be answered later.
        let others_work = |route: Route, since| {
            self.gates.iter().any(|(other, gate)| *other != route && gate.delivered_after(since))
        };
        let is_limited =
            |route: Route, gate: &Gate| gate.barred_since().is_some_and(|since| others_work(route, since));
        self.gates.iter().filter(|(route, gate)| is_limited(**route, gate)).map(|(route, _)| *route).collect()
    }

    /// True for one more event, of so many bytes, than a flow may have in memory.
    #[inline]
    fn is_beyond_share(&self, flow: Flow, bytes: usize, limited: &[Route]) -> bool {
        if limited.is_empty() || !limited.contains(&self.backlog.route_of(flow)) {
            return false;
        }
        let (share, load) = (self.share(), self.backlog.load_of(flow));
        load.events >= share.events_max || load.bytes + bytes > share.bytes_max
    }

    /// What a flow may have in memory that does not get through while others do.
    fn share(&self) -> QueueLimits {
        let capacity = self.settings.capacity;
        QueueLimits { events_max: capacity.events_max / 2, bytes_max: capacity.bytes_max / 2 }
    }

    /// True for an event that stays in the log for now: see [`super::aside`]. However many
    /// there are, for none may overtake them: when they are enough, nothing is read on.
    #[inline]
    fn is_left_aside(&self, place: Place, flow: Flow, is_beyond_share: bool) -> bool {
        place.log_seq().is_some()
            && (!self.asides.is_empty() && self.asides.contains_key(&flow)
                || is_beyond_share && self.has_aside_room())
    }

    fn has_aside_room(&self) -> bool {
        self.asides.values().map(Aside::len).sum::<usize>() < self.settings.aside_events_max
    }

    /// Reads on in the log, as long as there is less to send than requests can
    /// take, and little in memory. Where nothing can be sent, because all of it
    /// waits for something, as much as the lane may hold.
    pub(super) fn read_on(&mut self, now: Instant) {
        if self.draining || self.source.is_reading() {
            return;
        }
        let limited = self.limited_routes();
        let is_limited = |flow: &Flow| limited.contains(&self.backlog.route_of(*flow));
        let ready = self.backlog.ready_events(|route| !limited.contains(&route));
        let waits = self.backlog.flows().filter(is_limited).map(|flow| self.backlog.load_of(flow).bytes);
        let bytes = self.backlog.load().bytes - waits.sum::<usize>();
        let wanted = self.limits.events_max.saturating_mul(self.limits.requests_max).saturating_sub(ready);
        let room = self.settings.capacity.events_max.saturating_sub(self.backlog.load().events);
        let is_little = (bytes < READ_AHEAD_BYTES || ready == 0) && self.has_room(0);
        let events_max = if is_little { wanted.min(room) } else { 0 };

        // They are older than what comes next.
        let aside = self.asides.iter().find_map(|(flow, aside)| {
            let events_max = if is_limited(flow) { self.room_in_share(*flow) } else { events_max };
            Some((*flow, aside.first()?, events_max)).filter(|(.., events_max)| *events_max > 0)
        });
        if let Some((flow, seq, events_max)) = aside {
            self.source.read_aside(flow, seq, events_max, now);
        } else if self.has_aside_room() {
            self.source.read_on(events_max, now);
        }
    }

    /// Events that are read again of a flow that still does not get through: not before
    /// half of its share is free, so that there are not many small reads.
    fn room_in_share(&self, flow: Flow) -> usize {
        let (share, load) = (self.share(), self.backlog.load_of(flow));
        let is_low = load.events <= share.events_max / 2 && load.bytes <= share.bytes_max / 2;
        if is_low { (share.events_max - load.events).max(1) } else { 0 }
    }

    pub(super) fn take_chunk(&mut self, mut chunk: Chunk) {
        let recent = self.source.take_read(&chunk);
        let read = std::mem::take(&mut chunk.events).into_iter();
        let read = read.map(|logged| Queued { event: logged.event, place: Place::log(logged.seq) });
        let limited = self.limited_routes();
        let mut passed_over = PassedOver::default();
        for queued in read.chain(recent) {
            let flow = match self.flow_of(&queued.event) {
                Ok(flow) => flow,
                Err(why) => {
                    passed_over.push((why, queued.place));
                    continue;
                }
            };
            let is_beyond_share = self.is_beyond_share(flow, queued.event.memory_bytes(), &limited);
            let is_aside = self.is_left_aside(queued.place, flow, is_beyond_share);
            self.admit(queued, flow, is_aside);
        }
        self.pass_over(passed_over);
        let missing = chunk.take_missing();
        if let Some(reports) = self.source.reports() {
            chunk.damaged.into_iter().for_each(|range| reports.damaged(range));
        }
        for (why, seqs) in missing {
            let lost: u64 = seqs.iter().map(|range| range.end - range.start).sum();
            if let Some(reports) = self.source.reports() {
                reports.ended_ranges(Outcome::Dropped(why), seqs);
            }
            self.drop_events(why, usize::try_from(lost).unwrap_or(usize::MAX));
        }
    }

    /// What had been left aside is in memory, as far as the log still holds it.
    pub(super) fn take_aside(&mut self, flow: Flow, mut chunk: Chunk) {
        let Some(mut aside) = self.asides.remove(&flow) else { return };
        let mut erased = PassedOver::default();
        for logged in std::mem::take(&mut chunk.events) {
            let place = Place::log(logged.seq);
            match aside.has(logged.seq) {
                true if self.is_erased(&logged.event) => {
                    erased.push((Outcome::Dropped(DropReason::Erased), place));
                }
                true => self.backlog.push(logged.event, flow, place),
                false => {}
            }
        }
        self.pass_over(erased);
        let mut lost: Vec<(DropReason, Vec<u64>)> = Vec::new();
        for (why, ranges) in chunk.take_missing() {
            let seqs: Vec<u64> = ranges.into_iter().flat_map(|range| aside.within(range)).collect();
            lost.extend((!seqs.is_empty()).then_some((why, seqs)));
        }
        aside.read(chunk.next_seq);
        if aside.is_empty() {
            self.source.close_if_caught_up();
        } else {
            self.asides.insert(flow, aside);
        }
        if lost.is_empty() {
            return;
        }
        if let Some(reports) = self.source.reports() {
            chunk.damaged.into_iter().for_each(|range| reports.damaged(range));
            lost.iter().for_each(|(why, seqs)| reports.ended(Outcome::Dropped(*why), seqs));
        }
        lost.into_iter().for_each(|(why, seqs)| self.drop_events(why, seqs.len()));
    }

    #[inline]
    fn admit(&mut self, Queued { event, place }: Queued, flow: Flow, is_aside: bool) {
        match place.log_seq().filter(|_| is_aside) {
            Some(seq) => self.asides.entry(flow).or_default().leave(seq),
            None => self.backlog.push(event, flow, place),
        }
    }

    pub(super) fn push(&mut self, Queued { event, place }: Queued) {
        match self.flow_of(&event) {
            Ok(flow) => self.backlog.push(event, flow, place),
            Err(why) => self.pass_over(vec![(why, place)]),
        }
    }

    /// Where an event goes, or how it ends at once, because it is not for the provider. By
    /// the provider's own code: a panic in it must not end the lane.
    #[inline(always)]
    fn flow_of(&self, event: &Event) -> Result<Flow, Outcome> {
        if self.is_erased(event) {
            return Err(Outcome::Dropped(DropReason::Erased));
        }
        if let Some(why) = event.why_not_for(self.provider.name()) {
            return Err(Outcome::NotFor(why));
        }
        let endpoint = catch_unwind(AssertUnwindSafe(|| self.provider.endpoint(event)));
        let endpoint = endpoint.unwrap_or(Ok(Endpoint::DEFAULT)).map_err(Outcome::NotFor)?;
        Ok(Flow::of(event, endpoint))
    }
}
