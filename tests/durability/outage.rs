//! A provider that is down in real time: five seconds here, as long as
//! `RELAY_OUTAGE_SECONDS` says in the long form. A day of it, in simulated time,
//! is among the tests of the lane.

use std::time::{Duration, Instant};

use analytics_relay::{proto::v1::Durability, providers::sandbox::Vendor};
use tokio::time::sleep;

use crate::{
    harness::eventually,
    oracle::{Answer, Draft, Oracle},
    relays::{Figures, cursor_totals, drained, durable, fault, number},
};

const DOWN: Vendor = Vendor::Amplitude;
/// The shortest time between two probes.
const FIRST_DELAY: Duration = Duration::from_millis(200);

/// Most probes in an outage: each after three quarters of a thirtieth of it, at least.
fn probes(outage: Duration, longest_delay: Duration) -> u64 {
    let (mut at, mut probes) = (Duration::ZERO, 0);
    while at < outage {
        at += (at / 30).clamp(FIRST_DELAY, longest_delay).mul_f64(0.75);
        probes += 1;
    }
    probes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_costs_disk_and_nothing_else() {
    let outage = Duration::from_secs(number("RELAY_OUTAGE_SECONDS", 5));
    let mut setup = durable("synced").await;
    // The delays of a relay in production, as far as the outage leaves time for them.
    let longest_delay = (outage / 4).min(Duration::from_secs(30));
    setup.set("INITIAL_RETRY_DELAY_MS", &FIRST_DELAY.as_millis().to_string());
    setup.set("MAX_RETRY_DELAY_MS", &longest_delay.as_millis().to_string());
    let mut figures = Figures::default();
    let relay = figures.start(&setup).await;
    let (mut client, mut oracle) = (relay.client(), Oracle::default());

    setup.sandbox.always(DOWN, fault("503"));
    let start = Instant::now();
    let (mut latencies, mut told) = (Vec::new(), start);
    // Not over before it was probed a few times, however busy the machine is.
    let is_probed = || setup.sandbox.stats(DOWN).requests > 4;
    while start.elapsed() < outage || !is_probed() {
        assert!(start.elapsed() < outage + Duration::from_secs(60), "it is not probed");
        let sent = Instant::now();
        let answer = oracle.send(&mut client, Draft::track(Durability::Synced)).await;
        assert!(matches!(answer, Answer::Ok(_)), "{answer:?}");
        latencies.push(sent.elapsed());
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            println!("{} s without the provider, {} OK", start.elapsed().as_secs(), oracle.oks());
        }
        sleep(Duration::from_millis(20)).await;
    }
    let accepted = oracle.oks();
    let backlog = relay.metric("relay_spool_backlog_events", &[DOWN.name()]).await;
    assert_eq!(backlog, accepted as f64, "all of it waits");
    let requests = setup.sandbox.stats(DOWN).requests;
    let probes_max = 10 + probes(start.elapsed(), longest_delay);
    assert!(requests < probes_max, "{requests} requests, at most {probes_max}");
    assert_eq!(setup.sandbox.stats(DOWN).taken, 0, "it was down");
    for other in Vendor::ALL.into_iter().filter(|vendor| *vendor != DOWN) {
        let what = format!("all events at {}, which is up", other.name());
        eventually(&what, || setup.sandbox.stats(other).taken >= accepted).await;
    }

    let back = Instant::now();
    setup.sandbox.always(DOWN, None);
    while setup.sandbox.stats(DOWN).taken == 0 {
        let delay = (outage / 30).clamp(FIRST_DELAY, longest_delay);
        assert!(back.elapsed() < 2 * delay + Duration::from_secs(10), "not noticed");
        sleep(Duration::from_millis(10)).await;
    }
    let (noticed, draining) = (back.elapsed(), Instant::now());
    drained(&relay).await;
    let drained_after = draining.elapsed();
    let ended = figures.terminate(relay).await;
    for vendor in Vendor::ALL {
        let found = oracle.check(&setup, vendor);
        assert_eq!((found.delivered, found.duplicates, found.dead_lettered), (accepted, 0, 0), "{vendor:?}");
        assert!(ended.balance(vendor).is_exact());
        assert_eq!(cursor_totals(&setup, vendor), [("delivered".to_owned(), accepted)]);
    }
    latencies.sort();
    println!(
        "{} s without {}: {accepted} OK, 0 lost, 0 duplicates; {requests} requests to it meanwhile; \
         OK after p50 {:?}, p99 {:?}; noticed {noticed:?} after its return, drained in {drained_after:?}; {}",
        outage.as_secs(),
        DOWN.name(),
        latencies[latencies.len() / 2],
        latencies[latencies.len() * 99 / 100],
        figures.text()
    );
}
