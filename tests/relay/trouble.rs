//! A provider in trouble, told from bad events, and one that a person has stopped.

use std::time::{Duration, Instant};

use analytics_relay::providers::sandbox::{Fault, Vendor};
use tokio::time::sleep;

use crate::harness::{Observer, Relay, Setup, taken};

fn fault(text: &str) -> Option<Fault> {
    Some(text.parse().unwrap())
}

/// Waits until `/healthz` says something that `is_it`.
pub(crate) async fn health(relay: &Relay, what: &str, is_it: impl Fn(&str) -> bool) -> String {
    let start = Instant::now();
    loop {
        let (_, said) = relay.page("/healthz").await;
        if is_it(&said) {
            return said;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain for {what}: {said}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// What each vendor answers when it refuses a request for its content, or names each
/// event of it.
const REFUSALS: [(Vendor, &str); 4] = [
    (Vendor::Mixpanel, "reject-every=1"),
    (Vendor::Mixpanel, "400+body={\"error\":\"some data points in the request failed validation\"}"),
    (Vendor::Amplitude, "reject-every=1"),
    (Vendor::Segment, "400+body={\"code\":400,\"message\":\"no\"}"),
];

/// A vendor that refuses everything, with dead letters that have no room, burns
/// nothing that stands in the log: not while it is so, not in a drain, and not at the
/// next start.
#[tokio::test]
async fn a_vendor_that_refuses_everything_costs_no_event() {
    for (vendor, refusal) in REFUSALS {
        for durability in ["memory", "synced"] {
            let mut setup = Setup::new().await;
            setup.set("DURABILITY", durability).set("DEAD_LETTERS_MAX_BYTES", "0");
            setup.set("MAX_RETRY_DELAY_MS", "1000").set("BATCH_SIZE", "20");
            let relay = setup.start().await;
            let mut client = relay.client();
            let mut observer = Observer::default();
            // It begins in the middle of a stream of good ones.
            observer.tracks(&mut client, 60).await;
            taken(&setup, vendor, 60).await;
            setup.sandbox.always(vendor, fault(refusal));
            observer.tracks(&mut client, 200).await;
            let others = Vendor::ALL.into_iter().filter(|other| *other != vendor);
            for other in others {
                taken(&setup, other, 260).await;
            }
            let told = health(&relay, "DEGRADED", |said| said.contains("refuses every track: 400")).await;
            assert!(
                told.starts_with(&format!("DEGRADED: {} refuses every track: 400", vendor.name())),
                "{told}"
            );
            let line = relay.log("provider refuses what it is sent: it is probed and its events wait").await;
            assert_eq!((&line["level"], &line["kind"]), (&"ERROR".into(), &"track".into()), "{line}");
            let before = setup.sandbox.stats(vendor).requests;
            sleep(Duration::from_millis(300)).await;
            let probes = setup.sandbox.stats(vendor).requests - before;
            // Probes come no closer than INITIAL_RETRY_DELAY_MS.
            assert!(probes <= 30, "{vendor:?}: {probes} requests while it refuses");
            let in_flight = relay.metric("relay_in_flight_events", &[vendor.name()]).await;
            assert!((in_flight - 200.0).abs() < 0.5, "{vendor:?} {refusal}: {in_flight}");

            let ended = relay.terminate().await;
            assert_eq!(ended.code, 0, "{vendor:?} {refusal} {durability}");
            let balance = ended.balance(vendor);
            assert!(balance.is_exact(), "{balance:?}");
            assert_eq!(
                (balance.delivered, balance.spilled),
                (60, 200),
                "{refusal} {durability}: {balance:?}"
            );
            setup.sandbox.always(vendor, None);
            let relay = setup.start().await;
            taken(&setup, vendor, 260).await;
            health(&relay, "SERVING", |said| said == "SERVING").await;
            let ended = relay.terminate().await;
            assert_eq!((ended.code, ended.balance(vendor).delivered), (0, 200));
            observer.check(&setup, vendor);
        }
    }
}

/// A wrong Mixpanel token: `/engage` says 1 to it and keeps nothing, so identifies wait
/// with the tracks until the token is right.
#[tokio::test]
async fn identifies_wait_where_only_the_other_endpoint_refuses_the_key() {
    let mut setup = Setup::new().await;
    setup.set("MIXPANEL_API_KEY", "wrong-token");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 5).await;
    relay.log("provider refuses its key or address: it is paused and its events wait").await;
    let identify = crate::harness::identify("user-7", &[]);
    relay.client().identify_user(identify).await.unwrap();
    taken(&setup, Vendor::Segment, 6).await;
    sleep(Duration::from_millis(300)).await;
    let ended = relay.terminate().await;
    let balance = ended.balance(Vendor::Mixpanel);
    assert_eq!((balance.delivered, balance.spilled), (0, 6), "{balance:?}");

    setup.set("MIXPANEL_API_KEY", crate::harness::KEY);
    let relay = setup.start().await;
    taken(&setup, Vendor::Mixpanel, 6).await;
    assert_eq!(relay.terminate().await.balance(Vendor::Mixpanel).delivered, 6);
}

/// One kind is refused, in many more events than the lane may hold of it: the other kind
/// goes on, and when it is taken again each user's identifies arrive in their order,
/// those that come in meanwhile included.
#[tokio::test]
async fn what_a_refused_kind_leaves_in_the_log_comes_back_in_order() {
    const USERS: usize = 500;
    let mut setup = Setup::new().await;
    setup.set("ANALYTICS_PROVIDER", "amplitude").set("DURABILITY", "written");
    setup.set("QUEUE_MAX_EVENTS", "200").set("MAX_RETRY_DELAY_MS", "1000");
    // An identify has no name.
    setup.sandbox.always(Vendor::Amplitude, Some(Fault::RejectNames { name: String::new() }));
    let relay = setup.start().await;
    let mut client = relay.client();
    let mut sent: Vec<Vec<String>> = Vec::new();
    let mut observer = Observer::default();
    for user in 0..USERS {
        let identify = crate::harness::identify(&format!("user-{user}"), &[]);
        sent.push(vec![client.identify_user(identify).await.unwrap().into_inner().event_id]);
        observer.tracks(&mut client, 1).await;
    }
    taken(&setup, Vendor::Amplitude, USERS as u64).await;
    health(&relay, "DEGRADED", |said| said.contains("refuses every identify")).await;
    let held = relay.metric("relay_lane_events", &["amplitude"]).await;
    assert!(held <= 150.0, "{held} are in memory, of {USERS} that wait");

    // So that there is time for new ones before the last of the old ones are read.
    setup.sandbox.always(Vendor::Amplitude, fault("delay=20"));
    relay.log("provider takes events again").await;
    for (user, ids) in sent.iter_mut().enumerate().rev() {
        let identify = crate::harness::identify(&format!("user-{user}"), &[]);
        ids.push(client.identify_user(identify).await.unwrap().into_inner().event_id);
    }
    taken(&setup, Vendor::Amplitude, 3 * USERS as u64).await;
    let arrived: Vec<String> = setup.sandbox.taken(Vendor::Amplitude).into_iter().map(|it| it.id).collect();
    let place = |id: &String| arrived.iter().position(|other| other == id).unwrap();
    for (user, ids) in sent.iter().enumerate() {
        assert!(place(&ids[0]) < place(&ids[1]), "user-{user} was overtaken");
    }
    assert_eq!(relay.terminate().await.balance(Vendor::Amplitude).delivered, 3 * USERS as u64);
}

/// The commands, beside a relay and without one: nothing is sent while a provider is
/// suspended, the others go on, a restart changes nothing, and all of it arrives once.
#[tokio::test]
async fn a_person_stops_a_provider_and_lets_it_go_on() {
    let setup = Setup::new().await;
    let (code, out, _) = setup.run(&["providers", "list"]).await;
    assert_eq!((code, out.contains("no provider is suspended")), (0, true), "{out}");
    let (code, out, _) = setup.run(&["providers", "suspend", "amplitude", "--note", "new project"]).await;
    assert_eq!((code, out.contains("suspended in")), (0, true), "{out}");
    let (code, _, err) = setup.run(&["providers", "pause", "../amplitude"]).await;
    assert_eq!((code, err.contains("want a provider's name")), (1, true), "{err}");

    let relay = setup.start().await;
    let line = relay.log("provider is suspended: its events wait").await;
    assert_eq!((&line["provider"], &line["note"]), (&"amplitude".into(), &"new project".into()));
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 100).await;
    taken(&setup, Vendor::Mixpanel, 100).await;
    taken(&setup, Vendor::Segment, 100).await;
    let told = health(&relay, "DEGRADED", |said| said != "SERVING").await;
    assert_eq!(told, "DEGRADED: amplitude is suspended by an operator");
    assert_eq!(relay.page("/readyz").await.0, 200);
    assert!((relay.metric("relay_provider_state", &["amplitude", "suspended"]).await - 1.0).abs() < 0.1);
    // One that was going is stopped while the relay runs.
    setup.run(&["providers", "suspend", "segment"]).await;
    health(&relay, "segment", |said| said.contains("segment is suspended")).await;
    observer.track(&mut relay.client(), "later", "u").await;
    taken(&setup, Vendor::Mixpanel, 101).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    assert!(ended.took < Duration::from_secs(3), "nothing is won by waiting: {:?}", ended.took);
    assert_eq!(setup.sandbox.stats(Vendor::Amplitude).requests, 0);
    assert_eq!(ended.balance(Vendor::Amplitude).spilled, 101);
    assert_eq!(ended.balance(Vendor::Segment).spilled, 1);

    let relay = setup.start().await;
    let (code, out, _) = setup.run(&["providers", "list"]).await;
    assert_eq!(code, 0);
    assert!(out.contains("amplitude    suspended since 20") && out.contains(": new project"), "{out}");
    observer.track(&mut relay.client(), "x", "u").await;
    for provider in ["amplitude", "segment"] {
        assert_eq!(setup.run(&["providers", "resume", provider]).await.0, 0);
        assert_eq!(setup.run(&["providers", "resume", provider]).await.0, 1, "it is going already");
    }
    taken(&setup, Vendor::Amplitude, 102).await;
    taken(&setup, Vendor::Segment, 102).await;
    health(&relay, "SERVING", |said| said == "SERVING").await;
    assert_eq!(relay.terminate().await.code, 0);
    let account = observer.check(&setup, Vendor::Amplitude);
    assert_eq!(account.copies, 102, "each once");
}
