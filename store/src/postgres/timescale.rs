//! What is other where the server has TimescaleDB: all of its DDL.
//!
//! It is used where its extension is made in the database before the store is: making it
//! needs rights that a relay should not have. The functions are those of its community
//! licence; where they are not there, as in builds of the Apache licence, making the store
//! says so.

use deadpool_postgres::{Object, Transaction};

use super::time::Ts;
use crate::{StoreError, model::DAY_MS};

/// Makes of the table `events` a hypertable with a chunk for each day, whose chunks are kept
/// by column from a week on; and the sums by hour and day that people's own SQL asks for.
///
/// Sums by hour keep what can be added up, as the time on pages and how many told it; how
/// many visitors there were cannot be, and is of its hour or day alone. There is no `now()`
/// in them: it would be that of each refresh. What may still change is refreshed, over less
/// time than events are kept: else a refresh would take away what is known of events that
/// are gone.
pub(super) const DDL: &str = r#"
SELECT create_hypertable('events', 'timestamp', chunk_time_interval => INTERVAL '1 day', create_default_indexes => false);
ALTER TABLE events SET (timescaledb.compress, timescaledb.compress_segmentby = 'tenant, website_id',
    timescaledb.compress_orderby = '"timestamp", id');
SELECT add_compression_policy('events', INTERVAL '7 days');
CREATE MATERIALIZED VIEW events_hourly WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT time_bucket(INTERVAL '1 hour', "timestamp") AS hour, tenant, website_id,
    count(*) AS events, count(*) FILTER (WHERE class = 0) AS page_views,
    count(DISTINCT visitor_id) AS unique_visitors,
    sum(time_on_page) AS time_sum, count(time_on_page) AS time_n
FROM events WHERE NOT is_bot GROUP BY 1, 2, 3 WITH NO DATA;
SELECT add_continuous_aggregate_policy('events_hourly', start_offset => INTERVAL '3 days',
    end_offset => INTERVAL '1 hour', schedule_interval => INTERVAL '10 minutes');
CREATE MATERIALIZED VIEW events_daily WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT time_bucket(INTERVAL '1 day', "timestamp", 'UTC') AS day, tenant, website_id,
    count(*) AS events, count(*) FILTER (WHERE class = 0) AS page_views,
    count(DISTINCT visitor_id) AS unique_visitors,
    sum(time_on_page) AS time_sum, count(time_on_page) AS time_n
FROM events WHERE NOT is_bot GROUP BY 1, 2, 3 WITH NO DATA;
SELECT add_continuous_aggregate_policy('events_daily', start_offset => INTERVAL '7 days',
    end_offset => INTERVAL '1 day', schedule_interval => INTERVAL '1 hour');
"#;

/// From this version on, and on such servers, rows that are kept by column can be deleted.
const VERSION_MIN: (u32, u32) = (2, 11);
const SERVER_MIN: i32 = 140_000;

/// What holds in each session: who has much in what is kept by column can be erased, and what
/// comes late for it is taken in, however many rows must be read from there. What is done at once
/// has bounds of its own. Before 2.14 or where it is not used there is no such setting.
pub(super) const SESSION: &str = "SELECT set_config(name, '0', false) FROM pg_settings
    WHERE name = 'timescaledb.max_tuples_decompressed_per_dml_transaction'";

/// Drops chunks of which all is older than a time; what is left of it is deleted as anywhere.
pub(super) const DROP_CHUNKS: &str =
    "SELECT count(*) FROM drop_chunks('events', older_than => $1::timestamptz)";

/// How many bytes chunks take beside the table itself, with what is kept by column; and how many
/// they are.
pub(super) const CHUNKS: &str = "SELECT hypertable_size('events') - pg_total_relation_size('events'), (SELECT count(*) FROM show_chunks('events'))";

/// The sums, and how long each of their rows is: the last of them may still change.
const SUMS: [(&str, i64); 2] = [("events_hourly", DAY_MS / 24), ("events_daily", DAY_MS)];

/// Brings the sums up where events came or went that their policies do not look at: an import,
/// what was late by days, somebody who was erased. What is said of events that are too old stays.
/// Whoever calls it sets the session's patience back.
pub(super) async fn refresh(
    connection: &Object,
    now_ms: i64,
    kept_from_ms: Option<i64>,
) -> Result<(), StoreError> {
    // It runs in no transaction, which could have settings of its own.
    connection.batch_execute("SET statement_timeout = '1h'; SET lock_timeout = '60s'").await?;
    for (sums, row_ms) in SUMS {
        let to_ms = now_ms.saturating_sub(row_ms);
        // There must be a whole row.
        if kept_from_ms.is_none_or(|from_ms| to_ms.saturating_sub(from_ms) >= 2 * row_ms) {
            let sql =
                format!("CALL refresh_continuous_aggregate('{sums}', $1::timestamptz, $2::timestamptz)");
            let refreshed = connection.execute(&sql, &[&kept_from_ms.map(Ts::of), &Ts::of(to_ms)]).await;
            if let Err(error) = refreshed.map_err(StoreError::from) {
                tracing::warn!(%error, sums, "sums of TimescaleDB are brought up later");
            }
        }
    }
    Ok(())
}

/// True if the extension was made in the database.
pub(super) async fn is_there(transaction: &Transaction<'_>, server: i32) -> Result<bool, StoreError> {
    let sql = "SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'";
    if let Some(row) = transaction.query_opt(sql, &[]).await? {
        return check_version(row.get(0), server).map(|()| true);
    }
    let sql = "SELECT EXISTS (SELECT 1 FROM pg_available_extensions WHERE name = 'timescaledb')";
    if transaction.query_one(sql, &[]).await?.get(0) {
        tracing::info!("TimescaleDB is there and not used: CREATE EXTENSION timescaledb was not said");
    }
    Ok(false)
}

fn check_version(version: &str, server: i32) -> Result<(), StoreError> {
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or_default());
    let found = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    if found >= VERSION_MIN && server >= SERVER_MIN {
        return Ok(());
    }
    Err(StoreError::Refused(format!(
        "TimescaleDB {version} on PostgreSQL {}, want 2.11 or later on PostgreSQL 14 or later, or a database without it: \
        else nobody can be erased from what is kept by column",
        server / 10_000
    )))
}

/// Its version, if `events` is a hypertable.
pub(super) async fn version_in_use(transaction: &Transaction<'_>) -> Result<Option<String>, StoreError> {
    let sql = "SELECT extversion FROM pg_extension, pg_class
        WHERE extname = 'timescaledb' AND pg_class.oid = 'events'::regclass AND relkind = 'r'";
    Ok(transaction.query_opt(sql, &[]).await?.map(|row| row.get(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_kept_must_be_one_who_can_be_erased() {
        assert_eq!(check_version("2.11.0", 140_005), Ok(()));
        assert_eq!(check_version("2.23.0-dev", 170_005), Ok(()));
        for (version, server) in [("2.10.3", 140_005), ("1.7.5", 140_005), ("2.15.0", 130_014), ("", 140_005)]
        {
            assert!(check_version(version, server).is_err(), "{version} on {server}");
        }
    }

    /// What no test sees that runs it, as it is there on another day or in what somebody adds up.
    #[test]
    fn the_sums_have_no_time_of_their_own_and_say_what_can_be_added_up() {
        let text = DDL.to_lowercase();
        assert!(!text.contains("now()") && !text.contains("avg("));
        for view in ["events_hourly", "events_daily"] {
            assert!(text.contains(&format!("create materialized view {view} with (timescaledb.continuous")));
            assert!(text.contains(&format!("add_continuous_aggregate_policy('{view}'")));
        }
        assert_eq!(text.matches("materialized_only = false").count(), 2);
        assert_eq!(text.matches("filter (where class = 0)").count(), 2);
        // The time at which chunks are cut is part of the key.
        assert!(super::super::schema::EVENTS.contains("PRIMARY KEY (tenant, website_id, \"timestamp\", id)"));
    }
}
