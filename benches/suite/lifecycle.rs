//! Drains, outages, and what one provider does to the others.

use std::time::Duration;

use analytics_relay::providers::sandbox::Vendor;
use anyhow::ensure;
use tokio::time::{Instant, sleep};

use crate::{
    latency::messages,
    open_loop::Timetable,
    report::{ISOLATION, Report, median},
    sink::Sink,
    support::{Relay, reference_batch, send_batches},
    throughput::ALL,
};

const QUEUED: u64 = 100_000;
const PATIENCE: Duration = Duration::from_secs(120);
/// Events a second before, in and after the outage.
const RATE: u32 = 10_000;
const OUTAGE_SECONDS: f64 = 30.0;
/// How long a slow provider takes for each answer.
const SLOW_MS: u64 = 200;
/// Half of them with a slow provider.
const ISOLATION_ROUNDS: u64 = 20;

pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    for delay_ms in [0, 20] {
        let seconds = drain(delay_ms).await?;
        report.add(&format!("drain.100000x3.{delay_ms}ms"), seconds, "s");
    }
    Ok(())
}

/// From SIGTERM, with a full queue, to the end of the process.
async fn drain(delay_ms: u64) -> anyhow::Result<f64> {
    let sink = Sink::start().await?;
    let data = tempfile::tempdir()?;
    let relay = Relay::start_roomy(&sink.url, data.path(), ALL, &[]).await?;
    Vendor::ALL.into_iter().for_each(|vendor| sink.delay(vendor, delay_ms));
    sink.hang(true);
    send_batches(&relay.grpc_addr, 0..QUEUED, reference_batch).await?;
    ensure!(Vendor::ALL.iter().all(|vendor| sink.taken(*vendor) == 0), "the sink did not hang");
    let start = Instant::now();
    sink.hang(false);
    let balance = relay.terminate().await?;
    let seconds = start.elapsed().as_secs_f64();
    for vendor in Vendor::ALL {
        ensure!(sink.taken(vendor) == QUEUED, "{} misses events: {balance}", vendor.name());
    }
    Ok(seconds)
}

/// What callers and two providers notice when the third is slow. It gets larger requests,
/// because more waits for each, and where callers, relay and providers share two cores a
/// large request costs the others something whoever gets it. So it is measured with
/// requests of one size, which tells what slowness does, and as the relay is set.
pub(crate) async fn isolation(report: &mut Report) -> anyhow::Result<()> {
    // As many as wait for a provider that takes 200 ms.
    one_is_slow(report, ISOLATION, &[("BATCH_SIZE", "500")]).await?;
    one_is_slow(report, "slow_provider.", &[]).await
}

/// Rounds of one relay with and without, in the order of ABBA, so that what else the
/// machine does strikes both; the rounds in the middle.
async fn one_is_slow(report: &mut Report, name: &str, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    let timetable = Timetable { rate: RATE, seconds: 2.0 };
    let (sink, data) = (Sink::start().await?, tempfile::tempdir()?);
    let relay = Relay::start_roomy(&sink.url, data.path(), ALL, settings).await?;
    let states = [("healthy", 0), ("one_takes_200ms", SLOW_MS)];
    let mut rounds: [[Vec<f64>; 4]; 2] = Default::default();
    for round in 0..=ISOLATION_ROUNDS {
        let state = usize::from(matches!(round % 4, 2 | 3));
        sink.delay(Vendor::Amplitude, states[state].1);
        let found = timetable.over_grpc(&relay.grpc_addr, messages()).await?;
        let (end, sent) = (Instant::now(), timetable.events() * (round + 1));
        for other in [Vendor::Mixpanel, Vendor::Segment] {
            sink.wait_for(other, sent, PATIENCE).await?;
        }
        let others_after = end.elapsed();
        sink.wait_for(Vendor::Amplitude, sent, PATIENCE).await?;
        // The first is for warming up.
        if round > 0 {
            let [middle, slowest, after, late] = &mut rounds[state];
            middle.push(found.micros(0.5));
            slowest.push(found.micros(0.99));
            // The sink is looked at once a millisecond: less would be compared with luck.
            after.push((others_after.as_secs_f64() * 1e3).max(1.0));
            late.push(found.late_micros(0.99));
        }
    }
    for ((state, _), [middle, slowest, after, late]) in states.into_iter().zip(rounds) {
        for (figure, values, unit) in
            [("p50", middle, "us"), ("p99", slowest, "us"), ("others_after", after, "ms")]
        {
            let healthy = format!("{name}healthy.{figure}");
            report.add_beside(&format!("{name}{state}.{figure}"), median(values), unit, &healthy);
        }
        // Where the caller itself came late, something else ran, and nothing was measured.
        report.add(&format!("{name}{state}.caller_late_p99"), median(late), "us");
    }
    let (balance, sent) = (relay.terminate().await?, timetable.events() * (ISOLATION_ROUNDS + 1));
    ensure!(balance["accepted"] == sent, "not all were accepted: {balance}");
    Ok(())
}

/// Half a minute without a provider, with a log: how soon nothing waits any more, and what
/// callers notice meanwhile.
pub(crate) async fn outage(report: &mut Report) -> anyhow::Result<()> {
    let sink = Sink::start().await?;
    // Beside the build and not in a directory that may be in memory.
    let data = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let settings = [("ANALYTICS_PROVIDER", "segment"), ("DURABILITY", "written")];
    let relay = Relay::start_pinned(&sink.url, data.path(), &settings).await?;
    let normal = Timetable { rate: RATE, seconds: 3.0 };
    let before = normal.over_grpc(&relay.grpc_addr, messages()).await?;
    sink.fail(true);
    let down = Timetable { rate: RATE, seconds: OUTAGE_SECONDS };
    let meanwhile = down.over_grpc(&relay.grpc_addr, messages()).await?;
    let missed = normal.events() + down.events() - sink.taken(Vendor::Segment);
    ensure!(missed >= down.events(), "the outage did not happen: {missed} events waited");
    let back = Instant::now();
    sink.fail(false);
    let after = Timetable { rate: RATE, seconds: 6.0 };
    let caught_up = async {
        let taken_before = sink.taken(Vendor::Segment);
        let mut noticed_after = None;
        // Nothing waits but the last batches.
        loop {
            let due = normal.events() + down.events() + elapsed_events(back).min(after.events());
            let taken = sink.taken(Vendor::Segment);
            if taken > taken_before && noticed_after.is_none() {
                noticed_after = Some(back.elapsed());
            }
            if let Some(noticed_after) = noticed_after.filter(|_| taken + u64::from(RATE) / 20 >= due) {
                return Ok::<_, anyhow::Error>((noticed_after, back.elapsed()));
            }
            ensure!(back.elapsed() < PATIENCE, "{taken} of {due} events came");
            sleep(Duration::from_millis(2)).await;
        }
    };
    let (recovering, (noticed_after, empty_after)) =
        tokio::try_join!(after.over_grpc(&relay.grpc_addr, messages()), caught_up)?;
    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    report.add("outage.30s.backlog", missed as f64, "events");
    report.add("outage.30s.noticed_after", noticed_after.as_secs_f64(), "s");
    report.add("outage.30s.empty_after", empty_after.as_secs_f64(), "s");
    report.add("outage.30s.p99_before", before.micros(0.99), "us");
    report.add_beside("outage.30s.p99_meanwhile", meanwhile.micros(0.99), "us", "outage.30s.p99_before");
    report.add_beside("outage.30s.p99_recovering", recovering.micros(0.99), "us", "outage.30s.p99_before");
    report.add("outage.30s.caller_late_p99_before", before.late_micros(0.99), "us");
    report.add("outage.30s.caller_late_p99_recovering", recovering.late_micros(0.99), "us");
    let balance = relay.terminate().await?;
    let events = normal.events() + down.events() + after.events();
    ensure!(
        balance["delivered"] == events && sink.taken(Vendor::Segment) == events,
        "events miss: {balance}"
    );
    Ok(())
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some thousands")]
fn elapsed_events(since: Instant) -> u64 {
    (since.elapsed().as_secs_f64() * f64::from(RATE)) as u64
}
