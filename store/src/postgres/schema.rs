//! The tables, and how they are brought up.

use std::collections::BTreeSet;

use deadpool_postgres::{Object, Transaction};
use ring::rand::{SecureRandom, SystemRandom};

use super::{slow::Slow, time::Ts, timescale};
use crate::{StoreError, model::DAY_MS};

/// Of the tables here; a store of a later one is not touched.
const VERSION: i64 = 1;
/// The oldest server that is known to do.
const SERVER_MIN: i32 = 130_000;
/// Held by whoever writes, until the end of their transaction: two who write at once would
/// decide about the same ids and people without knowing of each other.
const LOCK: i64 = 0x616e_616c_7974_6963;
/// Days from today on that have a partition before anything comes for them.
const DAYS_AHEAD: i64 = 7;
/// So long is waited for partitions by whoever has other things to do.
const DAYS_PATIENCE: &str = "SET LOCAL lock_timeout = '1s'; SET LOCAL statement_timeout = '5s'";

/// What each event has in columns, for people's own SQL and for questions. `event` is the
/// event itself, from which all else follows.
pub(super) const EVENTS: &str = r#"CREATE TABLE events (
    tenant text NOT NULL, website_id text NOT NULL, "timestamp" timestamptz NOT NULL, id uuid NOT NULL,
    time_ms bigint NOT NULL, created_at timestamptz NOT NULL,
    event_type text NOT NULL, class smallint NOT NULL, is_bot boolean NOT NULL, is_odd boolean NOT NULL,
    who bigint NOT NULL, session_key bigint NOT NULL,
    user_id text, visitor_id text, anonymous_id text, session_id text, user_agent text,
    page text, host text, referrer text, source text, channel text, medium text, campaign text, term text,
    content text, continent text, country text, region text, city text, browser text, browser_version text,
    os text, os_version text, device text, bot text,
    time_on_page double precision, properties jsonb, event text NOT NULL,
    PRIMARY KEY (tenant, website_id, "timestamp", id))"#;

const INDEXES: &str = r#"
CREATE INDEX events_who ON events (tenant, who, "timestamp");
CREATE INDEX events_type ON events (tenant, website_id, event_type, "timestamp") WHERE event_type <> 'pageview';"#;

/// What is beside the events.
const TABLES: &str = "
CREATE TABLE hourly (tenant text NOT NULL, website_id text NOT NULL, hour timestamptz NOT NULL,
    event_type text NOT NULL, n bigint NOT NULL, PRIMARY KEY (tenant, website_id, hour, event_type));
CREATE TABLE session (tenant text NOT NULL, website_id text NOT NULL, session_key bigint NOT NULL,
    session_id text NOT NULL, visitor_id text, start timestamptz NOT NULL, last timestamptz NOT NULL,
    views bigint NOT NULL, events bigint NOT NULL, entry text, exit text, referrer text, source text,
    channel text, campaign text, country text, browser text, os text, device text,
    PRIMARY KEY (tenant, website_id, session_key));
CREATE INDEX session_start ON session (tenant, website_id, start) INCLUDE (visitor_id, views, last);
CREATE TABLE user_identities (tenant text NOT NULL, user_id text NOT NULL, first_ms bigint NOT NULL,
    last_ms bigint NOT NULL, first_seen timestamptz NOT NULL, last_seen timestamptz NOT NULL,
    traits jsonb NOT NULL DEFAULT '{}', PRIMARY KEY (tenant, user_id));
CREATE TABLE relay_site (tenant text NOT NULL, website_id text NOT NULL, events bigint NOT NULL,
    first_ms bigint, last_ms bigint, PRIMARY KEY (tenant, website_id));
CREATE TABLE relay_seen (h bigint PRIMARY KEY, n bigint NOT NULL GENERATED ALWAYS AS IDENTITY);
CREATE INDEX relay_seen_n ON relay_seen (n);
CREATE TABLE relay_tenant (tenant text PRIMARY KEY, epoch bigint NOT NULL, n bigint NOT NULL,
    gone bigint NOT NULL);
CREATE TABLE relay_link (tenant text NOT NULL, device text NOT NULL, user_id text NOT NULL,
    first_ms bigint NOT NULL, last_ms bigint NOT NULL, PRIMARY KEY (tenant, device, user_id));
CREATE INDEX relay_link_user ON relay_link (tenant, user_id);
CREATE TABLE relay_alias (tenant text NOT NULL, previous text NOT NULL, user_id text NOT NULL,
    first_ms bigint NOT NULL, PRIMARY KEY (tenant, previous, user_id));
CREATE INDEX relay_alias_user ON relay_alias (tenant, user_id);
CREATE TABLE relay_apart (tenant text NOT NULL, device text NOT NULL, user_id text NOT NULL,
    operator text NOT NULL, reason text NOT NULL, at_ms bigint NOT NULL, PRIMARY KEY (tenant, device, user_id));
CREATE TABLE relay_traits (tenant text NOT NULL, is_user boolean NOT NULL, id text NOT NULL,
    traits text NOT NULL, PRIMARY KEY (tenant, is_user, id));
CREATE TABLE relay_owner (tenant text NOT NULL, who bigint NOT NULL, root bigint NOT NULL,
    until_ms bigint NOT NULL, n bigint NOT NULL, PRIMARY KEY (tenant, who));
CREATE INDEX relay_owner_n ON relay_owner (tenant, n);
CREATE TABLE relay_log (tenant text NOT NULL, seq bigint NOT NULL, at_ms bigint NOT NULL, event text,
    operator text, reason text, what smallint NOT NULL, origin text NOT NULL, user_id text NOT NULL,
    before text, PRIMARY KEY (tenant, seq));";

/// What a store says of itself.
#[derive(Debug, Clone)]
pub(super) struct Opened {
    /// Of the keys, and for telling texts apart.
    pub(super) secrets: [u8; 32],
    pub(super) server_version: String,
    /// Its version, if events are kept in it.
    pub(super) timescaledb: Option<String>,
    /// Days that have a partition.
    pub(super) days: BTreeSet<i64>,
}

/// Waits until nobody else writes.
pub(super) async fn lock(transaction: &Transaction<'_>) -> Result<(), StoreError> {
    let statement = transaction.prepare_cached("SELECT pg_advisory_xact_lock($1)").await?;
    transaction.execute(&statement, &[&LOCK]).await?;
    Ok(())
}

/// Makes the tables, or brings them up.
pub(super) async fn open(transaction: &Transaction<'_>) -> Result<Opened, StoreError> {
    let row = transaction
        .query_one(
            "SELECT current_setting('server_version_num')::int, current_setting('server_version'),
                pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean,
                current_setting('server_encoding')",
            &[],
        )
        .await?;
    let (number, server_version, only_reads): (i32, String, bool) = (row.get(0), row.get(1), row.get(2));
    let encoding: String = row.get(3);
    if encoding != "UTF8" {
        return Err(StoreError::Refused(format!(
            "the encoding of the database is {encoding}, want UTF8: others have no room for most texts"
        )));
    }
    if number < SERVER_MIN {
        return Err(StoreError::Refused(format!("PostgreSQL {server_version}, want 13 or later")));
    }
    if only_reads {
        return Err(StoreError::Unavailable("it only reads for now, as a standby does".into()));
    }
    // Where the tables are nobody who writes for long is waited for.
    if !has_tables(transaction).await? {
        lock(transaction).await?;
        transaction
            .batch_execute("CREATE TABLE IF NOT EXISTS relay_meta (k text PRIMARY KEY, v bytea NOT NULL)")
            .await?;
    }
    match meta(transaction, "version").await? {
        None => make(transaction, number).await?,
        Some(version) => check_version(&version)?,
    }
    let secrets = meta(transaction, "secret").await?.and_then(|secret| secret.try_into().ok());
    let secrets = secrets.ok_or_else(|| StoreError::Damaged("it has no secret".into()))?;
    let timescaledb = timescale::version_in_use(transaction).await?;
    let days = days(transaction).await?;
    Ok(Opened { secrets, server_version, timescaledb, days })
}

/// True if somebody has made them, and has committed that.
async fn has_tables(transaction: &Transaction<'_>) -> Result<bool, StoreError> {
    Ok(transaction.query_one("SELECT to_regclass('relay_meta') IS NOT NULL", &[]).await?.get(0))
}

async fn meta(transaction: &Transaction<'_>, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
    let row = transaction.query_opt("SELECT v FROM relay_meta WHERE k = $1", &[&key]).await?;
    Ok(row.map(|row| row.get(0)))
}

fn check_version(version: &[u8]) -> Result<(), StoreError> {
    let version = version.try_into().map(i64::from_le_bytes).unwrap_or(i64::MAX);
    match version <= VERSION {
        true => Ok(()),
        false => Err(StoreError::Refused(format!(
            "its tables are of a later relay: got version {version}, want at most {VERSION}"
        ))),
    }
}

async fn make(transaction: &Transaction<'_>, server: i32) -> Result<(), StoreError> {
    let mut secret = [0; 32];
    SystemRandom::new()
        .fill(&mut secret)
        .map_err(|_| StoreError::Unavailable("the system gives no random numbers".into()))?;
    match timescale::is_there(transaction, server).await? {
        true => transaction.batch_execute(&format!("{EVENTS};{INDEXES}{}", timescale::DDL)).await?,
        false => {
            let partitioned = format!("{EVENTS} PARTITION BY RANGE (\"timestamp\");{INDEXES}");
            transaction.batch_execute(&partitioned).await?;
            transaction.batch_execute("CREATE TABLE events_default PARTITION OF events DEFAULT").await?;
        }
    }
    transaction.batch_execute(TABLES).await?;
    let sql = "INSERT INTO relay_meta (k, v) VALUES ('version', $1), ('secret', $2)";
    transaction.execute(sql, &[&&VERSION.to_le_bytes()[..], &&secret[..]]).await?;
    Ok(())
}

/// Days since 1970 that have a partition.
pub(super) async fn days(transaction: &Transaction<'_>) -> Result<BTreeSet<i64>, StoreError> {
    let sql = "SELECT child.relname::text FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
        WHERE inhparent = 'events'::regclass";
    let rows = transaction.query(sql, &[]).await?;
    Ok(rows.iter().filter_map(|row| day_of(row.get(0))).collect())
}

/// The name of a day's partition, which is quoted as that of one before 1970 has a sign.
pub(super) fn partition(day: i64) -> String {
    format!("events_d{day}")
}

fn day_of(partition: &str) -> Option<i64> {
    partition.strip_prefix("events_d")?.parse().ok()
}

/// Makes the partition of a day. Returns how many events were moved into it; `None` if it was
/// there.
pub(super) async fn make_partition(
    transaction: &Transaction<'_>,
    day: i64,
    days: &mut BTreeSet<i64>,
) -> Result<Option<u64>, StoreError> {
    if days.contains(&day) {
        return Ok(None);
    }
    let (name, from, to) = (partition(day), Ts::of(day * DAY_MS).text(), Ts::of((day + 1) * DAY_MS).text());
    let range = format!("\"timestamp\" >= '{from}' AND \"timestamp\" < '{to}'");
    let sql = format!(
        "CREATE TABLE \"{name}\" (LIKE events INCLUDING DEFAULTS INCLUDING CONSTRAINTS);
        WITH moved AS (DELETE FROM events_default WHERE {range} RETURNING *) INSERT INTO \"{name}\" SELECT * FROM moved"
    );
    transaction.batch_execute(&sql).await?;
    let moved =
        transaction.query_one(&format!("SELECT count(*) FROM \"{name}\""), &[]).await?.get::<_, i64>(0);
    let sql =
        format!("ALTER TABLE events ATTACH PARTITION \"{name}\" FOR VALUES FROM ('{from}') TO ('{to}')");
    transaction.batch_execute(&sql).await?;
    days.insert(day);
    Ok(Some(moved.max(0) as u64))
}

/// Makes the partitions of days, unless that takes long. Returns all days that have one.
pub(super) async fn make_soon(
    connection: &mut Object,
    due: &[i64],
    slow: &Slow,
) -> Result<BTreeSet<i64>, StoreError> {
    let transaction = connection.transaction().await?;
    transaction.batch_execute(DAYS_PATIENCE).await?;
    lock(&transaction).await?;
    let _asked = slow.watch("partitions");
    let mut days = days(&transaction).await?;
    for day in due {
        make_partition(&transaction, *day, &mut days).await?;
    }
    transaction.commit().await?;
    Ok(days)
}

/// The days that are to have a partition at a time.
pub(super) fn days_ahead(now_ms: i64) -> std::ops::RangeInclusive<i64> {
    let today = now_ms.div_euclid(DAY_MS);
    today - 1..=today + DAYS_AHEAD
}
