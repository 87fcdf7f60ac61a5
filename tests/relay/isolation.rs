//! One provider's trouble stays its own. By how much it moves the others' times, which
//! nobody can say on a busy machine, `make test-isolation` measures.

use analytics_relay::providers::sandbox::{Fault, Sandbox, Vendor};

use crate::harness::{Observer, Setup, eventually, taken};

const EVENTS: usize = 600;
const MORE: usize = 20;

/// The provider in trouble is in the middle of one thing throughout, be it an answer
/// that does not come or the wait before the next attempt; meanwhile every call is
/// answered, and the others get everything. Whoever waited for it would wait for ever.
#[tokio::test]
async fn callers_and_the_others_wait_for_nothing_of_a_provider_in_trouble() {
    for trouble in ["stall", "503", "429", "401", "drip=600000", "down"] {
        let mut setup = Setup::new().await;
        for name in ["INITIAL_RETRY_DELAY_MS", "MAX_RETRY_DELAY_MS"] {
            setup.set(name, "600000");
        }
        setup.set("REQUEST_TIMEOUT_SECONDS", "120").set("DRAIN_TIMEOUT_SECONDS", "1");
        // Alone in its sandbox, so that it alone can go away.
        let alone = Sandbox::start(Default::default()).await.unwrap();
        setup.set("MIXPANEL_BASE_URL", &alone.url());
        let is_down = trouble == "down";
        if is_down {
            alone.go_down().await;
        } else {
            alone.always(Vendor::Mixpanel, Some(trouble.parse::<Fault>().unwrap()));
        }
        let relay = setup.start().await;
        let (mut client, mut observer) = (relay.client(), Observer::default());
        observer.tracks(&mut client, MORE).await;
        if is_down {
            relay.log("batch send failed, retrying").await;
        } else {
            eventually("the trouble", || alone.stats(Vendor::Mixpanel).requests > 0).await;
        }

        observer.tracks(&mut client, EVENTS).await;
        for other in [Vendor::Amplitude, Vendor::Segment] {
            taken(&setup, other, (MORE + EVENTS) as u64).await;
        }
        let outcomes = relay.metric("relay_events_total", &["mixpanel"]).await;
        assert_eq!(outcomes, 0.0, "{trouble}: it was over");
        let requests = alone.stats(Vendor::Mixpanel).requests;
        assert!(requests <= 8, "{trouble}: {requests} requests, more than may be under way");
        assert_eq!(relay.terminate().await.code, 0, "{trouble}");
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
