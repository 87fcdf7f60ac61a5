//! The store as a provider of a relay that runs: once, whatever happens to the process; in
//! trouble, nobody else's.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use analytics_relay::{proto::v1::TrackEventRequest, providers::sandbox::Vendor};
use analytics_relay_store::sqlite;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::harness::{Client, Observer, Relay, Setup, identify, lines_on_disk, post, taken, track};

/// A relay that has the store and, besides, these vendors.
async fn stored(vendors: &str) -> Setup {
    let mut setup = Setup::new().await;
    setup.set("ANALYTICS_PROVIDER", vendors).set("STORE_URL", "sqlite:");
    setup.set("STORE_FLUSH_INTERVAL_SECONDS", "0.05");
    setup
}

fn file(setup: &Setup) -> PathBuf {
    setup.data_dir().join("store.db")
}

/// Every event of a store's file, read by the library.
fn events(path: &Path) -> Vec<Value> {
    let mut out = Vec::new();
    let report = sqlite::export(path, &sqlite::Wanted::default(), &mut out).unwrap();
    assert_eq!(report.damaged, 0, "parts of {} are damaged", path.display());
    let out = String::from_utf8(out).unwrap();
    let lines = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    // Behind them stands what is known about who is who.
    lines.filter(|line| line["fact"].is_null()).collect()
}

/// The ids of all events; each is there once.
fn ids(path: &Path) -> HashSet<String> {
    let events = events(path);
    let ids: HashSet<String> = events.iter().map(|event| event["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids.len(), events.len(), "an event is there twice");
    ids
}

async fn delivered(relay: &Relay, count: u64) {
    relay.metric_is("relay_events_total", &["\"store\"", "\"delivered\""], count as f64).await;
}

/// A time of a day that is over: what is said of such a day is kept for minutes.
pub(crate) fn three_days_ago() -> jiff::Timestamp {
    jiff::Timestamp::now() - jiff::SignedDuration::from_hours(72)
}

/// An event of somebody at a time.
pub(crate) fn track_at(time: jiff::Timestamp, user: &str) -> TrackEventRequest {
    TrackEventRequest { timestamp: time.as_second(), ..track("Order Placed", user) }
}

/// The events and the users of the day of a time, and of each whether the relay knew it already.
pub(crate) async fn counted(relay: &Relay, time: jiff::Timestamp) -> [(u64, bool); 2] {
    let (mut counted, day) = ([(0, false); 2], time.strftime("%F").to_string());
    for (count, (what, field)) in counted.iter_mut().zip([("events", "total"), ("users", "unique_users")]) {
        let (status, said) = relay.get(&format!("/api/v1/{what}/count?from={day}&to={day}")).await;
        assert_eq!(status, 200, "{said}");
        *count = (said[field].as_u64().unwrap(), said["meta"]["cached"].as_bool().unwrap());
    }
    counted
}

async fn killed(relay: Relay) {
    relay.signal("KILL");
    relay.ended(Instant::now()).await;
}

/// The relay does not start, and says why.
async fn refused_start(setup: &Setup, says: &str) {
    let (code, out, error) = setup.run(&[]).await;
    assert!(code == 1 && error.contains(says), "{code} {out} {error}");
}

/// The files below a directory that hold a text.
fn holding(dir: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(holding(&path, text));
        } else if fs::read(&path).unwrap_or_default().windows(text.len()).any(|it| it == text.as_bytes()) {
            found.push(path.display().to_string());
        }
    }
    found
}

#[tokio::test]
async fn a_relay_in_test_mode_keeps_what_comes_in_at_any_door_once() {
    let mut setup = Setup::new().await;
    setup.set("TEST_MODE", "true").set("STORE_FLUSH_INTERVAL_SECONDS", "0.05");
    let relay = setup.start().await;
    let mut client = relay.client();
    let again = track("Order Placed", "user-1");
    for _ in 0..3 {
        client.track_event(again.clone()).await.unwrap();
        sleep(Duration::from_millis(60)).await;
    }
    client.identify_user(identify("user-1", &[])).await.unwrap();
    let batch = json!({"batch": [
        {"type": "page", "name": "Home", "anonymousId": "device-1", "messageId": "of-http-page"},
        {"type": "track", "event": "x", "userId": "user-1", "messageId": "of-http-track"},
        {"type": "track", "event": "x", "userId": "user-1", "messageId": "of-http-track"},
    ]});
    assert_eq!(post(&relay, "/v1/batch", &batch).await, 200);
    relay.metric_is("relay_store_duplicates_total", &[], 3.0).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    let balance = ended.balance_of("store");
    assert_eq!((balance.accepted, balance.delivered, balance.is_exact()), (7, 7, true), "{balance:?}");
    let kept = ids(&setup.data_dir().join("test-mode/store.db"));
    assert_eq!(kept.len(), 4, "{kept:?}");
    assert!(kept.contains("of-http-page") && kept.contains(&again.event_id), "{kept:?}");
}

/// No thread, no file, no metric.
#[tokio::test]
async fn a_relay_without_a_store_has_nothing_of_it() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    Observer::default().tracks(&mut relay.client(), 5).await;
    taken(&setup, Vendor::Segment, 5).await;
    let tasks = fs::read_dir(format!("/proc/{}/task", relay.pid())).unwrap();
    let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    let threads: Vec<String> = names.filter(|name| name.starts_with("store")).collect();
    assert_eq!(threads, [""; 0]);
    assert!(!relay.page("/metrics").await.1.contains("relay_store_"));
    relay.terminate().await;
    assert!(!file(&setup).exists());
}

/// Callers of one process until it is gone.
async fn send_until_gone(mut client: Client, stop: Instant) -> Observer {
    let mut observer = Observer::default();
    while Instant::now() < stop {
        if observer.track(&mut client, "Order Placed", "user-1").await.is_some() {
            break;
        }
    }
    observer
}

/// Kills a relay under load again and again; returns what its callers know.
async fn killed_under_load(setup: &Setup, kills: u64) -> Observer {
    let mut random = fastrand::Rng::with_seed(14);
    let mut observer = Observer::default();
    for _ in 0..kills {
        let relay = setup.start().await;
        let until = Instant::now() + Duration::from_secs(10);
        let callers: Vec<_> = (0..4).map(|_| tokio::spawn(send_until_gone(relay.client(), until))).collect();
        // From before the first commit to the middle of a hundredth.
        sleep(Duration::from_millis(random.u64(5..300))).await;
        killed(relay).await;
        for caller in callers {
            observer.add(caller.await.unwrap());
        }
    }
    observer
}

#[tokio::test]
async fn what_was_answered_ok_is_in_the_store_once_however_often_the_relay_is_killed() {
    let mut setup = stored("none").await;
    setup.set("DURABILITY", "written").set("STORE_FLUSH_INTERVAL_SECONDS", "0.01");
    let observer = killed_under_load(&setup, 8).await;
    assert!(observer.accepted.len() > 100, "{}", observer.accepted.len());
    let relay = setup.start().await;
    relay.metric_is("relay_spool_backlog_events", &["\"store\""], 0.0).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    let kept = ids(&file(&setup));
    let lost: Vec<_> = observer.accepted.difference(&kept).collect();
    assert!(lost.is_empty(), "lost {} of {}", lost.len(), observer.accepted.len());
    let strangers: Vec<_> = kept.difference(&observer.accepted).collect();
    assert!(strangers.iter().all(|id| observer.unknown.contains(*id)), "{strangers:?}");
}

/// What was in memory alone is lost with the process; of the rest nothing is lost, and
/// nothing is there twice when its caller sends it again.
#[tokio::test]
async fn without_a_log_a_killed_relay_keeps_what_was_committed_and_nothing_twice() {
    let mut setup = stored("none").await;
    setup.set("STORE_FLUSH_INTERVAL_SECONDS", "0.01");
    let observer = killed_under_load(&setup, 4).await;
    let before = ids(&file(&setup));
    assert!(!before.is_empty());
    let sent = |id: &String| observer.accepted.contains(id) || observer.unknown.contains(id);
    assert!(before.iter().all(sent));

    let relay = setup.start().await;
    let mut client = relay.client();
    let all: Vec<&String> = observer.accepted.iter().chain(&observer.unknown).collect();
    for id in &all {
        let again = TrackEventRequest { event_id: (*id).clone(), ..track("x", "user-1") };
        client.track_event(again).await.unwrap();
    }
    let ended = relay.terminate().await;
    assert_eq!((ended.code, ended.balance_of("store").delivered), (0, all.len() as u64));
    assert_eq!(ids(&file(&setup)).len(), all.len());
}

#[tokio::test]
async fn sigterm_commits_what_is_in_hand_within_the_deadline() {
    for durability in ["memory", "written"] {
        let mut setup = stored("segment").await;
        setup.set("STORE_FLUSH_INTERVAL_SECONDS", "3600").set("DURABILITY", durability);
        let relay = setup.start().await;
        let mut observer = Observer::default();
        observer.tracks(&mut relay.client(), 200).await;
        taken(&setup, Vendor::Segment, 200).await;
        assert_eq!(relay.metric("relay_events_total", &["\"store\""]).await, 0.0, "it waits for its batch");
        assert!(relay.metric("relay_in_flight_events", &["\"store\""]).await > 0.0);
        let ended = relay.terminate().await;
        assert_eq!(ended.code, 0);
        assert!(ended.took < Duration::from_secs(8), "{:?}", ended.took);
        let balance = ended.balance_of("store");
        assert_eq!((balance.delivered, balance.is_exact()), (200, true), "{balance:?}");
        // Whoever reads it closes it too.
        assert!(!setup.data_dir().join("store.db-wal").exists(), "it was not closed");
        assert_eq!(ids(&file(&setup)), observer.accepted);
    }
}

#[tokio::test]
async fn a_damaged_file_is_set_aside_and_an_empty_one_is_begun() {
    let setup = stored("none").await;
    fs::create_dir_all(setup.data_dir()).unwrap();
    fs::write(file(&setup), "this is no store at all".repeat(1000)).unwrap();
    let relay = setup.start().await;
    let told = relay.log("store damaged, set aside; starting an empty one").await;
    assert_eq!(told["level"], "ERROR");
    Observer::default().tracks(&mut relay.client(), 3).await;
    delivered(&relay, 3).await;
    let (code, health) = relay.page("/healthz").await;
    assert!(code == 200 && health.contains("store.db-damaged-"), "{health}");
    assert_eq!(relay.metric("relay_store_set_aside", &[]).await, 1.0);
    relay.terminate().await;
    assert_eq!(ids(&file(&setup)).len(), 3);
    // With what was in it before.
    let aside = fs::read_dir(setup.data_dir()).unwrap().map(|entry| entry.unwrap().path());
    let aside: Vec<_> = aside.filter(|path| path.to_string_lossy().contains("damaged")).collect();
    assert!(fs::read_to_string(&aside[0]).unwrap().starts_with("this is no store"), "{aside:?}");

    let relay = setup.start().await;
    assert_eq!(relay.page("/healthz").await.1, "SERVING");
    relay.terminate().await;
}

/// The version stands in the file's head.
#[tokio::test]
async fn a_file_of_a_newer_relay_stays_as_it_is() {
    let setup = stored("none").await;
    setup.start().await.terminate().await;
    let mut bytes = fs::read(file(&setup)).unwrap();
    bytes[60..64].copy_from_slice(&99u32.to_be_bytes());
    fs::write(file(&setup), &bytes).unwrap();
    refused_start(&setup, "it was written by a newer relay").await;
    assert_eq!(fs::read(file(&setup)).unwrap()[60..64], 99u32.to_be_bytes());
}

#[tokio::test]
async fn two_relays_cannot_have_one_file() {
    let mut first = stored("none").await;
    let shared = first.data.path().join("shared.db");
    let url = format!("sqlite:{}", shared.display());
    first.set("STORE_URL", &url);
    let relay = first.start().await;
    let mut second = stored("none").await;
    second.set("STORE_URL", &url);
    refused_start(&second, "another process writes to it").await;
    Observer::default().tracks(&mut relay.client(), 5).await;
    delivered(&relay, 5).await;
    relay.terminate().await;
    assert_eq!(ids(&shared).len(), 5);
    second.start().await.terminate().await;
}

#[tokio::test]
async fn an_erased_user_is_gone_from_the_store_and_stays_gone() {
    let mut setup = stored("none").await;
    let relay = setup.start().await;
    let mut client = relay.client();
    let then = three_days_ago();
    for _ in 0..5 {
        client.track_event(track_at(then, "erased-canary")).await.unwrap();
        client.track_event(track_at(then, "other")).await.unwrap();
    }
    client.identify_user(identify("erased-canary", &[])).await.unwrap();
    delivered(&relay, 11).await;
    for is_known in [false, true] {
        assert_eq!(counted(&relay, then).await, [(10, is_known), (2, is_known)]);
    }
    let (code, said, error) = setup.run(&["erase", "--user-id", "erased-canary"]).await;
    assert_eq!(code, 0, "{said}{error}");
    assert!(said.contains("the store: events deleted: 6"), "{said}");
    assert_eq!(counted(&relay, then).await, [(5, false), (1, false)], "what was known is forgotten");
    assert_eq!(ids(&file(&setup)).len(), 5);
    assert!(client.track_event(track("Order Placed", "erased-canary")).await.is_err());
    assert_eq!(relay.page("/healthz").await.1, "SERVING");
    relay.terminate().await;
    assert_eq!(holding(setup.data_dir(), "erased-canary"), Vec::<String>::new());

    // Those that wait for their batch are not stored behind it.
    setup.set("STORE_FLUSH_INTERVAL_SECONDS", "3600");
    let relay = setup.start().await;
    for _ in 0..5 {
        relay.client().track_event(track("Order Placed", "another-canary")).await.unwrap();
    }
    let (code, said, error) = setup.run(&["erase", "--user-id", "another-canary"]).await;
    assert!(code == 0 && said.contains("the store: events deleted: 0"), "{said}{error}");
    let ended = relay.terminate().await;
    assert_eq!((ended.code, ended.balance_of("store").dropped), (0, 5));
    assert_eq!(ids(&file(&setup)).len(), 5);
}

#[tokio::test]
async fn a_user_is_erased_from_the_store_while_no_relay_runs() {
    let mut setup = stored("none").await;
    let (code, said, _) = setup.run(&["erase", "--user-id", "nobody"]).await;
    assert!(code == 0 && said.contains("the store: nothing is in it yet"), "{said}");
    let relay = setup.start().await;
    for user in ["erased-canary", "other"] {
        relay.client().track_event(track("Order Placed", user)).await.unwrap();
    }
    relay.terminate().await;
    assert!(!holding(setup.data_dir(), "erased-canary").is_empty());
    let (code, said, error) = setup.run(&["erase", "--user-id", "erased-canary"]).await;
    assert_eq!(code, 0, "{said}{error}");
    assert!(said.contains("the store: events deleted: 1"), "{said}");
    assert_eq!(holding(setup.data_dir(), "erased-canary"), Vec::<String>::new());
    assert_eq!(ids(&file(&setup)).len(), 1);

    // What was set aside may hold them, and nobody can tell.
    fs::write(setup.data_dir().join("store.db-damaged-1"), "x").unwrap();
    let (code, said, _) = setup.run(&["erase", "--user-id", "erased-canary"]).await;
    assert!(code == 2 && said.contains("store.db-damaged-1: a damaged store"), "{code} {said}");
    setup.set("STORE_URL", "none");
    let (_, said, _) = setup.run(&["erase", "--user-id", "erased-canary"]).await;
    assert!(said.contains("the store: none (STORE_URL)"), "{said}");
}

/// A relay that is killed between the request and the deletion does it at its next start.
#[tokio::test]
async fn what_was_asked_to_be_erased_is_erased_at_the_next_start() {
    let setup = stored("none").await;
    let relay = setup.start().await;
    relay.client().track_event(track("Order Placed", "erased-canary")).await.unwrap();
    delivered(&relay, 1).await;
    killed(relay).await;
    let dir = setup.data_dir().join("erasures");
    fs::create_dir(&dir).unwrap();
    let asked = dir.join("0000000000001-00000001.json");
    fs::write(&asked, r#"{"user_ids":["erased-canary"],"anonymous_ids":[]}"#).unwrap();
    let relay = setup.start().await;
    relay.log("erased users are deleted from the store").await;
    relay.terminate().await;
    assert!(!asked.exists() && ids(&file(&setup)).is_empty());
    assert_eq!(holding(setup.data_dir(), "erased-canary"), Vec::<String>::new());
}

#[tokio::test]
async fn machines_that_are_kept_out_of_providers_are_in_the_store() {
    let mut setup = stored("segment").await;
    setup.set("BOTS", "keep_out_of_providers");
    let relay = setup.start().await;
    let event = |agent: &str, id: &str| json!({"event": "x", "userId": "user-1", "messageId": id, "context": {"userAgent": agent}});
    let googlebot = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)";
    assert_eq!(post(&relay, "/v1/track", &event(googlebot, "of-a-machine-0123456789")).await, 200);
    let firefox = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0";
    assert_eq!(post(&relay, "/v1/track", &event(firefox, "of-somebody-0123456789")).await, 200);
    taken(&setup, Vendor::Segment, 1).await;
    delivered(&relay, 2).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.balance(Vendor::Segment).not_for, 1);
    assert_eq!(ids(&file(&setup)).len(), 2);
    assert_eq!(setup.sandbox.taken(Vendor::Segment)[0].id, "of-somebody-0123456789");
}

/// It is named in the file of rules as any provider is.
#[tokio::test]
async fn privacy_rules_and_consent_hold_for_the_store_by_its_name() {
    let mut setup = stored("segment").await;
    let rules = setup.data.path().join("privacy.toml");
    let text = "[providers.store]\ndeny = [\"email\"]\n[consent.categories]\nanalytics = [\"store\"]\n";
    fs::write(&rules, text).unwrap();
    setup.set("PRIVACY_FILE", rules.to_str().unwrap());
    let relay = setup.start().await;
    let event = |id: &str, consents: bool| {
        json!({"event": "x", "userId": "user-1", "messageId": id,
            "properties": {"email": "canary@example.com", "plan": "pro"},
            "context": {"consent": {"categoryPreferences": {"analytics": consents}}}})
    };
    post(&relay, "/v1/track", &event("with-consent-0123456789", true)).await;
    post(&relay, "/v1/track", &event("without-consent-0123456789", false)).await;
    taken(&setup, Vendor::Segment, 2).await;
    delivered(&relay, 1).await;
    relay.terminate().await;
    let events = events(&file(&setup));
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["id"], "with-consent-0123456789");
    assert_eq!(events[0]["properties"], json!({"plan": "pro"}));
}

/// In memory mode what the store does not take in its attempts becomes dead letters, and goes
/// to it later; beside a relay that has it open nothing is touched.
#[tokio::test]
async fn dead_letters_of_the_store_are_replayed_into_it_once() {
    let mut setup = stored("segment").await;
    // No file system has such names, which passes for a disk in trouble.
    setup.set("STORE_URL", &format!("sqlite:{}", "x".repeat(300)));
    let relay = setup.start().await;
    relay.log("the store cannot be opened now: what it is to get waits").await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 10).await;
    relay.client().identify_user(identify("user-1", &[])).await.unwrap();
    taken(&setup, Vendor::Segment, 11).await;
    relay.metric_is("relay_events_total", &["\"store\"", "\"dead_lettered\""], 11.0).await;
    let health = relay.page("/healthz").await.1;
    assert!(health.contains("the store cannot be opened"), "{health}");
    assert_eq!(relay.page("/readyz").await.0, 200);
    relay.terminate().await;
    assert_eq!(lines_on_disk(&setup.data_dir().join("dead-letters/store")).len(), 11);

    setup.set("STORE_URL", "sqlite:");
    let relay = setup.start().await;
    let (code, out, error) = setup.run(&["dead-letters", "replay"]).await;
    assert!(code == 1 && error.contains("a running relay has it open"), "{code} {out} {error}");
    relay.terminate().await;
    let (code, out, error) = setup.run(&["dead-letters", "replay", "--provider", "store"]).await;
    assert!(code == 0 && out.contains("delivered 11"), "{code} {out} {error}");
    let kept = ids(&file(&setup));
    assert!(kept.len() == 11 && observer.accepted.is_subset(&kept));
    assert_eq!(lines_on_disk(&setup.data_dir().join("dead-letters/store")).len(), 0);
    setup.start().await.terminate().await;
}

/// Without a log what waits for the store when the relay stops is in a file until the next start.
#[tokio::test]
async fn in_memory_mode_a_store_that_took_nothing_gets_everything_once_at_the_next_start() {
    let mut setup = stored("segment").await;
    setup.set("STORE_URL", &format!("sqlite:{}", "x".repeat(300))).set("DRAIN_TIMEOUT_SECONDS", "1");
    // What it is to get is not given up before.
    setup.set("MAX_RETRY_ATTEMPTS", "100").set("INITIAL_RETRY_DELAY_MS", "10000");
    setup.set("MAX_RETRY_DELAY_MS", "10000");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 50).await;
    taken(&setup, Vendor::Segment, 50).await;
    let ended = relay.terminate().await;
    let balance = ended.balance_of("store");
    assert_eq!((ended.code, balance.spilled, balance.is_exact()), (0, 50, true), "{balance:?}");
    let spill = setup.data_dir().join("spill/store");
    assert_eq!(lines_on_disk(&spill).len(), 50);

    setup.set("STORE_URL", "sqlite:");
    let relay = setup.start().await;
    delivered(&relay, 50).await;
    let ended = relay.terminate().await;
    let balance = ended.balance_of("store");
    assert_eq!((ended.code, balance.reloaded, balance.delivered), (0, 50, 50), "{balance:?}");
    assert_eq!(lines_on_disk(&spill).len(), 0);
    assert_eq!(ids(&file(&setup)), observer.accepted);
}

/// What waits for a store that cannot be opened stays in the log, and goes to it by itself.
#[tokio::test]
async fn with_a_log_a_store_that_comes_back_gets_everything() {
    let mut setup = stored("segment").await;
    setup.set("DURABILITY", "written").set("STORE_URL", &format!("sqlite:{}", "x".repeat(300)));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 100).await;
    taken(&setup, Vendor::Segment, 100).await;
    assert_eq!(relay.terminate().await.balance_of("store").spilled, 100);
    setup.set("STORE_URL", "sqlite:");
    let relay = setup.start().await;
    delivered(&relay, 100).await;

    let id = observer.accepted.iter().next().unwrap();
    let (_, explained, _) = setup.run(&["explain", id]).await;
    assert!(explained.contains("store        delivered"), "{explained}");
    relay.terminate().await;
    assert_eq!(ids(&file(&setup)), observer.accepted);
}

#[tokio::test]
async fn a_store_that_a_person_suspends_gets_its_events_when_it_is_resumed() {
    let setup = stored("none").await;
    assert_eq!(setup.run(&["providers", "suspend", "store"]).await.0, 0);
    let relay = setup.start().await;
    Observer::default().tracks(&mut relay.client(), 10).await;
    relay.metric_is("relay_lane_events", &["\"store\""], 10.0).await;
    assert!(ids(&file(&setup)).is_empty());
    assert_eq!(setup.run(&["providers", "resume", "store"]).await.0, 0);
    delivered(&relay, 10).await;
    relay.terminate().await;
    assert_eq!(ids(&file(&setup)).len(), 10);
}

#[tokio::test]
async fn what_is_in_the_store_is_measured() {
    let setup = stored("none").await;
    let relay = setup.start().await;
    Observer::default().tracks(&mut relay.client(), 20).await;
    delivered(&relay, 20).await;
    relay.metric_is("relay_store_open", &[], 1.0).await;
    relay.metric_is("relay_store_lag_seconds", &[], 0.0).await;
    assert!(relay.metric("relay_store_append_duration_seconds_count", &[]).await >= 1.0);
    assert_eq!(relay.metric("relay_store_damaged", &[]).await, 0.0);
    // It is counted every ten seconds.
    relay.metric_is("relay_store_events", &[], 20.0).await;
    assert!(relay.metric("relay_store_file_bytes", &[]).await > 0.0);
    assert_eq!(relay.metric("relay_store_hot_events", &[]).await, 20.0);
    relay.terminate().await;
}

#[tokio::test]
async fn the_commands_know_the_store_and_its_password_is_nowhere() {
    let mut setup = stored("none").await;
    let (code, out, error) = setup.run(&["check", "--connect"]).await;
    assert!(code == 0 && out.contains("store      file           ok"), "{out}{error}");
    assert!(!file(&setup).exists(), "it was only looked for");
    setup.set("STORE_URL", "postgres://user:canary@db.example/x");
    let (_, out, error) = setup.run(&["check"]).await;
    assert!(out.contains("STORE_URL=postgres://***@db.example/x"), "{out}{error}");
    for text in [out, error] {
        assert!(!text.contains("canary"), "{text}");
    }
    setup.set("ANALYTICS_PROVIDER", "segment,store");
    let (_, _, error) = setup.run(&["check"]).await;
    assert!(error.contains("STORE_URL names the store"), "{error}");
}
