//! What a lane sends, and when.

use std::collections::HashMap;

use analytics_relay_providers::{Endpoint, Event};
use tokio::{task::Id, time::Instant};
use tracing::{info, warn};

use super::{Lane, Sent};
use crate::delivery::{
    backlog::{Allowance, Waiting},
    doubt::{Doubt, RequestNumber},
    gate::{Gate, ProviderState, Refusal},
    routes::{Flow, Route},
};

impl Lane {
    pub(super) fn start_requests(&mut self, now: Instant) {
        if *self.suspended.borrow() {
            return;
        }
        let account_refused = self.account_refused();
        while self.in_flight.len() < self.limits.requests_max {
            let pace = Pace {
                gates: &self.gates,
                doubts: &self.doubts,
                delivered_by: &self.delivered_by,
                sent: &self.sent,
                draining: self.draining,
                account_refused,
                now,
                share: self.rng.f64(),
            };
            let (route, events) =
                self.backlog.next_request(|route, has_ready| pace.allowance(route, has_ready));
            if events.is_empty() {
                return;
            }
            let batch: Vec<Event> = events.iter().map(|waiting| waiting.event.clone()).collect();
            let provider = self.provider.clone();
            let number = self.next_request;
            self.next_request += 1;
            self.gate(route).sent(number);
            let request = self.in_flight.spawn(async move { provider.send(&batch).await });
            self.sent.insert(request.id(), Sent { number, route, events, at: now });
        }
    }

    /// While the provider refuses our key: the first request that could be sent after
    /// it last did so.
    fn account_refused(&self) -> Option<RequestNumber> {
        let gates = self.gates.values().filter(|gate| gate.refusal() == Some(Refusal::Account));
        gates.filter_map(Gate::next_after_refusal).max()
    }

    /// When something happens by itself: a held event becomes ready, a gate opens,
    /// or the disk is tried again.
    pub(super) fn wakes_at(&self, now: Instant) -> Option<Instant> {
        let gates = self.gates.values().filter_map(|gate| gate.opens_at(now)).min();
        let gates = gates.filter(|_| !self.draining);
        let suspects = self.doubts.values().filter_map(Doubt::suspects_wait_until);
        let suspects = suspects.filter(|until| *until > now).min();
        let source = self.source.wakes_at(now).map(|at| at.max(self.unwritten_until));
        let lines = self.lines.due_at();
        [self.backlog.next_release(), gates, suspects, source, self.letters.wakes_at(), lines]
            .into_iter()
            .flatten()
            .min()
    }

    pub(super) fn gate(&mut self, route: Route) -> &mut Gate {
        let probe_events = self.settings.probe_events;
        self.gates.entry(route).or_insert_with(|| Gate::new(probe_events))
    }

    /// A person has stopped the provider, or lets it go on.
    pub(super) fn suspend_or_resume(&mut self) {
        let (provider, lane_events) = (self.provider.name(), self.backlog.load().events);
        if *self.suspended.borrow_and_update() {
            warn!(provider, lane_events, "provider is suspended: its events wait");
        } else {
            info!(provider, lane_events, "provider is resumed");
        }
    }
}

/// How much may be sent, by what is known of the provider.
struct Pace<'a> {
    gates: &'a HashMap<Route, Gate>,
    doubts: &'a HashMap<Flow, Doubt>,
    delivered_by: &'a HashMap<Endpoint, RequestNumber>,
    sent: &'a HashMap<Id, Sent>,
    draining: bool,
    account_refused: Option<RequestNumber>,
    now: Instant,
    /// See [`Allowance::OneAt`].
    share: f64,
}

impl Pace<'_> {
    /// How much of a route may be sent now.
    fn allowance(&self, route: Route, has_ready: bool) -> Option<Allowance> {
        if self.draining {
            return Some(Allowance::SuspectOrUpTo(usize::MAX));
        }
        let Some(gate) = self.gates.get(&route) else {
            let events_max = if self.account_refused.is_some() { 1 } else { usize::MAX };
            return Some(Allowance::UpTo(events_max));
        };
        if gate.opens_at(self.now).is_some() {
            return None;
        }
        let under_way = || self.under_way(route).map(|sent| sent.events.len()).sum::<usize>();
        let unless_ready = |events_max| match has_ready || self.suspects_wait(route.endpoint) {
            true => Allowance::UpTo(events_max),
            false => Allowance::SuspectOrUpTo(events_max),
        };
        if let Some(refused) = self.account_refused.filter(|_| gate.refusal() != Some(Refusal::Account)) {
            // Whether it is the key or only another route is found out with one event after
            // each refusal.
            let may_probe = !gate.has_sent_since(refused) && under_way() == 0;
            return may_probe.then(|| unless_ready(1));
        }
        if gate.refusal() == Some(Refusal::Content) {
            return (under_way() == 0).then_some(Allowance::OneAt(self.share));
        }
        if gate.state() != ProviderState::Sending {
            return (under_way() == 0).then(|| unless_ready(gate.probe_events()));
        }
        let room = gate.window().map_or(usize::MAX, |window| window.saturating_sub(under_way()));
        if room == 0 {
            None
        } else if self.is_in_doubt(route.endpoint) {
            (under_way() == 0).then(|| unless_ready(room))
        } else if self.under_way(route).any(|sent| sent.events.first().is_some_and(Waiting::is_suspect)) {
            Some(Allowance::UpTo(room))
        } else {
            Some(Allowance::SuspectOrUpTo(room))
        }
    }

    fn suspects_wait(&self, endpoint: Endpoint) -> bool {
        let mut doubts = self.doubts.iter().filter(|(flow, _)| flow.endpoint == endpoint);
        doubts.any(|(_, doubt)| doubt.suspects_wait_until().is_some_and(|until| until > self.now))
    }

    /// One request at a time while it is not known what is to blame. A flow that is
    /// kept apart holds up no other; nor does one of which a few are refused while the
    /// endpoint takes others.
    fn is_in_doubt(&self, endpoint: Endpoint) -> bool {
        let delivered_by = self.delivered_by.get(&endpoint);
        let takes_others = |doubt: &Doubt| delivered_by.is_some_and(|by| doubt.refuses_before(*by));
        let mut doubts = self.doubts.iter().filter(|(flow, _)| flow.endpoint == endpoint);
        doubts.any(|(flow, doubt)| {
            doubt.is_open(self.now) && !takes_others(doubt) && !self.gates.contains_key(&flow.apart())
        })
    }

    fn under_way(&self, route: Route) -> impl Iterator<Item = &Sent> {
        self.sent.values().filter(move |sent| sent.route == route)
    }
}
