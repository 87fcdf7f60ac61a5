//! The whole relay under load, as a process, with the sandbox as its providers.
//!
//! Three runs: as many events as it takes, with one provider and with three,
//! and a steady rate for the latency. Each asserts that what was accepted was
//! delivered. Client, sandbox and relay share the machine, so the figures say
//! what all three cost together; compare them only with figures of the same run.

use analytics_relay::providers::sandbox::{Options, Sandbox, Vendor};

mod support;

use support::{Load, Relay};

const LOAD: Load = Load { connections: 4, in_flight: 32, rate: None, seconds: 4.0, padding: 0 };
/// Events a second of the run for latency.
const RATE: u64 = 2000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // `cargo test --benches` runs this too; it is no test.
    if !std::env::args().any(|arg| arg == "--bench") {
        return Ok(());
    }
    println!("{:<34} {:>10} {:>9} {:>9} {:>9}", "run", "events/s", "p50 ms", "p99 ms", "p99.9 ms");
    run("as fast as it goes, one provider", "segment", None).await?;
    run("as fast as it goes, three", "mixpanel,amplitude,segment", None).await?;
    run("2000 events/s, three", "mixpanel,amplitude,segment", Some(RATE)).await?;
    Ok(())
}

async fn run(name: &str, providers: &str, rate: Option<u64>) -> anyhow::Result<()> {
    let sandbox = Sandbox::start(Options { keep_bodies: false, ..Options::default() }).await?;
    let data = tempfile::tempdir()?;
    let relay = Relay::start(&sandbox, data.path(), &[("ANALYTICS_PROVIDER", providers)]).await?;
    let done = relay.load(Load { rate, ..LOAD }).await?;
    let balance = relay.terminate().await?;
    anyhow::ensure!(balance["accepted"] == balance["delivered"], "not all were delivered: {balance}");
    anyhow::ensure!(balance["accepted"] == done.events(), "accepted is not what was answered OK: {balance}");
    for vendor in providers.split(',').filter_map(Vendor::from_name) {
        anyhow::ensure!(sandbox.stats(vendor).taken == done.events(), "{} misses events", vendor.name());
    }
    let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|share| done.millis(share));
    println!("{name:<34} {:>10.0} {p50:>9.3} {p99:>9.3} {p999:>9.3}", done.rate());
    Ok(())
}
