//! Segment's and RudderStack's own SDKs, unmodified, as processes against the HTTP door, and
//! the one for browsers in a page: `tests/sdks` sends every kind of event with each. They run
//! where their language and packages are (`npm ci` in `tests/sdks`;
//! `.ci/python-packages.txt`), and Chromium.

use std::{
    collections::{HashMap, HashSet},
    process::Stdio,
    time::{Duration, Instant},
};

use analytics_relay::providers::sandbox::{Taken, TakenKind, Vendor};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    process::Command,
    time::timeout,
};

use crate::{
    foreign_clients::program,
    harness::{Setup, eventually, not_run, reqwest_client, taken},
};

const PATIENCE: Duration = Duration::from_secs(90);

/// An SDK: how its events' ids end, and what sends them.
struct Sdk {
    name: &'static str,
    /// The module without which it cannot run.
    module: &'static str,
    host: Host,
}

/// Where an SDK runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Host {
    Node,
    /// In a page of another origin than the door's, which Node opens in Chromium.
    Page,
    /// From the package of this name.
    Python(&'static str),
}

const SEGMENT_NEXT: Sdk = Sdk { name: "segment-next", module: "@segment/analytics-next", host: Host::Page };

const SDKS: [Sdk; 5] = [
    Sdk { name: "segment-node", module: "@segment/analytics-node", host: Host::Node },
    Sdk { name: "rudder-node", module: "@rudderstack/rudder-sdk-node", host: Host::Node },
    Sdk {
        name: "segment-python",
        module: "segment.analytics",
        host: Host::Python("segment-analytics-python"),
    },
    Sdk { name: "rudder-python", module: "rudderstack.analytics", host: Host::Python("rudder-sdk-python") },
    SEGMENT_NEXT,
];

const KINDS: [(&str, TakenKind); 6] = [
    ("track", TakenKind::Track),
    ("identify", TakenKind::Identify),
    ("page", TakenKind::Page),
    ("screen", TakenKind::Screen),
    ("group", TakenKind::Group),
    ("alias", TakenKind::Alias),
];

/// A command that runs in `tests/sdks`, and no longer than its test.
pub(crate) fn in_sdks(mut command: Command) -> Command {
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sdks")).kill_on_drop(true);
    command.env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::null());
    command
}

impl Sdk {
    fn command(&self, args: &[&str]) -> Command {
        in_sdks(match self.host {
            Host::Python(_) => program("PYTHON", "python3", args),
            Host::Node | Host::Page => program("NODE", "node", args),
        })
    }

    /// True if the machine has it; else that it was not run is said.
    async fn is_there(&self) -> bool {
        let module = self.module;
        let (flag, code, what) = match self.host {
            Host::Python(_) => ("-c", format!("import {module}"), module.to_owned()),
            Host::Node => ("-e", format!("require({module:?})"), module.to_owned()),
            Host::Page => {
                let code = format!("require.resolve({module:?}); require('./browser.cjs').executable()");
                ("-e", code, format!("{module} with playwright-core and Chromium"))
            }
        };
        let output = self.command(&[flag, &code]).output().await;
        let is_there = output.is_ok_and(|output| output.status.success());
        if !is_there {
            not_run(&format!("the SDK {what}"));
        }
        is_there
    }

    /// Sends so many of each kind, and returns what it prints: its version.
    async fn send(&self, addr: &str, count: usize, prefix: &str) -> String {
        let count = count.to_string();
        let script = format!("{}.cjs", self.name.replace('-', "_"));
        let of_sdk = match self.host {
            Host::Python(package) => vec!["python.py", self.module, package, self.name],
            Host::Node | Host::Page => vec![script.as_str()],
        };
        let sent = self.command(&[&of_sdk[..], &[addr, &count, prefix]].concat()).output();
        let output = timeout(PATIENCE, sent).await.expect("the SDK ends").unwrap();
        let printed = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{}: {}", self.name, printed(&output.stderr));
        printed(&output.stdout).trim().to_owned()
    }

    /// Each event arrives at Segment as what it was sent as.
    async fn check(&self, setup: &Setup, count: usize, prefix: &str) {
        taken(setup, Vendor::Segment, (count * KINDS.len()) as u64).await;
        let taken: HashMap<String, TakenKind> =
            setup.sandbox.taken(Vendor::Segment).into_iter().map(|taken| (taken.id, taken.kind)).collect();
        let mut wanted = HashSet::new();
        for (name, kind) in KINDS {
            for at in 0..count {
                let id = format!("{prefix}-{name}-{at}-of-{}", self.name);
                assert_eq!(taken.get(&id), Some(&kind), "{id}");
                wanted.insert(id);
            }
        }
        let strangers: Vec<_> = taken.keys().filter(|id| !wanted.contains(*id)).collect();
        assert!(strangers.is_empty(), "{strangers:?}");
        for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
            self.check_at(vendor, setup, count, prefix).await;
        }
    }

    /// The same events arrive at a vendor to which tracks, pages and screens are one sort,
    /// and which has ids for these.
    async fn check_at(&self, vendor: Vendor, setup: &Setup, count: usize, prefix: &str) {
        let is_meant = |taken: &Taken| taken.kind == TakenKind::Track && taken.name != FILLING;
        let ids = || -> Vec<String> {
            let events = setup.sandbox.taken(vendor).into_iter().filter(is_meant);
            events.map(|taken| taken.id).collect()
        };
        let mut wanted: Vec<String> = ["track", "page", "screen"]
            .into_iter()
            .flat_map(|kind| (0..count).map(move |at| format!("{prefix}-{kind}-{at}-of-{}", self.name)))
            .collect();
        eventually("each event", || ids().len() >= wanted.len()).await;
        let mut taken = ids();
        taken.sort();
        wanted.sort();
        // A longer one is another id at Mixpanel, made from it.
        assert!(wanted.iter().all(|id| id.len() <= 36), "{wanted:?}");
        assert_eq!(taken, wanted, "{vendor:?}");
    }
}

/// With an event among them that is refused, and vendors that have no time at first.
#[tokio::test]
async fn each_event_of_each_sdk_arrives_once_as_what_it_was() {
    const COUNT: usize = 20;
    for sdk in SDKS {
        if !sdk.is_there().await {
            continue;
        }
        let setup = Setup::new().await;
        for vendor in Vendor::ALL {
            let faults = ["503", "429", "503"].map(|fault| fault.parse().unwrap());
            setup.sandbox.script(vendor, faults);
        }
        let relay = setup.start().await;
        let addr = relay.http_addr.unwrap().to_string();
        println!("{}", sdk.send(&addr, COUNT, "plain").await);
        let events = (COUNT * KINDS.len()) as u64;
        for vendor in Vendor::ALL {
            relay.settled(vendor, events).await;
        }
        sdk.check(&setup, COUNT, "plain").await;
        relay.metric_is("relay_refusals_total", &["EVENT_ID_INVALID"], 1.0).await;
        let requests = setup.sandbox.requests(Vendor::Segment);
        assert!(requests.iter().any(|seen| seen.status == Some(429)), "the fault happened");
        let ended = relay.terminate().await;
        for vendor in Vendor::ALL {
            let balance = ended.balance(vendor);
            assert!(balance.is_exact() && balance.dead_lettered + balance.dropped == 0, "{balance:?}");
            assert_eq!(setup.sandbox.stats(vendor).duplicates, 0, "{vendor:?}");
        }
    }
}

/// Answers one call with each of these, whatever it is, and is gone.
async fn refuse(listener: TcpListener, answers: &[&str]) {
    for answer in answers {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut call, mut buffer) = (Vec::new(), [0; 16 * 1024]);
        while !is_whole(&call) {
            let read = timeout(PATIENCE, stream.read(&mut buffer)).await.unwrap().unwrap();
            assert!(read > 0, "the SDK sends a whole call");
            call.extend_from_slice(&buffer[..read]);
        }
        let answer = format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
    }
}

/// True if a call is here to the end of its body.
fn is_whole(call: &[u8]) -> bool {
    let text = String::from_utf8_lossy(call);
    let Some((head, _)) = text.split_once("\r\n\r\n") else { return false };
    if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return call.ends_with(b"0\r\n\r\n");
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().unwrap())
    });
    call.len() >= head.len() + 4 + length.unwrap_or(0)
}

/// As a relay whose queue is full, and one that stops, answer them. What a page asks before it
/// sends only a relay can answer: the next test.
#[tokio::test]
async fn an_sdk_that_is_told_to_wait_sends_all_of_it_again() {
    const COUNT: usize = 10;
    for sdk in SDKS.into_iter().filter(|sdk| sdk.host != Host::Page) {
        if !sdk.is_there().await {
            continue;
        }
        let mut setup = Setup::new().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        setup.set("HTTP_PORT", &port.to_string());
        let addr = format!("127.0.0.1:{port}");
        let sent = sdk.send(&addr, COUNT, "waited");
        let answers =
            ["429 Too Many Requests\r\nRetry-After: 1", "503 Service Unavailable\r\nRetry-After: 1"];
        let first_refuse = async {
            refuse(listener, &answers).await;
            setup.start().await
        };
        let (version, relay) = tokio::join!(sent, first_refuse);
        println!("{version}, told to wait");
        sdk.check(&setup, COUNT, "waited").await;
        assert_eq!(relay.terminate().await.code, 0);
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What the events are called that fill the log.
const FILLING: &str = "Filling";

/// Fills the log with what is not for Segment, until the relay refuses it.
async fn fill_log(addr: &str) {
    let properties = json!({"filling": "x".repeat(9000)});
    let event =
        json!({"event":FILLING,"userId":"u","integrations":{"Segment":false},"properties":properties});
    let client = reqwest_client();
    for _ in 0..100 {
        let sent = client.post(format!("http://{addr}/v1/track")).body(event.to_string()).send();
        if sent.await.unwrap().status() == 429 {
            return;
        }
    }
    panic!("the log is never full");
}

/// By a relay whose log is full, and which stops then. Events of a page are as many calls,
/// each with its own wait.
#[tokio::test]
async fn a_page_that_is_told_to_wait_sends_all_of_it_again() {
    const COUNT: usize = 10;
    let sdk = SEGMENT_NEXT;
    if !sdk.is_there().await {
        return;
    }
    let mut setup = Setup::new().await;
    let port = free_port().to_string();
    let addr = format!("127.0.0.1:{port}");
    for (name, value) in [
        ("HTTP_PORT", port.as_str()),
        ("DURABILITY", "written"),
        ("SPOOL_SEGMENT_BYTES", "65536"),
        ("SPOOL_MAX_BYTES", "262144"),
        ("SPOOL_WHEN_FULL", "reject"),
        // The stop waits for requests that stall, until it is ended by a second signal.
        ("REQUEST_TIMEOUT_SECONDS", "60"),
        ("DRAIN_TIMEOUT_SECONDS", "60"),
    ] {
        setup.set(name, value);
    }
    let always = |fault: Option<&str>| {
        let set = |vendor| setup.sandbox.always(vendor, fault.map(|fault| fault.parse().unwrap()));
        Vendor::ALL.into_iter().for_each(set);
    };
    always(Some("stall"));
    let relay = setup.start().await;
    fill_log(&addr).await;
    let sent = sdk.send(&addr, COUNT, "waited");
    let tell = async {
        relay.refused("SPOOL_FULL", COUNT as u64).await;
        relay.signal("TERM");
        relay.refused("DRAINING", 1).await;
        relay.signal("TERM");
        assert_eq!(relay.ended(Instant::now()).await.code, 0);
        always(None);
        setup.start().await
    };
    let (version, relay) = tokio::join!(sent, tell);
    println!("{version}, told to wait");
    sdk.check(&setup, COUNT, "waited").await;
    assert_eq!(relay.terminate().await.code, 0);
}

/// What was answered is in the log; what was not, the SDK sends again.
#[tokio::test]
async fn a_relay_that_is_killed_between_loses_no_sdk_an_event() {
    const COUNT: usize = 150;
    for sdk in SDKS {
        if !sdk.is_there().await {
            continue;
        }
        let mut setup = Setup::new().await;
        let port = free_port();
        setup.set("DURABILITY", "written").set("HTTP_PORT", &port.to_string());
        let relay = setup.start().await;
        let addr = format!("127.0.0.1:{port}");
        let sent = sdk.send(&addr, COUNT, "killed");
        let kill = async {
            eventually("some events", || setup.sandbox.stats(Vendor::Segment).taken >= 60).await;
            relay.signal("KILL");
            let ended = relay.ended(Instant::now()).await;
            assert_eq!(ended.code, -1, "killed by a signal");
            let arrived = setup.sandbox.stats(Vendor::Segment).taken;
            assert!(arrived < (COUNT * KINDS.len()) as u64, "in the middle of it");
            setup.start().await
        };
        let (version, relay) = tokio::join!(sent, kill);
        println!("{version}, over a kill");
        sdk.check(&setup, COUNT, "killed").await;
        assert_eq!(relay.terminate().await.code, 0);
    }
}
