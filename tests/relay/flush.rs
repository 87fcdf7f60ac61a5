//! When batches leave.

use std::time::{Duration, Instant};

use analytics_relay::providers::sandbox::Vendor;

use crate::harness::{Observer, Setup, taken};

#[tokio::test]
async fn the_fiftieth_event_flushes_and_the_forty_nine_before_wait() {
    let mut setup = Setup::new().await;
    setup.set("FLUSH_INTERVAL_SECONDS", "60");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    let mut client = relay.client();
    observer.tracks(&mut client, 49).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    for vendor in Vendor::ALL {
        assert_eq!(setup.sandbox.stats(vendor).requests, 0, "{vendor:?}");
    }
    observer.tracks(&mut client, 1).await;
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 50).await;
        assert_eq!(setup.sandbox.requests(vendor)[0].events, 50);
    }
    observer.check_balance(&setup, &relay.terminate().await);
}

#[tokio::test]
async fn the_interval_flushes_a_short_batch() {
    let mut setup = Setup::new().await;
    setup.set("FLUSH_INTERVAL_SECONDS", "1");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    let start = Instant::now();
    observer.tracks(&mut relay.client(), 3).await;
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 3).await;
        assert_eq!(setup.sandbox.requests(vendor)[0].events, 3);
    }
    assert!(start.elapsed() >= Duration::from_secs(1));
    observer.check_balance(&setup, &relay.terminate().await);
}

#[tokio::test]
async fn one_provider_can_have_batches_of_its_own() {
    let mut setup = Setup::new().await;
    setup.set("FLUSH_INTERVAL_SECONDS", "60").set("SEGMENT_BATCH_SIZE", "2");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 4).await;
    taken(&setup, Vendor::Segment, 4).await;
    assert_eq!(setup.sandbox.stats(Vendor::Mixpanel).requests, 0);
    observer.check_balance(&setup, &relay.terminate().await);
}

#[tokio::test]
async fn a_lane_that_is_behind_merges_waiting_batches() {
    let mut setup = Setup::new().await;
    setup.set("BATCH_SIZE", "10").set("REQUEST_TIMEOUT_SECONDS", "10");
    let relay = setup.start().await;
    setup.sandbox.always(Vendor::Mixpanel, Some("delay=1500".parse().unwrap()));
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 500).await;
    taken(&setup, Vendor::Mixpanel, 500).await;
    let largest = setup.sandbox.requests(Vendor::Mixpanel).iter().map(|seen| seen.events).max().unwrap();
    assert!(largest > 100, "the largest request has {largest} events");
    observer.check_balance(&setup, &relay.terminate().await);
}
