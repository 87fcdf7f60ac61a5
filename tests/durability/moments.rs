//! Where a kill fell: what the threads of the store were doing, and what stood in the log
//! of its file.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::stored_load::Kept;

const WRITER: &str = "store-writer";
const SEALER: &str = "store-sealer";

/// The threads of the store, in a relay that is another process.
pub(crate) struct Threads {
    writer: PathBuf,
    sealer: PathBuf,
    /// How the kernel names the call in which both wait for something to do.
    idle: String,
}

impl Threads {
    /// Of a relay whose store has nothing to do. None if it has, or if this machine does not let
    /// us see it.
    pub(crate) fn at_rest(pid: u32) -> Option<Self> {
        let tasks: Vec<_> =
            fs::read_dir(format!("/proc/{pid}/task")).ok()?.map(|task| task.unwrap().path()).collect();
        let named = |name: &str| {
            let is_it =
                |task: &&PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name);
            tasks.iter().find(is_it).map(|task| task.join("syscall"))
        };
        let (writer, sealer) = (named(WRITER).unwrap(), named(SEALER).unwrap());
        let idle = call(&sealer).filter(|call| call.parse::<u32>().is_ok())?;
        (call(&writer)? == idle).then_some(Self { writer, sealer, idle })
    }

    /// True while a batch is written, a block or what else the store writes.
    pub(crate) fn writer_works(&self) -> bool {
        call(&self.writer).is_some_and(|call| call != self.idle)
    }

    /// True while a block is being made.
    pub(crate) fn sealer_works(&self) -> bool {
        call(&self.sealer).is_some_and(|call| call != self.idle)
    }
}

/// The number of the call that a thread is in, or what else it does.
fn call(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()?.split_whitespace().next().map(str::to_owned)
}

/// What a process that is no more has left in the log of its store's file.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Left {
    /// Pages of transactions that were committed and are not in the file itself yet.
    pub(crate) pages_waiting: u32,
    /// Pages of a transaction that was cut before it was committed for all to see.
    pub(crate) pages_begun: u32,
}

impl Left {
    /// Reads the log and its index, both as SQLite documents them.
    pub(crate) fn at(data_dir: &Path) -> Self {
        let index = fs::read(data_dir.join("store.db-shm")).unwrap_or_default();
        let Ok(log) = File::open(data_dir.join("store.db-wal")) else { return Self::default() };
        // The index holds numbers in the order of this machine.
        let number = |at: usize| {
            index.get(at..at + 4).map_or(0, |bytes| u32::from_ne_bytes(bytes.try_into().unwrap()))
        };
        let (committed, copied) = (number(16), number(96));
        let Some(salt) = index.get(32..40) else { return Self::default() };
        let mut head = [0; 12];
        if log.read_exact_at(&mut head, 0).is_err() {
            return Self::default();
        }
        let page_bytes = u32::from_be_bytes(head[8..12].try_into().unwrap());
        let is_written = |frame: u32| {
            let mut head = [0; 24];
            let at = 32 + u64::from(frame) * u64::from(24 + page_bytes);
            log.read_exact_at(&mut head, at).is_ok() && head[8..16] == *salt
        };
        let pages_begun = (committed..).take_while(|frame| is_written(*frame)).count() as u32;
        Self { pages_waiting: committed.saturating_sub(copied), pages_begun }
    }
}

/// At how many of the faults something was so.
#[derive(Debug, Default)]
pub(crate) struct Moments {
    /// The relay was stopped and its threads looked at.
    looked_at: u64,
    writer_worked: u64,
    sealer_worked: u64,
    tidying: u64,
    vacuuming: u64,
    pages_waiting: u64,
    pages_begun: u64,
    /// Blocks that were merged, in all runs.
    merged: u64,
    /// This machine does not let us look at threads.
    pub(crate) cannot_look: bool,
}

impl Moments {
    /// Takes in what the threads of a relay do that is stopped.
    pub(crate) fn look(&mut self, threads: Option<&Threads>) {
        let Some(threads) = threads else { return };
        self.looked_at += 1;
        self.writer_worked += u64::from(threads.writer_works());
        self.sealer_worked += u64::from(threads.sealer_works());
    }

    /// Takes in what a relay has left in the log of its store.
    pub(crate) fn left(&mut self, left: Left) {
        self.pages_waiting += u64::from(left.pages_waiting > 0);
        self.pages_begun += u64::from(left.pages_begun > 0);
    }

    /// Takes in what was done beside.
    pub(crate) fn kept(&mut self, kept: Kept) {
        self.merged += kept.merged;
        self.tidying += u64::from(kept.tidying);
        self.vacuuming += u64::from(kept.vacuuming);
    }

    /// Whether each was met, but for a vacuum, which is rare.
    pub(crate) fn has_all(&self) -> bool {
        let by_looks = [self.writer_worked, self.sealer_worked];
        let others = [self.tidying, self.pages_waiting, self.pages_begun, self.merged];
        others.iter().all(|count| *count > 0) && (self.cannot_look || by_looks.iter().all(|count| *count > 0))
    }

    pub(crate) fn has_vacuum(&self) -> bool {
        self.vacuuming > 0
    }

    pub(crate) fn text(&self) -> String {
        format!(
            "{} with pages in the log alone, {} in the middle of a transaction, {} while it was tidied, {} in a \
             vacuum; of {} that were looked at {} with the writer at work, {} with a block being made; {} blocks \
             were merged",
            self.pages_waiting,
            self.pages_begun,
            self.tidying,
            self.vacuuming,
            self.looked_at,
            self.writer_worked,
            self.sealer_worked,
            self.merged
        )
    }
}
