//! What a question sees: the file and the memory of one moment.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use rusqlite::{Connection, OptionalExtension, params};

use super::{
    Counters,
    block::{BlockMeta, GONE},
    chunk::Block,
    facts::FactTables,
    hot::{Door, HotTable},
    lock,
    memo::{Around, Memo},
};
use crate::{
    AsOf, Sources, StoreError, TenantScope,
    model::{FactLimits, Keys},
    scan::{
        chunk::{Chunk, TableChunk},
        owners::{OwnerCache, OwnerMap},
        seam::{Fold, Patience, Scan, Seen, Wants},
    },
};

/// So often a question is begun anew with one connection.
const LOOKS_MAX: usize = 3;
/// Fewer chunks are not worth a second thread.
const CHUNKS_SHARED_MIN: usize = 6;

/// The owners of a tenant, with what changed since they were read. `None` if what is
/// remembered is of a later moment than that which is read.
fn owners(
    cache: &OwnerCache,
    connection: &Connection,
    tenant: i64,
    patience: &Patience,
) -> Result<Option<Arc<OwnerMap>>, StoreError> {
    let mut map = cache.last(tenant);
    let epoch = epoch(connection, tenant)?;
    let sql = "SELECT ifnull(max(n), 0) FROM owner WHERE tenant = ?1";
    let last: i64 = connection.prepare_cached(sql)?.query_row([tenant], |row| row.get(0))?;
    if map.epoch > epoch || map.epoch == epoch && map.n > last {
        return Ok(None);
    }
    if map.epoch < epoch {
        map = Arc::new(OwnerMap::of_epoch(epoch));
    }
    let sql = "SELECT who, root, until_ms, n FROM owner WHERE tenant = ?1 AND n > ?2";
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query(params![tenant, map.n])?;
    let mut count = 0_usize;
    while let Some(row) = rows.next()? {
        let (who, root): (i64, i64) = (row.get(0)?, row.get(1)?);
        let map = Arc::make_mut(&mut map);
        map.insert(who as u64, (root as u64, row.get(2)?));
        map.n = map.n.max(row.get(3)?);
        count += 1;
        if count.is_multiple_of(4096) {
            patience.check()?;
        }
    }
    cache.keep(tenant, map.clone());
    Ok(Some(map))
}

/// Counts how often rows of `owner` were deleted.
pub(crate) fn epoch(connection: &Connection, tenant: i64) -> Result<i64, StoreError> {
    let mut statement = connection.prepare_cached("SELECT v FROM meta WHERE k = ?1")?;
    let epoch: Option<Vec<u8>> =
        statement.query_row([format!("epoch {tenant}")], |row| row.get(0)).optional()?;
    Ok(epoch.and_then(|bytes| bytes.try_into().ok()).map_or(0, i64::from_le_bytes))
}

/// What a question sees.
pub(crate) struct Snapshot<'r> {
    connection: &'r Connection,
    /// Another, for a second thread.
    helper: Option<&'r mut Connection>,
    pub(crate) tenant: Option<i64>,
    blocks: Vec<BlockMeta>,
    tables: Vec<Arc<HotTable>>,
    pub(crate) owners: Arc<OwnerMap>,
    patience: Patience,
    counters: &'r Counters,
    /// What is remembered of blocks, where all are of one website.
    memo: Option<&'r Memo>,
    /// Blocks of the last scans that could not be read.
    damaged: std::collections::HashSet<i64>,
}

/// Ends a transaction that only reads.
struct Reading<'c>(&'c Connection);

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        // One that cannot be ended is ended with its connection.
        let _ = self.0.execute_batch("ROLLBACK");
    }
}

/// Takes a snapshot and asks it.
pub(crate) fn with_snapshot<T>(
    connection: &Connection,
    helper: Option<&mut Connection>,
    of: &TenantScope,
    env: &Env<'_>,
    ask: impl FnOnce(&mut Snapshot<'_>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    loop {
        env.patience.check()?;
        let (reading, tenant, sites, tables) = begin(connection, of, env.door)?;
        let owners = match tenant {
            Some(tenant) => owners(env.owners, connection, tenant, &env.patience)?,
            None => Some(Arc::default()),
        };
        // Somebody else has asked a later moment meanwhile: this asks it too.
        let Some(owners) = owners else { continue };
        let blocks = blocks(connection, of, tenant, &sites, &env.patience)?;
        let mut snapshot = Snapshot {
            connection,
            helper,
            tenant,
            blocks,
            tables,
            owners,
            patience: env.patience.clone(),
            counters: env.counters,
            memo: (sites.len() == 1).then_some(env.memo),
            damaged: Default::default(),
        };
        let answer = ask(&mut snapshot);
        drop(reading);
        return answer;
    }
}

/// The tenant, its sites, and their tables, of the moment that a connection reads from now on.
type Begun<'c> = (Reading<'c>, Option<i64>, Vec<i64>, Vec<Arc<HotTable>>);

fn begin<'c>(connection: &'c Connection, of: &TenantScope, door: &Door) -> Result<Begun<'c>, StoreError> {
    let hot = door.read();
    connection.execute_batch("BEGIN")?;
    let reading = Reading(connection);
    let (tenant, sites) = sites(connection, of)?;
    let tables = sites.iter().filter_map(|site| hot.sites.get(site)).flatten();
    let tables = tables.filter(|table| table.table.rows() > 0).cloned().collect();
    Ok((reading, tenant, sites, tables))
}

fn blocks(
    connection: &Connection,
    of: &TenantScope,
    tenant: Option<i64>,
    sites: &[i64],
    patience: &Patience,
) -> Result<Vec<BlockMeta>, StoreError> {
    let mut blocks = Vec::new();
    if let (Sources::All, Some(tenant)) = (&of.sources, tenant) {
        blocks_where(connection, OF_TENANT, tenant, &mut blocks)?;
        return Ok(blocks);
    }
    for site in sites {
        patience.check()?;
        blocks_of(connection, *site, &mut blocks)?;
    }
    Ok(blocks)
}

/// What snapshots are taken of.
pub(crate) struct Env<'e> {
    pub(crate) door: &'e Door,
    pub(crate) owners: &'e OwnerCache,
    pub(crate) counters: &'e Counters,
    pub(crate) memo: &'e Memo,
    pub(crate) patience: Patience,
}

/// A tenant and those of its sites that may be seen.
fn sites(connection: &Connection, of: &TenantScope) -> Result<(Option<i64>, Vec<i64>), StoreError> {
    let mut statement = connection.prepare_cached("SELECT id FROM tenant WHERE name = ?1")?;
    let tenant: Option<i64> = statement.query_row([&of.tenant], |row| row.get(0)).optional()?;
    let Some(tenant) = tenant else { return Ok((None, Vec::new())) };
    let sites = match &of.sources {
        Sources::All => {
            let mut statement = connection.prepare_cached("SELECT id FROM site WHERE tenant = ?1")?;
            statement.query_map([tenant], |row| row.get(0))?.collect::<Result<Vec<_>, _>>()?
        }
        Sources::Only(sources) => {
            let sql = "SELECT id FROM site WHERE tenant = ?1 AND source = ?2";
            let mut statement = connection.prepare_cached(sql)?;
            let mut sites = std::collections::BTreeSet::new();
            for source in sources {
                sites.extend(
                    statement.query_row(params![tenant, source], |row| row.get::<_, i64>(0)).optional()?,
                );
            }
            sites.into_iter().collect()
        }
    };
    Ok((Some(tenant), sites))
}

pub(crate) fn blocks_of(
    connection: &Connection,
    site: i64,
    blocks: &mut Vec<BlockMeta>,
) -> Result<(), StoreError> {
    blocks_where(connection, OF_SITE, site, blocks)
}

const OF_SITE: &str = "block WHERE site = ?1 ORDER BY last_ms, block.id";
const OF_TENANT: &str = "site CROSS JOIN block ON block.site = site.id WHERE site.tenant = ?1";

fn blocks_where(
    connection: &Connection,
    of: &'static str,
    which: i64,
    blocks: &mut Vec<BlockMeta>,
) -> Result<(), StoreError> {
    let mut statement = connection.prepare_cached(&format!("SELECT {} FROM {of}", BlockMeta::COLUMNS))?;
    for block in statement.query_map([which], BlockMeta::read)? {
        blocks.push(block?);
    }
    Ok(())
}

impl Snapshot<'_> {
    /// What is known about who is who, if the tenant is known.
    pub(crate) fn facts(&self, keys: Keys) -> Option<FactTables<'_>> {
        let limits = FactLimits::default();
        self.tenant.map(|tenant| FactTables { connection: self.connection, tenant, keys, limits, n: 0 })
    }

    /// Up to when it goes.
    pub(crate) fn as_of(&self) -> AsOf {
        let blocks = self.blocks.iter().map(|block| (block.rows, Some(block.last_ms)));
        let tables = self.tables.iter().map(|hot| (hot.table.rows(), hot.table.times.iter().max().copied()));
        let all = blocks.chain(tables);
        all.fold(AsOf::default(), |sum, (rows, last_ms)| AsOf {
            events: sum.events + rows as u64,
            last_ms: sum.last_ms.max(last_ms),
        })
    }

    /// Shows a fold all chunks; `None` if it must be done anew, as a block could not be read and
    /// then could.
    fn scan_with<F: Fold>(
        &mut self,
        range_ms: &Range<i64>,
        new: &(impl Fn() -> F + Sync),
        helper: Option<&mut Connection>,
    ) -> Result<Option<F>, StoreError> {
        let blocks: Vec<&BlockMeta> =
            self.blocks.iter().filter(|block| self.is_asked(block, range_ms)).collect();
        let seen = Seen { owners: &self.owners };
        let lost = || lock(&self.counters.lost).keys().copied().collect();
        let around = self.memo.and_then(|memo| Around::new(memo, &self.blocks, lost(), &self.tables));
        let around = around.as_ref();
        let (next, left) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let work = |connection: &Connection| -> Result<F, StoreError> {
            let mut fold = new();
            while let Some(meta) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.patience.check()?;
                match fold.take(&mut Block::new(connection, meta).among(around), &seen) {
                    Err(StoreError::Damaged(_)) => lock(&left).push(*meta),
                    result => result?,
                }
            }
            Ok(fold)
        };
        let helper = helper.filter(|_| blocks.len() >= CHUNKS_SHARED_MIN);
        let mut fold = in_two(self.connection, helper, work)?;
        for table in self.tables.iter().filter(|table| table.table.overlaps(range_ms)) {
            self.patience.check()?;
            fold.take(&mut chunk_of(table), &seen)?;
        }
        let left = std::mem::take(&mut *lock(&left));
        let mut is_readable = false;
        for meta in left {
            // It is looked at once more: the helper's moment is another, and the disk may have
            // failed for a moment.
            match new().take(&mut Block::new(self.connection, meta), &seen) {
                Err(StoreError::Damaged(why)) => {
                    if self.damaged.insert(meta.id) {
                        tell_damage(meta, &why);
                        self.counters.lost(meta);
                    }
                }
                result => {
                    result?;
                    is_readable = true;
                }
            }
        }
        // A part of the fold may have taken in what another could not read.
        Ok((!is_readable).then_some(fold))
    }

    fn is_asked(&self, block: &BlockMeta, range_ms: &Range<i64>) -> bool {
        block.overlaps(range_ms) && !self.damaged.contains(&block.id)
    }

    /// Asks again without the blocks that turned out to be damaged, until none does: what
    /// one scan found in such a block must not be in an answer of which another knows
    /// nothing.
    pub(crate) fn without_damage<T>(
        &mut self,
        mut ask: impl FnMut(&mut Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        loop {
            let before = self.damaged.len();
            let answer = ask(self)?;
            if self.damaged.len() == before {
                return Ok(answer);
            }
        }
    }
}

impl Scan for Snapshot<'_> {
    fn scan<F: Fold>(&mut self, range_ms: &Range<i64>, new: impl Fn() -> F + Sync) -> Result<F, StoreError> {
        let mut helper = self.helper.take();
        let shared = self.scan_with(range_ms, &new, helper.as_deref_mut());
        let is_shared = helper.is_some();
        self.helper = helper;
        match shared? {
            // Of two who had no room for all each left out what the other may have counted.
            Some(fold) if is_shared && fold.is_cut() => {}
            Some(fold) => return Ok(fold),
            None => {}
        }
        for _ in 0..LOOKS_MAX {
            if let Some(fold) = self.scan_with(range_ms, &new, None)? {
                return Ok(fold);
            }
        }
        Err(StoreError::Unavailable("blocks can be read at one time and not at another".into()))
    }

    fn latest_first(
        &mut self,
        range_ms: &Range<i64>,
        _: &Wants,
        mut take: impl FnMut(&mut dyn Chunk, i64, &Seen<'_>) -> Result<Option<i64>, StoreError>,
    ) -> Result<(), StoreError> {
        let seen = Seen { owners: &self.owners };
        for table in &self.tables {
            if table.table.overlaps(range_ms) {
                take(&mut chunk_of(table), table.table.last_ms, &seen)?;
            }
        }
        let mut blocks: Vec<&BlockMeta> =
            self.blocks.iter().filter(|block| self.is_asked(block, range_ms)).collect();
        blocks.sort_by_key(|block| std::cmp::Reverse(block.last_ms));
        let mut damaged = None;
        for meta in blocks {
            self.patience.check()?;
            match take(&mut Block::new(self.connection, meta), meta.last_ms, &seen) {
                Err(StoreError::Damaged(why)) => {
                    tracing::error!(block = meta.id, why, "a block is damaged: its events are in no figure");
                    self.counters.lost(meta);
                    damaged = Some(meta.id);
                    break;
                }
                result => {
                    result?;
                }
            }
        }
        self.damaged.extend(damaged);
        Ok(())
    }

    fn sessions_max(&self, range_ms: &Range<i64>) -> Result<usize, StoreError> {
        let blocks = self.blocks.iter().filter(|block| block.overlaps(range_ms));
        let hot: usize = self.tables.iter().map(|table| table.table.rows()).sum();
        Ok(blocks.map(|block| block.sessions).sum::<usize>() + hot)
    }

    fn rows_max(&self, range_ms: &Range<i64>) -> Result<usize, StoreError> {
        let blocks = self.blocks.iter().filter(|block| block.overlaps(range_ms));
        let hot: usize = self.tables.iter().map(|table| table.table.rows()).sum();
        Ok(blocks.map(|block| block.rows).sum::<usize>() + hot)
    }

    fn check(&self) -> Result<(), StoreError> {
        self.patience.check()
    }

    fn damaged_blocks(&self) -> u64 {
        self.damaged.len() as u64
    }
}

/// A table that is no block yet.
fn chunk_of(table: &HotTable) -> TableChunk<'_> {
    TableChunk { table: &table.table, order: table.order() }
}

/// Does the same with one connection, and in another thread with another if there is one.
fn in_two<F: Fold>(
    connection: &Connection,
    helper: Option<&mut Connection>,
    work: impl Fn(&Connection) -> Result<F, StoreError> + Sync,
) -> Result<F, StoreError> {
    let Some(helper) = helper else { return work(connection) };
    let (ours, theirs) = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("store-scan".into());
        let work = &work;
        let theirs = thread.spawn_scoped(scope, move || {
            helper.execute_batch("BEGIN")?;
            let _reading = Reading(helper);
            work(helper)
        });
        (work(connection), theirs.ok().map(|thread| thread.join()))
    });
    let mut fold = ours?;
    match theirs {
        Some(Ok(theirs)) => fold.merge(theirs?)?,
        Some(Err(_)) => return Err(StoreError::Unavailable("a question's thread panicked".into())),
        None => {}
    }
    Ok(fold)
}

fn tell_damage(meta: &BlockMeta, why: &str) {
    let what = if why == GONE { "it is not whole" } else { why };
    tracing::error!(block = meta.id, why = what, "a block is damaged: its events are in no figure");
}
