//! How a lane gets its events from the log: those that the queue brings, as long
//! as none is missing between them, and else by reading on at its own place.

use std::{collections::VecDeque, future::pending, io, time::Duration};

use analytics_relay_providers::Event;
use tokio::{
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::Instant,
};
use tracing::error;

use super::retry::WallCheck;
use crate::queue::spool::{LaneLog, LaneReports, LogView, age::AgeCheck, reader::Chunk};

/// Bytes of frames that are read at once.
const READ_BYTES: u64 = 512 * 1024;
/// How long a lane waits after its log could not be read.
const READ_AGAIN: Duration = Duration::from_secs(5);
/// How often it tries before it passes over what the disk does not give back:
/// ten minutes, because a disk on a network may come back.
const READS_MAX: u32 = 120;
/// Events that the queue brought and that are kept while those before them are
/// being read.
const RECENT_MAX: usize = 1024;
/// Between two looks at the age of the oldest events.
const AGE_INTERVAL: Duration = Duration::from_secs(60);

/// See the module.
pub(crate) struct LogFeed {
    /// Tells the log what became of events.
    pub(crate) reports: LaneReports,
    /// Out while it is being read.
    log: Option<LaneLog>,
    view: LogView,
    reading: Option<JoinHandle<(LaneLog, io::Result<Chunk>)>>,
    /// Every event before this was taken in.
    next_seq: u64,
    /// The queue does not bring the next event.
    behind: bool,
    /// The newest that it brought meanwhile, without a gap: where reading
    /// comes to the first of them, the queue is followed again.
    recent: VecDeque<(u64, Event)>,
    read_from: Instant,
    /// Reads in a row that failed.
    failed_reads: u32,
    skipped: watch::Receiver<u64>,
    surplus: watch::Receiver<u64>,

    retention: Duration,
    wall: WallCheck,
    ages: AgeCheck,
    look_at_age: Instant,
}

/// What a lane is woken for.
pub(crate) enum Fed {
    /// Events were read.
    Chunk(Chunk),
    /// Look again: something changed.
    Nothing,
}

impl LogFeed {
    pub(crate) fn new(log: LaneLog, retention: Duration, now_ms: i64) -> Self {
        let now = Instant::now();
        let view = log.view();
        let next_seq = log.first_seq();
        Self {
            reports: log.reports(),
            skipped: log.skipped(),
            surplus: log.surplus(),
            ages: log.ages(),
            behind: next_seq < view.next_seq(),
            recent: VecDeque::new(),
            failed_reads: 0,
            log: Some(log),
            view,
            reading: None,
            next_seq,
            read_from: now,
            retention,
            wall: WallCheck::new(now_ms, now),
            look_at_age: now,
        }
    }

    /// Whether an event that the queue brings is the next one, and there is
    /// room for it. What is not taken is read later.
    pub(crate) fn takes(&mut self, seq: u64, event: &Event, has_room: bool) -> bool {
        if seq < self.next_seq {
            return false;
        }
        if !self.behind && has_room && seq == self.next_seq {
            self.next_seq += 1;
            return true;
        }
        self.behind = true;
        if self.recent.back().is_some_and(|(last, _)| last + 1 != seq) {
            self.recent.clear();
        }
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back((seq, event.clone()));
        false
    }

    /// What the queue has brought meanwhile, if reading has come so far.
    pub(crate) fn caught_up(&mut self) -> Vec<(u64, Event)> {
        while self.recent.front().is_some_and(|(seq, _)| *seq < self.next_seq) {
            self.recent.pop_front();
        }
        if self.recent.front().is_none_or(|(seq, _)| *seq != self.next_seq) {
            return Vec::new();
        }
        let recent: Vec<_> = self.recent.drain(..).collect();
        self.next_seq += recent.len() as u64;
        self.behind = false;
        self.let_go_of_files();
        recent
    }

    fn let_go_of_files(&mut self) {
        if let Some(log) = &mut self.log {
            log.close();
        }
    }

    /// Begins to read, if events are missing and it is not being done already.
    pub(crate) fn read_on(&mut self, events_max: usize) {
        if !self.behind || events_max == 0 || self.read_from > Instant::now() {
            return;
        }
        let Some(mut log) = self.log.take() else { return };
        let seq = self.next_seq;
        log.read_around(self.failed_reads >= READS_MAX);
        self.reading = Some(spawn_blocking(move || {
            let chunk = log.read(seq, events_max, READ_BYTES);
            (log, chunk)
        }));
    }

    /// Waits until there is something for the lane to do. Losing the future
    /// loses nothing.
    pub(crate) async fn wait(&mut self) -> Fed {
        let reading = async {
            match &mut self.reading {
                Some(reading) => reading.await,
                None => pending().await,
            }
        };
        tokio::select! {
            read = reading => {
                self.reading = None;
                let (log, chunk) = read.expect("reading the log does not panic");
                self.log = Some(log);
                return self.take_in(chunk);
            }
            Ok(()) = self.skipped.changed() => {
                let skipped = *self.skipped.borrow_and_update();
                self.behind |= skipped >= self.next_seq;
            }
            Ok(()) = self.surplus.changed() => {
                self.surplus.mark_unchanged();
            }
            else => pending().await,
        }
        Fed::Nothing
    }

    fn take_in(&mut self, chunk: io::Result<Chunk>) -> Fed {
        match chunk {
            Ok(chunk) => {
                self.failed_reads = 0;
                self.next_seq = chunk.next_seq;
                // What the queue has brought meanwhile is in the log, so it is
                // before this end; what comes next is behind it.
                self.behind = self.next_seq < self.view.next_seq();
                if !self.behind {
                    self.recent.clear();
                    self.let_go_of_files();
                }
                Fed::Chunk(chunk)
            }
            Err(error) => {
                self.failed_reads += 1;
                error!(%error, failed_reads = self.failed_reads, "the spool cannot be read");
                self.read_from = Instant::now() + READ_AGAIN;
                Fed::Nothing
            }
        }
    }

    /// When a read that failed is tried again, or the oldest events may have
    /// grown too old.
    pub(crate) fn wakes_at(&self) -> Instant {
        let read = Some(self.read_from).filter(|at| self.behind && *at > Instant::now());
        read.map_or(self.look_at_age, |at| at.min(self.look_at_age))
    }

    /// Accepted before this time, an event has expired: Unix milliseconds. Says
    /// so once in an interval, and not while the wall clock cannot be trusted.
    pub(crate) fn expired_before(&mut self, now_ms: i64) -> Option<i64> {
        let now = Instant::now();
        if now < self.look_at_age {
            return None;
        }
        self.look_at_age = now + AGE_INTERVAL.min(self.retention / 20).max(Duration::from_millis(10));
        if self.wall.has_jumped(now_ms, now) {
            error!("the wall clock was set: no event expires until it is right again or the relay restarts");
            return None;
        }
        if !self.ages.judges(now_ms, now.into_std()) {
            return None;
        }
        let retention_ms = i64::try_from(self.retention.as_millis()).unwrap_or(i64::MAX);
        Some(now_ms.saturating_sub(retention_ms))
    }

    /// The first event that may stay in a full log; 0 if all may.
    pub(crate) fn surplus_before(&self) -> u64 {
        *self.surplus.borrow()
    }

    /// True if there is more to read.
    pub(crate) fn is_behind(&self) -> bool {
        self.behind
    }

    /// True while the log cannot be read.
    pub(crate) fn cannot_read(&self) -> bool {
        self.failed_reads > 0
    }

    /// There may be more that has expired than was in memory: look again at
    /// once.
    pub(crate) fn look_again(&mut self) {
        self.look_at_age = Instant::now();
    }

    /// True if an earlier run may have sent it.
    pub(crate) fn is_left(&self, seq: u64) -> bool {
        self.view.is_left(seq)
    }
}
