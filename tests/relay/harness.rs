//! Starts relays, sends events, and checks the account afterwards.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    env,
    ffi::{OsStr, OsString},
    fs::{self, OpenOptions},
    io::{self, Write},
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::{
        IdentifyUserRequest, PropertyValue, TrackBatchItem, TrackBatchRequest, TrackBatchResponse,
        TrackEventRequest, analytics_service_client::AnalyticsServiceClient, property_value::Value as Kind,
        track_batch_answer::Answer, track_batch_item::Item,
    },
    providers::sandbox::{Options, Sandbox, Vendor},
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::watch,
    time::{sleep, timeout},
};
use tonic::{Code, transport::Channel};

pub(crate) type Client = AnalyticsServiceClient<Channel>;

pub(crate) const KEY: &str = "sandbox-key";
const COVERAGE: &str = "LLVM_PROFILE_FILE";
const PATIENCE: Duration = Duration::from_secs(30);

/// Says what a test needs and the machine lacks, which is not the same as passing:
/// at once, past the runner, which keeps to itself what a passing test prints, and
/// in the list that `make test` shows at its end. With `RELAY_REQUIRE=all` the test
/// fails.
pub(crate) fn not_run(what: &str) {
    let test = thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("not run: {what} ({test})\n");
    // The macros' output would be kept.
    io::stderr().write_all(line.as_bytes()).unwrap();
    if let Some(list) = env::var_os("RELAY_NOT_RUN_LIST") {
        let mut list = OpenOptions::new().create(true).append(true).open(list).unwrap();
        list.write_all(line.as_bytes()).unwrap();
    }
    assert!(!env::var("RELAY_REQUIRE").is_ok_and(|required| required == "all"), "{line}");
}

/// A relay's settings, and the directory that outlives its runs.
pub(crate) struct Setup {
    pub(crate) sandbox: Sandbox,
    pub(crate) data: TempDir,
    pub(crate) vars: BTreeMap<String, String>,
}

impl Setup {
    /// Three providers, all in one sandbox; quick retries.
    pub(crate) async fn new() -> Self {
        let sandbox = Sandbox::start(Options::default()).await.unwrap();
        let url = sandbox.url();
        let data = tempfile::tempdir().unwrap();
        let mut setup = Self { sandbox, data, vars: BTreeMap::new() };
        for (name, value) in [
            ("GRPC_HOST", "127.0.0.1"),
            ("GRPC_PORT", "0"),
            ("HTTP_HOST", "127.0.0.1"),
            ("HTTP_PORT", "0"),
            ("METRICS_HOST", "127.0.0.1"),
            ("METRICS_PORT", "0"),
            ("LOG_FORMAT", "json"),
            ("MIXPANEL_API_KEY", KEY),
            ("AMPLITUDE_API_KEY", KEY),
            ("SEGMENT_WRITE_KEY", KEY),
            ("MIXPANEL_BASE_URL", &url),
            ("AMPLITUDE_BASE_URL", &url),
            ("SEGMENT_BASE_URL", &url),
            ("FLUSH_INTERVAL_SECONDS", "0.05"),
            ("INITIAL_RETRY_DELAY_MS", "20"),
            ("MAX_RETRY_DELAY_MS", "100"),
            ("REQUEST_TIMEOUT_SECONDS", "1"),
        ] {
            setup.set(name, value);
        }
        let data_dir = setup.data.path().join("data");
        setup.set("DATA_DIR", data_dir.to_str().unwrap());
        setup
    }

    pub(crate) fn set(&mut self, name: &str, value: &str) -> &mut Self {
        self.vars.insert(name.to_owned(), value.to_owned());
        self
    }

    pub(crate) fn data_dir(&self) -> &Path {
        Path::new(&self.vars["DATA_DIR"])
    }

    /// The relay under test: `RELAY_BIN`, or the one that was built with this.
    pub(crate) fn binary() -> OsString {
        env::var_os("RELAY_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_analytics-relay").into())
    }

    /// The command, with these settings and nothing else in its environment.
    pub(crate) fn command(&self) -> Command {
        self.command_of(Self::binary())
    }

    /// The same for another program, which is to run the relay.
    pub(crate) fn command_of(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env_clear().envs(&self.vars).current_dir(self.data.path()).kill_on_drop(true);
        // Where `make coverage` wants to hear which lines were run.
        command.envs(env::var_os(COVERAGE).map(|file| (COVERAGE, file)));
        command
    }

    /// Starts the relay and waits until it listens.
    pub(crate) async fn start(&self) -> Relay {
        Relay::spawn(self.command()).await
    }

    /// Runs a sub-command to its end: exit code, standard output, standard error.
    pub(crate) async fn run(&self, args: &[&str]) -> (i32, String, String) {
        let output = timeout(PATIENCE, self.command().args(args).output()).await.unwrap().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }
}

/// A relay that runs as a process.
pub(crate) struct Relay {
    child: Child,
    logs: Arc<Mutex<Vec<String>>>,
    lines: watch::Receiver<usize>,
    pub(crate) grpc_addr: SocketAddr,
    /// If it listens there.
    pub(crate) http_addr: Option<SocketAddr>,
    pub(crate) metrics_addr: SocketAddr,
}

/// A relay that is killed cannot say which lines it has run.
impl Drop for Relay {
    fn drop(&mut self) {
        let still_runs = |child: &mut Child| matches!(child.try_wait(), Ok(None));
        if env::var_os(COVERAGE).is_none() || !still_runs(&mut self.child) {
            return;
        }
        let pid = self.pid();
        // The second signal ends the drain.
        let terminate = format!("kill {pid}; sleep 0.3; kill {pid}");
        let _ = std::process::Command::new("sh").args(["-c", &terminate]).stderr(Stdio::null()).status();
        let start = Instant::now();
        while still_runs(&mut self.child) && start.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// How a relay ended.
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) logs: Vec<Value>,
    /// Signal to exit.
    pub(crate) took: Duration,
}

impl Relay {
    /// Starts a command that runs the relay and waits until it listens.
    pub(crate) async fn spawn(command: Command) -> Self {
        let mut relay = Self::launch(command);
        let started = relay.log("relay started").await;
        let addr = |field: &str| started[field].as_str().unwrap().parse().unwrap();
        relay.grpc_addr = addr("grpc_addr");
        relay.http_addr = started["http_addr"].as_str().and_then(|addr| addr.parse().ok());
        relay.metrics_addr = addr("metrics_addr");
        relay
    }

    /// Starts a command that runs the relay and waits for nothing.
    pub(crate) fn launch(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let logs = Arc::new(Mutex::new(Vec::new()));
        let (counter, lines) = watch::channel(0);
        let sink = logs.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = stdout.next_line().await {
                sink.lock().unwrap().push(line);
                counter.send_modify(|lines| *lines += 1);
            }
        });
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        Self { child, logs, lines, grpc_addr: nowhere, http_addr: None, metrics_addr: nowhere }
    }

    /// A relay that runs already, and whose log lines the test sees to.
    pub(crate) fn unread(child: Child, grpc_addr: SocketAddr, metrics_addr: SocketAddr) -> Self {
        let (_, lines) = watch::channel(0);
        Self { child, logs: Arc::default(), lines, grpc_addr, http_addr: None, metrics_addr }
    }

    /// Waits for a log line with this message.
    pub(crate) async fn log(&self, message: &str) -> Value {
        self.log_where(message, |_| true).await
    }

    /// Waits for a log line with this message that `is_it`.
    pub(crate) async fn log_where(&self, message: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let found = self.log_or_end(message, is_it).await;
        found.unwrap_or_else(|| panic!("ended without {message:?}: {:#?}", self.raw_logs()))
    }

    /// The same; None if the process ends without it.
    pub(crate) async fn log_or_end(&self, message: &str, is_it: impl Fn(&Value) -> bool) -> Option<Value> {
        let mut lines = self.lines.clone();
        let find = || self.logs().into_iter().find(|line| line["message"] == message && is_it(line));
        let waiting = async {
            loop {
                if let Some(found) = find() {
                    return Some(found);
                }
                if lines.changed().await.is_err() {
                    // The process has ended; one more look.
                    return find();
                }
            }
        };
        let found = timeout(PATIENCE, waiting).await;
        found.unwrap_or_else(|_| panic!("no log {message:?} in {:#?}", self.raw_logs()))
    }

    pub(crate) fn raw_logs(&self) -> Vec<String> {
        self.logs.lock().unwrap().clone()
    }

    pub(crate) fn logs(&self) -> Vec<Value> {
        self.raw_logs()
            .iter()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not one JSON line: {line}")))
            .collect()
    }

    pub(crate) fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.grpc_addr)).unwrap().connect_lazy()
    }

    pub(crate) fn client(&self) -> Client {
        AnalyticsServiceClient::new(self.channel())
    }

    /// Body and status of a page on the metrics port.
    pub(crate) async fn page(&self, path: &str) -> (u16, String) {
        let answer =
            reqwest_client().get(format!("http://{}{path}", self.metrics_addr)).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// What a question over HTTP is answered, asked from this machine.
    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        let port = self.http_addr.unwrap().port();
        let answer = reqwest_client().get(format!("http://127.0.0.1:{port}{path}")).send().await.unwrap();
        (answer.status().as_u16(), serde_json::from_str(&answer.text().await.unwrap()).unwrap())
    }

    /// The value of a metric with all these labels, summed over the others; 0
    /// if it is not there.
    pub(crate) async fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let (_, page) = self.page("/metrics").await;
        let has_labels = |line: &&str| {
            let series = line.rsplit_once(' ').map_or("", |(series, _)| series);
            series.split('{').next() == Some(name) && labels.iter().all(|label| series.contains(label))
        };
        let value = |line: &str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
        page.lines().filter(has_labels).map(value).sum()
    }

    /// Waits until a metric has this value: gauges of the log are some milliseconds old.
    pub(crate) async fn metric_is(&self, name: &str, labels: &[&str], value: f64) {
        self.metric_until(name, labels, PATIENCE, |now| now == value).await;
    }

    /// Waits until so many events have become a provider's dead letters.
    pub(crate) async fn dead_lettered(&self, vendor: Vendor, events: u64) {
        let labels = [vendor.name(), "\"dead_lettered\""];
        self.metric_until("relay_events_total", &labels, PATIENCE, |ended| ended >= events as f64).await;
    }

    /// Waits until so many events have been refused for a reason.
    pub(crate) async fn refused(&self, reason: &str, events: u64) {
        let is_so = |refused| refused >= events as f64;
        self.metric_until("relay_refusals_total", &[reason], PATIENCE, is_so).await;
    }

    /// Waits until so many events of a provider have ended, however they did: an event
    /// that is still judged when the relay stops is spilled.
    pub(crate) async fn settled(&self, vendor: Vendor, events: u64) {
        let labels = [vendor.name()];
        self.metric_until("relay_events_total", &labels, 2 * PATIENCE, |ended| ended >= events as f64).await;
    }

    async fn metric_until(
        &self,
        name: &str,
        labels: &[&str],
        patience: Duration,
        is_so: impl Fn(f64) -> bool,
    ) {
        let start = Instant::now();
        loop {
            let now = self.metric(name, labels).await;
            if is_so(now) {
                return;
            }
            assert!(
                start.elapsed() < patience,
                "waited in vain: {name} {labels:?} is {now}\n{}\n{}",
                self.page("/metrics").await.1,
                self.raw_logs().join("\n")
            );
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().expect("still running")
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = std::process::Command::new("sh")
            .args(["-c", &format!("kill -{name} {}", self.pid())])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    pub(crate) async fn terminate(self) -> Ended {
        let started = Instant::now();
        self.signal("TERM");
        self.ended(started).await
    }

    /// Waits for the end, which a signal at `since` asked for.
    pub(crate) async fn ended(mut self, since: Instant) -> Ended {
        let status = timeout(PATIENCE, self.child.wait()).await.expect("the relay does not end").unwrap();
        let took = since.elapsed();
        let mut lines = self.lines.clone();
        // Until the pipe is empty.
        while timeout(PATIENCE, lines.changed()).await.unwrap().is_ok() {}
        Ended { code: status.code().unwrap_or(-1), logs: self.logs(), took }
    }
}

impl Ended {
    /// A provider's balance as the relay printed it.
    pub(crate) fn balance(&self, vendor: Vendor) -> Balance {
        self.balance_of(vendor.name())
    }

    /// The same of a provider that is no vendor.
    pub(crate) fn balance_of(&self, provider: &str) -> Balance {
        let line = self
            .logs
            .iter()
            .find(|line| line["message"] == "balance" && line["provider"] == provider)
            .unwrap_or_else(|| panic!("no balance of {provider} in {:#?}", self.logs));
        let number = |field: &str| line[field].as_u64().unwrap();
        Balance {
            accepted: number("accepted"),
            reloaded: number("reloaded"),
            delivered: number("delivered"),
            dead_lettered: number("dead_lettered"),
            spilled: number("spilled"),
            dropped: number("dropped"),
            not_for: number("not_for"),
            in_flight: number("in_flight"),
        }
    }

    /// How often something happened that a line tells of; some lines stand for
    /// others.
    pub(crate) fn count(&self, message: &str) -> usize {
        let told = self.logs.iter().filter(|line| line["message"] == message);
        told.map(|line| line["lines"].as_u64().map_or(1, |lines| lines as usize)).sum()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Balance {
    pub(crate) accepted: u64,
    pub(crate) reloaded: u64,
    pub(crate) delivered: u64,
    pub(crate) dead_lettered: u64,
    pub(crate) spilled: u64,
    pub(crate) dropped: u64,
    pub(crate) not_for: u64,
    pub(crate) in_flight: u64,
}

impl Balance {
    /// Whether both sides are the same.
    pub(crate) fn is_exact(&self) -> bool {
        self.in_flight == 0
            && self.accepted + self.reloaded
                == self.delivered + self.dead_lettered + self.spilled + self.dropped + self.not_for
    }
}

/// Knows what was sent and what was answered; stands outside of the relay.
#[derive(Debug, Default)]
pub(crate) struct Observer {
    /// Ids that were answered OK.
    pub(crate) accepted: HashSet<String>,
    /// Ids whose fate the caller cannot know.
    pub(crate) unknown: HashSet<String>,
    /// Ids that were refused.
    pub(crate) refused: HashSet<String>,
}

impl Observer {
    /// Sends one event and notes the answer.
    pub(crate) async fn track(&mut self, client: &mut Client, name: &str, user: &str) -> Option<Code> {
        let request = track(name, user);
        let id = request.event_id.clone();
        match client.track_event(request).await {
            Ok(answer) => {
                assert_eq!(answer.into_inner().event_id, id);
                self.accepted.insert(id);
                None
            }
            Err(status) => {
                match status.code() {
                    Code::InvalidArgument | Code::ResourceExhausted => self.refused.insert(id),
                    // A relay that is stopping says so, or is gone.
                    Code::Unavailable if status.message() == "the relay is stopping" => {
                        self.refused.insert(id)
                    }
                    _ => self.unknown.insert(id),
                };
                Some(status.code())
            }
        }
    }

    pub(crate) async fn tracks(&mut self, client: &mut Client, count: usize) {
        for index in 0..count {
            let refused = self.track(client, "Order Placed", &format!("user-{}", index % 7)).await;
            assert_eq!(refused, None);
        }
    }

    /// Notes the answers to a batch of items with these ids.
    pub(crate) fn batch(&mut self, ids: &[String], response: &TrackBatchResponse) {
        assert_eq!(response.answers.len(), ids.len(), "an answer for each");
        for (id, answer) in ids.iter().zip(&response.answers) {
            match answer.answer.as_ref().expect("each answer says something") {
                Answer::Accepted(accepted) => {
                    assert_eq!(&accepted.event_id, id);
                    self.accepted.insert(id.clone());
                    // It may have been sent before.
                    self.refused.remove(id);
                    self.unknown.remove(id);
                }
                Answer::Deferred(deferred) if deferred.reason == "SPOOL_FAILED" => {
                    self.unknown.insert(id.clone());
                }
                Answer::Refused(_) | Answer::Deferred(_) => {
                    self.refused.insert(id.clone());
                }
            }
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.accepted.extend(other.accepted);
        self.unknown.extend(other.unknown);
        self.refused.extend(other.refused);
    }

    /// Every event that was answered OK is delivered, a dead letter or spilled;
    /// nothing else arrived.
    pub(crate) fn check(&self, setup: &Setup, vendor: Vendor) -> Account {
        let taken: HashMap<String, u32> = setup
            .sandbox
            .taken(vendor)
            .into_iter()
            .filter(|taken| !taken.id.is_empty())
            .map(|taken| (taken.id, taken.copies))
            .collect();
        let dead = ids_on_disk(&setup.data_dir().join("dead-letters").join(vendor.name()), "/event/id");
        let spilled = ids_on_disk(&setup.data_dir().join("spill").join(vendor.name()), "/id");
        let on_disk = |id: &String| dead.contains(id) || spilled.contains(id);
        let lost: Vec<_> =
            self.accepted.iter().filter(|id| !taken.contains_key(*id) && !on_disk(id)).collect();
        assert!(lost.is_empty(), "{vendor:?} lost {} of {}: {lost:?}", lost.len(), self.accepted.len());
        let strangers: Vec<_> = taken
            .keys()
            .chain(&dead)
            .chain(&spilled)
            .filter(|id| !self.accepted.contains(*id) && !self.unknown.contains(*id))
            .collect();
        assert!(strangers.is_empty(), "{vendor:?} has what was not accepted: {strangers:?}");
        Account {
            delivered: taken.len() as u64,
            copies: taken.values().map(|copies| u64::from(*copies)).sum(),
            dead_lettered: dead.len() as u64,
            spilled: spilled.len() as u64,
        }
    }

    /// As [`Observer::check`], against what the relay says of itself. For runs
    /// in which no answer of a provider was lost, or after which the relay
    /// learned the truth.
    pub(crate) fn check_balance(&self, setup: &Setup, ended: &Ended) {
        for vendor in Vendor::ALL {
            let account = self.check(setup, vendor);
            let balance = ended.balance(vendor);
            assert!(balance.is_exact(), "{vendor:?} {balance:?}");
            assert_eq!(balance.accepted, self.accepted.len() as u64, "{vendor:?} {balance:?}");
            assert_eq!(balance.dropped, 0, "{vendor:?} {balance:?}");
            assert_eq!(
                (balance.delivered, balance.dead_lettered, balance.spilled),
                (account.delivered, account.dead_lettered, account.spilled),
                "{vendor:?}: the relay's account against the observer's"
            );
        }
    }
}

/// What the observer found at one provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Account {
    /// Distinct events that the provider took.
    pub(crate) delivered: u64,
    /// Times it took one.
    pub(crate) copies: u64,
    pub(crate) dead_lettered: u64,
    pub(crate) spilled: u64,
}

fn ids_on_disk(dir: &Path, pointer: &str) -> HashSet<String> {
    lines_on_disk(dir)
        .iter()
        .map(|line| line.pointer(pointer).unwrap().as_str().unwrap().to_owned())
        .collect()
}

/// Every JSON line of a directory.
pub(crate) fn lines_on_disk(dir: &Path) -> Vec<Value> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut lines = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "ndjson") {
            let text = fs::read_to_string(&path).unwrap();
            lines.extend(text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()));
        }
    }
    lines
}

/// A track with an id of its own.
pub(crate) fn track(name: &str, user: &str) -> TrackEventRequest {
    TrackEventRequest {
        event_name: name.to_owned(),
        user_id: user.to_owned(),
        event_id: uuid::Uuid::now_v7().to_string(),
        properties: [("total".to_owned(), PropertyValue { value: Some(Kind::NumberValue(19.5)) })].into(),
        ..Default::default()
    }
}

pub(crate) fn identify(user: &str, traits: &[(&str, Option<Kind>)]) -> IdentifyUserRequest {
    let property =
        |(key, value): &(&str, Option<Kind>)| ((*key).to_owned(), PropertyValue { value: value.clone() });
    IdentifyUserRequest {
        user_id: user.to_owned(),
        properties: traits.iter().map(property).collect(),
        ..Default::default()
    }
}

/// A batch, and the ids of its items.
pub(crate) fn batch(items: impl IntoIterator<Item = TrackBatchItem>) -> (Vec<String>, TrackBatchRequest) {
    let items: Vec<_> = items.into_iter().collect();
    let id = |item: &TrackBatchItem| match item.item.as_ref() {
        Some(Item::Track(track)) => track.event_id.clone(),
        Some(Item::Page(view) | Item::Screen(view)) => view.event_id.clone(),
        Some(Item::Group(group)) => group.event_id.clone(),
        Some(Item::Alias(alias)) => alias.event_id.clone(),
        Some(Item::Identify(identify)) => identify.event_id.clone(),
        None => String::new(),
    };
    (items.iter().map(id).collect(), TrackBatchRequest { items })
}

pub(crate) fn track_item(name: &str, user: &str) -> TrackBatchItem {
    TrackBatchItem { item: Some(Item::Track(track(name, user))) }
}

/// Waits until `is_so`, or fails saying what was waited for.
pub(crate) async fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until a provider has taken so many distinct events.
pub(crate) async fn taken(setup: &Setup, vendor: Vendor, events: u64) {
    let what = format!("{events} events at {}", vendor.name());
    eventually(&what, || setup.sandbox.stats(vendor).taken >= events).await;
}

/// True if relays that are started here ignore SIGHUP, as the tests themselves do under
/// nohup.
pub(crate) fn hangups_are_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() & 1 == 1)
}

/// Adds all that stands in files of a directory, at any depth.
pub(crate) fn everything_below(dir: &Path, text: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => everything_below(&path, text),
            false => text.push_str(&String::from_utf8_lossy(&fs::read(path).unwrap())),
        }
    }
}

/// Fails if one of these stands in a text, with what stands before it.
pub(crate) fn assert_is_nowhere(canaries: &[&str], text: &str) {
    for canary in canaries {
        if let Some(at) = text.find(canary) {
            let before: String = text[..at].chars().rev().take(300).collect();
            panic!("{canary} was told: {}", before.chars().rev().collect::<String>());
        }
    }
}

/// All that a provider was sent.
pub(crate) fn bodies(setup: &Setup, vendor: Vendor) -> String {
    setup.sandbox.requests(vendor).into_iter().filter_map(|request| request.body).collect()
}

/// Posts JSON to the HTTP door: the status.
pub(crate) async fn post(relay: &Relay, path: &str, body: &Value) -> u16 {
    let url = format!("http://{}{path}", relay.http_addr.unwrap());
    let sent = reqwest_client().post(url).body(body.to_string()).send().await.unwrap();
    sent.status().as_u16()
}

/// A client for the metrics port.
pub(crate) fn reqwest_client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}
