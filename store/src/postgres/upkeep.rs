//! What is done to a store beside writing and asking.

use std::{collections::BTreeSet, io::Write};

use analytics_relay_providers::Event;
use deadpool_postgres::{Object, Transaction};
use tokio_postgres::{IsolationLevel, types::ToSql};
use uuid::Uuid;

use super::{
    CheckReport, Shared, Stats, Upkept,
    facts::FactTables,
    rows::{Row, kept},
    scan::place,
    schema,
    time::Ts,
    timescale,
    write::SESSION,
};
use crate::{
    AsOf, Deleted, StoreError, Subject, TenantScope,
    lines::{self, ExportReport, Wanted},
    model::{DAY_MS, Keys},
};

/// Rows that are looked at at once.
const AT_ONCE: i32 = 4_000;
/// How long a statement may take that goes through all there is.
const PATIENCE: &str = "SET LOCAL statement_timeout = '1h'; SET LOCAL lock_timeout = '60s';
    SET LOCAL idle_in_transaction_session_timeout = '1h'";

/// How many events there are, and up to when they go: of sums that are kept with them.
pub(super) async fn as_of(connection: &Object, of: &TenantScope) -> Result<AsOf, StoreError> {
    let (tenant, sources) = place(of);
    let sql = "SELECT coalesce(sum(events), 0)::bigint, max(last_ms) FROM relay_site
        WHERE tenant = $1 AND ($2::text[] IS NULL OR website_id = ANY($2)) AND events > 0";
    let statement = connection.prepare_cached(sql).await?;
    let row = connection.query_one(&statement, &[&tenant, &sources]).await?;
    Ok(AsOf { events: row.get::<_, i64>(0).max(0) as u64, last_ms: row.get(1) })
}

pub(super) async fn stats(connection: &Object) -> Result<Stats, StoreError> {
    let sql = "SELECT coalesce(sum(events), 0)::bigint, count(*), min(first_ms), max(last_ms) FROM relay_site WHERE events > 0";
    let row = connection.query_one(sql, &[]).await?;
    let [events, sites] = [0, 1].map(|at| row.get::<_, i64>(at).max(0) as u64);
    let mut stats = Stats { events, sites, first_ms: row.get(2), last_ms: row.get(3), ..Stats::default() };
    let sql = "SELECT coalesce(sum(pg_total_relation_size(oid)), 0)::bigint, count(*) FILTER (WHERE relname ~ '^events_d-?[0-9]')
        FROM pg_class WHERE relkind = 'r' AND relname ~ '^(events|session|hourly|user_identities|relay_)'
            AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'relay_meta'::regclass)";
    let row = connection.query_one(sql, &[]).await?;
    [stats.bytes, stats.partitions] = [0, 1].map(|at| row.get::<_, i64>(at).max(0) as u64);
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
    timescaledb: bool,
    now_ms: i64,
    kept_from_ms: Option<i64>,
) -> Result<(Upkept, BTreeSet<i64>), StoreError> {
    let mut upkept = Upkept::default();
    if timescaledb {
        if let Some(from_ms) = kept_from_ms {
            let transaction = begin(connection).await?;
            forget_hours(&transaction, from_ms).await?;
            let row = transaction.query_one(timescale::DROP_CHUNKS, &[&Ts::of(from_ms)]).await?;
            upkept.dropped = row.get::<_, i64>(0).max(0) as u64;
            recount(&transaction, None).await?;
            transaction.commit().await?;
        }
        return Ok((upkept, BTreeSet::new()));
    }
    let transaction = begin(connection).await?;
    let mut days = schema::days(&transaction).await?;
    transaction.commit().await?;
    for day in schema::days_ahead(now_ms).filter(|day| !days.contains(day)).collect::<Vec<_>>() {
        // Each for itself: nobody waits long.
        let transaction = begin(connection).await?;
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
            drop_day(connection, day).await?;
            days.remove(&day);
            upkept.dropped += 1;
        }
    }
    Ok((upkept, days))
}

/// Drops a day with all its events, and takes them out of what is summed up.
async fn drop_day(connection: &mut Object, day: i64) -> Result<(), StoreError> {
    let transaction = begin(connection).await?;
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
        recount(&transaction, None).await?;
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

/// Brings up how many events websites have, and of when, after some are gone.
async fn recount(transaction: &Transaction<'_>, tenant: Option<&str>) -> Result<(), StoreError> {
    let sql = "UPDATE relay_site AS site SET
            events = (SELECT coalesce(sum(n), 0) FROM hourly WHERE (tenant, website_id) = (site.tenant, site.website_id)),
            first_ms = (SELECT min(time_ms) FROM events WHERE (tenant, website_id) = (site.tenant, site.website_id)
                AND \"timestamp\" = (SELECT min(\"timestamp\") FROM events WHERE (tenant, website_id) = (site.tenant, site.website_id))),
            last_ms = (SELECT max(time_ms) FROM events WHERE (tenant, website_id) = (site.tenant, site.website_id)
                AND \"timestamp\" = (SELECT max(\"timestamp\") FROM events WHERE (tenant, website_id) = (site.tenant, site.website_id)))
        WHERE $1::text IS NULL OR tenant = $1";
    transaction.execute(sql, &[&tenant]).await?;
    Ok(())
}

/// Deletes events, with all that is summed up of them; the last part of a statement that says
/// which in `gone`.
const GONE: &str = ", fewer AS (
        UPDATE hourly SET n = hourly.n - g.n FROM (
            SELECT tenant, website_id, date_trunc('hour', \"timestamp\") AS hour, event_type, count(*) AS n FROM gone GROUP BY 1, 2, 3, 4
        ) AS g WHERE (hourly.tenant, hourly.website_id, hourly.hour, hourly.event_type) = (g.tenant, g.website_id, g.hour, g.event_type)
    ) SELECT count(*), coalesce(array_agg(DISTINCT session_key) FILTER (WHERE session_id IS NOT NULL), '{}') FROM gone";

/// What a deletion leaves to be done: sessions are put together anew of what is left of them.
async fn after_deletion(
    transaction: &Transaction<'_>,
    tenant: &str,
    sessions: &[i64],
) -> Result<(), StoreError> {
    transaction.execute("DELETE FROM hourly WHERE tenant = $1 AND n = 0", &[&tenant]).await?;
    let sql = "DELETE FROM session WHERE tenant = $1 AND session_key = ANY($2)
        RETURNING website_id, session_key, start, last";
    let gone = transaction.query(sql, &[&tenant, &sessions]).await?;
    let websites: Vec<&str> = gone.iter().map(|row| row.get(0)).collect();
    let keys: Vec<i64> = gone.iter().map(|row| row.get(1)).collect();
    let starts: Vec<Ts> = gone.iter().map(|row| row.get(2)).collect();
    let lasts: Vec<Ts> = gone.iter().map(|row| row.get(3)).collect();
    let sql = format!(
        "INSERT INTO session AS s {SESSION} FROM (
            SELECT e.* FROM unnest($2::text[], $3::bigint[], $4::timestamptz[], $5::timestamptz[]) AS g(website_id, session_key, start, last)
            JOIN events AS e ON e.tenant = $1 AND e.website_id = g.website_id AND e.\"timestamp\" BETWEEN g.start AND g.last
                AND e.session_key = g.session_key
        ) AS left_over WHERE session_id IS NOT NULL AND NOT is_bot GROUP BY 1, 2, 3"
    );
    transaction.execute(&sql, &[&tenant, &websites, &keys, &starts, &lasts]).await?;
    recount(transaction, Some(tenant)).await
}

/// Deletes what is older than a time.
pub(super) async fn retain(
    connection: &mut Object,
    tenant: &str,
    from_ms: i64,
) -> Result<Deleted, StoreError> {
    let tenant = kept(tenant);
    let transaction = begin(connection).await?;
    let sql = format!(
        "WITH gone AS (DELETE FROM events WHERE tenant = $1 AND \"timestamp\" <= $2 AND time_ms < $3
            RETURNING tenant, website_id, \"timestamp\", event_type, session_key, session_id){GONE}"
    );
    let row = transaction.query_one(&sql, &[&tenant, &Ts::of(from_ms), &from_ms]).await?;
    let (events, sessions): (i64, Vec<i64>) = (row.get(0), row.get(1));
    if events > 0 {
        after_deletion(&transaction, &tenant, &sessions).await?;
    }
    transaction.commit().await?;
    Ok(Deleted { events: events.max(0) as u64, ..Deleted::default() })
}

/// Deletes somebody, with what is known about them, in one transaction.
pub(super) async fn erase(
    connection: &mut Object,
    tenant: &str,
    who: &Subject,
    shared: &Shared,
) -> Result<Deleted, StoreError> {
    let transaction = begin(connection).await?;
    let facts = FactTables::new(&transaction, tenant, shared);
    let (doomed, forgotten) = facts.forget(who).await?;
    let tenant = kept(tenant);
    let (keys, names_device) = doomed.found_by(shared.keys);
    // An odd id stands in no column as it is.
    let sql = "SELECT event, website_id, \"timestamp\", id FROM events WHERE tenant = $1
        AND (who = ANY($2) OR ($3 AND (anonymous_id = $4 OR is_odd)) OR event_type = 'alias')";
    let device = names_device.map(|device| device.replace('\0', "\u{fffd}"));
    let statement = transaction.prepare(sql).await?;
    let parameters: [&(dyn ToSql + Sync); 4] = [&tenant, &keys, &device.is_some(), &device];
    let portal = transaction.bind(&statement, &parameters).await?;
    let (mut websites, mut times, mut ids) = (Vec::<String>::new(), Vec::<Ts>::new(), Vec::<Uuid>::new());
    loop {
        let rows = transaction.query_portal(&portal, AT_ONCE).await?;
        for row in &rows {
            if doomed.includes(&event_of(row.get(0))?) {
                websites.push(row.get(1));
                times.push(row.get(2));
                ids.push(row.get(3));
            }
        }
        if rows.len() < AT_ONCE as usize {
            break;
        }
    }
    let sql = format!(
        "WITH gone AS (DELETE FROM events AS e USING unnest($2::text[], $3::timestamptz[], $4::uuid[]) AS g(website_id, ts, id)
            WHERE e.tenant = $1 AND (e.website_id, e.\"timestamp\", e.id) = (g.website_id, g.ts, g.id)
            RETURNING e.tenant, e.website_id, e.\"timestamp\", e.event_type, e.session_key, e.session_id){GONE}"
    );
    let row = transaction.query_one(&sql, &[&tenant, &websites, &times, &ids]).await?;
    let (events, sessions): (i64, Vec<i64>) = (row.get(0), row.get(1));
    if events > 0 {
        after_deletion(&transaction, &tenant, &sessions).await?;
    }
    transaction.commit().await?;
    Ok(Deleted { events: events.max(0) as u64, facts: forgotten, ..Deleted::default() })
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
pub(super) async fn check(connection: &mut Object, keys: Keys) -> Result<CheckReport, StoreError> {
    const WRONG_MAX: usize = 20;
    let transaction = begin_to_read(connection).await?;
    let mut report = CheckReport::default();
    let sql = "SELECT event, who, session_key, time_ms, event_type, id FROM events";
    let statement = transaction.prepare(sql).await?;
    let portal = transaction.bind(&statement, &[]).await?;
    loop {
        let rows = transaction.query_portal(&portal, AT_ONCE).await?;
        for row in &rows {
            report.events += 1;
            let id: Uuid = row.get(5);
            let wrong = match event_of(row.get(0)).map(|event| Row::of(&event, keys)) {
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
            (SELECT tenant, website_id, events, last_ms FROM relay_site WHERE events > 0) EXCEPT
            (SELECT tenant, website_id, count(*), max(time_ms) FROM events GROUP BY 1, 2)) AS s";
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
    mut out: impl Write + Send + 'static,
) -> Result<ExportReport, StoreError> {
    let transaction = begin_to_read(connection).await?;
    let mut report = ExportReport::default();
    let tenant = wanted.tenant.as_deref().map(kept);
    let (from_ms, to_ms) = (*wanted.range_ms.start(), *wanted.range_ms.end());
    let sql = "SELECT event FROM events WHERE ($1::text IS NULL OR tenant = $1)
        AND \"timestamp\" BETWEEN $2 AND $3 AND time_ms BETWEEN $4 AND $5";
    let statement = transaction.prepare(sql).await?;
    let (first, last) = (Ts::of(from_ms), Ts::of(to_ms));
    let parameters: [&(dyn ToSql + Sync); 5] = [&tenant, &first, &last, &from_ms, &to_ms];
    let portal = transaction.bind(&statement, &parameters).await?;
    loop {
        let rows = transaction.query_portal(&portal, AT_ONCE).await?;
        let is_last = rows.len() < AT_ONCE as usize;
        // Whoever reads what is written may be slow.
        let write = tokio::task::spawn_blocking(move || {
            let (mut events, mut damaged) = (0, 0);
            for row in &rows {
                match event_of(row.get(0)) {
                    Ok(event) => {
                        lines::write_event(&mut out, &event)?;
                        events += 1;
                    }
                    Err(_) => damaged += 1,
                }
            }
            Ok::<_, StoreError>((out, events, damaged))
        });
        let written = write.await.map_err(|_| StoreError::Unavailable("writing panicked".into()))?;
        let (back, events, damaged) = written?;
        out = back;
        report.events += events;
        report.damaged += damaged;
        if is_last {
            break;
        }
    }
    if wanted.has_facts() {
        for fact in super::facts::all(&transaction, tenant.as_deref()).await? {
            lines::write_fact(&mut out, &fact)?;
            report.facts += 1;
        }
    }
    lines::finish(&mut out)?;
    Ok(report)
}
