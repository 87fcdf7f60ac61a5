//! What came in at a provider against how it ended, in counters that are the
//! metrics themselves.

use std::fmt;

use prometheus_client::metrics::counter::Counter;

use crate::reasons::{DropReason, Outcome};

/// Counts what came in and how it ended at one provider. Its counters are the
/// metrics themselves, so that the balance and the metrics cannot differ.
#[derive(Debug, Clone)]
pub struct Ledger {
    provider: &'static str,
    accepted: Counter,
    reloaded: Counter,
    ended: Vec<(Outcome, Counter)>,
}

impl Ledger {
    /// `accepted` is shared by all providers: each gets every accepted event.
    /// `ended` gives the counter of an outcome.
    pub fn new(
        provider: &'static str,
        accepted: Counter,
        reloaded: Counter,
        ended: impl Fn(Outcome) -> Counter,
    ) -> Self {
        let ended = Outcome::all().map(|outcome| (outcome, ended(outcome))).collect();
        Self { provider, accepted, reloaded, ended }
    }

    /// Counts events that an earlier run has left on disk.
    pub fn reloaded(&self, events: u64) {
        self.reloaded.inc_by(events);
    }

    /// Counts events that ended.
    pub fn ended(&self, outcome: Outcome, events: u64) {
        let counter = self.ended.iter().find(|(candidate, _)| *candidate == outcome);
        let (_, counter) = counter.expect("the ledger was made with every outcome");
        counter.inc_by(events);
    }

    /// What came in against how it ended.
    pub fn balance(&self) -> Balance {
        let mut balance = Balance { provider: self.provider, ..Balance::default() };
        for (outcome, counter) in &self.ended {
            let sum = match outcome {
                Outcome::Delivered => &mut balance.delivered,
                Outcome::DeadLettered(_) => &mut balance.dead_lettered,
                Outcome::Spilled => &mut balance.spilled,
                Outcome::Dropped(why) => {
                    if *why == DropReason::Erased {
                        balance.erased += counter.get();
                    }
                    &mut balance.dropped
                }
                Outcome::NotFor(_) => &mut balance.not_for,
            };
            *sum += counter.get();
        }
        // What came in is read after what ended, so that in flight is never
        // less than nothing while the relay works.
        balance.accepted = self.accepted.get();
        balance.reloaded = self.reloaded.get();
        balance
    }
}

/// What came in at one provider against how it ended, since the relay started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Balance {
    /// Which provider.
    pub provider: &'static str,
    /// Answered OK.
    pub accepted: u64,
    /// Left on disk by an earlier run.
    pub reloaded: u64,
    /// Taken by the provider.
    pub delivered: u64,
    /// On disk with a reason.
    pub dead_lettered: u64,
    /// On disk for the next start.
    pub spilled: u64,
    /// Lost with a named reason, or dropped because somebody asked for it.
    pub dropped: u64,
    /// Those of the dropped whose users are erased: no loss.
    pub erased: u64,
    /// Not meant for the provider.
    pub not_for: u64,
}

impl Balance {
    /// Events that have not ended. Nothing, once the relay has drained.
    pub fn in_flight(&self) -> u64 {
        let ended = self.delivered + self.dead_lettered + self.spilled + self.dropped + self.not_for;
        (self.accepted + self.reloaded).saturating_sub(ended)
    }

    /// Events that are gone once the relay has drained: dropped without anybody having
    /// asked for it, or not accounted for, which would be a defect.
    pub fn lost(&self) -> u64 {
        self.dropped.saturating_sub(self.erased) + self.in_flight()
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "accepted {}", self.accepted)?;
        if self.reloaded > 0 {
            write!(f, " + reloaded {}", self.reloaded)?;
        }
        write!(
            f,
            " = delivered {} + dead_lettered {} + spilled {} + dropped {} + in_flight {}",
            self.delivered,
            self.dead_lettered,
            self.spilled,
            self.dropped,
            self.in_flight()
        )?;
        if self.not_for > 0 { write!(f, " + not_for {}", self.not_for) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use analytics_relay_providers::NotFor;

    use super::*;
    use crate::reasons::{DeadLetterReason, DropReason};

    #[test]
    fn the_ledger_balances() {
        let accepted = Counter::default();
        let ledger = Ledger::new("mixpanel", accepted.clone(), Counter::default(), |_| Counter::default());
        accepted.inc_by(10);
        ledger.reloaded(2);
        ledger.ended(Outcome::Delivered, 6);
        ledger.ended(Outcome::DeadLettered(DeadLetterReason::Invalid), 1);
        ledger.ended(Outcome::DeadLettered(DeadLetterReason::TooLarge), 1);
        ledger.ended(Outcome::Spilled, 2);
        ledger.ended(Outcome::Dropped(DropReason::SpillFailed), 1);
        let balance = ledger.balance();
        assert_eq!((balance.in_flight(), balance.lost()), (1, 2));
        ledger.ended(Outcome::NotFor(NotFor::UnsupportedKind), 1);
        let told = ledger.balance();
        assert_eq!((told.in_flight(), told.lost()), (0, 1), "what is not for it is no loss");
        assert!(told.to_string().ends_with("in_flight 0 + not_for 1"), "{told}");
        assert_eq!(
            balance.to_string(),
            "accepted 10 + reloaded 2 = delivered 6 + dead_lettered 2 + spilled 2 + dropped 1 + in_flight 1"
        );
    }
}
