//! What is done to a store beside writing and asking.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs::{self, File},
    io::{self, BufRead, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use analytics_relay_providers::Event;
use rusqlite::{Connection, ErrorCode, InterruptHandle, Transaction, params};

use super::{
    Counters, Settings, SqliteStore, Stats,
    block::BlockMeta,
    chunk::Block,
    codec,
    facts::{FactTables, Known, Refused, Whose},
    facts_file,
    hot::{self, Hot, HotTable, Size},
    lock, schema,
    snapshot::{blocks_of, epoch},
    writer::{Writer, begin, delete_block, insert_block},
};
use crate::{
    Deleted, StoreError, Subject,
    error::at_second_look,
    lines::{self, ExportReport, ImportReport, Wanted},
    model::{Keys, KnownFact},
    scan::table::Table,
};

/// So long is waited for one more block.
const SEAL_WAIT_MAX: Duration = Duration::from_secs(60);
/// Which events are to go.
enum Doomed {
    /// Somebody's; the keys of those whose events are found by them.
    Whose(Whose, BTreeSet<u64>),
    /// Those before a time.
    Before(i64),
}

impl Doomed {
    fn includes(&self, event: &Event) -> bool {
        match self {
            Self::Whose(whose, ..) => whose.includes(event),
            Self::Before(from_ms) => event.time_ms() < *from_ms,
        }
    }

    /// True if a block may have such.
    fn may_be_in(&self, chunk: &mut Block<'_>, meta: &BlockMeta) -> Result<bool, StoreError> {
        match self {
            Self::Before(from_ms) => Ok(meta.first_ms < *from_ms),
            Self::Whose(whose, keys) => whose.may_be_in(chunk, keys),
        }
    }

    /// True if a block has nothing else.
    fn is_all_of(&self, meta: &BlockMeta) -> bool {
        matches!(self, Self::Before(from_ms) if meta.last_ms < *from_ms)
    }
}

/// Deletes somebody, with what is known about them, in one transaction. Freed pages are
/// overwritten.
pub(crate) fn erase(writer: &mut Writer, tenant: &str, who: &Subject) -> Result<Deleted, StoreError> {
    let Some(tenant) = writer.tenant(tenant) else { return Ok(Deleted::default()) };
    let (keys, limits) = (writer.keys, writer.settings.fact_limits);
    let deleted = delete(writer, tenant, |transaction, n| {
        let tables = FactTables { connection: transaction, tenant, keys, limits, n };
        let whose = tables.whose(who)?;
        let facts = tables.forget(who, &whose)?;
        let sql = "INSERT INTO meta(k, v) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET v = excluded.v";
        let next = epoch(transaction, tenant)? + 1;
        transaction.execute(sql, params![format!("epoch {tenant}"), next.to_le_bytes()])?;
        let found_by = whose.keys(keys);
        Ok((Doomed::Whose(whose, found_by), facts))
    });
    let mut deleted = deleted?;
    deleted.is_in_log = !writer.cut_log();
    Ok(deleted)
}

/// Deletes what is older than a time.
pub(crate) fn retain(writer: &mut Writer, tenant: &str, from_ms: i64) -> Result<Deleted, StoreError> {
    let Some(tenant) = writer.tenant(tenant) else { return Ok(Deleted::default()) };
    delete(writer, tenant, |_, _| Ok((Doomed::Before(from_ms), 0)))
}

/// Takes in what another store knows about who is who, in one transaction.
pub(crate) fn know(writer: &mut Writer, facts: &[KnownFact]) -> Result<(), StoreError> {
    let mut by_tenant: BTreeMap<i64, Vec<&KnownFact>> = BTreeMap::new();
    for fact in facts {
        by_tenant.entry(writer.tenant_or_new(&fact.tenant)?).or_default().push(fact);
    }
    let (keys, limits, counters) = (writer.keys, writer.settings.fact_limits, writer.counters.clone());
    let (transaction, n) = writer.begin()?;
    let (mut refused, mut known) = (Refused::default(), Known::default());
    for (tenant, facts) in by_tenant {
        let tables = FactTables { connection: &transaction, tenant, keys, limits, n };
        refused.add(tables.know(&facts, &mut known)?);
    }
    transaction.commit()?;
    counters.refused(refused);
    // What gave way is not known any more.
    writer.forget_facts();
    Ok(())
}

fn delete(
    writer: &mut Writer,
    tenant: i64,
    doom: impl FnOnce(&Transaction<'_>, i64) -> Result<(Doomed, u64), StoreError>,
) -> Result<Deleted, StoreError> {
    let (keys, secret, door) = (writer.keys, writer.secret, writer.door.clone());
    let counters = writer.counters.clone();
    let sites = writer.sites_of(tenant);
    let damaged = writer.damaged_batches.iter().filter(|(_, site)| sites.contains(site)).count();
    let tables = door.read().tables().filter(|(site, _)| sites.contains(site)).count();
    let mut next_table = writer.reserve_tables(tables);
    let (transaction, n) = writer.begin()?;
    let (doomed, facts) = doom(&transaction, n)?;
    let mut deleted = Deleted { facts, damaged_batches: damaged as u64, ..Deleted::default() };
    for site in &sites {
        delete_in_blocks(&transaction, *site, &doomed, keys, secret, &counters, &mut deleted)?;
    }
    let mut kept = Vec::new();
    for (site, table) in door.read().tables().filter(|(site, _)| sites.contains(site)) {
        if let Some(events) = delete_in_hot(&transaction, table, &doomed, &mut deleted)? {
            let mut new = Table::new(keys, secret);
            events.iter().for_each(|event| new.push(event));
            let new = table.with(next_table, new);
            next_table += 1;
            kept.push((site, table.clone(), Arc::new(new)));
        }
    }
    let mut hot = door.write();
    transaction.commit()?;
    for (site, old, new) in kept {
        replace_hot(&mut hot, site, &old, new);
    }
    drop(hot);
    writer.forget_known();
    writer.seal_what_is_due();
    Ok(deleted)
}

fn replace_hot(hot: &mut Hot, site: i64, old: &Arc<HotTable>, new: Arc<HotTable>) {
    let tables = hot.sites.entry(site).or_default();
    if let Some(place) = tables.iter_mut().find(|table| Arc::ptr_eq(table, old)) {
        *place = new;
    }
    // What is closed and empty becomes no block.
    tables.retain(|table| table.table.rows() > 0 || !table.is_closed);
}

fn delete_in_blocks(
    transaction: &Transaction<'_>,
    site: i64,
    doomed: &Doomed,
    keys: Keys,
    secret: [u8; 16],
    counters: &Counters,
    deleted: &mut Deleted,
) -> Result<(), StoreError> {
    let mut blocks = Vec::new();
    blocks_of(transaction, site, &mut blocks)?;
    for meta in blocks {
        if !meta.is_damaged && doomed.is_all_of(&meta) {
            delete_block(transaction, meta.id)?;
            (deleted.events, deleted.blocks) = (deleted.events + meta.rows as u64, deleted.blocks + 1);
            continue;
        }
        let kept = match at_second_look(|| kept_of_block(transaction, &meta, doomed)) {
            Err(StoreError::Damaged(why)) => {
                tracing::error!(
                    block = meta.id,
                    why,
                    "a block is damaged: what it has cannot be deleted from it"
                );
                deleted.damaged_blocks += 1;
                counters.lost(&meta);
                continue;
            }
            kept => kept?,
        };
        let Some(kept) = kept else { continue };
        deleted.events += (meta.rows - kept.len()) as u64;
        deleted.blocks += 1;
        delete_block(transaction, meta.id)?;
        if !kept.is_empty() {
            let mut table = Table::new(keys, secret);
            kept.iter().for_each(|event| table.push(event));
            insert_block(transaction, site, &codec::encode(&table)?)?;
        }
    }
    Ok(())
}

/// The events that stay of a block, if any goes.
fn kept_of_block(
    connection: &Connection,
    meta: &BlockMeta,
    doomed: &Doomed,
) -> Result<Option<Vec<Event>>, StoreError> {
    let mut chunk = Block::new(connection, meta);
    if !doomed.may_be_in(&mut chunk, meta)? {
        return Ok(None);
    }
    let mut events = chunk.all_events()?;
    events.retain(|event| !doomed.includes(event));
    Ok((events.len() < meta.rows).then_some(events))
}

/// Takes events out of the batches of a table. Returns what stays of it, if any goes.
fn delete_in_hot(
    transaction: &Transaction<'_>,
    table: &HotTable,
    doomed: &Doomed,
    deleted: &mut Deleted,
) -> Result<Option<Vec<Event>>, StoreError> {
    let events = (0..table.table.rows()).filter_map(|row| table.table.event(row));
    let (gone, kept): (Vec<Event>, Vec<Event>) = events.partition(|event| doomed.includes(event));
    if gone.is_empty() {
        return Ok(None);
    }
    deleted.events += gone.len() as u64;
    for row in &table.rows_in_file {
        let sql = "SELECT events FROM hot WHERE id = ?1";
        let bytes: Vec<u8> = transaction.prepare_cached(sql)?.query_row([row], |row| row.get(0))?;
        let Some(mut events) = hot::decode(&bytes) else {
            deleted.damaged_batches += 1;
            continue;
        };
        let before = events.len();
        events.retain(|event| !doomed.includes(event));
        if events.len() == before {
            continue;
        }
        // Empty ones stay: they end with their table.
        let sql = "UPDATE hot SET events = ?2 WHERE id = ?1";
        transaction.prepare_cached(sql)?.execute(params![row, hot::encode(events.iter())?])?;
    }
    Ok(Some(kept))
}

impl SqliteStore {
    /// Makes blocks of all that came, and waits for it. A store that is closed or killed
    /// needs no such thing.
    pub async fn seal(&self) -> Result<(), StoreError> {
        self.close_tables(|_| true).await
    }

    /// Makes blocks of the tables that pass a test, with all that came before; waits for it,
    /// but no longer than some make progress.
    async fn close_tables(
        &self,
        test: impl Fn(&HotTable) -> bool + Clone + Send + 'static,
    ) -> Result<(), StoreError> {
        let before_n = self.write(|writer| Ok(writer.try_again())).await?;
        let (mut last, mut since) = (usize::MAX, Instant::now());
        loop {
            let test = test.clone();
            let left = self.write(move |writer| writer.close_where(before_n, test)).await?;
            if left == 0 {
                return Ok(());
            }
            if left < last {
                (last, since) = (left, Instant::now());
            } else if since.elapsed() > SEAL_WAIT_MAX {
                return Err(StoreError::Unavailable(format!("{left} tables do not become blocks")));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What is done once a night: what came before a time and is no block yet becomes one,
    /// and small neighbours are merged. Returns how many blocks went into others.
    pub async fn tidy(&self, hot_before_ms: i64) -> Result<u64, StoreError> {
        self.close_tables(move |table| table.table.last_ms < hot_before_ms).await?;
        let Settings { block_rows, block_bytes, .. } = self.shared.settings;
        let max = Size { rows: block_rows, bytes: block_bytes };
        let groups =
            self.read(None, move |_, readers| small_neighbours(&readers.first, max, hot_before_ms)).await?;
        let mut merged = 0;
        // As many at once as make a block of full size, and one group at least.
        for some in groups.chunk_by({
            let mut size = Size::default();
            move |one: &Group, next: &Group| {
                if size.rows == 0 {
                    size = one.size();
                }
                size += next.size();
                let fits = size.fits(max);
                if !fits {
                    size = Size::default();
                }
                fits
            }
        }) {
            merged += self.merge(some.to_vec()).await?;
        }
        self.shared.counters.merged.fetch_add(merged, Ordering::Relaxed);
        Ok(merged)
    }

    /// Makes a block of each group. Returns how many blocks went into others.
    async fn merge(&self, groups: Vec<Group>) -> Result<u64, StoreError> {
        let made = self
            .read(None, move |shared, readers| {
                let secret = schema::secrets(&readers.first)?.1;
                let made = groups.into_iter().map(|group| {
                    let block = merged_block(&readers.first, &group, shared.keys, secret);
                    match block {
                        // What is damaged, or was rewritten meanwhile, stays as it is.
                        Err(StoreError::Damaged(_)) => Ok(None),
                        block => block.map(|block| Some((group, block))),
                    }
                });
                made.collect::<Result<Vec<_>, _>>()
            })
            .await?;
        self.write(move |writer| {
            let (mut transaction, mut merged) = (begin(&mut writer.connection)?, 0);
            for (group, block) in made.iter().flatten() {
                let savepoint = transaction.savepoint()?;
                let mut are_there = true;
                for meta in &group.blocks {
                    are_there &= delete_block(&savepoint, meta.id)?;
                }
                // Else one was rewritten meanwhile: the next night sees what it is now.
                if are_there {
                    insert_block(&savepoint, group.site, block)?;
                    savepoint.commit()?;
                    merged += group.blocks.len() as u64 - 1;
                }
            }
            transaction.commit()?;
            Ok(merged)
        })
        .await
    }

    /// What is in the store, and what happened since it was opened.
    pub async fn stats(&self) -> Result<Stats, StoreError> {
        self.read(None, |shared, readers| {
            let hot = hot_stats(&shared.door.read());
            let mut stats = file_stats(&readers.first)?;
            let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
            stats.events += hot.hot_events;
            (stats.hot_events, stats.hot_bytes) = (hot.hot_events, hot.hot_bytes);
            stats.first_ms = stats.first_ms.into_iter().chain(hot.first_ms).min();
            stats.last_ms = stats.last_ms.max(hot.last_ms);
            stats.appended = count(&shared.counters.appended);
            stats.sealed = count(&shared.counters.sealed);
            stats.seals_failed = count(&shared.counters.seals_failed);
            stats.merged = count(&shared.counters.merged);
            stats.damaged_reads = count(&shared.counters.damaged_reads);
            stats.damaged_batches = count(&shared.counters.damaged_batches);
            stats.links_refused = count(&shared.counters.links_refused);
            stats.aliases_refused = count(&shared.counters.aliases_refused);
            stats.traits_refused = count(&shared.counters.traits_refused);
            stats.sources_refused = count(&shared.counters.sources_refused);
            Ok(stats)
        })
        .await
    }

    /// The tenants that have events before a time.
    pub async fn tenants_before(&self, time_ms: i64) -> Result<Vec<String>, StoreError> {
        self.read(None, move |shared, readers| {
            // These first: what becomes a block meanwhile is found twice, and not never.
            let is_old = |(_, table): &(i64, &Arc<HotTable>)| table.table.overlaps(&(i64::MIN..time_ms));
            let hot: HashSet<i64> = shared.door.read().tables().filter(is_old).map(|(site, _)| site).collect();
            let sql = "SELECT name, site.id, EXISTS (SELECT 1 FROM block WHERE block.site = site.id AND first_ms < ?1)
                FROM site JOIN tenant ON tenant.id = site.tenant";
            let (mut tenants, mut statement) = (BTreeSet::new(), readers.first.prepare(sql)?);
            let mut rows = statement.query([time_ms])?;
            while let Some(row) = rows.next()? {
                if row.get(2)? || hot.contains(&row.get::<_, i64>(1)?) {
                    tenants.insert(row.get(0)?);
                }
            }
            Ok(tenants.into_iter().collect())
        })
        .await
    }

    /// Takes in what [`export`] wrote: see [`lines::import`].
    pub async fn import(&self, lines: impl BufRead + Send + 'static) -> Result<ImportReport, StoreError> {
        lines::import(self, lines).await
    }

    /// Gives free pages back to the file system. Writes the whole file anew, for which
    /// there must be room, and appends wait meanwhile. Dropped, it is given up, and the
    /// file stays as it was: nobody who stops waits for it.
    pub async fn vacuum(&self) -> Result<(), StoreError> {
        let turn = Arc::new(Mutex::new(Turn::Waits));
        let _given_up = GiveUp(turn.clone());
        self.write(move |writer| {
            if !lock(&turn).begin(&writer.connection) {
                return Ok(());
            }
            let done = writer.connection.execute_batch("VACUUM");
            // From here on nothing else of the writer's can be interrupted.
            *lock(&turn) = Turn::Over;
            match done {
                // The file is as it was, and so is what is in memory.
                Err(error) if error.sqlite_error_code() == Some(ErrorCode::OperationInterrupted) => Ok(()),
                done => {
                    done?;
                    writer.cut_log();
                    Ok(())
                }
            }
        })
        .await
    }
}

/// How far something is that can be given up.
enum Turn {
    Waits,
    Runs(InterruptHandle),
    Over,
}

impl Turn {
    /// False if nobody waits for it any more.
    fn begin(&mut self, connection: &Connection) -> bool {
        let waits = matches!(self, Self::Waits);
        if waits {
            *self = Self::Runs(connection.get_interrupt_handle());
        }
        waits
    }
}

/// Gives something up when it is dropped, unless it is over.
struct GiveUp(Arc<Mutex<Turn>>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        let mut turn = lock(&self.0);
        if let Turn::Runs(handle) = &*turn {
            handle.interrupt();
        }
        *turn = Turn::Over;
    }
}

/// What is in memory.
fn hot_stats(hot: &Hot) -> Stats {
    let (size, tables) = (hot.size(), hot.tables().filter(|(_, hot)| hot.table.rows() > 0));
    Stats {
        hot_events: size.rows as u64,
        hot_bytes: size.bytes as u64,
        first_ms: tables.clone().map(|(_, hot)| hot.table.first_ms).min(),
        last_ms: tables.map(|(_, hot)| hot.table.last_ms).max(),
        ..Stats::default()
    }
}

fn file_stats(connection: &Connection) -> Result<Stats, StoreError> {
    let number =
        |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).map(|n| n.max(0) as u64);
    let page_bytes = number("PRAGMA page_size")?;
    let sql = "SELECT count(*), ifnull(sum(rows), 0), min(first_ms), max(last_ms) FROM block";
    let (blocks, events, first_ms, last_ms): (i64, i64, _, _) =
        connection.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
    Ok(Stats {
        events: events.max(0) as u64,
        blocks: blocks.max(0) as u64,
        sites: number("SELECT count(*) FROM site")?,
        file_bytes: number("PRAGMA page_count")? * page_bytes,
        free_bytes: number("PRAGMA freelist_count")? * page_bytes,
        first_ms,
        last_ms,
        ..Stats::default()
    })
}

/// Small blocks of one site that follow each other.
#[derive(Debug, Clone)]
struct Group {
    site: i64,
    blocks: Vec<BlockMeta>,
}

impl Group {
    fn size(&self) -> Size {
        size_of(&self.blocks)
    }
}

fn size_of(blocks: &[BlockMeta]) -> Size {
    let mut size = Size::default();
    blocks.iter().for_each(|meta| size += Size { rows: meta.rows, bytes: meta.bytes });
    size
}

/// Those that have nothing behind a time: what a clock that is ahead has made does not
/// become one with what is now.
fn small_neighbours(connection: &Connection, max: Size, before_ms: i64) -> Result<Vec<Group>, StoreError> {
    let mut all = Vec::new();
    for site in sites(connection, None)? {
        let mut blocks = Vec::new();
        blocks_of(connection, site, &mut blocks)?;
        blocks.retain(|meta| !meta.is_damaged && meta.last_ms < before_ms);
        all.extend(groups(blocks, max).into_iter().map(|blocks| Group { site, blocks }));
    }
    Ok(all)
}

/// What the blocks of a group become together.
fn merged_block(
    connection: &Connection,
    group: &Group,
    keys: Keys,
    secret: [u8; 16],
) -> Result<codec::Encoded, StoreError> {
    let mut table = Table::new(keys, secret);
    for meta in &group.blocks {
        let events = Block::new(connection, meta).all_events()?;
        events.iter().for_each(|event| table.push(event));
    }
    let block = codec::encode(&table)?;
    block.check()?;
    Ok(block)
}

/// Blocks of less than half of what a block may have that follow each other, whatever large
/// ones lie between, and together are no more than one.
fn groups(mut blocks: Vec<BlockMeta>, max: Size) -> Vec<Vec<BlockMeta>> {
    blocks.retain(|meta| {
        size_of(std::slice::from_ref(meta)).fits(Size { rows: max.rows / 2, bytes: max.bytes / 2 })
    });
    let (mut groups, mut rest) = (Vec::new(), &blocks[..]);
    while !rest.is_empty() {
        let mut size = Size::default();
        let fitting = rest.iter().take_while(|meta| {
            size += size_of(std::slice::from_ref(meta));
            size.fits(max)
        });
        let (group, behind) = rest.split_at(fitting.count().max(1));
        worthwhile(group, &mut groups);
        rest = behind;
    }
    groups
}

/// Of neighbours those that are worth it: together at least twice the largest. So a row is
/// written anew as often as its block doubles, and not each night.
fn worthwhile(blocks: &[BlockMeta], groups: &mut Vec<Vec<BlockMeta>>) {
    let largest = blocks.iter().enumerate().max_by_key(|(_, meta)| meta.rows);
    let Some((place, largest)) = largest.filter(|_| blocks.len() > 1) else { return };
    if size_of(blocks).rows >= 2 * largest.rows {
        groups.push(blocks.to_vec());
        return;
    }
    worthwhile(&blocks[..place], groups);
    worthwhile(&blocks[place + 1..], groups);
}

/// Copies a store into a new file, also beside a process that writes to it: all that was
/// there when it began, whole or, under its name, not at all. It is for the owner alone.
pub fn backup(path: &Path, to: &Path) -> Result<(), StoreError> {
    let taken = || StoreError::invalid("backup", to.display(), "a file that is not there yet");
    if to.exists() {
        return Err(taken());
    }
    let connection = open_store(path)?;
    connection.execute_batch("PRAGMA query_only=OFF")?;
    let unfinished = unfinished(to);
    let name = unfinished
        .to_str()
        .ok_or_else(|| StoreError::invalid("backup", to.display(), "a name that is text"))?;
    // Nobody else writes the same one, and its mode is not what the umask says.
    create_new(&unfinished)?;
    let copied = connection.execute("VACUUM INTO ?1", [name]).map_err(StoreError::from).and_then(|_| {
        let named = File::open(&unfinished).and_then(|copy| {
            copy.sync_all()?;
            name_new(&unfinished, to)?;
            schema::sync_dir(to)
        });
        named.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => taken(),
            _ => unavailable(to, &error),
        })
    });
    if copied.is_err() {
        // What cannot be removed either says so by being there.
        let _ = fs::remove_file(&unfinished);
    }
    copied
}

/// Where a backup grows before it has its name: how big it is tells how far it has come.
pub fn unfinished(to: &Path) -> PathBuf {
    let mut name = to.as_os_str().to_owned();
    name.push(".unfinished");
    name.into()
}

fn create_new(path: &Path) -> Result<(), StoreError> {
    let made = File::options().write(true).create_new(true).mode(0o600).open(path);
    made.map(drop).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => StoreError::invalid(
            "backup",
            format!("{} that is there already", path.display()),
            "none: another backup is being made, or one was killed and its file has to be removed",
        ),
        _ => unavailable(path, &error),
    })
}

/// Gives a file its name, which must be free.
fn name_new(unfinished: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(unfinished, to) {
        Ok(()) => fs::remove_file(unfinished),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(error),
        // A file system without links.
        Err(_) if to.exists() => Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => fs::rename(unfinished, to),
    }
}

fn unavailable(path: &Path, error: &io::Error) -> StoreError {
    StoreError::Unavailable(format!("{}: {error}", path.display()))
}

/// Looks whether a file is a store that can be read here, without changing it.
pub fn look(path: &Path) -> Result<(), StoreError> {
    open_store(path).map(drop)
}

/// Opens for reading what is a store; anything else is left as it is.
fn open_store(path: &Path) -> Result<Connection, StoreError> {
    let not_one = |got: &dyn std::fmt::Display| {
        StoreError::invalid("store", format!("{}: {got}", path.display()), "a store's file")
    };
    if let Err(error) = File::open(path) {
        return Err(match error.kind() {
            io::ErrorKind::NotFound => not_one(&"no such file"),
            _ => unavailable(path, &error),
        });
    }
    let connection = schema::open_reader(path).map_err(|error| match error {
        StoreError::Damaged(why) => not_one(&why),
        error => error,
    })?;
    match connection.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0)) {
        Ok(version @ 1..=schema::VERSION) => {
            let sql = "SELECT count(*) FROM sqlite_schema WHERE name IN ('meta', 'hot', 'block', 'col')";
            match connection.query_row(sql, [], |row| row.get::<_, i64>(0)) {
                Ok(4) => Ok(connection),
                Ok(_) => Err(not_one(&format_args!("tables of something else, version {version}"))),
                Err(error) => Err(error.into()),
            }
        }
        Ok(0) => Err(not_one(&"a file of something else")),
        Ok(newer) => Err(StoreError::invalid(
            "the store's version",
            newer,
            format!("at most {}: it was written by a newer relay", schema::VERSION),
        )),
        Err(error) => match StoreError::from(error) {
            StoreError::Damaged(why) => Err(not_one(&why)),
            error => Err(error),
        },
    }
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What SQLite says about its pages; empty if all is well.
    pub pages: Vec<String>,
    /// Blocks that were read.
    pub blocks: u64,
    /// Events in them, and in batches that are no blocks yet.
    pub events: u64,
    /// Blocks that cannot be read, by their numbers.
    pub damaged_blocks: Vec<i64>,
    /// Batches that cannot be read, by their numbers.
    pub damaged_batches: Vec<i64>,
}

impl CheckReport {
    /// True if nothing is damaged.
    pub fn is_whole(&self) -> bool {
        self.pages.is_empty() && self.damaged_blocks.is_empty() && self.damaged_batches.is_empty()
    }
}

/// Reads all of a store, also beside a process that writes to it; tells how many events it
/// has read so far.
pub fn check(path: &Path, mut progress: impl FnMut(u64)) -> Result<CheckReport, StoreError> {
    let connection = open_store(path)?;
    connection.execute_batch("BEGIN")?;
    let mut report = CheckReport::default();
    let mut statement = connection.prepare("PRAGMA quick_check(20)")?;
    for line in statement.query_map([], |row| row.get::<_, String>(0))? {
        report.pages.push(line?);
    }
    report.pages.retain(|line| line != "ok");
    each_block(
        &connection,
        |_, _| true,
        |meta, events| {
            match events {
                Ok(events) => {
                    (report.blocks, report.events) = (report.blocks + 1, report.events + events.len() as u64)
                }
                Err(_) => report.damaged_blocks.push(meta.id),
            }
            progress(report.events);
            Ok(())
        },
    )?;
    each_batch(&connection, |n, _, events| {
        match events {
            Some(events) => report.events += events.len() as u64,
            None => report.damaged_batches.push(n),
        }
        Ok(())
    })?;
    Ok(report)
}

/// Writes events, each as a line of JSON, also beside a process that writes to the store:
/// what was there when it began. Behind all events of a tenant, or of all, stands what is
/// known about who is who (see [`KnownFact`]); a part of them has nothing of that.
pub fn export(path: &Path, wanted: &Wanted, out: &mut impl Write) -> Result<ExportReport, StoreError> {
    let connection = open_store(path)?;
    connection.execute_batch("BEGIN")?;
    let sites = sites(&connection, wanted.tenant.as_deref())?;
    let mut report = ExportReport::default();
    let range_ms = &wanted.range_ms;
    let mut write = |events: Option<Vec<Event>>| {
        let Some(events) = events else {
            report.damaged += 1;
            return Ok(());
        };
        for event in events.iter().filter(|event| range_ms.contains(&event.time_ms())) {
            lines::write_event(out, event)?;
            report.events += 1;
        }
        Ok(())
    };
    let is_wanted = |site: i64, meta: &BlockMeta| {
        sites.contains(&site) && meta.first_ms <= *range_ms.end() && *range_ms.start() <= meta.last_ms
    };
    each_block(&connection, is_wanted, |_, events| write(events.ok()))?;
    each_batch(&connection, |_, site, events| if sites.contains(&site) { write(events) } else { Ok(()) })?;
    if wanted.has_facts() {
        facts_file::each_fact(&connection, wanted.tenant.as_deref(), |fact| {
            report.facts += 1;
            lines::write_fact(out, fact)
        })?;
    }
    lines::finish(out)?;
    Ok(report)
}

fn sites(connection: &Connection, tenant: Option<&str>) -> Result<HashSet<i64>, StoreError> {
    let sql = "SELECT site.id FROM site JOIN tenant ON tenant.id = tenant WHERE ?1 IS NULL OR name = ?1";
    let mut statement = connection.prepare(sql)?;
    Ok(statement.query_map([tenant], |row| row.get(0))?.collect::<Result<_, _>>()?)
}

fn each_block(
    connection: &Connection,
    is_wanted: impl Fn(i64, &BlockMeta) -> bool,
    mut each: impl FnMut(&BlockMeta, Result<Vec<Event>, StoreError>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut sites: Vec<i64> = sites(connection, None)?.into_iter().collect();
    sites.sort_unstable();
    for site in sites {
        let mut blocks = Vec::new();
        blocks_of(connection, site, &mut blocks)?;
        for meta in blocks.iter().filter(|meta| is_wanted(site, meta)) {
            let events = match Block::new(connection, meta).all_events() {
                Err(error @ (StoreError::Unavailable(_) | StoreError::Closed)) => return Err(error),
                events => events,
            };
            each(meta, events)?;
        }
    }
    Ok(())
}

fn each_batch(
    connection: &Connection,
    mut each: impl FnMut(i64, i64, Option<Vec<Event>>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut statement = connection.prepare("SELECT n, site, events FROM hot ORDER BY id")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let bytes: Vec<u8> = row.get(2)?;
        each(row.get(0)?, row.get(1)?, hot::decode(&bytes))?;
    }
    Ok(())
}
