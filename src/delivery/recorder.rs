//! Where a lane reports how its events ended.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use analytics_relay_providers::NotFor;
use async_trait::async_trait;
use tokio::task::spawn_blocking;

use super::{backlog::Waiting, dead_letter::DeadLetter};
use crate::{
    ledger::Ledger,
    letter_files::{LetterWriter, NotWritten},
    reasons::{DeadLetterReason, DropReason, Outcome},
    time::Clock,
};

/// Ends events, each once. What is written as a dead letter has not ended by that:
/// the lane may have given the write up meanwhile.
#[async_trait]
pub(crate) trait Recorder: Send + Sync + 'static {
    /// The provider took them.
    async fn delivered(&self, events: &[Waiting]);

    /// Writes letters, the first of them if there is no room for all, unless the
    /// write is called off before it begins.
    async fn write_letters(&self, letters: Vec<DeadLetter>, permit: WritePermit) -> Result<(), NotWritten>;

    /// The provider will not get them, and their letters are written.
    fn dead_lettered(&self, reason: DeadLetterReason, events: usize);

    /// They are gone.
    fn dropped(&self, reason: DropReason, events: usize);

    /// They are not for the provider.
    fn not_for(&self, reason: NotFor, events: usize);
}

/// Whether a write takes place: who writes asks right before it touches the disk, and
/// who waits for it may call it off until then. So a write that was called off does
/// not happen later, however long something has held it up.
#[derive(Debug, Clone, Default)]
pub(crate) struct WritePermit(Arc<OnceLock<Taken>>);

#[derive(Debug)]
enum Taken {
    Begun,
    CalledOff,
}

impl WritePermit {
    /// True if the write may begin. It counts as begun.
    pub(crate) fn begin(&self) -> bool {
        self.0.set(Taken::Begun).is_ok()
    }

    /// True if the write has not begun, and will not.
    pub(crate) fn call_off(&self) -> bool {
        self.0.set(Taken::CalledOff).is_ok()
    }
}

/// The running relay's: the ledger and the dead letter files.
pub(crate) struct RelayRecorder {
    ledger: Ledger,
    dead_letters: Arc<Mutex<LetterWriter>>,
    clock: Clock,
}

impl RelayRecorder {
    pub(crate) fn new(ledger: Ledger, dead_letters: LetterWriter, clock: Clock) -> Self {
        Self { ledger, dead_letters: Arc::new(Mutex::new(dead_letters)), clock }
    }

    /// For a test that keeps it from writing.
    #[cfg(test)]
    pub(crate) fn dead_letters(&self) -> Arc<Mutex<LetterWriter>> {
        self.dead_letters.clone()
    }
}

#[async_trait]
impl Recorder for RelayRecorder {
    async fn delivered(&self, events: &[Waiting]) {
        self.ledger.ended(Outcome::Delivered, events.len() as u64);
    }

    async fn write_letters(&self, letters: Vec<DeadLetter>, permit: WritePermit) -> Result<(), NotWritten> {
        let dead_letters = self.dead_letters.clone();
        let now_ms = self.clock.now_ms();
        let writing = spawn_blocking(move || {
            let mut dead_letters = dead_letters.lock().unwrap_or_else(PoisonError::into_inner);
            if !permit.begin() {
                return Err(NotWritten::ANY);
            }
            dead_letters.write(&letters, now_ms)
        });
        writing.await.unwrap_or(Err(NotWritten::ANY))
    }

    fn dead_lettered(&self, reason: DeadLetterReason, events: usize) {
        self.ledger.ended(Outcome::DeadLettered(reason), events as u64);
    }

    fn dropped(&self, reason: DropReason, events: usize) {
        self.ledger.ended(Outcome::Dropped(reason), events as u64);
    }

    fn not_for(&self, reason: NotFor, events: usize) {
        self.ledger.ended(Outcome::NotFor(reason), events as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::mpsc, thread};

    use prometheus_client::metrics::counter::Counter;

    use super::*;
    use crate::{
        delivery::{dead_letter::DeadLetterDir, test_support::track},
        sealing::Sealing,
    };

    /// Something holds the file up: a write that waits for it can be called off, one
    /// that has begun cannot, and neither counts by itself.
    #[tokio::test]
    async fn a_write_that_is_called_off_does_not_happen_when_its_turn_comes() {
        let data = tempfile::tempdir().unwrap();
        let dir = DeadLetterDir::new(data.path(), "mixpanel");
        let ledger = Ledger::new("mixpanel", Counter::default(), Counter::default(), |_| Counter::default());
        let writer = LetterWriter::open(&dir, 1 << 20).unwrap();
        let recorder = Arc::new(RelayRecorder::new(ledger.clone(), writer, Clock::system()));
        let letter = DeadLetter {
            dead_since_ms: 1,
            provider: "mixpanel".into(),
            reason: DeadLetterReason::Invalid,
            attempts: 1,
            detail: String::new(),
            event: track("x"),
        };
        for called_off in [true, false] {
            let permit = WritePermit::default();
            let write = {
                let (recorder, permit, letters) = (recorder.clone(), permit.clone(), vec![letter.clone()]);
                async move { recorder.write_letters(letters, permit).await }
            };
            let (files, (release, released)) = (recorder.dead_letters.clone(), mpsc::channel::<()>());
            let (tell, held) = mpsc::channel();
            let holding = thread::spawn(move || {
                let _held = files.lock().unwrap();
                tell.send(()).unwrap();
                let _ = released.recv();
            });
            held.recv().unwrap();
            let writing = tokio::spawn(write);
            tokio::task::yield_now().await;
            if called_off {
                assert!(permit.call_off());
            }
            drop(release);
            holding.join().unwrap();
            let written = writing.await.unwrap();
            assert_eq!(written, if called_off { Err(NotWritten::ANY) } else { Ok(()) });
            assert!(!permit.call_off(), "only once, and not when it has begun");
            let on_disk: usize = dir
                .files()
                .unwrap()
                .iter()
                .map(|path| {
                    DeadLetterDir::read(path, &HashSet::new(), &Sealing::default()).unwrap().letters.len()
                })
                .sum();
            assert_eq!(on_disk, usize::from(!called_off));
        }
        assert_eq!(ledger.balance().dead_lettered, 0);
        recorder.dead_lettered(DeadLetterReason::Invalid, 1);
        assert_eq!(ledger.balance().dead_lettered, 1);
    }
}
