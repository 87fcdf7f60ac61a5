//! What an event costs that comes over HTTP in Segment's form, beside handlers that do the
//! least with the same bodies: one reads them, one parses them into `serde_json::Value`.

use std::{path::Path, time::Duration};

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    floors::Floor,
    h2load::{self, Call, H2load, Until},
    handlers::FLOORS,
    open_loop::{OpenCall, Timetable},
    rate::{Rate, Usage, window},
    report::{Report, median},
    sink::Sink,
    support::Relay,
};

/// Events of a batch, as in gRPC's figures.
pub(crate) const BATCH: u64 = 100;
/// Paths of Segment's form.
pub(crate) const TRACK: &str = "/v1/track";
pub(crate) const BATCHES: &str = "/v1/batch";
const ROUNDS: usize = 3;
const SECONDS: u32 = 4;
const CONNECTIONS: [u32; 4] = [1, 16, 100, 1000];
/// For figures of what is accepted: fewer than wait in a lane at most.
const CALLS: Until = Until::Calls(60_000);
const PROPERTIES_BYTES: [usize; 3] = [100, 1_000, 10_000];
/// Of the open loop: events a second, for so many seconds.
const TIMETABLE: Timetable = Timetable { rate: 10_000, seconds: 2.0 };

/// The reference event as Segment's SDK for Node sends it.
pub(crate) fn event(number: u64) -> Value {
    json!({
        "timestamp": "2026-01-01T00:00:00.000Z",
        "integrations": {},
        "type": "track",
        "userId": format!("user-{number:010}"),
        "event": "Order Placed",
        "properties": {
            "sku": format!("SKU-{:04}", number % 1000), "currency": "EUR", "coupon": "SPRING-SALE",
            "total": 19.5, "quantity": 3, "gift": false, "page": 7,
        },
        "context": {"library": {"name": "@segment/analytics-node", "version": "3.1.0"}},
        "messageId": format!("01890a5d-ac96-774b-bcce-{number:012}"),
        "_metadata": {"nodeVersion": "20.20.2", "jsRuntime": "node"},
    })
}

/// A batch of such events.
pub(crate) fn batch(first: u64, count: u64) -> Value {
    let events: Vec<Value> = (first..first + count).map(event).collect();
    json!({"batch": events, "sentAt": "2026-01-01T00:00:00.000Z"})
}

/// One whose properties have about so many bytes.
fn event_of(bytes: usize) -> Value {
    let mut event = event(1);
    let own = event["properties"].to_string().len();
    event["properties"]["filling"] = "x".repeat(bytes.saturating_sub(own)).into();
    event
}

/// How much goes through one core, and how long callers wait.
pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    waits(report).await?;
    if !h2load::is_here(report, "http").await {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let file = |name: &str, body: &Value| -> anyhow::Result<std::path::PathBuf> {
        let path = dir.path().join(name);
        std::fs::write(&path, body.to_string())?;
        Ok(path)
    };
    let (track, batch) = (file("track", &event(1))?, file("batch", &batch(0, BATCH))?);
    for (name, path, body, events) in [("track", TRACK, &track, 1.0), ("batch", BATCHES, &batch, 100.0)] {
        let load = |connections| H2load {
            call: Call::http1(path),
            connections,
            in_flight: 1,
            until: Until::Seconds(SECONDS),
        };
        for kind in FLOORS {
            let mut rates = Vec::new();
            for _ in 0..ROUNDS {
                let floor = Floor::start(kind).await?;
                rates.push(load(16).run(&floor.url(), body).await? * events);
            }
            report.add(&format!("{kind}.{name}.rate"), median(rates), "events/s/core");
        }
        let floor = format!("{}.{name}.rate", FLOORS[1]);
        report.add_beside(
            &format!("relayed_http_{name}.rate"),
            middle(load(16), body).await?,
            "events/s/core",
            &floor,
        );
    }
    for connections in CONNECTIONS {
        let load = H2load { call: Call::http1(TRACK), connections, in_flight: 1, until: CALLS };
        report.add(
            &format!("http_track.{connections}_connections.rate"),
            accepted(load, &track).await?,
            "events/s/core",
        );
    }
    for bytes in PROPERTIES_BYTES {
        let body = file(&bytes.to_string(), &event_of(bytes))?;
        let load = H2load { call: Call::http1(TRACK), connections: 16, in_flight: 1, until: CALLS };
        report.add(&format!("http_track.{bytes}_bytes.rate"), accepted(load, &body).await?, "events/s/core");
    }
    Ok(())
}

async fn middle(load: H2load, body: &Path) -> anyhow::Result<f64> {
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        rates.push(relayed(load, body).await?.events);
    }
    Ok(median(rates))
}

/// Events a second that are accepted while they are delivered too: as many as the lane has
/// room for, whoever is quicker.
async fn accepted(load: H2load, body: &Path) -> anyhow::Result<f64> {
    let sink = Sink::start().await?;
    let data = tempfile::tempdir()?;
    let relay = Relay::start_roomy(&sink.url, data.path(), "segment", &[]).await?;
    let rate = load.run(&relay.http_url(), body).await?;
    relay.terminate().await?;
    Ok(rate)
}

/// Events a second that come through to the provider.
async fn relayed(load: H2load, body: &Path) -> anyhow::Result<Rate> {
    let sink = Sink::start().await?;
    let data = tempfile::tempdir()?;
    let relay = Relay::start_roomy(&sink.url, data.path(), "segment", &[]).await?;
    let segment = analytics_relay::providers::sandbox::Vendor::Segment;
    let usage = || Ok(Usage { events: sink.taken(segment), cpu: relay.cpu_time()? });
    let url = relay.http_url();
    let (_, rate) = tokio::try_join!(load.run(&url, body), window(usage))?;
    let balance = relay.terminate().await?;
    anyhow::ensure!(balance["accepted"] == balance["delivered"], "not all were delivered: {balance}");
    Ok(rate)
}

/// How long callers wait at a steady rate, over HTTP/2.
async fn waits(report: &mut Report) -> anyhow::Result<()> {
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let echo = Floor::start("echo").await?;
        let over_echo = TIMETABLE.over_grpc(&echo.addr, crate::latency::messages()).await?;
        drop(echo);
        let sink = Sink::start().await?;
        let data = tempfile::tempdir()?;
        let relay = Relay::start_pinned(&sink.url, data.path(), &[("ANALYTICS_PROVIDER", "segment")]).await?;
        let bodies = (0..1000).map(|number| event(number).to_string().into()).collect();
        let over_relay = TIMETABLE.over_h2(&relay.http_addr, OpenCall::json(TRACK), bodies).await?;
        let balance = relay.terminate().await?;
        anyhow::ensure!(balance["delivered"] == TIMETABLE.events(), "not all were delivered: {balance}");
        rounds.push((over_echo, over_relay));
    }
    for (share, label) in [(0.5, "p50"), (0.99, "p99"), (0.999, "p999")] {
        let echo = format!("http_beside_echo.{}.{label}", TIMETABLE.rate);
        report.add(&echo, median(rounds.iter().map(|(echo, _)| echo.micros(share)).collect()), "us");
        let micros = median(rounds.iter().map(|(_, relay)| relay.micros(share)).collect());
        report.add_beside(&format!("relay_http.{}.{label}", TIMETABLE.rate), micros, "us", &echo);
    }
    Ok(())
}

/// Sends events over HTTP/1.1 and waits for every answer.
pub(crate) async fn send(addr: &str, path: &str, events: u64) -> anyhow::Result<()> {
    const IN_FLIGHT: u64 = 16;
    // Fails only if one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client =
        reqwest::Client::builder().no_proxy().http1_only().timeout(Duration::from_secs(60)).build()?;
    let started = Instant::now();
    let url = format!("http://{addr}{path}");
    let post = async |body: Value| -> anyhow::Result<()> {
        let call = client.post(&url).header("content-type", "application/json").body(body.to_string());
        let answer = call.send().await?;
        anyhow::ensure!(answer.status() == 200, "{}: {}", answer.status(), answer.text().await?);
        answer.bytes().await?;
        Ok(())
    };
    if path == TRACK {
        let callers = (0..IN_FLIGHT).map(async |first| {
            for number in (first..events).step_by(IN_FLIGHT as usize) {
                post(event(number)).await?;
            }
            anyhow::Ok(())
        });
        futures_util::future::try_join_all(callers).await?;
    } else {
        for first in (0..events).step_by(BATCH as usize) {
            post(batch(first, BATCH)).await?;
        }
    }
    anyhow::ensure!(
        started.elapsed() < Duration::from_secs(600),
        "the machine is too slow for these figures"
    );
    Ok(())
}
