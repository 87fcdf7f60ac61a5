//! Relay, sandbox and a sender together: `make demo`.
//!
//! The relay runs as a process of its own and is ended with SIGTERM while the
//! sender is still sending; Amplitude loses one answer in five and Segment is
//! down for a while. At the end the relay's balance stands beside what the
//! sandbox received.

use std::{
    env,
    process::Stdio,
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::{
        IdentifyUserRequest, PropertyValue, TrackEventRequest,
        analytics_service_client::AnalyticsServiceClient, property_value::Value as Kind,
    },
    providers::sandbox::{Options, Sandbox, TakenKind, Vendor},
};
use anyhow::Context;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::mpsc,
    time::sleep,
};
use tonic::transport::Channel;

const KEY: &str = "sandbox-key";
const RATE: u32 = 400;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let seconds = env::args().nth(1).map_or(Ok(6), |text| text.parse())?;
    let sandbox = Sandbox::start(Options { key: KEY.to_owned(), ..Options::default() }).await?;
    let data_dir = env::temp_dir().join(format!("analytics-relay-demo-{}", std::process::id()));
    println!("sandbox for all three providers at {}", sandbox.url());
    let (mut relay, mut logs) = start_relay(&sandbox, &data_dir)?;
    let addr =
        wait_for(&mut logs, "relay started").await?["grpc_addr"].as_str().context("no address")?.to_owned();
    println!("relay at {addr}, process {}", relay.id().unwrap_or_default());

    sandbox.always(Vendor::Amplitude, Some("20%reset-after".parse()?));
    sandbox.always(Vendor::Segment, Some("503".parse()?));
    println!("amplitude loses one answer in five; segment is down for a while\n");

    let channel = Channel::from_shared(format!("http://{addr}"))?.connect().await?;
    let sender = tokio::spawn(send(channel, Duration::from_secs(seconds + 5)));
    let start = Instant::now();
    for second in 1..=seconds {
        sleep((start + Duration::from_secs(second)).saturating_duration_since(Instant::now())).await;
        let taken = Vendor::ALL.map(|vendor| format!("{} {}", vendor.name(), sandbox.stats(vendor).taken));
        println!("{second:>3} s  received by {}", taken.join(", "));
        if second == seconds.div_ceil(2) {
            println!("       segment is back");
            sandbox.always(Vendor::Segment, None);
        }
    }

    println!("\nSIGTERM, with the sender still sending");
    terminate(&relay)?;
    let accepted = sender.await?;
    let mut balances = Vec::new();
    while let Some(line) = logs.recv().await {
        let line: Value = serde_json::from_str(&line).unwrap_or_default();
        match line["message"].as_str() {
            Some("balance") => balances.push(line),
            Some("drained") => println!("drained in {} ms, lost {}", line["took_ms"], line["lost"]),
            _ => {}
        }
    }
    let code = relay.wait().await?.code();
    println!("exit code {code:?}; the sender was answered OK {accepted} times\n");
    let exact = print_balance(&sandbox, &balances, accepted);
    print_examples(&sandbox);
    std::fs::remove_dir_all(&data_dir)?;
    anyhow::ensure!(exact && code == Some(0), "the balance is not exact");
    Ok(())
}

fn start_relay(
    sandbox: &Sandbox,
    data_dir: &std::path::Path,
) -> anyhow::Result<(Child, mpsc::UnboundedReceiver<String>)> {
    // Beside the directory of this example.
    let me = env::current_exe()?;
    let binary =
        me.parent().and_then(|dir| dir.parent()).context("no target directory")?.join("analytics-relay");
    let mut command = Command::new(&binary);
    command.env("DATA_DIR", data_dir).env("LOG_FORMAT", "json").env("LOG_LEVEL", "info");
    command.env("GRPC_HOST", "127.0.0.1").env("GRPC_PORT", "0");
    command.env("METRICS_HOST", "127.0.0.1").env("METRICS_PORT", "0");
    command.env("TEST_MODE", "false").env("ANALYTICS_PROVIDER", "mixpanel,amplitude,segment");
    command.env("FLUSH_INTERVAL_SECONDS", "1").env("INITIAL_RETRY_DELAY_MS", "200");
    command.env("MAX_RETRY_ATTEMPTS", "20").env("MAX_RETRY_DELAY_MS", "1000");
    for (vendor, key) in [("MIXPANEL", "API_KEY"), ("AMPLITUDE", "API_KEY"), ("SEGMENT", "WRITE_KEY")] {
        command.env(format!("{vendor}_BASE_URL"), sandbox.url()).env(format!("{vendor}_{key}"), KEY);
    }
    let mut relay = command
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}; `make demo` builds it first", binary.display()))?;
    let stdout = relay.stdout.take().context("no output")?;
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut lines = BufReader::new(stdout).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let _ = sender.send(line);
        }
    });
    Ok((relay, receiver))
}

async fn wait_for(logs: &mut mpsc::UnboundedReceiver<String>, message: &str) -> anyhow::Result<Value> {
    while let Some(line) = logs.recv().await {
        let line: Value = serde_json::from_str(&line)?;
        if line["message"] == message {
            return Ok(line);
        }
    }
    anyhow::bail!("the relay ended before it said {message:?}")
}

fn terminate(relay: &Child) -> anyhow::Result<()> {
    let pid = relay.id().context("the relay has ended")?;
    let sent = std::process::Command::new("sh").args(["-c", &format!("kill -TERM {pid}")]).status()?;
    anyhow::ensure!(sent.success(), "the signal could not be sent");
    Ok(())
}

/// Sends until the relay takes no more; returns how often it answered OK.
async fn send(channel: Channel, longest: Duration) -> u64 {
    let mut client = AnalyticsServiceClient::new(channel);
    let start = Instant::now();
    let mut accepted = 0;
    for number in 0_u32.. {
        let due = start + Duration::from_secs(1) * number / RATE;
        sleep(due.saturating_duration_since(Instant::now())).await;
        let user_id = format!("user-{}", number % 50);
        let value = |kind| PropertyValue { value: Some(kind) };
        let answered = if number % 40 == 0 {
            let properties = [("plan".to_owned(), value(Kind::StringValue("pro".to_owned())))].into();
            let request = IdentifyUserRequest { user_id, properties, ..Default::default() };
            client.identify_user(request).await.map(|_| ())
        } else {
            let properties = [
                ("total".to_owned(), value(Kind::NumberValue(f64::from(number % 100) + 0.5))),
                ("sku".to_owned(), value(Kind::StringValue(format!("SKU-{}", number % 7)))),
            ]
            .into();
            let event_name = "Order Placed".to_owned();
            let request = TrackEventRequest { event_name, user_id, properties, ..Default::default() };
            client.track_event(request).await.map(|_| ())
        };
        if answered.is_err() || start.elapsed() > longest {
            break;
        }
        accepted += 1;
    }
    accepted
}

/// The relay's account beside the sandbox's. True if both agree.
fn print_balance(sandbox: &Sandbox, balances: &[Value], accepted: u64) -> bool {
    println!(
        "{:<10} {:>8}   {:>9} {:>13} {:>7} {:>7}   {:>16} {:>9}",
        "provider",
        "accepted",
        "delivered",
        "dead_lettered",
        "spilled",
        "dropped",
        "sandbox received",
        "sent twice"
    );
    let mut exact = balances.len() == Vendor::ALL.len();
    for balance in balances {
        let number = |field: &str| balance[field].as_u64().unwrap_or_default();
        let vendor = balance["provider"].as_str().and_then(Vendor::from_name);
        let taken = vendor.map(|vendor| sandbox.taken(vendor)).unwrap_or_default();
        let doubles: u32 = taken.iter().map(|taken| taken.copies - 1).sum();
        println!(
            "{:<10} {:>8} = {:>9} {:>13} {:>7} {:>7}   {:>16} {:>9}",
            balance["provider"].as_str().unwrap_or_default(),
            number("accepted"),
            number("delivered"),
            number("dead_lettered"),
            number("spilled"),
            number("dropped"),
            taken.len(),
            doubles
        );
        let ended = number("delivered") + number("dead_lettered") + number("spilled") + number("dropped");
        exact &= ended == number("accepted") && number("accepted") == accepted && number("dropped") == 0;
    }
    println!("the balance is {}\n", if exact { "exact" } else { "NOT exact" });
    exact
}

fn print_examples(sandbox: &Sandbox) {
    for vendor in Vendor::ALL {
        for kind in [TakenKind::Track, TakenKind::Identify] {
            if let Some(taken) = sandbox.taken(vendor).into_iter().find(|taken| taken.kind == kind) {
                println!("{} received {}", vendor.name(), taken.event);
            }
        }
    }
}
