//! What a lane could not deliver before it had to stop.

use std::path::PathBuf;

use tracing::error;

use super::super::{backlog::Waiting, spill::SpillDir};
use crate::{
    ledger::Ledger,
    queue::Place,
    reasons::{DropReason, Outcome},
};

/// What a lane could not deliver before it had to stop.
#[derive(Debug)]
pub(crate) struct Leftover {
    pub(crate) events: Vec<Waiting>,
    pub(super) reloaded: Vec<PathBuf>,
}

impl Leftover {
    /// Writes what is left for the next start and ends it in the ledger.
    /// Blocks on the disk.
    pub(crate) fn spill(self, dir: &SpillDir, ledger: &Ledger, now_ms: i64) {
        if self.events.is_empty() {
            return;
        }
        let events = self.events.len() as u64;
        match dir.write(self.events.iter().map(|waiting| &waiting.event), now_ms) {
            Ok(()) => {
                SpillDir::remove(&self.reloaded);
                ledger.ended(Outcome::Spilled, events);
            }
            Err(error) => {
                // What was reloaded still stands in the files it came from.
                let kept =
                    self.events.iter().filter(|waiting| waiting.place == Place::SPILL_FILE).count() as u64;
                ledger.ended(Outcome::Spilled, kept);
                ledger.ended(Outcome::Dropped(DropReason::SpillFailed), events - kept);
                error!(%error, event_count = events - kept, "events lost: they could not be spilled");
            }
        }
    }
}
