//! The owner of everything that one provider has not got yet.
//!
//! One task. It takes batches in at once, whatever the provider does, so that
//! nobody waits for it; what does not fit any more becomes a dead letter, or, if
//! there is a log, is read from it later. It
//! sends what its backlog offers, reads one verdict per event, and ends each
//! event exactly once.

use std::{
    collections::{HashMap, HashSet},
    future::pending,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use analytics_relay_providers::{
    BatchLimits, Endpoint, Event, Provider, SendError, Verdict, http::RETRY_AFTER_MAX,
};
use tokio::{
    sync::mpsc,
    task::{Id, JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use tracing::{error, info, warn};

use super::{
    Batch,
    backlog::{Backlog, Waiting, in_order, ordered_user},
    log_feed::{Fed, LogFeed},
    recorder::Recorder,
    retry::{Gate, ProviderState, RetryBudget, RetryRule},
    spill::Spilled,
};
use crate::{
    queue::{Place, QueueLimits, Queued, spool::reader::Chunk},
    reasons::{DeadLetterReason, DropReason, Outcome},
    shutdown::Stop,
    telemetry::LaneMetrics,
    time::Clock,
};

mod ending;
mod leftover;
mod lines;
mod status;

pub(crate) use leftover::Leftover;
use lines::{Line, Lines};
pub(crate) use status::LaneStatus;

/// Batches that are taken in at once.
const BATCHES_AT_ONCE: usize = 64;

/// How long events wait that should have become dead letters and could not be
/// written.
const UNWRITTEN_DELAY: Duration = Duration::from_secs(5);

/// Memory of events that a lane reads ahead, about: a backlog of any size is
/// delivered with no more.
const READ_AHEAD_BYTES: usize = 6 * 1024 * 1024;

/// Most events that expire or make room at once: one write and one sync.
const LETTERS_AT_ONCE: usize = 1000;

/// After this time providers may not recognise a copy of an event.
const DEDUPLICATION_MS: i64 = 24 * 3600 * 1000;

/// How a lane works.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LaneSettings {
    pub(crate) retry: RetryRule,
    /// How much it may hold; beyond, events become dead letters.
    pub(crate) capacity: QueueLimits,
    /// Most events of the first probe of a provider that does not work.
    pub(crate) probe_events: usize,
    /// Forced to stop, wait for the answers to requests under way instead of
    /// abandoning them.
    pub(crate) awaits_answers: bool,
}

/// A request that is under way.
struct Sent {
    endpoint: Endpoint,
    events: Vec<Waiting>,
    at: Instant,
}

/// Files of an earlier run, and how many of their events have not ended.
#[derive(Debug, Default)]
struct Reloaded {
    files: Vec<PathBuf>,
    left: usize,
}

/// See the module.
pub(crate) struct Lane {
    provider: Arc<dyn Provider>,
    limits: BatchLimits,
    settings: LaneSettings,
    recorder: Arc<dyn Recorder>,
    metrics: LaneMetrics,
    status: Arc<LaneStatus>,
    clock: Clock,
    stop: Stop,

    /// If the relay is durable.
    feed: Option<LogFeed>,
    backlog: Backlog,
    in_flight: JoinSet<Result<Vec<Verdict>, SendError>>,
    sent: HashMap<Id, Sent>,
    /// One for each endpoint: a wrong path must not stop the other one.
    gates: HashMap<Endpoint, Gate>,
    budget: RetryBudget,
    rng: fastrand::Rng,
    reloaded: Reloaded,
    /// Until when no dead letter is tried for events that could stay.
    unwritten_until: Instant,
    /// Events that are not tried again in this run.
    parked: Vec<Waiting>,
    draining: bool,
    /// So that a lane that stays full is reported once.
    full: bool,
    lines: Lines,
}

impl Lane {
    pub(crate) fn new(
        provider: Arc<dyn Provider>,
        settings: LaneSettings,
        recorder: Arc<dyn Recorder>,
        metrics: LaneMetrics,
        status: Arc<LaneStatus>,
        clock: Clock,
        stop: Stop,
    ) -> Self {
        let limits = provider.limits();
        let backlog = Backlog::new(limits);
        Self {
            provider,
            limits,
            settings,
            recorder,
            metrics,
            status,
            clock,
            stop,
            feed: None,
            backlog,
            in_flight: JoinSet::new(),
            sent: HashMap::new(),
            gates: HashMap::new(),
            budget: RetryBudget::new(Instant::now()),
            rng: fastrand::Rng::new(),
            reloaded: Reloaded::default(),
            unwritten_until: Instant::now(),
            parked: Vec::new(),
            draining: false,
            full: false,
            lines: Lines::default(),
        }
    }

    /// Follows a log: what it does not deliver stays there.
    pub(crate) fn follow(&mut self, feed: LogFeed) {
        self.feed = Some(feed);
    }

    /// Takes in what an earlier run left, before anything new.
    pub(crate) fn reload(&mut self, spilled: Spilled) {
        self.reloaded = Reloaded { left: spilled.events.len(), files: spilled.files };
        for event in spilled.events {
            self.push(event, Place::SPILL_FILE);
        }
        self.finish_reloaded(0);
    }

    /// Runs until the inbox is closed and every event has ended, or until the
    /// relay is forced to stop. Returns what has not ended.
    pub(crate) async fn run(mut self, mut inbox: mpsc::Receiver<Batch>) -> Leftover {
        let mut closed = false;
        let mut batches = Vec::new();
        loop {
            self.backlog.release(Instant::now());
            self.let_go().await;
            self.read_on();
            self.start_requests();
            self.publish();
            self.lines.sum_up(self.provider.name());
            if closed && self.backlog.is_idle() && self.in_flight.is_empty() {
                break;
            }
            let wake = self.wakes_at();
            tokio::select! {
                received = inbox.recv_many(&mut batches, BATCHES_AT_ONCE), if !closed => {
                    closed = received == 0;
                    self.take_in(&mut batches).await;
                }
                Some(answered) = self.in_flight.join_next_with_id() => self.settle(answered).await,
                fed = fed(&mut self.feed) => self.take_chunk(fed),
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
                () = self.stop.draining(), if !self.draining => self.begin_drain(),
                () = self.stop.forced() => break,
            }
        }
        self.leave(inbox).await
    }

    async fn take_in(&mut self, batches: &mut Vec<Batch>) {
        let mut overflow = Vec::new();
        for Queued { event, place } in batches.drain(..).flat_map(|batch| batch.to_vec()) {
            let has_room = self.has_room(event.memory_bytes());
            match (&mut self.feed, place.log_seq()) {
                (Some(feed), Some(seq)) => {
                    if feed.takes(seq, &event, has_room) {
                        self.push(event, place);
                    }
                }
                _ if has_room => self.push(event, place),
                _ => {
                    let detail = format!("{} events waited", self.backlog.events());
                    overflow.push(self.letter(event, DeadLetterReason::LaneFull, 0, detail));
                }
            }
        }
        if overflow.is_empty() {
            self.full = false;
            return;
        }
        if !self.full && self.lines.take(Line::Full, overflow.len()) {
            error!(
                provider = self.provider.name(),
                lane_events = self.backlog.events(),
                "lane is full: new events become dead letters"
            );
        }
        self.full = true;
        let event_count = overflow.len();
        let written = self.recorder.dead_lettered(overflow).await;
        self.status.dead_letters_fail.store(written.is_err(), Ordering::Relaxed);
        if let Err(reason) = written {
            // There is no room to keep them for another try.
            self.drop_events(reason, event_count);
        }
    }

    fn has_room(&self, bytes: usize) -> bool {
        let capacity = self.settings.capacity;
        self.backlog.events() < capacity.events_max && self.backlog.bytes() + bytes <= capacity.bytes_max
    }

    /// Reads on in the log, as long as there is less to send than requests can
    /// take, and little in memory. Where nothing can be sent, because all of it
    /// waits for something, as much as the lane may hold.
    fn read_on(&mut self) {
        let is_little = self.backlog.bytes() < READ_AHEAD_BYTES || self.backlog.ready_events() == 0;
        let has_room = is_little && self.has_room(0);
        let Some(feed) = self.feed.as_mut().filter(|_| has_room && !self.draining) else { return };
        let wanted = self.limits.events_max.saturating_mul(self.limits.requests_max);
        let room = self.settings.capacity.events_max - self.backlog.events();
        feed.read_on(wanted.saturating_sub(self.backlog.ready_events()).min(room));
    }

    fn take_chunk(&mut self, fed: Fed) {
        let Fed::Chunk(Chunk { events, missing, damaged, .. }) = fed else { return };
        for logged in events {
            self.push(logged.event, Place::log(logged.seq));
        }
        let Some(feed) = &mut self.feed else { return };
        damaged.into_iter().for_each(|range| feed.reports.damaged(range));
        let lost: u64 = missing.iter().map(|range| range.end - range.start).sum();
        if lost > 0 {
            feed.reports.ended_ranges(Outcome::Dropped(DropReason::SpoolDamaged), missing);
        }
        for (seq, event) in feed.caught_up() {
            self.push(event, Place::log(seq));
        }
        if lost > 0 {
            self.drop_events(DropReason::SpoolDamaged, usize::try_from(lost).unwrap_or(usize::MAX));
        }
    }

    fn push(&mut self, event: Event, place: Place) {
        // The provider's own code: a panic in it must not end the lane.
        let endpoint = catch_unwind(AssertUnwindSafe(|| self.provider.endpoint(&event)));
        self.backlog.push(event, endpoint.unwrap_or(Endpoint::DEFAULT), place);
    }

    fn start_requests(&mut self) {
        let now = Instant::now();
        while self.in_flight.len() < self.limits.requests_max {
            let (gates, sent, draining) = (&self.gates, &self.sent, self.draining);
            let under_way = |endpoint: Endpoint| -> usize {
                sent.values().filter(|sent| sent.endpoint == endpoint).map(|sent| sent.events.len()).sum()
            };
            let events_max = |endpoint: Endpoint| match gates.get(&endpoint) {
                _ if draining => Some(usize::MAX),
                Some(gate) if gate.opens_at(now).is_some() => None,
                Some(gate) if gate.state() != ProviderState::Sending => {
                    (under_way(endpoint) == 0).then(|| gate.probe_events())
                }
                Some(gate) => match gate.window() {
                    Some(window) => Some(window.saturating_sub(under_way(endpoint))).filter(|room| *room > 0),
                    None => Some(usize::MAX),
                },
                None => Some(usize::MAX),
            };
            let (endpoint, events) = self.backlog.next_request(events_max);
            if events.is_empty() {
                return;
            }
            let batch: Vec<Event> = events.iter().map(|waiting| waiting.event.clone()).collect();
            let provider = self.provider.clone();
            let request = self.in_flight.spawn(async move { provider.send(&batch).await });
            self.sent.insert(request.id(), Sent { endpoint, events, at: now });
        }
    }

    /// When something happens by itself: a held event becomes ready, or a gate
    /// opens.
    fn wakes_at(&self) -> Option<Instant> {
        let now = Instant::now();
        let gates =
            self.gates.values().filter_map(|gate| gate.opens_at(now)).min().filter(|_| !self.draining);
        let feed = self.feed.as_ref().map(|feed| feed.wakes_at().max(self.unwritten_until));
        [self.backlog.next_release(), gates, feed, self.lines.due_at()].into_iter().flatten().min()
    }

    fn gate(&mut self, endpoint: Endpoint) -> &mut Gate {
        let probe_events = self.settings.probe_events;
        self.gates.entry(endpoint).or_insert_with(|| Gate::new(probe_events))
    }

    fn begin_drain(&mut self) {
        self.draining = true;
        // One prompt attempt for each; the deadline decides about more.
        self.backlog.release_all();
    }

    async fn settle(&mut self, answered: Result<(Id, Result<Vec<Verdict>, SendError>), JoinError>) {
        let (id, answer) = match answered {
            Ok((id, answer)) => (id, answer),
            Err(error) => {
                let detail = "the provider's code panicked".to_owned();
                (error.id(), Err(SendError::Unavailable { retry_after: None, detail }))
            }
        };
        let sent = self.sent.remove(&id).expect("every request that runs is in `sent`");
        self.metrics.attempts.inc_by(sent.events.len() as u64);
        self.metrics.request.observe(sent.at.elapsed().as_secs_f64());
        match checked(answer, sent.events.len()) {
            Ok(verdicts) => self.settle_verdicts(sent, verdicts).await,
            Err(SendError::Unavailable { retry_after, detail }) => {
                self.metrics.batch("unavailable");
                self.retry_later(sent, retry_after, detail).await;
            }
            Err(SendError::TooLarge { detail }) => {
                self.metrics.batch("too_large");
                self.split(sent, DeadLetterReason::TooLarge, detail).await;
            }
            Err(SendError::Refused { detail }) => {
                self.metrics.batch("refused");
                self.split(sent, DeadLetterReason::Invalid, detail).await;
            }
            Err(SendError::Unauthorized { detail }) => {
                self.metrics.batch("unauthorized");
                self.note_attempts(next_attempts(&sent.events), "unauthorized", &detail);
                self.pause(sent, &detail);
            }
        }
    }

    /// The provider answered for each event.
    async fn settle_verdicts(&mut self, sent: Sent, verdicts: Vec<Verdict>) {
        self.gate(sent.endpoint).answered();
        let (now, event_count) = (Instant::now(), sent.events.len());
        let attempt = attempt_of(&sent.events);
        let mut delivered = Vec::with_capacity(event_count);
        let mut dead = Vec::new();
        let mut again = Vec::new();
        let mut held = Vec::new();
        // From the newest: an identify must not follow a newer one of its user.
        let mut superseding = HashSet::new();
        for (mut waiting, verdict) in sent.events.into_iter().zip(verdicts).rev() {
            let user = ordered_user(&waiting.event).map(str::to_owned);
            let superseded = user.as_ref().is_some_and(|user| superseding.contains(user));
            match verdict {
                Verdict::Delivered => {
                    superseding.extend(user);
                    delivered.push(waiting);
                }
                Verdict::Rejected { reason, detail } => {
                    waiting.history_mut().attempts += 1;
                    dead.push((waiting, reason.into(), detail));
                }
                Verdict::Resend | Verdict::Hold { .. } if superseded => {
                    waiting.history_mut().attempts += 1;
                    let detail = "a newer identify of the same user was delivered".to_owned();
                    dead.push((waiting, DeadLetterReason::Superseded, detail));
                }
                Verdict::Resend => again.push(waiting),
                Verdict::Hold { after, detail } => {
                    waiting.history_mut().attempts += 1;
                    held.push((waiting, after, detail));
                }
            }
        }

        for (waiting, after, detail) in held {
            self.note_attempts([(&waiting, waiting.history().attempts)], "held", &detail);
            let is_exhausted = self.settings.retry.is_exhausted(waiting.history().attempts);
            match self.next_cycle(waiting, is_exhausted) {
                Cycle::GoesOn(waiting) | Cycle::BeginsAgain(waiting) => {
                    self.metrics.retries.inc();
                    self.backlog.throttle(sent.endpoint, waiting, now + after);
                }
                Cycle::Over(waiting) => dead.push((waiting, DeadLetterReason::RetriesExhausted, detail)),
                Cycle::Parked => {}
            }
        }

        self.metrics.batch(if delivered.len() == event_count { "delivered" } else { "partial" });
        if !delivered.is_empty() {
            self.budget.deposit();
        }
        let took = sent.at.elapsed();
        if dead.is_empty() && again.is_empty() && delivered.len() == event_count {
            if self.lines.take(Line::Flushed, event_count) {
                info!(
                    provider = self.provider.name(),
                    event_count,
                    attempt,
                    duration_ms = millis(took),
                    "batch flushed successfully"
                );
            }
        } else if self.lines.take(Line::InPart, event_count) {
            warn!(
                provider = self.provider.name(),
                delivered = delivered.len(),
                rejected = dead.len(),
                sent_again = event_count - delivered.len() - dead.len(),
                attempt,
                duration_ms = millis(took),
                detail = dead.first().map_or("", |(_, _, detail)| detail),
                "batch taken in part"
            );
        }
        again.reverse();
        self.note_attempts(next_attempts(&again), "resend", "");
        self.backlog.put_back(sent.endpoint, again);
        self.deliver(delivered).await;
        dead.reverse();
        self.bury(sent.endpoint, dead).await;
    }

    /// Nothing was taken, or it is not known: all of it goes again, later.
    async fn retry_later(&mut self, sent: Sent, retry_after: Option<Duration>, detail: String) {
        let (now, event_count) = (Instant::now(), sent.events.len());
        let attempt = attempt_of(&sent.events);
        let answers = self.gate(sent.endpoint).answers();
        let is_logged = self.feed.is_some() && sent.events.iter().all(|it| it.place.log_seq().is_some());
        let down_for = self.gate(sent.endpoint).down_for(now).filter(|_| is_logged);
        let rule = self.settings.retry;
        let backoff = match down_for {
            // The log keeps events for as long as it lasts: the provider is probed,
            // with one event or another.
            Some(down_for) => rule.probe_delay(down_for, &mut self.rng).max(retry_after.unwrap_or_default()),
            None if is_logged && rule.is_exhausted(attempt) => {
                rule.park_delay(&mut self.rng).max(retry_after.unwrap_or_default())
            }
            None => rule.delay(attempt, retry_after, &mut self.rng),
        };
        let delay = backoff.max(self.budget.withdraw(now));
        self.gate(sent.endpoint).failed(now, delay, retry_after.is_some());
        self.note_attempts(next_attempts(&sent.events), "unavailable", &detail);

        let are_others =
            self.backlog.events() > event_count || self.feed.as_ref().is_some_and(LogFeed::is_behind);
        let mut dead = Vec::new();
        for mut waiting in sent.events {
            let history = waiting.history_mut();
            if history.attempts == 0 {
                history.answers_before = answers;
            }
            history.attempts += 1;
            let is_exhausted = self.settings.retry.is_exhausted(history.attempts);
            match self.next_cycle(waiting, is_exhausted) {
                Cycle::GoesOn(waiting) => {
                    self.metrics.retries.inc();
                    self.backlog.hold(sent.endpoint, waiting, now + delay);
                }
                Cycle::BeginsAgain(mut waiting) => {
                    self.metrics.retries.inc();
                    if waiting.history().answers_before < answers {
                        // Others got through: one of these may be poison that
                        // the provider does not name.
                        waiting.history_mut().together_max = event_count.div_ceil(2);
                    }
                    // The next probe takes others, if there are any.
                    let turns = if are_others { 2 } else { 1 };
                    self.backlog.hold(sent.endpoint, waiting, now + turns * delay);
                }
                Cycle::Over(waiting) => {
                    dead.push((waiting, DeadLetterReason::RetriesExhausted, detail.clone()));
                }
                Cycle::Parked => {}
            }
        }
        if dead.len() < event_count && self.lines.take(Line::Retrying, event_count) {
            warn!(
                provider = self.provider.name(),
                attempt,
                event_count,
                retry_in_ms = millis(delay),
                error = detail,
                "batch send failed, retrying"
            );
        }
        self.bury(sent.endpoint, dead).await;
    }

    /// Too much, or something in it: the halves go again at once. A lone event
    /// is to blame.
    async fn split(&mut self, sent: Sent, reason: DeadLetterReason, detail: String) {
        self.gate(sent.endpoint).answered();
        let Sent { endpoint, mut events, .. } = sent;
        if events.len() == 1 {
            let mut waiting = events.remove(0);
            waiting.history_mut().attempts += 1;
            self.bury(endpoint, vec![(waiting, reason, detail)]).await;
            return;
        }
        let half = events.len().div_ceil(2);
        self.note_attempts(next_attempts(&events), reason.name(), &detail);
        if self.lines.take(Line::Splitting, events.len()) {
            warn!(
                provider = self.provider.name(),
                event_count = events.len(),
                halves = half,
                error = detail,
                "batch send failed, splitting"
            );
        }
        for waiting in &mut events {
            waiting.history_mut().together_max = half;
        }
        self.backlog.put_back(endpoint, events);
    }

    /// The provider refuses our key or our address: the events wait, and no attempt is counted.
    fn pause(&mut self, sent: Sent, detail: &str) {
        self.gate(sent.endpoint).unauthorized(Instant::now());
        error!(
            provider = self.provider.name(),
            lane_events = self.backlog.events(),
            error = detail,
            "provider refuses its key or address: it is paused and its events wait"
        );
        if self.draining {
            // No attempt of this run can succeed.
            self.parked.extend(sent.events);
            self.parked.extend(self.backlog.take_all());
        } else {
            self.backlog.put_back(sent.endpoint, sent.events);
        }
    }

    /// What becomes of an event after an attempt that failed. Attempts of a
    /// drain come faster than the cycle means them to, so the next run begins a
    /// new one. What stands in the log begins one as often as need be, until its
    /// retention ends.
    fn next_cycle(&mut self, mut waiting: Waiting, is_exhausted: bool) -> Cycle {
        let is_logged = self.feed.is_some() && waiting.place.log_seq().is_some();
        if self.draining && (is_exhausted || is_logged) {
            self.parked.push(waiting);
            Cycle::Parked
        } else if !is_exhausted {
            Cycle::GoesOn(waiting)
        } else if is_logged {
            waiting.history_mut().attempts = 0;
            Cycle::BeginsAgain(waiting)
        } else {
            Cycle::Over(waiting)
        }
    }

    /// When the oldest event that has not ended was accepted, in Unix milliseconds.
    fn oldest_accepted_ms(&self) -> Option<i64> {
        let out = self.sent.values().filter_map(|sent| sent.events.first()).chain(&self.parked);
        let out = out.map(|waiting| waiting.event.accepted_ms());
        out.chain(self.backlog.oldest_accepted_ms()).min()
    }

    fn publish(&self) {
        let status = &self.status;
        status.events.store(self.backlog.events(), Ordering::Relaxed);
        status.bytes.store(self.backlog.bytes(), Ordering::Relaxed);
        status.reloaded.store(self.reloaded.left, Ordering::Relaxed);
        status.oldest_accepted_ms.store(self.oldest_accepted_ms().unwrap_or(0), Ordering::Relaxed);
        let state = self.gates.values().map(Gate::state).max().unwrap_or(ProviderState::Sending);
        status.state.store(state as u8, Ordering::Relaxed);
        status.full.store(self.backlog.events() >= self.settings.capacity.events_max, Ordering::Relaxed);
        let cannot_read = self.feed.as_ref().is_some_and(LogFeed::cannot_read);
        status.cannot_read.store(cannot_read, Ordering::Relaxed);
        if self.backlog.events() == 0 {
            status.dead_letters_fail.store(false, Ordering::Relaxed);
        }
    }

    /// Gives up what is under way and collects all that has not ended. Whether
    /// a request that is cut here arrived is unknown; its events go again at the
    /// next start, with the same ids.
    async fn leave(mut self, mut inbox: mpsc::Receiver<Batch>) -> Leftover {
        if self.settings.awaits_answers {
            while let Some(answered) = self.in_flight.join_next_with_id().await {
                self.settle(answered).await;
            }
        }
        // Answers that are here already are no longer unknown.
        while let Some(answered) = self.in_flight.try_join_next_with_id() {
            self.settle(answered).await;
        }
        self.in_flight.shutdown().await;
        self.lines.sum_up_rest(self.provider.name());
        // The batch worker stops with us; what it still had comes through here.
        while let Some(batch) = inbox.recv().await {
            for queued in batch.iter() {
                self.push(queued.event.clone(), queued.place);
            }
        }
        let mut events = self.backlog.take_all();
        events.append(&mut self.parked);
        events.extend(self.sent.into_values().flat_map(|sent| sent.events));
        // What is in the log stays there.
        events.retain(|waiting| waiting.place.log_seq().is_none());
        in_order(&mut events);
        Leftover { events, reloaded: self.reloaded.files }
    }
}

/// What becomes of an event after an attempt that failed.
enum Cycle {
    /// It is sent again.
    GoesOn(Waiting),
    /// It is sent again, later, in a cycle of its own.
    BeginsAgain(Waiting),
    /// That was the last attempt.
    Over(Waiting),
    /// It is not sent again in this run.
    Parked,
}

/// Events with the number of the attempt that was just made and is not counted.
fn next_attempts(events: &[Waiting]) -> impl Iterator<Item = (&Waiting, u32)> {
    events.iter().map(|waiting| (waiting, waiting.history().attempts + 1))
}

/// Waits for a log's feed, for ever if there is none.
async fn fed(feed: &mut Option<LogFeed>) -> Fed {
    match feed {
        Some(feed) => feed.wait().await,
        None => pending().await,
    }
}

/// An answer that can be acted upon: a verdict for each event, not only such as
/// ask for the same request again, and no wait that never ends.
fn checked(answer: Result<Vec<Verdict>, SendError>, events: usize) -> Result<Vec<Verdict>, SendError> {
    let unusable = |detail| Err(SendError::Unavailable { retry_after: None, detail });
    match answer {
        Ok(verdicts) if verdicts.len() != events => {
            unusable(format!("the provider's code gave {} verdicts for {events} events", verdicts.len()))
        }
        Ok(verdicts) if verdicts.iter().all(|verdict| *verdict == Verdict::Resend) => {
            unusable("the provider's code asks for the same request again".to_owned())
        }
        Ok(mut verdicts) => {
            for verdict in &mut verdicts {
                if let Verdict::Hold { after, .. } = verdict {
                    *after = (*after).min(RETRY_AFTER_MAX);
                }
            }
            Ok(verdicts)
        }
        Err(SendError::Unavailable { retry_after, detail }) => {
            let retry_after = retry_after.map(|after| after.min(RETRY_AFTER_MAX));
            Err(SendError::Unavailable { retry_after, detail })
        }
        Err(error) => Err(error),
    }
}

/// The attempt that a request is, for its oldest event.
fn attempt_of(events: &[Waiting]) -> u32 {
    events.iter().map(|waiting| waiting.history().attempts).max().unwrap_or(0) + 1
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
