//! The one that writes: a thread with the one connection that may.
//!
//! A batch is one transaction: its events as they are (`hot`), their ids (`seen`) and what
//! they tell about who is who. Nothing in memory changes before it is committed; after one
//! that failed all of it is read again, as nobody knows what a commit that failed has done.
//! What was refused before anything was written changes nothing: an overloaded store must
//! not lose the blocks that are being made.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap, HashSet, hash_map},
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{Arc, atomic::Ordering, mpsc},
    time::{Duration, Instant},
};

use analytics_relay_providers::Event;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use super::{
    Counters, Settings,
    block::BlockMeta,
    codec,
    facts::{FactTables, Known, Refused},
    hot::{self, Closed, Door, Hot, HotTable, Size, Window},
    late::Late,
    lock, schema,
    sought::Sought,
};
use crate::{
    Appended, StoreError,
    model::{IdSet, Keys, event::source_of},
    scan::table::Table,
};

/// So long no block is made after one could not be written.
const PAUSE: Duration = Duration::from_secs(10);
/// So long it is waited for readers before the log is cut.
const LOG_WAIT: Duration = Duration::from_millis(100);
/// So long it is not tried again.
const LOG_PAUSE: Duration = Duration::from_secs(1);
/// So many times what may wait in memory appends are refused until blocks were made of it.
const OVERFULL: usize = 4;

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
    /// Their rows in the table `hot`, and their sites.
    damaged_batches: Vec<(i64, i64)>,
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
    /// How many sites a tenant has.
    sites_of: HashMap<i64, usize>,
    window: Window,
    known: Known,
    late: Late,
    next_n: i64,
    next_table: u64,
    /// The sizes of open tables, by site and whether they are of clocks that are ahead, and
    /// what they add up to.
    open: HashMap<(i64, bool), Size>,
    open_sum: Size,
    /// The sites and sizes of closed tables, by their ids, and what they add up to.
    closed: BTreeMap<u64, (i64, Size)>,
    closed_sum: Size,
    /// Those of them that are becoming blocks.
    sealing: HashSet<u64>,
    /// Why the last block could not be written, and until when none is tried.
    not_sealed: Option<(Instant, StoreError)>,
    /// Batches that cannot be read: their rows in the table `hot`, and their sites.
    pub(crate) damaged_batches: Vec<(i64, i64)>,
    /// From when on it is tried to cut the file's log, which has what must go.
    cut_log_from: Option<Instant>,
    /// A transaction failed: what is in memory may not be what is in the file.
    is_stale: bool,
    sealer: mpsc::SyncSender<Closed>,
    _lock: std::fs::File,
}

/// The tenants and sources of a batch, and of each event which of them.
struct Places {
    all: Vec<(String, String)>,
    /// A key names it; else anybody may have.
    is_given: Vec<bool>,
    of_each: Vec<usize>,
}

impl Places {
    fn of(batch: &[Event]) -> Self {
        let mut numbers: HashMap<(&str, String), usize> = HashMap::new();
        let mut is_given = Vec::new();
        let of_each = batch.iter().map(|event| {
            let next = numbers.len();
            let place = (event.tenant().unwrap_or_default(), source_of(event));
            let number = *numbers.entry(place).or_insert(next);
            is_given.resize(numbers.len(), false);
            is_given[number] |= event.source().is_some();
            number
        });
        let of_each = of_each.collect();
        let mut all = vec![Default::default(); numbers.len()];
        for ((tenant, source), number) in numbers {
            all[number] = (tenant.to_owned(), source);
        }
        Self { all, is_given, of_each }
    }

    /// Puts events of some places where those of their tenants are that name no source.
    /// Returns how many.
    fn without_source(&mut self, is_one: impl Fn(usize) -> bool) -> u64 {
        let (mut renamed, mut none) = (HashMap::new(), HashMap::new());
        for place in (0..self.all.len()).filter(|place| is_one(*place)) {
            let tenant = self.all[place].0.clone();
            let number = *none.entry(tenant).or_insert_with_key(|tenant| {
                let known = self.all.iter().position(|(one, source)| one == tenant && source.is_empty());
                known.unwrap_or_else(|| {
                    self.all.push((tenant.clone(), String::new()));
                    self.all.len() - 1
                })
            });
            renamed.insert(place, number);
        }
        let mut count = 0;
        for place in &mut self.of_each {
            if let Some(number) = renamed.get(place) {
                (*place, count) = (*number, count + 1);
            }
        }
        count
    }
}

/// Opens a file for writing. Returns where a damaged one went.
pub(crate) fn open(
    settings: &Settings,
    counters: Arc<Counters>,
    sealer: mpsc::SyncSender<Closed>,
) -> Result<(Writer, Option<PathBuf>), StoreError> {
    let (opened, loaded) = schema::open(&settings.path, |connection| {
        check_tables(connection)?;
        schema::check_identity(connection)?;
        load(connection, settings)
    })?;
    let Loaded { keys, secret, sites, tenants, window, hot, next_n, next_table, damaged_batches } = loaded;
    counters.damaged_batches.store(damaged_batches.len() as u64, Ordering::Relaxed);
    let door = Arc::new(Door::default());
    *door.write() = hot;
    let mut writer = Writer {
        connection: opened.writer,
        settings: settings.clone(),
        door,
        counters,
        keys,
        secret,
        sites_of: count_sites(&sites),
        sites,
        tenants,
        window,
        known: Known::default(),
        late: Late::default(),
        next_n,
        next_table,
        open: HashMap::new(),
        open_sum: Size::default(),
        closed: BTreeMap::new(),
        closed_sum: Size::default(),
        sealing: HashSet::new(),
        not_sealed: None,
        damaged_batches,
        cut_log_from: None,
        is_stale: false,
        sealer,
        _lock: opened.lock,
    };
    writer.connection.set_prepared_statement_cache_capacity(64);
    writer.measure_all();
    writer.seal_what_is_due();
    Ok((writer, opened.set_aside))
}

/// Reads every table whose damage would make the store useless, beside what is loaded.
/// Blocks are not among them: a damaged one costs itself.
fn check_tables(connection: &Connection) -> Result<(), StoreError> {
    for sql in ["SELECT count(*) FROM meta NOT INDEXED", "SELECT count(*) FROM block NOT INDEXED"] {
        connection.query_row(sql, [], |row| row.get::<_, i64>(0))?;
    }
    Ok(())
}

fn count_sites(sites: &HashMap<(String, String), Site>) -> HashMap<i64, usize> {
    let mut count = HashMap::new();
    sites.values().for_each(|site| *count.entry(site.tenant).or_default() += 1);
    count
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
        damaged_batches: Vec::new(),
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

/// A batch of a site as it is in the table `hot`.
struct HotRow {
    id: i64,
    n: i64,
    site: i64,
    events: Option<Vec<Event>>,
}

fn each_hot(
    connection: &Connection,
    mut each: impl FnMut(HotRow) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut statement = connection.prepare("SELECT id, n, site, events FROM hot ORDER BY id")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let bytes: Vec<u8> = row.get(3)?;
        let events = hot::decode(&bytes);
        each(HotRow { id: row.get(0)?, n: row.get(1)?, site: row.get(2)?, events })?;
    }
    Ok(())
}

/// Reads what is no block yet. What cannot be read, or panics, costs its batch: else a store
/// would never open again.
fn load_hot(connection: &Connection, settings: &Settings, loaded: &mut Loaded) -> Result<(), StoreError> {
    let mut panicked = HashSet::new();
    let mut damaged = HashSet::new();
    loop {
        let at = Cell::new(None);
        let load = AssertUnwindSafe(|| {
            each_hot(connection, |row| {
                loaded.next_n = loaded.next_n.max(row.n + 1);
                let events = row.events.filter(|_| !panicked.contains(&row.id));
                let Some(events) = events else {
                    tracing::error!(
                        n = row.n,
                        "a batch in the store is damaged: its events are in no figure"
                    );
                    loaded.damaged_batches.push((row.id, row.site));
                    if !panicked.contains(&row.id) {
                        damaged.insert(row.n);
                    }
                    return Ok(());
                };
                at.set(Some(row.id));
                let block_max = (settings.block_rows, settings.block_bytes);
                let place = (row.site, events.first().is_some_and(hot::is_ahead));
                let secrets = (loaded.keys, loaded.secret);
                let next_table = &mut loaded.next_table;
                add_hot(&mut loaded.hot, place, (row.id, row.n), &events, block_max, secrets, next_table);
                Ok(())
            })
        });
        match catch_unwind(load) {
            Ok(done) => {
                done?;
                break;
            }
            Err(_) => {
                panicked.extend(at.get());
                (loaded.hot, loaded.damaged_batches) = Default::default();
            }
        }
    }
    forget_lost(connection, &damaged, loaded)
}

/// What was in batches that cannot be read may come again: of their ids those are remembered
/// whose events are there.
fn forget_lost(
    connection: &Connection,
    damaged: &HashSet<i64>,
    loaded: &mut Loaded,
) -> Result<(), StoreError> {
    if damaged.is_empty() {
        return Ok(());
    }
    let mut there = IdSet::default();
    each_hot(connection, |row| {
        for event in row.events.iter().flatten().filter(|_| damaged.contains(&row.n)) {
            there.insert(loaded.keys.event(event.tenant().unwrap_or_default(), event.id().as_str()));
        }
        Ok(())
    })?;
    damaged.iter().for_each(|n| loaded.window.retain_of(*n, &there));
    Ok(())
}

/// Adds a batch's events of one site to its open table, or to a new one.
fn add_hot<'a>(
    hot: &mut Hot,
    (site, is_ahead): (i64, bool),
    (row, n): (i64, i64),
    events: impl IntoIterator<Item = &'a Event>,
    (rows_max, bytes_max): (usize, usize),
    (keys, secret): (Keys, [u8; 16]),
    next_table: &mut u64,
) {
    if hot.last(site, is_ahead).is_none_or(|last| last.is_closed) {
        let table = HotTable::new(*next_table, Table::new(keys, secret), n, is_ahead);
        hot.sites.entry(site).or_default().push(Arc::new(table));
        *next_table += 1;
    }
    let last = Arc::make_mut(hot.last_mut(site, is_ahead).expect("one was made"));
    last.add(row, events.into_iter());
    last.is_closed = last.table.rows() >= rows_max || last.table.bytes() >= bytes_max;
}

impl Writer {
    /// Does something that writes. After an error what is in memory is read again, if
    /// anything had been written.
    pub(crate) fn attempt<T>(
        &mut self,
        write: impl FnOnce(&mut Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if self.is_stale {
            self.reload()?;
        }
        // Rows that were changed, be it that they were changed back.
        let before = self.connection.total_changes();
        let done = write(self);
        if done.is_err() {
            self.known.rolled_back();
            self.is_stale = self.connection.total_changes() != before || !self.connection.is_autocommit();
        } else if self.cut_log_from.is_some_and(|from| Instant::now() >= from) {
            self.cut_log();
        }
        done
    }

    /// Cuts the log of the file, in which what was deleted still stands. As long as somebody
    /// reads what it has it cannot be; then it is tried again behind a later write. Returns
    /// whether it was.
    pub(crate) fn cut_log(&mut self) -> bool {
        // Appends wait meanwhile.
        let busy = |connection: &Connection, timeout| connection.busy_timeout(timeout);
        let cut = busy(&self.connection, LOG_WAIT).and_then(|()| {
            // That it is busy is an answer and no error.
            let sql = "PRAGMA wal_checkpoint(TRUNCATE)";
            self.connection.query_row(sql, [], |row| Ok(row.get::<_, i64>(0)? == 0))
        });
        let is_cut = match busy(&self.connection, schema::BUSY_TIMEOUT).and(cut) {
            Ok(is_cut) => is_cut,
            Err(error) => {
                tracing::warn!(%error, "the store's log could not be cut for now");
                false
            }
        };
        self.cut_log_from = (!is_cut).then(|| Instant::now() + LOG_PAUSE);
        is_cut
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
        self.sites_of = count_sites(&self.sites);
        (self.next_n, self.damaged_batches) = (loaded.next_n, loaded.damaged_batches);
        // Ids of tables that are being made into blocks must not come again.
        let offset = self.next_table;
        let mut hot = self.door.write();
        for table in hot.sites.values_mut().flatten() {
            Arc::make_mut(table).id += offset;
        }
        drop(hot);
        self.next_table += loaded.next_table;
        // Blocks that are being made of tables of before are of no use any more.
        self.sealing.clear();
        self.known.clear();
        self.late = Late::default();
        self.measure_all();
        self.is_stale = false;
        Ok(())
    }

    /// Measures all tables anew.
    fn measure_all(&mut self) {
        (self.open, self.closed) = Default::default();
        (self.open_sum, self.closed_sum) = Default::default();
        let hot = self.door.read();
        for (site, table) in hot.tables().filter(|(_, table)| table.table.rows() > 0) {
            let size = table.size();
            if table.is_closed {
                self.closed.insert(table.id, (site, size));
                self.closed_sum += size;
            } else {
                self.open.insert((site, table.is_ahead), size);
                self.open_sum += size;
            }
        }
    }

    /// Measures the table anew that grew last of a site, or was closed.
    fn measure(&mut self, (site, is_ahead): (i64, bool)) {
        self.open_sum -= self.open.remove(&(site, is_ahead)).unwrap_or_default();
        let hot = self.door.read();
        let Some(last) = hot.last(site, is_ahead) else { return };
        let size = last.size();
        if !last.is_closed {
            self.open.insert((site, is_ahead), size);
            self.open_sum += size;
        } else if size.rows > 0 && self.closed.insert(last.id, (site, size)).is_none() {
            self.closed_sum += size;
        }
    }

    /// Refuses more as long as too much waits in memory.
    fn check_room(&mut self) -> Result<(), StoreError> {
        let Settings { hot_rows_max, hot_bytes_max, .. } = self.settings;
        let mut waiting = self.open_sum;
        waiting += self.closed_sum;
        if waiting.fits(Size { rows: OVERFULL * hot_rows_max, bytes: OVERFULL * hot_bytes_max }) {
            return Ok(());
        }
        self.seal_what_is_due();
        let Size { rows, bytes } = waiting;
        Err(StoreError::Unavailable(format!("{rows} events of {bytes} bytes wait to become blocks")))
    }

    /// Keeps a batch, or none of it.
    pub(crate) fn append(&mut self, batch: &[Event]) -> Result<Vec<Appended>, StoreError> {
        self.check_room()?;
        let mut places = Places::of(batch);
        let without_source = self.bound_sites(&mut places);
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
        let by_table = self.keep(n, &new, &places, &ids, forgotten)?;
        self.next_n = n + 1;
        self.known.committed();
        self.window.add(n, ids);
        if let Some(up_to) = forgotten {
            self.window.forget(up_to);
        }
        for table in by_table {
            self.measure(table);
        }
        self.seal_what_is_due();
        self.counters.appended.fetch_add(new.len() as u64, Ordering::Relaxed);
        self.counters.sources_refused.fetch_add(without_source, Ordering::Relaxed);
        Ok(verdicts)
    }

    /// Takes the source from events of websites that their callers name, where the tenant has
    /// as many as it may have: each costs a table in memory and blocks of its own. Returns of
    /// how many.
    fn bound_sites(&self, places: &mut Places) -> u64 {
        let is_new = |(key, is_given): (&(String, String), &bool)| {
            !is_given && !key.1.is_empty() && !self.sites.contains_key(key)
        };
        let is_new: Vec<bool> = places.all.iter().zip(&places.is_given).map(is_new).collect();
        if !is_new.contains(&true) {
            return 0;
        }
        let mut left: HashMap<&str, usize> = HashMap::new();
        let mut is_refused = vec![false; is_new.len()];
        for ((refused, (tenant, _)), _) in
            is_refused.iter_mut().zip(&places.all).zip(&is_new).filter(|(_, is_new)| **is_new)
        {
            let left = left.entry(tenant).or_insert_with(|| {
                let known = self.tenants.get(tenant).and_then(|tenant| self.sites_of.get(tenant));
                self.settings.sites_max.saturating_sub(known.copied().unwrap_or_default())
            });
            *refused = *left == 0;
            *left = left.saturating_sub(1);
        }
        places.without_source(|place| is_refused.get(place) == Some(&true))
    }

    /// What is new, and the keys of the ids of that.
    fn judge(&mut self, batch: &[Event], places: &Places) -> Result<(Vec<Appended>, Vec<u64>), StoreError> {
        let mut verdicts = vec![Appended::Duplicate; batch.len()];
        let id_of =
            |(event, place): (&Event, &usize)| self.keys.event(&places.all[*place].0, event.id().as_str());
        let mut ids: Vec<u64> = batch.iter().zip(&places.of_each).map(id_of).collect();
        let (is_known, mut in_batch) = (self.window.knows(&ids), IdSet::default());
        let last_ms: Vec<i64> = places.all.iter().map(|key| self.last_ms(key)).collect::<Result<_, _>>()?;
        let lost: Vec<Vec<Range<i64>>> = places.all.iter().map(|key| self.lost(key)).collect();
        let mut suspects: BTreeMap<(usize, bool), Vec<(usize, &Event)>> = BTreeMap::new();
        for (at, (event, place)) in batch.iter().zip(&places.of_each).enumerate() {
            let is_lost = lost[*place].iter().any(|lost| lost.contains(&event.time_ms()));
            if (is_lost || !is_known[at]) && in_batch.insert(ids[at]) {
                verdicts[at] = Appended::New;
                if is_lost || event.time_ms() <= last_ms[*place] {
                    suspects.entry((*place, is_lost)).or_default().push((at, event));
                }
            }
        }
        for ((place, is_lost), events) in suspects {
            let Some(site) = self.sites.get(&places.all[place]) else { continue };
            let sought = Sought::of(events.into_iter());
            let found = self.find(site.id, &sought, is_lost)?;
            found.into_iter().for_each(|at| verdicts[at] = Appended::Duplicate);
        }
        let mut is_new = verdicts.iter().map(|verdict| *verdict == Appended::New);
        ids.retain(|_| is_new.next() == Some(true));
        Ok((verdicts, ids))
    }

    /// Up to when events may be there whose ids are not remembered any more.
    fn last_ms(&mut self, key: &(String, String)) -> Result<i64, StoreError> {
        let Some(site) = self.sites.get(key) else { return Ok(i64::MIN) };
        let first_batch = self.window.first_batch().unwrap_or(i64::MAX);
        let is_older = |table: &Arc<HotTable>| table.first_batch < first_batch;
        if self.door.read().sites.get(&site.id).is_some_and(|tables| tables.iter().any(is_older)) {
            return Ok(i64::MAX);
        }
        self.late.last_ms(&self.connection, site.id)
    }

    /// The times of a site's blocks that cannot be read. That an event of them was there once
    /// says nothing: it is looked for, and kept again if it is lost.
    fn lost(&self, key: &(String, String)) -> Vec<Range<i64>> {
        let lost = lock(&self.counters.lost);
        if lost.is_empty() {
            return Vec::new();
        }
        let site = self.sites.get(key).map(|site| site.id);
        let its = lost.values().filter(|meta| Some(meta.site) == site);
        its.map(|meta| meta.first_ms..meta.last_ms.saturating_add(1)).collect()
    }

    /// Those of events that are there, in what has no ids that are remembered or, if they may
    /// be lost, anywhere.
    fn find(&mut self, site: i64, sought: &Sought, anywhere: bool) -> Result<Vec<usize>, StoreError> {
        let first_batch = self.window.first_batch().unwrap_or(i64::MAX);
        let mut found = Vec::new();
        let hot = self.door.read();
        let tables = hot.sites.get(&site).into_iter().flatten();
        let older = tables.filter(|table| anywhere || table.first_batch < first_batch);
        older.for_each(|table| table.find(sought, &mut found));
        drop(hot);
        self.late.find(&self.connection, site, sought, &self.counters, &mut found)?;
        Ok(found)
    }

    /// The transaction of a batch. Returns the tables that got something.
    fn keep(
        &mut self,
        n: i64,
        new: &[(&Event, usize)],
        places: &Places,
        ids: &[u64],
        forgotten: Option<i64>,
    ) -> Result<Vec<(i64, bool)>, StoreError> {
        let (keys, secret, known) = (self.keys, self.secret, &mut self.known);
        let limits = self.settings.fact_limits;
        let transaction = begin(&mut self.connection)?;
        let (sites, new_sites) = sites_of(&transaction, &self.sites, new, places)?;
        let (mut by_table, mut by_tenant) =
            (BTreeMap::<_, Vec<&Event>>::new(), BTreeMap::<_, Vec<&Event>>::new());
        for (event, place) in new {
            let site = sites[place];
            by_table.entry((site.id, hot::is_ahead(event))).or_default().push(event);
            by_tenant.entry(site.tenant).or_default().push(event);
        }
        let mut rows_in_file = Vec::with_capacity(by_table.len());
        for ((site, _), events) in &by_table {
            let bytes = hot::encode(events.iter().copied())?;
            let sql = "INSERT INTO hot(n, site, events) VALUES (?1, ?2, ?3)";
            transaction.prepare_cached(sql)?.execute(params![n, site, bytes])?;
            rows_in_file.push(transaction.last_insert_rowid());
        }
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        transaction.prepare_cached("INSERT INTO seen(n, ids) VALUES (?1, ?2)")?.execute(params![n, bytes])?;
        if let Some(up_to) = forgotten {
            transaction.prepare_cached("DELETE FROM seen WHERE n <= ?1")?.execute([up_to])?;
        }
        let mut refused = Refused::default();
        for (tenant, events) in &by_tenant {
            let tables = FactTables { connection: &transaction, tenant: *tenant, keys, limits, n };
            refused.add(tables.note(events, known)?);
        }
        // No question reads what this writes into the file but who is who, and that may be
        // known a moment before the events: they need not wait for the disk.
        transaction.commit()?;
        let block_max = (self.settings.block_rows, self.settings.block_bytes);
        let mut hot = self.door.write();
        for (((site, is_ahead), events), row) in by_table.iter().zip(rows_in_file) {
            let events = events.iter().copied();
            let place = (*site, *is_ahead);
            add_hot(&mut hot, place, (row, n), events, block_max, (keys, secret), &mut self.next_table);
        }
        drop(hot);
        self.tenants.extend(new_sites.iter().map(|(key, site)| (key.0.clone(), site.tenant)));
        for (_, site) in &new_sites {
            *self.sites_of.entry(site.tenant).or_default() += 1;
        }
        self.sites.extend(new_sites);
        self.counters.refused(refused);
        Ok(by_table.into_keys().collect())
    }

    /// Closes open tables that are too many, the largest first, and hands over what is
    /// closed.
    pub(crate) fn seal_what_is_due(&mut self) {
        let Settings { hot_rows_max, hot_bytes_max, .. } = self.settings;
        if self.open_sum.rows > hot_rows_max || self.open_sum.bytes > hot_bytes_max {
            let mut largest: Vec<_> = self.open.iter().map(|(site, size)| (*size, *site)).collect();
            largest.sort_unstable();
            while self.open_sum.rows > hot_rows_max / 2 || self.open_sum.bytes > hot_bytes_max / 2 {
                let Some((_, site)) = largest.pop() else { break };
                self.close(site);
            }
        }
        self.hand_over();
    }

    /// Closes an open table of a site.
    fn close(&mut self, (site, is_ahead): (i64, bool)) {
        if let Some(table) = self.door.write().last_mut(site, is_ahead) {
            Arc::make_mut(table).is_closed = true;
        }
        self.measure((site, is_ahead));
    }

    /// Closes all tables that have events of batches before one and pass a test. Returns how
    /// many of what is closed are no blocks yet; or why the last could not be written.
    pub(crate) fn close_where(
        &mut self,
        before_n: i64,
        test: impl Fn(&HotTable) -> bool,
    ) -> Result<usize, StoreError> {
        if let Some((_, error)) = &self.not_sealed {
            return Err(error.clone());
        }
        let is_due = |table: &HotTable| table.first_batch < before_n && table.table.rows() > 0;
        let due: Vec<(i64, bool)> = {
            let hot = self.door.read();
            let open = hot.tables().filter(|(_, table)| !table.is_closed && is_due(table) && test(table));
            open.map(|(site, table)| (site, table.is_ahead)).collect()
        };
        due.into_iter().for_each(|site| self.close(site));
        self.hand_over();
        let hot = self.door.read();
        Ok(hot.tables().filter(|(_, table)| table.is_closed && is_due(table)).count())
    }

    /// What could not be written is tried again now. Returns the number of the next batch.
    pub(crate) fn try_again(&mut self) -> i64 {
        self.not_sealed = None;
        self.next_n
    }

    /// Gives the sealer as much of what is closed as it takes now; after each it gets more.
    fn hand_over(&mut self) {
        if self.not_sealed.as_ref().is_some_and(|(until, _)| Instant::now() < *until) {
            return;
        }
        let hot = self.door.read();
        for (id, (site, _)) in &self.closed {
            if self.sealing.contains(id) {
                continue;
            }
            let tables = hot.sites.get(site).into_iter().flatten();
            let Some(table) = tables.clone().find(|table| table.id == *id) else { continue };
            // It is full; or nobody takes any, as the store is being closed.
            if self.sealer.try_send(Closed { site: *site, table: table.clone() }).is_err() {
                break;
            }
            self.sealing.insert(*id);
        }
    }

    /// After the sealer is done with a table: it made a block, or found that the table is
    /// not there any more, or failed.
    pub(crate) fn take_block(&mut self, closed: &Closed, made: Result<Option<codec::Encoded>, StoreError>) {
        let done = match made {
            Ok(Some(block)) => self.attempt(|writer| writer.sealed(closed, &block)),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        // Whatever came of it, nobody works at it any more.
        self.sealing.remove(&closed.table.id);
        match done {
            Ok(()) => self.not_sealed = None,
            Err(error) => {
                self.counters.seals_failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "a block could not be written; its events stay as they came for now");
                self.not_sealed = Some((Instant::now() + PAUSE, error));
            }
        }
        self.hand_over();
    }

    /// Puts a block in the place of a table, if that is still as it was.
    fn sealed(&mut self, closed: &Closed, block: &codec::Encoded) -> Result<(), StoreError> {
        if !self.door.read().has(closed) {
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
        hot.remove(closed);
        drop(hot);
        if let Some((_, size)) = self.closed.remove(&closed.table.id) {
            self.closed_sum -= size;
        }
        self.late.block_came(closed.site, block.last_ms);
        self.counters.sealed.fetch_add(1, Ordering::Relaxed);
        Ok(())
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

    /// What was known about facts may be wrong.
    pub(crate) fn forget_facts(&mut self) {
        self.known.clear();
    }

    /// What was known about facts and blocks may be wrong.
    pub(crate) fn forget_known(&mut self) {
        self.forget_facts();
        self.late = Late::default();
        self.measure_all();
    }

    /// Numbers for new tables; the first of them.
    pub(crate) fn reserve_tables(&mut self, count: usize) -> u64 {
        self.next_table += count as u64;
        self.next_table - count as u64
    }
}

/// A site that a batch made.
type NewSite = ((String, String), Site);

/// The sites of the events of a batch, by their places; and those that were made.
fn sites_of(
    transaction: &Transaction<'_>,
    known: &HashMap<(String, String), Site>,
    new: &[(&Event, usize)],
    places: &Places,
) -> Result<(HashMap<usize, Site>, Vec<NewSite>), StoreError> {
    let (mut sites, mut new_sites) = (HashMap::new(), Vec::new());
    for (_, place) in new {
        if let hash_map::Entry::Vacant(entry) = sites.entry(*place) {
            let key = &places.all[*place];
            let site = match known.get(key) {
                Some(site) => *site,
                None => {
                    let site = make_site(transaction, &key.0, &key.1)?;
                    new_sites.push((key.clone(), site));
                    site
                }
            };
            entry.insert(site);
        }
    }
    Ok((sites, new_sites))
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
    let sql = "INSERT INTO block(site, rows, bytes, first_ms, last_ms, bots, sessions, crc)
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 0)";
    let codec::Encoded { rows, bytes, first_ms, last_ms, bots, sessions, .. } = *block;
    let numbers = [site, rows as i64, bytes as i64, first_ms, last_ms, bots as i64, sessions as i64];
    transaction.prepare_cached(sql)?.execute(rusqlite::params_from_iter(numbers))?;
    let id = transaction.last_insert_rowid();
    let sql = "UPDATE block SET crc = ?2 WHERE id = ?1";
    transaction.prepare_cached(sql)?.execute([id, BlockMeta::crc(id, numbers)])?;
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
