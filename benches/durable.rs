//! What durability costs, beside what the machine's disk can do in the same run.
//!
//! The disk's own rate comes first: groups of records, written to a file whose
//! room is reserved, one `fdatasync` for each group. Then the whole relay at each
//! level. Client, sandbox and relay share the machine: compare only figures of
//! one run.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use analytics_relay::providers::sandbox::{Fault, Options, Sandbox, Vendor};
use hdrhistogram::Histogram;

mod support;

use support::{Done, Load, Relay, group_commits};

const THREE: (&str, &str) = ("ANALYTICS_PROVIDER", "mixpanel,amplitude,segment");
/// Bytes of a record, about those of an event in the log.
const RECORD_BYTES: usize = 600;
/// Rounds in which all providers are up and all are down, in turn.
const ROUNDS: usize = 5;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // `cargo test --benches` runs this too; it is no test.
    if !std::env::args().any(|arg| arg == "--bench") {
        return Ok(());
    }
    // Beside the build and not in a directory that may be in memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    disk(dir.path())?;
    levels(dir.path()).await?;
    outage(dir.path()).await?;
    backlog(dir.path()).await
}

/// The machine's own rate.
fn disk(dir: &Path) -> anyhow::Result<()> {
    println!("{:<34} {:>10} {:>10} {:>9} {:>9}", "fdatasync", "syncs/s", "records/s", "p50 ms", "p99 ms");
    for group in [1, 50, 256] {
        let done = group_commits(dir, group, RECORD_BYTES, Duration::from_secs(2))?;
        #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
        let records = done.rate() * group as f64;
        let name = format!("groups of {group} records of {RECORD_BYTES} bytes");
        println!(
            "{name:<34} {:>10.0} {records:>10.0} {:>9.3} {:>9.3}",
            done.rate(),
            done.millis(0.5),
            done.millis(0.99)
        );
    }
    println!();
    Ok(())
}

/// As fast as it goes, and at 1,000 events a second, at each level.
async fn levels(dir: &Path) -> anyhow::Result<()> {
    println!("{:<34} {:>10} {:>10} {:>9} {:>9}", "relay", "events/s", "groups/s", "p50 ms", "p99 ms");
    for (name, load) in [
        ("256 calls under way", Load { connections: 4, in_flight: 64, rate: None, seconds: 5.0, padding: 0 }),
        ("64 calls under way", Load { connections: 4, in_flight: 16, rate: None, seconds: 5.0, padding: 0 }),
        ("1 call under way", Load { connections: 1, in_flight: 1, rate: None, seconds: 5.0, padding: 0 }),
        (
            "1,000 events/s",
            Load { connections: 4, in_flight: 16, rate: Some(1000), seconds: 10.0, padding: 0 },
        ),
    ] {
        for level in ["memory", "written", "synced"] {
            let sandbox = Sandbox::start(Options { keep_bodies: false, ..Options::default() }).await?;
            let data = tempfile::tempdir_in(dir)?;
            let settings = [("ANALYTICS_PROVIDER", "segment"), ("DURABILITY", level)];
            let relay = Relay::start(&sandbox.url(), data.path(), &settings).await?;
            let done = relay.load(load).await?;
            let groups = metric(&relay, "relay_spool_groups_total").await? / done.elapsed.as_secs_f64();
            let balance = relay.terminate().await?;
            anyhow::ensure!(
                balance["accepted"] == done.events(),
                "accepted is not what was answered: {balance}"
            );
            let name = format!("{name}, {level}");
            println!(
                "{name:<34} {:>10.0} {groups:>10.0} {:>9.3} {:>9.3}",
                done.rate(),
                done.millis(0.5),
                done.millis(0.99)
            );
        }
    }
    println!();
    Ok(())
}

/// Whether callers notice that every provider is down: the same load in turn
/// with all of them up and all of them down.
async fn outage(dir: &Path) -> anyhow::Result<()> {
    println!(
        "{:<34} {:>10} {:>10} {:>9} {:>9}",
        "1,000 events/s, synced", "events/s", "", "p50 ms", "p99 ms"
    );
    let load = Load { connections: 4, in_flight: 16, rate: Some(1000), seconds: 6.0, padding: 0 };
    let sandbox = Sandbox::start(Options { keep_bodies: false, ..Options::default() }).await?;
    let data = tempfile::tempdir_in(dir)?;
    let relay = Relay::start(&sandbox.url(), data.path(), &[THREE, ("DURABILITY", "synced")]).await?;
    let mut sums =
        [Histogram::<u64>::new_with_bounds(1, 60_000_000, 3)?, Histogram::new_with_bounds(1, 60_000_000, 3)?];
    for round in 0..2 * ROUNDS {
        let down = round % 2;
        let fault: Option<Fault> = if down == 1 { Some("503".parse()?) } else { None };
        Vendor::ALL.into_iter().for_each(|vendor| sandbox.always(vendor, fault.clone()));
        let done = relay.load(load).await?;
        sums[down].add(&done.latencies)?;
        if down == 1 {
            // Until what has waited is gone, which is no part of the question.
            Vendor::ALL.into_iter().for_each(|vendor| sandbox.always(vendor, None));
            while metric(&relay, "relay_spool_backlog_events").await? > 0.0 {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
    let elapsed = Duration::from_secs_f64(load.seconds) * u32::try_from(ROUNDS)?;
    let [up, down] = sums.map(|latencies| Done { latencies, elapsed });
    for (name, done) in [("all providers up", &up), ("all providers down", &down)] {
        println!(
            "{name:<34} {:>10.0} {:>10} {:>9.3} {:>9.3}",
            done.rate(),
            "",
            done.millis(0.5),
            done.millis(0.99)
        );
    }
    println!("p99 down against up: {:+.1} %\n", (down.millis(0.99) / up.millis(0.99) - 1.0) * 100.0);
    relay.terminate().await?;
    Ok(())
}

/// Fills the log while every provider is down, kills the relay and starts it
/// again.
async fn backlog(dir: &Path) -> anyhow::Result<()> {
    let wanted_mb = std::env::var("RELAY_BENCH_BACKLOG_MB").map_or(Ok(1024.0), |text| text.parse::<f64>())?;
    let sandbox = Sandbox::start(Options { keep_bodies: false, ..Options::default() }).await?;
    let data = tempfile::tempdir_in(dir)?;
    let settings = [THREE, ("DURABILITY", "written")];
    let fault: Fault = "503".parse()?;
    Vendor::ALL.into_iter().for_each(|vendor| sandbox.always(vendor, Some(fault.clone())));
    let relay = Relay::start(&sandbox.url(), data.path(), &settings).await?;
    let idle_mb = relay.memory_mb("VmRSS")?;
    let load = Load { connections: 4, in_flight: 64, rate: None, seconds: 5.0, padding: 600 };
    let mut events = 0;
    loop {
        events += relay.load(load).await?.events();
        let mb = metric(&relay, "relay_spool_backlog_bytes").await? / 3.0 / f64::from(1 << 20);
        println!("{events} events, {mb:.0} MB of {wanted_mb:.0} MB");
        if mb >= wanted_mb {
            break;
        }
    }
    let outage_mb = relay.memory_mb("VmHWM")?;
    relay.kill().await?;
    // As after a restart of the machine.
    let dropped = std::fs::write("/proc/sys/vm/drop_caches", "1").is_ok();
    let relay = Relay::start(&sandbox.url(), data.path(), &settings).await?;
    println!(
        "ready after {:.3} s, page cache {}",
        relay.ready_after.as_secs_f64(),
        if dropped { "cold" } else { "warm" }
    );
    println!(
        "memory: idle {idle_mb:.1} MB; peak of the outage {outage_mb:.1} MB; at ready {:.1} MB",
        relay.memory_mb("VmRSS")?
    );

    Vendor::ALL.into_iter().for_each(|vendor| sandbox.always(vendor, None));
    let start = Instant::now();
    while metric(&relay, "relay_spool_backlog_events").await? > 0.0 {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let seconds = start.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    let rate = 3.0 * events as f64 / seconds;
    println!("{events} events drained to three providers in {seconds:.1} s: {rate:.0} deliveries/s");
    println!("peak of recovery and drain {:.1} MB", relay.memory_mb("VmHWM")?);
    let balance = relay.terminate().await?;
    for vendor in Vendor::ALL {
        anyhow::ensure!(sandbox.stats(vendor).taken == events, "{} misses events: {balance}", vendor.name());
    }
    Ok(())
}

/// A metric, summed over its labels.
async fn metric(relay: &Relay, name: &str) -> anyhow::Result<f64> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().build()?;
    let page = client.get(format!("http://{}/metrics", relay.metrics_addr)).send().await?.text().await?;
    let of_it = page.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
    Ok(of_it.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}
