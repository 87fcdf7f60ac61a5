//! Writing: a batch is one transaction.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Write as _,
    sync::LazyLock,
};

use analytics_relay_providers::Event;
use deadpool_postgres::Transaction;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::{
    rows::{Row, TEXTS},
    time::Ts,
};
use crate::{Appended, StoreError};

/// So many events are forgotten at once by their ids alone.
const FORGOTTEN_AT_ONCE: i64 = 10_000;

/// What becomes of the rows that are new, all in one statement: they are kept, and sums that
/// people ask by SQL take them in. What was there changes no sum.
static INSERT: LazyLock<String> = LazyLock::new(|| {
    let fixed = [
        ("tenant", "text"),
        ("website_id", "text"),
        ("\"timestamp\"", "timestamptz"),
        ("id", "uuid"),
        ("time_ms", "bigint"),
        ("created_at", "timestamptz"),
        ("event_type", "text"),
        ("class", "smallint"),
        ("is_bot", "boolean"),
        ("is_odd", "boolean"),
        ("who", "bigint"),
        ("session_key", "bigint"),
        ("time_on_page", "float8"),
    ];
    let all = fixed.into_iter().chain(TEXTS.map(|name| (name, "text")));
    let (mut names, mut arrays, mut values) = (String::new(), String::new(), String::new());
    for (number, (name, of)) in (1..).zip(all) {
        let comma = if number == 1 { "" } else { ", " };
        let cast = if name == "properties" { "::jsonb" } else { "" };
        let _ = write!(names, "{comma}{name}");
        let _ = write!(arrays, "{comma}${number}::{of}[]");
        let _ = write!(values, "{comma}{name}{cast}");
    }
    format!(
        "WITH new AS (
            INSERT INTO events ({names}) SELECT {values} FROM unnest({arrays}) AS t({names})
            ON CONFLICT DO NOTHING RETURNING {names}
        ), hours AS (
            INSERT INTO hourly (tenant, website_id, hour, event_type, n)
            SELECT tenant, website_id, date_trunc('hour', \"timestamp\"), event_type, count(*) FROM new GROUP BY 1, 2, 3, 4
            ON CONFLICT (tenant, website_id, hour, event_type) DO UPDATE SET n = hourly.n + excluded.n
        ), sites AS (
            INSERT INTO relay_site (tenant, website_id, events, first_ms, last_ms)
            SELECT tenant, website_id, count(*), min(time_ms), max(time_ms) FROM new GROUP BY 1, 2
            ON CONFLICT (tenant, website_id) DO UPDATE SET events = relay_site.events + excluded.events,
                first_ms = least(relay_site.first_ms, excluded.first_ms),
                last_ms = greatest(relay_site.last_ms, excluded.last_ms)
        ), sessions AS (
            INSERT INTO session AS s {SESSION} FROM new WHERE session_id IS NOT NULL AND NOT is_bot GROUP BY 1, 2, 3
            ON CONFLICT (tenant, website_id, session_key) DO UPDATE SET {JOINED}
        ) SELECT tenant, id FROM new"
    )
});

/// A session of the client's, from its events.
pub(super) const SESSION: &str = "(tenant, website_id, session_key, session_id, visitor_id, start, last, views,
    events, entry, exit, referrer, source, channel, campaign, country, browser, os, device)
    SELECT tenant, website_id, session_key, min(session_id), min(visitor_id), min(\"timestamp\"), max(\"timestamp\"),
        count(*) FILTER (WHERE class = 0), count(*),
        (array_agg(page ORDER BY \"timestamp\") FILTER (WHERE class = 0))[1],
        (array_agg(page ORDER BY \"timestamp\" DESC) FILTER (WHERE class = 0))[1],
        (array_agg(referrer ORDER BY \"timestamp\"))[1], (array_agg(source ORDER BY \"timestamp\"))[1],
        (array_agg(channel ORDER BY \"timestamp\"))[1], (array_agg(campaign ORDER BY \"timestamp\"))[1],
        (array_agg(country ORDER BY \"timestamp\"))[1], (array_agg(browser ORDER BY \"timestamp\"))[1],
        (array_agg(os ORDER BY \"timestamp\"))[1], (array_agg(device ORDER BY \"timestamp\"))[1]";

/// What more events make of one. Its first event says where it came from.
const JOINED: &str = "start = least(s.start, excluded.start), last = greatest(s.last, excluded.last),
    views = s.views + excluded.views, events = s.events + excluded.events,
    entry = CASE WHEN excluded.views > 0 AND (s.views = 0 OR excluded.start < s.start) THEN excluded.entry ELSE s.entry END,
    exit = CASE WHEN excluded.views > 0 AND (s.views = 0 OR excluded.last >= s.last) THEN excluded.exit ELSE s.exit END,
    referrer = CASE WHEN excluded.start < s.start THEN excluded.referrer ELSE s.referrer END,
    source = CASE WHEN excluded.start < s.start THEN excluded.source ELSE s.source END,
    channel = CASE WHEN excluded.start < s.start THEN excluded.channel ELSE s.channel END,
    campaign = CASE WHEN excluded.start < s.start THEN excluded.campaign ELSE s.campaign END";

/// What of a batch is kept.
pub(super) struct Kept<'e> {
    pub(super) verdicts: Vec<Appended>,
    /// The events that are new, by tenant, in the order in which they came.
    pub(super) new: BTreeMap<&'e str, Vec<&'e Event>>,
}

/// Keeps those of a batch that are new. It is the only one that writes until the transaction
/// is over.
pub(super) async fn append<'e>(
    transaction: &Transaction<'_>,
    batch: &'e [Event],
    rows: &[Result<Row, String>],
    window: usize,
) -> Result<Kept<'e>, StoreError> {
    let mut verdicts: Vec<Appended> = rows
        .iter()
        .map(|row| match row {
            Ok(_) => Appended::Duplicate,
            Err(why) => Appended::Unstorable(why.clone()),
        })
        .collect();
    let ids: Vec<i64> = rows.iter().flatten().map(|row| row.h).collect();
    let mut seen = seen(transaction, &ids).await?;
    let candidates: Vec<(usize, &Row)> = rows
        .iter()
        .enumerate()
        .filter_map(|(at, row)| row.as_ref().ok().map(|row| (at, row)))
        .filter(|(_, row)| seen.insert(row.h))
        .collect();
    if candidates.is_empty() {
        return Ok(Kept { verdicts, new: BTreeMap::new() });
    }
    let inserted = insert(transaction, &candidates).await?;
    let (mut new, mut hashes) = (BTreeMap::<&str, Vec<&Event>>::new(), Vec::new());
    for (at, row) in candidates {
        if inserted.contains(&(row.tenant.clone(), row.id)) {
            verdicts[at] = Appended::New;
            hashes.push(row.h);
            new.entry(batch[at].tenant().unwrap_or_default()).or_default().push(&batch[at]);
        }
    }
    remember(transaction, &hashes, window).await?;
    Ok(Kept { verdicts, new })
}

/// Takes the website from events whose callers name one, and no key, where the tenant has as
/// many as it may have: each costs rows of sums and sessions of its own. Returns of how many.
pub(super) async fn bound_sites(
    transaction: &Transaction<'_>,
    batch: &[Event],
    rows: &mut [Result<Row, String>],
    sites_max: usize,
) -> Result<u64, StoreError> {
    // In the order in which they came.
    let (mut named, mut given) = (Vec::new(), HashSet::new());
    for (event, row) in batch.iter().zip(&*rows) {
        let Ok(row) = row else { continue };
        let place = (row.tenant.clone(), row.website_id.clone());
        match event.source() {
            Some(_) => drop(given.insert(place)),
            None if !place.1.is_empty() => named.push(place),
            None => {}
        }
    }
    named.retain(|place| !given.contains(place));
    let new = new_sites(transaction, named).await?;
    if new.is_empty() {
        return Ok(0);
    }
    let tenants: Vec<&str> = new.iter().map(|(tenant, _)| &**tenant).collect();
    let sql = "SELECT tenant, count(*) FROM relay_site WHERE tenant = ANY($1) AND events > 0 GROUP BY tenant";
    let statement = transaction.prepare_cached(sql).await?;
    let counted = transaction.query(&statement, &[&tenants]).await?;
    let mut counts: HashMap<String, i64> = counted.iter().map(|row| (row.get(0), row.get(1))).collect();
    let (mut refused, sites_max) = (HashSet::new(), i64::try_from(sites_max).unwrap_or(i64::MAX));
    for place in new {
        let count = counts.entry(place.0.clone()).or_default();
        *count += 1;
        if *count > sites_max {
            refused.insert(place);
        }
    }
    let mut without = 0;
    for row in rows.iter_mut().flatten() {
        if refused.contains(&(row.tenant.clone(), row.website_id.clone())) {
            row.website_id.clear();
            without += 1;
        }
    }
    Ok(without)
}

/// Those of websites that have no events yet, each once.
async fn new_sites(
    transaction: &Transaction<'_>,
    mut named: Vec<(String, String)>,
) -> Result<Vec<(String, String)>, StoreError> {
    let mut met = HashSet::new();
    named.retain(|place| met.insert(place.clone()));
    if named.is_empty() {
        return Ok(named);
    }
    let (tenants, websites): (Vec<&str>, Vec<&str>) =
        named.iter().map(|(tenant, website)| (&**tenant, &**website)).unzip();
    let sql = "SELECT tenant, website_id FROM relay_site
        WHERE events > 0 AND (tenant, website_id) IN (SELECT * FROM unnest($1::text[], $2::text[]))";
    let statement = transaction.prepare_cached(sql).await?;
    let rows = transaction.query(&statement, &[&tenants, &websites]).await?;
    let known: HashSet<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    named.retain(|place| !known.contains(place));
    Ok(named)
}

async fn seen(transaction: &Transaction<'_>, ids: &[i64]) -> Result<HashSet<i64>, StoreError> {
    let statement = transaction.prepare_cached("SELECT h FROM relay_seen WHERE h = ANY($1)").await?;
    Ok(transaction.query(&statement, &[&ids]).await?.iter().map(|row| row.get(0)).collect())
}

/// Inserts rows; which are new, by tenant and id.
async fn insert(
    transaction: &Transaction<'_>,
    rows: &[(usize, &Row)],
) -> Result<HashSet<(String, Uuid)>, StoreError> {
    fn of<'r, T>(rows: &[(usize, &'r Row)], get: impl Fn(&'r Row) -> T) -> Vec<T> {
        rows.iter().map(|(_, row)| get(row)).collect()
    }
    let texts: Vec<Vec<Option<&str>>> =
        (0..TEXTS.len()).map(|place| of(rows, |row| row.texts[place].as_deref())).collect();
    let columns: [Box<dyn ToSql + Sync + Send>; 13] = [
        Box::new(of(rows, |row| row.tenant.clone())),
        Box::new(of(rows, |row| row.website_id.clone())),
        Box::new(of::<Ts>(rows, |row| row.timestamp)),
        Box::new(of(rows, |row| row.id)),
        Box::new(of(rows, |row| row.time_ms)),
        Box::new(of::<Ts>(rows, |row| row.created_at)),
        Box::new(of(rows, |row| row.event_type.clone())),
        Box::new(of(rows, |row| row.class)),
        Box::new(of(rows, |row| row.is_bot)),
        Box::new(of(rows, |row| row.is_odd)),
        Box::new(of(rows, |row| row.who)),
        Box::new(of(rows, |row| row.session_key)),
        Box::new(of(rows, |row| row.time_on_page)),
    ];
    let mut parameters: Vec<&(dyn ToSql + Sync)> = Vec::with_capacity(columns.len() + texts.len());
    parameters.extend(columns.iter().map(|column| &**column as &(dyn ToSql + Sync)));
    parameters.extend(texts.iter().map(|column| column as &(dyn ToSql + Sync)));
    let statement = transaction.prepare_cached(&INSERT).await?;
    let inserted = transaction.query(&statement, &parameters).await?;
    Ok(inserted.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Remembers ids, and forgets the oldest of those that are too many.
async fn remember(transaction: &Transaction<'_>, ids: &[i64], window: usize) -> Result<(), StoreError> {
    if ids.is_empty() {
        return Ok(());
    }
    let sql = "WITH new AS (INSERT INTO relay_seen (h) SELECT unnest($1::bigint[]) ON CONFLICT DO NOTHING RETURNING n)
        SELECT max(n) FROM new";
    let statement = transaction.prepare_cached(sql).await?;
    let last: Option<i64> = transaction.query_one(&statement, &[&ids]).await?.get(0);
    let window = i64::try_from(window).unwrap_or(i64::MAX);
    let at_once = FORGOTTEN_AT_ONCE.min(window / 10 + 1);
    let Some(last) = last.filter(|last| *last > window) else { return Ok(()) };
    // Not each time: a few more are remembered.
    if last / at_once != (last - ids.len() as i64) / at_once {
        let statement = transaction.prepare_cached("DELETE FROM relay_seen WHERE h IN (SELECT h FROM relay_seen WHERE n <= $1 ORDER BY n LIMIT 100000)").await?;
        transaction.execute(&statement, &[&(last - window)]).await?;
    }
    Ok(())
}

/// The days that rows are of.
pub(super) fn days_of(rows: &[Result<Row, String>]) -> HashMap<i64, usize> {
    let mut days = HashMap::new();
    for row in rows.iter().flatten() {
        *days.entry(row.time_ms.div_euclid(crate::model::DAY_MS)).or_default() += 1;
    }
    days
}

/// Rows of events, one after the other.
pub(super) fn rows_of(batch: &[Event], keys: crate::model::Keys) -> Vec<Result<Row, String>> {
    batch.iter().map(|event| Row::of(event, keys)).collect()
}
