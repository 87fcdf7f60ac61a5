//! What the benchmarks of the whole relay share: a relay as a process, and
//! callers.

#![allow(dead_code, reason = "not every benchmark needs all of it")]

use std::{
    ffi::OsStr,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    process::Stdio,
    sync::LazyLock,
    time::{Duration, Instant},
};

use analytics_relay::proto::v1::{
    PropertyValue, TrackBatchAnswer, TrackBatchItem, TrackBatchRequest, TrackEventRequest,
    analytics_service_client::AnalyticsServiceClient, property_value::Value as Kind,
    track_batch_answer::Answer, track_batch_item::Item,
};
use hdrhistogram::Histogram;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    task::{JoinHandle, JoinSet},
    time::sleep_until,
};
use tonic::transport::Channel;

/// Settings of a queue that takes whatever comes.
pub(crate) const LARGE_QUEUE: [(&str, &str); 2] =
    [("QUEUE_MAX_EVENTS", "200000"), ("QUEUE_MAX_BYTES", "1073741824")];

/// A relay that runs.
pub(crate) struct Relay {
    child: Child,
    pub(crate) grpc_addr: String,
    pub(crate) http_addr: String,
    pub(crate) metrics_addr: String,
    /// From the start of the process.
    pub(crate) ready_after: Duration,
    balances: JoinHandle<anyhow::Result<Value>>,
}

impl Relay {
    /// The relay's binary.
    pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_analytics-relay");

    /// Starts a relay whose providers are at that address, and waits until it
    /// listens.
    pub(crate) async fn start(
        providers_url: &str,
        data_dir: &Path,
        settings: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        Self::start_by(Command::new(Self::PROGRAM), providers_url, data_dir, settings).await
    }

    /// The same on the servers' core.
    pub(crate) async fn start_pinned(
        providers_url: &str,
        data_dir: &Path,
        settings: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        let command = on_servers_core(Self::PROGRAM.as_ref());
        Self::start_by(command, providers_url, data_dir, settings).await
    }

    /// The same with room for so many events that the core is the limit.
    pub(crate) async fn start_roomy(
        providers_url: &str,
        data_dir: &Path,
        providers: &str,
        settings: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        let settings = [&[("ANALYTICS_PROVIDER", providers)][..], &LARGE_QUEUE, settings].concat();
        Self::start_pinned(providers_url, data_dir, &settings).await
    }

    /// The same by a command that runs [`Relay::PROGRAM`].
    pub(crate) async fn start_by(
        mut command: Command,
        providers_url: &str,
        data_dir: &Path,
        settings: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        configure(&mut command, providers_url, data_dir);
        command.envs(settings.iter().copied());
        let spawned = Instant::now();
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
        let mut logs = BufReader::new(child.stdout.take().expect("it was asked for")).lines();
        let started = line(&mut logs, "relay started").await?;
        let ready_after = spawned.elapsed();
        let addr = |field: &str| started[field].as_str().unwrap_or_default().to_owned();
        // Read on, or the relay would wait for room in the pipe.
        let balances = tokio::spawn(async move {
            let balance = line(&mut logs, "balance").await;
            while let Ok(Some(_)) = logs.next_line().await {}
            balance
        });
        Ok(Self {
            child,
            grpc_addr: addr("grpc_addr"),
            http_addr: addr("http_addr"),
            metrics_addr: addr("metrics_addr"),
            ready_after,
            balances,
        })
    }

    /// From the start of a process to the first event that is answered OK.
    pub(crate) async fn time_to_first_ok(providers_url: &str, data_dir: &Path) -> anyhow::Result<Duration> {
        let free = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = on_servers_core(Self::PROGRAM.as_ref());
        configure(&mut command, providers_url, data_dir);
        command.env("ANALYTICS_PROVIDER", "segment").env("GRPC_PORT", free.port().to_string());
        let mut child = command.stdout(Stdio::null()).kill_on_drop(true).spawn()?;
        let spawned = Instant::now();
        let channel = loop {
            anyhow::ensure!(spawned.elapsed() < Duration::from_secs(10), "the relay does not listen");
            match Channel::from_shared(format!("http://{free}"))?.connect().await {
                Ok(channel) => break channel,
                Err(_) => tokio::time::sleep(Duration::from_micros(200)).await,
            }
        };
        AnalyticsServiceClient::new(channel).track_event(reference_event(1)).await?;
        let elapsed = spawned.elapsed();
        send_signal(child.id().unwrap_or_default(), "TERM")?;
        child.wait().await?;
        Ok(elapsed)
    }

    /// Sends SIGTERM and waits: the first provider's balance.
    pub(crate) async fn terminate(mut self) -> anyhow::Result<Value> {
        self.signal("TERM")?;
        let balance = self.balances.await??;
        anyhow::ensure!(self.child.wait().await?.success(), "the relay lost events: {balance}");
        Ok(balance)
    }

    /// Sends SIGKILL.
    pub(crate) async fn kill(mut self) -> anyhow::Result<()> {
        self.signal("KILL")?;
        self.child.wait().await?;
        Ok(())
    }

    fn signal(&self, name: &str) -> anyhow::Result<()> {
        send_signal(self.pid(), name)
    }

    /// Where plaintext callers find it.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.grpc_addr)
    }

    /// Where those find it that speak HTTP.
    pub(crate) fn http_url(&self) -> String {
        format!("http://{}", self.http_addr)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    /// CPU that it has used.
    pub(crate) fn cpu_time(&self) -> anyhow::Result<Duration> {
        cpu_time(self.pid())
    }

    /// How often one of its threads has gone to sleep.
    pub(crate) fn wakeups(&self) -> anyhow::Result<u64> {
        let mut wakeups = 0;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let status = std::fs::read_to_string(thread?.path().join("status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            wakeups += line.unwrap_or_default().trim().parse::<u64>()?;
        }
        Ok(wakeups)
    }

    /// A line of `/proc/<pid>/status`, in MB.
    pub(crate) fn memory_mb(&self, field: &str) -> anyhow::Result<f64> {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.child.id().unwrap_or_default()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
        let kb: f64 = line.trim_matches([':', ' ', '\t', 'k', 'B']).trim().parse()?;
        Ok(kb / 1024.0)
    }

    /// Sends events from many callers; see [`Load`].
    pub(crate) async fn load(&self, load: Load) -> anyhow::Result<Done> {
        let started = Instant::now();
        let mut callers = JoinSet::new();
        for connection in 0..load.connections {
            let channel = Channel::from_shared(format!("http://{}", self.grpc_addr))?.connect().await?;
            for slot in 0..load.in_flight {
                let worker = connection * load.in_flight + slot;
                callers.spawn(call(channel.clone(), worker, load, started));
            }
        }
        let mut latencies = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3)?;
        while let Some(caller) = callers.join_next().await {
            latencies.add(caller??)?;
        }
        Ok(Done { latencies, elapsed: started.elapsed() })
    }
}

fn configure(command: &mut Command, providers_url: &str, data_dir: &Path) {
    command.env("DATA_DIR", data_dir).env("LOG_FORMAT", "json");
    command.env("GRPC_HOST", "127.0.0.1").env("GRPC_PORT", "0");
    command.env("HTTP_HOST", "127.0.0.1").env("HTTP_PORT", "0");
    command.env("METRICS_HOST", "127.0.0.1").env("METRICS_PORT", "0");
    command.env("DRAIN_TIMEOUT_SECONDS", "60").env("TEST_MODE", "false");
    for (vendor, key) in [("MIXPANEL", "API_KEY"), ("AMPLITUDE", "API_KEY"), ("SEGMENT", "WRITE_KEY")] {
        command
            .env(format!("{vendor}_BASE_URL"), providers_url)
            .env(format!("{vendor}_{key}"), "sandbox-key");
    }
}

pub(crate) fn send_signal(pid: u32, name: &str) -> anyhow::Result<()> {
    std::process::Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status()?;
    Ok(())
}

/// Times of writing and syncing groups of records for so long, in a file whose room is
/// reserved: what the disk allows. In microseconds.
pub(crate) fn group_commits(
    dir: &Path,
    group: usize,
    record_bytes: usize,
    time: Duration,
) -> anyhow::Result<Done> {
    let file = File::create(dir.join("disk"))?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 256 << 20)?;
    let bytes = vec![b'x'; group * record_bytes];
    let mut latencies = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3)?;
    let (start, mut at) = (Instant::now(), 0);
    while start.elapsed() < time {
        let began = Instant::now();
        file.write_all_at(&bytes, at)?;
        file.sync_data()?;
        at = (at + bytes.len() as u64) % (200 << 20);
        latencies.saturating_record(u64::try_from(began.elapsed().as_micros())?);
    }
    Ok(Done { latencies, elapsed: start.elapsed() })
}

/// CPU that a process has used, as the scheduler counts it.
pub(crate) fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let mut nanos = 0;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile.
        let counts = std::fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_else(|_| "0".into());
        nanos += counts.split(' ').next().unwrap_or_default().parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanos))
}

/// A command for a server, on the first core if there are two and a `taskset`.
pub(crate) fn on_servers_core(program: &OsStr) -> Command {
    if !has_two_cores() {
        return Command::new(program);
    }
    let mut command = Command::new("taskset");
    command.args(["-c", "0"]).arg(program);
    command
}

/// Moves this process, with callers and providers, to the second core.
pub(crate) fn move_to_clients_core() {
    if has_two_cores() {
        let me = std::process::id().to_string();
        let _ = std::process::Command::new("taskset").args(["-a", "-p", "-c", "1", &me]).output();
    }
}

fn has_two_cores() -> bool {
    static HAS_TWO: LazyLock<bool> = LazyLock::new(|| {
        let taskset = std::process::Command::new("taskset").args(["-c", "1", "true"]).status();
        taskset.is_ok_and(|status| status.success())
    });
    *HAS_TWO
}

/// The machine, in a line.
pub(crate) fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model =
        cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|it| it.1);
    let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = read("/proc/sys/kernel/osrelease");
    let cores = if has_two_cores() { "servers on core 0, callers on core 1" } else { "nothing pinned" };
    let load = read("/proc/loadavg");
    format!(
        "{count} x {}, Linux {}, load {} at the start; {cores}",
        model.unwrap_or("unknown CPU"),
        kernel.trim(),
        load.split(' ').next().unwrap_or_default()
    )
}

/// Sends events in batches, one after the other, until all are accepted.
pub(crate) async fn send_batches(
    addr: &str,
    numbers: Range<u64>,
    batch: impl Fn(u64, u64) -> TrackBatchRequest,
) -> anyhow::Result<()> {
    const BATCH: u64 = 50;
    let mut client = AnalyticsServiceClient::connect(format!("http://{addr}")).await?;
    for first in numbers.clone().step_by(BATCH as usize) {
        let batch = batch(first, BATCH.min(numbers.end - first));
        loop {
            let response = client.track_batch(batch.clone()).await?.into_inner();
            let accepted = |answer: &TrackBatchAnswer| matches!(answer.answer, Some(Answer::Accepted(_)));
            if response.answers.iter().all(accepted) {
                break;
            }
            // Ids make a second sending of what was accepted harmless, but the
            // count would be wrong.
            let none = !response.answers.iter().any(accepted) && response.retry_delay_ms > 0;
            anyhow::ensure!(none, "a batch was taken in part: {response:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    Ok(())
}

/// What callers do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) connections: u64,
    /// Calls under way on each connection.
    pub(crate) in_flight: u64,
    /// Events a second in all, each due at its time whatever the others do; as
    /// many as it goes if not given.
    pub(crate) rate: Option<u64>,
    pub(crate) seconds: f64,
    /// Bytes of a property that fills the events up.
    pub(crate) padding: usize,
}

/// What came of it.
pub(crate) struct Done {
    pub(crate) latencies: Histogram<u64>,
    pub(crate) elapsed: Duration,
}

impl Done {
    pub(crate) fn events(&self) -> u64 {
        self.latencies.len()
    }

    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    pub(crate) fn rate(&self) -> f64 {
        self.events() as f64 / self.elapsed.as_secs_f64()
    }

    /// Milliseconds that this share of calls took at most.
    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    pub(crate) fn millis(&self, share: f64) -> f64 {
        self.latencies.value_at_quantile(share) as f64 / 1000.0
    }
}

async fn line(logs: &mut Lines<BufReader<ChildStdout>>, message: &str) -> anyhow::Result<Value> {
    while let Some(line) = logs.next_line().await? {
        let line: Value = serde_json::from_str(&line)?;
        if line["message"] == message {
            return Ok(line);
        }
    }
    anyhow::bail!("the relay ended before it said {message:?}")
}

async fn call(channel: Channel, worker: u64, load: Load, started: Instant) -> anyhow::Result<Histogram<u64>> {
    let mut client = AnalyticsServiceClient::new(channel);
    let mut latencies = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3)?;
    let end = started + Duration::from_secs_f64(load.seconds);
    for turn in 0_u64.. {
        let number = turn * load.connections * load.in_flight + worker;
        #[expect(clippy::cast_precision_loss, reason = "a time offset")]
        let due = load
            .rate
            .map_or_else(Instant::now, |rate| started + Duration::from_secs_f64(number as f64 / rate as f64));
        if due >= end {
            break;
        }
        sleep_until(due.into()).await;
        client.track_event(event(number, load.padding)).await?;
        latencies.saturating_record(u64::try_from(due.elapsed().as_micros())?);
    }
    Ok(latencies)
}

fn event(number: u64, padding: usize) -> TrackEventRequest {
    let property = |kind| PropertyValue { value: Some(kind) };
    let mut properties: std::collections::HashMap<String, PropertyValue> = [
        ("sku", property(Kind::StringValue(format!("SKU-{}", number % 100)))),
        ("total", property(Kind::NumberValue(19.5))),
        ("quantity", property(Kind::IntegerValue(3))),
        ("gift", property(Kind::BoolValue(false))),
        ("currency", property(Kind::StringValue("EUR".to_owned()))),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    if padding > 0 {
        properties.insert("note".to_owned(), property(Kind::StringValue("x".repeat(padding))));
    }
    TrackEventRequest {
        event_name: "Order Placed".to_owned(),
        user_id: format!("user-{}", number % 1000),
        properties,
        ..TrackEventRequest::default()
    }
}

/// The event of the figures that are compared over time: 12 bytes of name, 15 of
/// user, an id, a time and seven properties; some 240 bytes as protobuf.
pub(crate) fn reference_event(number: u64) -> TrackEventRequest {
    let text = |text: String| PropertyValue { value: Some(Kind::StringValue(text)) };
    TrackEventRequest {
        event_name: "Order Placed".to_owned(),
        user_id: format!("user-{number:010}"),
        event_id: format!("01890a5d-ac96-774b-bcce-{number:012}"),
        timestamp_ms: 1_767_225_600_000,
        properties: [
            ("sku", text(format!("SKU-{:04}", number % 1000))),
            ("currency", text("EUR".to_owned())),
            ("coupon", text("SPRING-SALE".to_owned())),
            ("total", PropertyValue { value: Some(Kind::NumberValue(19.5)) }),
            ("quantity", PropertyValue { value: Some(Kind::IntegerValue(3)) }),
            ("gift", PropertyValue { value: Some(Kind::BoolValue(false)) }),
            ("page", PropertyValue { value: Some(Kind::NumberValue(7.0)) }),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into(),
        ..TrackEventRequest::default()
    }
}

/// A batch of such events.
pub(crate) fn reference_batch(first: u64, count: u64) -> TrackBatchRequest {
    let item = |number| TrackBatchItem { item: Some(Item::Track(reference_event(number))) };
    TrackBatchRequest { items: (first..first + count).map(item).collect() }
}
