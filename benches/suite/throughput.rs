//! How many events go through one core, from the call to the provider's answer,
//! and what each costs; beside what the libraries alone can do.

use std::{path::Path, time::Duration};

use analytics_relay::providers::sandbox::Vendor;
use tokio::time::{Instant, sleep};

use crate::{
    floors::Floor,
    h2load::{self, H2load, Until},
    report::{Report, median},
    sink::Sink,
    support::{self, Relay, reference_batch, reference_event},
};

const ROUNDS: usize = 3;
const SECONDS: u32 = 4;
/// When in a run it is measured: after the warm-up, before the end.
const WINDOW: (Duration, Duration) = (Duration::from_millis(1200), Duration::from_millis(4600));
const BATCH: u64 = 100;
/// Batches of one stream.
const STREAM: u64 = 100;
/// Events a relay may hold, so that it is the core that is the limit.
pub(crate) const LARGE_QUEUE: [(&str, &str); 2] =
    [("QUEUE_MAX_EVENTS", "200000"), ("QUEUE_MAX_BYTES", "1073741824")];

const ALL: &str = "mixpanel,amplitude,segment";

/// Events a second, and microseconds of CPU for each.
#[derive(Debug, Clone, Copy)]
struct Rate {
    events: f64,
    cpu_micros: f64,
}

pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    if !h2load::is_here().await {
        report.not_run("throughput", "h2load is not installed (Debian: nghttp2-client)");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let unary = dir.path().join("unary");
    h2load::write_framed(&unary, [reference_event(1)])?;
    let batch = dir.path().join("batch");
    h2load::write_framed(&batch, [reference_batch(0, BATCH)])?;
    let stream = dir.path().join("stream");
    h2load::write_framed(&stream, (0..STREAM).map(|number| reference_batch(number * BATCH, BATCH)))?;
    let until = Until::Seconds(SECONDS);
    let unary_load = H2load { method: "TrackEvent", connections: 4, in_flight: 32, until };
    let batch_load = H2load { method: "TrackBatch", connections: 4, in_flight: 2, until };
    let stream_load = H2load { method: "TrackStream", connections: 2, in_flight: 1, until };

    let floors = ["h2", "echo"];
    let relays = [
        ("unary_1", "segment", unary_load, &unary),
        ("unary_3", ALL, unary_load, &unary),
        ("batch_1", "segment", batch_load, &batch),
        ("batch_3", ALL, batch_load, &batch),
        ("batch_1_gzip", "mixpanel", batch_load, &batch),
        ("batch_1_plain", "amplitude", batch_load, &batch),
        ("stream_1", "segment", stream_load, &stream),
        ("stream_3", ALL, stream_load, &stream),
    ];
    let mut found: Vec<Vec<Rate>> = vec![Vec::new(); floors.len() + relays.len()];
    for _ in 0..ROUNDS {
        for (place, kind) in floors.iter().enumerate() {
            found[place].push(floor(kind, unary_load, &unary).await?);
        }
        for (place, (_, providers, load, messages)) in relays.iter().enumerate() {
            found[floors.len() + place].push(relay(providers, *load, messages).await?);
        }
    }
    let middle = |rates: &[Rate], value: fn(&Rate) -> f64| median(rates.iter().map(value).collect());
    let names = floors.map(|kind| format!("floor_{kind}"));
    let names = names.into_iter().chain(relays.map(|(name, ..)| format!("relayed_{name}")));
    for (name, rates) in names.zip(&found) {
        let rate = middle(rates, |rate| rate.events);
        report.add_beside(&format!("{name}.rate"), rate, "events/s/core", "floor_echo.rate");
        let cpu = middle(rates, |rate| rate.cpu_micros);
        report.add_beside(&format!("{name}.cpu"), cpu, "us/event", "floor_echo.cpu");
    }
    Ok(())
}

async fn floor(kind: &str, load: H2load, messages: &Path) -> anyhow::Result<Rate> {
    let floor = Floor::start(kind).await?;
    let (start, pid) = (Instant::now(), floor.pid());
    let window = async {
        sleep(WINDOW.0).await;
        let (before, from) = (support::cpu_time(pid)?, start.elapsed());
        sleep(WINDOW.1 - WINDOW.0).await;
        anyhow::Ok((support::cpu_time(pid)? - before).as_secs_f64() / (start.elapsed() - from).as_secs_f64())
    };
    let (events, cores) = tokio::try_join!(load.run(&floor.addr, messages), window)?;
    Ok(Rate { events, cpu_micros: cores / events * 1e6 })
}

async fn relay(providers: &str, load: H2load, messages: &Path) -> anyhow::Result<Rate> {
    let sink = Sink::start().await?;
    let data = tempfile::tempdir()?;
    let settings = [&[("ANALYTICS_PROVIDER", providers)][..], &LARGE_QUEUE].concat();
    let relay = Relay::start_pinned(&sink.url, data.path(), &settings).await?;
    let vendors: Vec<Vendor> = providers.split(',').filter_map(Vendor::from_name).collect();
    let least_taken = || vendors.iter().map(|vendor| sink.taken(*vendor)).min().unwrap_or_default();
    let window = async {
        sleep(WINDOW.0).await;
        let (events, cpu, from) = (least_taken(), support::cpu_time(relay.pid())?, Instant::now());
        sleep(WINDOW.1 - WINDOW.0).await;
        #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
        let events = (least_taken() - events) as f64;
        let cpu = support::cpu_time(relay.pid())? - cpu;
        let rate = events / from.elapsed().as_secs_f64();
        anyhow::Ok(Rate { events: rate, cpu_micros: cpu.as_secs_f64() / events * 1e6 })
    };
    let (_, rate) = tokio::try_join!(load.run(&relay.grpc_addr, messages), window)?;
    let balance = relay.terminate().await?;
    anyhow::ensure!(balance["accepted"] == balance["delivered"], "not all were delivered: {balance}");
    for vendor in vendors {
        let taken = sink.taken(vendor);
        anyhow::ensure!(balance["accepted"] == taken, "{} took {taken}: {balance}", vendor.name());
    }
    Ok(rate)
}
