//! What is done to a store beside writing and asking.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
};

use analytics_relay_providers::Event;
use deadpool_postgres::{Object, Transaction};
use tokio_postgres::{IsolationLevel, Row, types::ToSql};
use uuid::Uuid;

use super::{
    CheckReport, Shared, Stats, Upkept, connect,
    facts::{self, FactTables},
    rows::{self, kept},
    scan::place,
    schema,
    slow::Slow,
    time::Ts,
    timescale,
    write::SESSION,
};
use crate::{
    AsOf, Deleted, StoreError, Subject, TenantScope,
    lines::{self, ExportReport, Wanted},
    model::DAY_MS,
};

/// Rows that are looked at at once.
const AT_ONCE: i32 = 4_000;
/// How long a statement may take that goes through all there is; and that it is planned for its
/// values: a plan for any would look at each day.
const PATIENCE: &str = "SET LOCAL statement_timeout = '1h'; SET LOCAL lock_timeout = '60s';
    SET LOCAL idle_in_transaction_session_timeout = '1h'; SET LOCAL plan_cache_mode = force_custom_plan";

/// The tenants that have events before a time.
pub(super) async fn tenants_before(connection: &Object, time_ms: i64) -> Result<Vec<String>, StoreError> {
    let sql = "SELECT DISTINCT tenant FROM relay_site WHERE events > 0 AND first_ms < $1";
    let rows = connection.query(sql, &[&time_ms]).await?;
    Ok(rows.iter().map(|row| rows::told(row.get(0))).collect())
}

/// How many events there are, and up to when they go: of sums that are kept with them.
pub(super) async fn as_of(connection: &Object, of: &TenantScope) -> Result<AsOf, StoreError> {
    let (tenant, sources) = place(of);
    let sql = "SELECT coalesce(sum(events), 0)::bigint, max(last_ms) FROM relay_site
        WHERE tenant = $1 AND ($2::text[] IS NULL OR website_id = ANY($2)) AND events > 0";
    let statement = connection.prepare_cached(sql).await?;
    let row = connection.query_one(&statement, &[&tenant, &sources]).await?;
    Ok(AsOf { events: row.get::<_, i64>(0).max(0) as u64, last_ms: row.get(1) })
}

pub(super) async fn stats(connection: &Object, shared: &Shared) -> Result<Stats, StoreError> {
    let _asked = shared.slow.watch("stats");
    let sql = "SELECT coalesce(sum(events), 0)::bigint, count(*), min(first_ms), max(last_ms) FROM relay_site WHERE events > 0";
    let row = connection.query_one(sql, &[]).await?;
    let [events, sites] = [0, 1].map(|at| row.get::<_, i64>(at).max(0) as u64);
    let mut stats = Stats { events, sites, first_ms: row.get(2), last_ms: row.get(3), ..Stats::default() };
    let sql = "SELECT coalesce(sum(pg_total_relation_size(oid)), 0)::bigint, count(*) FILTER (WHERE relname ~ '^events_d-?[0-9]')
        FROM pg_class WHERE relkind = 'r' AND relname ~ '^(events|session|hourly|user_identities|relay_)'
            AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'relay_meta'::regclass)";
    let row = connection.query_one(sql, &[]).await?;
    [stats.bytes, stats.partitions] = [0, 1].map(|at| row.get::<_, i64>(at).max(0) as u64);
    if shared.opened.timescaledb.is_some() {
        let row = connection.query_one(timescale::CHUNKS, &[]).await?;
        let [bytes, chunks] = [0, 1].map(|at| row.get::<_, i64>(at).max(0) as u64);
        stats.bytes += bytes;
        stats.partitions = chunks;
    }
    let sql = "SELECT to_regclass('events_default') IS NOT NULL";
    if connection.query_one(sql, &[]).await?.get(0) {
        // Counted often: not further than a person wants to know.
        let sql = "SELECT count(*) FROM (SELECT FROM events_default LIMIT 1000000) AS counted";
        let row = connection.query_one(sql, &[]).await?;
        stats.default_events = row.get::<_, i64>(0).max(0) as u64;
    }
    Ok(stats)
}

/// Makes partitions, and drops those that have nothing from a time on.
pub(super) async fn upkeep(
    connection: &mut Object,
    shared: &Shared,
    now_ms: i64,
    kept_from_ms: Option<i64>,
) -> Result<(Upkept, BTreeSet<i64>), StoreError> {
    let mut upkept = Upkept::default();
    if shared.opened.timescaledb.is_some() {
        if let Some(from_ms) = kept_from_ms {
            let transaction = begin(connection).await?;
            let _asked = shared.slow.watch("upkeep");
            forget_hours(&transaction, from_ms).await?;
            let row = transaction.query_one(timescale::DROP_CHUNKS, &[&Ts::of(from_ms)]).await?;
            upkept.dropped = row.get::<_, i64>(0).max(0) as u64;
            if upkept.dropped > 0 {
                recount(&transaction).await?;
            }
            transaction.commit().await?;
        }
        let _asked = shared.slow.watch("upkeep");
        timescale::refresh(connection, now_ms, kept_from_ms).await?;
        connection.batch_execute(connect::SESSION).await?;
        return Ok((upkept, BTreeSet::new()));
    }
    let transaction = begin(connection).await?;
    let mut days = schema::days(&transaction).await?;
    transaction.commit().await?;
    for day in schema::days_ahead(now_ms).filter(|day| !days.contains(day)).collect::<Vec<_>>() {
        // Each for itself: nobody waits long.
        let transaction = begin(connection).await?;
        let _asked = shared.slow.watch("upkeep");
        days = schema::days(&transaction).await?;
        if let Some(moved) = schema::make_partition(&transaction, day, &mut days).await? {
            upkept.made += 1;
            upkept.moved += moved;
        }
        transaction.commit().await?;
    }
    if let Some(from_ms) = kept_from_ms {
        let old: Vec<i64> = days.iter().copied().filter(|day| (day + 1) * DAY_MS <= from_ms).collect();
        for day in old {
            drop_day(connection, day, &shared.slow).await?;
            days.remove(&day);
            upkept.dropped += 1;
        }
    }
    Ok((upkept, days))
}

/// Drops a day with all its events, and takes them out of what is summed up.
async fn drop_day(connection: &mut Object, day: i64, slow: &Slow) -> Result<(), StoreError> {
    let transaction = begin(connection).await?;
    let _asked = slow.watch("upkeep");
    if schema::days(&transaction).await?.contains(&day) {
        let name = schema::partition(day);
        transaction
            .batch_execute(&format!("ALTER TABLE events DETACH PARTITION \"{name}\"; DROP TABLE \"{name}\""))
            .await?;
        let (from, to) = (Ts::of(day * DAY_MS), Ts::of((day + 1) * DAY_MS));
        let sql = "DELETE FROM hourly WHERE hour >= $1 AND hour < $2";
        transaction.execute(sql, &[&from, &to]).await?;
        // One that reached over midnight is of the day before, which goes first.
        transaction.execute("DELETE FROM session WHERE last < $1", &[&to]).await?;
        recount(&transaction).await?;
    }
    Ok(transaction.commit().await?)
}

async fn forget_hours(transaction: &Transaction<'_>, from_ms: i64) -> Result<(), StoreError> {
    let day = Ts::of(from_ms.div_euclid(DAY_MS) * DAY_MS);
    transaction.execute("DELETE FROM hourly WHERE hour < $1", &[&day]).await?;
    transaction.execute("DELETE FROM session WHERE last < $1", &[&day]).await?;
    Ok(())
}

/// Begins to write something that may take long.
async fn begin(connection: &mut Object) -> Result<Transaction<'_>, StoreError> {
    let transaction = connection.transaction().await?;
    transaction.batch_execute(PATIENCE).await?;
    schema::lock(&transaction).await?;
    Ok(transaction)
}

/// Of when a website has events.
const TIMES: &str = "first_ms = (SELECT min(time_ms) FROM events WHERE (tenant, website_id) = (site.tenant, site.website_id)
        AND \"timestamp\" = (SELECT min(\"timestamp\") FROM events WHERE (tenant, website_id) = (site.tenant, site.website_id))),
    last_ms = (SELECT max(time_ms) FROM events WHERE (tenant, website_id) = (site.tenant, site.website_id)
        AND \"timestamp\" = (SELECT max(\"timestamp\") FROM events WHERE (tenant, website_id) = (site.tenant, site.website_id)))";

/// Brings up how many events websites have, and of when, after days went as a whole.
async fn recount(transaction: &Transaction<'_>) -> Result<(), StoreError> {
    let sql = format!(
        "UPDATE relay_site AS site SET {TIMES}, events = (
            SELECT coalesce(sum(n), 0) FROM hourly WHERE (tenant, website_id) = (site.tenant, site.website_id))"
    );
    transaction.execute(&sql, &[]).await?;
    transaction.execute("DELETE FROM relay_site WHERE events = 0", &[]).await?;
    Ok(())
}

/// Keys of events of a tenant that are to be deleted: at most [`AT_ONCE`].
#[derive(Debug, Default)]
struct Piece {
    websites: Vec<String>,
    times: Vec<Ts>,
    ids: Vec<Uuid>,
}

impl Piece {
    /// Adds the event of a row that has its key from a column on.
    fn add(&mut self, row: &Row, at: usize) {
        self.websites.push(row.get(at));
        self.times.push(row.get(at + 1));
        self.ids.push(row.get(at + 2));
    }

    /// Where it ends.
    fn last(&self) -> Option<Behind> {
        let (website, time, id) = (self.websites.last()?, self.times.last()?, self.ids.last()?);
        Some(Behind { website: website.clone(), time: *time, id: *id })
    }

    /// The same by websites, and by days where that spares looking at others.
    fn parts(self, by_day: bool) -> BTreeMap<(String, i64), (Vec<Ts>, Vec<Uuid>)> {
        let mut parts = BTreeMap::<_, (Vec<Ts>, Vec<Uuid>)>::new();
        for ((website, time), id) in self.websites.into_iter().zip(self.times).zip(self.ids) {
            let day = if by_day { time.last_ms().div_euclid(DAY_MS) } else { 0 };
            let (times, ids) = parts.entry((website, day)).or_default();
            times.push(time);
            ids.push(id);
        }
        parts
    }
}

/// What events that are deleted were of.
#[derive(Debug, Default)]
struct Touched {
    websites: BTreeSet<String>,
    sessions: BTreeSet<i64>,
}

/// Deletes events, with all that is summed up of them by hours and websites. The times of all of
/// them together spare a look at others: where events are kept by column, all that is looked at
/// is taken out of there.
const DELETE: &str = "WITH gone AS (
        DELETE FROM events AS e USING unnest($3::timestamptz[], $4::uuid[]) AS g(ts, id)
        WHERE e.tenant = $1 AND e.website_id = $2 AND e.\"timestamp\" BETWEEN $5 AND $6
            AND (e.\"timestamp\", e.id) = (g.ts, g.id)
        RETURNING e.\"timestamp\", e.event_type, e.session_key, e.session_id
    ), fewer AS (
        UPDATE hourly SET n = hourly.n - g.n FROM (
            SELECT date_trunc('hour', \"timestamp\") AS hour, event_type, count(*) AS n FROM gone GROUP BY 1, 2
        ) AS g WHERE (tenant, website_id) = ($1, $2) AND (hourly.hour, hourly.event_type) = (g.hour, g.event_type)
    ), less AS (
        UPDATE relay_site SET events = events - (SELECT count(*) FROM gone) WHERE (tenant, website_id) = ($1, $2)
    ) SELECT count(*), coalesce(array_agg(DISTINCT session_key) FILTER (WHERE session_id IS NOT NULL), '{}') FROM gone";

/// Deletes some events, and says of what they were.
async fn delete(
    transaction: &Transaction<'_>,
    tenant: &str,
    piece: Piece,
    timescaledb: bool,
    touched: &mut Touched,
) -> Result<u64, StoreError> {
    let mut events = 0;
    let statement = transaction.prepare_cached(DELETE).await?;
    for ((website, _), (times, ids)) in piece.parts(timescaledb) {
        let (first, last) = (times.iter().min(), times.iter().max());
        let parameters: [&(dyn ToSql + Sync); 6] = [&tenant, &website, &times, &ids, &first, &last];
        let row = transaction.query_one(&statement, &parameters).await?;
        events += row.get::<_, i64>(0);
        touched.sessions.extend(row.get::<_, Vec<i64>>(1));
        let sql = "DELETE FROM hourly WHERE tenant = $1 AND website_id = $2
            AND hour BETWEEN date_trunc('hour', $3::timestamptz) AND $4 AND n = 0";
        transaction.execute(sql, &[&tenant, &website, &first, &last]).await?;
        touched.websites.insert(website);
    }
    Ok(events.max(0) as u64)
}

/// What of websites and sessions is no sum is found anew of what is left of them.
async fn renew(transaction: &Transaction<'_>, tenant: &str, touched: &Touched) -> Result<(), StoreError> {
    let websites: Vec<&str> = touched.websites.iter().map(String::as_str).collect();
    let sessions: Vec<i64> = touched.sessions.iter().copied().collect();
    for sessions in sessions.chunks(AT_ONCE as usize) {
        renew_sessions(transaction, tenant, &websites, sessions).await?;
    }
    let of_these = "tenant = $1 AND website_id = ANY($2)";
    let sql = format!("UPDATE relay_site AS site SET {TIMES} WHERE {of_these}");
    transaction.execute(&sql, &[&tenant, &websites]).await?;
    let sql = format!("DELETE FROM relay_site WHERE {of_these} AND events = 0");
    transaction.execute(&sql, &[&tenant, &websites]).await?;
    Ok(())
}

/// Sessions are put together anew of what is left of them.
async fn renew_sessions(
    transaction: &Transaction<'_>,
    tenant: &str,
    websites: &[&str],
    sessions: &[i64],
) -> Result<(), StoreError> {
    let sql = "DELETE FROM session WHERE tenant = $1 AND website_id = ANY($2) AND session_key = ANY($3)
        RETURNING website_id, session_key, start, last";
    let gone = transaction.query(sql, &[&tenant, &websites, &sessions]).await?;
    let websites: Vec<&str> = gone.iter().map(|row| row.get(0)).collect();
    let keys: Vec<i64> = gone.iter().map(|row| row.get(1)).collect();
    let starts: Vec<Ts> = gone.iter().map(|row| row.get(2)).collect();
    let lasts: Vec<Ts> = gone.iter().map(|row| row.get(3)).collect();
    let (Some(first), Some(last)) = (starts.iter().min(), lasts.iter().max()) else { return Ok(()) };
    let sql = format!(
        "INSERT INTO session AS s {SESSION} FROM (
            SELECT e.* FROM unnest($2::text[], $3::bigint[], $4::timestamptz[], $5::timestamptz[]) AS g(website_id, session_key, start, last)
            JOIN events AS e ON e.tenant = $1 AND e.website_id = g.website_id AND e.\"timestamp\" BETWEEN g.start AND g.last
                AND e.session_key = g.session_key AND e.\"timestamp\" BETWEEN $6 AND $7
        ) AS left_over WHERE session_id IS NOT NULL AND NOT is_bot GROUP BY 1, 2, 3"
    );
    transaction.execute(&sql, &[&tenant, &websites, &keys, &starts, &lasts, first, last]).await?;
    Ok(())
}

/// How far a deletion of what is too old has come in a tenant.
#[derive(Debug)]
pub(super) struct Behind {
    website: String,
    time: Ts,
    id: Uuid,
}

impl Default for Behind {
    /// Nowhere.
    fn default() -> Self {
        Self { website: String::new(), time: Ts::of(i64::MIN), id: Uuid::nil() }
    }
}

/// Deletes some of what is older than a time. Returns how many events, and whether it came to
/// the end.
pub(super) async fn retain(
    connection: &mut Object,
    tenant: &str,
    from_ms: i64,
    shared: &Shared,
    behind: &mut Behind,
) -> Result<(u64, bool), StoreError> {
    let tenant = kept(tenant);
    let transaction = begin(connection).await?;
    let _asked = shared.slow.watch("retain");
    // What was deleted is not looked through again.
    let sql = format!(
        "SELECT website_id, \"timestamp\", id FROM events WHERE tenant = $1 AND \"timestamp\" <= $2 AND time_ms < $3
            AND (website_id, \"timestamp\", id) >= ($4, $5, $6)
        ORDER BY website_id, \"timestamp\", id LIMIT {AT_ONCE}"
    );
    let parameters: [&(dyn ToSql + Sync); 6] =
        [&tenant, &Ts::of(from_ms), &from_ms, &behind.website, &behind.time, &behind.id];
    let mut piece = Piece::default();
    for row in transaction.query(&sql, &parameters).await? {
        piece.add(&row, 0);
    }
    let (is_full, last) = (piece.ids.len() >= AT_ONCE as usize, piece.last());
    let (timescaledb, mut touched) = (shared.opened.timescaledb.is_some(), Touched::default());
    let events = delete(&transaction, &tenant, piece, timescaledb, &mut touched).await?;
    let is_last = !is_full || events == 0;
    // What is left of sessions that are old as a whole goes with the next piece.
    let sql = "DELETE FROM session WHERE tenant = $1 AND website_id = ANY($2) AND session_key = ANY($3) AND last < $4";
    let websites: Vec<&str> = touched.websites.iter().map(String::as_str).collect();
    let sessions: Vec<i64> = touched.sessions.iter().copied().collect();
    transaction.execute(sql, &[&tenant, &websites, &sessions, &Ts::of(from_ms)]).await?;
    renew(&transaction, &tenant, &touched).await?;
    transaction.commit().await?;
    if let Some(last) = last {
        *behind = last;
    }
    Ok((events, is_last))
}

/// Deletes somebody, with what is known about them, in one transaction: by pieces, that nobody
/// else sees before all are done.
pub(super) async fn erase(
    connection: &mut Object,
    tenant: &str,
    who: &Subject,
    shared: &Shared,
) -> Result<Deleted, StoreError> {
    let transaction = begin(connection).await?;
    let _asked = shared.slow.watch("erase");
    let facts = FactTables::new(&transaction, tenant, shared);
    let (doomed, forgotten) = facts.forget(who).await?;
    let tenant = kept(tenant);
    let (keys, names_device) = doomed.found_by(shared.keys);
    // An odd id stands in no column as it is.
    let sql = "SELECT event, website_id, \"timestamp\", id,
            who = ANY($2) OR ($3 AND anonymous_id IS NOT DISTINCT FROM $4)
        FROM events WHERE tenant = $1
        AND (who = ANY($2) OR ($3 AND (anonymous_id = $4 OR is_odd)) OR event_type = 'alias')";
    let device = names_device.map(|device| device.replace('\0', "\u{fffd}"));
    let statement = transaction.prepare(sql).await?;
    let parameters: [&(dyn ToSql + Sync); 4] = [&tenant, &keys, &device.is_some(), &device];
    // It shows what was there when it was made, whatever is deleted meanwhile.
    let portal = transaction.bind(&statement, &parameters).await?;
    let timescaledb = shared.opened.timescaledb.is_some();
    let (mut events, mut touched) = (0, Touched::default());
    loop {
        let rows = transaction.query_portal(&portal, AT_ONCE).await?;
        let mut piece = Piece::default();
        for row in &rows {
            // Of one that cannot be read it is its columns that say whose it is.
            let is_theirs = event_of(row.get(0)).map_or_else(|_| row.get(4), |event| doomed.includes(&event));
            if is_theirs {
                piece.add(row, 1);
            }
        }
        events += delete(&transaction, &tenant, piece, timescaledb, &mut touched).await?;
        if rows.len() < AT_ONCE as usize {
            break;
        }
    }
    renew(&transaction, &tenant, &touched).await?;
    transaction.commit().await?;
    Ok(Deleted { events, facts: forgotten, ..Deleted::default() })
}

fn event_of(json: &str) -> Result<Event, StoreError> {
    Event::from_json(json.as_bytes()).map_err(|_| StoreError::Damaged("an event is none".into()))
}

/// Begins to read one moment, for long.
async fn begin_to_read(connection: &mut Object) -> Result<Transaction<'_>, StoreError> {
    let transaction =
        connection.build_transaction().isolation_level(IsolationLevel::RepeatableRead).read_only(true);
    let transaction = transaction.start().await?;
    transaction.batch_execute(PATIENCE).await?;
    Ok(transaction)
}

/// Reads all events; what is in their columns must be what they say, and what is summed up
/// must be of them.
pub(super) async fn check(connection: &mut Object, shared: &Shared) -> Result<CheckReport, StoreError> {
    const WRONG_MAX: usize = 20;
    let transaction = begin_to_read(connection).await?;
    let mut report = CheckReport::default();
    let sql = "SELECT event, who, session_key, time_ms, event_type, id FROM events";
    let statement = transaction.prepare(sql).await?;
    let portal = transaction.bind(&statement, &[]).await?;
    loop {
        // Each piece: all of it takes long anyway.
        let asked = shared.slow.watch("check");
        let rows = transaction.query_portal(&portal, AT_ONCE).await?;
        drop(asked);
        for row in &rows {
            report.events += 1;
            let id: Uuid = row.get(5);
            let wrong = match event_of(row.get(0)).map(|event| rows::Row::of(&event, shared.keys)) {
                Ok(Ok(want)) => {
                    let found: (i64, i64, i64, &str, Uuid) =
                        (row.get(1), row.get(2), row.get(3), row.get(4), id);
                    found != (want.who, want.session_key, want.time_ms, &*want.event_type, want.id)
                }
                _ => true,
            };
            if wrong && report.wrong.len() < WRONG_MAX {
                report.wrong.push(format!("event {id}: its columns are not what it says"));
            }
        }
        if rows.len() < AT_ONCE as usize {
            break;
        }
    }
    let sums = "SELECT 'hourly', count(*) FROM (
            (SELECT tenant, website_id, hour, event_type, n FROM hourly) EXCEPT
            (SELECT tenant, website_id, date_trunc('hour', \"timestamp\"), event_type, count(*) FROM events GROUP BY 1, 2, 3, 4)) AS h
        UNION ALL SELECT 'relay_site', count(*) FROM (
            (SELECT tenant, website_id, events, first_ms, last_ms FROM relay_site WHERE events > 0) EXCEPT
            (SELECT tenant, website_id, count(*), min(time_ms), max(time_ms) FROM events GROUP BY 1, 2)) AS s";
    let _asked = shared.slow.watch("check");
    for row in transaction.query(sums, &[]).await? {
        let (table, count): (&str, i64) = (row.get(0), row.get(1));
        if count > 0 {
            report.wrong.push(format!("{table}: {count} rows are not what the events say"));
        }
    }
    Ok(report)
}

/// Writes what is wanted as lines.
pub(super) async fn export(
    connection: &mut Object,
    wanted: &Wanted,
    out: impl Write + Send + 'static,
    slow: &Slow,
) -> Result<ExportReport, StoreError> {
    let transaction = begin_to_read(connection).await?;
    let mut report = ExportReport::default();
    let tenant = wanted.tenant.as_deref().map(kept);
    let (from_ms, to_ms) = (*wanted.range_ms.start(), *wanted.range_ms.end());
    let sql = "SELECT event FROM events WHERE ($1::text IS NULL OR tenant = $1)
        AND \"timestamp\" BETWEEN $2 AND $3 AND time_ms BETWEEN $4 AND $5";
    let (first, last) = (Ts::of(from_ms), Ts::of(to_ms));
    let parameters: [&(dyn ToSql + Sync); 5] = [&tenant, &first, &last, &from_ms, &to_ms];
    let write = |row: &Row, out: &mut _| {
        let Ok(event) = event_of(row.get(0)) else { return Ok(false) };
        lines::write_event(out, &event).map(|()| true)
    };
    let (written, rows) = write_rows(&transaction, sql, &parameters, out, slow, write).await?;
    let mut out = written;
    (report.events, report.damaged) = (rows.written, rows.damaged);
    if wanted.has_facts() {
        for (what, read) in facts::EVERYWHERE {
            let sql = format!("SELECT {what} WHERE $1::text IS NULL OR tenant = $1");
            let write = move |row: &Row, out: &mut _| {
                lines::write_fact(out, &facts::fact_of(row, read)).map(|()| true)
            };
            let (written, rows) = write_rows(&transaction, &sql, &[&tenant], out, slow, write).await?;
            out = written;
            report.facts += rows.written;
        }
    }
    lines::finish(&mut out)?;
    Ok(report)
}

/// What became of rows that were to be written.
#[derive(Debug, Clone, Copy, Default)]
struct Written {
    written: u64,
    damaged: u64,
}

/// Writes the rows of a statement, few of which are in memory at once. `write` says whether it
/// could write one.
async fn write_rows<W: Write + Send + 'static>(
    transaction: &Transaction<'_>,
    sql: &str,
    parameters: &[&(dyn ToSql + Sync)],
    mut out: W,
    slow: &Slow,
    write: impl Fn(&Row, &mut W) -> Result<bool, StoreError> + Copy + Send + 'static,
) -> Result<(W, Written), StoreError> {
    let statement = transaction.prepare(sql).await?;
    let portal = transaction.bind(&statement, parameters).await?;
    let mut sum = Written::default();
    loop {
        // Each piece: all of it takes long anyway, and whoever reads it may be slow.
        let asked = slow.watch("export");
        let rows = transaction.query_portal(&portal, AT_ONCE).await?;
        drop(asked);
        let is_last = rows.len() < AT_ONCE as usize;
        // Whoever reads what is written may be slow.
        let written = tokio::task::spawn_blocking(move || {
            for row in &rows {
                match write(row, &mut out)? {
                    true => sum.written += 1,
                    false => sum.damaged += 1,
                }
            }
            Ok::<_, StoreError>((out, sum))
        });
        let written = written.await.map_err(|_| StoreError::Unavailable("writing panicked".into()))?;
        (out, sum) = written?;
        if is_last {
            return Ok((out, sum));
        }
    }
}
