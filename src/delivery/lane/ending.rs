//! How events end: delivered, as dead letters, or lost; and that each end is
//! told to everybody who counts.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use analytics_relay_providers::{Endpoint, Event};
use tokio::time::Instant;
use tracing::{debug, error};

use super::{DEDUPLICATION_MS, LETTERS_AT_ONCE, Lane, Line, UNWRITTEN_DELAY, next_attempts};
use crate::{
    delivery::{backlog::Waiting, dead_letter::DeadLetter, spill::SpillDir},
    queue::Place,
    reasons::{DeadLetterReason, DropReason, Outcome},
};

impl Lane {
    pub(super) async fn deliver(&mut self, events: Vec<Waiting>) {
        if events.is_empty() {
            return;
        }
        self.recorder.delivered(&events).await;
        let now_ms = self.clock.now_ms();
        for waiting in &events {
            #[expect(clippy::cast_precision_loss, reason = "a duration")]
            self.metrics.delivery.observe((now_ms - waiting.event.accepted_ms()).max(0) as f64 / 1000.0);
            debug!(provider = self.provider.name(), event_id = %waiting.event.id(), "event delivered");
            let is_left = |seq| self.feed.as_ref().is_some_and(|feed| feed.is_left(seq));
            let may_be_copy = waiting.history().attempts > 0 || waiting.place.log_seq().is_some_and(is_left);
            if may_be_copy && now_ms - waiting.event.accepted_ms() > DEDUPLICATION_MS {
                self.metrics.duplicate_risk.inc();
            }
        }
        self.note_attempts(next_attempts(&events), Outcome::Delivered.name(), "");
        self.end(&events, Outcome::Delivered);
    }

    /// Makes events dead letters. What cannot be written has not ended: it goes
    /// to the provider once more, later.
    pub(super) async fn bury(&mut self, endpoint: Endpoint, dead: Vec<(Waiting, DeadLetterReason, String)>) {
        let mut by_reason: BTreeMap<DeadLetterReason, Vec<(Waiting, String)>> = BTreeMap::new();
        for (waiting, reason, detail) in dead {
            by_reason.entry(reason).or_default().push((waiting, detail));
        }
        for (reason, dead) in by_reason {
            self.bury_alike(endpoint, reason, dead).await;
        }
    }

    async fn bury_alike(
        &mut self,
        endpoint: Endpoint,
        reason: DeadLetterReason,
        dead: Vec<(Waiting, String)>,
    ) {
        let letters = dead
            .iter()
            .map(|(waiting, detail)| {
                self.letter(waiting.event.clone(), reason, waiting.history().attempts, detail.clone())
            })
            .collect();
        let written = self.recorder.dead_lettered(letters).await;
        self.status.dead_letters_fail.store(written.is_err(), Ordering::Relaxed);
        let outcome = Outcome::DeadLettered(reason);
        let mut by_detail: BTreeMap<String, Vec<Waiting>> = BTreeMap::new();
        for (waiting, detail) in dead {
            by_detail.entry(detail).or_default().push(waiting);
        }
        if written.is_ok() {
            for (detail, events) in &by_detail {
                let attempts = events.iter().map(|waiting| (waiting, waiting.history().attempts));
                self.note_attempts(attempts, &outcome.key(), detail);
            }
        }
        let detail = by_detail.first_key_value().map_or_else(String::new, |(detail, _)| detail.clone());
        let events: Vec<Waiting> = by_detail.into_values().flatten().collect();
        match written {
            Ok(()) => {
                if self.lines.take(Line::Letters, events.len()) {
                    error!(
                        provider = self.provider.name(),
                        event_count = events.len(),
                        reason = reason.name(),
                        error = detail,
                        "events become dead letters"
                    );
                }
                self.end(&events, outcome);
            }
            // They stay in the log, which has more room.
            Err(_) if matches!(reason, DeadLetterReason::Expired | DeadLetterReason::SpoolFull) => {
                self.unwritten_until = Instant::now() + UNWRITTEN_DELAY;
                self.backlog.put_back(endpoint, events);
            }
            // An identify that a newer one has overtaken must not be sent again.
            Err(why) if why == DropReason::DeadLettersFull || reason == DeadLetterReason::Superseded => {
                self.drop_events(why, events.len());
                self.end(&events, Outcome::Dropped(why));
            }
            Err(_) if self.draining => self.parked.extend(events),
            Err(_) => {
                let until = Instant::now() + UNWRITTEN_DELAY;
                events.into_iter().for_each(|waiting| self.backlog.hold(endpoint, waiting, until));
            }
        }
    }

    pub(super) fn drop_events(&mut self, reason: DropReason, event_count: usize) {
        self.recorder.dropped(reason, event_count);
        if !self.lines.take(Line::Lost, event_count) {
            return;
        }
        let provider = self.provider.name();
        if reason == DropReason::SpoolDamaged {
            error!(provider, event_count, reason = reason.name(), "events lost: the spool is damaged");
        } else {
            error!(
                provider,
                event_count,
                reason = reason.name(),
                "events lost: they could not become dead letters"
            );
        }
    }

    /// Forgets events that have ended.
    fn end(&mut self, events: &[Waiting], outcome: Outcome) {
        let mut logged = Vec::new();
        for waiting in events {
            self.backlog.settle(waiting);
            if let Some(seq) = waiting.place.log_seq() {
                logged.push(seq);
            }
        }
        if let Some(feed) = self.feed.as_ref().filter(|_| !logged.is_empty()) {
            feed.reports.ended(outcome, &logged);
        }
        self.finish_reloaded(events.iter().filter(|waiting| waiting.place == Place::SPILL_FILE).count());
    }

    /// Removes spill files when the last of their events has ended.
    pub(super) fn finish_reloaded(&mut self, ended: usize) {
        self.reloaded.left -= ended;
        if self.reloaded.left == 0 && !self.reloaded.files.is_empty() {
            SpillDir::remove(&std::mem::take(&mut self.reloaded.files));
        }
    }

    pub(super) fn letter(
        &self,
        event: Event,
        reason: DeadLetterReason,
        attempts: u32,
        detail: String,
    ) -> DeadLetter {
        let provider = self.provider.name().to_owned();
        DeadLetter { dead_since_ms: self.clock.now_ms(), provider, reason, attempts, detail, event }
    }

    /// Makes dead letters of events that are too old, or that must make room in
    /// the log.
    pub(super) async fn let_go(&mut self) {
        let Some(feed) = self.feed.as_ref().filter(|_| self.unwritten_until <= Instant::now()) else {
            return;
        };
        let surplus_before = feed.surplus_before();
        if surplus_before > 0 {
            let is_surplus = |place: Place| place.log_seq().is_some_and(|seq| seq < surplus_before);
            let surplus = self.backlog.take_where(|waiting| is_surplus(waiting.place));
            self.bury_all(surplus, DeadLetterReason::SpoolFull, "the spool is full").await;
        }
        let oldest_ms = self.backlog.oldest_accepted_ms();
        let expired_before = self.feed.as_mut().and_then(|feed| feed.expired_before(self.clock.now_ms()));
        if let (Some(oldest_ms), Some(before_ms)) = (oldest_ms, expired_before)
            && oldest_ms < before_ms
        {
            let expired = self.backlog.take_where(|waiting| {
                waiting.event.accepted_ms() < before_ms && waiting.place.log_seq().is_some()
            });
            self.bury_all(expired, DeadLetterReason::Expired, "its retention has ended").await;
            if let Some(feed) = &mut self.feed {
                feed.look_again();
            }
        }
    }

    async fn bury_all(&mut self, taken: Vec<(Endpoint, Waiting)>, reason: DeadLetterReason, detail: &str) {
        let mut by_endpoint: BTreeMap<Endpoint, Vec<Waiting>> = BTreeMap::new();
        for (endpoint, waiting) in taken {
            by_endpoint.entry(endpoint).or_default().push(waiting);
        }
        for (endpoint, mut events) in by_endpoint {
            while !events.is_empty() {
                let part = events.drain(..events.len().min(LETTERS_AT_ONCE));
                let dead = part.map(|waiting| (waiting, reason, detail.to_owned())).collect();
                self.bury(endpoint, dead).await;
            }
        }
    }

    /// Notes an attempt in the log, with its number for each event.
    pub(super) fn note_attempts<'a>(
        &self,
        events: impl IntoIterator<Item = (&'a Waiting, u32)>,
        verdict: &str,
        detail: &str,
    ) {
        let Some(feed) = &self.feed else { return };
        let mut attempts: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        for (waiting, attempt) in events {
            if let Some(seq) = waiting.place.log_seq() {
                attempts.entry(attempt).or_default().push(seq);
            }
        }
        let now_ms = self.clock.now_ms();
        for (attempt, seqs) in attempts {
            feed.reports.attempted(now_ms, attempt, verdict, detail, &seqs);
        }
    }
}
