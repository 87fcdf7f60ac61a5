//! Where a lane's events come from, and who is told how they ended: the seam
//! between a lane and the queue. In memory, all of them come through the inbox;
//! with a log, what the queue had no room for is read from it.

use std::{future::pending, io, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::{JoinHandle, spawn_blocking},
    time::Instant,
};
use tracing::error;

use super::handover::Handover;
use crate::{
    delivery::{Batch, routes::Flow},
    queue::{
        Queued,
        spool::{LaneLog, LaneReports, LogView, reader::Chunk},
    },
    reasons::Outcome,
    time::WallCheck,
};

/// Batches that are taken in at once.
const BATCHES_AT_ONCE: usize = 64;
/// Bytes of frames that are read at once.
const READ_BYTES: u64 = 512 * 1024;
/// How long a lane waits after its log could not be read.
const READ_AGAIN: Duration = Duration::from_secs(5);
/// How often it tries before it passes over what the disk does not give back:
/// ten minutes, because a disk on a network may come back.
const READS_MAX: u32 = 120;
/// Between two looks at the age of the oldest events.
const AGE_INTERVAL: Duration = Duration::from_secs(60);

/// See the module.
pub(crate) struct LaneSource {
    /// Gone once it was closed.
    inbox: Option<mpsc::Receiver<Batch>>,
    log: Option<FollowedLog>,
}

/// What a lane is woken for.
pub(super) enum Next {
    /// Batches came.
    Brought,
    /// Events were read.
    Read(Chunk),
    /// Events were read again that had been left aside.
    ReadAside(Flow, Chunk),
    /// The batch worker has ended: nothing more comes through the inbox.
    Closed,
    /// Look again: something changed.
    Nothing,
}

/// A log that a lane follows.
struct FollowedLog {
    reports: LaneReports,
    /// Out while it is being read.
    log: Option<LaneLog>,
    view: LogView,
    reading: Option<JoinHandle<(LaneLog, io::Result<Chunk>)>>,
    /// Of what is being read, if it was left aside.
    reading_aside: Option<Flow>,
    handover: Handover<Queued>,
    /// When the oldest event that was not read was accepted, about, in Unix
    /// milliseconds.
    unread_since_ms: Option<i64>,
    read_from: Instant,
    /// Reads in a row that failed.
    failed_reads: u32,
    skipped: watch::Receiver<u64>,
    surplus: watch::Receiver<u64>,

    retention: Duration,
    wall: WallCheck,
    look_at_age: Instant,
}

impl LaneSource {
    /// Events in memory only.
    pub(crate) fn memory(inbox: mpsc::Receiver<Batch>) -> Self {
        Self { inbox: Some(inbox), log: None }
    }

    /// Events that stand in a log, too.
    pub(crate) fn logged(inbox: mpsc::Receiver<Batch>, log: LaneLog, retention: Duration) -> Self {
        Self { inbox: Some(inbox), log: Some(FollowedLog::new(log, retention)) }
    }

    /// Waits until there is something for the lane to do; puts what came through the
    /// inbox into `batches`. Losing the future loses nothing.
    pub(super) async fn next(&mut self, batches: &mut Vec<Batch>) -> Next {
        let Self { inbox, log } = self;
        let brought = async {
            match inbox {
                Some(inbox) => inbox.recv_many(batches, BATCHES_AT_ONCE).await,
                None => pending().await,
            }
        };
        let read = async {
            match log {
                Some(log) => log.wait().await,
                None => pending().await,
            }
        };
        let received = tokio::select! {
            received = brought => received,
            read = read => return read,
        };
        if received > 0 {
            return Next::Brought;
        }
        self.inbox = None;
        Next::Closed
    }

    /// What the batch worker still has, when the lane stops before it: ends with the
    /// batch worker.
    pub(super) async fn rest(&mut self) -> Vec<Queued> {
        let mut rest = Vec::new();
        if let Some(mut inbox) = self.inbox.take() {
            while let Some(batch) = inbox.recv().await {
                rest.extend(batch.iter().cloned());
            }
        }
        rest
    }

    /// True while something is being read, or cannot be.
    pub(super) fn is_reading(&self) -> bool {
        self.log.as_ref().is_some_and(|log| log.log.is_none())
    }

    /// The event, if it is the lane's turn to take it. One that stands in the log and
    /// that there is no room for is read later.
    pub(super) fn take(&mut self, queued: Queued, has_room: bool) -> Option<Queued> {
        match (&mut self.log, queued.place.log_seq()) {
            (Some(log), Some(seq)) => log.take(seq, queued, has_room),
            _ => Some(queued),
        }
    }

    /// What the queue has brought while a chunk was read, if it goes on where that
    /// ends. The chunk is taken with this.
    pub(super) fn take_read(&mut self, chunk: &Chunk) -> impl Iterator<Item = Queued> + use<> {
        let recent = self.log.as_mut().map(|log| log.take_read(chunk)).unwrap_or_default();
        recent.into_iter().map(|(_, queued)| queued)
    }

    /// Begins to read, if events are missing and it is not being done already.
    pub(super) fn read_on(&mut self, events_max: usize, now: Instant) {
        if let Some(log) = self.log.as_mut().filter(|_| events_max > 0) {
            log.read_on(events_max, now);
        }
    }

    /// Begins to read from event number `seq` on what was left aside, if nothing is
    /// being read.
    pub(super) fn read_aside(&mut self, flow: Flow, seq: u64, events_max: usize, now: Instant) {
        if let Some(log) = &mut self.log {
            log.read_aside(flow, seq, events_max, now);
        }
    }

    /// What had been left aside was read to its end.
    pub(super) fn close_if_caught_up(&mut self) {
        if let Some(log) = self.log.as_mut().filter(|log| !log.handover.is_behind()) {
            log.close();
        }
    }

    /// The lane's way to report, if there is a log.
    pub(super) fn reports(&self) -> Option<&LaneReports> {
        self.log.as_ref().map(|log| &log.reports)
    }

    /// Tells how events ended that stand in the log.
    pub(super) fn ended(&self, outcome: Outcome, seqs: &[u64]) {
        if let Some(log) = self.log.as_ref().filter(|_| !seqs.is_empty()) {
            log.reports.ended(outcome, seqs);
        }
    }

    /// When a read that failed is tried again, or the oldest events may have grown
    /// too old.
    pub(super) fn wakes_at(&self, now: Instant) -> Option<Instant> {
        self.log.as_ref().map(|log| log.wakes_at(now))
    }

    /// Accepted before this time, an event has expired: Unix milliseconds. Says
    /// so once in an interval, and not while the wall clock cannot be trusted.
    pub(super) fn expired_before(&mut self, now_ms: i64) -> Option<i64> {
        self.log.as_mut().and_then(|log| log.expired_before(now_ms))
    }

    /// The first event that may stay in a full log; 0 if all may.
    pub(super) fn surplus_before(&self) -> u64 {
        self.log.as_ref().map_or(0, |log| *log.surplus.borrow())
    }

    /// There may be more that has expired than was in memory: look again at once.
    pub(super) fn look_again(&mut self) {
        if let Some(log) = &mut self.log {
            log.look_at_age = Instant::now();
        }
    }

    /// True if there is more to read.
    pub(super) fn is_behind(&self) -> bool {
        self.log.as_ref().is_some_and(|log| log.handover.is_behind())
    }

    /// When the oldest event that is to be read was accepted, about. One that the
    /// lane has just learnt of was accepted `now_ms`.
    pub(super) fn unread_since_ms(&mut self, now_ms: impl Fn() -> i64) -> Option<i64> {
        let log = self.log.as_mut().filter(|log| log.handover.is_behind())?;
        Some(*log.unread_since_ms.get_or_insert_with(now_ms))
    }

    /// True while the log cannot be read.
    pub(super) fn cannot_read(&self) -> bool {
        self.log.as_ref().is_some_and(|log| log.failed_reads > 0)
    }

    /// True if an earlier run may have sent it.
    pub(super) fn is_left(&self, seq: u64) -> bool {
        self.log.as_ref().is_some_and(|log| log.view.is_left(seq))
    }
}

impl FollowedLog {
    fn new(log: LaneLog, retention: Duration) -> Self {
        let now = Instant::now();
        let view = log.view();
        let handover = Handover::new(log.first_seq(), view.next_seq());
        Self {
            reports: log.reports(),
            skipped: log.skipped(),
            surplus: log.surplus(),
            wall: log.wall_check(),
            unread_since_ms: None,
            handover,
            failed_reads: 0,
            log: Some(log),
            view,
            reading: None,
            reading_aside: None,
            read_from: now,
            retention,
            look_at_age: now,
        }
    }

    fn take(&mut self, seq: u64, queued: Queued, has_room: bool) -> Option<Queued> {
        self.handover.bring(seq, queued, has_room)
    }

    fn take_read(&mut self, chunk: &Chunk) -> std::collections::VecDeque<(u64, Queued)> {
        let recent = self.handover.read(chunk.next_seq);
        if self.handover.is_behind() {
            // The next one is hardly younger than the last one that was read.
            let last_ms = chunk.events.last().map(|logged| logged.event.accepted_ms());
            self.unread_since_ms = last_ms.or(self.unread_since_ms);
        } else {
            self.unread_since_ms = None;
            self.close();
        }
        recent
    }

    /// Files that are removed give their room back only when nobody has them.
    fn close(&mut self) {
        if let Some(log) = &mut self.log {
            log.close();
        }
    }

    fn read_on(&mut self, events_max: usize, now: Instant) {
        if self.read_from > now || self.log.is_none() {
            return;
        }
        if let Some(seq) = self.handover.begin_read() {
            self.begin_read(None, move |log| log.read(seq, events_max, READ_BYTES));
        }
    }

    fn read_aside(&mut self, flow: Flow, seq: u64, events_max: usize, now: Instant) {
        if self.read_from <= now {
            self.begin_read(Some(flow), move |log| log.read_again(seq, events_max, READ_BYTES));
        }
    }

    fn begin_read(
        &mut self,
        aside: Option<Flow>,
        read: impl FnOnce(&mut LaneLog) -> io::Result<Chunk> + Send + 'static,
    ) {
        let Some(mut log) = self.log.take() else { return };
        log.read_around(self.failed_reads >= READS_MAX);
        self.reading_aside = aside;
        self.reading = Some(spawn_blocking(move || {
            let chunk = read(&mut log);
            (log, chunk)
        }));
    }

    async fn wait(&mut self) -> Next {
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
                return self.finish_read(chunk);
            }
            Ok(()) = self.skipped.changed() => {
                let newest_seq = *self.skipped.borrow_and_update();
                self.handover.skip(newest_seq);
            }
            Ok(()) = self.surplus.changed() => {
                self.surplus.mark_unchanged();
            }
            else => pending().await,
        }
        Next::Nothing
    }

    fn finish_read(&mut self, chunk: io::Result<Chunk>) -> Next {
        match chunk {
            Ok(chunk) => {
                self.failed_reads = 0;
                match self.reading_aside.take() {
                    Some(flow) => Next::ReadAside(flow, chunk),
                    None => Next::Read(chunk),
                }
            }
            Err(error) => {
                if self.reading_aside.take().is_none() {
                    self.handover.read_failed();
                }
                self.failed_reads += 1;
                error!(%error, failed_reads = self.failed_reads, "the spool cannot be read");
                self.read_from = Instant::now() + READ_AGAIN;
                Next::Nothing
            }
        }
    }

    fn wakes_at(&self, now: Instant) -> Instant {
        let read = Some(self.read_from).filter(|at| *at > now);
        read.map_or(self.look_at_age, |at| at.min(self.look_at_age))
    }

    fn expired_before(&mut self, now_ms: i64) -> Option<i64> {
        let now = Instant::now();
        if now < self.look_at_age {
            return None;
        }
        self.look_at_age = now + AGE_INTERVAL.min(self.retention / 20).max(Duration::from_millis(10));
        if !self.wall.is_trusted(now_ms, now) {
            // The log's thread, which asks the same, says so.
            return None;
        }
        let retention_ms = i64::try_from(self.retention.as_millis()).unwrap_or(i64::MAX);
        Some(now_ms.saturating_sub(retention_ms))
    }
}
