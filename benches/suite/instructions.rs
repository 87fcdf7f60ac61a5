//! Instructions and allocations per event, counted by callgrind: steady enough to
//! be guarded.
//!
//! Each figure is the difference of two runs of a relay with one runtime thread,
//! divided by the difference of their events, so that starting and stopping do
//! not count. Beside them, in the same run and the same way, the bare echo. Kernel
//! time is not in it.

use std::{
    collections::HashSet,
    env,
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::{
        TrackBatchResponse, analytics_service_client::AnalyticsServiceClient, track_batch_answer::Answer,
    },
    providers::sandbox::{Options, Sandbox},
};
use anyhow::{Context, ensure};
use tokio::{process::Command, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::{
    floors::Floor,
    handlers::FLOORS,
    http,
    report::Report,
    support::{Relay, reference_batch, reference_event},
    throughput::ALL,
    tls::ServerCertificate,
};

/// Events of the two runs.
const EVENTS: (u64, u64) = (1_000, 6_000);
/// Events of a batch.
const BATCH: u64 = 100;
/// Calls under way.
const IN_FLIGHT: u64 = 16;

/// How events are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    Unary,
    Batch,
    Stream,
    /// Over HTTP, to this path.
    Http(&'static str),
}

/// A relay, and how it is used.
struct Case {
    name: &'static str,
    /// None is the echo.
    providers: &'static str,
    durability: &'static str,
    how: How,
    tls: bool,
}

const fn case(name: &'static str, providers: &'static str, how: How) -> Case {
    Case { name, providers, durability: "memory", how, tls: false }
}

const fn synced(name: &'static str, how: How) -> Case {
    Case { durability: "synced", ..case(name, ONE, how) }
}

const fn over_tls(name: &'static str, how: How) -> Case {
    Case { tls: true, ..case(name, ONE, how) }
}

const ONE: &str = "segment";
/// Without Mixpanel, whose bodies are compressed.
const TWO: &str = "segment,amplitude";
const ECHO: Case = case("echo_unary", "", How::Unary);
/// Handlers that do the least with the bodies of Segment's form, by their kinds.
const HTTP_FLOORS: [(Case, &str); 4] = [
    (case("http_read_track", "", How::Http(http::TRACK)), FLOORS[0]),
    (case("http_value_track", "", How::Http(http::TRACK)), FLOORS[1]),
    (case("http_read_batch", "", How::Http(http::BATCHES)), FLOORS[0]),
    (case("http_value_batch", "", How::Http(http::BATCHES)), FLOORS[1]),
];
/// What the relay costs beside them: all of it, up to the provider's answer.
const HTTP_CASES: [(Case, &str); 2] = [
    (case("http_track_1", ONE, How::Http(http::TRACK)), "http_value_track"),
    (case("http_batch_1", ONE, How::Http(http::BATCHES)), "http_value_batch"),
];
const CASES: [Case; 12] = [
    case("unary_1", ONE, How::Unary),
    case("unary_2", TWO, How::Unary),
    case("unary_3", ALL, How::Unary),
    case("batch_1", ONE, How::Batch),
    case("batch_2", TWO, How::Batch),
    case("batch_3", ALL, How::Batch),
    case("stream_1", ONE, How::Stream),
    case("stream_3", ALL, How::Stream),
    synced("unary_1_synced", How::Unary),
    synced("batch_1_synced", How::Batch),
    over_tls("unary_1_tls", How::Unary),
    over_tls("batch_1_tls", How::Batch),
];

pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    if !is_valgrind_here(report, "instructions").await {
        return Ok(());
    }
    for case in [&ECHO].into_iter().chain(&CASES) {
        each(report, case, ("echo", ECHO.name)).await?;
    }
    Ok(())
}

/// The same of the HTTP door.
pub(crate) async fn run_http(report: &mut Report) -> anyhow::Result<()> {
    if !is_valgrind_here(report, "http_instructions").await {
        return Ok(());
    }
    for (case, kind) in &HTTP_FLOORS {
        each(report, case, (kind, case.name)).await?;
    }
    for (case, floor) in &HTTP_CASES {
        each(report, case, ("", floor)).await?;
    }
    Ok(())
}

async fn is_valgrind_here(report: &Report, what: &str) -> bool {
    let version = Command::new("valgrind").arg("--version").output().await;
    let is_here = version.is_ok_and(|output| output.status.success());
    if !is_here {
        report.not_run(what, "valgrind is not installed");
    }
    is_here
}

/// What each event of a case costs, beside a floor. If the case is one, it is of that kind.
async fn each(report: &mut Report, case: &Case, (kind_of_floor, floor): (&str, &str)) -> anyhow::Result<()> {
    let (few, many) =
        (count(case, kind_of_floor, EVENTS.0).await?, count(case, kind_of_floor, EVENTS.1).await?);
    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    let each = |few: u64, many: u64| (many - few) as f64 / (EVENTS.1 - EVENTS.0) as f64;
    for (kind, unit, value) in [
        ("instructions", "instructions/event", each(few.instructions, many.instructions)),
        ("allocations", "allocations/event", each(few.allocations, many.allocations)),
    ] {
        report.add_beside(&format!("{}.{kind}", case.name), value, unit, &format!("{floor}.{kind}"));
    }
    Ok(())
}

/// What a server costs over its life.
struct Counts {
    instructions: u64,
    allocations: u64,
}

/// Counts for a server that gets so many events.
async fn count(case: &Case, kind_of_floor: &str, events: u64) -> anyhow::Result<Counts> {
    let dir = tempfile::tempdir()?;
    let (counts, log) = (dir.path().join("counts"), dir.path().join("log"));
    let mut command = Command::new("valgrind");
    command.arg("--tool=callgrind").arg(format!("--log-file={}", log.display()));
    command.arg(format!("--callgrind-out-file={}", counts.display()));
    // A thread that waits must get its turn, or drains take long.
    command.arg("--fair-sched=try").env("TOKIO_WORKER_THREADS", "1");
    if case.providers.is_empty() {
        command.arg(env::current_exe()?);
        let floor = Floor::start_by(command, kind_of_floor).await?;
        match case.how {
            How::Http(path) => http::send(&floor.addr, path, events).await?,
            how => send(Channel::from_shared(floor.url())?.connect().await?, how, events).await?,
        }
        floor.terminate().await?;
    } else {
        let sandbox = Sandbox::start(Options { keep_bodies: false, ..Options::default() }).await?;
        command.arg(Relay::PROGRAM);
        let certificate = ServerCertificate::write(dir.path())?;
        let mut settings = vec![
            ("ANALYTICS_PROVIDER", case.providers),
            ("DURABILITY", case.durability),
            ("REQUEST_TIMEOUT_SECONDS", "60"),
        ];
        if case.tls {
            settings.extend(certificate.settings());
        }
        let relay = Relay::start_by(command, &sandbox.url(), &dir.path().join("data"), &settings).await?;
        match case.how {
            How::Http(path) => http::send(&relay.http_addr, path, events).await?,
            how if case.tls => send(certificate.connect(&relay.grpc_addr).await?, how, events).await?,
            how => send(Channel::from_shared(relay.url())?.connect().await?, how, events).await?,
        }
        let balance = relay.terminate().await?;
        ensure!(balance["delivered"] == events, "{balance}");
    }
    read_counts(&std::fs::read_to_string(&counts)?)
}

/// The instructions that callgrind counted, and the calls of the allocator.
/// (dhat counts allocations too, but sees only those of the C library.)
fn read_counts(profile: &str) -> anyhow::Result<Counts> {
    const ALLOCATOR: [&str; 3] = ["mi_malloc_aligned", "mi_zalloc_aligned", "mi_realloc_aligned"];
    let totals = profile.lines().find_map(|line| line.strip_prefix("totals: ")).context("no totals")?;
    // "cfn=(id) name" is the function that is called; later it is only "cfn=(id)".
    // The line behind it is "calls=count position".
    let (mut allocator_ids, mut is_allocator, mut allocations) = (HashSet::new(), false, 0);
    for line in profile.lines() {
        let name_of =
            |prefix| line.strip_prefix(prefix).map(|name| name.split_once(' ').unwrap_or((name, "")));
        for (id, name) in ["cfn=", "fn="].into_iter().filter_map(name_of) {
            if ALLOCATOR.contains(&name) {
                allocator_ids.insert(id);
            }
            is_allocator = line.starts_with("cfn=") && allocator_ids.contains(id);
        }
        if let Some(calls) = line.strip_prefix("calls=").filter(|_| is_allocator) {
            allocations += calls.split(' ').next().unwrap_or_default().parse::<u64>()?;
        }
    }
    ensure!(allocations > 0, "no calls of the allocator: the relay was built without it");
    Ok(Counts { instructions: totals.trim().parse()?, allocations })
}

/// Sends events and waits for every answer.
async fn send(channel: Channel, how: How, events: u64) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut client = AnalyticsServiceClient::new(channel);
    match how {
        How::Http(path) => anyhow::bail!("{path} is no gRPC"),
        How::Unary => {
            let callers = (0..IN_FLIGHT).map(|first| {
                let mut client = client.clone();
                async move {
                    for number in (first..events).step_by(IN_FLIGHT as usize) {
                        client.track_event(reference_event(number)).await?;
                    }
                    anyhow::Ok(())
                }
            });
            futures_util::future::try_join_all(callers).await?;
        }
        How::Batch => {
            for first in (0..events).step_by(BATCH as usize) {
                check(&client.track_batch(reference_batch(first, BATCH)).await?.into_inner())?;
            }
        }
        How::Stream => {
            let (batches, requests) = mpsc::channel(4);
            tokio::spawn(async move {
                for first in (0..events).step_by(BATCH as usize) {
                    if batches.send(reference_batch(first, BATCH)).await.is_err() {
                        return;
                    }
                }
            });
            let mut answers = client.track_stream(ReceiverStream::new(requests)).await?.into_inner();
            let mut answered = 0;
            while let Some(response) = answers.message().await? {
                check(&response)?;
                answered += response.answers.len() as u64;
            }
            ensure!(answered == events, "{answered} answers to {events} events");
        }
    }
    ensure!(started.elapsed() < Duration::from_secs(600), "the machine is too slow for these figures");
    Ok(())
}

fn check(response: &TrackBatchResponse) -> anyhow::Result<()> {
    let is_accepted = |answer: &Answer| matches!(answer, Answer::Accepted(_));
    ensure!(
        response.answers.iter().all(|answer| answer.answer.as_ref().is_some_and(is_accepted)),
        "not all were accepted: {response:?}"
    );
    Ok(())
}
