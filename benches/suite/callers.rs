//! What an event costs its caller, in Python and Node: one call for each event, the
//! batching clients of `examples/`, and Segment's own SDKs, where the languages and
//! their packages are here (`PYTHON` and `NODE` name others than those on the path).

use std::{env, path::Path, process::Stdio, time::Duration};

use analytics_relay::providers::sandbox::Vendor;
use anyhow::{Context, ensure};
use tokio::process::Command;

use crate::{report::Report, sink::Sink, support::Relay};

const EVENTS: u64 = 5000;
const PATIENCE: Duration = Duration::from_secs(30);

const PYTHON_UNARY: &str = r#"
import sys, time
import grpc
from analytics.v1 import analytics_pb2 as pb, analytics_pb2_grpc
stub = analytics_pb2_grpc.AnalyticsServiceStub(grpc.insecure_channel(sys.argv[1]))
def text(value): return pb.PropertyValue(string_value=value)
def call(number):
    stub.TrackEvent(pb.TrackEventRequest(event_name="Order Placed", user_id=f"user-{number}", properties={
        "sku": text("SKU-1"), "currency": text("EUR"), "total": pb.PropertyValue(number_value=19.5),
        "quantity": pb.PropertyValue(integer_value=3), "gift": pb.PropertyValue(bool_value=False)}))
call(0)
before = time.process_time()
for number in range(1, int(sys.argv[2])): call(number)
print(time.process_time() - before)
"#;

const PYTHON_CLIENT: &str = r#"
import sys, time
from analytics_relay import Analytics
analytics = Analytics(sys.argv[1])
before = time.process_time()
for number in range(int(sys.argv[2])):
    analytics.track("Order Placed", f"user-{number}",
        {"sku": "SKU-1", "currency": "EUR", "total": 19.5, "quantity": 3, "gift": False})
assert analytics.close(30), analytics.counters()
print(time.process_time() - before)
"#;

const PYTHON_SDK: &str = r#"
import sys, time
import segment.analytics as analytics
analytics.write_key, analytics.host, analytics.upload_size = "key", sys.argv[1], 50
before = time.process_time()
for number in range(int(sys.argv[2])):
    analytics.track(f"user-{number}", "Order Placed",
        {"sku": "SKU-1", "currency": "EUR", "total": 19.5, "quantity": 3, "gift": False})
analytics.flush()
print(time.process_time() - before)
"#;

const NODE_CLIENT: &str = r"
const { Analytics } = require('./examples/node')
const analytics = new Analytics(process.argv[1])
const before = process.cpuUsage(), events = Number(process.argv[2])
for (let number = 0; number < events; number++) {
  analytics.track('Order Placed', { userId: `user-${number}`, properties: {
    sku: 'SKU-1', currency: 'EUR', total: 19.5, quantity: 3, gift: false } })
}
analytics.close().then((counters) => {
  if (counters.accepted !== events) throw new Error(JSON.stringify(counters))
  const { user, system } = process.cpuUsage(before)
  console.log((user + system) / 1e6)
})
";

const NODE_SDK: &str = r"
const { Analytics } = require('@segment/analytics-node')
const analytics = new Analytics({ writeKey: 'key', host: process.argv[1], flushAt: 50 })
const before = process.cpuUsage(), events = Number(process.argv[2])
for (let number = 0; number < events; number++) {
  analytics.track({ userId: `user-${number}`, event: 'Order Placed', properties: {
    sku: 'SKU-1', currency: 'EUR', total: 19.5, quantity: 3, gift: false } })
}
analytics.closeAndFlush().then(() => {
  const { user, system } = process.cpuUsage(before)
  console.log((user + system) / 1e6)
})
";

pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    let stubs = tempfile::tempdir()?;
    let python = |script| {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/python");
        let mut command = program("PYTHON", "python3", &["-c", script]);
        command.env("PYTHONPATH", format!("{}:{}", examples.display(), stubs.path().display()));
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        command
    };
    if output(python("import grpc, grpc_tools")).await.is_ok() {
        let out = stubs.path().display();
        let [messages, service] = [format!("--python_out={out}"), format!("--grpc_python_out={out}")];
        let proto = "proto/analytics/v1/analytics.proto";
        let compile = ["-m", "grpc_tools.protoc", "-I", "proto", &messages, &service, proto];
        output(program("PYTHON", "python3", &compile)).await?;
        caller(report, "caller.python.unary", python(PYTHON_UNARY), true).await?;
    } else {
        report.not_run("caller.python.unary", "Python with grpcio and grpcio-tools is not here");
    }
    if output(python("import google.protobuf, h2")).await.is_ok() {
        caller(report, "caller.python.client", python(PYTHON_CLIENT), true).await?;
    } else {
        report.not_run("caller.python.client", "Python with protobuf and h2 is not here");
    }
    if output(python("import segment.analytics")).await.is_ok() {
        caller(report, "caller.python.segment_sdk", python(PYTHON_SDK), false).await?;
    } else {
        report.not_run("caller.python.segment_sdk", "segment-analytics-python is not here");
    }

    let node = |script| program("NODE", "node", &["-e", script]);
    if output(node("require('./examples/node')")).await.is_ok() {
        caller(report, "caller.node.client", node(NODE_CLIENT), true).await?;
    } else {
        report.not_run("caller.node", "Node with @grpc/grpc-js and @grpc/proto-loader is not here");
    }
    if output(node("require('@segment/analytics-node')")).await.is_ok() {
        caller(report, "caller.node.segment_sdk", node(NODE_SDK), false).await?;
    } else {
        report.not_run("caller.node.segment_sdk", "@segment/analytics-node is not here");
    }
    Ok(())
}

/// CPU of the caller's process for each event, over a relay or straight to the
/// provider.
async fn caller(
    report: &mut Report,
    name: &str,
    mut command: Command,
    over_relay: bool,
) -> anyhow::Result<()> {
    let sink = Sink::start().await?;
    let data = tempfile::tempdir()?;
    let relay = if over_relay {
        Some(Relay::start_roomy(&sink.url, data.path(), "segment", &[]).await?)
    } else {
        None
    };
    let addr = relay.as_ref().map_or(&sink.url, |relay| &relay.grpc_addr);
    command.args([addr, &EVENTS.to_string()]);
    let seconds: f64 = output(command).await?.trim().parse()?;
    if let Some(relay) = relay {
        relay.terminate().await?;
    }
    sink.wait_for(Vendor::Segment, EVENTS, PATIENCE).await.with_context(|| name.to_owned())?;
    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    let micros = seconds * 1e6 / EVENTS as f64;
    report.add(name, micros, "us/event");
    Ok(())
}

fn program(variable: &str, otherwise: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os(variable).unwrap_or_else(|| otherwise.into()));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn output(mut command: Command) -> anyhow::Result<String> {
    let output = command.output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
