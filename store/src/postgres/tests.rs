//! The store against the oracle, and what becomes of it when things go wrong.

use std::sync::atomic::AtomicU32;

use analytics_relay_providers::Event;
use proptest::prelude::*;

use super::*;
use crate::{
    conformance::{
        BASE_MS, Backend, Do, MINUTE_MS, Spec, cases, compare, compare_cut, compare_logs, doing, everybody,
        minutes,
        people::{FEW, happens, known_after, odd_cases},
        scopes, spec, various,
    },
    oracle::Oracle,
    sqlite::SqliteStore,
};

mod days;
mod dump;
mod failures;
mod owners;
mod pieces;
mod server;
mod slow;
mod timescale;

use server::{SERVER, Server, not_run};

/// A store in a schema of its own.
struct Served {
    settings: Settings,
    schema: String,
}

/// Runs SQL beside the store.
async fn sql(served: &Served, sql: &str) {
    let pool = connect::pool(&served.settings).unwrap();
    pool.get().await.unwrap().batch_execute(sql).await.unwrap();
}

impl Served {
    /// One on a server that runs.
    async fn on(server: &Server) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let schema = format!("s{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let served = Self { settings: Settings::new(server.url(&schema)), schema };
        sql(&served, &format!("CREATE SCHEMA {}", served.schema)).await;
        served
    }

    /// Nobody needs it any more.
    async fn drop(self) {
        sql(&self, &format!("DROP SCHEMA {} CASCADE", self.schema)).await;
    }
}

impl Backend for Served {
    type Store = PostgresStore;

    async fn open(&self) -> PostgresStore {
        PostgresStore::open(self.settings.clone()).await.unwrap()
    }

    async fn close(&self, store: &PostgresStore) {
        store.close().await;
    }

    fn keys(&self, store: &PostgresStore) -> Keys {
        store.shared.keys
    }

    fn fact_limits(&self) -> FactLimits {
        self.settings.fact_limits
    }

    fn window(&self) -> usize {
        self.settings.window
    }

    async fn seal(&self, store: &PostgresStore) {
        store.upkeep(now_ms(), None).await.unwrap();
    }

    async fn tidy(&self, store: &PostgresStore, now_ms: i64) {
        store.upkeep(now_ms, None).await.unwrap();
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Runs a test with a store on the server that tests share, if there is one.
fn with_postgres<T>(test: impl AsyncFnOnce(&Served) -> T) -> Option<T> {
    with_settings(|_| {}, test)
}

/// The same with other settings.
fn with_settings<T>(change: impl Fn(&mut Settings), test: impl AsyncFnOnce(&Served) -> T) -> Option<T> {
    let Some(server) = SERVER.as_ref() else {
        not_run("PostgreSQL");
        return None;
    };
    runtime().block_on(async {
        let mut served = Served::on(server).await;
        change(&mut served.settings);
        let tested = test(&served).await;
        served.drop().await;
        Some(tested)
    })
}

/// Whatever there is.
fn all() -> Scope {
    Scope::new(TenantScope::tenant(""), i64::MIN..i64::MAX)
}

fn pool_of(specs: &[Spec]) -> Vec<Event> {
    specs.iter().enumerate().map(|(id, spec)| spec.event(id)).collect()
}

async fn number(store: &PostgresStore, sql: &str) -> i64 {
    let connection = store.connection().await.unwrap();
    let number = connection.query_one(sql, &[]).await.unwrap().get(0);
    give_back(Ok(()), connection).unwrap();
    number
}

async fn whole(store: &PostgresStore) {
    let report = store.check().await.unwrap();
    assert!(report.is_whole(), "{report:?}");
}

#[test]
fn at_the_edges_of_rules_the_store_answers_as_the_oracle() {
    let event = |minute, user, device| Spec { minute, kind: 1, user, device, ..Spec::default() };
    let specs = [
        event(0, 1, 1),
        event(10, 0, 1),
        event(20, 2, 1),
        event(20, 0, 1),
        event(50, 0, 1),
        event(81, 0, 1),
        event(111, 0, 1),
        event(1439, 3, 2),
        event(1440, 0, 1),
        event(120, 0, 3),
    ];
    let pool = pool_of(&specs);
    let forth: Vec<u8> = (0..10).collect();
    let back: Vec<u8> = forth.iter().rev().copied().collect();
    for all in [
        vec![Do::Append(forth.clone())],
        vec![Do::Append(back[..5].to_vec()), Do::Tidy, Do::Append(back[3..].to_vec())],
        back.iter().map(|place| Do::Append(vec![*place])).collect(),
    ] {
        with_postgres(async |served| {
            let (store, oracle) = crate::conformance::run(served, &pool, &all).await;
            for scope in scopes(0, 121) {
                compare(&store, &oracle, &scope).await;
            }
            compare(&store, &oracle, &Scope::new(TenantScope::tenant(""), minutes(20..81))).await;
            whole(&store).await;
            store.close().await;
        });
    }
}

fn against_the_oracle(
    pool: &[Spec],
    all: &[Do],
    change: impl Fn(&mut Settings),
    compare_all: impl AsyncFn(&PostgresStore, &Oracle),
) {
    with_settings(change, async |served| {
        let (store, oracle) = crate::conformance::run(served, &pool_of(pool), all).await;
        compare_all(&store, &oracle).await;
        whole(&store).await;
        store.close().await;
    });
}

proptest! {
    #![proptest_config(cases(16))]

    /// Duplicates, late and shuffled events, odd texts, time zones, deletions, restarts: all
    /// questions, the oracle's answers.
    #[test]
    fn the_store_answers_as_the_oracle(
        pool in prop::collection::vec(spec(), 1..60),
        all in prop::collection::vec(doing(true), 1..14),
        from in -100..1_500_i64,
        length in 0..1_500_i64,
    ) {
        against_the_oracle(&pool, &all, |_| {}, async |store, oracle| {
            for scope in scopes(from, length) {
                compare(store, oracle, &scope).await;
            }
            compare_logs(store, oracle).await;
        });
    }

    /// Where there is room for few values.
    #[test]
    fn what_there_is_no_room_for_is_the_rest(
        pool in prop::collection::vec(spec(), 1..60),
        all in prop::collection::vec(doing(true), 1..8),
        from in -100..1_500_i64,
    ) {
        against_the_oracle(&pool, &all, |settings| settings.limits.values_max = 2, async |store, oracle| {
            for scope in &scopes(from, 200)[..3] {
                compare_cut(store, oracle, scope).await;
            }
        });
    }

    /// Where there is no room for all that is told of who is who, what came first is known.
    #[test]
    fn at_the_limits_it_is_known_what_came_first(all in prop::collection::vec(happens(), 1..60)) {
        let known = [1, 4, 1_000].map(|batch_max| {
            let change = |settings: &mut Settings| settings.fact_limits = FEW;
            with_settings(change, async |served| {
                let (store, of_each) = known_after(served, batch_max, &all).await;
                whole(&store).await;
                store.close().await;
                of_each
            })
        });
        assert_eq!(known[0], known[1]);
        assert_eq!(known[0], known[2]);
    }

    /// An event whose id was forgotten is found by website, time and id.
    #[test]
    fn what_is_older_than_the_window_is_kept_once_too(
        pool in prop::collection::vec(spec(), 1..60),
        all in prop::collection::vec(doing(true), 1..14),
    ) {
        against_the_oracle(&pool, &all, |settings| settings.window = 5, async |store, oracle| {
            compare(store, oracle, &scopes(0, 10)[0]).await;
        });
    }

    /// What is exported of one store and imported by another of the other kind is the same, on
    /// either way.
    #[test]
    fn a_store_moves_to_the_embedded_one_and_back(
        pool in prop::collection::vec(spec(), 1..60),
        all in prop::collection::vec(prop_oneof![5 => doing(false), 1 => (-60..600_i16).prop_map(Do::Retain)], 1..10),
    ) {
        against_the_oracle(&pool, &all, |_| {}, async |store, oracle| {
            let dir = tempfile::tempdir().unwrap();
            let embedded = SqliteStore::open(crate::sqlite::Settings::new(dir.path().join("store.db"))).unwrap();
            let lines = exported(store).await;
            assert_eq!(embedded.import(std::io::Cursor::new(lines)).await.unwrap().damaged, 0);
            let mut lines = Vec::new();
            crate::sqlite::export(&dir.path().join("store.db"), &Wanted::default(), &mut lines).unwrap();
            let again = Served::on(SERVER.as_ref().unwrap()).await;
            let moved = again.open().await;
            assert_eq!(moved.import(std::io::Cursor::new(lines)).await.unwrap().damaged, 0);
            for of in ["", "t2"].map(TenantScope::tenant) {
                let scope = Scope { include_bots: true, ..Scope::new(of.clone(), i64::MIN..i64::MAX) };
                for who in everybody() {
                    let want = oracle.identity(&of, &who).await;
                    assert_eq!(moved.identity(&of, &who).await, want, "{who:?}");
                    assert_eq!(embedded.identity(&of, &who).await, want, "{who:?}");
                }
                assert_eq!(moved.recent(&scope, None, 1_000).await, oracle.recent(&scope, None, 1_000).await);
            }
            embedded.close().await;
            moved.close().await;
            again.drop().await;
        });
    }
}

#[test]
fn who_is_erased_leaves_others_who_they_are_whatever_ids_they_have() {
    for all in odd_cases() {
        with_postgres(async |served| {
            let (store, _) = known_after(served, 1, &all).await;
            whole(&store).await;
            store.close().await;
        });
    }
}

/// A writer whose bytes are kept.
#[derive(Clone, Default)]
struct Shelf(Arc<Mutex<Vec<u8>>>);

impl Write for Shelf {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

async fn exported(store: &PostgresStore) -> Vec<u8> {
    let shelf = Shelf::default();
    store.export(&Wanted::default(), shelf.clone()).await.unwrap();
    std::mem::take(&mut *lock(&shelf.0))
}

#[test]
fn days_that_are_too_old_go_as_partitions_and_what_came_before_its_partition_is_moved() {
    with_postgres(async |served| {
        let store = served.open().await;
        let day = |n: i64| now_ms().div_euclid(DAY_MS) * DAY_MS + n * DAY_MS + 5;
        let event = |id: &str, n: i64| {
            let time_ms = day(n);
            let json = format!(
                r#"{{"id":"{id}","kind":"page","anonymous_id":"d","session_id":"s","time_ms":{time_ms},"accepted_ms":{time_ms}}}"#
            );
            Event::from_json(json.as_bytes()).unwrap()
        };
        let events = [event("a", -1), event("b", 0), event("c", 9), event("d", 20), event("e", -40)];
        store.append(&events).await.unwrap();
        let stats = store.stats().await.unwrap();
        assert_eq!((stats.events, stats.default_events, stats.partitions), (5, 3, 9));
        let upkept = store.upkeep(day(4), None).await.unwrap();
        assert_eq!(upkept, Upkept { made: 4, moved: 1, dropped: 0 });
        assert_eq!(
            store.upkeep(day(4), Some(day(0))).await.unwrap(),
            Upkept { dropped: 1, ..Upkept::default() }
        );
        let stats = store.stats().await.unwrap();
        assert_eq!((stats.events, stats.default_events), (4, 2));
        assert_eq!(store.retain(&TenantScope::tenant(""), day(0)).await.unwrap().events, 1);
        assert_eq!(store.as_of(&TenantScope::tenant("")).await.unwrap().events, 3);
        whole(&store).await;
        store.close().await;
    });
}

#[test]
fn people_can_ask_by_sql_what_came() {
    with_postgres(async |served| {
        let store = served.open().await;
        let json = format!(
            r#"{{"id":"a","kind":"page","user_id":"u\u0000","anonymous_id":"d","session_id":"s","time_ms":{BASE_MS},"accepted_ms":{BASE_MS},"sent_context":{{"page":{{"path":"/a"}}}},"properties":{{"n":"\u0000"}}}}"#
        );
        let event = Event::from_json(json.as_bytes()).unwrap();
        store.append(std::slice::from_ref(&event)).await.unwrap();
        store.append(&[event]).await.unwrap();
        let connection = store.connection().await.unwrap();
        let row = connection
            .query_one("SELECT page, user_id, properties->>'n', visitor_id FROM events", &[])
            .await
            .unwrap();
        let texts = [0, 1, 2, 3].map(|at| row.get::<_, String>(at));
        assert_eq!(texts, ["/a", "u\u{fffd}", "\u{fffd}", "u\u{fffd}"]);
        for (sql, want) in [
            ("SELECT n FROM hourly WHERE event_type = 'pageview'", 1_i64),
            ("SELECT views FROM session WHERE entry = '/a' AND exit = '/a'", 1),
            ("SELECT count(*) FROM user_identities", 1),
        ] {
            assert_eq!(connection.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), want, "{sql}");
        }
        drop(connection);
        store.close().await;
    });
}
