//! How events end: delivered, as dead letters, or lost; and that each end is
//! told to everybody who counts.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;
use tracing::{debug, error, warn};

use super::{
    Lane, Line,
    letters::{Dead, Unwritten, Written},
    next_attempts,
};
use crate::{
    delivery::{backlog::Waiting, dead_letter::DeadLetter, spill::SpillDir},
    letter_files::NotWritten,
    queue::Place,
    reasons::{
        DeadLetterReason::{self, Expired, SpoolFull},
        DropReason, Outcome,
    },
};

/// How long events wait that should have become dead letters and could not be
/// written.
const UNWRITTEN_DELAY: Duration = Duration::from_secs(5);
/// How long a lane that ends writes dead letters: most of the time that is kept for
/// writing what is left, which comes after it.
const LAST_WRITES_TIME: Duration = Duration::from_millis(700);
/// After this time providers may not recognise a copy of an event.
const DEDUPLICATION_MS: i64 = 24 * 3600 * 1000;

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
            let is_left = |seq| self.source.is_left(seq);
            let may_be_copy = waiting.attempts() > 0 || waiting.place.log_seq().is_some_and(is_left);
            if may_be_copy && now_ms - waiting.event.accepted_ms() > DEDUPLICATION_MS {
                self.metrics.duplicate_risk.inc();
            }
        }
        self.note_attempts(next_attempts(&events), Outcome::Delivered.name(), "");
        self.end(&events, Outcome::Delivered);
    }

    /// Writes on what waits to be a dead letter.
    pub(super) fn write_letters(&mut self) {
        let (provider, dead_since_ms) = (self.provider.name(), self.clock.now_ms());
        self.letters.write_on(|Dead { waiting, reason, detail, .. }| DeadLetter {
            dead_since_ms,
            provider: provider.to_owned(),
            reason: *reason,
            attempts: waiting.attempts(),
            detail: detail.clone(),
            event: waiting.event.clone(),
        });
    }

    /// A write of dead letters has ended; an event whose letter is not written has not.
    pub(super) fn end_letters(&mut self, (mut dead, result): Written) {
        let Err(NotWritten { written, why }) = result else { return self.end_written(dead) };
        let unwritten = dead.split_off(written.min(dead.len()));
        self.end_written(dead);
        self.keep_unwritten(unwritten, why);
    }

    /// These have become dead letters. Here alone they are counted as such.
    fn end_written(&mut self, dead: Vec<Dead>) {
        let mut by_reason: BTreeMap<DeadLetterReason, BTreeMap<String, Vec<Waiting>>> = BTreeMap::new();
        for Dead { waiting, reason, detail, .. } in dead {
            by_reason.entry(reason).or_default().entry(detail).or_default().push(waiting);
        }
        for (reason, by_detail) in by_reason {
            let outcome = Outcome::DeadLettered(reason);
            for (detail, events) in &by_detail {
                let attempts = events.iter().map(|waiting| (waiting, waiting.attempts()));
                self.note_attempts(attempts, &outcome.key(), detail);
            }
            let detail = by_detail.keys().next().cloned().unwrap_or_default();
            let events: Vec<Waiting> = by_detail.into_values().flatten().collect();
            if self.lines.take(Line::Letters, events.len()) {
                error!(
                    provider = self.provider.name(),
                    event_count = events.len(),
                    reason = reason.name(),
                    error = detail,
                    "events become dead letters"
                );
            }
            self.recorder.dead_lettered(reason, events.len());
            self.end(&events, outcome);
        }
    }

    /// The lane ends: what its disk takes at once is written yet, and what is not known
    /// to be written does not count as dead.
    pub(super) async fn write_last_letters(&mut self) {
        let until = Instant::now() + LAST_WRITES_TIME;
        self.letters.try_at_once();
        loop {
            if Instant::now() < until {
                self.write_letters();
            }
            let Some(written) = self.letters.written_until(until).await else { break };
            self.end_letters(written);
        }
        let event_count = self.letters.call_off();
        if event_count > 0 {
            warn!(
                provider = self.provider.name(),
                event_count, "a write of dead letters hangs: its events are kept for the next start"
            );
        }
        let unwritten = self.letters.take_all();
        self.keep_unwritten(unwritten, DropReason::DeadLetterFailed);
    }

    /// Dead letters could not be written. What stands in the log waits for room, or
    /// for the disk; so does what is in memory, for the disk alone.
    fn keep_unwritten(&mut self, dead: Vec<Dead>, why: DropReason) {
        let until = Instant::now() + UNWRITTEN_DELAY;
        let (mut again, mut lost) = (Vec::new(), Vec::new());
        for dead in dead {
            match dead.unwritten(why, self.draining) {
                Unwritten::TriedAgain => again.push(dead),
                Unwritten::Waits => {
                    self.letters.owe(&dead.waiting);
                    self.backlog.hold(dead.waiting, until);
                }
                Unwritten::GoesBack => {
                    self.unwritten_until = until;
                    self.letters.owe(&dead.waiting);
                    self.backlog.put_back(vec![dead.waiting]);
                }
                Unwritten::NextRun => self.parked.push(dead.waiting),
                Unwritten::Lost => lost.push(dead.waiting),
            }
        }
        self.letters.put_back(again, until);
        if !lost.is_empty() {
            self.drop_events(why, lost.len());
            self.end(&lost, Outcome::Dropped(why));
        }
    }

    pub(super) fn drop_events(&mut self, why: DropReason, event_count: usize) {
        self.recorder.dropped(why, event_count);
        if !self.lines.take(Line::Lost, event_count) {
            return;
        }
        let provider = self.provider.name();
        let reason = why.name();
        match why {
            DropReason::SpoolDamaged => {
                error!(provider, event_count, reason, "events lost: the spool is damaged");
            }
            DropReason::SealBroken => {
                error!(provider, event_count, reason, "events lost: somebody has changed what was sealed");
            }
            DropReason::Undecryptable => {
                error!(provider, event_count, reason, "events lost: they are sealed, and there is no key");
            }
            _ => error!(provider, event_count, reason, "events lost: they could not become dead letters"),
        }
    }

    /// Forgets events that have ended.
    pub(super) fn end(&mut self, events: &[Waiting], outcome: Outcome) {
        let mut logged = Vec::new();
        for waiting in events {
            self.backlog.settle(waiting);
            self.letters.ended(waiting);
            if let Some(seq) = waiting.place.log_seq() {
                logged.push(seq);
            }
        }
        self.source.ended(outcome, &logged);
        self.finish_reloaded(events.iter().filter(|waiting| waiting.place == Place::SPILL_FILE).count());
    }

    /// Removes spill files when the last of their events has ended.
    pub(super) fn finish_reloaded(&mut self, ended: usize) {
        self.reloaded.left -= ended;
        if self.reloaded.left == 0 && !self.reloaded.files.is_empty() {
            SpillDir::remove(&std::mem::take(&mut self.reloaded.files));
        }
    }

    /// Makes dead letters of events that are too old, or that must make room in
    /// the log.
    pub(super) fn let_go(&mut self, now: Instant) {
        if self.unwritten_until > now {
            return;
        }
        let surplus_before = self.source.surplus_before();
        if surplus_before > 0 {
            let is_surplus = |place: Place| place.log_seq().is_some_and(|seq| seq < surplus_before);
            let surplus = self.backlog.take_where(|waiting| is_surplus(waiting.place));
            self.bury_all(surplus, SpoolFull, "the spool is full");
        }
        let oldest_ms = self.backlog.oldest_accepted_ms();
        let expired_before = self.source.expired_before(self.clock.now_ms());
        if let (Some(oldest_ms), Some(before_ms)) = (oldest_ms, expired_before)
            && oldest_ms < before_ms
        {
            let expired = self.backlog.take_where(|waiting| {
                waiting.event.accepted_ms() < before_ms && waiting.place.log_seq().is_some()
            });
            // What is not in the log waits, however old it is.
            if !expired.is_empty() {
                self.bury_all(expired, Expired, "its retention has ended");
                self.source.look_again();
            }
        }
    }

    fn bury_all(&mut self, taken: Vec<Waiting>, reason: DeadLetterReason, detail: &str) {
        let dead = |waiting| Dead { waiting, reason, detail: detail.to_owned() };
        self.letters.push(taken.into_iter().map(dead));
    }

    /// Notes an attempt in the log, with its number for each event.
    pub(super) fn note_attempts<'a>(
        &self,
        events: impl IntoIterator<Item = (&'a Waiting, u32)>,
        verdict: &str,
        detail: &str,
    ) {
        let Some(reports) = self.source.reports() else { return };
        let mut attempts: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        for (waiting, attempt) in events {
            if let Some(seq) = waiting.place.log_seq() {
                attempts.entry(attempt).or_default().push(seq);
            }
        }
        let now_ms = self.clock.now_ms();
        for (attempt, seqs) in attempts {
            reports.attempted(now_ms, attempt, verdict, detail, &seqs);
        }
    }
}
