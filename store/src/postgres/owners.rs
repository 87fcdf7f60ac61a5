//! Whose devices and users are, as questions need it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use deadpool_postgres::Transaction;

use super::rows::kept;
use crate::{
    StoreError,
    scan::owners::{OwnerCache, OwnerMap},
};

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

    /// Forgets all: who answers next may be a server that does not know what was read.
    pub(super) fn clear(&self) {
        self.cache.clear();
    }

    /// The owners of a tenant at the moment of a transaction: what changed since they were
    /// read, or all of them if some were deleted, or another question has read a later moment.
    pub(super) async fn get(
        &self,
        transaction: &Transaction<'_>,
        tenant: &str,
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
        if map.epoch == epoch && map.n == n {
            return Ok(map);
        }
        if map.epoch != epoch || map.n > n {
            map = Arc::new(OwnerMap::of_epoch(epoch));
        }
        let sql = "SELECT who, root, until_ms FROM relay_owner WHERE tenant = $1 AND n > $2";
        let statement = transaction.prepare_cached(sql).await?;
        let rows = transaction.query(&statement, &[&tenant, &map.n]).await?;
        let changed = Arc::make_mut(&mut map);
        for row in &rows {
            let [who, root, until_ms] = [0, 1, 2].map(|at| row.get::<_, i64>(at));
            changed.insert(who as u64, (root as u64, until_ms));
        }
        changed.n = n;
        self.cache.keep(number, map.clone());
        Ok(map)
    }
}
