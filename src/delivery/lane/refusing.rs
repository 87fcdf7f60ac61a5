//! What a lane makes of a refusal: bad events are told from a provider in trouble,
//! and from a key or an address that is wrong. `delivery::gate` has the rule.
//!
//! Something between us and the provider may answer one event as the provider
//! answers a wrong key. So what was refused together is sent again in smaller parts
//! whatever the refusal says, and one that is refused alone while others get through
//! is to blame.

use std::{collections::BTreeMap, time::Duration};

use analytics_relay_providers::Endpoint;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{Lane, Line, Sent, letters::Dead, millis, next_attempts};
use crate::{
    delivery::{
        backlog::Waiting,
        gate::{Doubt, Refusal},
        routes::{Kind, Route},
    },
    reasons::DeadLetterReason,
};

/// Between two log lines about what a provider refuses.
const TELL_INTERVAL: Duration = Duration::from_secs(30);

impl Lane {
    /// The provider took nothing of a request, and says that it never will.
    pub(super) fn settle_refused(
        &mut self,
        sent: Sent,
        refusal: Refusal,
        reason: DeadLetterReason,
        detail: String,
    ) {
        let Sent { route, mut events, at } = sent;
        self.gate(route).answered();
        if events.len() == 1 {
            let mut waiting = events.remove(0);
            waiting.history_mut().attempts += 1;
            return self.accuse(route, at, refusal, vec![(waiting, reason, detail)]);
        }
        let (now, event_count) = (Instant::now(), events.len());
        let half = event_count.div_ceil(2);
        self.note_attempts(next_attempts(&events), "refused", &detail);
        let works = events.iter().any(|waiting| self.works_since_refused(route.endpoint, waiting));
        for waiting in &mut events {
            waiting.history_mut().together_max = half;
            waiting.history_mut().refused_at = Some(now);
        }
        match refusal {
            // How much is too much tells nothing of the events.
            Refusal::Content if reason == DeadLetterReason::TooLarge => {}
            Refusal::Content => {
                for kind in kinds(&events) {
                    self.doubt(route.endpoint, kind).refused(at, now, 0);
                }
            }
            // Others of them were taken since: one of these is to blame, and not the
            // key.
            Refusal::Account | Refusal::Address if works => {}
            Refusal::Account | Refusal::Address => self.close(route, refusal, &detail),
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
        self.backlog.put_back(route.endpoint, events);
    }

    /// The provider refused each of these events: by name, or alone in its request,
    /// which was sent at that time.
    pub(super) fn accuse(
        &mut self,
        route: Route,
        sent_at: Instant,
        refusal: Refusal,
        accused: Vec<(Waiting, DeadLetterReason, String)>,
    ) {
        if self.settings.convicts_at_once && refusal == Refusal::Content {
            return self.bury(route.endpoint, accused);
        }
        let Some(detail) = accused.first().map(|(.., detail)| detail.clone()) else { return };
        let now = Instant::now();
        let (mut convicted, mut suspects) = (Vec::new(), Vec::new());
        let mut new_suspects: BTreeMap<Kind, u32> = BTreeMap::new();
        for (mut waiting, reason, detail) in accused {
            let was_accused = waiting.history().accusations > 0;
            if was_accused && self.works_since_refused(route.endpoint, &waiting) {
                convicted.push((waiting, reason, detail));
                continue;
            }
            let history = waiting.history_mut();
            history.accusations += 1;
            history.refused_at = Some(now);
            *new_suspects.entry(Kind::of(&waiting.event)).or_default() += u32::from(!was_accused);
            suspects.push((waiting, reason, detail));
        }
        if refusal == Refusal::Content {
            for (kind, count) in &new_suspects {
                self.doubt(route.endpoint, *kind).refused(sent_at, now, *count);
            }
            // A few that are refused again and again, with nothing else to compare
            // them with, are at the end of their cycle like others.
            let rule = self.settings.retry;
            let doubts = &self.doubts;
            let is_over = |(waiting, ..): &(Waiting, DeadLetterReason, String)| {
                let doubt = doubts.get(&(route.endpoint, Kind::of(&waiting.event)));
                rule.is_exhausted(waiting.history().accusations) && doubt.is_none_or(Doubt::are_few)
            };
            convicted.extend(suspects.extract_if(.., |suspect| is_over(suspect)));
            for kind in new_suspects.into_keys() {
                if self.doubt(route.endpoint, kind).is_trouble() {
                    self.backlog.keep_apart(route.endpoint, kind);
                    let apart = Route { endpoint: route.endpoint, apart: Some(kind) };
                    self.close(apart, refusal, &detail);
                }
            }
        } else if !suspects.is_empty() {
            self.close(route, refusal, &detail);
        }
        self.bury(route.endpoint, convicted);
        self.hold_suspects(route, suspects);
    }

    /// Keeps events that may be to blame until others had their turn.
    fn hold_suspects(&mut self, route: Route, suspects: Vec<(Waiting, DeadLetterReason, String)>) {
        let (now, are_others) = (Instant::now(), self.are_others(suspects.len()));
        for (mut waiting, _, detail) in suspects {
            let accusations = waiting.history().accusations;
            self.note_attempts([(&waiting, waiting.history().attempts)], "refused", &detail);
            if self.draining && accusations > 1 {
                // What came with it has had its turn, and shows nothing.
                self.parked.push(waiting);
                continue;
            }
            self.metrics.retries.inc();
            waiting.history_mut().together_max = 1;
            let delay = self.settings.retry.suspect_delay(accusations, &mut self.rng);
            // The next probe takes others, if there are any.
            let turns = if are_others { 2 } else { 1 };
            self.backlog.hold(route.endpoint, waiting, now + turns * delay);
        }
    }

    /// Lets nothing but probes through to what is refused.
    fn close(&mut self, route: Route, refusal: Refusal, detail: &str) {
        let now = Instant::now();
        let rule = self.settings.retry;
        let refused_for = self.gate(route).refused_for(now);
        let delay = rule.probe_delay(refused_for, &mut self.rng);
        self.gate(route).refused(refusal, now, delay);
        let what = match (refusal, route.apart) {
            (Refusal::Account, _) => "refuses its key".to_owned(),
            (Refusal::Address, _) => "refuses its address".to_owned(),
            (Refusal::Content, None) => "refuses every event".to_owned(),
            (Refusal::Content, Some(kind)) => format!("refuses every {}", kind.name()),
        };
        self.status.tell_trouble(&format!("{what}: {detail}"));
        if self.refusal_told.is_some_and(|told| now - told < TELL_INTERVAL) {
            return;
        }
        self.refusal_told = Some(now);
        let (provider, lane_events) = (self.provider.name(), self.backlog.events());
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

    /// The provider takes a kind again that it refused.
    pub(super) fn bring_back(&mut self, endpoint: Endpoint, kind: Kind) {
        info!(provider = self.provider.name(), kind = kind.name(), "provider takes events again");
        self.gates.remove(&Route { endpoint, apart: Some(kind) });
        self.gate(Route::to(endpoint)).ease_in();
        self.backlog.bring_back(endpoint, kind);
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
        let is_refused = |endpoint, event: &_| {
            let apart = Route { endpoint, apart: Some(Kind::of(event)) };
            let gates = [gates.get(&apart), gates.get(&Route::to(endpoint))];
            gates.into_iter().flatten().any(|gate| gate.refusal().is_some())
        };
        let parked = self.backlog.take_where(|endpoint, waiting| {
            suspended || is_account_refused || is_refused(endpoint, &waiting.event)
        });
        self.parked.extend(parked.into_iter().map(|(_, waiting)| waiting));
    }

    /// True if the provider has taken another event of the kind that was sent after
    /// this one was refused.
    fn works_since_refused(&self, endpoint: Endpoint, waiting: &Waiting) -> bool {
        let doubt = self.doubts.get(&(endpoint, Kind::of(&waiting.event)));
        let refused_at = waiting.history().refused_at;
        refused_at.zip(doubt).is_some_and(|(refused_at, doubt)| doubt.works_since(refused_at))
    }

    fn doubt(&mut self, endpoint: Endpoint, kind: Kind) -> &mut Doubt {
        self.doubts.entry((endpoint, kind)).or_default()
    }

    /// Events become dead letters as soon as their disk takes them.
    pub(super) fn bury(
        &mut self,
        endpoint: Endpoint,
        dead: impl IntoIterator<Item = (Waiting, DeadLetterReason, String)>,
    ) {
        self.letters.push(dead.into_iter().map(|(waiting, reason, detail)| Dead {
            endpoint,
            waiting,
            reason,
            detail,
        }));
    }
}

/// The kinds of some events, each once.
fn kinds(events: &[Waiting]) -> Vec<Kind> {
    let mut kinds: Vec<Kind> = events.iter().map(|waiting| Kind::of(&waiting.event)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    kinds
}
