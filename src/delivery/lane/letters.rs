//! Events on their way to the disk as dead letters. One write at a time, beside the
//! lane: a disk that hangs holds up neither what the lane sends nor anybody who
//! hands it events.
//!
//! A lane that has to stop gives a write up that does not end. Its events are then
//! kept for the next run, and count as that, once. One that had not begun never
//! does. What the disk itself holds up may be written all the same, before the
//! process ends or while it does: then an event is sent again at the next start and
//! has a letter too, which a replay sends a second time. Letters that were written
//! late are not taken back, because on such a disk they may be all that is left.

use std::{
    collections::{HashSet, VecDeque},
    future::pending,
    sync::Arc,
    time::Duration,
};

use tokio::{
    task::JoinHandle,
    time::{Instant, timeout_at},
};

use crate::{
    delivery::{
        backlog::{Arrival, Waiting},
        dead_letter::DeadLetter,
        recorder::{Recorder, WritePermit},
    },
    letter_files::NotWritten,
    reasons::{DeadLetterReason, DropReason},
};

/// Most letters of one write, and one sync: as quick as events can come.
const LETTERS_AT_ONCE: usize = 4000;
/// How long a disk that has failed is told of at least, whatever became of the events:
/// who looks from time to time is to see it.
const FAILURE_SHOWN: Duration = Duration::from_secs(60);

/// An event that becomes a dead letter.
#[derive(Debug)]
pub(super) struct Dead {
    pub(super) waiting: Waiting,
    pub(super) reason: DeadLetterReason,
    /// The provider's own words, or ours.
    pub(super) detail: String,
}

/// What becomes of an event whose letter is not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unwritten {
    /// Its letter is tried again; it waits in memory.
    TriedAgain,
    /// It goes back to the others, and may be delivered before its letter is tried
    /// again.
    GoesBack,
    /// The same, after a time.
    Waits,
    /// It is kept for the next run: where it stands in the log, or in a spill file.
    NextRun,
    /// It is dropped, and counted.
    Lost,
}

impl Dead {
    /// What becomes of it, if its letter is not written, and why it is not; `is_last`
    /// if this run does not try it again.
    pub(super) fn unwritten(&self, why: DropReason, is_last: bool) -> Unwritten {
        let is_logged = self.waiting.place.log_seq().is_some();
        match self.reason {
            // The next run, which knows nothing of the newer one, would send it after
            // that and overwrite newer traits; also from the log.
            DeadLetterReason::Superseded if is_last => Unwritten::Lost,
            _ if is_last => Unwritten::NextRun,
            // There is no room to keep these in memory.
            DeadLetterReason::LaneFull => Unwritten::Lost,
            _ if !is_logged && why == DropReason::DeadLettersFull => Unwritten::Lost,
            // The provider may take them yet.
            DeadLetterReason::RetriesExhausted => Unwritten::Waits,
            DeadLetterReason::Expired | DeadLetterReason::SpoolFull => Unwritten::GoesBack,
            _ => Unwritten::TriedAgain,
        }
    }
}

/// A write that has ended: its letters, and which of them are not on disk.
pub(super) type Written = (Vec<Dead>, Result<(), NotWritten>);

/// See the module.
pub(super) struct Letters {
    recorder: Arc<dyn Recorder>,
    waiting: VecDeque<Dead>,
    writing: Option<JoinHandle<Result<(), NotWritten>>>,
    /// What is being written.
    out: Vec<Dead>,
    permit: WritePermit,
    /// When the next write is tried after one that failed.
    not_before: Instant,
    /// When the last write failed, unless one has succeeded since.
    failed_at: Option<Instant>,
    /// Events that wait elsewhere because their letters could not be written, by
    /// their places in the order of arrival.
    owed: HashSet<Arrival>,
}

impl Letters {
    pub(super) fn new(recorder: Arc<dyn Recorder>) -> Self {
        Self {
            recorder,
            waiting: VecDeque::new(),
            writing: None,
            out: Vec::new(),
            permit: WritePermit::default(),
            not_before: Instant::now(),
            failed_at: None,
            owed: HashSet::new(),
        }
    }

    /// Adds events behind the others.
    pub(super) fn push(&mut self, dead: impl IntoIterator<Item = Dead>) {
        self.waiting.extend(dead);
    }

    /// True while a write is under way.
    pub(super) fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// Takes events that wait to be written.
    pub(super) fn take_where(&mut self, is_taken: impl Fn(&Waiting) -> bool) -> Vec<Waiting> {
        let (taken, stays): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|dead| is_taken(&dead.waiting));
        self.waiting = stays;
        taken.into_iter().map(|dead| dead.waiting).collect()
    }

    /// Puts events that could not be written before the others, for another try at
    /// that time.
    pub(super) fn put_back(&mut self, dead: Vec<Dead>, not_before: Instant) {
        if dead.is_empty() {
            return;
        }
        self.not_before = not_before;
        dead.into_iter().rev().for_each(|dead| self.waiting.push_front(dead));
    }

    /// Notes that an event waits elsewhere until its letter can be written.
    pub(super) fn owe(&mut self, waiting: &Waiting) {
        self.owed.insert(waiting.arrival());
    }

    /// Notes that an event has ended, whichever way.
    #[inline]
    pub(super) fn ended(&mut self, waiting: &Waiting) {
        if !self.owed.is_empty() {
            self.owed.remove(&waiting.arrival());
        }
    }

    /// True from a write that failed until one succeeds, or nothing needs the disk any
    /// more.
    pub(super) fn fail(&self) -> bool {
        let is_recent = |at: Instant| Instant::now() < at + FAILURE_SHOWN;
        self.failed_at.is_some_and(|at| !self.is_empty() || !self.owed.is_empty() || is_recent(at))
    }

    /// Begins to write, unless a write is under way.
    pub(super) fn write_on(&mut self, letter: impl Fn(&Dead) -> DeadLetter) {
        if self.writing.is_some() || self.waiting.is_empty() || self.not_before > Instant::now() {
            return;
        }
        self.out = self.waiting.drain(..self.waiting.len().min(LETTERS_AT_ONCE)).collect();
        let letters = self.out.iter().map(letter).collect();
        let recorder = self.recorder.clone();
        self.permit = WritePermit::default();
        let permit = self.permit.clone();
        self.writing = Some(tokio::spawn(async move { recorder.write_letters(letters, permit).await }));
    }

    /// Waits for the write that is under way, for ever if there is none. Losing the
    /// future loses nothing.
    pub(super) async fn written(&mut self) -> Written {
        let Some(writing) = &mut self.writing else { return pending().await };
        let result = writing.await.unwrap_or(Err(NotWritten::ANY));
        self.writing = None;
        self.failed_at = result.is_err().then(Instant::now);
        (std::mem::take(&mut self.out), result)
    }

    /// The same until that time, and nothing if there is none.
    pub(super) async fn written_until(&mut self, until: Instant) -> Option<Written> {
        self.writing.as_ref()?;
        timeout_at(until, self.written()).await.ok()
    }

    /// Calls the write off that is under way. Returns the number of letters that may
    /// be written all the same, because it has begun.
    pub(super) fn call_off(&mut self) -> usize {
        if self.writing.is_none() || self.permit.call_off() { 0 } else { self.out.len() }
    }

    /// The next write does not wait, even after one that failed.
    pub(super) fn try_at_once(&mut self) {
        self.not_before = Instant::now();
    }

    /// When a write is to be tried again, or a failure has been told of for long
    /// enough.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        if self.writing.is_some() {
            return None;
        }
        if !self.waiting.is_empty() {
            return Some(self.not_before);
        }
        let shown_until = self.failed_at? + FAILURE_SHOWN;
        Some(shown_until).filter(|until| *until > Instant::now())
    }

    /// The first of the events that are being written, and of those that wait: about
    /// the oldest.
    pub(super) fn first_events(&self) -> impl Iterator<Item = &Waiting> {
        self.out.first().into_iter().chain(self.waiting.front()).map(|dead| &dead.waiting)
    }

    /// True if none is.
    pub(super) fn is_empty(&self) -> bool {
        self.out.is_empty() && self.waiting.is_empty()
    }

    /// Gives up: what is not known to be written.
    pub(super) fn take_all(&mut self) -> Vec<Dead> {
        let mut unwritten = std::mem::take(&mut self.out);
        unwritten.extend(std::mem::take(&mut self.waiting));
        unwritten
    }
}
