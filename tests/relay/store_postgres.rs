//! The store in a PostgreSQL: what was answered OK is in its table once, whatever happens to
//! the server; what does is told, and is nobody else's.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::{GetEventCountRequest, GetUserCountRequest},
    providers::sandbox::Vendor,
};
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::sleep};

use crate::{
    harness::{Client, Ended, Observer, Relay, Setup, identify, taken, track},
    postgres::{PASSWORD, Postgres, USER},
    store::{counted, three_days_ago, track_at},
};

const PATIENCE: Duration = Duration::from_secs(30);
/// 2026-11-01T00:00:00Z.
const BASE_MS: i64 = 1_793_491_200_000;

/// A relay that has the store in this server and, besides, these vendors.
async fn stored(postgres: &Postgres, vendors: &str) -> Setup {
    let mut setup = Setup::new().await;
    setup.set("ANALYTICS_PROVIDER", vendors).set("STORE_URL", &postgres.url());
    setup.set("STORE_FLUSH_INTERVAL_SECONDS", "0.05");
    setup
}

/// A relay with a log that has given the store ten events; what its caller knows.
async fn at_work(postgres: &Postgres) -> (Setup, Relay, Observer) {
    let mut setup = stored(postgres, "segment").await;
    setup.set("DURABILITY", "written");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 10).await;
    delivered(&relay, 10).await;
    (setup, relay, observer)
}

/// The ids in the table, as psql says them; each is there once.
fn ids(postgres: &Postgres) -> HashSet<String> {
    let rows = postgres.sql("SELECT event::json->>'id' FROM events");
    let ids: HashSet<String> = rows.lines().map(str::to_owned).collect();
    assert_eq!(ids.len(), rows.lines().count(), "an event is there twice");
    ids
}

/// Each event that was answered OK is there, and nothing that was not sent.
fn holds_what_was_answered_ok(postgres: &Postgres, observer: &Observer) {
    let kept = ids(postgres);
    let lost: Vec<_> = observer.accepted.difference(&kept).collect();
    assert!(lost.is_empty(), "lost {} of {}", lost.len(), observer.accepted.len());
    let strangers: Vec<_> = kept.difference(&observer.accepted).collect();
    assert!(strangers.iter().all(|id| observer.unknown.contains(*id)), "{strangers:?}");
}

async fn delivered(relay: &Relay, count: u64) {
    relay.metric_is("relay_events_total", &["\"store\"", "\"delivered\""], count as f64).await;
}

/// Waits until the relay says this of itself.
async fn health(relay: &Relay, says: &str) -> String {
    let begun = Instant::now();
    loop {
        let health = relay.page("/healthz").await.1;
        if health.contains(says) {
            return health;
        }
        assert!(begun.elapsed() < PATIENCE, "want {says} in {health}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// The store is open, and all is well.
async fn is_well(relay: &Relay) {
    relay.metric_is("relay_store_open", &[], 1.0).await;
    let begun = Instant::now();
    while relay.page("/healthz").await.1 != "SERVING" {
        assert!(begun.elapsed() < PATIENCE, "{}", relay.page("/healthz").await.1);
        sleep(Duration::from_millis(20)).await;
    }
}

/// Sends until it is told to stop; what its caller knows.
fn load(relay: &Relay) -> (Arc<AtomicBool>, JoinHandle<Observer>) {
    let (stop, mut client): (_, Client) = (Arc::new(AtomicBool::new(false)), relay.client());
    let stopped = stop.clone();
    let sending = tokio::spawn(async move {
        let mut observer = Observer::default();
        while !stopped.load(Ordering::Relaxed) {
            let user = format!("user-{}", observer.accepted.len() % 50);
            assert_eq!(observer.track(&mut client, "Order Placed", &user).await, None);
            sleep(Duration::from_millis(1)).await;
        }
        observer
    });
    (stop, sending)
}

async fn end_load((stop, sending): (Arc<AtomicBool>, JoinHandle<Observer>)) -> Observer {
    stop.store(true, Ordering::Relaxed);
    sending.await.unwrap()
}

/// Nothing in what it said and left behind has the password.
fn told_no_password(setup: &Setup, relay_said: &[&str], ended: &Ended) {
    let mut said: Vec<String> = relay_said.iter().map(|text| (*text).to_owned()).collect();
    said.extend(ended.logs.iter().map(Value::to_string));
    for text in said {
        assert!(!text.contains(PASSWORD) && !text.contains(USER), "{text}");
    }
    for entry in walk(setup.data_dir()) {
        let bytes = fs::read(&entry).unwrap_or_default();
        let found = bytes.windows(PASSWORD.len()).any(|window| window == PASSWORD.as_bytes());
        assert!(!found, "{}", entry.display());
    }
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => files.extend(walk(&path)),
            path => files.push(path),
        }
    }
    files
}

/// Waits until a question to the server is answered with true.
async fn is_so(postgres: &Postgres, question: &str) {
    let begun = Instant::now();
    while postgres.sql(question) != "t" {
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {question}");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn what_is_kept_in_postgresql_is_counted_at_both_doors_and_measured() {
    let Some(postgres) = Postgres::start(&[]) else { return };
    let setup = stored(&postgres, "none").await;
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 21).await;
    relay.client().identify_user(identify("user-1", &[])).await.unwrap();
    delivered(&relay, 22).await;
    assert_eq!(ids(&postgres).len(), 22);
    assert!(observer.accepted.is_subset(&ids(&postgres)));

    let (status, said) = relay.get("/api/v1/events/count?days=1&event_name=Order%20Placed").await;
    assert_eq!((status, &said["total"]), (200, &json!(21)), "{said}");
    let (_, said) = relay.get("/api/v1/users/count?days=1").await;
    assert_eq!(said["unique_users"], 7, "{said}");
    let now = jiff::Timestamp::now().as_second();
    let (start_time, end_time) = (now - 3_600, now + 3_600);
    let asked = GetEventCountRequest { start_time, end_time, group_by: "hour".into(), ..Default::default() };
    let counts = relay.client().get_event_count(asked).await.unwrap().into_inner();
    assert_eq!(counts.counts.iter().map(|row| row.count).sum::<i64>(), 22);
    let asked = GetUserCountRequest { start_time, end_time };
    assert_eq!(relay.client().get_user_count(asked).await.unwrap().into_inner().unique_users, 7);

    is_well(&relay).await;
    relay.metric_is("relay_store_events", &[], 22.0).await;
    assert!(relay.metric("relay_store_file_bytes", &[]).await > 0.0);
    assert_eq!(relay.metric("relay_store_default_events", &[]).await, 0.0);
    let in_use = relay.metric("relay_store_connections_in_use", &[]).await;
    let connections = in_use + relay.metric("relay_store_connections_idle", &[]).await;
    let seen = postgres.sql("SELECT count(*) FROM pg_stat_activity WHERE usename = 'canary_user'");
    assert!((1.0..=8.0).contains(&connections), "{connections} of {seen}");
    assert_eq!(relay.metric("relay_store_connections_waiting", &[]).await, 0.0);
    assert!(relay.metric("relay_store_append_duration_seconds_count", &[]).await >= 1.0);
    assert!(relay.metric("relay_store_question_duration_seconds_count", &[]).await >= 2.0);
    let ended = relay.terminate().await;
    assert!(ended.code == 0 && ended.balance_of("store").is_exact());
    told_no_password(&setup, &[], &ended);
}

/// What the store is to get waits; nobody else waits for it.
#[tokio::test]
async fn a_relay_that_starts_without_its_server_gives_it_everything_when_it_comes() {
    let Some(mut postgres) = Postgres::start(&[]) else { return };
    let mut setup = stored(&postgres, "segment").await;
    setup.set("DURABILITY", "written");
    postgres.stop();
    let relay = setup.start().await;
    let told = relay.log("the store cannot be opened now: what it is to get waits").await;
    assert!(told["error"].as_str().unwrap().contains("postgres://***@127.0.0.1"), "{told}");
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 50).await;
    taken(&setup, Vendor::Segment, 50).await;
    let degraded = health(&relay, "the store cannot be opened").await;
    assert!(degraded.starts_with("DEGRADED: "), "{degraded}");
    assert_eq!(relay.page("/readyz").await.0, 200);
    assert_eq!(relay.metric("relay_store_open", &[]).await, 0.0);
    let (status, said) = relay.get("/api/v1/events/count?days=1").await;
    assert_eq!((status, &said["code"]), (503, &json!("STORE_UNAVAILABLE")), "{said}");

    postgres.go_on();
    relay.log("the store is open now").await;
    delivered(&relay, 50).await;
    is_well(&relay).await;
    let ended = relay.terminate().await;
    assert_eq!((ended.code, ended.balance_of("store").is_exact()), (0, true));
    assert_eq!(ids(&postgres), observer.accepted);
    told_no_password(&setup, &[&degraded], &ended);
}

#[tokio::test]
async fn a_server_that_is_killed_in_mid_load_loses_nothing_and_doubles_nothing() {
    let Some(mut postgres) = Postgres::start(&[]) else { return };
    let mut setup = stored(&postgres, "segment").await;
    setup.set("DURABILITY", "written").set("STORE_FLUSH_INTERVAL_SECONDS", "0.01");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    for kill in 0..4 {
        let loads = [load(&relay), load(&relay), load(&relay)];
        // From the first batches to a hundredth one, however slow the machine is.
        is_so(&postgres, "SELECT count(*) > 0 FROM events").await;
        sleep(Duration::from_millis(100 + 150 * kill)).await;
        let before = ids(&postgres).len();
        assert!(before > 0, "it was killed before anything was kept");
        postgres.kill();
        relay.metric_is("relay_store_open", &[], 0.0).await;
        health(&relay, "the store cannot be reached").await;
        for loading in loads {
            observer.add(end_load(loading).await);
        }
        // Nobody else waits for it.
        taken(&setup, Vendor::Segment, observer.accepted.len() as u64).await;
        let backlog = relay.metric("relay_spool_backlog_events", &["\"store\""]).await;
        assert!(backlog > 0.0, "nothing had to wait");
        postgres.go_on();
        relay.metric_is("relay_store_open", &[], 1.0).await;
        relay.metric_is("relay_spool_backlog_events", &["\"store\""], 0.0).await;
        holds_what_was_answered_ok(&postgres, &observer);
    }
    assert!(postgres.log().matches("database system was not properly shut down").count() >= 4);
    is_well(&relay).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    assert_eq!(ended.balance_of("store").delivered, observer.accepted.len() as u64);
    assert!(ended.balance_of("store").is_exact() && ended.balance(Vendor::Segment).is_exact());
    assert!(ended.count("the store cannot be reached: what it is to get waits") >= 4);
}

/// As after a failover to a standby that is no primary yet.
#[tokio::test]
async fn a_server_that_only_reads_still_answers_and_gets_what_waits_when_it_writes_again() {
    let Some(postgres) = Postgres::start(&[]) else { return };
    let (setup, relay, mut observer) = at_work(&postgres).await;
    let read_only = |on: &str| {
        postgres.sql(&format!("ALTER SYSTEM SET default_transaction_read_only = {on}"));
        postgres.sql("SELECT pg_reload_conf()");
    };
    read_only("on");
    let degraded = health(&relay, "it only reads for now").await;
    assert_eq!(relay.metric("relay_store_open", &[]).await, 0.0);
    observer.tracks(&mut relay.client(), 20).await;
    taken(&setup, Vendor::Segment, 30).await;
    relay.log_where("batch send failed, retrying", |line| line["provider"] == "store").await;
    assert_eq!(ids(&postgres).len(), 10, "it took what it may not");
    let (status, said) = relay.get("/api/v1/events/count?days=1").await;
    assert_eq!((status, &said["total"]), (200, &json!(10)), "{said}");

    read_only("off");
    delivered(&relay, 30).await;
    is_well(&relay).await;
    let ended = relay.terminate().await;
    assert_eq!(ids(&postgres), observer.accepted);
    told_no_password(&setup, &[&degraded], &ended);
}

#[tokio::test]
async fn a_server_without_a_free_connection_gets_everything_when_it_has_one() {
    let Some(postgres) = Postgres::start(&["max_connections=8", "superuser_reserved_connections=2"]) else {
        return;
    };
    let mut setup = stored(&postgres, "segment").await;
    setup.set("DURABILITY", "written");
    let take_all = || {
        let (mut taken, begun) = (Vec::new(), Instant::now());
        let clients = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'psql' AND usename = 'canary_user'";
        while postgres.sql(clients) != "6" {
            assert!(begun.elapsed() < PATIENCE, "they have {}", postgres.sql(clients));
            // One that met this look at the server was turned away, and another takes its place.
            taken.push(postgres.client());
            std::thread::sleep(Duration::from_millis(100));
        }
        taken
    };
    let others = take_all();
    let relay = setup.start().await;
    health(&relay, "too many connections").await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 20).await;
    taken(&setup, Vendor::Segment, 20).await;
    assert_eq!(relay.metric("relay_store_open", &[]).await, 0.0);
    drop(others);
    delivered(&relay, 20).await;

    // Once more, while it runs: it loses its own, and others take them.
    postgres.sql("ALTER ROLE canary_user CONNECTION LIMIT 0");
    let own =
        "SELECT count(pg_terminate_backend(pid)) > 0 FROM pg_stat_activity WHERE usename = 'canary_user'";
    assert_eq!(postgres.sql(own), "t");
    let degraded = health(&relay, "too many connections").await;
    observer.tracks(&mut relay.client(), 20).await;
    taken(&setup, Vendor::Segment, 40).await;
    postgres.sql("ALTER ROLE canary_user CONNECTION LIMIT -1");
    delivered(&relay, 40).await;
    is_well(&relay).await;
    let ended = relay.terminate().await;
    assert!(postgres.log().contains("too many connections"), "{}", postgres.log());
    assert_eq!(ids(&postgres), observer.accepted);
    told_no_password(&setup, &[&degraded], &ended);
}

/// As the server says it of a disk that is full.
#[tokio::test]
async fn a_server_without_room_still_answers_and_gets_what_waits_when_it_has_some() {
    let Some(postgres) = Postgres::start(&[]) else { return };
    let (setup, relay, mut observer) = at_work(&postgres).await;
    postgres.sql(
        "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$",
    );
    postgres.sql("CREATE TRIGGER no_room BEFORE INSERT ON events EXECUTE FUNCTION no_room()");
    observer.tracks(&mut relay.client(), 20).await;
    taken(&setup, Vendor::Segment, 30).await;
    let of_store = |line: &Value| line["provider"] == "store";
    let told = relay.log_where("batch send failed, retrying", of_store).await;
    assert!(told["error"].as_str().unwrap().contains("SQLSTATE 53100"), "{told}");
    let degraded = health(&relay, "store does not take events").await;
    assert!(degraded.contains("SQLSTATE 53100"), "{degraded}");
    let (status, said) = relay.get("/api/v1/events/count?days=1").await;
    assert_eq!((status, &said["total"]), (200, &json!(10)), "{said}");
    assert_eq!(ids(&postgres).len(), 10);

    postgres.sql("DROP TRIGGER no_room ON events");
    delivered(&relay, 30).await;
    is_well(&relay).await;
    let ended = relay.terminate().await;
    let balance = ended.balance_of("store");
    assert_eq!((ended.code, balance.dead_lettered, balance.is_exact()), (0, 0, true), "{balance:?}");
    assert_eq!(ids(&postgres), observer.accepted);
    told_no_password(&setup, &[&degraded], &ended);
}

/// As on a disk that hangs: whoever has the table lets nobody in.
#[tokio::test]
async fn a_server_that_hangs_touches_neither_callers_nor_vendors() {
    let Some(postgres) = Postgres::start(&[]) else { return };
    let (setup, relay, mut observer) = at_work(&postgres).await;
    let holder = postgres.client_that("BEGIN; LOCK TABLE events IN ACCESS EXCLUSIVE MODE");
    let locked = "SELECT count(*) > 0 FROM pg_locks WHERE granted AND mode = 'AccessExclusiveLock'
        AND relation = 'events'::regclass";
    is_so(&postgres, locked).await;
    observer.tracks(&mut relay.client(), 10).await;
    let hangs = "SELECT count(*) > 0 FROM pg_stat_activity
        WHERE wait_event_type = 'Lock' AND query LIKE '%INSERT INTO events %'";
    is_so(&postgres, hangs).await;
    observer.tracks(&mut relay.client(), 40).await;
    taken(&setup, Vendor::Segment, 60).await;
    assert_eq!(relay.metric("relay_events_total", &["\"store\"", "\"delivered\""]).await, 10.0);
    assert_eq!(relay.page("/readyz").await.0, 200);
    assert_eq!(postgres.sql(locked), "t", "it was held all the while");
    drop(holder);
    delivered(&relay, 60).await;
    is_well(&relay).await;
    let ended = relay.terminate().await;
    assert_eq!((ended.code, ended.balance_of("store").is_exact()), (0, true));
    assert_eq!(ids(&postgres), observer.accepted);
}

#[tokio::test]
async fn what_only_a_person_can_mend_ends_the_start_and_is_told_without_the_password() {
    let Some(postgres) = Postgres::start(&[]) else { return };
    let mut setup = stored(&postgres, "none").await;
    let wrong = format!("{PASSWORD}-wrong");
    for (url, says) in [
        (postgres.url_as(USER, &wrong, "relay"), "password"),
        (postgres.url_as("nobody-of-this-name", &wrong, "relay"), "password"),
        (postgres.url_as(USER, PASSWORD, "nowhere"), "database \"nowhere\" does not exist"),
        (format!("{}?sslmode={PASSWORD}", postgres.url()), "sslmode"),
        (format!("{}?sslmode=require", postgres.url()), "got a server without TLS, want one with it"),
        (postgres.url().replace(&format!(":{PASSWORD}@"), "@"), "got no password, want one in the URL"),
    ] {
        setup.set("STORE_URL", &url);
        let (code, out, error) = setup.run(&[]).await;
        assert!(code == 1 && error.contains(says), "{code} {out} {error}");
        let (code, tried, tried_error) = setup.run(&["check", "--connect"]).await;
        assert!(code == 1 && tried.contains(says), "{code} {tried} {tried_error}");
        let (code, stats, stats_error) = setup.run(&["store", "stats"]).await;
        assert!(code == 1 && stats_error.contains(says), "{code} {stats} {stats_error}");
        for said in [out, error, tried, tried_error, stats, stats_error] {
            assert!(
                !said.contains(PASSWORD) && !said.contains(USER) && !said.contains("nobody-of"),
                "{said}"
            );
        }
    }
    assert!(postgres.log().contains("password authentication failed"), "{}", postgres.log());
}

/// A password that is changed while the relay runs stops the lane, as a vendor's key does.
#[tokio::test]
async fn a_password_that_is_changed_under_way_pauses_the_store_and_burns_no_event() {
    let Some(postgres) = Postgres::start(&[]) else { return };
    let mut setup = stored(&postgres, "segment").await;
    setup.set("LOG_LEVEL", "trace");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 5).await;
    delivered(&relay, 5).await;
    postgres.sql("ALTER ROLE canary_user PASSWORD 'another'");
    postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'canary_user'");
    observer.tracks(&mut relay.client(), 5).await;
    let paused = health(&relay, "refuses its key").await;
    taken(&setup, Vendor::Segment, 10).await;
    relay.metric_is("relay_store_open", &[], 0.0).await;
    postgres.sql(&format!("ALTER ROLE canary_user PASSWORD '{PASSWORD}'"));
    delivered(&relay, 10).await;
    is_well(&relay).await;
    let metrics = relay.page("/metrics").await.1;
    let ended = relay.terminate().await;
    assert_eq!(ids(&postgres), observer.accepted);
    told_no_password(&setup, &[&paused, &metrics], &ended);
}

#[tokio::test]
async fn two_relays_share_a_database_and_answer_the_same() {
    let Some(postgres) = Postgres::start(&[]) else { return };
    let (one, other) = (stored(&postgres, "none").await, stored(&postgres, "none").await);
    // Both make the tables at once.
    let (first, second) = tokio::join!(one.start(), other.start());
    let again: Vec<_> = (0..50).map(|n| track("Order Placed", &format!("user-{}", n % 5))).collect();
    for request in &again {
        first.client().track_event(request.clone()).await.unwrap();
        second.client().track_event(request.clone()).await.unwrap();
    }
    let mut observers = [Observer::default(), Observer::default()];
    observers[0].tracks(&mut first.client(), 50).await;
    observers[1].tracks(&mut second.client(), 50).await;
    delivered(&first, 100).await;
    delivered(&second, 100).await;
    let mut sent: HashSet<String> = again.into_iter().map(|request| request.event_id).collect();
    observers.iter().for_each(|observer| sent.extend(observer.accepted.iter().cloned()));
    assert_eq!(ids(&postgres), sent);
    for relay in [&first, &second] {
        let (_, said) = relay.get("/api/v1/events/count?days=1").await;
        assert_eq!(said["total"], 150, "{said}");
        assert_eq!(relay.get("/api/v1/users/count?days=1").await.1["unique_users"], 7);
    }
    let duplicates = first.metric("relay_store_duplicates_total", &[]).await
        + second.metric("relay_store_duplicates_total", &[]).await;
    assert_eq!(duplicates, 50.0);
    assert_eq!((first.terminate().await.code, second.terminate().await.code), (0, 0));
}

#[tokio::test]
async fn an_erased_user_is_gone_from_the_server() {
    let Some(postgres) = Postgres::start(&[]) else { return };
    let setup = stored(&postgres, "none").await;
    let relay = setup.start().await;
    let then = three_days_ago();
    for user in ["erased-canary", "erased-canary", "other"] {
        relay.client().track_event(track_at(then, user)).await.unwrap();
    }
    delivered(&relay, 3).await;
    for is_known in [false, true] {
        assert_eq!(counted(&relay, then).await, [(3, is_known), (2, is_known)]);
    }
    let (code, said, error) = setup.run(&["erase", "--user-id", "erased-canary"]).await;
    assert!(code == 0 && said.contains("the store: events deleted: 2"), "{said}{error}");
    assert_eq!(counted(&relay, then).await, [(1, false), (1, false)], "what was known is forgotten");
    assert_eq!(ids(&postgres).len(), 1);
    relay.terminate().await;
    // And without a relay.
    let (code, said, error) = setup.run(&["erase", "--user-id", "other"]).await;
    assert!(code == 0 && said.contains("the store: events deleted: 1"), "{said}{error}");
    assert_eq!(ids(&postgres).len(), 0);
}

/// What the store is asked to do hides nothing, however long it takes.
#[tokio::test]
async fn a_server_is_looked_at_while_somebody_is_erased() {
    let Some(postgres) = Postgres::start(&[]) else { return };
    let setup = stored(&postgres, "none").await;
    let relay = setup.start().await;
    relay.client().track_event(track("Order Placed", "erased-canary")).await.unwrap();
    delivered(&relay, 1).await;
    // Another who writes, as a relay does.
    let writer = postgres.client_that("BEGIN; SELECT pg_advisory_xact_lock(7020655987639216483)");
    let locks = |are: &str| {
        postgres.sql(&format!("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND {are}"))
    };
    let one = async |are: &str| {
        let begun = Instant::now();
        while locks(are) != "1" {
            assert!(begun.elapsed() < PATIENCE, "want one lock that is {are}");
            sleep(Duration::from_millis(20)).await;
        }
    };
    one("granted").await;
    let watching = async {
        one("NOT granted").await;
        postgres.sql("ALTER SYSTEM SET default_transaction_read_only = on");
        postgres.sql("SELECT pg_reload_conf()");
        let degraded = health(&relay, "it only reads for now").await;
        assert_eq!(relay.metric("relay_store_open", &[]).await, 0.0);
        postgres.sql("ALTER SYSTEM RESET default_transaction_read_only");
        postgres.sql("SELECT pg_reload_conf()");
        relay.log("the store is open now").await;
        assert_eq!(locks("NOT granted"), "1", "it waits all the while");
        drop(writer);
        degraded
    };
    let args = ["erase", "--user-id", "erased-canary"];
    let ((code, said, error), degraded) = tokio::join!(setup.run(&args), watching);
    assert!(code == 0 && said.contains("the store: events deleted: 1"), "{said}{error}");
    is_well(&relay).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    told_no_password(&setup, &[&degraded], &ended);
}

/// Events of fifty people: devices that log in, identifies, aliases.
fn event(n: usize) -> Value {
    let (user, device) = (format!("user-{}", n % 50), format!("device-{}", n % 75));
    let time_ms = BASE_MS + n as i64 * 60_000;
    let mut event = json!({"id": format!("e-{n}"), "time_ms": time_ms, "accepted_ms": time_ms});
    let own = match n % 25 {
        0 => {
            json!({"kind": "identify", "user_id": user, "properties": {"plan": format!("p{}", n % 7), "é\u{1}": n}})
        }
        1 => {
            json!({"kind": "alias", "user_id": user, "previous_id": format!("old-{}", n % 50), "properties": {}})
        }
        2..10 => json!({"kind": "page", "anonymous_id": device, "properties": {"path": "/a\nb"}}),
        10..13 => {
            json!({"kind": "track", "name": "login", "user_id": user, "anonymous_id": device, "properties": {}})
        }
        _ => {
            json!({"kind": "track", "name": "click", "user_id": user, "properties": {"n": n, "deep": {"a": [1]}}})
        }
    };
    event.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
    event
}

async fn done(setup: &Setup, args: &[&str]) -> String {
    let (code, out, error) = setup.run(args).await;
    assert_eq!(code, 0, "{args:?}\n{out}{error}");
    out
}

/// The events of an export by their ids, and the facts.
fn sorted(export: &str) -> (BTreeMap<String, Value>, BTreeSet<String>) {
    let (mut events, mut facts) = (BTreeMap::new(), BTreeSet::new());
    for line in export.lines() {
        let value: Value = serde_json::from_str(line).unwrap();
        match value["id"].as_str() {
            Some(id) => assert!(events.insert(id.to_owned(), value.clone()).is_none(), "twice: {id}"),
            None => assert!(facts.insert(line.to_owned()), "twice: {line}"),
        }
    }
    (events, facts)
}

/// What a relay answers to all that can be asked of it.
async fn answers(setup: &Setup) -> Vec<Value> {
    let relay = setup.start().await;
    let mut answers = Vec::new();
    for path in [
        "/api/v1/events/count?from=2026-11-01&to=2026-11-03",
        "/api/v1/events/count?from=2026-11-01&to=2026-11-03&group_by=hour&event_name=click",
        "/api/v1/events/count?from=2026-11-01T03:00:00Z&to=2026-11-02T04:30:00Z&group_by=day",
        "/api/v1/users/count?from=2026-11-01&to=2026-11-03",
    ] {
        let (status, mut said) = relay.get(path).await;
        assert_eq!(status, 200, "{said}");
        said["meta"] = Value::Null;
        answers.push(said);
    }
    for who in [&["user-10"][..], &["user-11"], &["device-10", "--anonymous"], &["old-1", "--anonymous"]] {
        let args = [&["identity", "show"], who, &["--json"]].concat();
        answers.push(serde_json::from_str(&done(setup, &args).await).unwrap());
    }
    relay.terminate().await;
    answers
}

#[tokio::test]
async fn a_store_that_moves_to_postgresql_and_back_gives_the_same_answers() {
    let Some(postgres) = Postgres::start(&[]) else { return };
    let mut setup = stored(&postgres, "none").await;
    setup.set("STORE_URL", "sqlite:");
    let (lines, moved) = (setup.data.path().join("lines"), setup.data.path().join("moved"));
    let (lines, moved) = (lines.to_str().unwrap(), moved.to_str().unwrap());
    fs::write(lines, (0..3_000).map(|n| format!("{}\n", event(n))).collect::<String>()).unwrap();
    done(&setup, &["store", "import", lines]).await;
    done(&setup, &["identity", "split", "device-10", "user-10", "--operator", "ada", "--reason", "shared"])
        .await;
    done(&setup, &["store", "export", "--output", moved]).await;
    let before = (answers(&setup).await, sorted(&fs::read_to_string(moved).unwrap()));
    assert_eq!(before.1.0.len(), 3_000);

    setup.set("STORE_URL", &postgres.url());
    let imported = done(&setup, &["store", "import", moved]).await;
    assert!(imported.contains(": 3000 new, 0 duplicate(s)"), "{imported}");
    assert!(imported.contains("0 unstorable, 0 unreadable"), "{imported}");
    let again = done(&setup, &["store", "import", moved]).await;
    assert!(again.contains(": 0 new, 3000 duplicate(s)"), "{again}");
    assert_eq!(postgres.sql("SELECT count(*) FROM events"), "3000");
    assert!(done(&setup, &["store", "check"]).await.contains("3000 event(s); whole"));
    assert_eq!(answers(&setup).await, before.0);
    let there = sorted(&done(&setup, &["store", "export"]).await);
    assert_eq!(there, before.1);

    let back = setup.data.path().join("back.db");
    fs::write(moved, done(&setup, &["store", "export"]).await).unwrap();
    setup.set("STORE_URL", &format!("sqlite:{}", back.display()));
    done(&setup, &["store", "import", moved]).await;
    assert_eq!(answers(&setup).await, before.0);
    assert_eq!(sorted(&done(&setup, &["store", "export"]).await), before.1);
}

#[tokio::test]
async fn the_commands_work_on_a_server_beside_a_relay_and_without_one() {
    let Some(mut postgres) = Postgres::start(&[]) else { return };
    let setup = stored(&postgres, "none").await;
    let lines = setup.data.path().join("lines");
    let lines = lines.to_str().unwrap();
    fs::write(lines, (0..100).map(|n| format!("{}\n", event(n))).collect::<String>()).unwrap();
    let every_command = async || {
        done(&setup, &["store", "import", lines]).await;
        let stats = done(&setup, &["store", "stats"]).await;
        assert!(
            stats.contains("store             postgres://***@127.0.0.1")
                && stats.contains("events            100\n")
        );
        assert!(stats.contains("of times          2026-11-01T00:00:00"), "{stats}");
        let stats: Value = serde_json::from_str(&done(&setup, &["store", "stats", "--json"]).await).unwrap();
        assert_eq!((&stats["events"], &stats["default_events"]), (&json!(100), &json!(0)), "{stats}");
        assert!(done(&setup, &["store", "check"]).await.contains("100 event(s); whole"));
        let checked: Value =
            serde_json::from_str(&done(&setup, &["store", "check", "--json"]).await).unwrap();
        assert_eq!((&checked["is_whole"], &checked["events"]), (&json!(true), &json!(100)));
        let part = ["store", "export", "--from", "2026-11-01T00:10:00Z", "--to", "2026-11-01T00:20:00Z"];
        assert_eq!(done(&setup, &part).await.lines().count(), 10);
        for (command, says) in
            [(&["store", "backup", "to"][..], "pg_dump"), (&["store", "vacuum"], "autovacuum")]
        {
            let (code, out, error) = setup.run(command).await;
            assert!(code == 1 && error.contains(says) && !error.contains(PASSWORD), "{out}{error}");
        }
        done(&setup, &["identity", "split", "device-10", "user-10", "--reason", "shared"]).await;
        let log = done(&setup, &["identity", "log", "user-10"]).await;
        assert!(log.contains("put_apart device-10 with user-10") && log.contains("reason shared"), "{log}");
        done(&setup, &["identity", "join", "device-10", "user-10"]).await;
        assert!(done(&setup, &["identity", "show", "user-10"]).await.contains("counts as   user-10\n"));
        let connected = done(&setup, &["check", "--connect"]).await;
        assert!(connected.contains("store      server         ok"), "{connected}");
    };
    every_command().await;
    let relay = setup.start().await;
    every_command().await;
    relay.terminate().await;
    postgres.stop();
    for command in [&["store", "stats"][..], &["store", "import", lines], &["store", "check"]] {
        let (code, _, error) = setup.run(command).await;
        assert!(
            code == 1 && error.contains("the store cannot be opened") && !error.contains(PASSWORD),
            "{error}"
        );
    }
    let (code, out, _) = setup.run(&["check", "--connect"]).await;
    assert!(code == 1 && out.contains("store      server         failed"), "{out}");
}

/// From the start on; the relay drops it later.
#[tokio::test]
async fn what_is_older_than_the_retention_is_not_seen() {
    let Some(postgres) = Postgres::start(&[]) else { return };
    let mut setup = stored(&postgres, "none").await;
    setup.set("RETENTION_DAYS", "30");
    let now_ms = jiff::Timestamp::now().as_millisecond();
    let event = |days: i64| {
        let time_ms = now_ms - days * 86_400_000;
        json!({"id": format!("e-{days}"), "kind": "track", "name": "x", "user_id": "u", "time_ms": time_ms,
            "accepted_ms": time_ms, "properties": {}})
    };
    let lines = setup.data.path().join("lines");
    fs::write(&lines, format!("{}\n{}\n{}\n", event(40), event(20), event(0))).unwrap();
    done(&setup, &["store", "import", lines.to_str().unwrap()]).await;
    assert_eq!(ids(&postgres).len(), 3);
    let relay = setup.start().await;
    let (_, said) = relay.get("/api/v1/events/count?days=60").await;
    assert_eq!(said["total"], 2, "{said}");
    relay.terminate().await;
}
