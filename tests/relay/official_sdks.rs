//! Segment's and RudderStack's own SDKs, unmodified, as processes against the HTTP door:
//! `tests/sdks` sends every kind of event with each. They run where their language and
//! packages are (`npm ci` in `tests/sdks`; `.ci/python-packages.txt`).

use std::{
    collections::{HashMap, HashSet},
    process::Stdio,
    time::Duration,
};

use analytics_relay::providers::sandbox::{TakenKind, Vendor};
use tokio::{process::Command, time::timeout};

use crate::{
    foreign_clients::program,
    harness::{Setup, eventually, not_run, taken},
};

const PATIENCE: Duration = Duration::from_secs(90);

/// An SDK: how its events' ids end, and what sends them.
struct Sdk {
    name: &'static str,
    script: &'static str,
    /// The module without which it cannot run.
    module: &'static str,
}

const SDKS: [Sdk; 4] = [
    Sdk { name: "segment-node", script: "segment_node.cjs", module: "@segment/analytics-node" },
    Sdk { name: "rudder-node", script: "rudder_node.cjs", module: "@rudderstack/rudder-sdk-node" },
    Sdk { name: "segment-python", script: "segment_python.py", module: "segment.analytics" },
    Sdk { name: "rudder-python", script: "rudder_python.py", module: "rudderstack.analytics" },
];

const KINDS: [(&str, TakenKind); 6] = [
    ("track", TakenKind::Track),
    ("identify", TakenKind::Identify),
    ("page", TakenKind::Page),
    ("screen", TakenKind::Screen),
    ("group", TakenKind::Group),
    ("alias", TakenKind::Alias),
];

impl Sdk {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = if self.script.ends_with(".py") {
            program("PYTHON", "python3", args)
        } else {
            program("NODE", "node", args)
        };
        command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sdks")).kill_on_drop(true);
        command.env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::null());
        command
    }

    /// True if the machine has it; else that it was not run is said.
    async fn is_there(&self) -> bool {
        let args = if self.script.ends_with(".py") {
            ["-c".to_owned(), format!("import {}", self.module)]
        } else {
            ["-e".to_owned(), format!("require({:?})", self.module)]
        };
        let [flag, code] = &args;
        let output = self.command(&[flag, code]).output().await;
        let is_there = output.is_ok_and(|output| output.status.success());
        if !is_there {
            not_run(&format!("the SDK {}", self.module));
        }
        is_there
    }

    /// Sends so many of each kind, and returns what it prints: its version.
    async fn send(&self, addr: &str, count: usize, prefix: &str) -> String {
        let count = count.to_string();
        let sent = self.command(&[self.script, addr, &count, prefix]).output();
        let output = timeout(PATIENCE, sent).await.expect("the SDK ends").unwrap();
        let printed = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{}: {}", self.name, printed(&output.stderr));
        printed(&output.stdout).trim().to_owned()
    }

    /// Each event arrived at Segment as what it was sent as.
    fn check(&self, setup: &Setup, count: usize, prefix: &str) {
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
        taken(&setup, Vendor::Segment, events).await;
        for vendor in Vendor::ALL {
            relay.settled(vendor, events).await;
        }
        sdk.check(&setup, COUNT, "plain");
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

/// What was answered is in the log; what was not, the SDK sends again.
#[tokio::test]
async fn a_relay_that_is_killed_between_loses_no_sdk_an_event() {
    const COUNT: usize = 150;
    for sdk in SDKS {
        if !sdk.is_there().await {
            continue;
        }
        let mut setup = Setup::new().await;
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        setup.set("DURABILITY", "written").set("HTTP_PORT", &port.to_string());
        let relay = setup.start().await;
        let addr = format!("127.0.0.1:{port}");
        let sent = sdk.send(&addr, COUNT, "killed");
        let kill = async {
            eventually("some events", || setup.sandbox.stats(Vendor::Segment).taken >= 60).await;
            relay.signal("KILL");
            let ended = relay.ended(std::time::Instant::now()).await;
            assert_eq!(ended.code, -1, "killed by a signal");
            let arrived = setup.sandbox.stats(Vendor::Segment).taken;
            assert!(arrived < (COUNT * KINDS.len()) as u64, "in the middle of it");
            setup.start().await
        };
        let (version, relay) = tokio::join!(sent, kill);
        println!("{version}, over a kill");
        taken(&setup, Vendor::Segment, (COUNT * KINDS.len()) as u64).await;
        sdk.check(&setup, COUNT, "killed");
        assert_eq!(relay.terminate().await.code, 0);
    }
}
