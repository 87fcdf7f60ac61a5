//! How the cost of an event grows: with providers, properties, connections, users.

use std::{collections::HashMap, env, path::Path, process::ExitCode, sync::Arc, time::Duration};

use analytics_relay::{
    app::App,
    config::Config,
    proto::v1::{
        PropertyValue, TrackBatchItem, TrackBatchRequest, TrackEventRequest, property_value::Value,
        track_batch_item::Item,
    },
    providers::{
        BatchLimits, Event, Provider, Secret, SendError, Verdict,
        http::{HttpClient, HttpProvider, HttpSettings},
        sandbox::Vendor,
        segment::Segment,
    },
    shutdown, telemetry,
};
use async_trait::async_trait;
use tempfile::TempDir;

use crate::{
    h2load::{self, Call, H2load, Until},
    report::Report,
    sink::Sink,
    support::{self, LARGE_QUEUE, Relay, reference_batch, reference_event, send_batches},
};

/// Events of each measurement.
const EVENTS: u64 = 100_000;
const PATIENCE: Duration = Duration::from_secs(60);
/// What a relay of many providers calls them.
const NAMES: [&str; 8] = ["one", "two", "three", "four", "five", "six", "seven", "eight"];

pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    for providers in [1, 2, 4, 8] {
        let micros = cpu(providers, EVENTS, reference_batch).await?;
        report.add_beside(&format!("grow.providers.{providers}"), micros, "us/event", "grow.providers.1");
    }
    for (label, bytes) in [("100B", 100), ("1KB", 1000), ("10KB", 10_000)] {
        let events = EVENTS.min(200_000_000 / bytes);
        let batch = move |first, count| batch_of(first, count, |number| padded(number, bytes));
        let micros = cpu(1, events, batch).await?;
        report.add_beside(&format!("grow.properties.{label}"), micros, "us/event", "grow.properties.100B");
    }
    for users in [1, 1000, 100_000] {
        let of_user = move |number| TrackEventRequest {
            user_id: format!("user-{:010}", number % users),
            ..reference_event(number)
        };
        let micros = cpu(1, EVENTS, move |first, count| batch_of(first, count, of_user)).await?;
        report.add_beside(&format!("grow.users.{users}"), micros, "us/event", "grow.users.1");
    }
    if !h2load::is_here(report, "grow.connections").await {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let unary = dir.path().join("unary");
    h2load::write_framed(&unary, [reference_event(1)])?;
    for connections in [1, 10, 100, 1000] {
        let micros = cpu_of_calls(connections, &unary).await?;
        let floor = "grow.connections.10";
        report.add_beside(&format!("grow.connections.{connections}"), micros, "us/event", floor);
    }
    Ok(())
}

/// Microseconds of the CPU of a relay to so many providers, for each of so many
/// events, sent in batches.
async fn cpu(
    providers: u64,
    events: u64,
    batch: impl Fn(u64, u64) -> TrackBatchRequest,
) -> anyhow::Result<f64> {
    let sink = Sink::start().await?;
    let data = tempfile::tempdir()?;
    let relay = start_many(&sink, &data, providers).await?;
    let before = relay.cpu_time()?;
    send_batches(&relay.grpc_addr, 0..events, batch).await?;
    // What is left of the last batch comes with the drain.
    sink.wait_for(Vendor::Segment, events * providers - 50 * providers, PATIENCE).await?;
    let cpu = relay.cpu_time()? - before;
    relay.terminate().await?;
    anyhow::ensure!(sink.taken(Vendor::Segment) == events * providers, "events miss");
    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    Ok(cpu.as_secs_f64() / events as f64 * 1e6)
}

/// This program as a relay with so many providers, all like Segment.
async fn start_many(sink: &Sink, data: &TempDir, providers: u64) -> anyhow::Result<Relay> {
    let mut command = support::on_servers_core(env::current_exe()?.as_os_str());
    command.args(["--serve", "relay"]);
    let count = providers.to_string();
    let settings = [("ANALYTICS_PROVIDER", "none"), (COUNT, &count), (URL, &sink.url)];
    Relay::start_by(command, &sink.url, data.path(), &[&settings[..], &LARGE_QUEUE].concat()).await
}

const COUNT: &str = "BENCH_PROVIDERS";
const URL: &str = "BENCH_PROVIDERS_URL";

/// Runs in the child.
pub(crate) fn serve_many() -> anyhow::Result<ExitCode> {
    let config = Config::from_env()?;
    let _logs = telemetry::init_logs(&config.logs.level, config.logs.format);
    let count: usize = env::var(COUNT)?.parse()?;
    let mut providers: Vec<Arc<dyn Provider>> = Vec::new();
    for name in NAMES.into_iter().take(count) {
        let key = Secret::new("key");
        let http = HttpSettings {
            base_url: env::var(URL)?.parse()?,
            request_timeout: Duration::from_secs(10),
            idle_connections_max: 8,
        };
        let segment = HttpProvider::new(Segment::new(key.clone()), HttpClient::new(http, &key)?);
        providers.push(Arc::new(Named { name, segment }));
    }
    tokio::runtime::Runtime::new()?.block_on(async {
        let signals = shutdown::signals()?;
        let app = App::start_with(&config, providers).await?;
        Ok(ExitCode::from(app.run_until(signals).await.exit_code()))
    })
}

/// Segment under another name.
struct Named {
    name: &'static str,
    segment: HttpProvider<Segment>,
}

#[async_trait]
impl Provider for Named {
    fn name(&self) -> &'static str {
        self.name
    }

    fn limits(&self) -> BatchLimits {
        self.segment.limits()
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        self.segment.send(batch).await
    }
}

/// The same for unary calls over so many connections.
async fn cpu_of_calls(connections: u32, unary: &Path) -> anyhow::Result<f64> {
    let sink = Sink::start().await?;
    let data = tempfile::tempdir()?;
    let relay = Relay::start_roomy(&sink.url, data.path(), "segment", &[]).await?;
    let until = Until::Calls(EVENTS);
    let load = H2load { call: Call::TRACK_EVENT, connections, in_flight: 1, until };
    let before = relay.cpu_time()?;
    load.run(&relay.url(), unary).await?;
    let cpu = relay.cpu_time()? - before;
    let balance = relay.terminate().await?;
    anyhow::ensure!(balance["delivered"] == EVENTS, "not all were delivered: {balance}");
    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    Ok(cpu.as_secs_f64() / EVENTS as f64 * 1e6)
}

fn batch_of(first: u64, count: u64, event: impl Fn(u64) -> TrackEventRequest) -> TrackBatchRequest {
    let item = |number| TrackBatchItem { item: Some(Item::Track(event(number))) };
    TrackBatchRequest { items: (first..first + count).map(item).collect() }
}

/// An event with about so many bytes of properties.
fn padded(number: u64, bytes: u64) -> TrackEventRequest {
    const PART: u64 = 100;
    let text = || PropertyValue { value: Some(Value::StringValue("x".repeat(80))) };
    let properties: HashMap<_, _> = (0..bytes / PART).map(|part| (format!("part{part}"), text())).collect();
    TrackEventRequest { properties, ..reference_event(number) }
}
