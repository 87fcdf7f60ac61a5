//! The log as one lane sees it.

use std::{io, sync::Arc};

use tokio::sync::watch;

use super::{
    cursor::Cursor,
    index::Index,
    reader::{Chunk, LogReader, Missing},
    reports::LaneReports,
};
use crate::time::WallCheck;

/// The log as one lane sees it.
pub(crate) struct LaneLog {
    /// What had ended when the log was opened.
    pub(super) done: Cursor,
    /// The end of the log then.
    pub(super) recovered_seq: u64,
    pub(super) index: Arc<Index>,
    pub(super) reader: LogReader,
    /// For what is read again: else both would look for their places over and over.
    pub(super) second_reader: LogReader,
    pub(super) reports: LaneReports,
    pub(super) skipped: watch::Receiver<u64>,
    pub(super) surplus: watch::Receiver<u64>,
    pub(super) wall: WallCheck,
}

impl LaneLog {
    /// The first event that has not ended.
    pub(crate) fn first_seq(&self) -> u64 {
        self.done.lowest()
    }

    /// Events that an earlier run has left.
    pub(crate) fn left(&self) -> u64 {
        self.done.pending(self.recovered_seq)
    }

    /// Where the log ends, now and when it was opened.
    pub(crate) fn view(&self) -> LogView {
        LogView { index: self.index.clone(), recovered_seq: self.recovered_seq }
    }

    /// Reads events from number `seq` on that have not ended. Blocks on the
    /// disk.
    pub(crate) fn read(&mut self, seq: u64, events_max: usize, bytes_max: u64) -> io::Result<Chunk> {
        let chunk = self.reader.read(seq, events_max, bytes_max)?;
        Ok(self.without_ended(seq, chunk))
    }

    /// The same, beside it: for events that were read before and not taken.
    pub(crate) fn read_again(&mut self, seq: u64, events_max: usize, bytes_max: u64) -> io::Result<Chunk> {
        let chunk = self.second_reader.read(seq, events_max, bytes_max)?;
        Ok(self.without_ended(seq, chunk))
    }

    fn without_ended(&self, from: u64, mut chunk: Chunk) -> Chunk {
        if from < self.recovered_seq {
            chunk.events.retain(|logged| !self.done.has_ended(logged.seq));
            let not_ended = |Missing { seqs, why }: &Missing| {
                let why = *why;
                self.done.not_ended(seqs.clone()).into_iter().map(move |seqs| Missing { seqs, why })
            };
            chunk.missing = chunk.missing.iter().flat_map(not_ended).collect();
        }
        chunk
    }

    /// See [`LogReader::read_around`].
    pub(crate) fn read_around(&mut self, reads_around: bool) {
        self.reader.read_around(reads_around);
        self.second_reader.read_around(reads_around);
    }

    /// Lets go of files, until the next read.
    pub(crate) fn close(&mut self) {
        self.reader.close();
        self.second_reader.close();
    }

    /// Whether the age of what is in the log can be judged.
    pub(crate) fn wall_check(&self) -> WallCheck {
        self.wall.clone()
    }

    /// The lane's way to report.
    pub(crate) fn reports(&self) -> LaneReports {
        self.reports.clone()
    }

    /// Changes when the queue had no room for an event: its number.
    pub(crate) fn skipped(&self) -> watch::Receiver<u64> {
        self.skipped.clone()
    }

    /// Changes when the oldest events must make room: the number of the first
    /// that may stay.
    pub(crate) fn surplus(&self) -> watch::Receiver<u64> {
        self.surplus.clone()
    }
}

/// Where a log ends.
#[derive(Debug, Clone)]
pub(crate) struct LogView {
    index: Arc<Index>,
    recovered_seq: u64,
}

impl LogView {
    /// The number of the next event that will be accepted.
    pub(crate) fn next_seq(&self) -> u64 {
        self.index.next_seq()
    }

    /// True for an event that was there when the log was opened.
    pub(crate) fn is_left(&self, seq: u64) -> bool {
        seq < self.recovered_seq
    }
}
