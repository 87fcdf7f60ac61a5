//! The batching client against a relay that is there, away, full and killed.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use analytics_relay::{
    client::{BatchingClient, ClientSettings, Counters, NotQueued},
    proto::v1::{IdentifyUserRequest, TrackEventRequest},
    providers::sandbox::Vendor,
};
use tokio::time::{sleep, timeout};

use crate::harness::{Relay, Setup, taken};

const PATIENCE: Duration = Duration::from_secs(30);

fn client(relay: &Relay, settings: ClientSettings) -> BatchingClient {
    BatchingClient::new(&format!("http://{}", relay.grpc_addr), settings).unwrap()
}

fn order(number: usize) -> TrackEventRequest {
    TrackEventRequest { event_name: format!("{number}"), user_id: "user-1".into(), ..Default::default() }
}

fn check_balance(counters: Counters) {
    let Counters { queued, accepted, refused, abandoned, waiting, .. } = counters;
    assert_eq!(queued, accepted + refused + abandoned + waiting, "{counters:?}");
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn events_travel_in_batches_and_close_sends_the_rest() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let analytics = client(&relay, ClientSettings::default());
    let mut ids = Vec::new();
    for number in 0..1000 {
        ids.push(analytics.track(order(number)).unwrap());
    }
    let traits = br#"{"plan":"pro"}"#.to_vec();
    let identify =
        IdentifyUserRequest { user_id: "user-1".into(), properties_json: traits, ..Default::default() };
    ids.push(analytics.identify(identify).unwrap());
    let counters = timeout(PATIENCE, analytics.close(PATIENCE)).await.unwrap();
    assert_eq!(counters, Counters { queued: 1001, accepted: 1001, ..Counters::default() });

    let calls = relay.metric("relay_requests_total", &["TrackBatch", "OK"]).await;
    assert!((10.0..20.0).contains(&calls), "{calls} calls");
    taken(&setup, Vendor::Segment, 1001).await;
    let mut found: Vec<_> = setup.sandbox.taken(Vendor::Segment).into_iter().map(|taken| taken.id).collect();
    found.sort();
    ids.sort();
    assert_eq!(found, ids);
    relay.terminate().await;
}

#[tokio::test]
async fn a_few_events_are_sent_after_the_interval_or_at_a_flush() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let analytics = client(&relay, ClientSettings::default());
    analytics.track(order(0)).unwrap();
    let start = Instant::now();
    while analytics.counters().accepted < 1 {
        assert!(start.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5)).await;
    }
    let never = Duration::from_secs(3600);
    let patient = client(&relay, ClientSettings { flush_interval: never, ..ClientSettings::default() });
    patient.track(order(1)).unwrap();
    patient.track(order(2)).unwrap();
    timeout(PATIENCE, patient.flush()).await.expect("a flush does not wait for the interval");
    assert_eq!(patient.counters().accepted, 2);
    timeout(PATIENCE, patient.flush()).await.expect("with nothing to send it returns");
    relay.terminate().await;
}

/// The relay is not there yet, then it is, is killed and comes back: a durable
/// relay has everything, once.
#[tokio::test]
async fn a_relay_that_is_away_costs_time_and_no_event() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "synced").set("GRPC_PORT", &free_port().to_string());
    let addr = format!("http://127.0.0.1:{}", setup.vars["GRPC_PORT"]);
    let settings = ClientSettings {
        batch_events_max: 20,
        flush_interval: Duration::from_millis(5),
        call_timeout: Duration::from_secs(2),
        retry_delay_max: Duration::from_millis(200),
        ..ClientSettings::default()
    };
    let analytics = BatchingClient::new(&addr, settings).unwrap();
    for number in 0..500 {
        analytics.track(order(number)).unwrap();
    }
    while analytics.counters().retries == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(analytics.counters().waiting, 500, "nobody is there");
    let relay = setup.start().await;
    while analytics.counters().accepted == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    relay.signal("KILL");
    relay.ended(Instant::now()).await;
    for number in 500..1000 {
        analytics.track(order(number)).unwrap();
    }
    let relay = setup.start().await;
    let counters = timeout(PATIENCE, analytics.close(PATIENCE)).await.unwrap();
    assert_eq!((counters.queued, counters.accepted, counters.waiting), (1000, 1000, 0), "{counters:?}");
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 1000).await;
        assert_eq!(setup.sandbox.stats(vendor).taken, 1000, "each once");
    }
    relay.terminate().await;
}

#[tokio::test]
async fn a_full_queue_drops_and_counts_and_close_has_an_end() {
    let settings = ClientSettings { queue_events_max: 50, ..ClientSettings::default() };
    let analytics = BatchingClient::new(&format!("http://127.0.0.1:{}", free_port()), settings).unwrap();
    let results: Vec<_> = (0..200).map(|number| analytics.track(order(number))).collect();
    assert_eq!(results.iter().filter(|result| **result == Err(NotQueued::Full)).count(), 150);
    sleep(Duration::from_millis(300)).await;
    let start = Instant::now();
    let counters = timeout(PATIENCE, analytics.close(Duration::from_millis(200))).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!((counters.queued, counters.abandoned, counters.dropped), (50, 50, 150), "{counters:?}");
    check_balance(counters);

    let bytes = ClientSettings { queue_bytes_max: 1000, ..ClientSettings::default() };
    let analytics = BatchingClient::new(&format!("http://127.0.0.1:{}", free_port()), bytes).unwrap();
    let wide = TrackEventRequest { properties_json: vec![b' '; 900], ..order(0) };
    analytics.track(wide.clone()).unwrap();
    assert_eq!(analytics.track(wide), Err(NotQueued::Full));
}

/// A full relay makes the client wait and send again, in order.
#[tokio::test]
async fn a_full_relay_is_waited_for() {
    let mut setup = Setup::new().await;
    setup.set("QUEUE_MAX_EVENTS", "10").set("BATCH_SIZE", "5");
    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, Some("stall".parse().unwrap()));
    }
    let relay = setup.start().await;
    let analytics = client(&relay, ClientSettings::default());
    for number in 0..300 {
        analytics.track(order(number)).unwrap();
    }
    while analytics.counters().retries == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    assert!(relay.metric("relay_refusals_total", &["QUEUE_FULL"]).await > 0.0);
    Vendor::ALL.into_iter().for_each(|vendor| setup.sandbox.always(vendor, None));
    let counters = timeout(PATIENCE, analytics.close(PATIENCE)).await.unwrap();
    assert_eq!((counters.accepted, counters.refused, counters.abandoned), (300, 0, 0), "{counters:?}");
    relay.terminate().await;
}

/// What breaks a rule, or the limit of a message, ends alone.
#[tokio::test]
async fn refused_events_are_counted_and_hold_up_nothing() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let analytics = client(&relay, ClientSettings::default());
    analytics.track(order(0)).unwrap();
    analytics.track(TrackEventRequest::default()).unwrap();
    let huge = TrackEventRequest { properties_json: vec![b' '; 3 << 19], ..order(1) };
    analytics.track(huge).unwrap();
    analytics.track(order(2)).unwrap();
    let counters = timeout(PATIENCE, analytics.close(PATIENCE)).await.unwrap();
    assert_eq!((counters.accepted, counters.refused, counters.abandoned), (2, 2, 0), "{counters:?}");
    check_balance(counters);
    relay.terminate().await;
}
