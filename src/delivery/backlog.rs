//! Everything that one provider has not got yet, and what goes into the next
//! request. A pure value that takes time as an argument.
//!
//! Each event is in one of four places: *ready*, in the order of arrival and by
//! route; *held* until a time; *blocked* behind another event of its user; or
//! *out*, in a request that is under way. A request takes ready events from the
//! front, up to the provider's limits in count and bytes, which merges what has
//! waited.
//!
//! **Order.** An identify is not taken while an earlier one of the same user is
//! held or out in another request, so an older trait never overwrites a newer
//! one. Tracks carry their own time and need no order.
//!
//! **Throttling.** While the provider holds one of a user's events back, all of
//! that user's events wait with it: they would only be refused too.
//!
//! **Splitting.** Events of a request that was too large come back with
//! `together_max`, half of their number, and a request is never larger than any
//! of its events allows. So a poisonous event is alone after log2 n rounds while
//! the others get through, in at most 2n - 1 requests.
//!
//! **Apart.** A kind of event that the provider refuses is kept apart from the
//! others of its endpoint: it has a route of its own until the provider takes it.

use std::collections::{BTreeMap, HashMap, VecDeque};

use analytics_relay_providers::{BatchLimits, Endpoint, Event};
use tokio::time::Instant;

use super::routes::{Kind, Route};
use crate::queue::Place;

/// Room that is made for ready events at least.
const ROOM_MIN: usize = 64;

/// One event that a provider has not got.
#[derive(Debug, Clone)]
pub(crate) struct Waiting {
    pub(crate) event: Event,
    seq: u64,
    /// Where it is kept meanwhile.
    pub(crate) place: Place,
    /// Nothing for nearly all: a lane whose provider hangs holds little else than
    /// events.
    history: Option<Box<History>>,
}

/// What has happened to an event so far.
#[derive(Debug, Clone)]
pub(crate) struct History {
    /// Attempts that failed.
    pub(crate) attempts: u32,
    /// Most events that it may be sent together with, itself included.
    pub(crate) together_max: usize,
    /// Requests that had delivered something when its delivery cycle began.
    pub(crate) deliveries_before: u64,
    /// When the provider last refused it, alone or with others.
    pub(crate) refused_at: Option<Instant>,
    /// How often it was named, or alone in a request, when the provider refused it.
    pub(crate) accusations: u32,
    /// The provider throttles its user.
    throttled: bool,
}

impl History {
    const NONE: Self = Self {
        attempts: 0,
        together_max: usize::MAX,
        deliveries_before: 0,
        refused_at: None,
        accusations: 0,
        throttled: false,
    };
}

impl Waiting {
    /// Its place in the order of arrival in its lane.
    pub(crate) fn seq(&self) -> u64 {
        self.seq
    }

    pub(crate) fn history(&self) -> &History {
        self.history.as_deref().unwrap_or(&History::NONE)
    }

    pub(crate) fn history_mut(&mut self) -> &mut History {
        self.history.get_or_insert_with(|| Box::new(History::NONE))
    }

    fn throttles_no_more(&mut self) {
        if let Some(history) = &mut self.history {
            history.throttled = false;
        }
    }
}

/// What stands before a user's other events.
#[derive(Debug, Default)]
struct Busy {
    /// Identifies that are held or out.
    identifies: usize,
    /// Events that are held because the provider throttles the user.
    throttled: usize,
    /// Events that wait for those.
    blocked: Vec<(Endpoint, Waiting)>,
}

impl Busy {
    fn blocks(&self, event: &Event) -> bool {
        self.throttled > 0 || event.is_identify() && self.identifies > 0
    }
}

/// How many of a route's events may go now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Allowance {
    /// As many from the front.
    UpTo(usize),
    /// One, from that share of the way to the back: where the first ones are
    /// refused, another one may not be.
    OneAt(f64),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Backlog {
    limits: BatchLimits,
    /// By route, each sorted by arrival.
    ready: BTreeMap<Route, VecDeque<Waiting>>,
    /// Kinds that are kept apart at an endpoint: a few.
    apart: Vec<(Endpoint, Kind)>,
    held: BTreeMap<(Instant, u64), (Endpoint, Waiting)>,
    busy: HashMap<String, Busy>,
    /// When each event that is held or blocked was accepted, by its place in the
    /// order of arrival.
    not_ready: BTreeMap<u64, i64>,
    next_seq: u64,
    /// Events that have not ended, and their bytes of memory.
    events: usize,
    bytes: usize,
}

impl Backlog {
    pub(crate) fn new(limits: BatchLimits) -> Self {
        Self {
            limits,
            ready: BTreeMap::new(),
            apart: Vec::new(),
            held: BTreeMap::new(),
            busy: HashMap::new(),
            not_ready: BTreeMap::new(),
            next_seq: 0,
            events: 0,
            bytes: 0,
        }
    }

    /// Adds an event behind all others.
    pub(crate) fn push(&mut self, event: Event, endpoint: Endpoint, place: Place) {
        let waiting = self.count_in(event, place);
        let ready = self.ready.entry(self.route(endpoint, &waiting.event)).or_default();
        if ready.len() == ready.capacity() {
            // Doubling would leave up to half of a large backlog's room empty.
            ready.reserve_exact(ready.len() / 8 + ROOM_MIN);
        }
        ready.push_back(waiting);
    }

    /// Adds an event that is not to be sent. It counts as out.
    pub(crate) fn push_out(&mut self, event: Event, place: Place) -> Waiting {
        let waiting = self.count_in(event, place);
        self.mark_busy(&waiting);
        waiting
    }

    fn count_in(&mut self, event: Event, place: Place) -> Waiting {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.events += 1;
        self.bytes += event.memory_bytes();
        Waiting { event, seq, place, history: None }
    }

    fn route(&self, endpoint: Endpoint, event: &Event) -> Route {
        let is_apart = |kind: &Kind| self.apart.contains(&(endpoint, *kind));
        let apart = if self.apart.is_empty() { None } else { Some(Kind::of(event)).filter(is_apart) };
        Route { endpoint, apart }
    }

    /// Keeps a kind apart from the others of its endpoint.
    pub(crate) fn keep_apart(&mut self, endpoint: Endpoint, kind: Kind) {
        if !self.apart.contains(&(endpoint, kind)) {
            self.apart.push((endpoint, kind));
            self.route_anew(Route::to(endpoint));
        }
    }

    /// Lets a kind go with the others again.
    pub(crate) fn bring_back(&mut self, endpoint: Endpoint, kind: Kind) {
        self.apart.retain(|apart| *apart != (endpoint, kind));
        self.route_anew(Route { endpoint, apart: Some(kind) });
    }

    fn route_anew(&mut self, route: Route) {
        let ready = self.ready.remove(&route).unwrap_or_default();
        self.insert(ready.into_iter().map(|waiting| (route.endpoint, waiting)).collect());
    }

    /// Takes the events of the next request, all of one route, as many as
    /// `allowance` says for it; none of a route for which it says nothing. Empty
    /// when nothing is ready. They count as out until each is settled, put back or
    /// held.
    pub(crate) fn next_request(
        &mut self,
        allowance: impl Fn(Route) -> Option<Allowance>,
    ) -> (Route, Vec<Waiting>) {
        // The route whose first event came first, unless all it has must wait.
        let mut routes: Vec<_> = self
            .ready
            .iter()
            .filter_map(|(route, events)| Some((events.front()?.seq, *route, allowance(*route)?)))
            .collect();
        routes.sort_unstable_by_key(|(seq, ..)| *seq);
        for (_, route, allowance) in routes {
            let taken = match allowance {
                Allowance::UpTo(events_max) => self.take_from(route, events_max),
                Allowance::OneAt(share) => self.take_one(route, share),
            };
            if !taken.is_empty() {
                return (route, taken);
            }
        }
        (Route::to(Endpoint::DEFAULT), Vec::new())
    }

    /// An identify stands for the first one of its user, so that none is overtaken.
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn take_one(&mut self, route: Route, share: f64) -> Vec<Waiting> {
        while let Some(ready) = self.ready.get_mut(&route).filter(|ready| !ready.is_empty()) {
            let mut place = (ready.len() as f64 * share) as usize;
            if let Some(user) = ready.get(place).and_then(|waiting| ordered_user(&waiting.event)) {
                let of_user = |waiting: &Waiting| ordered_user(&waiting.event) == Some(user);
                place = ready.iter().position(of_user).unwrap_or(place);
            }
            let Some(waiting) = ready.remove(place) else { break };
            let Some(waiting) = self.unless_blocked(route.endpoint, waiting) else { continue };
            self.mark_busy(&waiting);
            return vec![waiting];
        }
        Vec::new()
    }

    /// Blocks an event that must wait behind another one of its user.
    fn unless_blocked(&mut self, endpoint: Endpoint, waiting: Waiting) -> Option<Waiting> {
        let user = if self.busy.is_empty() { None } else { waiting.event.subject() };
        let busy = user.and_then(|user| self.busy.get_mut(user));
        match busy.filter(|busy| busy.blocks(&waiting.event)) {
            Some(busy) => {
                self.not_ready.insert(waiting.seq, waiting.event.accepted_ms());
                busy.blocked.push((endpoint, waiting));
                None
            }
            None => Some(waiting),
        }
    }

    fn take_from(&mut self, route: Route, events_max: usize) -> Vec<Waiting> {
        let mut ready = self.ready.get_mut(&route).map(std::mem::take).unwrap_or_default();
        let mut together_max = events_max.min(self.limits.events_max);
        let mut taken: Vec<Waiting> = Vec::new();
        let mut body_bytes = 0;
        while let Some(waiting) = ready.pop_front() {
            // Identifies of one user may go together, in order: only those that
            // were out or held before stand in the way.
            let Some(waiting) = self.unless_blocked(route.endpoint, waiting) else { continue };
            let bytes = waiting.event.wire_bytes_estimate();
            let full = taken.len() >= together_max.min(waiting.history().together_max)
                || (!taken.is_empty() && body_bytes + bytes > self.limits.body_bytes_max);
            if full {
                ready.push_front(waiting);
                break;
            }
            together_max = together_max.min(waiting.history().together_max);
            body_bytes += bytes;
            taken.push(waiting);
        }
        self.ready.insert(route, ready);
        for waiting in &taken {
            self.mark_busy(waiting);
        }
        taken
    }

    /// Returns events that were out, to be sent again at once.
    pub(crate) fn put_back(&mut self, endpoint: Endpoint, events: Vec<Waiting>) {
        self.make_ready(events.into_iter().map(|waiting| (endpoint, waiting)));
    }

    /// Keeps an event that was out until a time, and all events of its user
    /// with it, because the provider throttles that user.
    pub(crate) fn throttle(&mut self, endpoint: Endpoint, mut waiting: Waiting, until: Instant) {
        let freed = self.unmark_busy(&waiting);
        self.insert(freed);
        waiting.history_mut().throttled = true;
        self.mark_busy(&waiting);
        self.hold(endpoint, waiting, until);
    }

    /// Keeps an event that was out until a time. Later identifies of its user
    /// wait for it.
    pub(crate) fn hold(&mut self, endpoint: Endpoint, waiting: Waiting, until: Instant) {
        self.not_ready.insert(waiting.seq, waiting.event.accepted_ms());
        self.held.insert((until, waiting.seq), (endpoint, waiting));
    }

    /// Makes the held events whose time has come ready.
    pub(crate) fn release(&mut self, now: Instant) {
        // Ties and what comes after them stay held: the key is (time, seq).
        let later = self.held.split_off(&(now, u64::MAX));
        let due = std::mem::replace(&mut self.held, later);
        self.make_ready(due.into_values());
    }

    /// Makes all held events ready, whatever their time.
    pub(crate) fn release_all(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.make_ready(held.into_values());
    }

    /// Counts an event that was out as ended.
    pub(crate) fn settle(&mut self, waiting: &Waiting) {
        let freed = self.unmark_busy(waiting);
        self.insert(freed);
        self.events -= 1;
        self.bytes -= waiting.event.memory_bytes();
    }

    /// When the next held event becomes ready.
    pub(crate) fn next_release(&self) -> Option<Instant> {
        self.held.keys().next().map(|(until, _)| *until)
    }

    /// True if nothing is ready and nothing is held. Something may be out, and
    /// something blocked behind it.
    pub(crate) fn is_idle(&self) -> bool {
        self.held.is_empty() && self.ready.values().all(VecDeque::is_empty)
    }

    /// True if events of a route wait, now or for a time.
    pub(crate) fn has_waiting(&self, route: Route) -> bool {
        self.ready.get(&route).is_some_and(|ready| !ready.is_empty())
            || self.held.values().any(|(endpoint, waiting)| self.route(*endpoint, &waiting.event) == route)
    }

    /// Events that could be sent now.
    pub(crate) fn ready_events(&self) -> usize {
        self.ready.values().map(VecDeque::len).sum()
    }

    /// Events that have not ended.
    pub(crate) fn events(&self) -> usize {
        self.events
    }

    /// Memory that they hold.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// When the oldest event that is not out was accepted, in Unix milliseconds.
    pub(crate) fn oldest_accepted_ms(&self) -> Option<i64> {
        let ready = self.ready.values().filter_map(VecDeque::front);
        let ready = ready.map(|waiting| (waiting.seq, waiting.event.accepted_ms()));
        let not_ready = self.not_ready.first_key_value().map(|(seq, accepted_ms)| (*seq, *accepted_ms));
        ready.chain(not_ready).min().map(|(_, accepted_ms)| accepted_ms)
    }

    /// Takes everything that is not out, in the order of arrival. It counts as
    /// out.
    pub(crate) fn take_all(&mut self) -> Vec<Waiting> {
        let mut all: Vec<_> = self.take_where(|_, _| true).into_iter().map(|(_, waiting)| waiting).collect();
        in_order(&mut all);
        all
    }

    /// Takes what is not out and is to be taken; it counts as out.
    pub(crate) fn take_where(
        &mut self,
        is_taken: impl Fn(Endpoint, &Waiting) -> bool,
    ) -> Vec<(Endpoint, Waiting)> {
        let mut taken = Vec::new();
        let mut freed = Vec::new();
        for (key, (endpoint, mut waiting)) in std::mem::take(&mut self.held) {
            if is_taken(endpoint, &waiting) {
                freed.append(&mut self.unmark_busy(&waiting));
                waiting.throttles_no_more();
                taken.push((endpoint, waiting));
            } else {
                self.held.insert(key, (endpoint, waiting));
            }
        }
        self.insert(freed);
        for busy in self.busy.values_mut() {
            taken.extend(busy.blocked.extract_if(.., |(endpoint, waiting)| is_taken(*endpoint, waiting)));
        }
        for (_, waiting) in &taken {
            self.not_ready.remove(&waiting.seq);
        }
        for (route, ready) in &mut self.ready {
            let (out, stays): (VecDeque<_>, VecDeque<_>) =
                std::mem::take(ready).into_iter().partition(|waiting| is_taken(route.endpoint, waiting));
            *ready = stays;
            taken.extend(out.into_iter().map(|waiting| (route.endpoint, waiting)));
        }
        for (_, waiting) in &taken {
            self.mark_busy(waiting);
        }
        taken
    }

    fn make_ready(&mut self, events: impl Iterator<Item = (Endpoint, Waiting)>) {
        let mut ready = Vec::new();
        for (endpoint, mut waiting) in events {
            ready.append(&mut self.unmark_busy(&waiting));
            waiting.throttles_no_more();
            ready.push((endpoint, waiting));
        }
        self.insert(ready);
    }

    /// Puts events where they belong in the order of arrival.
    fn insert(&mut self, events: Vec<(Endpoint, Waiting)>) {
        if events.is_empty() {
            return;
        }
        // A few go to their places, near the front; for many it is cheaper to
        // sort, which is quick for what is almost sorted.
        const FEW: usize = 32;
        let few = events.len() <= FEW;
        for (endpoint, waiting) in events {
            self.not_ready.remove(&waiting.seq);
            let ready = self.ready.entry(self.route(endpoint, &waiting.event)).or_default();
            let place =
                if few { ready.partition_point(|other| other.seq < waiting.seq) } else { ready.len() };
            ready.insert(place, waiting);
        }
        if !few {
            for ready in self.ready.values_mut() {
                ready.make_contiguous().sort_by_key(|waiting| waiting.seq);
            }
        }
    }

    fn mark_busy(&mut self, waiting: &Waiting) {
        let (identify, throttled) = (waiting.event.is_identify(), waiting.history().throttled);
        if !(identify || throttled) {
            return;
        }
        let Some(user) = waiting.event.subject() else { return };
        let busy = self.busy.entry(user.to_owned()).or_default();
        busy.identifies += usize::from(identify);
        busy.throttled += usize::from(throttled);
    }

    /// Returns the events that were blocked and may go now; what must wait on is
    /// blocked again when its turn comes.
    #[must_use]
    fn unmark_busy(&mut self, waiting: &Waiting) -> Vec<(Endpoint, Waiting)> {
        let (identify, throttled) = (waiting.event.is_identify(), waiting.history().throttled);
        if !(identify || throttled) {
            return Vec::new();
        }
        let user = waiting.event.subject();
        let Some(busy) = user.and_then(|user| self.busy.get_mut(user)) else { return Vec::new() };
        busy.identifies -= usize::from(identify);
        busy.throttled -= usize::from(throttled);
        let idle = busy.identifies == 0 && busy.throttled == 0;
        let throttle_ended = throttled && busy.throttled == 0;
        if !(idle || throttle_ended) {
            return Vec::new();
        }
        let freed = std::mem::take(&mut busy.blocked);
        if let Some(user) = user.filter(|_| idle) {
            self.busy.remove(user);
        }
        freed
    }
}

/// Sorts events by their arrival.
pub(crate) fn in_order(events: &mut [Waiting]) {
    events.sort_unstable_by_key(|waiting| waiting.seq);
}

/// The user whose events must stay in order, if this is one of them.
pub(crate) fn ordered_user(event: &Event) -> Option<&str> {
    if event.is_identify() { event.subject() } else { None }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, time::Duration};

    use proptest::prelude::*;

    use super::*;
    use crate::delivery::test_support::{accepted_at, identify, track, track_of};

    const TRACKS: Endpoint = Endpoint(0);
    const IDENTIFIES: Endpoint = Endpoint(1);
    const LIMITS: BatchLimits = BatchLimits { events_max: 4, body_bytes_max: 1_000_000, requests_max: 2 };

    fn backlog() -> Backlog {
        Backlog::new(LIMITS)
    }

    fn push_tracks(backlog: &mut Backlog, names: &[&str]) {
        for name in names {
            backlog.push(track(name), TRACKS, Place::MEMORY);
        }
    }

    fn names(events: &[Waiting]) -> Vec<&str> {
        events.iter().map(|waiting| waiting.event.name().unwrap_or("identify")).collect()
    }

    fn take(backlog: &mut Backlog) -> Vec<Waiting> {
        backlog.next_request(|_| Some(Allowance::UpTo(usize::MAX))).1
    }

    #[test]
    fn a_request_merges_what_waits_up_to_the_number_of_events() {
        let mut backlog = backlog();
        push_tracks(&mut backlog, &["a", "b", "c", "d", "e"]);
        assert_eq!(names(&take(&mut backlog)), ["a", "b", "c", "d"]);
        assert_eq!(names(&take(&mut backlog)), ["e"]);
        assert!(take(&mut backlog).is_empty());
    }

    #[test]
    fn a_request_stays_within_the_bytes_but_never_starves() {
        let bytes = track("a").wire_bytes_estimate();
        let mut backlog = Backlog::new(BatchLimits { body_bytes_max: 2 * bytes, ..LIMITS });
        push_tracks(&mut backlog, &["a", "b", "c"]);
        assert_eq!(names(&take(&mut backlog)), ["a", "b"]);
        let mut tiny = Backlog::new(BatchLimits { body_bytes_max: 1, ..LIMITS });
        push_tracks(&mut tiny, &["a", "b"]);
        assert_eq!(names(&take(&mut tiny)), ["a"]);
    }

    #[test]
    fn endpoints_are_never_mixed_and_the_older_goes_first() {
        let mut backlog = backlog();
        backlog.push(identify("u"), IDENTIFIES, Place::MEMORY);
        push_tracks(&mut backlog, &["a"]);
        assert_eq!(backlog.next_request(|_| Some(Allowance::UpTo(9))).0, Route::to(IDENTIFIES));
        assert_eq!(backlog.next_request(|_| Some(Allowance::UpTo(9))).0, Route::to(TRACKS));
    }

    #[test]
    fn halving_isolates_the_poison_within_2n_minus_1_requests() {
        let mut backlog = Backlog::new(BatchLimits { events_max: 100, ..LIMITS });
        let all: Vec<String> =
            (0..50).map(|i| if i == 37 { "poison".into() } else { format!("e{i}") }).collect();
        push_tracks(&mut backlog, &all.iter().map(String::as_str).collect::<Vec<_>>());
        let (mut requests, mut delivered, mut poison) = (0, Vec::new(), 0);
        loop {
            let (route, mut taken) = backlog.next_request(|_| Some(Allowance::UpTo(usize::MAX)));
            if taken.is_empty() {
                break;
            }
            requests += 1;
            if !names(&taken).contains(&"poison") {
                delivered.extend(names(&taken).into_iter().map(str::to_owned));
                taken.iter().for_each(|waiting| backlog.settle(waiting));
            } else if taken.len() == 1 {
                poison += 1;
                backlog.settle(&taken[0]);
            } else {
                let half = taken.len().div_ceil(2);
                taken.iter_mut().for_each(|waiting| waiting.history_mut().together_max = half);
                backlog.put_back(route.endpoint, taken);
            }
        }
        assert_eq!((delivered.len(), poison, backlog.events()), (49, 1, 0));
        assert!(requests < 2 * 50, "{requests}");
        assert!(requests <= 16, "one poison of 50 takes log2 rounds, not {requests}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_later_identify_waits_for_an_earlier_one_of_its_user() {
        let mut backlog = backlog();
        let now = Instant::now();
        for user in ["u", "v", "u"] {
            backlog.push(identify(user), IDENTIFIES, Place::MEMORY);
        }
        let (_, mut first) = backlog.next_request(|_| Some(Allowance::UpTo(1)));
        assert_eq!(first[0].event.subject(), Some("u"));
        let (_, second) = backlog.next_request(|_| Some(Allowance::UpTo(9)));
        assert_eq!(second.len(), 1, "only v may go while u is out");
        assert_eq!(second[0].event.subject(), Some("v"));

        let until = now + Duration::from_secs(5);
        backlog.hold(IDENTIFIES, first.remove(0), until);
        backlog.release(now);
        assert!(take(&mut backlog).is_empty(), "u is held, so the later u waits too");
        assert_eq!(backlog.next_release(), Some(until));
        backlog.release(until);
        let both = take(&mut backlog);
        assert_eq!(both.len(), 2);
        assert!(both[0].seq < both[1].seq);
    }

    #[tokio::test(start_paused = true)]
    async fn a_throttled_users_other_events_wait_with_it_and_nobody_elses() {
        let mut backlog = backlog();
        let now = Instant::now();
        let of = |user: &str| track_of("t", user);
        backlog.push(of("slow"), TRACKS, Place::MEMORY);
        let slow = take(&mut backlog).remove(0);
        let until = now + Duration::from_secs(15);
        backlog.throttle(TRACKS, slow, until);
        for _ in 0..3000 {
            backlog.push(of("slow"), TRACKS, Place::MEMORY);
        }
        backlog.push(of("quick"), TRACKS, Place::MEMORY);
        let taken = take(&mut backlog);
        assert_eq!(taken.len(), 1, "only quick's, however many of slow's wait before it");
        assert_eq!(taken[0].event.subject(), Some("quick"));
        backlog.release(until);
        let released = take(&mut backlog);
        assert_eq!(released.iter().map(|waiting| waiting.seq).collect::<Vec<_>>(), [0, 1, 2, 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_age_is_that_of_the_oldest_that_is_not_out() {
        let mut backlog = backlog();
        for accepted_ms in [10, 20, 30] {
            backlog.push(accepted_at(&identify("a"), accepted_ms), IDENTIFIES, Place::MEMORY);
        }
        let take_one = |backlog: &mut Backlog| backlog.next_request(|_| Some(Allowance::UpTo(1))).1.pop();
        let first = take_one(&mut backlog).unwrap();
        assert_eq!(backlog.oldest_accepted_ms(), Some(20), "the first is out");
        assert!(take_one(&mut backlog).is_none(), "both wait for it");
        assert_eq!(backlog.oldest_accepted_ms(), Some(20));
        let until = Instant::now() + Duration::from_secs(1);
        backlog.hold(IDENTIFIES, first, until);
        assert_eq!(backlog.oldest_accepted_ms(), Some(10));
        backlog.release(until);
        assert_eq!(backlog.oldest_accepted_ms(), Some(10));
        let rest = take(&mut backlog);
        assert_eq!((rest.len(), backlog.oldest_accepted_ms()), (3, None));
        rest.iter().for_each(|waiting| backlog.settle(waiting));
        assert_eq!((backlog.oldest_accepted_ms(), backlog.events(), backlog.bytes()), (None, 0, 0));

        backlog.push(accepted_at(&track("a"), 40), TRACKS, Place::MEMORY);
        let held = take(&mut backlog).pop().unwrap();
        backlog.hold(TRACKS, held, until);
        assert_eq!(backlog.take_all().len(), 1);
        assert_eq!(backlog.oldest_accepted_ms(), None, "what is taken is out");
    }

    fn kind(identify: bool) -> Kind {
        if identify { Kind::Identify } else { Kind::Track }
    }

    #[tokio::test(start_paused = true)]
    async fn a_kind_that_is_kept_apart_holds_up_no_other_and_keeps_its_place() {
        let mut backlog = backlog();
        let apart = Route { endpoint: TRACKS, apart: Some(Kind::Identify) };
        let only = |wanted: Route| move |route| (route == wanted).then_some(Allowance::UpTo(9));
        backlog.push(identify("u"), TRACKS, Place::MEMORY);
        push_tracks(&mut backlog, &["a"]);
        let held = backlog.next_request(|_| Some(Allowance::UpTo(1))).1.remove(0);
        backlog.hold(TRACKS, held, Instant::now());
        backlog.keep_apart(TRACKS, Kind::Identify);
        backlog.push(identify("v"), TRACKS, Place::MEMORY);
        push_tracks(&mut backlog, &["b"]);
        assert!(backlog.has_waiting(apart));
        assert_eq!(names(&backlog.next_request(only(Route::to(TRACKS))).1), ["a", "b"]);
        backlog.release(Instant::now());
        push_tracks(&mut backlog, &["c"]);
        let probe = backlog.next_request(|_| Some(Allowance::OneAt(0.99)));
        assert_eq!((probe.0, probe.1[0].event.subject()), (apart, Some("v")), "not always the first");
        backlog.put_back(TRACKS, probe.1);
        backlog.bring_back(TRACKS, Kind::Identify);
        assert!(!backlog.has_waiting(apart));
        let all = backlog.next_request(only(Route::to(TRACKS))).1;
        assert_eq!(names(&all), ["identify", "identify", "c"]);
        assert!(all.is_sorted_by_key(|waiting| waiting.seq));
    }

    #[test]
    fn a_probe_takes_the_first_identify_of_its_user() {
        let mut backlog = backlog();
        for user in ["u", "v", "u"] {
            backlog.push(identify(user), TRACKS, Place::MEMORY);
        }
        let probe = backlog.next_request(|_| Some(Allowance::OneAt(0.9))).1.remove(0);
        assert_eq!((probe.seq, probe.event.subject()), (0, Some("u")));
        let probe = backlog.next_request(|_| Some(Allowance::OneAt(0.9))).1.remove(0);
        assert_eq!(probe.event.subject(), Some("v"), "the second u waits for the first");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push { user: u8, identify: bool },
        Take { events_max: usize },
        Settle,
        PutBack { halve: bool },
        Hold { seconds: u64 },
        Wait { seconds: u64 },
        TakeOne { share: f64 },
        KeepApart { identify: bool },
        BringBack { identify: bool },
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0_u8..4, any::<bool>()).prop_map(|(user, identify)| Step::Push { user, identify }),
            3 => (1_usize..6).prop_map(|events_max| Step::Take { events_max }),
            2 => Just(Step::Settle),
            1 => any::<bool>().prop_map(|halve| Step::PutBack { halve }),
            1 => (0_u64..20).prop_map(|seconds| Step::Hold { seconds }),
            1 => (0_u64..20).prop_map(|seconds| Step::Wait { seconds }),
            1 => (0.0..1.0).prop_map(|share| Step::TakeOne { share }),
            1 => any::<bool>().prop_map(|identify| Step::KeepApart { identify }),
            1 => any::<bool>().prop_map(|identify| Step::BringBack { identify }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Whatever happens to requests: nothing is lost or doubled, limits
        /// hold, and identifies of one user end in the order in which they came.
        #[test]
        fn nothing_is_lost_doubled_or_overtaken(steps in prop::collection::vec(any_step(), 1..200)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            let mut now = runtime.block_on(async { Instant::now() });
            let mut backlog = backlog();
            let mut out: VecDeque<(Endpoint, Vec<Waiting>)> = VecDeque::new();
            let mut pushed = 0_u64;
            let mut ended: Vec<Waiting> = Vec::new();
            let mut finish = |backlog: &mut Backlog, events: Vec<Waiting>| {
                for waiting in events {
                    backlog.settle(&waiting);
                    ended.push(waiting);
                }
            };
            for step in steps {
                match step {
                    Step::Push { user, identify: true } => {
                        // Users of an odd number go where tracks go.
                        let endpoint = if user % 2 == 0 { IDENTIFIES } else { TRACKS };
                        backlog.push(identify(&user.to_string()), endpoint, Place::MEMORY);
                        pushed += 1;
                    }
                    Step::Push { user, .. } => {
                        backlog.push(track_of("t", &user.to_string()), TRACKS, Place::MEMORY);
                        pushed += 1;
                    }
                    Step::Take { events_max } => {
                        let (route, taken) = backlog.next_request(|_| Some(Allowance::UpTo(events_max)));
                        prop_assert!(taken.len() <= events_max.min(LIMITS.events_max));
                        prop_assert!(taken.iter().all(|waiting| taken.len() <= waiting.history().together_max));
                        if !taken.is_empty() {
                            out.push_back((route.endpoint, taken));
                        }
                    }
                    Step::Settle => {
                        if let Some((_, taken)) = out.pop_back() {
                            finish(&mut backlog, taken);
                        }
                    }
                    Step::PutBack { halve } => {
                        if let Some((endpoint, mut taken)) = out.pop_front() {
                            let half = taken.len().div_ceil(2);
                            if halve {
                                taken.iter_mut().for_each(|waiting| waiting.history_mut().together_max = half);
                            }
                            backlog.put_back(endpoint, taken);
                        }
                    }
                    Step::Hold { seconds } => {
                        if let Some((endpoint, taken)) = out.pop_front() {
                            for (index, waiting) in taken.into_iter().enumerate() {
                                // As a provider may: some again at once, others
                                // each at a time of its own.
                                let seconds = (seconds * (index as u64 + 7)) % 20;
                                if seconds < 3 {
                                    backlog.put_back(endpoint, vec![waiting]);
                                } else if seconds < 8 {
                                    backlog.throttle(endpoint, waiting, now + Duration::from_secs(seconds));
                                } else {
                                    backlog.hold(endpoint, waiting, now + Duration::from_secs(seconds));
                                }
                            }
                        }
                    }
                    Step::TakeOne { share } => {
                        let (route, taken) = backlog.next_request(|_| Some(Allowance::OneAt(share)));
                        prop_assert!(taken.len() <= 1);
                        if !taken.is_empty() {
                            out.push_back((route.endpoint, taken));
                        }
                    }
                    // Both kinds share an endpoint.
                    Step::KeepApart { identify } => backlog.keep_apart(TRACKS, kind(identify)),
                    Step::BringBack { identify } => backlog.bring_back(TRACKS, kind(identify)),
                    Step::Wait { seconds } => {
                        now += Duration::from_secs(seconds);
                        backlog.release(now);
                    }
                }
            }
            while let Some((_, taken)) = out.pop_front() {
                finish(&mut backlog, taken);
            }
            backlog.release_all();
            loop {
                let taken = take(&mut backlog);
                if taken.is_empty() {
                    break;
                }
                finish(&mut backlog, taken);
            }
            prop_assert!(backlog.is_idle());
            prop_assert_eq!((backlog.events(), backlog.bytes()), (0, 0));
            let seqs: HashSet<u64> = ended.iter().map(|waiting| waiting.seq).collect();
            prop_assert_eq!(seqs.len() as u64, pushed);
            prop_assert_eq!(ended.len() as u64, pushed);
            let mut last: HashMap<&str, u64> = HashMap::new();
            for waiting in &ended {
                if let Some(user) = ordered_user(&waiting.event) {
                    let before = last.insert(user, waiting.seq);
                    prop_assert!(before.is_none_or(|before| before < waiting.seq), "user {user} was overtaken");
                }
            }
        }
    }
}
