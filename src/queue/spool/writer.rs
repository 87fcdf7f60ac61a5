//! The thread that owns the log's files.
//!
//! It takes what has come together, writes it as one group with one sync,
//! answers every caller of the group, and offers the events to the queue in
//! their order. Lanes tell it what became of events; it notes that in the
//! cursors and, for `explain`, in the log. Nobody waits for the cursors, so
//! another thread syncs them.
//!
//! **Room.** The cursors of providers that are not named any more hold events
//! too. They never make it refuse one: whoever looks after them is told to let go
//! while there is room for a segment yet, and if that comes too late the thread
//! lets go itself.

use std::{
    io,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;
use tracing::{error, info, warn};

use super::{
    command::{Append, Attempt, Command},
    frame::{self, Frame, Kind},
    index::Segment,
    log::{AppendError, Log},
    settings::{SpoolSettings, WhenFull},
    status::{CursorStatus, SharedStatus},
    syncer::{CursorSyncer, Synced},
};
use crate::{
    ledger::Ledger,
    queue::{Durability, Place, Queued, Refused, memory::QueueSender},
    reasons::{DropReason, Outcome},
    telemetry::{HeldBack, LogBudget, SpoolMetrics},
    time::{Clock, WallCheck},
};

/// Between syncs of the cursors, and of events that asked for no sync.
pub(crate) const SYNC_INTERVAL: Duration = Duration::from_secs(1);
/// Between writes of the cursors, and of what others may see.
const CURSOR_INTERVAL: Duration = Duration::from_millis(20);
/// How long nothing is tried after the log was full or the disk failed.
const REST: Duration = Duration::from_millis(250);
/// How long callers, and the end of the log, wait for a sync of the cursors that is under
/// way.
const ROOM_PATIENCE: Duration = Duration::from_secs(1);
const LAST_SYNC_PATIENCE: Duration = Duration::from_secs(10);
/// Commands after which a group waits no more.
const COMMANDS_AT_ONCE: usize = 10_000;
/// How often a group looks who has come, while it waits for company.
const GATHER_STEP: Duration = Duration::from_micros(200);
/// Bytes of attempts that wait for the next group, at most; beyond, they are
/// written by themselves.
const ATTEMPTS_BYTES_MAX: usize = 64 * 1024;

/// See the module.
pub(crate) struct Writer {
    log: Log,
    settings: SpoolSettings,
    queue: QueueSender,
    ledgers: Vec<Ledger>,
    status: Arc<SharedStatus>,
    metrics: SpoolMetrics,
    clock: Clock,
    /// Completed when their turn comes.
    attempts: Vec<Vec<u8>>,
    attempts_bytes: usize,
    group: Group,
    /// Bytes at which a group waits no more.
    group_bytes: usize,
    /// Callers in the last group: as many are waited for.
    company: usize,
    intake_closed: bool,
    rests_until: Option<(Instant, Refused)>,
    unsynced_events: u64,
    /// Events whose sync failed.
    never_synced_events: u64,
    /// A failure was told.
    told: bool,
    /// Whom a group answers: the buffer, empty between two.
    answers: Vec<(oneshot::Sender<Result<Durability, Refused>>, Durability)>,
    syncer: CursorSyncer,
    wall: WallCheck,
    /// It was told that the wall clock cannot be trusted.
    told_of_clock: bool,
    /// Copies that quarantine has removed, as far as they are counted.
    quarantine_removed: u64,
    lost_lines: LogBudget,
}

/// Events that are written together.
#[derive(Default)]
struct Group {
    appends: Vec<Append>,
    bytes: usize,
}

impl Writer {
    pub(crate) fn new(
        log: Log,
        settings: SpoolSettings,
        queue: QueueSender,
        ledgers: Vec<Ledger>,
        status: Arc<SharedStatus>,
        metrics: SpoolMetrics,
        clock: Clock,
    ) -> Self {
        let half_a_segment = usize::try_from(settings.limits.segment_bytes / 2).unwrap_or(usize::MAX);
        Self {
            group_bytes: settings.group_bytes.min(half_a_segment),
            wall: WallCheck::of_log(log.last_seen_ms(), settings.retention),
            log,
            settings,
            queue,
            ledgers,
            status,
            metrics,
            clock,
            attempts: Vec::new(),
            attempts_bytes: 0,
            group: Group::default(),
            company: 0,
            intake_closed: false,
            rests_until: None,
            unsynced_events: 0,
            never_synced_events: 0,
            told: false,
            answers: Vec::new(),
            syncer: CursorSyncer::start(),
            told_of_clock: false,
            quarantine_removed: 0,
            lost_lines: LogBudget::default(),
        }
    }

    /// Runs until it is told to close, or nobody can tell it any more.
    pub(crate) fn run(mut self, commands: &Receiver<Command>) {
        let mut sync_at = Instant::now() + SYNC_INTERVAL;
        let mut publish_at = Instant::now();
        let mut is_published = false;
        loop {
            let wake = if is_published { sync_at } else { sync_at.min(publish_at) };
            let closing = match commands.recv_timeout(wake.saturating_duration_since(Instant::now())) {
                Ok(command) => {
                    let closing = self.take(command);
                    if closing.is_some() { closing } else { self.gather(commands) }
                }
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => {
                    self.commit();
                    return self.finish();
                }
            };
            is_published = false;
            self.commit();
            self.end_cursor_syncs(Duration::ZERO);
            let now = Instant::now();
            if now >= sync_at || closing.is_some() {
                self.sync();
                let in_trouble = self.is_full() || self.log.is_broken();
                sync_at = Instant::now() + if in_trouble { REST } else { SYNC_INTERVAL };
            }
            if now >= publish_at || closing.is_some() {
                self.log.write_cursors();
                self.publish();
                // What is held back by a sync is written when that is over.
                (publish_at, is_published) = (now + CURSOR_INTERVAL, !self.syncer.is_busy());
            }
            if let Some(answer) = closing {
                let next_seq = self.log.next_seq();
                let left = self.log.cursors().iter().map(|file| file.cursor.pending(next_seq)).collect();
                self.finish();
                // Nobody listens if the drain has given up.
                let _ = answer.send(left);
                return;
            }
        }
    }

    /// Takes what has come together: all that is there, and, if others came
    /// with the last group, what comes for a moment. A caller that is alone is never
    /// kept waiting.
    fn gather(&mut self, commands: &Receiver<Command>) -> Option<oneshot::Sender<Vec<u64>>> {
        let window_end = Instant::now() + self.settings.group_window;
        for _ in 0..COMMANDS_AT_ONCE {
            if self.group.bytes >= self.group_bytes {
                break;
            }
            if let Ok(command) = commands.try_recv() {
                let closing = self.take(command);
                if closing.is_some() {
                    return closing;
                }
                continue;
            }
            let expected = !self.group.appends.is_empty() && self.group.appends.len() < self.company;
            let left = window_end.saturating_duration_since(Instant::now());
            if !expected || left.is_zero() {
                break;
            }
            // Asleep and not at the channel: to wake this thread for each event
            // costs its caller more than the event.
            thread::sleep(left.min(GATHER_STEP));
        }
        None
    }

    fn take(&mut self, command: Command) -> Option<oneshot::Sender<Vec<u64>>> {
        match command {
            Command::Append(append) => self.take_append(append),
            Command::Attempted { at_ms, attempt, .. } => self.take_attempt(at_ms, &attempt),
            Command::Ended { cursor, ended_as, ranges } => {
                let ended = ranges.into_iter().map(|range| self.log.end(cursor, range, &ended_as)).sum();
                self.count_unnamed(cursor, &ended_as, ended);
            }
            Command::Damaged(range) => {
                if self.log.quarantine(range.segment, range.at, range.bytes) {
                    error!(
                        segment = range.segment,
                        at = range.at,
                        bytes = range.bytes,
                        "a range of the spool is damaged: it is kept aside and passed over"
                    );
                }
            }
            Command::CloseIntake(answer) => {
                self.commit();
                self.intake_closed = true;
                let _ = answer.send(());
            }
            Command::Close(answer) => return Some(answer),
        }
        None
    }

    fn take_append(&mut self, append: Append) {
        // What was answered already is still taken.
        if self.intake_closed && append.answer.is_some() {
            return self.refuse(append, Refused::Closed);
        }
        if let Some(refused) = append.row.as_ref().and_then(|row| row.get().copied()) {
            return self.refuse(append, refused);
        }
        let rests = self.rests_until.filter(|(until, _)| *until > Instant::now());
        if let Some((_, refused)) = rests {
            return self.refuse(append, refused);
        }
        if self.over_a_cap() {
            return self.refuse(append, Refused::SpoolFull);
        }
        self.group.bytes += append.frame.len();
        self.group.appends.push(append);
    }

    /// True if a provider's share of the log is used up and nothing may be
    /// given up for it.
    fn over_a_cap(&self) -> bool {
        self.settings.when_full == WhenFull::Reject && self.status.over_cap.load(Ordering::Relaxed)
    }

    fn take_attempt(&mut self, at_ms: i64, attempt: &Attempt) {
        let payload = serde_json::to_vec(attempt).expect("an attempt is JSON");
        if payload.len() > frame::PAYLOAD_BYTES_MAX {
            return;
        }
        let frame = Frame {
            kind: Kind::Attempt,
            durability: None,
            seq: 0,
            time_ms: at_ms,
            id: &[],
            payload: &payload,
            is_sealed: false,
        };
        let mut bytes = Vec::new();
        frame.encode_incomplete(&mut bytes);
        self.attempts_bytes += bytes.len();
        self.attempts.push(bytes);
    }

    /// Writes the group, answers its callers, and passes its events on.
    fn commit(&mut self) {
        let appends = std::mem::take(&mut self.group.appends);
        self.group.bytes = 0;
        if appends.is_empty() {
            if self.attempts_bytes > ATTEMPTS_BYTES_MAX {
                self.write_attempts();
            }
            return;
        }
        self.company = appends.len();
        let mut written = self.write_group(&appends);
        while written == Err(AppendError::Full) && self.make_room() {
            written = self.write_group(&appends);
        }
        match written {
            Ok(()) => self.accept(appends),
            Err(error) => self.give_up(appends, error),
        }
    }

    fn write_group(&mut self, appends: &[Append]) -> Result<(), AppendError> {
        let mut seq = self.log.next_seq();
        let mut bytes = Vec::with_capacity(appends.iter().map(|append| append.frame.len()).sum());
        for append in appends {
            let start = bytes.len();
            bytes.extend_from_slice(&append.frame);
            frame::complete(&mut bytes[start..], seq);
            seq += 1;
        }
        for attempt in self.attempts.drain(..) {
            let start = bytes.len();
            bytes.extend_from_slice(&attempt);
            frame::complete(&mut bytes[start..], seq);
        }
        self.attempts_bytes = 0;
        let sync = appends.iter().any(|append| append.wanted == Durability::Synced);
        let started = Instant::now();
        self.log.append(&bytes, appends.len() as u64, sync, self.clock.now_ms())?;
        if sync {
            self.metrics.sync_duration.observe(started.elapsed().as_secs_f64());
            self.unsynced_events = 0;
        } else {
            self.unsynced_events += appends.len() as u64;
        }
        self.metrics.groups.inc();
        Ok(())
    }

    /// The group is in the log.
    fn accept(&mut self, appends: Vec<Append>) {
        if self.told {
            info!("the spool can be written again");
            self.told = false;
        }
        self.rests_until = None;
        let first_seq = self.log.next_seq() - appends.len() as u64;
        self.metrics.accepted.inc_by(appends.len() as u64);
        let (mut skipped, mut answers) = (None, std::mem::take(&mut self.answers));
        for (seq, append) in (first_seq..).zip(appends) {
            self.status.leave(append.memory_bytes());
            let Append { event, wanted, answer, .. } = append;
            match answer {
                Some(answer) => answers.push((answer, wanted)),
                None => self.status.take_answered(),
            }
            if self.queue.offer(Queued { event, place: Place::log(seq) }).is_err() {
                skipped = Some(seq);
            }
        }
        if let Some(seq) = skipped {
            // The lanes read these from the log.
            self.status.skipped.send_replace(seq);
        }
        // Last: who is answered can rely on the lanes having been told.
        for (answer, wanted) in answers.drain(..) {
            // Callers that are gone ask again, with the same id.
            let _ = answer.send(Ok(wanted));
        }
        self.answers = answers;
    }

    /// The group is not in the log.
    fn give_up(&mut self, appends: Vec<Append>, error: AppendError) {
        let refused = match error {
            AppendError::Full => Refused::SpoolFull,
            AppendError::Failed => Refused::SpoolFailed,
        };
        for append in appends {
            self.refuse(append, refused);
        }
        if !self.told {
            match error {
                AppendError::Full => warn!("the spool is full: events are refused"),
                AppendError::Failed => error!("the spool cannot be written: events are refused"),
            }
            self.told = true;
        }
        // After a first failure a new segment is tried at once.
        if error == AppendError::Full || self.log.is_broken() {
            self.rests_until = Some((Instant::now() + REST, refused));
        }
    }

    /// Tells the caller. One that was answered `QUEUED` was promised the memory
    /// and no more: there its event stays, if there is room.
    fn refuse(&mut self, append: Append, refused: Refused) {
        self.status.leave(append.memory_bytes());
        let Append { event, row, answer, .. } = append;
        if let Some(answer) = answer {
            // The first of them stands for the row.
            row.map(|row| row.set(refused));
            // Callers that are gone ask again, with the same id.
            let _ = answer.send(Err(refused));
            return;
        }
        self.metrics.accepted.inc();
        self.status.take_answered();
        if self.queue.offer(Queued { event, place: Place::MEMORY }).is_err() {
            if self.lost_lines.takes(1, Instant::now()) {
                error!(event_count = 1, reason = DropReason::SpoolFailed.name(), "events lost");
            }
            self.ledgers.iter().for_each(|ledger| ledger.ended(Outcome::Dropped(DropReason::SpoolFailed), 1));
        }
    }

    /// The line that stands for those which were too many in their second.
    fn sum_up(held: Option<HeldBack>) {
        if let Some(HeldBack { lines, events }) = held {
            error!(event_count = events, lines, reason = DropReason::SpoolFailed.name(), "events lost");
        }
    }

    fn write_attempts(&mut self) {
        // What cannot be written is missing in `explain` and nowhere else.
        let _ = self.write_group(&[]);
    }

    /// Once a second: what was written without a sync, the cursors, and the
    /// segments that nobody needs.
    fn sync(&mut self) {
        Self::sum_up(self.lost_lines.due(Instant::now()));
        self.sync_events();
        self.answer_forget_requests();
        self.note_time();
        // One that is not over yet is waited for.
        if !self.syncer.is_busy() {
            match self.log.begin_cursor_syncs() {
                files if files.is_empty() => self.log.remove_passed(),
                files => self.syncer.begin(files),
            }
        }
    }

    fn sync_events(&mut self) {
        if !self.attempts.is_empty() {
            self.write_attempts();
        }
        if self.log.sync() {
            self.unsynced_events = 0;
        } else {
            // They are in the log and nobody knows whether they are on disk.
            self.never_synced_events += std::mem::take(&mut self.unsynced_events);
        }
        self.log.try_again(self.clock.now_ms());
    }

    /// Takes note of what the cursors' syncs have come to.
    fn end_cursor_syncs(&mut self, patience: Duration) {
        let Some(synced): Option<Synced> = self.syncer.ended(patience) else { return };
        for (place, synced) in synced {
            self.log.end_cursor_sync(place, synced);
        }
        self.log.remove_passed();
    }

    /// Notes in the cursors what time it is, for the next start.
    fn note_time(&mut self) {
        let now_ms = self.clock.now_ms();
        if self.wall.is_trusted(now_ms, Instant::now().into()) {
            self.log.saw(now_ms);
            self.told_of_clock = false;
        } else if !std::mem::replace(&mut self.told_of_clock, true) {
            error!(
                last_seen_ms = self.log.last_seen_ms(),
                now_ms,
                "the wall clock is not where it must be: no event expires until it is, or goes on from there for an hour"
            );
        }
    }

    fn finish(mut self) {
        self.sync_events();
        self.end_cursor_syncs(LAST_SYNC_PATIENCE);
        Self::sum_up(self.lost_lines.rest());
        if self.syncer.is_busy() {
            error!("the cursors cannot be synced: some events that were delivered are sent again");
        } else {
            // Until nothing more can be removed: once for each slot.
            self.log.sync_cursors();
            self.log.sync_cursors();
        }
        self.publish();
    }

    /// Makes room for a group, if that is possible: what everybody has passed need
    /// not wait for the next second, and providers that are not named let go.
    fn make_room(&mut self) -> bool {
        self.end_cursor_syncs(ROOM_PATIENCE);
        if self.syncer.is_busy() {
            return false;
        }
        let ended_as = Outcome::Dropped(DropReason::SpoolFull).key();
        let (is_made, given_up) = self.log.make_room(self.status.named().len(), &ended_as);
        for (place, event_count) in given_up {
            let provider = &self.status.cursors[place].provider;
            let reason = DropReason::SpoolFull.name();
            error!(
                provider,
                event_count, reason, "events of a provider that is not named are lost: the spool is full"
            );
            self.count_unnamed(place, &ended_as, event_count);
        }
        is_made
    }

    /// Counts what ended at a provider that is not named; the others have their
    /// ledgers.
    fn count_unnamed(&self, place: usize, ended_as: &str, events: u64) {
        if place < self.status.named().len() || events == 0 {
            return;
        }
        if let Some(outcome) = Outcome::all().find(|outcome| outcome.key() == ended_as) {
            self.metrics.unnamed_ended(outcome, events);
        }
    }

    /// Lets cursors go that an operator asks for, of providers that are not named.
    fn answer_forget_requests(&mut self) {
        if self.syncer.is_busy() {
            // They are looked at again when that is over.
            return;
        }
        let asked = self.log.asked_to_forget().unwrap_or_else(|error| {
            warn!(%error, "the directory of the cursors cannot be read");
            Vec::new()
        });
        for provider in asked {
            let is_it = |file: &CursorStatus| file.provider == provider && !file.is_forgotten();
            let place = self.status.unnamed().iter().position(is_it);
            let answered = match place.map(|place| self.status.named().len() + place) {
                Some(place) => self.forget(place),
                None => {
                    warn!(provider, "a provider that events are delivered to is not forgotten");
                    Ok(())
                }
            };
            // Without an answer it is asked again.
            if let Err(error) = answered.and_then(|()| self.log.answer_forget(&provider)) {
                warn!(provider, %error, "a cursor cannot be removed");
            }
        }
    }

    fn forget(&mut self, place: usize) -> io::Result<()> {
        self.log.forget(place)?;
        let ended_as = Outcome::Dropped(DropReason::Forgotten).key();
        let event_count = self.log.end(place, 0..self.log.next_seq(), &ended_as);
        self.count_unnamed(place, &ended_as, event_count);
        self.status.cursors[place].forget();
        warn!(
            provider = self.status.cursors[place].provider,
            event_count, "a provider is forgotten, with its events that had not ended"
        );
        Ok(())
    }

    fn publish(&mut self) {
        let (bytes, segments) = self.log.index().size();
        let next_seq = self.log.next_seq();
        self.status.bytes.store(bytes, Ordering::Relaxed);
        self.status.segments.store(segments as u64, Ordering::Relaxed);
        let is_broken = self.log.is_broken();
        self.status.broken.send_if_modified(|broken| std::mem::replace(broken, is_broken) != is_broken);
        self.status.full.store(self.is_full() || self.over_a_cap(), Ordering::Relaxed);
        self.status.damaged_ranges.store(self.log.damaged_ranges(), Ordering::Relaxed);
        let quarantine = self.log.quarantine_status();
        self.status.quarantine_bytes.store(quarantine.bytes(), Ordering::Relaxed);
        let removed = quarantine.removed();
        self.metrics
            .quarantine_removed
            .inc_by(removed - std::mem::replace(&mut self.quarantine_removed, removed));
        let unsynced = self.unsynced_events + self.never_synced_events;
        self.status.unsynced_events.store(unsynced, Ordering::Relaxed);
        let mut over_cap = false;
        for (place, (file, shared)) in self.log.cursors().iter().zip(&self.status.cursors).enumerate() {
            if shared.is_forgotten() {
                shared.pending.store(0, Ordering::Relaxed);
                continue;
            }
            let lowest = file.cursor.lowest();
            let backlog_bytes = self.log.index().bytes_from(lowest);
            shared.lowest.store(lowest, Ordering::Relaxed);
            shared.pending.store(file.cursor.pending(next_seq), Ordering::Relaxed);
            if shared.set_bytes(backlog_bytes) {
                let (provider, bytes_max) = (&shared.provider, shared.bytes_max);
                let when_full = self.settings.when_full.name();
                warn!(
                    provider,
                    backlog_bytes,
                    bytes_max,
                    when_full,
                    "a provider has used up half of its share of the spool"
                );
            }
            let over = backlog_bytes > shared.bytes_max;
            over_cap |= over;
            let is_named = place < self.status.named().len();
            shared.give_up(if is_named {
                self.surplus(over, lowest)
            } else {
                self.surplus_of_unnamed(lowest)
            });
        }
        self.status.over_cap.store(over_cap, Ordering::Relaxed);
    }

    fn is_full(&self) -> bool {
        matches!(self.rests_until, Some((until, Refused::SpoolFull)) if until > Instant::now())
    }

    /// Up to which event a provider has to let go of its oldest, if it must:
    /// those of the segment that it has come to. 0 if it need not.
    fn surplus(&self, over: bool, lowest: u64) -> u64 {
        if self.settings.when_full != WhenFull::DeadLetterOldest {
            return 0;
        }
        let index = self.log.index();
        let Some(segment) = index.find(lowest) else { return 0 };
        // All of them have to let go of the oldest segment, before its room is
        // needed.
        let needed = self.log.is_nearly_full() && index.oldest_seq() == segment.first_seq;
        if over || needed { segment.end_seq } else { 0 }
    }

    /// The same for one that is not named: it lets go sooner, and whatever the
    /// operator wants of the others.
    fn surplus_of_unnamed(&self, lowest: u64) -> u64 {
        let index = self.log.index();
        let holds_oldest = |segment: &Segment| segment.first_seq == index.oldest_seq();
        let oldest = index.find(lowest).filter(holds_oldest).filter(|_| self.log.is_short_of_room());
        oldest.map_or(0, |segment| segment.end_seq)
    }
}

#[cfg(test)]
mod tests;
