//! Events and visitors in buckets of time.

use super::{
    chunk::Chunk,
    groups::visitor,
    seam::{Fold, Seen, Wants},
    select::{Rows, bucket_of_all},
};
use crate::{
    Limits, Scope, StoreError,
    model::{Buckets, Class, Uniques},
};

/// Figures of each bucket.
pub(crate) struct Counts<'q> {
    scope: &'q Scope,
    buckets: &'q Buckets,
    /// Visitors that are told apart, over all buckets; once there are more, those of each
    /// bucket that has more than its part of them are estimated.
    budget: usize,
    /// More visitors of a bucket are estimated.
    exact_max: usize,
    /// Whether views are asked for.
    with_views: bool,
    pub(crate) sums: Vec<Sum>,
}

/// Those of one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sum {
    pub(crate) events: u64,
    pub(crate) views: u64,
    pub(crate) visitors: Uniques,
}

impl<'q> Counts<'q> {
    pub(crate) fn new(scope: &'q Scope, buckets: &'q Buckets, with_views: bool, limits: &Limits) -> Self {
        let (budget, sums) = (limits.exact_max, vec![Sum::default(); buckets.len()]);
        Self { scope, buckets, budget, exact_max: budget, with_views, sums }
    }

    /// Keeps what is remembered in bounds.
    pub(crate) fn bound(&mut self) {
        let part = (self.budget / self.sums.len().max(1)).max(1024);
        if self.exact_max <= part {
            return;
        }
        let exact: usize = self.sums.iter().map(|sum| sum.visitors.exact()).sum();
        if exact > self.budget || self.sums.iter().any(|sum| sum.visitors.is_estimated()) {
            self.exact_max = part;
            let large = self.sums.iter_mut().filter(|sum| sum.visitors.exact() > part);
            large.for_each(|sum| sum.visitors.estimate());
        }
    }

    /// Takes in what a backend has summed up itself: events of one visitor in a bucket, the
    /// first and the last of which are of these times. Whoever owned a device until a time in
    /// between has the first of them, and the device itself has the last.
    #[cfg(feature = "postgres")]
    pub(crate) fn add(&mut self, bucket: usize, events: u64, who: u64, times: (i64, i64), seen: &Seen<'_>) {
        let Some(sum) = self.sums.get_mut(bucket) else { return };
        sum.events += events;
        let (root, until_ms) = seen.owners.owner(who);
        if times.0 < until_ms {
            sum.visitors.insert(root, self.exact_max);
        }
        if times.1 >= until_ms {
            sum.visitors.insert(who, self.exact_max);
        }
    }

    /// Takes in a block of which every row counts, in one bucket: who is in it says all but how
    /// many views there were, which may be remembered. False if it is not such.
    fn take_whole(&mut self, chunk: &dyn Chunk, seen: &Seen<'_>) -> Result<bool, StoreError> {
        let counts_all = self.scope.include_bots || !chunk.has_bots();
        let Some(bucket) = bucket_of_all(chunk, self.scope, self.buckets).filter(|_| counts_all) else {
            return Ok(false);
        };
        let views = match self.with_views {
            // Of machines nothing is remembered.
            true => chunk.whole().filter(|_| !chunk.has_bots()).map(|whole| whole.views),
            false => Some(0),
        };
        let Some(views) = views else { return Ok(false) };
        let Some((first_ms, last_ms)) = chunk.bounds_ms() else { return Ok(false) };
        let who = chunk.who(false)?;
        let visitors = seen.visitors(&who);
        if visitors.iter().any(|(_, until_ms)| (first_ms..=last_ms).contains(until_ms)) {
            return Ok(false);
        }
        let sum = &mut self.sums[bucket];
        sum.events += chunk.rows() as u64;
        sum.views += views;
        let visitor =
            |((root, until_ms), own): (&(u64, i64), &u64)| if last_ms < *until_ms { *root } else { *own };
        sum.visitors.extend(visitors.iter().zip(&who.keys).map(visitor), self.exact_max);
        Ok(true)
    }
}

impl Fold for Counts<'_> {
    fn wants(&self) -> Wants {
        Wants::of(self.scope).who()
    }

    fn take(&mut self, chunk: &mut dyn Chunk, seen: &Seen<'_>) -> Result<(), StoreError> {
        if self.take_whole(chunk, seen)? {
            self.bound();
            return Ok(());
        }
        let Some(rows) = Rows::of(chunk, self.scope, &self.scope.range_ms)? else { return Ok(()) };
        let parts = rows.parts(Some(self.buckets));
        let who = chunk.who(true)?;
        let visitors = seen.visitors(&who);
        // The last bucket that had somebody: they are looked up once for each.
        let mut last: Vec<Option<usize>> = vec![None; visitors.len()];
        let mut found = Vec::new();
        for (bucket, part) in parts {
            let sum = &mut self.sums[bucket];
            for row in rows.iter(part) {
                sum.events += 1;
                sum.views += u64::from(rows.class(row) == Class::View);
                let code = who.codes[row] as usize;
                let (root, until_ms) = visitors[code];
                if until_ms != i64::MAX {
                    found.push(visitor(&who, &visitors, code, rows.times[row]));
                } else if last[code] != Some(bucket) {
                    last[code] = Some(bucket);
                    found.push(root);
                }
            }
            sum.visitors.extend(found.drain(..), self.exact_max);
        }
        self.bound();
        Ok(())
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        self.exact_max = self.exact_max.min(other.exact_max);
        for (sum, other) in self.sums.iter_mut().zip(other.sums) {
            sum.events += other.events;
            sum.views += other.views;
            sum.visitors.merge(&other.visitors, self.exact_max);
        }
        self.bound();
        Ok(())
    }
}

pub(crate) const MINUTE_MS: i64 = 60_000;
pub(crate) const MINUTES: usize = 60;

/// What went on in the last hour, which its scope is about.
pub(crate) struct Minutes<'q> {
    scope: &'q Scope,
    exact_max: usize,
    /// Views of each minute, the last first.
    pub(crate) views: [u64; MINUTES],
    /// Visitors of the last 5 minutes.
    pub(crate) current: Uniques,
    /// Of the last 30.
    pub(crate) active: Uniques,
}

impl<'q> Minutes<'q> {
    pub(crate) fn new(scope: &'q Scope, exact_max: usize) -> Self {
        let (current, active) = Default::default();
        Self { scope, exact_max, views: [0; MINUTES], current, active }
    }
}

impl Fold for Minutes<'_> {
    fn wants(&self) -> Wants {
        Wants::of(self.scope).who()
    }

    fn take(&mut self, chunk: &mut dyn Chunk, seen: &Seen<'_>) -> Result<(), StoreError> {
        let Some(rows) = Rows::of(chunk, self.scope, &self.scope.range_ms)? else { return Ok(()) };
        let who = chunk.who(true)?;
        let visitors = seen.visitors(&who);
        for row in rows.iter(rows.range.clone()) {
            let ago = self.scope.range_ms.end.abs_diff(rows.times[row]) - 1;
            let minute = (ago / MINUTE_MS.unsigned_abs()) as usize;
            if let Some(views) = self.views.get_mut(minute) {
                *views += u64::from(rows.class(row) == Class::View);
            }
            let visitor = visitor(&who, &visitors, who.codes[row] as usize, rows.times[row]);
            if minute < 5 {
                self.current.insert(visitor, self.exact_max);
            }
            if minute < 30 {
                self.active.insert(visitor, self.exact_max);
            }
        }
        Ok(())
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        self.views.iter_mut().zip(other.views).for_each(|(ours, theirs)| *ours += theirs);
        self.current.merge(&other.current, self.exact_max);
        self.active.merge(&other.active, self.exact_max);
        Ok(())
    }
}

/// The visitors of a range, each by their key.
pub(crate) struct Visitors<'q> {
    pub(crate) scope: &'q Scope,
    /// Only these are of interest.
    pub(crate) among: Option<&'q crate::model::IdSet>,
    pub(crate) found: crate::model::IdSet,
    pub(crate) found_max: usize,
}

impl Fold for Visitors<'_> {
    fn wants(&self) -> Wants {
        Wants::of(self.scope).who()
    }

    fn take(&mut self, chunk: &mut dyn Chunk, seen: &Seen<'_>) -> Result<(), StoreError> {
        let Some(rows) = Rows::of(chunk, self.scope, &self.scope.range_ms)? else { return Ok(()) };
        let who = chunk.who(true)?;
        let visitors = seen.visitors(&who);
        let mut is_done = vec![false; visitors.len()];
        let mut found = Vec::new();
        for row in rows.iter(rows.range.clone()) {
            let code = who.codes[row] as usize;
            if visitors[code].1 != i64::MAX || !std::mem::replace(&mut is_done[code], true) {
                found.push(visitor(&who, &visitors, code, rows.times[row]));
            }
        }
        match self.among {
            None => self.found.extend(found),
            Some(among) => {
                let is_one = among.has(&found);
                let its = found.into_iter().zip(is_one).filter(|(_, is_one)| *is_one);
                self.found.extend(its.map(|(visitor, _)| visitor));
            }
        }
        self.check()
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        self.found.extend(other.found.iter());
        self.check()
    }
}

impl Visitors<'_> {
    fn check(&self) -> Result<(), StoreError> {
        if self.found.len() > self.found_max {
            return Err(StoreError::TooExpensive(format!("there are over {} visitors", self.found_max)));
        }
        Ok(())
    }
}
