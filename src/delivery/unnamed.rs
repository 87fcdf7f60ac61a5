//! What becomes of events in the log whose provider is not named any more.
//!
//! They wait there in case it is named again, but no longer than any other event,
//! and only as long as nobody needs their room: then they become dead letters of
//! their provider. Those that are too old and cannot become dead letters stay, as
//! they are in nobody's way; those whose room is needed are dropped, because an
//! event that comes in goes before one that nobody asks for.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};
use tracing::{error, warn};

use super::dead_letter::{DeadLetter, DeadLetterDir};
use crate::{
    letter_files::{LetterWriter, NotWritten},
    privacy::suppression::Suppressed,
    queue::spool::{LaneLog, reader::LoggedEvent},
    reasons::{DeadLetterReason, DropReason, Outcome},
    sealing::Sealing,
    shutdown::Stop,
    time::{Clock, WallCheck},
};

/// Between two looks at the age of the oldest events, at most.
const AGE_INTERVAL: Duration = Duration::from_secs(60);
/// What is to go of a provider that is forgotten: the log ends it all by itself.
const FORGOTTEN: u64 = u64::MAX;
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
    sealing: Sealing,
    /// Opened when it is needed.
    letters: Option<LetterWriter>,
    retention: Duration,
    wall: WallCheck,
    clock: Clock,
    /// Users of whom no dead letter is made.
    suppressed: Option<Arc<Suppressed>>,
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
            wall: log.wall_check(),
            log,
            dead_letters_bytes_max,
            sealing: Sealing::default(),
            letters: None,
            retention,
            clock,
            suppressed: None,
        }
    }

    /// Makes no dead letters of those who are suppressed.
    pub(crate) fn leave_out(self, suppressed: Arc<Suppressed>) -> Self {
        Self { suppressed: Some(suppressed), ..self }
    }

    /// Seals the dead letters, if that is to be.
    pub(crate) fn sealing(self, sealing: &Sealing) -> Self {
        Self { sealing: sealing.clone(), ..self }
    }

    /// Runs until the relay drains.
    pub(crate) async fn run(mut self, stop: Stop) {
        let interval = AGE_INTERVAL.min(self.retention / 20).max(Duration::from_millis(10));
        let mut surplus = self.log.surplus();
        loop {
            let surplus_before = *surplus.borrow_and_update();
            if surplus_before == FORGOTTEN {
                return stop.draining().await;
            }
            let to_go = ToGo { surplus_before, expired_before_ms: self.expired_before_ms() };
            let (stopping, asked) = (stop.clone(), surplus.clone());
            let let_go = spawn_blocking(move || {
                let is_over = || stopping.is_draining() || *asked.borrow() == FORGOTTEN;
                self.let_go(to_go, is_over);
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
        let is_trusted = self.wall.is_trusted(now_ms, Instant::now());
        is_trusted.then(|| now_ms.saturating_sub(retention_ms))
    }

    /// Lets go of the oldest events, as far as they are to go and until it is over:
    /// neither a drain nor whoever forgets the provider waits for all of them. Blocks on
    /// the disk.
    fn let_go(&mut self, to_go: ToGo, is_over: impl Fn() -> bool) {
        while !is_over() && self.let_go_of_some(to_go) {}
        self.log.close();
    }

    /// True if there may be more.
    fn let_go_of_some(&mut self, to_go: ToGo) -> bool {
        let from = self.next_seq;
        let mut chunk = match self.log.read(from, EVENTS_AT_ONCE, READ_BYTES) {
            Ok(chunk) => chunk,
            Err(error) => {
                warn!(provider = self.provider, %error, "the spool cannot be read");
                return false;
            }
        };
        let (mut surplus, mut expired, mut erased) = (Vec::new(), Vec::new(), Vec::new());
        let mut end = chunk.next_seq;
        for logged in std::mem::take(&mut chunk.events) {
            match to_go.reason(&logged) {
                Some(_) if self.is_erased(&logged) => erased.push(logged),
                Some(DeadLetterReason::SpoolFull) => surplus.push(logged),
                Some(_) => expired.push(logged),
                None => {
                    end = logged.seq;
                    break;
                }
            }
        }
        if surplus.is_empty() && expired.is_empty() && erased.is_empty() && end < chunk.next_seq {
            return false;
        }
        std::mem::take(&mut chunk.damaged).into_iter().for_each(|range| self.log.reports().damaged(range));
        chunk.missing.retain(|missing| missing.seqs.end <= end);
        for (why, gone) in chunk.take_missing() {
            self.log.reports().ended_ranges(Outcome::Dropped(why), gone);
        }
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
            // The others are read again.
            erased.retain(|logged| logged.seq < self.next_seq);
            self.end(&erased, Outcome::Dropped(DropReason::Erased));
            return false;
        }
        self.next_seq = end;
        self.end(&erased, Outcome::Dropped(DropReason::Erased));
        end == chunk.next_seq && end > from
    }

    fn is_erased(&self, logged: &LoggedEvent) -> bool {
        self.suppressed.as_ref().is_some_and(|list| list.covers_event(&logged.event))
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

    fn writer(&mut self) -> Result<&mut LetterWriter, NotWritten> {
        if self.letters.is_none() {
            let opened = LetterWriter::open(&self.dir, self.dead_letters_bytes_max);
            let opened = opened.map(|opened| opened.sealing(&self.sealing));
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

#[cfg(test)]
mod tests {
    use std::{cell::Cell, fs};

    use tempfile::TempDir;

    use super::*;
    use crate::{
        delivery::test_support::track,
        queue::{
            Durability, QueueLimits,
            memory::{self, QueueReceiver},
            spool::{
                OpenedSpool, SpoolSettings, SpoolThread, WhenFull,
                log::{LogKeys, LogLimits},
            },
        },
        telemetry::SpoolMetrics,
    };

    const EVENTS: u64 = 3500;
    const ALL: ToGo = ToGo { surplus_before: u64::MAX, expired_before_ms: None };

    /// A log that holds events of a provider which is not named any more.
    struct Log {
        thread: SpoolThread,
        unnamed: Unnamed,
        _queue: QueueReceiver,
        dir: TempDir,
    }

    impl Log {
        async fn start(dead_letters_bytes_max: u64) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let open = |names: &[&str]| {
                let settings = SpoolSettings {
                    dir: dir.path().join("spool"),
                    default_level: Durability::Written,
                    keys: LogKeys::default(),
                    limits: LogLimits { segment_bytes: 1 << 22, bytes_max: 1 << 30 },
                    provider_bytes_max: vec![1 << 30; names.len()],
                    when_full: WhenFull::Reject,
                    retention: Duration::from_secs(3600),
                    group_window: Duration::ZERO,
                    group_bytes: 1 << 20,
                    intake: QueueLimits { events_max: 10_000, bytes_max: 1 << 26 },
                };
                OpenedSpool::open(settings, names, 1).unwrap()
            };
            let run = |opened: OpenedSpool| {
                let (queue, receiver) = memory::bounded(QueueLimits { events_max: 1, bytes_max: 1 });
                let metrics = SpoolMetrics::default();
                (opened.run(queue, Vec::new(), metrics, Clock::system(), ()).unwrap(), receiver)
            };
            let opened = open(&["gone"]);
            let spool = opened.spool().clone();
            let (thread, _queue) = run(opened);
            let taken: Vec<_> =
                (0..EVENTS).map(|_| spool.append(track("x"), Durability::Written, None).unwrap()).collect();
            for taken in taken {
                taken.durable().await.unwrap();
            }
            assert_eq!(thread.close().await, Some(vec![EVENTS]));

            let opened = open(&[]);
            let log = opened.lane_log(0);
            let retention = Duration::from_secs(3600);
            let clock = Clock::system();
            let unnamed =
                Unnamed::new("gone".into(), log, dir.path(), dead_letters_bytes_max, retention, clock);
            let (thread, _queue) = run(opened);
            Self { thread, unnamed, _queue, dir }
        }

        fn letters(&self) -> u64 {
            let files = DeadLetterDir::new(self.dir.path(), "gone").files().unwrap();
            files.iter().map(|file| fs::read_to_string(file).unwrap().lines().count() as u64).sum()
        }
    }

    /// A drain, and a command that waits until a provider is forgotten, wait for one
    /// part at most.
    #[tokio::test]
    async fn what_is_under_way_ends_when_the_relay_drains_or_the_provider_is_forgotten() {
        let mut log = Log::start(1 << 30).await;
        let parts = Cell::new(0);
        log.unnamed.let_go(ALL, || parts.replace(parts.get() + 1) == 2);
        let buried = log.letters();
        assert!(buried > 0 && buried < EVENTS, "{buried}");
        // What is left goes with the next look.
        log.unnamed.let_go(ALL, || false);
        assert_eq!(log.letters(), EVENTS);
        assert_eq!(log.thread.close().await, Some(vec![0]));
    }

    #[tokio::test]
    async fn as_many_events_become_dead_letters_as_there_is_room_for() {
        let old = ToGo { surplus_before: 0, expired_before_ms: Some(i64::MAX) };
        // Those that are only old stay.
        for (to_go, stays) in [(old, true), (ALL, false)] {
            let mut log = Log::start(50_000).await;
            log.unnamed.let_go(to_go, || false);
            let buried = log.letters();
            assert!(buried > 50 && buried < 1000, "{buried}");
            let left = if stays { EVENTS - buried } else { 0 };
            assert_eq!(log.thread.close().await, Some(vec![left]));
        }
    }
}
