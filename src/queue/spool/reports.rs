//! A lane's way to tell the log what became of events.

use std::{
    ops::Range,
    sync::{Arc, mpsc},
};

use tokio::sync::Semaphore;

use super::{
    command::{Attempt, Command},
    quarantine::DamagedRange,
};
use crate::reasons::Outcome;

/// Attempts of one lane that may wait for the writer.
const ATTEMPTS_MAX: usize = 256;

/// Most ranges of events that one attempt names.
const ATTEMPT_RANGES_MAX: usize = 2000;

/// Most characters of a provider's words that are kept with an attempt.
const DETAIL_CHARS_MAX: usize = 200;

/// Tells the log what became of a lane's events.
#[derive(Debug, Clone)]
pub(crate) struct LaneReports {
    provider: String,
    cursor: usize,
    commands: mpsc::Sender<Command>,
    permits: Arc<Semaphore>,
}

impl LaneReports {
    /// Of the provider whose cursor has a place.
    pub(super) fn new(provider: String, cursor: usize, commands: mpsc::Sender<Command>) -> Self {
        Self { provider, cursor, commands, permits: Arc::new(Semaphore::new(ATTEMPTS_MAX)) }
    }

    /// Notes an attempt to deliver events, for `explain`.
    pub(crate) fn attempted(&self, at_ms: i64, attempt: u32, verdict: &str, detail: &str, seqs: &[u64]) {
        for part in ranges(seqs).chunks(ATTEMPT_RANGES_MAX) {
            let attempt = Attempt {
                provider: self.provider.clone(),
                attempt,
                verdict: verdict.to_owned(),
                detail: detail.chars().take(DETAIL_CHARS_MAX).collect(),
                events: part.iter().map(|range| (range.start, range.end)).collect(),
            };
            let Ok(permit) = self.permits.clone().try_acquire_owned() else { return };
            let _ = self.commands.send(Command::Attempted { at_ms, attempt, _permit: permit });
        }
    }

    /// Notes how events ended. What waits here is bounded by the events that a
    /// lane holds.
    pub(crate) fn ended(&self, outcome: Outcome, seqs: &[u64]) {
        self.ended_ranges(outcome, ranges(seqs));
    }

    /// Notes how ranges of events ended.
    pub(crate) fn ended_ranges(&self, outcome: Outcome, ranges: Vec<Range<u64>>) {
        let ended_as = outcome.key();
        // Without its thread the log notes nothing: the events go again.
        let _ = self.commands.send(Command::Ended { cursor: self.cursor, ended_as, ranges });
    }

    /// Notes a damaged range.
    pub(crate) fn damaged(&self, range: DamagedRange) {
        let _ = self.commands.send(Command::Damaged(range));
    }
}

/// Numbers as ranges, in order.
fn ranges(seqs: &[u64]) -> Vec<Range<u64>> {
    let mut seqs = seqs.to_vec();
    seqs.sort_unstable();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for seq in seqs {
        match ranges.last_mut() {
            Some(last) if last.end == seq => last.end += 1,
            _ => ranges.push(seq..seq + 1),
        }
    }
    ranges
}
