//! The operator's commands on a log: beside the relay that is writing it, and
//! after its end.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use analytics_relay::providers::sandbox::Vendor;
use serde_json::Value;
use tokio::time::sleep;

use crate::harness::{Observer, Relay, Setup, lines_on_disk, taken, track};

async fn durable() -> Setup {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "synced").set("SPOOL_SEGMENT_BYTES", "65536");
    setup
}

fn stalled(setup: &Setup, vendor: Vendor) {
    setup.sandbox.always(vendor, Some("503".parse().unwrap()));
}

fn spool(setup: &Setup) -> PathBuf {
    setup.data_dir().join("spool")
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Flips a bit of an event in the middle of a segment.
fn damage(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let name = b"Order Placed";
    let middle = bytes.len() / 2;
    let found = bytes[middle..].windows(name.len()).position(|window| window == name).unwrap();
    bytes[middle + found] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

fn lines(out: &str) -> Vec<Value> {
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Runs a command until what it prints `is_so`: what a relay notes is on disk
/// a little later.
async fn soon(setup: &Setup, args: &[&str], is_so: impl Fn(&str) -> bool) -> String {
    let start = Instant::now();
    loop {
        let (_, out, err) = setup.run(args).await;
        if is_so(&out) {
            return out;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "in vain: {args:?}\n{out}{err}");
        sleep(Duration::from_millis(50)).await;
    }
}

/// Everything to Mixpanel and Amplitude, nothing to Segment.
async fn segment_is_behind(setup: &Setup, events: usize) -> (Relay, Observer) {
    stalled(setup, Vendor::Segment);
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), events).await;
    for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
        taken(setup, vendor, events as u64).await;
    }
    (relay, observer)
}

#[tokio::test]
async fn list_shows_a_live_spool_and_a_dead_one_with_an_exact_balance() {
    let setup = durable().await;
    let (relay, _) = segment_is_behind(&setup, 300).await;
    let is_all = |out: &str| {
        out.contains("mixpanel     accepted 300 = delivered 300 + dead_lettered 0 + dropped 0 + spooled 0")
            && out.contains("amplitude    accepted 300 = delivered 300")
    };
    let behind = "segment      accepted 300 = delivered 0 + dead_lettered 0 + dropped 0 + spooled 300";
    let out = soon(&setup, &["spool", "list"], is_all).await;
    assert!(out.contains("a relay is using it") && out.contains(behind), "{out}");
    assert!(out.lines().any(|line| line.ends_with("(65536 reserved)")), "{out}");
    let cursor: Vec<&str> =
        out.lines().find(|line| line.starts_with("segment      ")).unwrap().split_whitespace().collect();
    assert_eq!(cursor[..3], ["segment", "1", "300"], "{out}");
    assert!(cursor[4].ends_with('Z') && cursor[5].ends_with('s'), "{out}");

    relay.terminate().await;
    let (code, out, err) = setup.run(&["spool", "list"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("no relay is using it") && out.contains(behind) && is_all(&out), "{out}");
    assert!(out.contains("00000000000000000001.log") && out.contains("quarantine: 0 damaged"), "{out}");
    // The lock was not kept.
    setup.start().await.terminate().await;
}

#[tokio::test]
async fn verify_is_clean_beside_a_relay_under_load_and_after_its_end() {
    let setup = durable().await;
    stalled(&setup, Vendor::Segment);
    let relay = setup.start().await;
    let mut client = relay.client();
    let load = tokio::spawn(async move {
        let mut observer = Observer::default();
        observer.tracks(&mut client, 600).await;
        observer
    });
    let mut checks = 0;
    while !load.is_finished() || checks == 0 {
        let (code, out, err) = setup.run(&["spool", "verify"]).await;
        assert_eq!(code, 0, "{out}{err}");
        assert!(out.contains("; clean; a relay is writing"), "{out}");
        checks += 1;
    }
    load.await.unwrap();
    relay.terminate().await;
    let (code, out, _) = setup.run(&["spool", "verify"]).await;
    assert_eq!((code, out.contains("600 event(s); clean\n")), (0, true), "{out}");
    assert!(out.contains("cursor segment") && out.contains("lowest open 1;"), "{out}");
}

#[tokio::test]
async fn export_prints_the_events_all_or_those_a_provider_has_not_got() {
    let setup = durable().await;
    let (relay, observer) = segment_is_behind(&setup, 250).await;
    let check = async || {
        let (code, out, err) = setup.run(&["spool", "export", "--provider", "segment"]).await;
        assert_eq!((code, err.as_str()), (0, ""));
        let events = lines(&out);
        let seqs: Vec<_> = events.iter().map(|line| line["seq"].as_u64().unwrap()).collect();
        assert_eq!(seqs, (1..=250).collect::<Vec<_>>());
        assert!(events.iter().all(|line| line["durability"] == "synced"));
        for line in &events {
            assert!(observer.accepted.contains(line["event"]["id"].as_str().unwrap()), "{line}");
        }
        assert_eq!(events[0]["event"]["name"], "Order Placed");
        assert_eq!(events[0]["event"]["properties"]["total"], 19.5);
        let (_, out, _) = setup.run(&["spool", "export", "--since", "240", "--limit", "5"]).await;
        let seqs: Vec<_> = lines(&out).iter().map(|line| line["seq"].as_u64().unwrap()).collect();
        assert_eq!(seqs, [240, 241, 242, 243, 244]);
    };
    check().await;
    soon(&setup, &["spool", "export", "--provider", "mixpanel"], str::is_empty).await;
    relay.terminate().await;
    check().await;

    let (code, out, err) = setup.run(&["spool", "export", "--provider", "segmnet"]).await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        err.contains("segmnet: the spool has no such provider, only amplitude, mixpanel, segment"),
        "{err}"
    );
    // `export | head` is no failure.
    let bin = env!("CARGO_BIN_EXE_analytics-relay");
    let script =
        format!("set -o pipefail; '{bin}' spool export --dir '{}' | head -1", spool(&setup).display());
    let piped = std::process::Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!((piped.status.code(), piped.stderr.as_slice()), (Some(0), &b""[..]));
    assert_eq!(lines(&String::from_utf8(piped.stdout).unwrap()).len(), 1);
}

#[tokio::test]
async fn explain_shows_the_attempt_that_failed_and_the_one_that_did_not() {
    let mut setup = durable().await;
    setup.set("ANALYTICS_PROVIDER", "mixpanel,segment");
    stalled(&setup, Vendor::Segment);
    let relay = setup.start().await;
    let request = track("Order Placed", "user-1");
    let id = request.event_id.clone();
    let mut client = relay.client();
    client.track_event(request.clone()).await.unwrap();
    let args = ["explain", &id];
    let out = soon(&setup, &args, |out| out.contains("unavailable")).await;
    assert!(out.contains("asked for synced: number 1 in 00000000000000000001.log"), "{out}");
    assert!(out.contains("  segment      pending"), "{out}");

    setup.sandbox.always(Vendor::Segment, None);
    let json_args = ["explain", "--json", id.as_str()];
    let is_done = |out: &str| {
        serde_json::from_str::<Value>(out).is_ok_and(|told| {
            let providers = told["accepted"][0]["providers"].as_array().cloned().unwrap_or_default();
            let is_delivered = |provider: &Value| {
                let last = provider["attempts"].as_array().and_then(|attempts| attempts.last());
                provider["ended_as"] == "delivered" && last.is_some_and(|last| last["verdict"] == "delivered")
            };
            providers.len() == 2 && providers.iter().all(is_delivered)
        })
    };
    let told: Value = serde_json::from_str(&soon(&setup, &json_args, is_done).await).unwrap();
    let segment = &told["accepted"][0]["providers"][1];
    assert_eq!((&segment["provider"], &segment["state"]), (&"segment".into(), &"ended".into()));
    let attempts = segment["attempts"].as_array().unwrap();
    assert_eq!((&attempts[0]["attempt"], &attempts[0]["verdict"]), (&1.into(), &"unavailable".into()));
    assert!(attempts[0]["detail"].as_str().unwrap().contains("503"), "{told}");

    // A caller that asks again, with the same id.
    client.track_event(request).await.unwrap();
    soon(&setup, &args, |out| out.contains("number 2 in") && out.contains("number 1 in")).await;
    relay.terminate().await;
    let (code, out, err) = setup.run(&args).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("  segment      delivered\n") && out.contains("attempt 1   unavailable"), "{out}");
}

#[tokio::test]
async fn explain_finds_dead_letters_and_says_what_it_does_not_know() {
    let mut setup = durable().await;
    // Both events in one batch, however slowly they come.
    setup.set("FLUSH_INTERVAL_SECONDS", "60").set("BATCH_SIZE", "2");
    setup.sandbox.always(Vendor::Amplitude, Some("reject-name=Order Placed".parse().unwrap()));
    let relay = setup.start().await;
    let request = track("Order Placed", "user-1");
    let id = request.event_id.clone();
    relay.client().track_event(request).await.unwrap();
    // It shows that the other one is to blame.
    relay.client().track_event(track("Order Shipped", "user-1")).await.unwrap();
    relay.dead_lettered(Vendor::Amplitude, 1).await;
    relay.terminate().await;
    let (code, out, _) = setup.run(&["explain", &id]).await;
    assert_eq!(code, 0);
    assert!(out.contains("  amplitude    dead_lettered/invalid") && out.contains("not replayed"), "{out}");

    setup.sandbox.always(Vendor::Amplitude, None);
    let letters = setup.data_dir().join("dead-letters/amplitude");
    assert_eq!(lines_on_disk(&letters).len(), 1);
    fs::write(letters.join("replayed.log"), format!("{id}\n")).unwrap();
    // Without its spool the letter is all that is known.
    let elsewhere = setup.data.path().to_str().unwrap();
    let (code, out, _) = setup.run(&["explain", &id, "--dir", elsewhere]).await;
    assert_eq!(code, 0);
    assert!(out.contains("not in the spool, or not any more"), "{out}");
    assert!(out.contains("replayed: delivered since"), "{out}");

    let (code, out, _) = setup.run(&["explain", "no-such-event"]).await;
    assert_eq!(code, 1);
    for words in ["not in the spool", "not among the dead letters", "never accepted", "was removed"] {
        assert!(out.contains(words), "{words}: {out}");
    }
    let (code, out, _) = setup.run(&["explain", "--json", "no-such-event"]).await;
    assert_eq!((code, lines(&out)[0]["accepted"].as_array().unwrap().len()), (1, 0), "{out}");
    let (code, _, err) = setup.run(&["explain", ""]).await;
    assert_eq!((code, err.contains("want 1 to 100 printable ASCII characters")), (1, true), "{err}");
}

#[tokio::test]
async fn damage_is_found_by_verify_and_kept_by_repair_after_the_relays_end() {
    let setup = durable().await;
    let (relay, _) = segment_is_behind(&setup, 400).await;
    relay.signal("KILL");
    relay.ended(Instant::now()).await;
    let segments = files(&spool(&setup).join("segments"));
    damage(&segments[0]);
    // A torn end, as of a group that the machine's end cut short.
    let newest = segments.last().unwrap();
    let mut bytes = fs::read(newest).unwrap();
    let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    bytes.copy_within(32..100, used);
    fs::write(newest, bytes).unwrap();

    let (code, out, _) = setup.run(&["spool", "verify"]).await;
    assert_eq!(code, 1, "{out}");
    for words in
        ["  damaged: ", "  missing: 1 event(s): ", "  torn end: 68 bytes at ", "399 event(s); NOT clean"]
    {
        assert!(out.contains(words), "{words}: {out}");
    }
    let (code, out, err) = setup.run(&["spool", "repair"]).await;
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("a torn end of 68 bytes was kept in quarantine and cut off"), "{out}");
    assert!(out.contains("00000000000000000001.log: ") && out.contains(": kept in quarantine"), "{out}");
    assert_eq!(files(&spool(&setup).join("quarantine")).len(), 2);
    assert_eq!(files(&spool(&setup).join("segments")), segments, "nothing is removed");
    let (code, out, _) = setup.run(&["spool", "repair"]).await;
    assert_eq!((code, out.contains(": is in quarantine already")), (0, true), "{out}");
    let (code, out, _) = setup.run(&["spool", "verify"]).await;
    assert_eq!((code, out.contains("torn")), (1, false), "the event is gone for good: {out}");
    let (_, out, _) = setup.run(&["spool", "list"]).await;
    assert!(out.contains("quarantine: 2 damaged range(s)"), "{out}");
    let (code, out, err) = setup.run(&["spool", "export", "--provider", "segment"]).await;
    assert_eq!((code, out.lines().count()), (0, 399));
    assert!(err.contains("warning: 1 damaged range(s) were passed over"), "{err}");

    // The relay agrees with all of that.
    setup.sandbox.always(Vendor::Segment, None);
    let relay = setup.start().await;
    taken(&setup, Vendor::Segment, 399).await;
    let balance = relay.terminate().await.balance(Vendor::Segment);
    assert_eq!((balance.delivered, balance.dropped, balance.in_flight), (399, 1, 0));
    assert_eq!(files(&spool(&setup).join("quarantine")).len(), 2, "kept once");
}

#[tokio::test]
async fn repair_beside_a_relay_keeps_what_is_damaged_and_touches_nothing_else() {
    let setup = durable().await;
    let (relay, mut observer) = segment_is_behind(&setup, 400).await;
    let segments = files(&spool(&setup).join("segments"));
    damage(&segments[0]);
    let (code, out, _) = setup.run(&["spool", "verify"]).await;
    assert_eq!(code, 1, "{out}");
    let damaged = fs::read(&segments[0]).unwrap();
    let (code, out, err) = setup.run(&["spool", "repair"]).await;
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("it looks after the newest segment and the cursors itself"), "{out}");
    assert!(
        out.contains("damaged range(s), 1 of them new") || out.contains("is in quarantine already"),
        "{out}"
    );
    assert_eq!(fs::read(&segments[0]).unwrap(), damaged);
    assert_eq!(files(&spool(&setup).join("quarantine")).len(), 1);
    observer.tracks(&mut relay.client(), 10).await;
    relay.terminate().await;
}

#[tokio::test]
async fn without_a_spool_the_commands_say_so() {
    let setup = Setup::new().await;
    for command in [&["list"][..], &["verify"], &["export"], &["repair"], &["forget", "segment"]] {
        let (code, out, err) = setup.run(&[&["spool"], command].concat()).await;
        assert_eq!((code, out.as_str()), (1, ""), "{command:?}");
        assert!(err.contains("there is no spool in") && err.contains("data/spool"), "{command:?}: {err}");
    }
    assert!(!setup.data_dir().exists(), "looking makes nothing");
    let (code, out, _) = setup.run(&["explain", "some-event"]).await;
    assert_eq!((code, out.contains("there is no spool")), (1, true), "{out}");
}

/// A log with 200 events for Segment, which was then taken out.
async fn segment_is_taken_out() -> Setup {
    let mut setup = durable().await;
    let (relay, _) = segment_is_behind(&setup, 200).await;
    relay.terminate().await;
    setup.set("ANALYTICS_PROVIDER", "mixpanel,amplitude");
    setup
}

/// What `spool forget` says when it does nothing, and its exit code 1.
async fn is_not_forgotten(setup: &Setup, args: &[&str]) -> String {
    let (code, out, err) = setup.run(&[&["spool", "forget"], args].concat()).await;
    assert_eq!((code, out.as_str()), (1, ""), "{args:?}: {err}");
    err
}

#[tokio::test]
async fn a_provider_that_was_taken_out_is_told_of_and_forgotten_beside_the_relay() {
    let setup = segment_is_taken_out().await;
    let relay = setup.start().await;
    let health = relay.page("/healthz").await.1;
    assert!(
        health.starts_with("DEGRADED: the spool keeps 200 events of segment")
            && health.contains("analytics-relay spool forget segment"),
        "{health}"
    );
    relay.metric_is("relay_spool_unnamed_events", &[], 200.0).await;

    let err = is_not_forgotten(&setup, &["segment"]).await;
    assert!(err.contains("200 event(s)") && err.contains("--yes") && err.contains("spool export"), "{err}");
    let err = is_not_forgotten(&setup, &["mixpanel", "--yes"]).await;
    assert!(err.contains("it is among the vendors in ANALYTICS_PROVIDER"), "{err}");
    let err = is_not_forgotten(&setup, &["segmnet", "--yes"]).await;
    assert!(err.contains("no such provider, only amplitude, mixpanel, segment"), "{err}");
    assert!(is_not_forgotten(&setup, &[]).await.contains("<PROVIDER>"));
    assert_eq!(relay.metric("relay_spool_unnamed_events", &[]).await, 200.0, "nothing was done");

    let (code, out, err) = setup.run(&["spool", "forget", "segment", "--yes"]).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert_eq!(out, "segment: forgotten, with 200 event(s) that it had not got\n");
    let ended = relay.metric("relay_spool_unnamed_ended_total", &["dropped", "forgotten"]).await;
    assert_eq!(ended, 200.0);
    let start = Instant::now();
    while relay.page("/healthz").await.1 != "SERVING" {
        assert!(start.elapsed() < Duration::from_secs(20), "{}", relay.page("/healthz").await.1);
        sleep(Duration::from_millis(20)).await;
    }
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 50).await;
    relay.terminate().await;
    let (_, out, _) = setup.run(&["spool", "list"]).await;
    assert!(!out.contains("segment  "), "{out}");
    assert!(setup.start().await.terminate().await.balance(Vendor::Mixpanel).is_exact());
}

#[tokio::test]
async fn a_provider_is_forgotten_without_a_relay_and_never_one_that_a_relay_delivers_to() {
    let mut setup = segment_is_taken_out().await;
    let (code, out, err) = setup.run(&["spool", "forget", "segment", "--yes"]).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(!spool(&setup).join("cursors/segment.cursor").exists());
    let err = is_not_forgotten(&setup, &["segment", "--yes"]).await;
    assert!(err.contains("no such provider, only amplitude, mixpanel"), "{err}");

    // Somebody asks from an environment that is not the relay's.
    let relay = setup.start().await;
    setup.set("ANALYTICS_PROVIDER", "mixpanel");
    let err = is_not_forgotten(&setup, &["amplitude", "--yes"]).await;
    assert!(err.contains("the running relay delivers to it"), "{err}");
    let names = files(&spool(&setup).join("cursors"));
    assert_eq!(names.len(), 2, "no request is left behind: {names:?}");
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 10).await;
    taken(&setup, Vendor::Amplitude, 200 + 10).await;
    relay.terminate().await;
}
