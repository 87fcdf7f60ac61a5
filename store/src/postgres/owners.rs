//! Whose devices and users are, as questions need it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use deadpool_postgres::Transaction;

use super::rows::kept;
use crate::{
    StoreError,
    scan::{
        owners::{OwnerCache, OwnerMap},
        seam::Patience,
    },
};

/// Owners that are read at once.
const AT_ONCE: i32 = 10_000;

/// What was read last, by numbers that tenants have in this process.
#[derive(Debug, Default)]
pub(super) struct Owners {
    cache: OwnerCache,
    numbers: Mutex<HashMap<String, i64>>,
}

impl Owners {
    pub(super) fn number(&self, tenant: &str) -> i64 {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let next = numbers.len() as i64;
        *numbers.entry(tenant.to_owned()).or_insert(next)
    }

    /// What was read of a tenant so far.
    #[cfg(test)]
    pub(super) fn last(&self, tenant: &str) -> Arc<OwnerMap> {
        self.cache.last(self.number(tenant))
    }

    #[cfg(test)]
    pub(super) fn keep(&self, tenant: &str, map: OwnerMap) {
        self.cache.keep(self.number(tenant), Arc::new(map));
    }

    /// Forgets all: who answers next may be a server that does not know what was read.
    pub(super) fn clear(&self) {
        self.cache.clear();
    }

    /// The owners of a tenant at the moment of a transaction: what changed since they were
    /// read, or all of them if some were deleted, or another question has read a later moment.
    /// What was read when patience is over is kept: the next question goes on from there.
    pub(super) async fn get(
        &self,
        transaction: &Transaction<'_>,
        tenant: &str,
        patience: &Patience,
    ) -> Result<Arc<OwnerMap>, StoreError> {
        let number = self.number(tenant);
        let tenant = kept(tenant);
        let statement =
            transaction.prepare_cached("SELECT epoch, n FROM relay_tenant WHERE tenant = $1").await?;
        let Some(row) = transaction.query_opt(&statement, &[&tenant]).await? else {
            return Ok(Arc::default());
        };
        let (epoch, n): (i64, i64) = (row.get(0), row.get(1));
        let mut map = self.cache.last(number);
        if (map.epoch, map.n, map.read_of) == (epoch, n, n) {
            return Ok(map);
        }
        if map.epoch != epoch || map.read_of > n {
            map = Arc::new(OwnerMap::of_epoch(epoch));
        }
        let changed = Arc::make_mut(&mut map);
        changed.read_of = n;
        // What an error leaves half read may be of a server that is lost.
        let is_whole = read(transaction, &tenant, changed, patience).await?;
        if is_whole {
            changed.n = n;
        }
        self.cache.keep(number, map.clone());
        if is_whole { Ok(map) } else { Err(still_read()) }
    }
}

/// Reads what changed behind what a map has, in the order of the changes: what one change did
/// is taken in once all of it was read. False if patience was over before.
async fn read(
    transaction: &Transaction<'_>,
    tenant: &str,
    map: &mut OwnerMap,
    patience: &Patience,
) -> Result<bool, StoreError> {
    // All must not be sorted before the first is here: the index has them in order.
    transaction.batch_execute("SET LOCAL enable_sort = off").await?;
    let sql = "SELECT who, root, until_ms, n FROM relay_owner WHERE tenant = $1 AND n > $2 ORDER BY n";
    let statement = transaction.prepare_cached(sql).await?;
    let portal = transaction.bind(&statement, &[&tenant, &map.n]).await?;
    transaction.batch_execute("SET LOCAL enable_sort TO DEFAULT").await?;
    let (mut of_change, mut change) = (Vec::new(), map.n);
    loop {
        let rows = transaction.query_portal(&portal, AT_ONCE).await?;
        for row in &rows {
            let [who, root, until_ms, n] = [0, 1, 2, 3].map(|at| row.get::<_, i64>(at));
            if n != change {
                take_in(map, &mut of_change, change);
                change = n;
            }
            of_change.push((who as u64, (root as u64, until_ms)));
        }
        if rows.len() < AT_ONCE as usize {
            take_in(map, &mut of_change, change);
            return Ok(true);
        }
        if patience.check().is_err() {
            return Ok(false);
        }
    }
}

fn still_read() -> StoreError {
    StoreError::Unavailable("who is who is still being read: ask again".into())
}

fn take_in(map: &mut OwnerMap, owners: &mut Vec<(u64, (u64, i64))>, n: i64) {
    owners.drain(..).for_each(|(who, owner)| map.insert(who, owner));
    map.n = n;
}
