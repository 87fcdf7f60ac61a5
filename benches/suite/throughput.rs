//! How many events go through one core, from the call to the provider's answer,
//! and what each costs; beside what the libraries alone can do.

use std::path::Path;

use analytics_relay::providers::sandbox::Vendor;
use tokio::time::Instant;

use crate::{
    floors::Floor,
    h2load::{self, Call, H2load, Until},
    peer,
    rate::{Rate, Usage, window},
    report::{Report, median},
    sink::Sink,
    support::{self, Relay, reference_batch, reference_event},
    tls::{self, ServerCertificate},
};

const ROUNDS: usize = 3;
const SECONDS: u32 = 4;
const BATCH: u64 = 100;
/// Batches of one stream.
const STREAM: u64 = 100;

pub(crate) const ALL: &str = "mixpanel,amplitude,segment";

pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    tls::handshakes(report).await?;
    if !h2load::is_here(report, "throughput").await {
        return Ok(());
    }
    let has_peer = peer::is_here().await;
    if !has_peer {
        report.not_run("peer", "syslog-ng is not installed (Debian: syslog-ng-core, syslog-ng-mod-http)");
    }
    let dir = tempfile::tempdir()?;
    let certificate = ServerCertificate::write(dir.path())?;
    let unary = dir.path().join("unary");
    h2load::write_framed(&unary, [reference_event(1)])?;
    let batch = dir.path().join("batch");
    h2load::write_framed(&batch, [reference_batch(0, BATCH)])?;
    let stream = dir.path().join("stream");
    h2load::write_framed(&stream, (0..STREAM).map(|number| reference_batch(number * BATCH, BATCH)))?;
    let until = Until::Seconds(SECONDS);
    let unary_load = H2load { call: Call::TRACK_EVENT, connections: 4, in_flight: 32, until };
    let batch_load = H2load { call: Call::TRACK_BATCH, connections: 4, in_flight: 2, until };
    let stream_load = H2load { call: Call::TRACK_STREAM, connections: 2, in_flight: 1, until };

    let (plain, tls) = (None, Some(&certificate));
    let relays = [
        ("unary_1", "segment", unary_load, &unary, plain),
        ("unary_3", ALL, unary_load, &unary, plain),
        ("unary_1_tls", "segment", unary_load, &unary, tls),
        ("batch_1", "segment", batch_load, &batch, plain),
        ("batch_3", ALL, batch_load, &batch, plain),
        ("batch_1_tls", "segment", batch_load, &batch, tls),
        ("batch_1_gzip", "mixpanel", batch_load, &batch, plain),
        ("batch_1_plain", "amplitude", batch_load, &batch, plain),
        ("stream_1", "segment", stream_load, &stream, plain),
        ("stream_3", ALL, stream_load, &stream, plain),
    ];
    let mut found: Vec<(String, Vec<Rate>)> = Vec::new();
    let mut note = |name: String, rate| match found.iter_mut().find(|(known, _)| *known == name) {
        Some((_, rates)) => rates.push(rate),
        None => found.push((name, vec![rate])),
    };
    for _ in 0..ROUNDS {
        for kind in ["h2", "echo"] {
            note(format!("floor_{kind}"), floor(kind, unary_load, &unary).await?);
        }
        if has_peer {
            note("peer_syslog_ng".to_owned(), peer::relayed().await?);
        }
        for (name, providers, load, messages, certificate) in relays {
            note(format!("relayed_{name}"), relay(providers, load, messages, certificate).await?);
        }
    }
    let middle = |rates: &[Rate], value: fn(&Rate) -> f64| median(rates.iter().map(value).collect());
    for (name, rates) in &found {
        let rate = middle(rates, |rate| rate.events);
        report.add_beside(&format!("{name}.rate"), rate, "events/s/core", "floor_echo.rate");
        let cpu = middle(rates, |rate| rate.cpu_micros);
        report.add_beside(&format!("{name}.cpu"), cpu, "us/event", "floor_echo.cpu");
    }
    Ok(())
}

/// Calls a second, each an event, of a server that relays nothing.
async fn floor(kind: &str, load: H2load, messages: &Path) -> anyhow::Result<Rate> {
    let floor = Floor::start(kind).await?;
    let (start, url) = (Instant::now(), floor.url());
    // It does not count, so these are microseconds of its run.
    let usage = || {
        let events = u64::try_from(start.elapsed().as_micros())?;
        Ok(Usage { events, cpu: support::cpu_time(floor.pid())? })
    };
    let (events, cores) = tokio::try_join!(load.run(&url, messages), window(usage))?;
    Ok(Rate { events, cpu_micros: cores.cpu_micros * 1e6 / events })
}

async fn relay(
    providers: &str,
    load: H2load,
    messages: &Path,
    certificate: Option<&ServerCertificate>,
) -> anyhow::Result<Rate> {
    let sink = Sink::start().await?;
    let data = tempfile::tempdir()?;
    let settings = certificate.map(ServerCertificate::settings);
    let settings = settings.as_ref().map_or(&[][..], |settings| settings);
    let relay = Relay::start_roomy(&sink.url, data.path(), providers, settings).await?;
    let scheme = if certificate.is_some() { "https" } else { "http" };
    let url = format!("{scheme}://{}", relay.grpc_addr);
    let vendors: Vec<Vendor> = providers.split(',').filter_map(Vendor::from_name).collect();
    let least_taken = || vendors.iter().map(|vendor| sink.taken(*vendor)).min().unwrap_or_default();
    let usage = || Ok(Usage { events: least_taken(), cpu: relay.cpu_time()? });
    let (_, rate) = tokio::try_join!(load.run(&url, messages), window(usage))?;
    let balance = relay.terminate().await?;
    anyhow::ensure!(balance["accepted"] == balance["delivered"], "not all were delivered: {balance}");
    for vendor in vendors {
        let taken = sink.taken(vendor);
        anyhow::ensure!(balance["accepted"] == taken, "{} took {taken}: {balance}", vendor.name());
    }
    Ok(rate)
}
