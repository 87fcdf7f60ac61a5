//! Whatever becomes of the log lines: calls, probes, delivery and the drain do
//! not notice.

use std::{
    collections::HashSet,
    fs::{self, OpenOptions},
    io::{self, BufRead, BufReader, PipeReader, Write},
    net::SocketAddr,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use analytics_relay::providers::sandbox::Vendor;
use serde_json::Value;
use tokio::time::{sleep, timeout};

use crate::harness::{Observer, Relay, Setup, batch, reqwest_client, taken, track_item};

/// Longest time of a call or a probe.
const PROMPT: Duration = Duration::from_secs(5);

/// A relay whose two streams are one pipe, as under `2>&1 |`, and the end of the
/// pipe that is read. It was read until the relay listened.
fn piped(setup: &Setup) -> (Relay, BufReader<PipeReader>) {
    let (reader, writer) = io::pipe().unwrap();
    let mut command = setup.command();
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let child = command.spawn().unwrap();
    // Or the pipe never ends: the command holds a copy of its other end.
    drop(command);
    let mut reader = BufReader::new(reader);
    let started = lines(&mut reader).find(|line| line["message"] == "relay started").expect("it starts");
    let addr = |field: &str| started[field].as_str().unwrap().parse().unwrap();
    (Relay::unread(child, addr("grpc_addr"), addr("metrics_addr")), reader)
}

fn lines(reader: &mut impl BufRead) -> impl Iterator<Item = Value> {
    reader.lines().map(|line| serde_json::from_str(&line.unwrap()).expect("one JSON object a line"))
}

/// A relay both of whose streams are `/dev/full`: every write fails with
/// ENOSPC. Its ports are found from outside.
async fn on_a_full_disk(setup: &Setup) -> Relay {
    let full = || Stdio::from(OpenOptions::new().write(true).open("/dev/full").unwrap());
    // A second port that answers probes would be one too many to tell them apart.
    let child = setup.command().env("HTTP_PORT", "off").stdout(full()).stderr(full()).spawn().unwrap();
    let pid = child.id().unwrap();
    let started = Instant::now();
    loop {
        assert!(started.elapsed() < Duration::from_secs(30), "the relay does not listen");
        let ports = ports(pid);
        let mut metrics = None;
        for port in &ports {
            let page = reqwest_client().get(format!("http://127.0.0.1:{port}/healthz")).send();
            if let Ok(Ok(answer)) = timeout(PROMPT, page).await
                && answer.status() == 200
            {
                metrics = Some(*port);
            }
        }
        if let (Some(metrics), [one, other]) = (metrics, &ports[..]) {
            let addr = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
            let grpc = if *one == metrics { *other } else { *one };
            return Relay::unread(child, addr(grpc), addr(metrics));
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Ports of IPv4 that a process listens at.
fn ports(pid: u32) -> Vec<u16> {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let sockets: HashSet<String> = files
        .filter_map(|file| Some(fs::read_link(file.ok()?.path()).ok()?.to_str()?.to_owned()))
        .filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let listening = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    // Local address, state, inode; 0A is LISTEN.
    let listening = listening.filter(|row| row.len() > 9 && row[3] == "0A" && sockets.contains(row[9]));
    listening.map(|row| u16::from_str_radix(row[1].rsplit(':').next().unwrap(), 16).unwrap()).collect()
}

/// Calls are answered, probes too, everything is delivered, and SIGTERM drains.
/// Returns how many lines were lost before it.
async fn works_as_if_nothing_were(setup: &Setup, relay: Relay, calls: usize) -> f64 {
    let mut observer = Observer::default();
    let mut client = relay.client();
    for _ in 0..calls {
        let (ids, request) = batch((0..100).map(|index| track_item("Order Placed", &format!("u{index}"))));
        let answer = timeout(PROMPT, client.track_batch(request)).await.expect("a call hangs").unwrap();
        observer.batch(&ids, &answer.into_inner());
        let health = timeout(PROMPT, relay.page("/healthz")).await.expect("a probe hangs");
        assert_eq!(health, (200, "SERVING".to_owned()));
    }
    assert_eq!(observer.accepted.len(), 100 * calls);
    for vendor in Vendor::ALL {
        taken(setup, vendor, 100 * calls as u64).await;
    }
    let lost = relay.metric("relay_log_lines_lost_total", &[]).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0, "after {:?}", ended.took);
    let drain_timeout: f64 = setup.vars["DRAIN_TIMEOUT_SECONDS"].parse().unwrap();
    assert!(ended.took < Duration::from_secs_f64(drain_timeout + 2.0), "{:?}", ended.took);
    for vendor in Vendor::ALL {
        assert_eq!(observer.check(setup, vendor).spilled, 0);
    }
    lost
}

async fn setup(durability: &str) -> Setup {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", durability).set("DRAIN_TIMEOUT_SECONDS", "5").set("LOG_LEVEL", "debug");
    setup
}

#[tokio::test]
async fn without_a_reader_of_its_streams_the_relay_works_and_drains() {
    for durability in ["memory", "synced"] {
        let setup = setup(durability).await;
        let (relay, reader) = piped(&setup);
        drop(reader);
        let lost = works_as_if_nothing_were(&setup, relay, 3).await;
        assert!(lost >= 300.0, "{durability}: {lost} lines lost, and nobody could read any");
    }
}

#[tokio::test]
async fn with_its_streams_on_a_full_disk_the_relay_works_and_drains() {
    if !Path::new("/dev/full").exists() || !Path::new("/proc/self/net/tcp").exists() {
        println!("not run: /dev/full, /proc");
        return;
    }
    for durability in ["memory", "synced"] {
        let setup = setup(durability).await;
        let relay = on_a_full_disk(&setup).await;
        let lost = works_as_if_nothing_were(&setup, relay, 3).await;
        assert!(lost >= 300.0, "{durability}: {lost} lines lost, and none could be written");
    }
}

/// A stuck log driver, or Ctrl-S: the pipe is open and nobody reads.
#[tokio::test]
async fn a_reader_that_hangs_holds_up_neither_calls_nor_probes_nor_the_drain() {
    for durability in ["memory", "synced"] {
        let setup = setup(durability).await;
        let (relay, reader) = piped(&setup);
        works_as_if_nothing_were(&setup, relay, 10).await;
        drop(reader);
    }
}

/// What cannot be said does not change how a start that fails ends.
#[tokio::test]
async fn a_start_that_fails_ends_with_its_exit_code_whoever_reads() {
    let (gone, nobody_reads) = io::pipe().unwrap();
    drop(gone);
    let (_hangs, full) = io::pipe().unwrap();
    let filling = full.try_clone().unwrap();
    std::thread::spawn(move || (&filling).write_all(&[b'x'; 1 << 20]));
    for stream in [nobody_reads, full] {
        let mut setup = Setup::new().await;
        setup.set("GRPC_HOST", "not an address");
        let mut command = setup.command();
        command.stdout(stream.try_clone().unwrap()).stderr(stream);
        let mut child = command.spawn().unwrap();
        let ended = timeout(PROMPT, child.wait()).await.expect("it hangs").unwrap();
        assert_eq!(ended.code(), Some(1));
    }
}

#[tokio::test]
async fn what_a_slow_reader_has_missed_is_counted_and_told_once_lines_flow_again() {
    let setup = setup("memory").await;
    let (relay, mut reader) = piped(&setup);
    let mut client = relay.client();
    let lost = "relay_log_lines_lost_total";
    let started = Instant::now();
    while relay.metric(lost, &[]).await == 0.0 {
        assert!(started.elapsed() < Duration::from_secs(60), "no line is lost, and nobody reads");
        let items = (0..1000).map(|index| track_item("Order Placed", &format!("u{index}")));
        timeout(PROMPT, client.track_batch(batch(items).1)).await.expect("a call hangs").unwrap();
    }
    // Read on: what is told is what was counted, once all of it is told.
    let telling = tokio::task::spawn_blocking(move || {
        lines(&mut reader)
            .filter(|line| line["message"] == "log lines were lost")
            .map(|line| {
                assert_eq!(line["level"], "WARN");
                line["lines"].as_u64().unwrap()
            })
            .sum::<u64>()
    });
    // A scrape after which none is lost any more: the reader is quicker now.
    let mut counted = relay.metric(lost, &[]).await;
    loop {
        sleep(Duration::from_millis(200)).await;
        let now = relay.metric(lost, &[]).await;
        if std::mem::replace(&mut counted, now) == now {
            break;
        }
    }
    assert_eq!(relay.terminate().await.code, 0);
    assert_eq!(timeout(PROMPT, telling).await.unwrap().unwrap() as f64, counted);
}

/// Ten lines of a kind in a second, and one that stands for the others: the
/// events of all lines are the events of all batches.
#[tokio::test]
async fn a_busy_relay_sums_up_its_lines_and_the_sums_are_exact() {
    let mut setup = Setup::new().await;
    setup.set("BATCH_SIZE", "1");
    let relay = setup.start().await;
    let mut client = relay.client();
    let mut observer = Observer::default();
    let is_summed_up = |message: &str, provider: &Value| {
        let its = |line: &Value| line["message"] == message && &line["provider"] == provider;
        relay.logs().iter().any(|line| its(line) && line["lines"].is_u64())
    };
    let providers = Vendor::ALL.map(|vendor| Value::from(vendor.name()));
    for turn in 0.. {
        assert!(turn < 20, "never more than ten lines of a kind in a second");
        let burst = Instant::now();
        while burst.elapsed() < Duration::from_millis(300) {
            observer.track(&mut client, "Order Placed", "u1").await;
        }
        // Lines are summed up also when nothing comes after them.
        sleep(Duration::from_millis(1_500)).await;
        let are_flushed = providers.iter().all(|name| is_summed_up("batch flushed successfully", name));
        if are_flushed && is_summed_up("flushing batch", &Value::Null) {
            break;
        }
    }
    // And when the relay ends before their second does.
    for _ in 0..100 {
        observer.track(&mut client, "Order Placed", "u1").await;
    }
    let events = observer.accepted.len() as u64;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    let told = |message: &str, provider: &Value| {
        let its =
            ended.logs.iter().filter(|line| line["message"] == message && &line["provider"] == provider);
        let lines: Vec<&Value> = its.collect();
        let events: u64 = lines.iter().map(|line| line["event_count"].as_u64().unwrap()).sum();
        let seconds =
            lines.iter().map(|line| &line["timestamp"].as_str().unwrap()[..19]).collect::<HashSet<_>>();
        // Of a second by the clock, two seconds of the relay may be a part.
        assert!(lines.len() <= seconds.len() * 22, "{} lines in {seconds:?}", lines.len());
        events
    };
    assert_eq!(told("flushing batch", &Value::Null), events);
    for vendor in Vendor::ALL {
        assert_eq!(ended.balance(vendor).delivered, events);
        assert_eq!(told("batch flushed successfully", &vendor.name().into()), events, "{vendor:?}");
    }
    observer.check_balance(&setup, &ended);
}
