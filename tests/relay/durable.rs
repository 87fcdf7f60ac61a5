//! A relay with a log: what was answered OK survives its process, and a provider
//! that is down costs disk and nothing else.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::Durability,
    providers::sandbox::{Fault, Vendor},
};
use tokio::time::sleep;
use tonic::Code;
use tonic_types::StatusExt;

use crate::harness::{
    Balance, Ended, Observer, Relay, Setup, eventually, lines_on_disk, not_run, taken, track,
};

async fn durable(level: &str) -> Setup {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", level).set("SPOOL_SEGMENT_BYTES", "65536");
    setup
}

fn fault(text: &str) -> Option<Fault> {
    Some(text.parse().unwrap())
}

fn all_down(setup: &Setup, text: &str) {
    Vendor::ALL.into_iter().for_each(|vendor| setup.sandbox.always(vendor, fault(text)));
}

fn all_up(setup: &Setup) {
    Vendor::ALL.into_iter().for_each(|vendor| setup.sandbox.always(vendor, None));
}

fn segments(setup: &Setup) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(setup.data_dir().join("spool/segments"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "log"))
        .collect();
    paths.sort();
    paths
}

async fn killed(relay: Relay) {
    relay.signal("KILL");
    let ended = relay.ended(Instant::now()).await;
    assert_eq!(ended.code, -1, "killed by a signal");
}

/// Everything that was answered OK has arrived everywhere, and the account is
/// exact.
fn check_all_delivered(observer: &Observer, setup: &Setup, ended: &Ended) {
    for vendor in Vendor::ALL {
        let account = observer.check(setup, vendor);
        assert_eq!(account.delivered, observer.accepted.len() as u64, "{vendor:?}");
        let balance: Balance = ended.balance(vendor);
        assert!(balance.is_exact(), "{vendor:?} {balance:?}");
        assert_eq!((balance.dropped, balance.spilled), (0, 0), "{vendor:?} {balance:?}");
    }
}

#[tokio::test]
async fn what_was_answered_ok_survives_sigkill() {
    for level in ["written", "synced"] {
        let setup = durable(level).await;
        all_down(&setup, "503");
        let relay = setup.start().await;
        let mut observer = Observer::default();
        observer.tracks(&mut relay.client(), 300).await;
        killed(relay).await;
        assert!(segments(&setup).len() > 1, "several segments");

        all_up(&setup);
        let relay = setup.start().await;
        observer.tracks(&mut relay.client(), 10).await;
        for vendor in Vendor::ALL {
            taken(&setup, vendor, 310).await;
        }
        let ended = relay.terminate().await;
        assert_eq!(ended.code, 0);
        check_all_delivered(&observer, &setup, &ended);
        let balance = ended.balance(Vendor::Mixpanel);
        assert_eq!((balance.accepted, balance.reloaded, balance.delivered), (10, 300, 310), "{level}");
        assert_eq!(segments(&setup).len(), 1, "what everybody has is removed");
    }
}

#[tokio::test]
async fn a_request_gets_the_level_that_it_asks_for_and_is_told_which() {
    let setup = durable("written").await;
    let relay = setup.start().await;
    let mut client = relay.client();
    for (asked, got) in [
        (Durability::Unspecified, Durability::Written),
        (Durability::Queued, Durability::Queued),
        (Durability::Written, Durability::Written),
        (Durability::Synced, Durability::Synced),
    ] {
        let request = analytics_relay::proto::v1::TrackEventRequest {
            durability: asked.into(),
            ..track("Order Placed", "user-1")
        };
        let answer = client.track_event(request).await.unwrap().into_inner();
        assert_eq!(answer.durability(), got, "{asked:?}");
    }
    taken(&setup, Vendor::Segment, 4).await;
    assert_eq!(relay.metric("relay_events_accepted_total", &[]).await, 4.0);
    relay.terminate().await;

    let setup = Setup::new().await;
    let relay = setup.start().await;
    let request = analytics_relay::proto::v1::TrackEventRequest {
        durability: Durability::Synced.into(),
        ..track("Order Placed", "user-1")
    };
    let refused = relay.client().track_event(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(
        refused.message(),
        "durability: got SYNCED, want none or QUEUED (this relay runs DURABILITY=memory)"
    );
    assert_eq!(refused.get_error_details().error_info().unwrap().reason, "DURABILITY_UNAVAILABLE");
}

/// Many more events than the queue and the lane can hold in memory, while one
/// provider is down: it gets all of them later, from the log.
#[tokio::test]
async fn a_provider_that_is_down_costs_disk_and_nothing_else() {
    let mut setup = durable("synced").await;
    setup.set("QUEUE_MAX_EVENTS", "100").set("BATCH_SIZE", "20");
    setup.sandbox.always(Vendor::Amplitude, fault("503"));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 1500).await;
    for vendor in [Vendor::Mixpanel, Vendor::Segment] {
        taken(&setup, vendor, 1500).await;
    }
    assert_eq!(setup.sandbox.stats(Vendor::Amplitude).taken, 0);
    relay.metric_is("relay_spool_backlog_events", &["amplitude"], 1500.0).await;
    let letters = relay.metric("relay_events_total", &["dead_lettered"]).await;
    assert_eq!(letters, 0.0, "no cycle of attempts makes a dead letter while there is a log");
    assert!(relay.metric("relay_retries_total", &["amplitude"]).await > 10.0, "several cycles");

    setup.sandbox.always(Vendor::Amplitude, None);
    taken(&setup, Vendor::Amplitude, 1500).await;
    let ended = relay.terminate().await;
    check_all_delivered(&observer, &setup, &ended);
}

#[tokio::test]
async fn sigterm_leaves_the_rest_in_the_log_without_waiting_for_the_deadline() {
    let mut setup = durable("synced").await;
    setup.set("DRAIN_TIMEOUT_SECONDS", "20");
    setup.sandbox.always(Vendor::Segment, fault("503"));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 120).await;
    taken(&setup, Vendor::Mixpanel, 120).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    assert!(ended.took < Duration::from_secs(10), "{:?}", ended.took);
    let balance = ended.balance(Vendor::Segment);
    assert_eq!((balance.accepted, balance.spilled, balance.in_flight), (120, 120, 0));
    assert_eq!(ended.balance(Vendor::Mixpanel).delivered, 120);

    setup.sandbox.always(Vendor::Segment, None);
    let relay = setup.start().await;
    taken(&setup, Vendor::Segment, 120).await;
    let ended = relay.terminate().await;
    let balance = ended.balance(Vendor::Segment);
    assert_eq!((balance.reloaded, balance.delivered), (120, 120));
    check_all_delivered(&observer, &setup, &ended);
    assert_eq!(observer.check(&setup, Vendor::Mixpanel).copies, 120, "nothing was sent twice");
}

/// The log has an end: then callers are told at once, and the relay goes on by
/// itself when there is room again.
#[tokio::test]
async fn a_full_log_refuses_and_takes_again_without_a_restart() {
    let mut setup = durable("synced").await;
    setup.set("SPOOL_MAX_BYTES", "262144").set("SPOOL_WHEN_FULL", "reject");
    all_down(&setup, "503");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    let mut client = relay.client();
    let refused = loop {
        let request = track("Order Placed", "user-1");
        let id = request.event_id.clone();
        match client.track_event(request).await {
            Ok(_) => observer.accepted.insert(id),
            Err(status) => break status,
        };
        assert!(observer.accepted.len() < 2000, "never full");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let details = refused.get_error_details();
    assert_eq!(details.error_info().unwrap().reason, "SPOOL_FULL");
    assert!(details.retry_info().unwrap().retry_delay.is_some());
    let start = Instant::now();
    while !relay.page("/healthz").await.1.contains("the spool is full") {
        // It is full for a moment after each event that it refuses.
        observer.track(&mut client, "Order Placed", "user-1").await;
        assert!(start.elapsed() < Duration::from_secs(20), "health does not tell");
    }
    assert_eq!(
        relay.page("/readyz").await.0,
        200,
        "it is ready: a provider in trouble is no reason to leave"
    );

    all_up(&setup);
    let start = Instant::now();
    while observer.track(&mut client, "Order Placed", "user-1").await.is_some() {
        assert!(start.elapsed() < Duration::from_secs(20), "it does not take events again");
        sleep(Duration::from_millis(50)).await;
    }
    for vendor in Vendor::ALL {
        taken(&setup, vendor, observer.accepted.len() as u64).await;
    }
    check_all_delivered(&observer, &setup, &relay.terminate().await);
}

#[tokio::test]
async fn the_oldest_events_of_the_provider_that_is_behind_make_room_as_dead_letters() {
    let mut setup = durable("synced").await;
    setup.set("SPOOL_MAX_BYTES", "262144");
    setup.sandbox.always(Vendor::Mixpanel, fault("503"));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    let mut client = relay.client();
    while observer.accepted.len() < 1500 {
        // Refused for a moment at worst.
        observer.track(&mut client, "Order Placed", "user-1").await;
    }
    for vendor in [Vendor::Amplitude, Vendor::Segment] {
        taken(&setup, vendor, 1500).await;
    }
    let letters = || lines_on_disk(&setup.data_dir().join("dead-letters/mixpanel"));
    eventually("dead letters", || letters().len() > 100).await;
    // It was told long before.
    let warning = relay.log("a provider has used up half of its share of the spool").await;
    assert_eq!((&warning["provider"], &warning["level"]), (&"mixpanel".into(), &"WARN".into()), "{warning}");
    relay.metric_is("relay_spool_filling", &["mixpanel"], 1.0).await;
    relay.metric_is("relay_spool_filling", &["segment"], 0.0).await;
    let health = relay.page("/healthz").await.1;
    let told = "of its share of the spool: its oldest events become dead letters when it is full";
    assert!(health.contains("mixpanel has used up") && health.contains(told), "{health}");
    assert!(letters().iter().all(|letter| letter["reason"] == "spool_full"));
    setup.sandbox.always(Vendor::Mixpanel, None);
    eventually("all of them have ended", || {
        setup.sandbox.stats(Vendor::Mixpanel).taken + letters().len() as u64 >= 1500
    })
    .await;
    let ended = relay.terminate().await;
    let account = observer.check(&setup, Vendor::Mixpanel);
    let balance = ended.balance(Vendor::Mixpanel);
    assert!(balance.is_exact(), "{balance:?}");
    assert_eq!((balance.delivered, balance.dead_lettered), (account.delivered, account.dead_lettered));
    assert_eq!(balance.dropped, 0);
}

/// When dead letters are full too, what was promised stays and what is new is
/// refused.
#[tokio::test]
async fn nothing_that_stands_in_the_log_is_dropped_because_dead_letters_are_full() {
    let mut setup = durable("synced").await;
    setup.set("SPOOL_MAX_BYTES", "262144").set("DEAD_LETTERS_MAX_BYTES", "100000");
    setup.sandbox.always(Vendor::Mixpanel, fault("503"));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    let mut client = relay.client();
    let letters = || lines_on_disk(&setup.data_dir().join("dead-letters/mixpanel")).len();
    let start = Instant::now();
    let mut refused = 0;
    while letters() == 0 || refused < 20 {
        refused += usize::from(observer.track(&mut client, "Order Placed", "user-1").await.is_none());
        assert!(start.elapsed() < Duration::from_secs(60), "{} and {refused}", observer.accepted.len());
    }
    assert_eq!(relay.metric("relay_events_total", &["mixpanel", "\"dropped\""]).await, 0.0);
    all_up(&setup);
    let all = observer.accepted.len() as u64;
    taken(&setup, Vendor::Mixpanel, all - letters() as u64).await;
    let ended = relay.terminate().await;
    let balance = ended.balance(Vendor::Mixpanel);
    assert_eq!((balance.dropped, balance.delivered + balance.dead_lettered), (0, all), "{balance:?}");
}

/// A provider that was taken out of the configuration with events in the log.
async fn segment_was_taken_out(setup: &mut Setup, events: usize) {
    setup.sandbox.always(Vendor::Segment, fault("503"));
    let relay = setup.start().await;
    Observer::default().tracks(&mut relay.client(), events).await;
    taken(setup, Vendor::Mixpanel, events as u64).await;
    relay.terminate().await;
    setup.set("ANALYTICS_PROVIDER", "mixpanel,amplitude");
}

#[tokio::test]
async fn events_of_a_provider_that_was_taken_out_make_room_and_never_have_an_event_refused() {
    for when_full in ["reject", "dead_letter_oldest"] {
        let mut setup = durable("synced").await;
        setup.set("SPOOL_MAX_BYTES", "327680").set("SPOOL_WHEN_FULL", when_full);
        segment_was_taken_out(&mut setup, 200).await;
        let relay = setup.start().await;
        let mut observer = Observer::default();
        // Five times what the log takes. The others keep up, as it is not they that
        // may hold the log here.
        for part in 1..=30 {
            observer.tracks(&mut relay.client(), 100).await;
            for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
                taken(&setup, vendor, 200 + part * 100).await;
            }
        }
        assert_eq!(observer.accepted.len(), 3000, "{when_full}");
        let letters = relay.metric("relay_spool_unnamed_ended_total", &["dead_lettered", "spool_full"]).await;
        let dropped = relay.metric("relay_spool_unnamed_ended_total", &["dropped", "spool_full"]).await;
        assert!(letters > 0.0 && letters + dropped > 1000.0, "{letters} and {dropped}");
        let ended = relay.terminate().await;
        for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
            assert_eq!(ended.balance(vendor).delivered, 3000);
        }
        let on_disk = lines_on_disk(&setup.data_dir().join("dead-letters/segment"));
        assert!(on_disk.len() as f64 >= letters, "{letters}");
        assert!(on_disk.iter().all(|letter| letter["reason"] == "spool_full"));
        // Named again it gets the rest, and nothing is missing.
        let (_, out, _) = setup.run(&["spool", "list"]).await;
        let account =
            out.lines().find(|line| line.starts_with("segment      accepted 3200 = ")).unwrap_or(&out);
        let number = |name: &str| -> u64 {
            let words: Vec<&str> = account.split_whitespace().collect();
            let at = words.iter().position(|word| *word == name).unwrap_or_else(|| panic!("{name}: {out}"));
            words[at + 1].parse().unwrap()
        };
        let sum = number("delivered") + number("dead_lettered") + number("dropped") + number("spooled");
        assert_eq!((sum, number("delivered")), (3200, 0), "{account}");
    }
}

#[tokio::test]
async fn the_retention_holds_for_a_provider_that_was_taken_out_too() {
    let mut setup = durable("synced").await;
    segment_was_taken_out(&mut setup, 150).await;
    // Two seconds.
    setup.set("SPOOL_RETENTION_HOURS", "0.00056");
    let relay = setup.start().await;
    let letters = || lines_on_disk(&setup.data_dir().join("dead-letters/segment"));
    eventually("they expire", || letters().len() == 150).await;
    assert!(letters().iter().all(|letter| letter["reason"] == "expired" && letter["provider"] == "segment"));
    let start = Instant::now();
    while relay.page("/healthz").await.1 != "SERVING" {
        assert!(start.elapsed() < Duration::from_secs(20), "{}", relay.page("/healthz").await.1);
        sleep(Duration::from_millis(20)).await;
    }
    relay.terminate().await;
}

/// One provider's share is smaller than the log: it alone gives up its oldest.
#[tokio::test]
async fn a_providers_own_share_of_the_log_can_be_smaller() {
    let mut setup = durable("synced").await;
    setup.set("SEGMENT_SPOOL_MAX_BYTES", "131072");
    for vendor in [Vendor::Segment, Vendor::Mixpanel] {
        setup.sandbox.always(vendor, fault("503"));
    }
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 1000).await;
    relay.dead_lettered(Vendor::Segment, 100).await;
    assert_eq!(relay.metric("relay_events_total", &["mixpanel", "\"dead_lettered\""]).await, 0.0);
    all_up(&setup);
    taken(&setup, Vendor::Mixpanel, 1000).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.balance(Vendor::Mixpanel).delivered, 1000);
    assert!(ended.balance(Vendor::Segment).is_exact());
}

#[tokio::test]
async fn what_is_older_than_the_retention_becomes_a_dead_letter() {
    let mut setup = durable("synced").await;
    // Two seconds.
    setup.set("SPOOL_RETENTION_HOURS", "0.00056");
    setup.sandbox.always(Vendor::Amplitude, fault("503"));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 150).await;
    relay.dead_lettered(Vendor::Amplitude, 150).await;
    let ended = relay.terminate().await;
    let letters = lines_on_disk(&setup.data_dir().join("dead-letters/amplitude"));
    assert!(letters.iter().all(|letter| letter["reason"] == "expired"));
    assert_eq!(observer.check(&setup, Vendor::Amplitude).dead_lettered, 150);
    for vendor in Vendor::ALL {
        assert!(ended.balance(vendor).is_exact());
        assert_eq!(ended.balance(vendor).spilled, 0);
    }
    assert_eq!(ended.balance(Vendor::Mixpanel).delivered, 150);
}

/// A refused key pauses the provider; its events wait in the log, across a
/// restart with the right key.
#[tokio::test]
async fn events_of_a_refused_key_wait_in_the_log() {
    let mut setup = durable("synced").await;
    setup.set("AMPLITUDE_API_KEY", "wrong-key-1");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 40).await;
    eventually("paused", || setup.sandbox.stats(Vendor::Amplitude).requests > 0).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.balance(Vendor::Amplitude).spilled, 40);
    setup.set("AMPLITUDE_API_KEY", crate::harness::KEY);
    let relay = setup.start().await;
    taken(&setup, Vendor::Amplitude, 40).await;
    check_all_delivered(&observer, &setup, &relay.terminate().await);
}

#[tokio::test]
async fn a_provider_that_is_named_later_gets_what_the_log_holds() {
    let mut setup = durable("synced").await;
    setup.set("ANALYTICS_PROVIDER", "mixpanel");
    setup.sandbox.always(Vendor::Mixpanel, fault("503"));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 30).await;
    relay.terminate().await;
    setup.set("ANALYTICS_PROVIDER", "mixpanel,segment");
    all_up(&setup);
    let relay = setup.start().await;
    relay.log("no cursor: the provider gets everything that is in the spool").await;
    taken(&setup, Vendor::Segment, 30).await;
    taken(&setup, Vendor::Mixpanel, 30).await;
    let ended = relay.terminate().await;
    assert!(ended.balance(Vendor::Segment).is_exact());
    observer.check(&setup, Vendor::Segment);
}

#[tokio::test]
async fn a_second_relay_and_a_newer_format_are_refused() {
    let setup = durable("synced").await;
    let relay = setup.start().await;
    let spool = setup.data_dir().join("spool");
    let mut second = durable("synced").await;
    second.set("SPOOL_DIR", spool.to_str().unwrap());
    let (code, out, err) = second.run(&[]).await;
    assert_eq!(code, 1, "{out}{err}");
    assert!(err.contains("another relay is using the spool"), "{err}");
    relay.terminate().await;

    let path = &segments(&setup)[0];
    let mut bytes = fs::read(path).unwrap();
    bytes[8] = 3;
    let crc = {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes[..12]);
        hasher.update(&bytes[16..32]);
        hasher.finalize()
    };
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    fs::write(path, bytes).unwrap();
    let (code, out, err) = setup.run(&[]).await;
    assert_eq!(code, 1, "{out}{err}");
    assert!(err.contains("got format version 3, want at most 2: a newer relay wrote it"), "{err}");
}

/// Damage in the middle of the log costs the events in it, counted, and nothing
/// else; the bytes are kept.
#[tokio::test]
async fn damage_is_counted_kept_aside_and_passed_over() {
    let setup = durable("synced").await;
    all_down(&setup, "503");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 400).await;
    killed(relay).await;
    let path = &segments(&setup)[0];
    let mut bytes = fs::read(path).unwrap();
    // In an event and not in a note of an attempt.
    let middle = bytes.len() / 2;
    let text = b"\"kind\":\"track\"";
    let event = bytes[middle..].windows(text.len()).position(|window| window == text).unwrap();
    bytes[middle + event] ^= 0x10;
    fs::write(path, bytes).unwrap();

    all_up(&setup);
    let relay = setup.start().await;
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 399).await;
    }
    relay.log("a range of the spool is damaged: it is kept aside and passed over").await;
    relay.metric_is("relay_spool_damaged_ranges", &[], 1.0).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 2, "a loss is told by the exit code");
    for vendor in Vendor::ALL {
        let balance = ended.balance(vendor);
        assert_eq!((balance.delivered, balance.dropped, balance.in_flight), (399, 1, 0));
    }
    assert_eq!(fs::read_dir(setup.data_dir().join("spool/quarantine")).unwrap().count(), 1);
    assert_eq!(observer.accepted.len(), 400);
}

/// Events that an earlier run in memory mode spilled go out before those of the
/// log.
#[tokio::test]
async fn spill_files_of_memory_mode_are_taken_over() {
    let mut setup = Setup::new().await;
    setup.set("DRAIN_TIMEOUT_SECONDS", "0.5");
    setup.sandbox.always(Vendor::Segment, fault("stall"));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 30).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.balance(Vendor::Segment).spilled, 30);
    setup.sandbox.always(Vendor::Segment, None);
    setup.set("DURABILITY", "synced");
    let relay = setup.start().await;
    observer.tracks(&mut relay.client(), 5).await;
    taken(&setup, Vendor::Segment, 35).await;
    let ended = relay.terminate().await;
    let balance = ended.balance(Vendor::Segment);
    assert_eq!((balance.accepted, balance.reloaded, balance.delivered), (5, 30, 35));
    check_all_delivered(&observer, &setup, &ended);
}

/// Going back to memory mode leaves the log alone, and says so.
#[tokio::test]
async fn a_log_that_is_not_used_any_more_is_named_at_the_start() {
    let mut setup = durable("synced").await;
    setup.sandbox.always(Vendor::Mixpanel, fault("503"));
    let relay = setup.start().await;
    Observer::default().tracks(&mut relay.client(), 7).await;
    relay.terminate().await;
    setup.set("DURABILITY", "memory");
    let relay = setup.start().await;
    let line = relay.log("DURABILITY is memory: events in the spool stay there undelivered").await;
    assert_eq!((line["provider"].as_str(), line["event_count"].as_u64()), (Some("mixpanel"), Some(7)));
}

/// One event that the provider answers with a 500 each time, which names no
/// event: the others get through, and it alone goes on waiting.
#[tokio::test]
async fn an_event_that_makes_the_provider_fail_does_not_hold_up_the_others() {
    let setup = durable("synced").await;
    setup.sandbox.always(Vendor::Segment, fault("fail-name=Poison"));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    let mut client = relay.client();
    observer.tracks(&mut client, 20).await;
    observer.track(&mut client, "Poison", "user-1").await;
    observer.tracks(&mut client, 20).await;
    // That others get through is what tells poison from an outage.
    let start = Instant::now();
    while setup.sandbox.stats(Vendor::Segment).taken < 40 {
        observer.tracks(&mut client, 1).await;
        sleep(Duration::from_millis(100)).await;
        assert!(start.elapsed() < Duration::from_secs(25), "the poison holds up the others");
    }
    let ended = relay.terminate().await;
    let balance = ended.balance(Vendor::Segment);
    assert!(balance.is_exact() && balance.dead_lettered == 0, "{balance:?}");
    assert!(balance.spilled >= 1, "{balance:?}");
}

/// What lets a program see another time, if the machine has it.
fn libfaketime() -> Option<PathBuf> {
    let dirs = fs::read_dir("/usr/lib").ok()?.filter_map(|dir| Some(dir.ok()?.path()));
    let libraries = dirs.map(|dir| dir.join("faketime/libfaketime.so.1"));
    libraries.chain([PathBuf::from("/usr/lib/faketime/libfaketime.so.1")]).find(|library| library.exists())
}

/// A clock that is ten days wrong at the start, either way: nothing in the log expires by
/// it, the relay says what is the matter, and delivers.
#[tokio::test]
async fn a_start_with_a_wrong_clock_expires_nothing() {
    const TOLD: &str = "the wall clock is not where it must be: no event expires until it is, or goes on from there for an hour";
    let Some(faketime) = libfaketime() else { return not_run("libfaketime (a wrong clock)") };
    for away in ["+10d", "-10d"] {
        let mut setup = durable("synced").await;
        setup.set("SPOOL_RETENTION_HOURS", "1").set("DRAIN_TIMEOUT_SECONDS", "1");
        all_down(&setup, "503");
        let mut observer = Observer::default();
        let relay = setup.start().await;
        observer.tracks(&mut relay.client(), 20).await;
        relay.terminate().await;

        let mut command = setup.command();
        command.env("LD_PRELOAD", &faketime).env("FAKETIME", away).env("DONT_FAKE_MONOTONIC", "1");
        let relay = Relay::spawn(command).await;
        let told = relay.log(TOLD).await;
        let (now_ms, seen_ms) = (told["now_ms"].as_i64().unwrap(), told["last_seen_ms"].as_i64().unwrap());
        assert!(now_ms.abs_diff(seen_ms) > 9 * 24 * 3_600_000, "the clock is wrong: {told}");
        // As long as it takes to look at the age of events many times.
        sleep(Duration::from_secs(3)).await;
        for vendor in Vendor::ALL {
            let expired = relay.metric("relay_events_total", &[vendor.name(), "dead_lettered"]).await;
            assert_eq!(expired, 0.0, "{away}");
        }
        all_up(&setup);
        for vendor in Vendor::ALL {
            taken(&setup, vendor, 20).await;
        }
        let ended = relay.terminate().await;
        assert_eq!(ended.code, 0);
        check_all_delivered(&observer, &setup, &ended);
    }
}
