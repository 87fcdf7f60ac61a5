//! Where a lane reports how its events ended.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use tokio::task::spawn_blocking;

use super::{
    backlog::Waiting,
    dead_letter::{DeadLetter, DeadLetterWriter},
};
use crate::{
    ledger::Ledger,
    reasons::{DeadLetterReason, DropReason, Outcome},
    time::Clock,
};

/// Ends events. When a call returns, the events it was given have ended.
#[async_trait]
pub(crate) trait Recorder: Send + Sync + 'static {
    /// The provider took them.
    async fn delivered(&self, events: &[Waiting]);

    /// The provider will not get them. On an error none of them has ended.
    async fn dead_lettered(&self, letters: Vec<DeadLetter>) -> Result<(), DropReason>;

    /// They are gone.
    fn dropped(&self, reason: DropReason, events: usize);
}

/// The running relay's: the ledger and the dead letter files.
pub(crate) struct RelayRecorder {
    ledger: Ledger,
    dead_letters: Arc<Mutex<DeadLetterWriter>>,
    clock: Clock,
}

impl RelayRecorder {
    pub(crate) fn new(ledger: Ledger, dead_letters: DeadLetterWriter, clock: Clock) -> Self {
        Self { ledger, dead_letters: Arc::new(Mutex::new(dead_letters)), clock }
    }
}

#[async_trait]
impl Recorder for RelayRecorder {
    async fn delivered(&self, events: &[Waiting]) {
        self.ledger.ended(Outcome::Delivered, events.len() as u64);
    }

    async fn dead_lettered(&self, letters: Vec<DeadLetter>) -> Result<(), DropReason> {
        let reasons = count_by_reason(&letters);
        let dead_letters = self.dead_letters.clone();
        let now_ms = self.clock.now_ms();
        let written = spawn_blocking(move || {
            let mut dead_letters = dead_letters.lock().unwrap_or_else(PoisonError::into_inner);
            dead_letters.write(&letters, now_ms)
        })
        .await
        .unwrap_or(Err(DropReason::DeadLetterFailed));
        written?;
        for (reason, events) in reasons {
            self.ledger.ended(Outcome::DeadLettered(reason), events);
        }
        Ok(())
    }

    fn dropped(&self, reason: DropReason, events: usize) {
        self.ledger.ended(Outcome::Dropped(reason), events as u64);
    }
}

/// Number of letters for each reason.
pub(crate) fn count_by_reason(letters: &[DeadLetter]) -> BTreeMap<DeadLetterReason, u64> {
    let mut reasons = BTreeMap::new();
    for letter in letters {
        *reasons.entry(letter.reason).or_default() += 1;
    }
    reasons
}
