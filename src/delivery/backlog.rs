//! Everything that one provider has not got yet, and what goes into the next
//! request. A pure value that takes time as an argument.
//!
//! Each event is in one of four places: *ready*, in the order of arrival and by
//! endpoint; *held* until a time; *blocked* behind another event of its user; or
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

use std::collections::{BTreeMap, HashMap, VecDeque};

use analytics_relay_providers::{BatchLimits, Endpoint, Event};
use tokio::time::Instant;

use crate::queue::Place;

/// Room that is made for ready events at least.
const ROOM_MIN: usize = 64;

/// One event that a provider has not got.
#[derive(Debug, Clone)]
pub(crate) struct Waiting {
    pub(crate) event: Event,
    /// Place in the order of arrival in this lane.
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
    /// Requests that the provider had answered when its delivery cycle began.
    pub(crate) answers_before: u64,
    /// The provider throttles its user.
    throttled: bool,
}

impl History {
    const NONE: Self = Self { attempts: 0, together_max: usize::MAX, answers_before: 0, throttled: false };
}

impl Waiting {
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

/// See the module.
#[derive(Debug)]
pub(crate) struct Backlog {
    limits: BatchLimits,
    /// By endpoint, each sorted by arrival.
    ready: BTreeMap<Endpoint, VecDeque<Waiting>>,
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
        let seq = self.next_seq;
        self.next_seq += 1;
        self.events += 1;
        self.bytes += event.memory_bytes();
        let waiting = Waiting { event, seq, place, history: None };
        let ready = self.ready.entry(endpoint).or_default();
        if ready.len() == ready.capacity() {
            // Doubling would leave up to half of a large backlog's room empty.
            ready.reserve_exact(ready.len() / 8 + ROOM_MIN);
        }
        ready.push_back(waiting);
    }

    /// Takes the events of the next request, all of one endpoint, as many as
    /// `events_max` says for it; none of an endpoint for which it says nothing.
    /// Empty when nothing is ready. They count as out until each is settled, put
    /// back or held.
    pub(crate) fn next_request(
        &mut self,
        events_max: impl Fn(Endpoint) -> Option<usize>,
    ) -> (Endpoint, Vec<Waiting>) {
        // The endpoint whose first event came first, unless all it has must wait.
        let mut endpoints: Vec<_> = self
            .ready
            .iter()
            .filter_map(|(endpoint, events)| Some((events.front()?.seq, *endpoint, events_max(*endpoint)?)))
            .collect();
        endpoints.sort_unstable();
        for (_, endpoint, events_max) in endpoints {
            let taken = self.take_from(endpoint, events_max);
            if !taken.is_empty() {
                return (endpoint, taken);
            }
        }
        (Endpoint::DEFAULT, Vec::new())
    }

    fn take_from(&mut self, endpoint: Endpoint, events_max: usize) -> Vec<Waiting> {
        let Some(ready) = self.ready.get_mut(&endpoint) else { return Vec::new() };
        let mut together_max = events_max.min(self.limits.events_max);
        let mut taken: Vec<Waiting> = Vec::new();
        let mut body_bytes = 0;
        while let Some(waiting) = ready.pop_front() {
            // Identifies of one user may go together, in order: only those that
            // were out or held before stand in the way.
            let user = if self.busy.is_empty() { None } else { waiting.event.subject() };
            let busy = user.and_then(|user| self.busy.get_mut(user));
            if let Some(busy) = busy.filter(|busy| busy.blocks(&waiting.event)) {
                self.not_ready.insert(waiting.seq, waiting.event.accepted_ms());
                busy.blocked.push((endpoint, waiting));
                continue;
            }
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
        let mut all: Vec<_> = self.take_where(|_| true).into_iter().map(|(_, waiting)| waiting).collect();
        in_order(&mut all);
        all
    }

    /// Takes what is not out and is to be taken; it counts as out.
    pub(crate) fn take_where(&mut self, is_taken: impl Fn(&Waiting) -> bool) -> Vec<(Endpoint, Waiting)> {
        let mut taken = Vec::new();
        let mut freed = Vec::new();
        for (key, (endpoint, mut waiting)) in std::mem::take(&mut self.held) {
            if is_taken(&waiting) {
                freed.append(&mut self.unmark_busy(&waiting));
                waiting.throttles_no_more();
                taken.push((endpoint, waiting));
            } else {
                self.held.insert(key, (endpoint, waiting));
            }
        }
        self.insert(freed);
        for busy in self.busy.values_mut() {
            taken.extend(busy.blocked.extract_if(.., |(_, waiting)| is_taken(waiting)));
        }
        for (_, waiting) in &taken {
            self.not_ready.remove(&waiting.seq);
        }
        for (endpoint, ready) in &mut self.ready {
            let (out, stays): (VecDeque<_>, VecDeque<_>) =
                std::mem::take(ready).into_iter().partition(&is_taken);
            *ready = stays;
            taken.extend(out.into_iter().map(|waiting| (*endpoint, waiting)));
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
            let ready = self.ready.entry(endpoint).or_default();
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
        backlog.next_request(|_| Some(usize::MAX)).1
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
        assert_eq!(backlog.next_request(|_| Some(9)).0, IDENTIFIES);
        assert_eq!(backlog.next_request(|_| Some(9)).0, TRACKS);
    }

    #[test]
    fn halving_isolates_the_poison_within_2n_minus_1_requests() {
        let mut backlog = Backlog::new(BatchLimits { events_max: 100, ..LIMITS });
        let all: Vec<String> =
            (0..50).map(|i| if i == 37 { "poison".into() } else { format!("e{i}") }).collect();
        push_tracks(&mut backlog, &all.iter().map(String::as_str).collect::<Vec<_>>());
        let (mut requests, mut delivered, mut poison) = (0, Vec::new(), 0);
        loop {
            let (endpoint, mut taken) = backlog.next_request(|_| Some(usize::MAX));
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
                backlog.put_back(endpoint, taken);
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
        let (_, mut first) = backlog.next_request(|_| Some(1));
        assert_eq!(first[0].event.subject(), Some("u"));
        let (_, second) = backlog.next_request(|_| Some(9));
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
        let take_one = |backlog: &mut Backlog| backlog.next_request(|_| Some(1)).1.pop();
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

    #[derive(Debug, Clone)]
    enum Step {
        Push { user: u8, identify: bool },
        Take { events_max: usize },
        Settle,
        PutBack { halve: bool },
        Hold { seconds: u64 },
        Wait { seconds: u64 },
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0_u8..4, any::<bool>()).prop_map(|(user, identify)| Step::Push { user, identify }),
            3 => (1_usize..6).prop_map(|events_max| Step::Take { events_max }),
            2 => Just(Step::Settle),
            1 => any::<bool>().prop_map(|halve| Step::PutBack { halve }),
            1 => (0_u64..20).prop_map(|seconds| Step::Hold { seconds }),
            1 => (0_u64..20).prop_map(|seconds| Step::Wait { seconds }),
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
                        backlog.push(identify(&user.to_string()), IDENTIFIES, Place::MEMORY);
                        pushed += 1;
                    }
                    Step::Push { user, .. } => {
                        backlog.push(track_of("t", &user.to_string()), TRACKS, Place::MEMORY);
                        pushed += 1;
                    }
                    Step::Take { events_max } => {
                        let (endpoint, taken) = backlog.next_request(|_| Some(events_max));
                        prop_assert!(taken.len() <= events_max.min(LIMITS.events_max));
                        prop_assert!(taken.iter().all(|waiting| taken.len() <= waiting.history().together_max));
                        if !taken.is_empty() {
                            out.push_back((endpoint, taken));
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
