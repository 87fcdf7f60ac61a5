//! What is known of the store now, for those who show it.

use std::{
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
};

use analytics_relay_store::sqlite::Stats;

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
    /// Why it is not, if it should be.
    not_open: Option<String>,
    set_aside: Option<PathBuf>,
    stats: Stats,
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
        let mut told = self.told();
        let is_new = told.not_open.as_deref() != Some(why);
        told.not_open = Some(why.to_owned());
        is_new
    }

    /// What was counted in it.
    pub(super) fn counted(&self, stats: Stats) {
        self.told().stats = stats;
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

    /// What was counted in it last.
    pub(crate) fn stats(&self) -> Stats {
        self.told().stats.clone()
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
        troubles.extend(not_open.map(|why| format!("the store cannot be opened: {why}")));
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
}
