//! Events on their way to the disk as dead letters. One write at a time, beside the
//! lane: a disk that hangs holds up neither what the lane sends nor anybody who
//! hands it events.

use std::{collections::VecDeque, future::pending, sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, timeout},
};

use crate::{
    delivery::{backlog::Waiting, dead_letter::DeadLetter, recorder::Recorder},
    reasons::{DeadLetterReason, DropReason},
};

/// Most letters of one write, and one sync: as quick as events can come.
const LETTERS_AT_ONCE: usize = 4000;
/// How long a lane that ends waits for the write that is under way.
const LAST_WRITE_PATIENCE: Duration = Duration::from_millis(300);

/// An event that becomes a dead letter.
#[derive(Debug)]
pub(super) struct Dead {
    pub(super) waiting: Waiting,
    pub(super) reason: DeadLetterReason,
    /// The provider's own words, or ours.
    pub(super) detail: String,
}

/// What came of a write: for all of its letters, or for none.
pub(super) type Written = (Vec<Dead>, Result<(), DropReason>);

/// See the module.
pub(super) struct Letters {
    recorder: Arc<dyn Recorder>,
    waiting: VecDeque<Dead>,
    writing: Option<JoinHandle<Result<(), DropReason>>>,
    /// What is being written.
    out: Vec<Dead>,
    /// When the next write is tried after one that failed.
    not_before: Instant,
}

impl Letters {
    pub(super) fn new(recorder: Arc<dyn Recorder>) -> Self {
        let (waiting, out) = (VecDeque::new(), Vec::new());
        Self { recorder, waiting, writing: None, out, not_before: Instant::now() }
    }

    /// Adds events behind the others.
    pub(super) fn push(&mut self, dead: impl IntoIterator<Item = Dead>) {
        self.waiting.extend(dead);
    }

    /// Puts events that could not be written before the others, for another try at
    /// that time.
    pub(super) fn put_back(&mut self, dead: Vec<Dead>, not_before: Instant) {
        self.not_before = not_before;
        dead.into_iter().rev().for_each(|dead| self.waiting.push_front(dead));
    }

    /// Begins to write, unless a write is under way.
    pub(super) fn write_on(&mut self, letter: impl Fn(&Dead) -> DeadLetter) {
        if self.writing.is_some() || self.waiting.is_empty() || self.not_before > Instant::now() {
            return;
        }
        self.out = self.waiting.drain(..self.waiting.len().min(LETTERS_AT_ONCE)).collect();
        let letters = self.out.iter().map(letter).collect();
        let recorder = self.recorder.clone();
        self.writing = Some(tokio::spawn(async move { recorder.dead_lettered(letters).await }));
    }

    /// Waits for the write that is under way, for ever if there is none. Losing the
    /// future loses nothing.
    pub(super) async fn written(&mut self) -> Written {
        let Some(writing) = &mut self.writing else { return pending().await };
        let result = writing.await.unwrap_or(Err(DropReason::DeadLetterFailed));
        self.writing = None;
        (std::mem::take(&mut self.out), result)
    }

    /// The same, but not for long, and nothing if there is none.
    pub(super) async fn last_written(&mut self) -> Option<Written> {
        self.writing.as_ref()?;
        timeout(LAST_WRITE_PATIENCE, self.written()).await.ok()
    }

    /// When a write is to be tried again.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        (self.writing.is_none() && !self.waiting.is_empty()).then_some(self.not_before)
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

    /// Gives up: the events whose letters are not known to be written.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Waiting> + use<> {
        let out = std::mem::take(&mut self.out).into_iter();
        out.chain(std::mem::take(&mut self.waiting)).map(|dead| dead.waiting)
    }
}
