//! Everything that one provider has not got yet, and what goes into the next
//! request. A pure value that takes time as an argument.
//!
//! Each event is in one of five places: *ready*, in the order of arrival and by
//! route; *held* until a time; *blocked* behind another event of its user; a *suspect*,
//! which may be to blame for a refusal; or *out*, in a request that is under way. A
//! request takes ready events from the front, up to the provider's limits in count and
//! bytes, which merges what has waited.
//!
//! **Order.** An identify is not taken while an earlier one of the same user is
//! held, accused or out in another request, so an older trait never overwrites a newer
//! one; nor is an alias, or a group of the same group. Tracks carry their own time and
//! need no order.
//!
//! **Throttling.** While the provider holds one of a user's events back, all of
//! that user's events wait with it: they would only be refused too.
//!
//! **Splitting.** Events of a request that was too large come back with
//! `together_max`, half of their number, and a request is never larger than any
//! of its events allows. So a poisonous event is alone after log2 n rounds while
//! the others get through, in at most 2n - 1 requests.
//!
//! **Suspects.** An event that is accused goes alone, and only when there is room
//! beside the others: it never stands before them.
//!
//! **Apart.** A flow that the provider refuses is kept apart from the others of its
//! endpoint: it has a route of its own until the provider takes it.

use std::collections::{BTreeMap, VecDeque};

use analytics_relay_providers::{BatchLimits, Endpoint, Event};
use tokio::time::Instant;

use super::routes::{Flow, Route};
use crate::queue::Place;

mod busy;
mod loads;
#[cfg(test)]
mod tests;
mod waiting;

pub(crate) use loads::Load;
pub(crate) use waiting::{Arrival, Waiting, in_order};

use busy::BusyUsers;
use loads::Loads;

/// Room that is made for ready events at least.
const ROOM_MIN: usize = 64;

/// How many of a route's events may go now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Allowance {
    /// As many from the front.
    UpTo(usize),
    /// A suspect, if there is one; else as many from the front.
    SuspectOrUpTo(usize),
    /// One, from that share of the way to the back: where the first ones are
    /// refused, another one may not be. A suspect only if there is nothing else.
    OneAt(f64),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Backlog {
    limits: BatchLimits,
    /// By route, each sorted by arrival.
    ready: BTreeMap<Route, VecDeque<Waiting>>,
    suspects: BTreeMap<Route, VecDeque<Waiting>>,
    /// What is kept apart at its endpoint: a few.
    apart: Vec<Flow>,
    held: BTreeMap<(Instant, Arrival), Waiting>,
    busy: BusyUsers,
    /// When each event that is held, blocked or a suspect was accepted.
    not_ready: BTreeMap<Arrival, i64>,
    arrived: u64,
    /// Of events that have not ended.
    loads: Loads,
}

impl Backlog {
    pub(crate) fn new(limits: BatchLimits) -> Self {
        Self {
            limits,
            ready: BTreeMap::new(),
            suspects: BTreeMap::new(),
            apart: Vec::new(),
            held: BTreeMap::new(),
            busy: BusyUsers::default(),
            not_ready: BTreeMap::new(),
            arrived: 0,
            loads: Loads::default(),
        }
    }

    /// Adds an event behind all others.
    pub(crate) fn push(&mut self, event: Event, flow: Flow, place: Place) {
        let waiting = self.count_in(event, flow, place);
        let ready = self.ready.entry(self.route_of(flow)).or_default();
        if ready.len() == ready.capacity() {
            // Doubling would leave up to half of a large backlog's room empty.
            ready.reserve_exact(ready.len() / 8 + ROOM_MIN);
        }
        ready.push_back(waiting);
    }

    /// Adds an event that is not to be sent. It counts as out.
    pub(crate) fn push_out(&mut self, event: Event, flow: Flow, place: Place) -> Waiting {
        let waiting = self.count_in(event, flow, place);
        self.busy.mark(&waiting);
        waiting
    }

    #[inline]
    fn count_in(&mut self, event: Event, flow: Flow, place: Place) -> Waiting {
        let arrival = Arrival::new(self.arrived, flow);
        self.arrived += 1;
        let waiting = Waiting { event, arrival, place, history: None };
        self.loads.add(&waiting);
        waiting
    }

    /// The way that events of a flow go now.
    #[inline]
    pub(crate) fn route_of(&self, flow: Flow) -> Route {
        if self.apart.contains(&flow) { flow.apart() } else { Route::to(flow.endpoint) }
    }

    /// Keeps a flow apart from the others of its endpoint.
    pub(crate) fn keep_apart(&mut self, flow: Flow) {
        if !self.apart.contains(&flow) {
            self.apart.push(flow);
            self.route_anew(Route::to(flow.endpoint));
        }
    }

    /// Lets a flow go with the others again.
    pub(crate) fn bring_back(&mut self, flow: Flow) {
        self.apart.retain(|apart| *apart != flow);
        self.route_anew(flow.apart());
    }

    fn route_anew(&mut self, route: Route) {
        let ready = self.ready.remove(&route).unwrap_or_default();
        self.make_ready(ready.into());
        let suspects = self.suspects.remove(&route).unwrap_or_default();
        self.insert_suspects(suspects.into());
    }

    /// Takes the events of the next request, all of one route, as many as
    /// `allowance` says for it, which is told whether there are others than suspects;
    /// none of a route for which it says nothing. Empty when nothing is ready. They
    /// count as out until each is settled, put back or held.
    pub(crate) fn next_request(
        &mut self,
        allowance: impl Fn(Route, bool) -> Option<Allowance>,
    ) -> (Route, Vec<Waiting>) {
        // The route whose first event came first, unless all it has must wait.
        let mut routes: Vec<(Arrival, Route)> = Vec::new();
        for (route, events) in self.ready.iter().chain(&self.suspects) {
            if let Some(first) = events.front() {
                routes.push((first.arrival, *route));
            }
        }
        routes.sort_unstable();
        for (_, route) in routes {
            let has_ready = self.ready.get(&route).is_some_and(|ready| !ready.is_empty());
            let taken = match allowance(route, has_ready) {
                None => continue,
                Some(Allowance::UpTo(events_max)) => self.take_from(route, events_max),
                Some(Allowance::SuspectOrUpTo(events_max)) => match self.take_suspect(route, 0.0) {
                    Some(suspect) => vec![suspect],
                    None => self.take_from(route, events_max),
                },
                Some(Allowance::OneAt(share)) => {
                    let taken = self.take_one(route, share).or_else(|| self.take_suspect(route, share));
                    taken.into_iter().collect()
                }
            };
            if !taken.is_empty() {
                return (route, taken);
            }
        }
        (Route::to(Endpoint::DEFAULT), Vec::new())
    }

    fn take_from(&mut self, route: Route, events_max: usize) -> Vec<Waiting> {
        let mut ready = self.ready.get_mut(&route).map(std::mem::take).unwrap_or_default();
        let mut together_max = events_max.min(self.limits.events_max);
        let mut taken: Vec<Waiting> = Vec::new();
        let (mut body_bytes, mut tenant) = (0, None);
        while let Some(waiting) = ready.pop_front() {
            // Identifies of one user may go together, in order: only those that
            // were out or held before stand in the way.
            let Some(waiting) = self.unless_blocked(waiting) else { continue };
            let bytes = waiting.event.wire_bytes_estimate();
            // A request is of one tenant, as it is to one endpoint: its key may be another's.
            let own_tenant = waiting.event.tenant();
            let full = taken.len() >= together_max.min(waiting.together_max())
                || !taken.is_empty()
                    && (body_bytes + bytes > self.limits.body_bytes_max || own_tenant != tenant.as_deref());
            if full {
                ready.push_front(waiting);
                break;
            }
            if taken.is_empty() {
                tenant = own_tenant.map(str::to_owned);
            }
            together_max = together_max.min(waiting.together_max());
            body_bytes += bytes;
            taken.push(waiting);
        }
        self.ready.insert(route, ready);
        taken.iter().for_each(|waiting| self.busy.mark(waiting));
        taken
    }

    /// An identify stands for the first one of its user, so that none is overtaken; so do
    /// others whose order is kept.
    fn take_one(&mut self, route: Route, share: f64) -> Option<Waiting> {
        loop {
            let ready = self.ready.get_mut(&route)?;
            let mut place = place_at(share, ready.len());
            if let Some(key) = ready.get(place).and_then(|waiting| waiting.event.order_key()) {
                let has_key = |waiting: &Waiting| waiting.event.order_key() == Some(key);
                place = ready.iter().position(has_key).unwrap_or(place);
            }
            let waiting = ready.remove(place)?;
            if let Some(waiting) = self.unless_blocked(waiting) {
                self.busy.mark(&waiting);
                return Some(waiting);
            }
        }
    }

    /// The first suspect from that share of the way on that need not wait behind an
    /// earlier event of its user.
    fn take_suspect(&mut self, route: Route, share: f64) -> Option<Waiting> {
        let suspects = self.suspects.get(&route)?;
        let ready = self.ready.get(&route);
        let is_overtaking = |suspect: &Waiting| {
            let Some(key) = suspect.event.order_key() else { return false };
            let earlier = ready.into_iter().flatten().take_while(|ready| ready.arrival < suspect.arrival);
            earlier.into_iter().any(|ready| ready.event.order_key() == Some(key))
        };
        let may_go = |place: &usize| {
            let suspect = suspects.get(*place);
            suspect.is_some_and(|suspect| !self.busy.blocks(suspect) && !is_overtaking(suspect))
        };
        let from = place_at(share, suspects.len());
        let place = (from..suspects.len()).chain(0..from).find(may_go)?;
        let suspect = self.suspects.get_mut(&route)?.remove(place)?;
        self.not_ready.remove(&suspect.arrival);
        Some(suspect)
    }

    /// Blocks an event that must wait behind another one of its user.
    fn unless_blocked(&mut self, waiting: Waiting) -> Option<Waiting> {
        if !self.busy.blocks(&waiting) {
            return Some(waiting);
        }
        self.not_ready.insert(waiting.arrival, waiting.event.accepted_ms());
        self.busy.block(waiting);
        None
    }

    /// Returns events that were out, to be sent again at once.
    pub(crate) fn put_back(&mut self, events: Vec<Waiting>) {
        self.make_due(events);
    }

    /// Keeps an event that was out until a time, and all events of its user
    /// with it, because the provider throttles that user.
    pub(crate) fn throttle(&mut self, mut waiting: Waiting, until: Instant) {
        let freed = self.busy.unmark(&waiting);
        self.make_ready(freed);
        waiting.history_mut().throttled = true;
        self.busy.mark(&waiting);
        self.hold(waiting, until);
    }

    /// Keeps an event that was out until a time. Later identifies of its user
    /// wait for it.
    pub(crate) fn hold(&mut self, waiting: Waiting, until: Instant) {
        self.not_ready.insert(waiting.arrival, waiting.event.accepted_ms());
        self.held.insert((until, waiting.arrival), waiting);
    }

    /// Makes the held events whose time has come ready.
    pub(crate) fn release(&mut self, now: Instant) {
        // Ties and what comes after them stay held: the key is (time, arrival).
        let later = self.held.split_off(&(now, Arrival::LAST));
        let due = std::mem::replace(&mut self.held, later);
        self.make_due(due.into_values());
    }

    /// Makes all held events ready, whatever their time.
    pub(crate) fn release_all(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.make_due(held.into_values());
    }

    /// Counts an event that was out as ended.
    pub(crate) fn settle(&mut self, waiting: &Waiting) {
        let freed = self.busy.unmark(waiting);
        if !freed.is_empty() {
            self.make_ready(freed);
        }
        self.loads.remove(waiting);
    }

    /// When the next held event becomes ready.
    pub(crate) fn next_release(&self) -> Option<Instant> {
        self.held.keys().next().map(|(until, _)| *until)
    }

    /// True if nothing is ready, held or a suspect. Something may be out, and
    /// something blocked behind it.
    pub(crate) fn is_idle(&self) -> bool {
        self.held.is_empty() && self.ready.values().chain(self.suspects.values()).all(VecDeque::is_empty)
    }

    /// Events that could be sent now, suspects not among them, by such routes.
    pub(crate) fn ready_events(&self, by: impl Fn(Route) -> bool) -> usize {
        self.ready.iter().filter(|(route, _)| by(**route)).map(|(_, ready)| ready.len()).sum()
    }

    /// What has not ended.
    pub(crate) fn load(&self) -> Load {
        self.loads.all
    }

    /// What has not ended of a flow.
    pub(crate) fn load_of(&self, flow: Flow) -> Load {
        self.loads.of(flow)
    }

    /// The flows of which something has not ended.
    pub(crate) fn flows(&self) -> impl Iterator<Item = Flow> {
        self.loads.flows()
    }

    /// True if something that has not ended goes by that route.
    pub(crate) fn uses(&self, route: Route) -> bool {
        self.loads.flows().any(|flow| self.route_of(flow) == route)
    }

    /// When the oldest event that is not out was accepted, in Unix milliseconds.
    pub(crate) fn oldest_accepted_ms(&self) -> Option<i64> {
        let ready = self.ready.values().filter_map(VecDeque::front);
        let ready = ready.map(|waiting| (waiting.arrival, waiting.event.accepted_ms()));
        let not_ready = self.not_ready.first_key_value().map(|(arrival, at_ms)| (*arrival, *at_ms));
        ready.chain(not_ready).min().map(|(_, accepted_ms)| accepted_ms)
    }

    /// Takes everything that is not out, in the order of arrival. It counts as
    /// out.
    pub(crate) fn take_all(&mut self) -> Vec<Waiting> {
        let mut all = self.take_where(|_| true);
        in_order(&mut all);
        all
    }

    /// Takes what is not out and is to be taken; it counts as out.
    pub(crate) fn take_where(&mut self, is_taken: impl Fn(&Waiting) -> bool) -> Vec<Waiting> {
        let mut taken = self.take_accused_or_held(&is_taken);
        for waiting in self.busy.take_blocked(&is_taken) {
            self.not_ready.remove(&waiting.arrival);
            self.busy.mark(&waiting);
            taken.push(waiting);
        }
        for ready in self.ready.values_mut() {
            let (out, stays): (VecDeque<_>, VecDeque<_>) =
                std::mem::take(ready).into_iter().partition(|waiting| is_taken(waiting));
            *ready = stays;
            out.iter().for_each(|waiting| self.busy.mark(waiting));
            taken.extend(out);
        }
        taken
    }

    /// Takes what is held or a suspect and is to be taken; it counts as out.
    pub(crate) fn take_accused_or_held(&mut self, is_taken: impl Fn(&Waiting) -> bool) -> Vec<Waiting> {
        let held: Vec<_> =
            self.held.iter().filter(|(_, waiting)| is_taken(waiting)).map(|(key, _)| *key).collect();
        let mut taken: Vec<Waiting> = held.iter().filter_map(|key| self.held.remove(key)).collect();
        for suspects in self.suspects.values_mut() {
            let (out, stays): (VecDeque<_>, VecDeque<_>) =
                std::mem::take(suspects).into_iter().partition(|waiting| is_taken(waiting));
            *suspects = stays;
            taken.extend(out);
        }
        let mut freed = Vec::new();
        for waiting in &mut taken {
            self.not_ready.remove(&waiting.arrival);
            if waiting.is_throttled() {
                freed.append(&mut self.busy.unmark(waiting));
                waiting.throttles_no_more();
                self.busy.mark(waiting);
            }
        }
        self.make_ready(freed);
        taken
    }

    /// Events that were out or held go on: suspects beside the others.
    fn make_due(&mut self, events: impl IntoIterator<Item = Waiting>) {
        let (mut ready, mut suspects) = (Vec::new(), Vec::new());
        for mut waiting in events {
            ready.append(&mut self.busy.unmark(&waiting));
            waiting.throttles_no_more();
            if waiting.is_suspect() {
                self.busy.mark(&waiting);
                suspects.push(waiting);
            } else {
                ready.push(waiting);
            }
        }
        self.make_ready(ready);
        self.insert_suspects(suspects);
    }

    fn make_ready(&mut self, events: Vec<Waiting>) {
        events.iter().for_each(|waiting| {
            self.not_ready.remove(&waiting.arrival);
        });
        let routed: Vec<_> =
            events.into_iter().map(|waiting| (self.route_of(waiting.flow()), waiting)).collect();
        insert(&mut self.ready, routed);
    }

    fn insert_suspects(&mut self, suspects: Vec<Waiting>) {
        for suspect in &suspects {
            self.not_ready.insert(suspect.arrival, suspect.event.accepted_ms());
        }
        let routed: Vec<_> =
            suspects.into_iter().map(|waiting| (self.route_of(waiting.flow()), waiting)).collect();
        insert(&mut self.suspects, routed);
    }
}

/// Puts events where they belong in the order of arrival.
fn insert(queues: &mut BTreeMap<Route, VecDeque<Waiting>>, events: Vec<(Route, Waiting)>) {
    if events.is_empty() {
        return;
    }
    // A few go to their places, near the front; for many it is cheaper to
    // sort, which is quick for what is almost sorted.
    const FEW: usize = 32;
    let few = events.len() <= FEW;
    for (route, waiting) in events {
        let queue = queues.entry(route).or_default();
        let place =
            if few { queue.partition_point(|other| other.arrival < waiting.arrival) } else { queue.len() };
        queue.insert(place, waiting);
    }
    if !few {
        for queue in queues.values_mut() {
            queue.make_contiguous().sort_by_key(|waiting| waiting.arrival);
        }
    }
}

/// The place that is that share of the way to the back.
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn place_at(share: f64, length: usize) -> usize {
    (length as f64 * share) as usize
}
