//! Whose devices and users are, by keys, as questions need it; and what is remembered of it
//! between them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::model::{IdMap, uniques::TOGETHER};

/// Most bytes of the owners that are remembered, over all tenants but the one that is asked.
const OWNERS_BYTES_MAX: usize = 64 << 20;
/// What changed since a tenant's owners were put together is kept apart up to here, or up to
/// an eighth of them: a question copies that and no more.
const CHANGED_MAX: usize = 4096;

/// Whose something is, by keys, and until when.
type Owned = IdMap<(u64, i64)>;

/// Whose devices and users are, by keys, in one tenant.
#[derive(Debug, Clone, Default)]
pub(crate) struct OwnerMap {
    base: Arc<Owned>,
    /// What is other than there.
    changed: Owned,
    /// Up to which change it goes.
    pub(crate) n: i64,
    /// The latest moment that it was read of, by its last change: later than `n` while not all
    /// of it was read, and then it is whole for nobody.
    #[cfg(feature = "postgres")]
    pub(crate) read_of: i64,
    /// How often some were deleted.
    pub(crate) epoch: i64,
}

impl OwnerMap {
    /// None, of a time at which some were deleted so often.
    pub(crate) fn of_epoch(epoch: i64) -> Self {
        Self { epoch, ..Self::default() }
    }

    /// Whose something is, and until when; it is its own after that, and if it is not known.
    #[inline]
    pub(crate) fn owner(&self, who: u64) -> (u64, i64) {
        if who == 0 {
            return (who, i64::MAX);
        }
        let owner = self.changed.get(who).or_else(|| self.base.get(who));
        owner.unwrap_or((who, i64::MAX))
    }

    /// The same of many.
    pub(crate) fn owners(&self, keys: &[u64]) -> Vec<(u64, i64)> {
        let mut owners = Vec::with_capacity(keys.len());
        for some in keys.chunks(TOGETHER) {
            self.changed.touch(some);
            self.base.touch(some);
            owners.extend(some.iter().map(|key| self.owner(*key)));
        }
        owners
    }

    /// The keys of all that count as one does, at some time.
    #[cfg(feature = "postgres")]
    pub(crate) fn keys_of(&self, root: u64) -> Vec<u64> {
        let both = [&*self.base, &self.changed];
        let keys = both.iter().flat_map(|owned| owned.iter().map(|(who, _)| who));
        let mut keys: Vec<u64> = keys.filter(|who| self.owner(*who).0 == root).chain([root]).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    pub(crate) fn insert(&mut self, who: u64, owner: (u64, i64)) {
        self.changed.insert(who, owner);
        if self.changed.len() > CHANGED_MAX.max(self.base.len() / 8) {
            let base = Arc::make_mut(&mut self.base);
            let changed = std::mem::take(&mut self.changed);
            changed.iter().for_each(|(who, owner)| base.insert(who, owner));
        }
    }
}

/// The owners that were read last, for all readers: those of the tenants that were asked last.
#[derive(Debug, Default)]
pub(crate) struct OwnerCache(Mutex<Cached>);

#[derive(Debug, Default)]
struct Cached {
    /// By tenant, and when it was asked.
    maps: HashMap<i64, (Arc<OwnerMap>, u64)>,
    asked: u64,
}

impl Cached {
    fn get(&mut self, tenant: i64) -> Arc<OwnerMap> {
        self.asked += 1;
        let known = self.maps.get_mut(&tenant);
        known
            .map(|(map, asked)| {
                *asked = self.asked;
                map.clone()
            })
            .unwrap_or_default()
    }

    /// Remembers owners, and forgets those of tenants that were not asked for long.
    fn put(&mut self, tenant: i64, map: Arc<OwnerMap>) {
        let known = self.maps.get(&tenant);
        if known.is_some_and(|(known, _)| (known.epoch, known.n) > (map.epoch, map.n)) {
            return;
        }
        self.maps.insert(tenant, (map, self.asked));
        let bytes = |map: &OwnerMap| map.base.bytes() + map.changed.bytes();
        let others = |maps: &HashMap<i64, (Arc<OwnerMap>, u64)>| {
            let others = maps.iter().filter(|(one, _)| **one != tenant);
            let sum: usize = others.clone().map(|(_, (map, _))| bytes(map)).sum();
            let oldest = others.min_by_key(|(_, (_, asked))| *asked).map(|(one, _)| *one);
            oldest.filter(|_| sum > OWNERS_BYTES_MAX)
        };
        while let Some(oldest) = others(&self.maps) {
            self.maps.remove(&oldest);
        }
    }
}

impl OwnerCache {
    fn cached(&self) -> MutexGuard<'_, Cached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was read last of a tenant.
    pub(crate) fn last(&self, tenant: i64) -> Arc<OwnerMap> {
        self.cached().get(tenant)
    }

    /// Forgets all.
    pub(crate) fn clear(&self) {
        self.cached().maps.clear();
    }

    /// Remembers what was read.
    pub(crate) fn keep(&self, tenant: i64, map: Arc<OwnerMap>) {
        self.cached().put(tenant, map);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_of_tenants_that_were_not_asked_for_long_are_forgotten_first() {
        let mut cached = Cached::default();
        let mut base = Owned::default();
        (1..=1 << 19).for_each(|who| base.insert(who, (1, 0)));
        assert_eq!(base.bytes(), 24 << 20);
        let base = Arc::new(base);
        let map = || Arc::new(OwnerMap { base: base.clone(), n: 1, ..OwnerMap::default() });
        let ask = |cached: &mut Cached, tenant: i64| {
            let known = cached.get(tenant);
            let is_known = known.n > 0;
            cached.put(tenant, if is_known { known } else { map() });
            is_known
        };
        // Two others have room beside the one that is asked.
        assert_eq!([1, 2, 3].map(|tenant| ask(&mut cached, tenant)), [false; 3]);
        assert!(ask(&mut cached, 1), "and so there is for all three");
        assert!(!ask(&mut cached, 4));
        let known = |cached: &Cached| {
            let mut known: Vec<i64> = cached.maps.keys().copied().collect();
            known.sort_unstable();
            known
        };
        assert_eq!(known(&cached), [1, 3, 4], "the second was asked longest ago");
        assert!(ask(&mut cached, 3) && ask(&mut cached, 1) && !ask(&mut cached, 2));
        assert_eq!(known(&cached), [1, 2, 3]);
    }
}
