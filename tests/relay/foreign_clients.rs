//! The batching clients in `examples/python` and `examples/node`, where their
//! language and its gRPC package are present (`RELAY_PYTHON` and `RELAY_NODE` name
//! others than those on the path).

use std::{env, path::Path, process::Stdio, time::Duration};

use analytics_relay::providers::sandbox::Vendor;
use serde_json::Value;
use tokio::{process::Command, time::timeout};

use crate::harness::{Setup, not_run, taken};

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a program and returns what it prints; None if it fails.
async fn output(mut command: Command) -> Option<String> {
    let output = timeout(PATIENCE, command.stderr(Stdio::piped()).kill_on_drop(true).output()).await.unwrap();
    let output = output.ok()?;
    if !output.status.success() {
        println!("{}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    Some(String::from_utf8(output.stdout).unwrap())
}

/// The program of a language: `RELAY_<language>`, or the one on the path.
pub(crate) fn program(language: &str, otherwise: &str, args: &[&str]) -> Command {
    let chosen = env::var_os(format!("RELAY_{language}"));
    let mut command = Command::new(chosen.unwrap_or_else(|| otherwise.into()));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

/// 1,000 orders, an identify and one event without a name were sent, and the
/// client has closed; it printed its counters.
async fn check(setup: &Setup, counters: &str) {
    let counters: Value = serde_json::from_str(counters.trim()).unwrap();
    for (name, count) in [("queued", 1002), ("accepted", 1001), ("refused", 1)] {
        assert_eq!(counters[name], count, "{counters}");
    }
    for name in ["abandoned", "dropped", "waiting"] {
        assert_eq!(counters[name], 0, "{counters}");
    }
    taken(setup, Vendor::Segment, 1001).await;
    let events = setup.sandbox.taken(Vendor::Segment);
    assert_eq!(events.len(), 1001);
    let order = events.iter().find(|taken| taken.name == "Order 7").unwrap();
    let properties = &order.event["properties"];
    assert_eq!(properties["items"][1], "pen", "{properties}");
    assert_eq!(properties["shipping"]["city"], "Turin", "{properties}");
    assert!(properties["coupon"].is_null() && properties["total"] == 49.9, "{properties}");
}

#[tokio::test]
async fn the_python_client_sends_all_and_says_so() {
    if output(program("PYTHON", "python3", &["-c", "import google.protobuf, h2"])).await.is_none() {
        return not_run("the Python client: Python with protobuf and h2");
    }
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let script = r#"
import json, sys
from analytics_relay import Analytics
analytics = Analytics(sys.argv[1])
for number in range(1000):
    analytics.track(f"Order {number}", "user-1", {
        "total": 49.9, "items": ["book", "pen"], "shipping": {"city": "Turin", "days": 2}, "coupon": None})
analytics.identify("user-1", {"plan": "pro", "trial_ends": None})
analytics.track("", "user-1")
assert analytics.flush(30) and analytics.close(30)
print(json.dumps(analytics.counters()))
"#;
    let mut run = program("PYTHON", "python3", &["-c", script, &relay.grpc_addr.to_string()]);
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/python");
    run.env("PYTHONPATH", package).env("PYTHONDONTWRITEBYTECODE", "1");
    let counters = output(run).await.expect("the script ends well");
    check(&setup, &counters).await;
    relay.terminate().await;
}

#[tokio::test]
async fn the_node_client_sends_all_and_says_so() {
    if output(program("NODE", "node", &["-e", "require('./examples/node')"])).await.is_none() {
        return not_run("the Node client: Node with @grpc/grpc-js and @grpc/proto-loader");
    }
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let script = r"
const { Analytics } = require('./examples/node')
const analytics = new Analytics(process.argv[1])
for (let number = 0; number < 1000; number++) {
  analytics.track(`Order ${number}`, { userId: 'user-1', properties: {
    total: 49.9, items: ['book', 'pen'], shipping: { city: 'Turin', days: 2 }, coupon: null } })
}
analytics.identify('user-1', { plan: 'pro', trialEnds: null })
analytics.track('', { userId: 'user-1' })
analytics.flush().then(() => analytics.close()).then((counters) => console.log(JSON.stringify(counters)))
";
    let run = program("NODE", "node", &["-e", script, &relay.grpc_addr.to_string()]);
    let counters = output(run).await.expect("the script ends well");
    check(&setup, &counters).await;
    relay.terminate().await;
}
