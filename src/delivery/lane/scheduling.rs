//! What a lane sends, and when.

use std::collections::HashMap;

use analytics_relay_providers::{Endpoint, Event};
use tokio::{task::Id, time::Instant};
use tracing::{info, warn};

use super::{Lane, Sent};
use crate::delivery::{
    backlog::Allowance,
    gate::{Doubt, Gate, ProviderState, Refusal},
    routes::{Kind, Route},
};

impl Lane {
    pub(super) fn start_requests(&mut self) {
        if *self.suspended.borrow() {
            return;
        }
        let now = Instant::now();
        let is_account_refused = self.is_account_refused();
        while self.in_flight.len() < self.limits.requests_max {
            let pace = Pace {
                gates: &self.gates,
                doubts: &self.doubts,
                sent: &self.sent,
                draining: self.draining,
                is_account_refused,
                now,
                share: if self.gates.is_empty() { 0.0 } else { self.rng.f64() },
            };
            let (route, events) = self.backlog.next_request(|route| pace.allowance(route));
            if events.is_empty() {
                return;
            }
            let batch: Vec<Event> = events.iter().map(|waiting| waiting.event.clone()).collect();
            let provider = self.provider.clone();
            let request = self.in_flight.spawn(async move { provider.send(&batch).await });
            self.sent.insert(request.id(), Sent { route, events, at: now });
        }
    }

    /// True while the provider refuses our key where there is something to try it
    /// with: another endpoint may take anything under a wrong key, and keep nothing.
    fn is_account_refused(&self) -> bool {
        let refused = |(route, gate): (&Route, &Gate)| {
            gate.refusal() == Some(Refusal::Account)
                && (self.backlog.has_waiting(*route) || under_way(&self.sent, *route) > 0)
        };
        self.gates.iter().any(refused)
    }

    /// When something happens by itself: a held event becomes ready, a gate opens,
    /// or the disk is tried again.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        let now = Instant::now();
        let gates = self.gates.values().filter_map(|gate| gate.opens_at(now)).min();
        let gates = gates.filter(|_| !self.draining);
        let source = self.source.wakes_at().map(|at| at.max(self.unwritten_until));
        let lines = self.lines.due_at();
        [self.backlog.next_release(), gates, source, self.letters.wakes_at(), lines]
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
        let (provider, lane_events) = (self.provider.name(), self.backlog.events());
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
    doubts: &'a HashMap<(Endpoint, Kind), Doubt>,
    sent: &'a HashMap<Id, Sent>,
    draining: bool,
    is_account_refused: bool,
    now: Instant,
    /// See [`Allowance::OneAt`].
    share: f64,
}

impl Pace<'_> {
    /// How much of a route may be sent now.
    fn allowance(&self, route: Route) -> Option<Allowance> {
        let all = Allowance::UpTo(usize::MAX);
        if self.draining {
            return Some(all);
        }
        let gate = self.gates.get(&route);
        if self.is_account_refused && gate.and_then(Gate::refusal) != Some(Refusal::Account) {
            return None;
        }
        let Some(gate) = gate else { return Some(all) };
        if gate.opens_at(self.now).is_some() {
            return None;
        }
        let window = gate.window();
        let is_in_doubt = self.is_in_doubt(route.endpoint);
        if gate.state() == ProviderState::Sending && window.is_none() && !is_in_doubt {
            return Some(all);
        }
        let under_way = under_way(self.sent, route);
        if gate.refusal() == Some(Refusal::Content) {
            return (under_way == 0).then_some(Allowance::OneAt(self.share));
        }
        if gate.state() != ProviderState::Sending {
            return (under_way == 0).then(|| Allowance::UpTo(gate.probe_events()));
        }
        let room = window.unwrap_or(usize::MAX).saturating_sub(under_way);
        (room > 0 && (under_way == 0 || !is_in_doubt)).then_some(Allowance::UpTo(room))
    }

    /// One request at a time while it is not known what is to blame. A kind that is
    /// kept apart holds up no other.
    fn is_in_doubt(&self, endpoint: Endpoint) -> bool {
        let is_apart = |kind| self.gates.contains_key(&Route { endpoint, apart: Some(kind) });
        let mut doubts = self.doubts.iter().filter(|((at, _), _)| *at == endpoint);
        doubts.any(|((_, kind), doubt)| doubt.is_open(self.now) && !is_apart(*kind))
    }
}

/// Events of a route that are under way.
fn under_way(sent: &HashMap<Id, Sent>, route: Route) -> usize {
    sent.values().filter(|sent| sent.route == route).map(|sent| sent.events.len()).sum()
}
