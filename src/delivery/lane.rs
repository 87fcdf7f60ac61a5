//! The owner of everything that one provider has not got yet.
//!
//! One task, which waits for nothing but its next event: not for the provider, nor
//! for its disk. It takes batches in at once, so that nobody waits for it; what does
//! not fit any more becomes a dead letter, or, if there is a log, is read from it
//! later. It sends what its backlog offers, reads one verdict per event, and ends
//! each event exactly once.
//!
//! [`source`] says what comes next, [`intake`] takes it in or leaves it [`aside`],
//! [`scheduling`] sends, [`settling`] reads the answers and [`refusing`] those that
//! refuse, [`ending`] and [`letters`] end events, [`leftover`] is what has not ended.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use analytics_relay_providers::{BatchLimits, Endpoint, Provider, SendError, Verdict};
use tokio::{
    sync::watch,
    task::{Id, JoinSet},
    time::{Instant, sleep_until},
};

use super::{
    backlog::{Backlog, Waiting, in_order},
    doubt::{Doubt, RequestNumber},
    gate::{Gate, ProviderState},
    recorder::Recorder,
    retry::{RetryBudget, RetryRule},
    routes::{Flow, Route},
};
use crate::{queue::QueueLimits, shutdown::Stop, telemetry::LaneMetrics, time::Clock};

mod aside;
mod ending;
mod erasing;
mod handover;
mod intake;
mod leftover;
mod letters;
mod lines;
mod refusing;
mod scheduling;
mod settling;
mod source;
mod status;

pub(crate) use leftover::Leftover;
pub(crate) use source::LaneSource;
pub(crate) use status::LaneStatus;

use aside::Aside;
use erasing::Erasing;
use letters::Letters;
use lines::{Line, Lines};
use source::Next;

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
    /// An event that is refused, by name or alone in its request, becomes a dead letter
    /// at once, and nothing is made of how many are: for a replay.
    pub(crate) convicts_at_once: bool,
    /// Most events that are left aside in the log, or a little more: what is delivered
    /// between them makes as many holes in the cursor.
    pub(crate) aside_events_max: usize,
}

/// For a running relay.
pub(crate) const ASIDE_EVENTS_MAX: usize = 250_000;

/// Who learns what a lane does.
pub(crate) struct LaneObservers {
    /// Ends events.
    pub(crate) recorder: Arc<dyn Recorder>,
    pub(crate) metrics: LaneMetrics,
    pub(crate) status: Arc<LaneStatus>,
}

/// A request that is under way.
struct Sent {
    number: RequestNumber,
    route: Route,
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
    source: LaneSource,
    recorder: Arc<dyn Recorder>,
    metrics: LaneMetrics,
    status: Arc<LaneStatus>,
    clock: Clock,
    stop: Stop,
    /// A person has stopped the provider.
    suspended: watch::Receiver<bool>,

    backlog: Backlog,
    in_flight: JoinSet<Result<Vec<Verdict>, SendError>>,
    sent: HashMap<Id, Sent>,
    next_request: RequestNumber,
    /// A wrong path, or a kind that is refused, must not stop the others.
    gates: HashMap<Route, Gate>,
    doubts: HashMap<Flow, Doubt>,
    /// The newest request that delivered something, by endpoint.
    delivered_by: HashMap<Endpoint, RequestNumber>,
    /// What stands in the log and there is no room for.
    asides: HashMap<Flow, Aside>,
    budget: RetryBudget,
    rng: fastrand::Rng,
    letters: Letters,
    reloaded: Reloaded,
    /// Until when no dead letter is tried for events that could stay.
    unwritten_until: Instant,
    /// Events that are not tried again in this run.
    parked: Vec<Waiting>,
    draining: bool,
    /// So that a lane that stays full is reported once.
    full: bool,
    /// When it was last said that the provider refuses something.
    refusal_told: Option<Instant>,
    lines: Lines,
    erasing: Erasing,
}

impl Lane {
    pub(crate) fn new(
        provider: Arc<dyn Provider>,
        settings: LaneSettings,
        source: LaneSource,
        observers: LaneObservers,
        clock: Clock,
        stop: Stop,
    ) -> Self {
        let LaneObservers { recorder, metrics, status } = observers;
        let limits = provider.limits();
        let now = Instant::now();
        Self {
            provider,
            limits,
            settings,
            source,
            letters: Letters::new(recorder.clone()),
            recorder,
            metrics,
            status,
            clock,
            stop,
            suspended: watch::Sender::new(false).subscribe(),
            backlog: Backlog::new(limits),
            in_flight: JoinSet::new(),
            sent: HashMap::new(),
            next_request: 0,
            gates: HashMap::new(),
            doubts: HashMap::new(),
            delivered_by: HashMap::new(),
            asides: HashMap::new(),
            budget: RetryBudget::new(now),
            rng: fastrand::Rng::new(),
            reloaded: Reloaded::default(),
            unwritten_until: now,
            parked: Vec::new(),
            draining: false,
            full: false,
            refusal_told: None,
            lines: Lines::default(),
            erasing: Erasing::default(),
        }
    }

    /// Sends nothing while that says so.
    pub(crate) fn suspend_while(&mut self, suspended: watch::Receiver<bool>) {
        self.suspended = suspended;
    }

    /// Runs until its source is closed and every event has ended, or until the relay
    /// is forced to stop. Returns what has not ended.
    pub(crate) async fn run(mut self) -> Leftover {
        let mut closed = false;
        let mut batches = Vec::new();
        loop {
            // One look at the clock: what opens between two would wake nobody.
            let now = Instant::now();
            self.backlog.release(now);
            if self.draining {
                self.park_refused();
            }
            self.let_go(now);
            self.erase_on();
            self.forget_refusals_of_nothing();
            self.read_on(now);
            self.start_requests(now);
            self.write_letters();
            self.publish();
            self.lines.sum_up(self.provider.name());
            if closed && self.is_done() {
                break;
            }
            let wake = self.wakes_at(now);
            tokio::select! {
                next = self.source.next(&mut batches) => match next {
                    Next::Brought => self.take_in(&mut batches),
                    Next::Read(chunk) => self.take_chunk(chunk),
                    Next::ReadAside(flow, chunk) => self.take_aside(flow, chunk),
                    Next::Closed => closed = true,
                    Next::Nothing => {}
                },
                Some(answered) = self.in_flight.join_next_with_id() => self.settle(answered).await,
                written = self.letters.written() => self.end_letters(written),
                () = sleep_until(wake.unwrap_or(now)), if wake.is_some() => {}
                Ok(()) = self.suspended.changed() => self.suspend_or_resume(),
                () = self.erasing.changed() => self.begin_to_erase(),
                () = self.stop.draining(), if !self.draining => self.begin_drain(),
                () = self.stop.forced() => break,
            }
        }
        self.leave().await
    }

    fn is_done(&self) -> bool {
        self.backlog.is_idle() && self.in_flight.is_empty() && self.letters.is_empty()
    }

    fn begin_drain(&mut self) {
        self.draining = true;
        // One prompt attempt for each; the deadline decides about more.
        self.backlog.release_all();
    }

    /// When the oldest event that has not ended was accepted, in Unix milliseconds.
    fn oldest_accepted_ms(&mut self) -> Option<i64> {
        let out = self.sent.values().filter_map(|sent| sent.events.first());
        let out = out.chain(&self.parked).chain(self.letters.first_events());
        let out = out.map(|waiting| waiting.event.accepted_ms()).min();
        let unread = self.source.unread_since_ms(|| self.clock.now_ms());
        [out, unread, self.backlog.oldest_accepted_ms()].into_iter().flatten().min()
    }

    fn publish(&mut self) {
        let oldest_ms = self.oldest_accepted_ms();
        let worst = self.gates.values().max_by_key(|gate| gate.state());
        let state = match worst {
            _ if *self.suspended.borrow() => ProviderState::Suspended,
            Some(gate) => gate.state(),
            None => ProviderState::Sending,
        };
        if let Some(gate) = worst.filter(|gate| gate.state() != ProviderState::Sending) {
            self.status.tell_trouble(gate.trouble());
        }
        let load = self.backlog.load();
        let is_full = load.events >= self.settings.capacity.events_max;
        self.status.publish(load, self.reloaded.left, oldest_ms, state);
        self.status.set_full(is_full);
        self.status.set_cannot_read(self.source.cannot_read());
        self.status.set_dead_letters_fail(self.letters.fail());
    }

    /// Gives up what is under way and collects all that has not ended. Whether
    /// a request that is cut here arrived is unknown; its events go again at the
    /// next start, with the same ids.
    async fn leave(mut self) -> Leftover {
        // Whatever told us to stop: nothing is tried again in this run.
        self.draining = true;
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
        self.write_last_letters().await;
        self.lines.sum_up_rest(self.provider.name());
        // The batch worker stops with us; what it still had comes through here.
        for queued in self.source.rest().await {
            self.push(queued);
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

/// Events with the number of the attempt that was just made and is not counted.
fn next_attempts(events: &[Waiting]) -> impl Iterator<Item = (&Waiting, u32)> {
    events.iter().map(|waiting| (waiting, waiting.attempts() + 1))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
