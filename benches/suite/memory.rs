//! What waits costs memory, and an idle relay a little of everything.

use std::time::Duration;

use prost::Message;
use tokio::time::sleep;

use crate::{
    report::{Report, median},
    sink::Sink,
    support::{Relay, reference_batch, reference_event, send_batches},
};

/// Events that wait for a provider which does not answer.
const WAITING: u64 = 150_000;
/// Sent before, so that buffers and pools are there, and as many requests under way,
/// with their bodies, as there can be.
const WARM: u64 = 20_000;
const IDLE: Duration = Duration::from_secs(5);
const STARTS: usize = 9;

#[expect(clippy::cast_precision_loss, reason = "figures for a person")]
pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    let wire = reference_event(1).encoded_len() as f64;
    report.add("event.wire", wire, "bytes");

    let sink = Sink::start().await?;
    let data = tempfile::tempdir()?;
    let relay = Relay::start_roomy(&sink.url, data.path(), "segment", &[]).await?;
    sleep(Duration::from_secs(2)).await;
    report.add("idle.memory", relay.memory_mb("VmRSS")?, "MB");
    let (wakeups, cpu) = (relay.wakeups()?, relay.cpu_time()?);
    sleep(IDLE).await;
    report.add("idle.wakeups", (relay.wakeups()? - wakeups) as f64 / IDLE.as_secs_f64(), "per second");
    let cpu = (relay.cpu_time()? - cpu).as_secs_f64() / IDLE.as_secs_f64();
    report.add("idle.cpu", cpu * 1e6, "us/s");

    sink.hang(true);
    send_batches(&relay.grpc_addr, 0..WARM, reference_batch).await?;
    sleep(Duration::from_millis(500)).await;
    let before = relay.memory_mb("VmRSS")?;
    send_batches(&relay.grpc_addr, WARM..WARM + WAITING, reference_batch).await?;
    sleep(Duration::from_secs(1)).await;
    let bytes = (relay.memory_mb("VmRSS")? - before) * f64::from(1 << 20) / WAITING as f64;
    report.add_beside("queued.memory", bytes, "bytes/event", "event.wire");
    sink.hang(false);
    let balance = relay.terminate().await?;
    anyhow::ensure!(balance["delivered"] == WARM + WAITING, "not all were delivered: {balance}");

    let mut starts = Vec::new();
    for _ in 0..STARTS {
        starts
            .push(Relay::time_to_first_ok(&sink.url, tempfile::tempdir()?.path()).await?.as_secs_f64() * 1e3);
    }
    report.add("exec_to_first_ok", median(starts), "ms");
    Ok(())
}
