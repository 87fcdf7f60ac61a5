//! What durability costs, beside what the disk does with groups of records in the
//! same minute.

use std::{path::Path, time::Duration};

use analytics_relay::providers::sandbox::Vendor;

use crate::{
    h2load::{self, Call, H2load, Until},
    report::{Report, median},
    sink::Sink,
    support::{Relay, group_commits, reference_batch, reference_event},
};

const ROUNDS: usize = 3;
/// Bytes of a record, about those of the event in the log.
const RECORD_BYTES: usize = 420;
const GROUP: usize = 256;
const BATCH: u64 = 100;
const MEMORY: &[(&str, &str)] = &[("DURABILITY", "memory")];
const SYNCED: &[(&str, &str)] = &[("DURABILITY", "synced")];
const WRITTEN: &[(&str, &str)] = &[("DURABILITY", "written")];
const SEALED: &[(&str, &str)] =
    &[("DURABILITY", "written"), ("RELAY_KEK", "bench:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=")];

pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    if !h2load::is_here(report, "durability").await {
        return Ok(());
    }
    // Beside the build and not in a directory that may be in memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let unary = dir.path().join("unary");
    h2load::write_framed(&unary, [reference_event(1)])?;
    let batch = dir.path().join("batch");
    h2load::write_framed(&batch, [reference_batch(0, BATCH)])?;
    let load =
        |call, in_flight, calls| H2load { call, connections: 4, in_flight, until: Until::Calls(calls) };
    let cases = [
        ("unary", 1, load(Call::TRACK_EVENT, 64, 150_000), &unary),
        ("batch", BATCH, load(Call::TRACK_BATCH, 2, 5_000), &batch),
    ];
    for (name, events, load, messages) in cases {
        let (mut disks, mut memory, mut synced) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            disks.push(disk(dir.path())?);
            memory.push(relay(dir.path(), MEMORY, load, messages, events).await?);
            synced.push(relay(dir.path(), SYNCED, load, messages, events).await?);
        }
        let rate = |found: &[(f64, f64)]| median(found.iter().map(|found| found.0).collect());
        let cpu = |found: &[(f64, f64)]| median(found.iter().map(|found| found.1).collect());
        let group_commit = format!("durable.{name}.floor_group_commit.rate");
        report.add(&group_commit, median(disks), "records/s");
        let in_memory = format!("durable.{name}.memory.rate");
        report.add(&in_memory, rate(&memory), "events/s");
        let is_disk = report.value(&group_commit) < report.value(&in_memory);
        let floor = if is_disk { group_commit } else { in_memory };
        report.add_beside(&format!("durable.{name}.synced.rate"), rate(&synced), "events/s", &floor);
        report.add(&format!("durable.{name}.added_cpu"), cpu(&synced) - cpu(&memory), "us/event");
    }
    Ok(())
}

/// What it costs to seal the log, beside the same one in the clear: batches, which are
/// dear for nothing else.
pub(crate) async fn sealing(report: &mut Report) -> anyhow::Result<()> {
    if !h2load::is_here(report, "sealing").await {
        return Ok(());
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let batch = dir.path().join("batch");
    h2load::write_framed(&batch, [reference_batch(0, BATCH)])?;
    let load = H2load { call: Call::TRACK_BATCH, connections: 4, in_flight: 2, until: Until::Calls(5_000) };
    let (mut clear, mut sealed) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        clear.push(relay(dir.path(), WRITTEN, load, &batch, BATCH).await?);
        sealed.push(relay(dir.path(), SEALED, load, &batch, BATCH).await?);
    }
    let rate = |found: &[(f64, f64)]| median(found.iter().map(|found| found.0).collect());
    let cpu = |found: &[(f64, f64)]| median(found.iter().map(|found| found.1).collect());
    report.add("sealing.clear.rate", rate(&clear), "events/s");
    report.add_beside("sealing.sealed.rate", rate(&sealed), "events/s", "sealing.clear.rate");
    report.add("sealing.added_cpu", (cpu(&sealed) - cpu(&clear)) * 1000.0, "ns/event");
    Ok(())
}

/// Records a second in groups, each with one `fdatasync`.
fn disk(dir: &Path) -> anyhow::Result<f64> {
    let groups = group_commits(dir, GROUP, RECORD_BYTES, Duration::from_secs(1))?;
    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    Ok(groups.rate() * GROUP as f64)
}

/// Events a second that were answered, and microseconds of CPU for each.
async fn relay(
    dir: &Path,
    settings: &[(&str, &str)],
    load: H2load,
    messages: &Path,
    events: u64,
) -> anyhow::Result<(f64, f64)> {
    let sink = Sink::start().await?;
    let data = tempfile::tempdir_in(dir)?;
    let relay = Relay::start_roomy(&sink.url, data.path(), "segment", settings).await?;
    let before = relay.cpu_time()?;
    let calls = load.run(&relay.url(), messages).await?;
    let Until::Calls(called) = load.until else { anyhow::bail!("a number of calls is needed") };
    sink.wait_for(Vendor::Segment, called * events * 9 / 10, Duration::from_secs(60)).await?;
    let cpu = relay.cpu_time()? - before;
    let taken = sink.taken(Vendor::Segment);
    let balance = relay.terminate().await?;
    anyhow::ensure!(balance["accepted"] == called * events, "not all were accepted: {balance}");
    anyhow::ensure!(balance["delivered"] == called * events, "not all were delivered: {balance}");
    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    Ok((calls * events as f64, cpu.as_secs_f64() / taken as f64 * 1e6))
}
