//! The closed list of how an event can end, and the ledger that balances.

use std::{borrow::Cow, fmt};

use analytics_relay_providers::Rejection;
use prometheus_client::metrics::counter::Counter;
use serde::{Deserialize, Serialize};

/// How one event ended at one provider. Every accepted event ends once at each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The provider's success, read in full, naming no failure for the event.
    Delivered,
    /// On disk with its reason, to be looked at and replayed.
    DeadLettered(DeadLetterReason),
    /// On disk, in a spill file or in the spool, to be sent at the next start.
    Spilled,
    /// Lost, and counted.
    Dropped(DropReason),
}

/// Why an event became a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadLetterReason {
    /// The provider names it as invalid, or refused it alone without a word.
    Invalid,
    /// The provider takes none of its ids.
    UnusableId,
    /// The daily quota of its user or device at the provider is used up.
    QuotaExceeded,
    /// Even alone it is larger than the provider takes.
    TooLarge,
    /// Every attempt failed.
    RetriesExhausted,
    /// The provider's lane had no room left for it.
    LaneFull,
    /// A newer identify of the same user arrived first.
    Superseded,
    /// The provider did not take it before the retention of the spool ended.
    Expired,
    /// The spool had used up its bytes, and it was the provider's oldest.
    SpoolFull,
}

/// Why an event was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// It should have become a dead letter, but they had used up their bytes.
    DeadLettersFull,
    /// It should have become a dead letter, but writing failed.
    DeadLetterFailed,
    /// It should have been spilled, but writing failed.
    SpillFailed,
    /// It was answered QUEUED, and neither the spool nor the queue took it.
    SpoolFailed,
    /// Its bytes in the spool are damaged; a copy is in quarantine.
    SpoolDamaged,
}

impl DeadLetterReason {
    /// All reasons.
    pub const ALL: [Self; 9] = [
        Self::Invalid,
        Self::UnusableId,
        Self::QuotaExceeded,
        Self::TooLarge,
        Self::RetriesExhausted,
        Self::LaneFull,
        Self::Superseded,
        Self::Expired,
        Self::SpoolFull,
    ];

    /// The reason's name in files, logs, metrics and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::UnusableId => "unusable_id",
            Self::QuotaExceeded => "quota_exceeded",
            Self::TooLarge => "too_large",
            Self::RetriesExhausted => "retries_exhausted",
            Self::LaneFull => "lane_full",
            Self::Superseded => "superseded",
            Self::Expired => "expired",
            Self::SpoolFull => "spool_full",
        }
    }

    /// The reason of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }
}

impl From<Rejection> for DeadLetterReason {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::Invalid => Self::Invalid,
            Rejection::UnusableId => Self::UnusableId,
            Rejection::QuotaExceeded => Self::QuotaExceeded,
            Rejection::TooLarge => Self::TooLarge,
        }
    }
}

impl fmt::Display for DeadLetterReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl DropReason {
    const ALL: [Self; 5] = [
        Self::DeadLettersFull,
        Self::DeadLetterFailed,
        Self::SpillFailed,
        Self::SpoolFailed,
        Self::SpoolDamaged,
    ];

    /// The reason's name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::DeadLettersFull => "dead_letters_full",
            Self::DeadLetterFailed => "dead_letter_failed",
            Self::SpillFailed => "spill_failed",
            Self::SpoolFailed => "spool_failed",
            Self::SpoolDamaged => "spool_damaged",
        }
    }
}

impl Outcome {
    /// Every way to end.
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::Delivered, Self::Spilled]
            .into_iter()
            .chain(DeadLetterReason::ALL.into_iter().map(Self::DeadLettered))
            .chain(DropReason::ALL.into_iter().map(Self::Dropped))
    }

    /// The outcome's name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::DeadLettered(_) => "dead_lettered",
            Self::Spilled => "spilled",
            Self::Dropped(_) => "dropped",
        }
    }

    /// Name and reason in one, for files.
    pub fn key(self) -> Cow<'static, str> {
        match self.reason() {
            "" => self.name().into(),
            reason => format!("{}/{reason}", self.name()).into(),
        }
    }

    /// The reason's name; empty for an outcome that needs none.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Delivered | Self::Spilled => "",
            Self::DeadLettered(reason) => reason.name(),
            Self::Dropped(reason) => reason.name(),
        }
    }
}

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
                Outcome::Dropped(_) => &mut balance.dropped,
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
    /// Lost with a named reason.
    pub dropped: u64,
}

impl Balance {
    /// Events that have not ended. Nothing, once the relay has drained.
    pub fn in_flight(&self) -> u64 {
        let ended = self.delivered + self.dead_lettered + self.spilled + self.dropped;
        (self.accepted + self.reloaded).saturating_sub(ended)
    }

    /// Events that are gone once the relay has drained: dropped, or not
    /// accounted for, which would be a defect.
    pub fn lost(&self) -> u64 {
        self.dropped + self.in_flight()
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
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_own_labels() {
        let labels: std::collections::HashSet<_> =
            Outcome::all().map(|outcome| (outcome.name(), outcome.reason())).collect();
        assert_eq!(labels.len(), Outcome::all().count());
        for reason in DeadLetterReason::ALL {
            assert_eq!(DeadLetterReason::from_name(reason.name()), Some(reason));
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.name());
        }
    }

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
        assert_eq!(
            balance.to_string(),
            "accepted 10 + reloaded 2 = delivered 6 + dead_lettered 2 + spilled 2 + dropped 1 + in_flight 1"
        );
    }
}
