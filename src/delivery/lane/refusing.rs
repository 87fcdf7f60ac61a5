//! What a lane makes of a refusal: bad events are told from a provider in trouble,
//! and from a key or an address that is wrong. `delivery::doubt` has the rule.
//!
//! Something between us and the provider may answer one event as the provider
//! answers a wrong key. So what was refused together is sent again in smaller parts
//! whatever the refusal says, and other ways to the provider are tried meanwhile: where
//! one of them gets through, it is not the key, and what is refused is judged as any
//! other event.

use std::{cell::Cell, collections::BTreeSet, time::Duration};

use analytics_relay_providers::event::Kind;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{Lane, Line, Sent, letters::Dead, millis, next_attempts, settling::flows};
use crate::{
    delivery::{
        backlog::Waiting,
        doubt::{Charges, RequestNumber},
        gate::Refusal,
        routes::{Flow, Route},
    },
    reasons::DeadLetterReason,
};

/// Between two log lines about what a provider refuses.
const TELL_INTERVAL: Duration = Duration::from_secs(30);
/// How long an event in the log is kept that is refused again and again while too few
/// others of its kind come to tell what is to blame.
const LONE_TIME: Duration = Duration::from_secs(3600);

/// An event that a provider refuses, what it would be a dead letter of, and the
/// provider's words.
pub(super) type Accused = (Waiting, DeadLetterReason, String);

impl Lane {
    /// The provider took nothing of a request, and says that it never will.
    pub(super) fn settle_refused(
        &mut self,
        sent: Sent,
        refusal: Refusal,
        reason: DeadLetterReason,
        detail: String,
    ) {
        let Sent { number, route, mut events, .. } = sent;
        self.gate(route).answered();
        let refusal = self.refusal_of(refusal, route, &events);
        if events.len() == 1 {
            let mut waiting = events.remove(0);
            waiting.history_mut().attempts += 1;
            return self.accuse(route, number, refusal, vec![(waiting, reason, detail)]);
        }
        let (now, event_count) = (Instant::now(), events.len());
        let half = event_count.div_ceil(2);
        self.note_attempts(next_attempts(&events), "refused", &detail);
        for waiting in &mut events {
            waiting.history_mut().together_max = half;
            waiting.history_mut().charges.refused(self.next_request);
        }
        // How much is too much tells nothing of the events.
        if reason != DeadLetterReason::TooLarge && !self.settings.convicts_at_once {
            for flow in flows(&events) {
                self.doubts.entry(flow).or_default().refused(number, self.next_request, now);
            }
        }
        if refusal != Refusal::Content {
            self.close(route, refusal, &detail);
        }
        if self.lines.take(Line::Splitting, event_count) {
            warn!(
                provider = self.provider.name(),
                event_count,
                halves = half,
                error = detail,
                "batch send failed, splitting"
            );
        }
        self.backlog.put_back(events);
    }

    /// What a provider refuses when it refuses these: not the key, or the address, if
    /// others got through by it since it refused them before.
    fn refusal_of(&self, said: Refusal, route: Route, events: &[Waiting]) -> Refusal {
        let delivered_by = match said {
            _ if route.apart.is_some() => return Refusal::Content,
            Refusal::Content => None,
            Refusal::Address => self.delivered_by.get(&route.endpoint).copied(),
            Refusal::Account => self.delivered_by.values().max().copied(),
        };
        let Some(by) = delivered_by else { return said };
        let is_theirs = events.iter().any(|waiting| {
            let after = waiting.charges().and_then(Charges::next_after_refusal);
            let doubt = self.doubts.get(&waiting.flow());
            after.is_some_and(|after| by >= after) || doubt.is_some_and(|doubt| doubt.refuses_before(by))
        });
        if is_theirs { Refusal::Content } else { said }
    }

    /// The provider refused each of these events: by name, or alone in its request.
    pub(super) fn accuse(
        &mut self,
        route: Route,
        request: RequestNumber,
        refusal: Refusal,
        mut accused: Vec<Accused>,
    ) {
        if self.settings.convicts_at_once && refusal == Refusal::Content {
            return self.bury(accused);
        }
        let Some(detail) = accused.first().map(|(.., detail)| detail.clone()) else { return };
        let (now, next) = (Instant::now(), self.next_request);
        let (mut flows, mut doubted) = (BTreeSet::new(), BTreeSet::new());
        for (waiting, reason, detail) in &mut accused {
            let flow = waiting.flow();
            let doubt = self.doubts.entry(flow).or_default();
            flows.insert(flow);
            let is_logged = waiting.place.log_seq().is_some();
            let of = (*reason, detail.clone());
            let history = waiting.history_mut();
            if doubt.are_void(&history.charges) {
                // Nor did it fail in its own time.
                history.attempts = 1;
            }
            let speaks = doubt.accuse(&mut history.charges, of, is_logged, next, now);
            if speaks && doubted.insert(flow) {
                doubt.refused(request, next, now);
            }
        }
        let troubles: Vec<Flow> = flows.into_iter().filter(|flow| self.comes_to_trouble(*flow)).collect();
        if refusal != Refusal::Content {
            self.close(route, refusal, &detail);
            return self.hold_suspects(accused);
        }
        for flow in troubles {
            self.backlog.keep_apart(flow);
            self.close(flow.apart(), refusal, &detail);
        }
        let lone = accused.extract_if(.., |(waiting, ..)| self.is_at_its_end(waiting, now)).collect();
        self.bury(lone);
        self.hold_suspects(accused);
    }

    fn comes_to_trouble(&mut self, flow: Flow) -> bool {
        self.doubts.entry(flow).or_default().comes_to_trouble()
    }

    /// True for an event that is proven to be to blame, or is refused again and again
    /// with nothing to compare it with: that is at the end of its cycle like others. One
    /// that stands in the log can wait for more to tell by.
    fn is_at_its_end(&self, waiting: &Waiting, now: Instant) -> bool {
        let Some((charges, doubt)) = waiting.charges().zip(self.doubts.get(&waiting.flow())) else {
            return false;
        };
        if charges.are_proven() && !doubt.are_void(charges) {
            return true;
        }
        let is_logged = waiting.place.log_seq().is_some();
        self.settings.retry.is_exhausted(charges.accusations())
            && !charges.are_unproven()
            && doubt.are_few()
            && !doubt.is_by_chance(now)
            && (!is_logged || charges.accused_for(now) >= LONE_TIME)
    }

    /// Keeps events that may be to blame until others had their turn.
    fn hold_suspects(&mut self, suspects: Vec<Accused>) {
        let now = Instant::now();
        for (mut waiting, _, detail) in suspects {
            self.note_attempts([(&waiting, waiting.attempts())], "refused", &detail);
            let history = waiting.history_mut();
            history.together_max = 1;
            let (accusations, accused_for) =
                (history.charges.accusations(), history.charges.accused_for(now));
            if self.draining && accusations > 1 {
                // What came with it has had its turn, and shows nothing.
                self.parked.push(waiting);
                continue;
            }
            self.metrics.retries.inc();
            let delay = self.settings.retry.suspect_delay(accusations, accused_for, &mut self.rng);
            self.backlog.hold(waiting, now + delay);
        }
    }

    /// Lets nothing but probes through to what is refused.
    fn close(&mut self, route: Route, refusal: Refusal, detail: &str) {
        let now = Instant::now();
        let rule = self.settings.retry;
        let refused_for = self.gate(route).refused_for(now);
        let delay = rule.probe_delay(refused_for, &mut self.rng);
        let next_request = self.next_request;
        self.gate(route).refused(refusal, next_request, now, delay);
        let what = match (refusal, route.apart) {
            (Refusal::Account, _) => "refuses its key".to_owned(),
            (Refusal::Address, _) => "refuses its address".to_owned(),
            (Refusal::Content, None) => "refuses every event".to_owned(),
            (Refusal::Content, Some(kind)) => format!("refuses every {}", kind.name()),
        };
        self.gate(route).tell_trouble(&format!("{what}: {detail}"));
        if self.refusal_told.is_some_and(|told| now - told < TELL_INTERVAL) {
            return;
        }
        self.refusal_told = Some(now);
        let (provider, lane_events) = (self.provider.name(), self.backlog.load().events);
        let retry_in_ms = millis(delay);
        match refusal {
            Refusal::Account | Refusal::Address => error!(
                provider,
                lane_events,
                retry_in_ms,
                error = detail,
                "provider refuses its key or address: it is paused and its events wait"
            ),
            Refusal::Content => error!(
                provider,
                lane_events,
                retry_in_ms,
                error = detail,
                kind = route.apart.map(Kind::name),
                "provider refuses what it is sent: it is probed and its events wait"
            ),
        }
    }

    /// The provider took some of that request: it works, as far as they show it.
    #[inline]
    pub(super) fn note_delivered(&mut self, route: Route, request: RequestNumber, delivered: &[Waiting]) {
        self.gate(route).delivered(request, Instant::now());
        self.budget.deposit();
        let newest = self.delivered_by.entry(route.endpoint).or_default();
        *newest = (*newest).max(request);
        for (other, gate) in &mut self.gates {
            let is_shown = match gate.refusal() {
                Some(Refusal::Account) => true,
                Some(Refusal::Address) => other.endpoint == route.endpoint,
                Some(Refusal::Content) | None => false,
            };
            if is_shown && gate.next_after_refusal().is_some_and(|after| request >= after) {
                gate.refuses_no_more();
            }
        }
        if let Some(flow) = route.flow_apart().filter(|_| self.gate(route).refusal().is_none()) {
            info!(provider = self.provider.name(), kind = flow.kind.name(), "provider takes events again");
            self.bring_back(flow);
        }
        let mut flows = BTreeSet::new();
        for alike in delivered.chunk_by(|one, next| one.flow() == next.flow()) {
            let flow = alike[0].flow();
            flows.insert(flow);
            let doubt = self.doubts.entry(flow).or_default();
            doubt.delivered(request);
            if alike.iter().any(Waiting::is_suspect) {
                doubt.acquitted(Instant::now());
                self.absolve(flow);
            }
        }
        for flow in flows {
            self.bury_condemned(flow);
        }
    }

    /// One that was accused in trouble got through: so may the others.
    fn absolve(&mut self, flow: Flow) {
        let Some(doubt) = self.doubts.get(&flow) else { return };
        let mut absolved = self.backlog.take_accused_or_held(|waiting| {
            let charges = waiting.charges().filter(|_| waiting.is_suspect() && waiting.flow() == flow);
            charges.is_some_and(|charges| doubt.are_void(charges))
        });
        for waiting in &mut absolved {
            let history = waiting.history_mut();
            (history.charges, history.together_max, history.attempts) = (Charges::default(), usize::MAX, 0);
        }
        self.backlog.put_back(absolved);
    }

    fn bring_back(&mut self, flow: Flow) {
        self.gates.remove(&flow.apart());
        self.gate(Route::to(flow.endpoint)).ease_in();
        self.backlog.bring_back(flow);
    }

    /// Others got through: what was condemned before is to blame.
    fn bury_condemned(&mut self, flow: Flow) {
        let Some(doubt) = self.doubts.get_mut(&flow).filter(|doubt| doubt.has_condemned()) else { return };
        let others = Cell::new(false);
        let condemned = self.backlog.take_accused_or_held(|waiting| {
            let Some(charges) = waiting.charges().filter(|charges| charges.sentence().is_some()) else {
                return false;
            };
            let is_confirmed = waiting.flow() == flow && doubt.confirms(charges);
            others.set(others.get() || !is_confirmed);
            is_confirmed
        });
        doubt.note_condemned(others.get());
        let dead = condemned.into_iter().filter_map(|waiting| {
            let (reason, detail) = waiting.charges()?.sentence()?.clone();
            Some((waiting, reason, detail))
        });
        let dead: Vec<Accused> = dead.collect();
        self.bury(dead);
    }

    /// What is refused and not there any more is no trouble.
    pub(super) fn forget_refusals_of_nothing(&mut self) {
        let is_of_nothing = |route: Route| {
            let is_aside = |flow: &Flow| self.backlog.route_of(*flow) == route;
            !self.backlog.uses(route)
                && !self.asides.iter().any(|(flow, aside)| !aside.is_empty() && is_aside(flow))
        };
        let refused = self.gates.iter().filter(|(_, gate)| gate.refusal().is_some());
        let of_nothing: Vec<Route> =
            refused.map(|(route, _)| *route).filter(|route| is_of_nothing(*route)).collect();
        for route in of_nothing {
            match route.flow_apart() {
                Some(flow) => self.bring_back(flow),
                None => self.gate(route).refuses_no_more(),
            }
        }
    }

    /// While draining: what is refused is not sent again in this run, in which it
    /// could not succeed.
    pub(super) fn park_refused(&mut self) {
        let gates = &self.gates;
        let suspended = *self.suspended.borrow();
        let is_account_refused = gates.values().any(|gate| gate.refusal() == Some(Refusal::Account));
        if !suspended && gates.values().all(|gate| gate.refusal().is_none()) {
            return;
        }
        let is_refused = |flow: Flow| {
            let gates = [gates.get(&flow.apart()), gates.get(&Route::to(flow.endpoint))];
            gates.into_iter().flatten().any(|gate| gate.refusal().is_some())
        };
        let is_parked = |waiting: &Waiting| suspended || is_account_refused || is_refused(waiting.flow());
        let parked = self.backlog.take_where(is_parked);
        self.parked.extend(parked);
    }

    /// Events become dead letters as soon as their disk takes them.
    pub(super) fn bury(&mut self, dead: Vec<Accused>) {
        self.letters.push(dead.into_iter().map(|(waiting, reason, detail)| Dead { waiting, reason, detail }));
    }
}
