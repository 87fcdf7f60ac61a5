//! The one that writes: a thread with the one connection that may.
//!
//! A batch is one transaction: its events as they are (`hot`), their ids (`seen`) and what
//! they tell about who is who. Nothing in memory changes before it is committed; after one
//! that failed all of it is read again, as nobody knows what a commit that failed has done.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, atomic::Ordering, mpsc},
    time::{Duration, Instant},
};

use analytics_relay_providers::Event;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use super::{
    Counters, Settings, codec,
    facts::{FactTables, Known, Refused},
    hot::{self, Door, Hot, HotTable, Window},
    late::Late,
    schema,
    table::Table,
};
use crate::{
    Appended, StoreError,
    model::{IdSet, Keys, event::source_of},
};

/// Bytes of a table in memory at which it becomes a block, however few its rows are.
const TABLE_BYTES_MAX: usize = 16 << 20;
/// So long no block is made after one could not be written.
const PAUSE: Duration = Duration::from_secs(10);

/// A website or app of a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Site {
    pub(crate) id: i64,
    pub(crate) tenant: i64,
}

/// All that is in memory of what is in the file.
pub(crate) struct Loaded {
    pub(crate) keys: Keys,
    pub(crate) secret: [u8; 16],
    sites: HashMap<(String, String), Site>,
    tenants: HashMap<String, i64>,
    window: Window,
    hot: Hot,
    next_n: i64,
    next_table: u64,
    damaged_batches: u64,
}

pub(crate) struct Writer {
    pub(crate) connection: Connection,
    pub(crate) settings: Settings,
    pub(crate) door: Arc<Door>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) keys: Keys,
    pub(crate) secret: [u8; 16],
    sites: HashMap<(String, String), Site>,
    tenants: HashMap<String, i64>,
    window: Window,
    known: Known,
    late: Late,
    next_n: i64,
    next_table: u64,
    /// Rows and bytes of open tables, by site.
    open: HashMap<i64, (usize, usize)>,
    /// Tables that are becoming blocks.
    sealing: HashSet<u64>,
    no_seal_before: Option<Instant>,
    /// A transaction failed: what is in memory may not be what is in the file.
    is_stale: bool,
    sealer: mpsc::Sender<Closed>,
    _lock: std::fs::File,
}

/// The tenants and sources of a batch, and of each event which of them.
struct Places {
    all: Vec<(String, String)>,
    of_each: Vec<usize>,
}

impl Places {
    fn of(batch: &[Event]) -> Self {
        let mut numbers: HashMap<(&str, String), usize> = HashMap::new();
        let of_each = batch.iter().map(|event| {
            let next = numbers.len();
            *numbers.entry((event.tenant().unwrap_or_default(), source_of(event))).or_insert(next)
        });
        let of_each = of_each.collect();
        let mut all = vec![Default::default(); numbers.len()];
        for ((tenant, source), number) in numbers {
            all[number] = (tenant.to_owned(), source);
        }
        Self { all, of_each }
    }
}

/// A table that is to become a block.
pub(crate) struct Closed {
    pub(crate) site: i64,
    pub(crate) table: Arc<HotTable>,
}

/// Opens a file for writing. Returns where a damaged one went.
pub(crate) fn open(
    settings: &Settings,
    counters: Arc<Counters>,
    sealer: mpsc::Sender<Closed>,
) -> Result<(Writer, Option<PathBuf>), StoreError> {
    let (opened, loaded) = schema::open(&settings.path, |connection| {
        check_tables(connection)?;
        load(connection, settings)
    })?;
    let Loaded { keys, secret, sites, tenants, window, hot, next_n, next_table, damaged_batches } = loaded;
    counters.damaged_batches.store(damaged_batches, Ordering::Relaxed);
    let door = Arc::new(Door::default());
    *door.write() = hot;
    let mut writer = Writer {
        connection: opened.writer,
        settings: settings.clone(),
        door,
        counters,
        keys,
        secret,
        sites,
        tenants,
        window,
        known: Known::default(),
        late: Late::default(),
        next_n,
        next_table,
        open: HashMap::new(),
        sealing: HashSet::new(),
        no_seal_before: None,
        is_stale: false,
        sealer,
        _lock: opened.lock,
    };
    writer.connection.set_prepared_statement_cache_capacity(64);
    writer.measure_open();
    writer.seal_what_is_due();
    Ok((writer, opened.set_aside))
}

/// Reads every table whose damage would make the store useless. Blocks are not among them:
/// a damaged one costs itself.
fn check_tables(connection: &Connection) -> Result<(), StoreError> {
    for sql in [
        "SELECT count(*) FROM meta NOT INDEXED",
        "SELECT count(*) FROM block NOT INDEXED",
        "SELECT count(*) FROM user",
        "SELECT count(*) FROM link NOT INDEXED",
        "SELECT count(*) FROM alias NOT INDEXED",
        "SELECT count(*) FROM apart",
        "SELECT count(*) FROM traits",
        "SELECT count(*) FROM owner NOT INDEXED",
        "SELECT count(*) FROM identity_log",
    ] {
        connection.query_row(sql, [], |row| row.get::<_, i64>(0))?;
    }
    Ok(())
}

fn load(connection: &Connection, settings: &Settings) -> Result<Loaded, StoreError> {
    let (key, secret) = schema::secrets(connection)?;
    let mut loaded = Loaded {
        keys: Keys::new(key),
        secret,
        sites: HashMap::new(),
        tenants: HashMap::new(),
        window: Window::default(),
        hot: Hot::default(),
        next_n: 1,
        next_table: 1,
        damaged_batches: 0,
    };
    let mut statement = connection.prepare("SELECT name, id FROM tenant")?;
    for row in statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))? {
        let (name, id) = row?;
        loaded.tenants.insert(name, id);
    }
    let mut statement = connection
        .prepare("SELECT tenant.name, source, site.id, tenant FROM site JOIN tenant ON tenant.id = tenant")?;
    let rows = statement.query_map([], |row| {
        Ok(((row.get(0)?, row.get(1)?), Site { id: row.get(2)?, tenant: row.get(3)? }))
    })?;
    loaded.sites = rows.collect::<Result<_, _>>()?;
    let mut statement = connection.prepare("SELECT n, ids FROM seen ORDER BY n")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let (n, ids): (i64, Vec<u8>) = (row.get(0)?, row.get(1)?);
        let ids = ids.as_chunks::<8>().0.iter().map(|id| u64::from_le_bytes(*id)).collect();
        loaded.window.add(n, ids);
        loaded.next_n = n + 1;
    }
    load_hot(connection, settings, &mut loaded)?;
    let last: Option<i64> = connection.query_row("SELECT max(n) FROM owner", [], |row| row.get(0))?;
    loaded.next_n = loaded.next_n.max(last.unwrap_or_default() + 1);
    Ok(loaded)
}

fn load_hot(connection: &Connection, settings: &Settings, loaded: &mut Loaded) -> Result<(), StoreError> {
    let mut statement = connection.prepare("SELECT id, n, site, events FROM hot ORDER BY id")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let (id, n, site): (i64, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let bytes: Vec<u8> = row.get(3)?;
        loaded.next_n = loaded.next_n.max(n + 1);
        let Some(events) = hot::decode(&bytes) else {
            loaded.damaged_batches += 1;
            tracing::error!(n, "a batch in the store is damaged: its events are in no figure");
            continue;
        };
        let tables = loaded.hot.sites.entry(site).or_default();
        let rows_max = settings.block_rows;
        add_hot(tables, (id, n), &events, rows_max, loaded.keys, loaded.secret, &mut loaded.next_table);
    }
    Ok(())
}

/// Adds a batch's events of one site to its open table, or to a new one.
fn add_hot<'a>(
    tables: &mut Vec<Arc<HotTable>>,
    (row, n): (i64, i64),
    events: impl IntoIterator<Item = &'a Event>,
    rows_max: usize,
    keys: Keys,
    secret: [u8; 16],
    next_table: &mut u64,
) {
    if tables.last().is_none_or(|last| last.is_closed) {
        let table = Table::new(keys, secret);
        let (id, rows_in_file) = (*next_table, Vec::new());
        tables.push(Arc::new(HotTable { id, table, rows_in_file, first_batch: n, is_closed: false }));
        *next_table += 1;
    }
    let last = Arc::make_mut(tables.last_mut().expect("one was made"));
    last.rows_in_file.push(row);
    events.into_iter().for_each(|event| last.table.push(event));
    last.is_closed = last.table.rows() >= rows_max || last.table.bytes() >= TABLE_BYTES_MAX;
}

impl Writer {
    /// Does something that writes. After an error what is in memory is read again.
    pub(crate) fn attempt<T>(
        &mut self,
        write: impl FnOnce(&mut Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if self.is_stale {
            self.reload()?;
        }
        let done = write(self);
        if done.is_err() {
            self.known.rolled_back();
            self.is_stale = true;
        }
        done
    }

    /// After a panic.
    pub(crate) fn doubt(&mut self) {
        self.is_stale = true;
    }

    fn reload(&mut self) -> Result<(), StoreError> {
        if !self.connection.is_autocommit() {
            self.connection.execute_batch("ROLLBACK")?;
        }
        let loaded = load(&self.connection, &self.settings)?;
        *self.door.write() = loaded.hot;
        (self.sites, self.tenants, self.window) = (loaded.sites, loaded.tenants, loaded.window);
        self.next_n = loaded.next_n;
        // Ids of tables that are being made into blocks must not come again.
        let offset = self.next_table;
        let mut hot = self.door.write();
        for table in hot.sites.values_mut().flatten() {
            Arc::make_mut(table).id += offset;
        }
        drop(hot);
        self.next_table += loaded.next_table;
        self.known.clear();
        self.late = Late::default();
        self.measure_open();
        self.is_stale = false;
        Ok(())
    }

    fn measure_open(&mut self) {
        let hot = self.door.read();
        let open = hot.tables().filter(|(_, table)| !table.is_closed);
        self.open = open.map(|(site, table)| (site, (table.table.rows(), table.table.bytes()))).collect();
    }

    /// Keeps a batch, or none of it.
    pub(crate) fn append(&mut self, batch: &[Event]) -> Result<Vec<Appended>, StoreError> {
        let hot_rows = self.door.read().rows();
        if hot_rows > 4 * self.settings.hot_rows_max {
            self.seal_what_is_due();
            return Err(StoreError::Unavailable(format!("{hot_rows} events wait to become blocks")));
        }
        let places = Places::of(batch);
        let (verdicts, ids) = self.judge(batch, &places)?;
        let new: Vec<(&Event, usize)> = batch
            .iter()
            .zip(&places.of_each)
            .zip(&verdicts)
            .filter(|(_, verdict)| **verdict == Appended::New)
            .map(|((event, place), _)| (event, *place))
            .collect();
        if new.is_empty() {
            return Ok(verdicts);
        }
        let n = self.next_n;
        let forgotten = self.window.outlived_by(ids.len(), self.settings.window);
        let by_site = self.keep(n, &new, &places, &ids, forgotten)?;
        self.next_n = n + 1;
        self.known.committed();
        self.window.add(n, ids);
        if let Some(up_to) = forgotten {
            self.window.forget(up_to);
        }
        for site in by_site {
            self.measure(site);
        }
        self.seal_what_is_due();
        self.counters.appended.fetch_add(new.len() as u64, Ordering::Relaxed);
        Ok(verdicts)
    }

    /// What is new, and the keys of the ids of that.
    fn judge(&mut self, batch: &[Event], places: &Places) -> Result<(Vec<Appended>, Vec<u64>), StoreError> {
        let (mut verdicts, mut ids) = (Vec::with_capacity(batch.len()), Vec::with_capacity(batch.len()));
        let mut in_batch = IdSet::default();
        let sites: Vec<Option<Site>> =
            places.all.iter().map(|place| self.sites.get(place).copied()).collect();
        for (event, place) in batch.iter().zip(&places.of_each) {
            let id = self.keys.event(&places.all[*place].0, event.id().as_str());
            let is_known =
                self.window.contains(id) || !in_batch.insert(id) || self.is_there(event, sites[*place])?;
            verdicts.push(if is_known { Appended::Duplicate } else { Appended::New });
            if !is_known {
                ids.push(id);
            }
        }
        Ok((verdicts, ids))
    }

    /// True if an event whose id is not remembered any more is there.
    fn is_there(&mut self, event: &Event, site: Option<Site>) -> Result<bool, StoreError> {
        let Some(site) = site else { return Ok(false) };
        let first_batch = self.window.first_batch().unwrap_or(i64::MAX);
        let hot = self.door.read();
        let mut older =
            hot.sites.get(&site.id).into_iter().flatten().filter(|table| table.first_batch < first_batch);
        if older.any(|table| table.has(event)) {
            return Ok(true);
        }
        drop(hot);
        self.late.is_there(&self.connection, site.id, event, &self.counters)
    }

    /// The transaction of a batch. Returns the sites that got something.
    fn keep(
        &mut self,
        n: i64,
        new: &[(&Event, usize)],
        places: &Places,
        ids: &[u64],
        forgotten: Option<i64>,
    ) -> Result<Vec<i64>, StoreError> {
        let transaction = begin(&mut self.connection)?;
        let mut by_place: BTreeMap<usize, Vec<&Event>> = BTreeMap::new();
        for (event, place) in new {
            by_place.entry(*place).or_default().push(event);
        }
        let (mut by_site, mut new_sites) = (BTreeMap::new(), Vec::new());
        let mut tenants = HashMap::with_capacity(by_place.len());
        for (place, events) in by_place {
            let key = &places.all[place];
            let site = match self.sites.get(key) {
                Some(site) => *site,
                None => {
                    let site = make_site(&transaction, &key.0, &key.1)?;
                    new_sites.push((key.clone(), site));
                    site
                }
            };
            tenants.insert(place, site.tenant);
            by_site.insert(site.id, events);
        }
        let mut rows_in_file = Vec::with_capacity(by_site.len());
        for (site, events) in &by_site {
            let bytes = hot::encode(events.iter().copied());
            let mut statement =
                transaction.prepare_cached("INSERT INTO hot(n, site, events) VALUES (?1, ?2, ?3)")?;
            statement.execute(params![n, site, bytes])?;
            rows_in_file.push(transaction.last_insert_rowid());
        }
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        transaction.prepare_cached("INSERT INTO seen(n, ids) VALUES (?1, ?2)")?.execute(params![n, bytes])?;
        if let Some(up_to) = forgotten {
            transaction.prepare_cached("DELETE FROM seen WHERE n <= ?1")?.execute([up_to])?;
        }
        let mut by_tenant: BTreeMap<i64, Vec<&Event>> = BTreeMap::new();
        for (event, place) in new {
            by_tenant.entry(tenants[place]).or_default().push(event);
        }
        let mut refused = Refused::default();
        for (tenant, events) in &by_tenant {
            let tables = FactTables { connection: &transaction, tenant: *tenant, keys: self.keys, n };
            refused.add(tables.note(events, &mut self.known)?);
        }
        let mut hot = self.door.write();
        transaction.commit()?;
        for ((site, events), row) in by_site.iter().zip(rows_in_file) {
            let tables = hot.sites.entry(*site).or_default();
            let events = events.iter().copied();
            add_hot(
                tables,
                (row, n),
                events,
                self.settings.block_rows,
                self.keys,
                self.secret,
                &mut self.next_table,
            );
        }
        drop(hot);
        self.tenants.extend(new_sites.iter().map(|(key, site)| (key.0.clone(), site.tenant)));
        self.sites.extend(new_sites);
        self.counters.refused(refused);
        Ok(by_site.into_keys().collect())
    }

    fn measure(&mut self, site: i64) {
        let hot = self.door.read();
        let last = hot.sites.get(&site).and_then(|tables| tables.last());
        match last.filter(|table| !table.is_closed) {
            Some(table) => self.open.insert(site, (table.table.rows(), table.table.bytes())),
            None => self.open.remove(&site),
        };
    }

    /// Closes open tables that are too many, the largest first, and hands over what is
    /// closed.
    pub(crate) fn seal_what_is_due(&mut self) {
        let sum = |open: &HashMap<i64, (usize, usize)>| {
            open.values().fold((0, 0), |(rows, bytes), (more, more_bytes)| (rows + more, bytes + more_bytes))
        };
        let (mut rows, mut bytes) = sum(&self.open);
        if rows > self.settings.hot_rows_max || bytes > self.settings.hot_bytes_max {
            let mut largest: Vec<_> = self.open.iter().map(|(site, size)| (*size, *site)).collect();
            largest.sort_unstable();
            while rows > self.settings.hot_rows_max / 2 || bytes > self.settings.hot_bytes_max / 2 {
                let Some(((of_it, its_bytes), site)) = largest.pop() else { break };
                (rows, bytes) = (rows - of_it, bytes - its_bytes);
                self.close(site);
            }
        }
        self.hand_over();
    }

    /// Closes the open table of a site.
    pub(crate) fn close(&mut self, site: i64) {
        if let Some(table) = self.door.write().sites.get_mut(&site).and_then(|tables| tables.last_mut()) {
            Arc::make_mut(table).is_closed = true;
        }
        self.open.remove(&site);
    }

    /// Closes all tables.
    pub(crate) fn close_all(&mut self) {
        for site in self.open.keys().copied().collect::<Vec<_>>() {
            self.close(site);
        }
        self.no_seal_before = None;
        self.hand_over();
    }

    /// True while tables become blocks.
    pub(crate) fn is_sealing(&self) -> bool {
        !self.sealing.is_empty()
    }

    fn hand_over(&mut self) {
        if self.no_seal_before.is_some_and(|before| Instant::now() < before) {
            return;
        }
        let hot = self.door.read();
        for (site, table) in hot.tables().filter(|(_, table)| table.is_closed && table.table.rows() > 0) {
            if self.sealing.insert(table.id) {
                // Nobody takes it any more when the store is being closed.
                let _ = self.sealer.send(Closed { site, table: table.clone() });
            }
        }
    }

    /// Puts a block in the place of a table, if that is still as it was.
    pub(crate) fn sealed(&mut self, closed: &Closed, block: &codec::Encoded) -> Result<(), StoreError> {
        self.sealing.remove(&closed.table.id);
        let is_there = |hot: &Hot| {
            let tables = hot.sites.get(&closed.site);
            tables.is_some_and(|tables| tables.iter().any(|table| Arc::ptr_eq(table, &closed.table)))
        };
        if !is_there(&self.door.read()) {
            self.hand_over();
            return Ok(());
        }
        let transaction = begin(&mut self.connection)?;
        insert_block(&transaction, closed.site, block)?;
        let mut delete = transaction.prepare_cached("DELETE FROM hot WHERE id = ?1")?;
        for row in &closed.table.rows_in_file {
            delete.execute([row])?;
        }
        drop(delete);
        let mut hot = self.door.write();
        transaction.commit()?;
        if let Some(tables) = hot.sites.get_mut(&closed.site) {
            tables.retain(|table| !Arc::ptr_eq(table, &closed.table));
        }
        drop(hot);
        self.late.block_came(closed.site, block.last_ms);
        self.counters.sealed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// After a block could not be written.
    pub(crate) fn not_sealed(&mut self, error: &StoreError) {
        self.no_seal_before = Some(Instant::now() + PAUSE);
        self.counters.seals_failed.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(%error, "a block could not be written; its events stay as they came for now");
    }

    /// A transaction, its number, and the tenant that it is about.
    pub(crate) fn begin(&mut self) -> Result<(Transaction<'_>, i64), StoreError> {
        let n = self.next_n;
        self.next_n += 1;
        Ok((begin(&mut self.connection)?, n))
    }

    /// The number of a tenant.
    pub(crate) fn tenant(&self, name: &str) -> Option<i64> {
        self.tenants.get(name).copied()
    }

    /// A tenant that may be new.
    pub(crate) fn tenant_or_new(&mut self, name: &str) -> Result<i64, StoreError> {
        if let Some(tenant) = self.tenant(name) {
            return Ok(tenant);
        }
        let transaction = begin(&mut self.connection)?;
        let tenant = make_tenant(&transaction, name)?;
        transaction.commit()?;
        self.tenants.insert(name.to_owned(), tenant);
        Ok(tenant)
    }

    /// The sites of a tenant.
    pub(crate) fn sites_of(&self, tenant: i64) -> HashSet<i64> {
        self.sites.values().filter(|site| site.tenant == tenant).map(|site| site.id).collect()
    }

    /// What was known about facts and blocks may be wrong.
    pub(crate) fn forget_known(&mut self) {
        self.known.clear();
        self.late = Late::default();
        self.measure_open();
    }

    /// Numbers for new tables; the first of them.
    pub(crate) fn reserve_tables(&mut self, count: usize) -> u64 {
        self.next_table += count as u64;
        self.next_table - count as u64
    }

    /// Closes tables that have nothing after a time.
    pub(crate) fn close_older(&mut self, before_ms: i64) {
        let is_old = |table: &HotTable| table.table.times.iter().all(|time_ms| *time_ms < before_ms);
        let old: Vec<i64> = {
            let hot = self.door.read();
            let old = hot.tables().filter(|(_, table)| !table.is_closed && is_old(table));
            old.map(|(site, _)| site).collect()
        };
        old.into_iter().for_each(|site| self.close(site));
        self.no_seal_before = None;
        self.hand_over();
    }
}

pub(crate) fn begin(connection: &mut Connection) -> Result<Transaction<'_>, StoreError> {
    Ok(connection.transaction_with_behavior(TransactionBehavior::Immediate)?)
}

fn make_tenant(transaction: &Transaction<'_>, name: &str) -> Result<i64, StoreError> {
    let sql = "SELECT id FROM tenant WHERE name = ?1";
    if let Some(id) = transaction.query_row(sql, [name], |row| row.get(0)).optional()? {
        return Ok(id);
    }
    transaction.execute("INSERT INTO tenant(name) VALUES (?1)", [name])?;
    Ok(transaction.last_insert_rowid())
}

fn make_site(transaction: &Transaction<'_>, tenant: &str, source: &str) -> Result<Site, StoreError> {
    let tenant = make_tenant(transaction, tenant)?;
    transaction.execute("INSERT INTO site(tenant, source) VALUES (?1, ?2)", params![tenant, source])?;
    Ok(Site { id: transaction.last_insert_rowid(), tenant })
}

/// Writes a block; returns its id.
pub(crate) fn insert_block(
    transaction: &Connection,
    site: i64,
    block: &codec::Encoded,
) -> Result<i64, StoreError> {
    let sql = "INSERT INTO block(site, rows, first_ms, last_ms, bots, visitors, sessions, version)
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    let codec::Encoded { rows, first_ms, last_ms, bots, who, sessions, .. } = block;
    let mut statement = transaction.prepare_cached(sql)?;
    statement.execute(params![
        site,
        *rows as i64,
        first_ms,
        last_ms,
        *bots as i64,
        *who as i64,
        *sessions as i64,
        codec::VERSION
    ])?;
    let id = transaction.last_insert_rowid();
    let mut statement = transaction.prepare_cached("INSERT INTO col(k, data) VALUES (?1, ?2)")?;
    for (number, column) in &block.columns {
        statement.execute(params![id << 8 | i64::from(*number), column])?;
    }
    Ok(id)
}

/// Deletes a block.
pub(crate) fn delete_block(transaction: &Connection, id: i64) -> Result<bool, StoreError> {
    transaction.prepare_cached("DELETE FROM col WHERE k BETWEEN ?1 << 8 AND ?1 << 8 | 255")?.execute([id])?;
    Ok(transaction.prepare_cached("DELETE FROM block WHERE id = ?1")?.execute([id])? > 0)
}
