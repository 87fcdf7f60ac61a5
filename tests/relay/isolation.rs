//! One provider's trouble stays its own.

use std::time::{Duration, Instant};

use analytics_relay::providers::sandbox::Vendor;
use tokio::time::sleep;

use crate::harness::{Observer, Setup, taken, track};

const EVENTS: usize = 600;

/// Accept latency under a steady load, and how long after the last answer the
/// healthy providers had everything.
struct Run {
    accept_p50: Duration,
    accept_p99: Duration,
    lag: Duration,
}

async fn run(fault: Option<&str>) -> Run {
    let mut setup = Setup::new().await;
    setup.set("MAX_RETRY_ATTEMPTS", "2").set("DRAIN_TIMEOUT_SECONDS", "1");
    match fault {
        Some("down") => {
            // Only Mixpanel goes down: it gets a sandbox of its own.
            let gone = analytics_relay::providers::sandbox::Sandbox::start(Default::default()).await.unwrap();
            setup.set("MIXPANEL_BASE_URL", &gone.url());
            gone.go_down().await;
        }
        Some(fault) => setup.sandbox.always(Vendor::Mixpanel, Some(fault.parse().unwrap())),
        None => {}
    }
    let relay = setup.start().await;
    let mut client = relay.client();
    let mut observer = Observer::default();
    observer.tracks(&mut client, 50).await;
    let mut latencies = Vec::with_capacity(EVENTS);
    for index in 0..EVENTS {
        let request = track("x", &format!("user-{}", index % 9));
        let id = request.event_id.clone();
        let start = Instant::now();
        client.track_event(request).await.unwrap();
        latencies.push(start.elapsed());
        observer.accepted.insert(id);
        sleep(Duration::from_millis(1)).await;
    }
    let last = Instant::now();
    for vendor in [Vendor::Amplitude, Vendor::Segment] {
        taken(&setup, vendor, observer.accepted.len() as u64).await;
    }
    let lag = last.elapsed();
    if fault.is_some() {
        let delivered = relay.metric("relay_events_total", &["mixpanel", "\"delivered\""]).await;
        assert!(delivered < 1.0, "the fault did not happen");
    }
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0, "{:?}", ended.balance(Vendor::Mixpanel));
    observer.check_balance(&setup, &ended);
    latencies.sort_unstable();
    Run { accept_p50: latencies[EVENTS / 2], accept_p99: latencies[EVENTS * 99 / 100], lag }
}

/// Latencies of a shared machine are noisy, so the bounds are wide: a handler
/// that waited for the provider would take a second, not a few milliseconds.
#[tokio::test]
async fn a_provider_that_is_stalled_or_dead_moves_neither_callers_nor_the_others() {
    let healthy = run(None).await;
    for fault in ["stall", "503", "down"] {
        let faulty = run(Some(fault)).await;
        let within = |now: Duration, then: Duration| now <= then * 2 + Duration::from_millis(20);
        assert!(within(faulty.accept_p50, healthy.accept_p50), "{fault}: {:?}", faulty.accept_p50);
        assert!(within(faulty.accept_p99, healthy.accept_p99), "{fault}: {:?}", faulty.accept_p99);
        let lag_max = healthy.lag * 2 + Duration::from_millis(300);
        assert!(faulty.lag <= lag_max, "{fault}: {:?} against {:?}", faulty.lag, healthy.lag);
    }
}

#[tokio::test]
async fn a_full_lane_writes_dead_letters_and_the_others_get_everything() {
    let mut setup = Setup::new().await;
    setup.set("QUEUE_MAX_EVENTS", "100").set("BATCH_SIZE", "10").set("DRAIN_TIMEOUT_SECONDS", "1");
    setup.set("REQUEST_TIMEOUT_SECONDS", "20");
    setup.sandbox.always(Vendor::Mixpanel, Some("stall".parse().unwrap()));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 500).await;
    taken(&setup, Vendor::Amplitude, 500).await;
    taken(&setup, Vendor::Segment, 500).await;
    relay.log("lane is full: new events become dead letters").await;
    let status = relay.page("/healthz").await.1;
    assert!(status.starts_with("DEGRADED: the lane of mixpanel is full"), "{status}");
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
    let balance = ended.balance(Vendor::Mixpanel);
    assert_eq!((balance.dead_lettered, balance.spilled), (400, 100), "{balance:?}");
    let letters = crate::harness::lines_on_disk(&setup.data_dir().join("dead-letters/mixpanel"));
    assert!(letters.iter().all(|letter| letter["reason"] == "lane_full"));
}
