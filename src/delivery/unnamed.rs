//! What becomes of events in the log whose provider is not named any more.
//!
//! They wait there in case it is named again, but no longer than any other event,
//! and only as long as nobody needs their room: then they become dead letters of
//! their provider. Those that are too old and cannot become dead letters stay, as
//! they are in nobody's way; those whose room is needed are dropped, because an
//! event that comes in goes before one that nobody asks for.

use std::{path::Path, time::Duration};

use tokio::{task::spawn_blocking, time::Instant, time::sleep};
use tracing::{error, warn};

use super::dead_letter::{DeadLetter, DeadLetterDir, DeadLetterWriter, NotWritten};
use crate::{
    queue::spool::{LaneLog, age::AgeCheck, reader::LoggedEvent},
    reasons::{DeadLetterReason, DropReason, Outcome},
    shutdown::Stop,
    time::Clock,
};

/// Between two looks at the age of the oldest events, at most.
const AGE_INTERVAL: Duration = Duration::from_secs(60);
/// Events, and bytes of frames, that are read and written at once.
const EVENTS_AT_ONCE: usize = 1000;
const READ_BYTES: u64 = 512 * 1024;

/// Looks after the events of one provider that is not named.
pub(crate) struct Unnamed {
    provider: String,
    log: LaneLog,
    /// Every event before this has ended.
    next_seq: u64,
    dir: DeadLetterDir,
    dead_letters_bytes_max: u64,
    /// Opened when it is needed.
    letters: Option<DeadLetterWriter>,
    retention: Duration,
    ages: AgeCheck,
    clock: Clock,
}

/// Which events are to go.
#[derive(Debug, Clone, Copy)]
struct ToGo {
    /// Those with a lower number, because their room is needed.
    surplus_before: u64,
    /// Those that were accepted before, because they are too old.
    expired_before_ms: Option<i64>,
}

impl ToGo {
    fn reason(self, logged: &LoggedEvent) -> Option<DeadLetterReason> {
        if logged.seq < self.surplus_before {
            return Some(DeadLetterReason::SpoolFull);
        }
        let is_expired = self.expired_before_ms.is_some_and(|before| logged.event.accepted_ms() < before);
        is_expired.then_some(DeadLetterReason::Expired)
    }
}

impl Unnamed {
    /// For a provider of that name, with its view of the log.
    pub(crate) fn new(
        provider: String,
        log: LaneLog,
        data_dir: &Path,
        dead_letters_bytes_max: u64,
        retention: Duration,
        clock: Clock,
    ) -> Self {
        Self {
            dir: DeadLetterDir::new(data_dir, &provider),
            provider,
            next_seq: log.first_seq(),
            ages: log.ages(),
            log,
            dead_letters_bytes_max,
            letters: None,
            retention,
            clock,
        }
    }

    /// Runs until the relay drains.
    pub(crate) async fn run(mut self, stop: Stop) {
        let interval = AGE_INTERVAL.min(self.retention / 20).max(Duration::from_millis(10));
        let mut surplus = self.log.surplus();
        loop {
            let surplus_before = *surplus.borrow_and_update();
            if surplus_before == u64::MAX {
                // It is forgotten.
                return stop.draining().await;
            }
            let to_go = ToGo { surplus_before, expired_before_ms: self.expired_before_ms() };
            let (stopping, forgotten) = (stop.clone(), surplus.clone());
            let let_go = spawn_blocking(move || {
                // Neither a drain nor whoever forgets it waits for all of them.
                let goes_on = || !stopping.is_draining() && *forgotten.borrow() != u64::MAX;
                while goes_on() && self.let_go_of_some(to_go) {}
                self.log.close();
                self
            });
            self = let_go.await.expect("writing dead letters does not panic");
            tokio::select! {
                Ok(()) = surplus.changed() => {}
                () = sleep(interval) => {}
                () = stop.draining() => return,
            }
        }
    }

    fn expired_before_ms(&mut self) -> Option<i64> {
        let now_ms = self.clock.now_ms();
        let retention_ms = i64::try_from(self.retention.as_millis()).unwrap_or(i64::MAX);
        let judges = self.ages.judges(now_ms, Instant::now().into_std());
        judges.then(|| now_ms.saturating_sub(retention_ms))
    }

    /// Lets go of some of the oldest events, as far as they are to go. True if there may
    /// be more. Blocks on the disk.
    fn let_go_of_some(&mut self, to_go: ToGo) -> bool {
        let from = self.next_seq;
        let chunk = match self.log.read(from, EVENTS_AT_ONCE, READ_BYTES) {
            Ok(chunk) => chunk,
            Err(error) => {
                warn!(provider = self.provider, %error, "the spool cannot be read");
                return false;
            }
        };
        let (mut surplus, mut expired) = (Vec::new(), Vec::new());
        let mut end = chunk.next_seq;
        for logged in chunk.events {
            match to_go.reason(&logged) {
                Some(DeadLetterReason::SpoolFull) => surplus.push(logged),
                Some(_) => expired.push(logged),
                None => {
                    end = logged.seq;
                    break;
                }
            }
        }
        if surplus.is_empty() && expired.is_empty() && end < chunk.next_seq {
            return false;
        }
        chunk.damaged.into_iter().for_each(|range| self.log.reports().damaged(range));
        let gone = chunk.missing.into_iter().filter(|range| range.end <= end).collect();
        self.log.reports().ended_ranges(Outcome::Dropped(DropReason::SpoolDamaged), gone);
        if let Err(unwritten) = self.bury(&surplus, DeadLetterReason::SpoolFull, "the spool is full") {
            let lost = &surplus[unwritten.written..];
            self.end(lost, Outcome::Dropped(unwritten.why));
            error!(
                provider = self.provider,
                event_count = lost.len(),
                reason = unwritten.why.name(),
                "events of a provider that is not named are lost: they could not become dead letters"
            );
        }
        if let Some(last) = surplus.last() {
            self.next_seq = last.seq + 1;
        }
        if let Err(unwritten) = self.bury(&expired, DeadLetterReason::Expired, "its retention has ended") {
            if let Some(first) = expired.get(unwritten.written) {
                self.next_seq = first.seq;
            }
            return false;
        }
        self.next_seq = end;
        end == chunk.next_seq && end > from
    }

    fn bury(
        &mut self,
        events: &[LoggedEvent],
        reason: DeadLetterReason,
        detail: &str,
    ) -> Result<(), NotWritten> {
        if events.is_empty() {
            return Ok(());
        }
        let now_ms = self.clock.now_ms();
        let letter = |logged: &LoggedEvent| DeadLetter {
            dead_since_ms: now_ms,
            provider: self.provider.clone(),
            reason,
            attempts: 0,
            detail: detail.to_owned(),
            event: logged.event.clone(),
        };
        let letters: Vec<DeadLetter> = events.iter().map(letter).collect();
        let written = self.writer()?.write(&letters, now_ms);
        let events = &events[..written.map_or_else(|unwritten| unwritten.written, |()| events.len())];
        if !events.is_empty() {
            warn!(
                provider = self.provider,
                event_count = events.len(),
                reason = reason.name(),
                "events of a provider that is not named become dead letters"
            );
        }
        self.end(events, Outcome::DeadLettered(reason));
        written
    }

    fn writer(&mut self) -> Result<&mut DeadLetterWriter, NotWritten> {
        if self.letters.is_none() {
            let opened = DeadLetterWriter::open(&self.dir, self.dead_letters_bytes_max);
            self.letters = Some(opened.map_err(|error| {
                warn!(provider = self.provider, %error, "dead letters cannot be written");
                NotWritten::ANY
            })?);
        }
        Ok(self.letters.as_mut().expect("it was just opened"))
    }

    fn end(&self, events: &[LoggedEvent], outcome: Outcome) {
        if events.is_empty() {
            return;
        }
        let seqs: Vec<u64> = events.iter().map(|logged| logged.seq).collect();
        self.log.reports().ended(outcome, &seqs);
    }
}
