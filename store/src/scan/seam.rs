//! What questions need of a backend: one that shows chunks to folds.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use super::{
    chunk::{Chunk, KeyColumn},
    owners::OwnerMap,
};
use crate::{Field, Scope, StoreError};

/// What a question sees: all events of one moment.
pub(crate) trait Scan {
    /// Shows a fold all chunks that may have events of a range.
    fn scan<F: Fold>(&mut self, range_ms: &Range<i64>, new: impl Fn() -> F + Sync) -> Result<F, StoreError>;

    /// Calls `take` with chunks that may have events of a range, those with the latest first,
    /// and the latest time of each. It says before which time nothing is of use to it any
    /// more, and may get it all the same.
    fn latest_first(
        &mut self,
        range_ms: &Range<i64>,
        wants: &Wants,
        take: impl FnMut(&mut dyn Chunk, i64, &Seen<'_>) -> Result<Option<i64>, StoreError>,
    ) -> Result<(), StoreError>;

    /// An upper bound of the sessions that a range may touch.
    fn sessions_max(&self, range_ms: &Range<i64>) -> Result<usize, StoreError>;

    /// An upper bound of the rows in a range.
    fn rows_max(&self, range_ms: &Range<i64>) -> Result<usize, StoreError>;

    /// Blocks of the last scans that could not be read.
    fn damaged_blocks(&self) -> u64;

    /// Fails if it takes too long.
    fn check(&self) -> Result<(), StoreError>;
}

/// What is read of chunks beside their times: a backend that reads no column by itself must
/// know it before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wants {
    /// Whose rows are.
    pub(crate) who: bool,
    /// What their sessions are found by.
    pub(crate) sessions: bool,
    /// Machines too.
    pub(crate) bots: bool,
    /// These fields.
    pub(crate) fields: Vec<Field>,
    /// These paths.
    pub(crate) paths: Vec<String>,
    /// All paths, and the events themselves.
    pub(crate) all: bool,
    /// Nothing but rows of these is of use; others may come all the same.
    pub(crate) whose: Whose,
}

/// Whose rows are of use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Whose {
    /// Everybody's.
    #[default]
    All,
    /// Those with this key.
    Key(u64),
    /// Of whoever counts as the user with this key does.
    User(u64),
    /// Those that name this device.
    Device(String),
}

impl Wants {
    /// What tells which rows of a scope count and match.
    pub(crate) fn of(scope: &Scope) -> Self {
        let wants = Self { bots: scope.include_bots, ..Self::default() };
        scope.filters.iter().fold(wants, |wants, filter| wants.field(&filter.field))
    }

    /// And whose they are.
    pub(crate) fn who(self) -> Self {
        Self { who: true, ..self }
    }

    /// And a field.
    pub(crate) fn field(mut self, field: &Field) -> Self {
        if !self.fields.contains(field) {
            self.fields.push(field.clone());
        }
        self
    }

    /// What this or another wants.
    pub(crate) fn and(mut self, other: Self) -> Self {
        for field in &other.fields {
            self = self.field(field);
        }
        for path in other.paths {
            if !self.paths.contains(&path) {
                self.paths.push(path);
            }
        }
        self.who |= other.who;
        self.sessions |= other.sessions;
        self.bots |= other.bots;
        self.all |= other.all;
        if self.whose != other.whose {
            self.whose = Whose::All;
        }
        self
    }
}

/// Takes in chunks, in any order.
pub(crate) trait Fold: Send {
    /// What it reads of chunks.
    fn wants(&self) -> Wants;
    /// Takes in one. Reads all that can be damaged before it changes.
    fn take(&mut self, chunk: &mut dyn Chunk, seen: &Seen<'_>) -> Result<(), StoreError>;
    /// Takes in what another has.
    fn merge(&mut self, other: Self) -> Result<(), StoreError>;
    /// True if there was no room for all that it should tell apart.
    fn is_cut(&self) -> bool {
        false
    }
}

/// Two folds that are shown the same chunks.
pub(crate) struct Both<A, B>(pub(crate) A, pub(crate) Option<B>);

impl<A: Fold, B: Fold> Fold for Both<A, B> {
    fn wants(&self) -> Wants {
        let wants = self.0.wants();
        match &self.1 {
            Some(other) => wants.and(other.wants()),
            None => wants,
        }
    }

    fn take(&mut self, chunk: &mut dyn Chunk, seen: &Seen<'_>) -> Result<(), StoreError> {
        self.0.take(chunk, seen)?;
        self.1.as_mut().map_or(Ok(()), |other| other.take(chunk, seen))
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        self.0.merge(other.0)?;
        match (&mut self.1, other.1) {
            (Some(ours), Some(theirs)) => ours.merge(theirs),
            _ => Ok(()),
        }
    }

    fn is_cut(&self) -> bool {
        self.0.is_cut() || self.1.as_ref().is_some_and(Fold::is_cut)
    }
}

/// What folds need to know of a snapshot.
pub(crate) struct Seen<'s> {
    pub(crate) owners: &'s OwnerMap,
}

impl Seen<'_> {
    /// Whose each key is, and until when.
    pub(crate) fn visitors(&self, who: &KeyColumn) -> Vec<(u64, i64)> {
        self.owners.owners(&who.keys)
    }
}

/// How long a question is worked on: until its time is over, or nobody waits for it.
#[derive(Debug, Clone)]
pub(crate) struct Patience {
    until: Instant,
    gone: Arc<AtomicBool>,
}

/// Somebody who waits for an answer.
#[derive(Debug)]
pub(crate) struct Waiting(Arc<AtomicBool>);

/// Somebody who waits until this is dropped, and what tells whether they have gone.
pub(crate) fn waiting() -> (Waiting, Arc<AtomicBool>) {
    let gone = Arc::<AtomicBool>::default();
    (Waiting(gone.clone()), gone)
}

impl Patience {
    /// Until then, or as long as nobody has gone.
    pub(crate) fn new(until: Instant, gone: Arc<AtomicBool>) -> Self {
        Self { until, gone }
    }

    pub(crate) fn check(&self) -> Result<(), StoreError> {
        if self.gone.load(Ordering::Relaxed) {
            return Err(StoreError::TooExpensive("nobody waits for it any more".into()));
        }
        if Instant::now() > self.until {
            return Err(StoreError::TooExpensive("it took too long; ask for a shorter range".into()));
        }
        Ok(())
    }
}

#[cfg(feature = "postgres")]
impl Patience {
    /// Waits for what a server says, which is to give up by itself when the time is over: not
    /// much longer, if it cannot be heard.
    pub(crate) fn wait<T, E>(
        &self,
        handle: &tokio::runtime::Handle,
        answer: impl Future<Output = Result<T, E>>,
    ) -> Result<T, StoreError>
    where
        StoreError: From<E>,
    {
        const GRACE: std::time::Duration = std::time::Duration::from_secs(5);
        let late = |_| StoreError::Unavailable("the server did not answer in time".into());
        let until = tokio::time::Instant::from_std(self.until + GRACE);
        Ok(handle.block_on(async { tokio::time::timeout_at(until, answer).await }).map_err(late)??)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_question_is_given_up_when_its_time_is_over_and_when_nobody_waits() {
        let soon = Instant::now() + Duration::from_secs(600);
        let (somebody, gone) = waiting();
        let patience = Patience::new(soon, gone);
        assert_eq!(patience.check(), Ok(()));
        drop(somebody);
        assert!(patience.check().is_err());
        let (_somebody, gone) = waiting();
        let patience = Patience::new(Instant::now() - Duration::from_millis(1), gone);
        assert!(patience.check().is_err());
    }
}
