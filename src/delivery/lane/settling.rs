//! What a lane makes of the answers to its requests.

use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

use analytics_relay_providers::{Rejection, SendError, Verdict, http::RETRY_AFTER_MAX};
use tokio::{
    task::{Id, JoinError},
    time::Instant,
};
use tracing::{info, warn};

use super::{Lane, Line, Sent, millis, next_attempts};
use crate::{
    delivery::{
        backlog::Waiting,
        doubt::RequestNumber,
        gate::{ProviderState, Refusal},
        routes::{Flow, Route},
    },
    reasons::DeadLetterReason,
};

/// What a provider's verdicts make of a request's events, in order.
#[derive(Default)]
struct Sorted {
    delivered: Vec<Waiting>,
    /// Named by the provider as events that it will never take.
    accused: Vec<(Waiting, DeadLetterReason, String)>,
    dead: Vec<(Waiting, DeadLetterReason, String)>,
    again: Vec<Waiting>,
    held: Vec<(Waiting, Duration, String)>,
}

impl Lane {
    pub(super) async fn settle(
        &mut self,
        answered: Result<(Id, Result<Vec<Verdict>, SendError>), JoinError>,
    ) {
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
                self.retry_later(sent, retry_after, detail);
            }
            Err(SendError::TooLarge { detail }) => {
                self.metrics.batch("too_large");
                self.settle_refused(sent, Refusal::Content, DeadLetterReason::TooLarge, detail);
            }
            Err(SendError::Refused { detail }) => {
                self.metrics.batch("refused");
                self.settle_refused(sent, Refusal::Content, DeadLetterReason::Invalid, detail);
            }
            Err(SendError::Unauthorized { detail }) => {
                self.metrics.batch("unauthorized");
                self.settle_refused(sent, Refusal::Account, DeadLetterReason::Invalid, detail);
            }
            Err(SendError::Misdirected { detail }) => {
                self.metrics.batch("misdirected");
                self.settle_refused(sent, Refusal::Address, DeadLetterReason::Invalid, detail);
            }
        }
    }

    /// The provider answered for each event.
    async fn settle_verdicts(&mut self, sent: Sent, verdicts: Vec<Verdict>) {
        let Sent { number, route, events, at } = sent;
        let (now, event_count, attempt) = (Instant::now(), events.len(), attempt_of(&events));
        let mut sorted = sort(events, verdicts);
        if sorted.delivered.is_empty() {
            self.gate(route).answered();
        } else {
            self.note_delivered(route, number, &sorted.delivered);
        }
        for (waiting, after, detail) in std::mem::take(&mut sorted.held) {
            self.note_attempts([(&waiting, waiting.attempts())], "held", &detail);
            let is_exhausted = self.settings.retry.is_exhausted(waiting.attempts());
            match self.next_cycle(waiting, is_exhausted) {
                Cycle::GoesOn(waiting) | Cycle::BeginsAgain(waiting) => {
                    self.metrics.retries.inc();
                    self.backlog.throttle(waiting, now + after);
                }
                Cycle::Over(waiting) => {
                    sorted.dead.push((waiting, DeadLetterReason::RetriesExhausted, detail));
                }
                Cycle::Parked => {}
            }
        }

        let is_whole = sorted.delivered.len() == event_count;
        self.metrics.batch(if is_whole { "delivered" } else { "partial" });
        self.tell_settled(&sorted, event_count, attempt, at);
        if !sorted.accused.is_empty() {
            self.judge_named(route, number, &mut sorted);
        }
        self.note_attempts(next_attempts(&sorted.again), "resend", "");
        self.backlog.put_back(sorted.again);
        self.deliver(sorted.delivered).await;
        self.bury(sorted.dead);
    }

    fn tell_settled(&mut self, sorted: &Sorted, event_count: usize, attempt: u32, sent_at: Instant) {
        let (provider, duration_ms) = (self.provider.name(), millis(sent_at.elapsed()));
        let delivered = sorted.delivered.len();
        if delivered == event_count {
            if self.lines.take(Line::Flushed, event_count) {
                info!(provider, event_count, attempt, duration_ms, "batch flushed successfully");
            }
        } else if self.lines.take(Line::InPart, event_count) {
            let rejected = sorted.accused.len() + sorted.dead.len();
            let mut details = sorted.accused.iter().chain(&sorted.dead).map(|(.., detail)| detail.as_str());
            warn!(
                provider,
                delivered,
                rejected,
                sent_again = event_count - delivered - rejected,
                attempt,
                duration_ms,
                detail = details.next().unwrap_or_default(),
                "batch taken in part"
            );
        }
    }

    /// The provider named some events that it will never take. Where it took others of
    /// their kind in the same request, they are to blame; where it would take others,
    /// they are singled out.
    fn judge_named(&mut self, route: Route, number: RequestNumber, sorted: &mut Sorted) {
        let (works, spared) = (flows(&sorted.delivered), flows(&sorted.again));
        let accused = std::mem::take(&mut sorted.accused);
        let (convicted, mut accused): (Vec<_>, Vec<_>) =
            accused.into_iter().partition(|(waiting, ..)| works.contains(&waiting.flow()));
        sorted.dead.extend(convicted);
        for (waiting, ..) in accused.iter_mut().filter(|(waiting, ..)| spared.contains(&waiting.flow())) {
            waiting.history_mut().charges.single_out();
        }
        self.accuse(route, number, Refusal::Content, accused);
    }

    /// Nothing was taken, or it is not known: all of it goes again, later.
    fn retry_later(&mut self, sent: Sent, retry_after: Option<Duration>, detail: String) {
        let (now, event_count) = (Instant::now(), sent.events.len());
        let (route, attempt) = (sent.route, attempt_of(&sent.events));
        let deliveries = self.gate(route).deliveries();
        let is_logged = sent.events.iter().all(|it| it.place.log_seq().is_some());
        let down_for = self.gate(route).down_for(now).filter(|_| is_logged);
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
        self.gate(route).failed(now, delay, retry_after.is_some());
        if self.gate(route).state() != ProviderState::Sending {
            self.gate(route).tell_trouble(&format!("does not take events: {detail}"));
        }
        self.note_attempts(next_attempts(&sent.events), "unavailable", &detail);

        let are_others = self.are_others(event_count);
        let mut dead = Vec::new();
        for mut waiting in sent.events {
            let history = waiting.history_mut();
            if history.attempts == 0 {
                history.deliveries_before = deliveries;
            }
            history.attempts += 1;
            let is_exhausted = self.settings.retry.is_exhausted(history.attempts);
            match self.next_cycle(waiting, is_exhausted) {
                Cycle::GoesOn(waiting) => {
                    self.metrics.retries.inc();
                    self.backlog.hold(waiting, now + delay);
                }
                Cycle::BeginsAgain(mut waiting) => {
                    self.metrics.retries.inc();
                    if waiting.history_mut().deliveries_before < deliveries {
                        // Others got through: one of these may be poison that
                        // the provider does not name.
                        waiting.history_mut().together_max = event_count.div_ceil(2);
                    }
                    // The next probe takes others, if there are any.
                    let turns = if are_others { 2 } else { 1 };
                    self.backlog.hold(waiting, now + turns * delay);
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
        self.bury(dead);
    }

    /// True if the lane has more than so many events that are out.
    fn are_others(&self, out: usize) -> bool {
        self.backlog.load().events > out || self.source.is_behind()
    }

    /// What becomes of an event after an attempt that failed. Attempts of a
    /// drain come faster than the cycle means them to, so the next run begins a
    /// new one. What stands in the log begins one as often as need be, until its
    /// retention ends.
    fn next_cycle(&mut self, mut waiting: Waiting, is_exhausted: bool) -> Cycle {
        let is_logged = waiting.place.log_seq().is_some();
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
}

/// The flows that events are of.
pub(super) fn flows(events: &[Waiting]) -> BTreeSet<Flow> {
    events.iter().map(Waiting::flow).collect()
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

/// Sorts events by their verdicts.
fn sort(events: Vec<Waiting>, verdicts: Vec<Verdict>) -> Sorted {
    let mut sorted = Sorted { delivered: Vec::with_capacity(events.len()), ..Sorted::default() };
    // From the newest: an identify must not follow a newer one of its user.
    let mut superseding = HashSet::new();
    for (mut waiting, verdict) in events.into_iter().zip(verdicts).rev() {
        let user = if waiting.event.is_identify() { waiting.event.subject() } else { None };
        let user = user.map(str::to_owned);
        let superseded = user.as_ref().is_some_and(|user| superseding.contains(user));
        let goes_on = match verdict {
            Verdict::Delivered => true,
            Verdict::Resend => !superseded,
            Verdict::Rejected { .. } | Verdict::Hold { .. } => false,
        };
        if !goes_on {
            waiting.history_mut().attempts += 1;
        }
        match verdict {
            Verdict::Delivered => {
                superseding.extend(user);
                sorted.delivered.push(waiting);
            }
            Verdict::Rejected { reason: Rejection::Invalid, detail } => {
                sorted.accused.push((waiting, DeadLetterReason::Invalid, detail));
            }
            Verdict::Rejected { reason, detail } => sorted.dead.push((waiting, reason.into(), detail)),
            Verdict::Resend | Verdict::Hold { .. } if superseded => {
                let detail = "a newer identify of the same user was delivered".to_owned();
                sorted.dead.push((waiting, DeadLetterReason::Superseded, detail));
            }
            Verdict::Resend => sorted.again.push(waiting),
            Verdict::Hold { after, detail } => sorted.held.push((waiting, after, detail)),
        }
    }
    sorted.accused.reverse();
    sorted.dead.reverse();
    sorted.again.reverse();
    sorted
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
    events.iter().map(Waiting::attempts).max().unwrap_or(0) + 1
}
