//! A relay whose provider's code has defects that no vendor's has: it blocks every
//! thread of the runtime, so that no call, no probe and no timer works any more, or
//! it makes a stage die. The relay ends all the same, in time, and with the truth.
//!
//! Without the usual harness: this program is the relay too, since only a program
//! of its own can have such a provider.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[allow(dead_code, reason = "shared with the other tests of the whole relay")]
#[path = "../relay/harness.rs"]
mod harness;

use std::{
    env, fs,
    io::{self, BufRead, BufReader, PipeReader, Read, Write},
    path::{Path, PathBuf},
    process,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use analytics_relay::{
    app::App,
    config::Config,
    providers::{BatchLimits, Event, Provider, SendError, Verdict},
    shutdown, telemetry,
};
use async_trait::async_trait;
use serde_json::Value;
use tokio::{
    process::Command,
    runtime::Runtime,
    time::{sleep, timeout},
};

use harness::{Observer, Relay, Setup};

/// Set, this program is a relay whose provider does what this file says, and
/// waits as long as there is none.
const PROVIDER_DOES: &str = "PROVIDER_DOES";
const BLOCK: &str = "block";
const DIE: &str = "die";
const DELIVER: &str = "deliver";
/// More than the relay has threads.
const EVENTS: usize = 32;
const PATIENCE: Duration = Duration::from_secs(30);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// The watchdog's time and, over that, the machine's.
const END_MAX: Duration = Duration::from_millis(1_000 + 2_000 + 500);

fn main() {
    if env::var_os(PROVIDER_DOES).is_some() {
        relay();
    }
    let wanted = env::args().nth(1).filter(|arg| !arg.starts_with('-')).unwrap_or_default();
    let runtime = Runtime::new().unwrap();
    let mut passed = 0;
    let mut test = |name: &str, test: &mut dyn FnMut()| {
        if name.contains(&wanted) {
            // A panic ends the program, and says by its exit code that it failed.
            test();
            println!("test {name} ... ok");
            passed += 1;
        }
    };
    test("in_memory_mode_a_blocked_drain_ends_in_time_and_says_what_is_lost", &mut || {
        runtime.block_on(a_blocked_drain_ends_in_time("memory", 2, Streams::Read));
    });
    test("with_a_log_nothing_is_lost_and_the_next_start_delivers", &mut || {
        runtime.block_on(a_blocked_drain_ends_in_time("synced", 0, Streams::Read));
    });
    test("a_blocked_drain_ends_in_time_although_nobody_reads_its_streams", &mut || {
        runtime.block_on(a_blocked_drain_ends_in_time("memory", 2, Streams::Stuck));
    });
    test("a_stage_that_dies_ends_the_relay_which_says_what_that_has_cost", &mut || {
        runtime.block_on(a_stage_that_dies_ends_the_relay("memory", 2));
        runtime.block_on(a_stage_that_dies_ends_the_relay("synced", 1));
    });
    println!("\ntest result: ok. {passed} passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
}

#[derive(PartialEq, Eq)]
enum Streams {
    Read,
    /// Both are one pipe, which is full.
    Stuck,
}

/// A relay that holds events in its lane, and where its provider is told what to
/// do.
async fn holding(durability: &str) -> (Setup, PathBuf, Relay, Pipe) {
    let mut setup = Setup::new().await;
    let provider_does = setup.data.path().join("provider-does");
    let timeout_seconds = DRAIN_TIMEOUT.as_secs().to_string();
    setup.set("ANALYTICS_PROVIDER", "none").set("BATCH_SIZE", "1").set("DURABILITY", durability);
    setup.set("DRAIN_TIMEOUT_SECONDS", &timeout_seconds).set("TOKIO_WORKER_THREADS", "2");
    setup.set(PROVIDER_DOES, provider_does.to_str().unwrap());
    let (relay, pipe) = start(&setup);
    Observer::default().tracks(&mut relay.client(), EVENTS).await;
    until(&relay, "relay_lane_events", &[], EVENTS as u64).await;
    (setup, provider_does, relay, pipe)
}

async fn a_blocked_drain_ends_in_time(durability: &str, code: i32, streams: Streams) {
    let (setup, provider_does, relay, mut pipe) = holding(durability).await;
    fs::write(&provider_does, BLOCK).unwrap();
    // Until no thread is left that could answer.
    let blocking = Instant::now();
    while timeout(Duration::from_millis(500), relay.page("/healthz")).await.is_ok() {
        assert!(blocking.elapsed() < PATIENCE, "its threads are not blocked");
    }

    if streams == Streams::Stuck {
        fill(pipe.writer.take().unwrap());
    }
    let asked = Instant::now();
    relay.signal("TERM");
    let ended = relay.ended(asked).await;
    assert_eq!(ended.code, code, "{durability}");
    assert!(ended.took >= DRAIN_TIMEOUT, "it used the time that it has: {:?}", ended.took);
    assert!(ended.took <= END_MAX, "{durability}: {:?}", ended.took);
    if streams == Streams::Stuck {
        return;
    }
    let (lines, words) = pipe.rest();
    let spilled = if code == 0 { EVENTS as u64 } else { 0 };
    assert_eq!(balance(&lines), (EVENTS as u64, spilled, EVENTS as u64 - spilled));
    assert!(words[0].contains("the drain hangs"), "{words:?}");
    assert!(words[1].contains(&format!("accepted {EVENTS}")), "{words:?}");
    deliver(&setup, &provider_does, spilled).await;
}

async fn a_stage_that_dies_ends_the_relay(durability: &str, code: i32) {
    let (setup, provider_does, relay, mut pipe) = holding(durability).await;
    fs::write(&provider_does, DIE).unwrap();
    // The lane looks up when something comes.
    let _ = relay.client().track_event(harness::track("Order Placed", "u1")).await;
    let ended = relay.ended(Instant::now()).await;
    assert_eq!(ended.code, code, "{durability}");
    assert!(ended.took <= END_MAX, "{durability}: {:?}", ended.took);
    let (lines, _) = pipe.rest();
    let has = |message: &str| lines.iter().find(|line| line["message"] == message);
    assert_eq!(has("a defect: a stage ended by itself, stopping").unwrap()["stage"], "defective");
    assert_eq!(has("a defect: code panicked").unwrap()["message_of_panic"], "told to die");
    let (accepted, spilled, in_flight) = balance(&lines);
    // The lane may have looked up by itself.
    assert!((EVENTS as u64..=EVENTS as u64 + 1).contains(&accepted), "{accepted}");
    assert_eq!((spilled, in_flight), if code == 1 { (accepted, 0) } else { (0, accepted) });
    deliver(&setup, &provider_does, spilled).await;
}

/// What an earlier run left in the log is delivered by a relay whose provider
/// works.
async fn deliver(setup: &Setup, provider_does: &Path, events: u64) {
    fs::write(provider_does, DELIVER).unwrap();
    let (relay, _pipe) = start(setup);
    until(&relay, "relay_events_total", &["\"delivered\""], events).await;
    assert_eq!(relay.terminate().await.code, 0);
}

/// Accepted, spilled, in flight, as a relay says at its end.
fn balance(lines: &[Value]) -> (u64, u64, u64) {
    let balance = lines.iter().rfind(|line| line["message"] == "balance").expect("the balance is told");
    let number = |field: &str| balance[field].as_u64().unwrap();
    (number("accepted"), number("spilled"), number("in_flight"))
}

/// Waits until a metric has come so far.
async fn until(relay: &Relay, metric: &str, labels: &[&str], value: u64) {
    let waiting = Instant::now();
    while relay.metric(metric, labels).await < value as f64 {
        assert!(waiting.elapsed() < PATIENCE, "waited in vain for {value} of {metric}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// The two streams of a relay as one pipe, read until it listened.
struct Pipe {
    lines: BufReader<PipeReader>,
    writer: Option<io::PipeWriter>,
}

impl Pipe {
    /// What was left to read: log lines, and what was said on standard error.
    fn rest(&mut self) -> (Vec<Value>, Vec<String>) {
        // Or it never ends.
        self.writer = None;
        let mut text = String::new();
        self.lines.read_to_string(&mut text).unwrap();
        let (lines, words): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.starts_with('{'));
        let lines = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        (lines, words.into_iter().map(str::to_owned).collect())
    }
}

fn start(setup: &Setup) -> (Relay, Pipe) {
    let (reader, writer) = io::pipe().unwrap();
    let mut command = Command::new(env::current_exe().unwrap());
    command.env_clear().envs(&setup.vars).current_dir(setup.data.path()).kill_on_drop(true);
    command.stdout(writer.try_clone().unwrap()).stderr(writer.try_clone().unwrap());
    let child = command.spawn().unwrap();
    drop(command);
    let mut lines = BufReader::new(reader);
    let started = (&mut lines)
        .lines()
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap())
        .find(|line| line["message"] == "relay started")
        .expect("it starts");
    let addr = |field: &str| started[field].as_str().unwrap().parse().unwrap();
    (Relay::unread(child, addr("grpc_addr"), addr("metrics_addr")), Pipe { lines, writer: Some(writer) })
}

/// Leaves no room in a pipe that nobody reads.
fn fill(mut writer: io::PipeWriter) {
    thread::spawn(move || {
        let _ = writer.write_all(&[b'x'; 1 << 20]);
    });
}

/// The relay.
fn relay() -> ! {
    let config = Config::from_env().unwrap();
    let logs = telemetry::init_logs(&config.logs.level, config.logs.format);
    let code = Runtime::new().unwrap().block_on(async {
        let signals = shutdown::signals().unwrap();
        let app = App::start_with(&config, vec![Arc::new(Defective)]).await.unwrap();
        app.run_until(signals).await.exit_code()
    });
    drop(logs);
    process::exit(code.into());
}

struct Defective;

impl Defective {
    fn told(&self) -> Option<String> {
        fs::read_to_string(env::var_os(PROVIDER_DOES).unwrap()).ok()
    }
}

#[async_trait]
impl Provider for Defective {
    fn name(&self) -> &'static str {
        if self.told().as_deref() == Some(DIE) {
            panic!("told to die");
        }
        "defective"
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits { events_max: 1, body_bytes_max: 1_000_000, requests_max: 2 * EVENTS }
    }

    async fn send(&self, events: &[Event]) -> Result<Vec<Verdict>, SendError> {
        loop {
            match self.told().as_deref() {
                Some(BLOCK) => thread::sleep(Duration::MAX),
                Some(DELIVER) => return Ok(vec![Verdict::Delivered; events.len()]),
                _ => sleep(Duration::from_millis(5)).await,
            }
        }
    }
}
