//! How long a caller waits for the answer to an event of a browser's with everything found
//! out about it, beside the same relay that finds out nothing. A round before, between or
//! behind which TCP itself was slow tells nothing and is repeated.
//!
//! While a vendor takes the events, too, and while it takes none: on two cores it has the
//! callers' core, where whatever it does with a larger request is their wait.

use analytics_relay::providers::sandbox::Vendor;
use anyhow::ensure;
use bytes::Bytes;
use serde_json::json;

use crate::{
    enrichment::USER_AGENTS,
    enrichment_geo::{address, write_cities},
    floors::Floor,
    http::TRACK,
    open_loop::{OpenCall, Round, Timetable},
    report::{Report, median},
    sink::Sink,
    support::Relay,
};

const ROUNDS: usize = 9;
const TRIES: usize = 36;
/// The slowest TCP of a round that counts.
const FLOOR_P99_MICROS: f64 = 1000.0;
/// Of calls a second: one at which the core that answers has time to spare, and one at which
/// calls wait for each other.
const RATES: [u32; 2] = [2_000, 10_000];
const SECONDS: f64 = 2.0;
/// Devices that send in turn.
const DEVICES: u32 = 1_000;

pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let database = dir.path().join("cities.mmdb");
    write_cities(&database)?;
    let database = database.to_string_lossy();
    let all = [("ENRICH", "all"), ("PII_MODE", "standard"), ("GEO_DATABASE", &*database)];
    let none = [("ENRICH", "none"), ("PII_MODE", "off"), ("GEO_DATABASE", "")];
    for rate in RATES {
        for takes in [false, true] {
            at_rate(report, rate, takes, [&all, &none]).await?;
        }
    }
    Ok(())
}

async fn at_rate(
    report: &mut Report,
    rate: u32,
    takes: bool,
    [all, none]: [&[(&str, &str)]; 2],
) -> anyhow::Result<()> {
    let name = format!("accept_enriched.{rate}{}", if takes { ".delivering" } else { "" });
    let mut rounds = Vec::new();
    for number in 0..TRIES {
        // What comes second meets a machine that is warm: each comes first in its turn.
        let (first, second) = if number % 2 == 0 { (none, all) } else { (all, none) };
        let before = floor_p99(rate).await?;
        let first = round(rate, takes, first).await?;
        let between = floor_p99(rate).await?;
        let second = round(rate, takes, second).await?;
        if before.max(between).max(floor_p99(rate).await?) <= FLOOR_P99_MICROS {
            rounds.push(if number % 2 == 0 { (first, second) } else { (second, first) });
        }
        if rounds.len() == ROUNDS {
            break;
        }
    }
    if rounds.is_empty() {
        report.not_run(&name, "TCP alone was slow each time");
        return Ok(());
    }
    for (share, label) in [(0.5, "p50"), (0.99, "p99")] {
        let mut add = |end: &str, unit: &'static str, value: &dyn Fn(&(Round, Round)) -> f64| {
            report.add(&format!("{name}.{label}{end}"), median(rounds.iter().map(value).collect()), unit);
        };
        add(".off", "us", &|(off, _)| off.micros(share));
        add("", "us", &|(_, on)| on.micros(share));
        add(".to_off_of_the_round", "ratio", &|(off, on)| on.micros(share) / off.micros(share));
    }
    Ok(())
}

async fn floor_p99(rate: u32) -> anyhow::Result<f64> {
    let tcp = Floor::start("tcp").await?;
    Ok(Timetable { rate, seconds: 0.5 }.over_tcp(&tcp.addr).await?.micros(0.99))
}

async fn round(rate: u32, takes: bool, settings: &[(&str, &str)]) -> anyhow::Result<Round> {
    let (sink, data) = (Sink::start().await?, tempfile::tempdir()?);
    let relay = Relay::start_roomy(&sink.url, data.path(), "segment", settings).await?;
    let bodies: Vec<Bytes> = (0..DEVICES).map(|device| event(device).to_string().into()).collect();
    // What is asked once a run, and whom it sees for the first time, is no caller's wait.
    let warm_up = Timetable { rate: rate / 2, seconds: 1.0 };
    warm_up.over_h2(&relay.http_addr, OpenCall::json(TRACK), bodies.clone()).await?;
    sink.hang(!takes);
    let timetable = Timetable { rate, seconds: SECONDS };
    let round = timetable.over_h2(&relay.http_addr, OpenCall::json(TRACK), bodies).await?;
    sink.hang(false);
    let balance = relay.terminate().await?;
    let sent = warm_up.events() + timetable.events();
    ensure!(balance["delivered"] == sent, "not all were delivered: {balance}");
    ensure!(sink.taken(Vendor::Segment) == sent, "not all arrived");
    Ok(round)
}

/// As a server passes on what analytics.js has sent it.
fn event(device: u32) -> serde_json::Value {
    json!({
        "type": "track",
        "anonymousId": format!("0f1e2d3c-0000-4000-8000-{device:012}"),
        "event": "Order Placed",
        "properties": {"sku": format!("SKU-{device:04}"), "currency": "EUR", "total": 19.5, "quantity": 3},
        "context": {
            "ip": address(device).to_string(),
            "userAgent": USER_AGENTS[device as usize % 5],
            "library": {"name": "analytics.js", "version": "next-1.70.0"},
            "locale": "de-DE",
            "page": {
                "path": "/shoes", "referrer": "https://www.google.com/", "title": "Shoes",
                "search": "?utm_source=news&utm_medium=email",
                "url": "https://shop.example/shoes?utm_source=news&utm_medium=email",
            },
        },
    })
}
