//! What became of every event, as far as it is known at any moment.

use std::sync::{Arc, atomic::Ordering};

use super::lanes::LaneHandle;
use crate::{
    delivery::lane::LaneStatus,
    ledger::{Balance, Ledger},
    queue::spool::SharedStatus,
};

/// The ledgers of all providers, and what of their open side stands on disk.
#[derive(Debug, Clone)]
pub(super) struct Accounts {
    lanes: Vec<(Ledger, Arc<LaneStatus>)>,
    spool: Option<Arc<SharedStatus>>,
}

impl Accounts {
    pub(super) fn new(lanes: &[LaneHandle], spool: Option<Arc<SharedStatus>>) -> Self {
        let lanes = lanes.iter().map(|lane| (lane.ledger.clone(), lane.status.clone())).collect();
        Self { lanes, spool }
    }

    /// One for each provider. What has not ended and stands in the log, or in a
    /// spill file of an earlier run, goes on at the next start.
    pub(super) fn balances(&self) -> Vec<Balance> {
        let account = |(ledger, lane): &(Ledger, Arc<LaneStatus>)| {
            let on_disk = self.in_the_log(lane.provider) + lane.reloaded() as u64;
            let balance = if_it_ended_now(ledger.balance(), on_disk);
            Balance { accepted: balance.accepted + self.answered(), ..balance }
        };
        self.lanes.iter().map(account).collect()
    }

    /// Events that were answered, and that the log's thread, if it hangs, has not even
    /// counted: in nobody's account else.
    fn answered(&self) -> u64 {
        self.spool.as_ref().map_or(0, |spool| spool.answered() as u64)
    }

    fn in_the_log(&self, provider: &str) -> u64 {
        let mut cursors = self.spool.iter().flat_map(|spool| &spool.cursors);
        let cursor = cursors.find(|cursor| cursor.provider == provider);
        cursor.map_or(0, |cursor| cursor.pending.load(Ordering::Relaxed))
    }
}

/// A balance whose open events count as spilled, as far as they are on disk and
/// not counted so already.
fn if_it_ended_now(balance: Balance, on_disk: u64) -> Balance {
    let left = on_disk.saturating_sub(balance.spilled).min(balance.in_flight());
    Balance { spilled: balance.spilled + left, ..balance }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_on_disk_is_not_lost_and_is_not_counted_twice() {
        let open = Balance { provider: "mixpanel", accepted: 100, delivered: 60, ..Balance::default() };
        let account = |balance, on_disk| {
            let balance = if_it_ended_now(balance, on_disk);
            (balance.spilled, balance.lost())
        };
        assert_eq!(account(open, 0), (0, 40), "only in memory");
        assert_eq!(account(open, 30), (30, 10), "ten were promised the memory only");
        assert_eq!(account(open, 45), (40, 0), "five have ended, and the cursor does not say so yet");
        let closed = Balance { spilled: 30, ..open };
        assert_eq!(account(closed, 30), (30, 10), "the log was closed and is counted");
    }
}
