//! What is known of the store now, for those who show it.

use std::{
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
};

use analytics_relay_store::sqlite::Stats;
use serde::{Deserialize, Serialize};

/// What is in a PostgreSQL, of all relays that write to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServerStats {
    /// Events.
    pub(crate) events: u64,
    /// Websites and apps.
    pub(crate) sites: u64,
    /// The times of the earliest and the latest event, in Unix milliseconds.
    pub(crate) first_ms: Option<i64>,
    pub(crate) last_ms: Option<i64>,
    /// Bytes of the tables with their indexes.
    pub(crate) bytes: u64,
    /// Days that have a partition.
    pub(crate) partitions: u64,
    /// Events of days that have none.
    pub(crate) default_events: u64,
    /// What the server says it is.
    pub(crate) server_version: String,
    /// The version of TimescaleDB, where it is used.
    pub(crate) timescaledb: Option<String>,
    /// Links, aliases and keys of traits that this relay did not note since the start.
    #[serde(default)]
    pub(crate) links_refused: u64,
    #[serde(default)]
    pub(crate) aliases_refused: u64,
    #[serde(default)]
    pub(crate) traits_refused: u64,
    /// Events of websites that it did not keep since the start, as their tenant had too many.
    #[serde(default)]
    pub(crate) sources_refused: u64,
    /// What the server took over half a second for, of what this relay asked since the start.
    #[serde(default)]
    pub(crate) slow: u64,
}

/// Connections of this relay to a server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Connections {
    /// Used just now.
    pub(crate) in_use: usize,
    /// Free.
    pub(crate) idle: usize,
    /// Who waits for one.
    pub(crate) waiting: usize,
}

/// Written by who works with the store, read by metrics and health. Nobody waits here.
#[derive(Debug, Default)]
pub(crate) struct StoreStatus {
    told: Mutex<Told>,
    /// When the newest event that is kept was accepted, in Unix milliseconds; 0 if none.
    newest_accepted_ms: AtomicI64,
}

#[derive(Debug, Default, Clone)]
struct Told {
    is_open: bool,
    /// What is wrong if it is not and should be.
    not_open: Option<String>,
    set_aside: Option<PathBuf>,
    stats: Stats,
    server: ServerStats,
}

impl StoreStatus {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is open; where a damaged file went.
    pub(super) fn opened(&self, set_aside: Option<PathBuf>) {
        let mut told = self.told();
        (told.is_open, told.not_open, told.set_aside) = (true, None, set_aside);
    }

    /// It cannot be opened. True if that is not what was known already.
    pub(super) fn cannot_open(&self, why: &str) -> bool {
        self.not_open(format!("the store cannot be opened: {why}"))
    }

    /// It was open, and cannot be reached now. True if that is not what was known already.
    pub(super) fn lost(&self, why: &str) -> bool {
        self.not_open(format!("the store cannot be reached: {why}"))
    }

    fn not_open(&self, trouble: String) -> bool {
        let mut told = self.told();
        let is_new = told.not_open.as_ref() != Some(&trouble);
        (told.is_open, told.not_open) = (false, Some(trouble));
        is_new
    }

    /// What was counted in it.
    pub(super) fn counted(&self, stats: Stats) {
        self.told().stats = stats;
    }

    /// What was counted in a server.
    pub(super) fn counted_in_server(&self, stats: ServerStats) {
        self.told().server = stats;
    }

    /// Events that were accepted until then are kept.
    pub(super) fn keeps(&self, accepted_ms: i64) {
        self.newest_accepted_ms.fetch_max(accepted_ms, Ordering::Relaxed);
    }

    /// True if it is open.
    pub(crate) fn is_open(&self) -> bool {
        self.told().is_open
    }

    /// True if a damaged file was set aside when it was opened.
    pub(crate) fn is_set_aside(&self) -> bool {
        self.told().set_aside.is_some()
    }

    /// What was counted in it last, if it is a file.
    pub(crate) fn stats(&self) -> Stats {
        self.told().stats.clone()
    }

    /// What was counted in it last, if it is a server.
    pub(crate) fn server_stats(&self) -> ServerStats {
        self.told().server.clone()
    }

    /// How far what is kept is behind what was accepted, while something is not kept yet.
    pub(crate) fn lag_ms(&self, in_flight: bool, oldest_accepted_ms: Option<i64>, now_ms: i64) -> i64 {
        let kept_ms = self.newest_accepted_ms.load(Ordering::Relaxed);
        let since_ms = if kept_ms == 0 { oldest_accepted_ms } else { Some(kept_ms) };
        since_ms.filter(|_| in_flight).map_or(0, |since_ms| (now_ms - since_ms).max(0))
    }

    /// What a person has to know.
    pub(crate) fn troubles(&self) -> Vec<String> {
        let Told { not_open, set_aside, stats, .. } = self.told().clone();
        let mut troubles = Vec::new();
        troubles.extend(not_open);
        troubles.extend(set_aside.map(|aside| {
            let aside = aside.display();
            format!("the store was damaged and is empty: what it had is in {aside}, see store import")
        }));
        let Stats { damaged_reads, damaged_batches, .. } = stats;
        if damaged_reads > 0 || damaged_batches > 0 {
            troubles.push(format!(
                "parts of the store are damaged and in no figure: {damaged_batches} batches, \
                 {damaged_reads} reads of blocks"
            ));
        }
        troubles
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_is_behind_only_while_something_is_not_kept_yet() {
        let status = StoreStatus::default();
        assert_eq!(status.lag_ms(true, Some(4_000), 10_000), 6_000, "nothing is kept yet");
        status.keeps(9_000);
        status.keeps(7_000);
        assert_eq!(status.lag_ms(true, Some(4_000), 10_000), 1_000);
        assert_eq!(status.lag_ms(false, None, 10_000), 0);
        assert_eq!(status.lag_ms(true, None, 8_000), 0, "the clock was set back");
    }

    #[test]
    fn a_store_that_is_well_is_no_trouble_and_what_is_wrong_is_named() {
        let status = StoreStatus::default();
        assert_eq!(status.troubles(), [""; 0]);
        assert!(status.cannot_open("disk full"));
        assert!(!status.cannot_open("disk full"), "it was told");
        assert_eq!(status.troubles(), ["the store cannot be opened: disk full"]);
        status.opened(Some("/data/store.db-damaged-1".into()));
        status.counted(Stats { damaged_reads: 3, ..Stats::default() });
        let troubles = status.troubles();
        assert!(troubles[0].contains("/data/store.db-damaged-1"), "{troubles:?}");
        assert!(troubles[1].contains("0 batches, 3 reads"), "{troubles:?}");
    }

    #[test]
    fn a_server_that_is_lost_is_not_open_until_it_is_back() {
        let status = StoreStatus::default();
        status.opened(None);
        assert!(status.lost("connection refused") && !status.lost("connection refused"));
        assert!(!status.is_open());
        assert_eq!(status.troubles(), ["the store cannot be reached: connection refused"]);
        status.opened(None);
        assert!(status.is_open() && status.troubles().is_empty());
    }
}
