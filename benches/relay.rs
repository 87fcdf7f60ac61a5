//! The whole relay under load, as a process, with the sandbox as its providers.
//!
//! Three runs: as many events as it takes, with one provider and with three,
//! and a steady rate for the latency. Each asserts that what was accepted was
//! delivered. Client, sandbox and relay share the machine, so the figures say
//! what all three cost together; compare them only with figures of the same run.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::{
        PropertyValue, TrackEventRequest, analytics_service_client::AnalyticsServiceClient,
        property_value::Value as Kind,
    },
    providers::sandbox::{Options, Sandbox, Vendor},
};
use hdrhistogram::Histogram;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    task::JoinSet,
    time::sleep_until,
};
use tonic::transport::Channel;

const SECONDS: u64 = 4;
const CONNECTIONS: u64 = 4;
const IN_FLIGHT: u64 = 32;
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
    let (mut relay, mut logs) = start(&sandbox, providers, data.path())?;
    let addr = line(&mut logs, "relay started").await?["grpc_addr"].as_str().unwrap_or_default().to_owned();
    // Read on, or the relay would wait for room in the pipe.
    let logs = tokio::spawn(async move {
        let balance = line(&mut logs, "balance").await;
        while let Ok(Some(_)) = logs.next_line().await {}
        balance
    });

    let started = Instant::now();
    let mut callers = JoinSet::new();
    for connection in 0..CONNECTIONS {
        let channel = Channel::from_shared(format!("http://{addr}"))?.connect().await?;
        for slot in 0..IN_FLIGHT {
            callers.spawn(call(channel.clone(), connection * IN_FLIGHT + slot, rate, started));
        }
    }
    let mut latencies = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3)?;
    while let Some(caller) = callers.join_next().await {
        latencies.add(caller??)?;
    }
    let elapsed = started.elapsed().as_secs_f64();

    let pid = relay.id().unwrap_or_default();
    std::process::Command::new("sh").args(["-c", &format!("kill -TERM {pid}")]).status()?;
    let balance = logs.await??;
    anyhow::ensure!(relay.wait().await?.success(), "the relay lost events: {balance}");
    anyhow::ensure!(balance["accepted"] == balance["delivered"], "not all were delivered: {balance}");
    anyhow::ensure!(
        balance["accepted"] == latencies.len(),
        "accepted is not what was answered OK: {balance}"
    );
    for vendor in providers.split(',').filter_map(Vendor::from_name) {
        anyhow::ensure!(sandbox.stats(vendor).taken == latencies.len(), "{} misses events", vendor.name());
    }
    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    let (rate, millis) =
        (latencies.len() as f64 / elapsed, |share| latencies.value_at_quantile(share) as f64 / 1000.0);
    println!("{name:<34} {rate:>10.0} {:>9.3} {:>9.3} {:>9.3}", millis(0.5), millis(0.99), millis(0.999));
    Ok(())
}

fn start(
    sandbox: &Sandbox,
    providers: &str,
    data_dir: &std::path::Path,
) -> anyhow::Result<(Child, Lines<BufReader<ChildStdout>>)> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_analytics-relay"));
    command.env("DATA_DIR", data_dir).env("LOG_FORMAT", "json").env("ANALYTICS_PROVIDER", providers);
    command.env("GRPC_HOST", "127.0.0.1").env("GRPC_PORT", "0");
    command.env("METRICS_HOST", "127.0.0.1").env("METRICS_PORT", "0");
    command.env("DRAIN_TIMEOUT_SECONDS", "60").env("TEST_MODE", "false");
    for (vendor, key) in [("MIXPANEL", "API_KEY"), ("AMPLITUDE", "API_KEY"), ("SEGMENT", "WRITE_KEY")] {
        command
            .env(format!("{vendor}_BASE_URL"), sandbox.url())
            .env(format!("{vendor}_{key}"), "sandbox-key");
    }
    let mut relay = command.stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
    let stdout = relay.stdout.take().expect("it was asked for");
    Ok((relay, BufReader::new(stdout).lines()))
}

async fn line(logs: &mut Lines<BufReader<ChildStdout>>, message: &str) -> anyhow::Result<Value> {
    while let Some(line) = logs.next_line().await? {
        let line: Value = serde_json::from_str(&line)?;
        if line["message"] == message {
            return Ok(line);
        }
    }
    anyhow::bail!("the relay ended before it said {message:?}")
}

async fn call(
    channel: Channel,
    worker: u64,
    rate: Option<u64>,
    started: Instant,
) -> anyhow::Result<Histogram<u64>> {
    let mut client = AnalyticsServiceClient::new(channel);
    let mut latencies = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3)?;
    let end = started + Duration::from_secs(SECONDS);
    for turn in 0_u64.. {
        let number = turn * CONNECTIONS * IN_FLIGHT + worker;
        #[expect(clippy::cast_precision_loss, reason = "a time offset")]
        let due = rate
            .map_or_else(Instant::now, |rate| started + Duration::from_secs_f64(number as f64 / rate as f64));
        if due >= end {
            break;
        }
        sleep_until(due.into()).await;
        client.track_event(event(number)).await?;
        latencies.saturating_record(u64::try_from(due.elapsed().as_micros())?);
    }
    Ok(latencies)
}

fn event(number: u64) -> TrackEventRequest {
    let property = |kind| PropertyValue { value: Some(kind) };
    TrackEventRequest {
        event_name: "Order Placed".to_owned(),
        user_id: format!("user-{}", number % 1000),
        properties: [
            ("sku", property(Kind::StringValue(format!("SKU-{}", number % 100)))),
            ("total", property(Kind::NumberValue(19.5))),
            ("quantity", property(Kind::IntegerValue(3))),
            ("gift", property(Kind::BoolValue(false))),
            ("currency", property(Kind::StringValue("EUR".to_owned()))),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into(),
        ..TrackEventRequest::default()
    }
}
