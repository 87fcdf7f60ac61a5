//! Relay, sandbox and a sender together: `make demo` and `make demo-crash`.
//!
//! In both the relay runs as a process of its own. In the first, it is ended
//! with SIGTERM while the sender is still sending; Amplitude loses one answer in
//! five and Segment is down for a while. At the end the relay's balance stands
//! beside what the sandbox received. The second is in `crash.rs`.

use std::{
    env,
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::analytics_service_client::AnalyticsServiceClient,
    providers::sandbox::{Options, Sandbox, TakenKind, Vendor},
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, time::sleep};
use tonic::transport::Channel;

mod crash;
mod relay;

use relay::{KEY, Relay, send_one};

/// Events a second over gRPC,
const RATE: u32 = 400;
/// and pages over HTTP, as an SDK of Segment's sends them.
const PAGE_RATE: u32 = 50;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let sandbox = Sandbox::start(Options { key: KEY.to_owned(), ..Options::default() }).await?;
    let data_dir = env::temp_dir().join(format!("analytics-relay-demo-{}", std::process::id()));
    println!("sandbox for all three providers at {}", sandbox.url());
    let shown = match env::args().nth(1).as_deref() {
        Some("crash") => crash::show(&sandbox, &data_dir).await,
        seconds => show_drain(&sandbox, &data_dir, seconds.map_or(Ok(6), str::parse)?).await,
    };
    std::fs::remove_dir_all(&data_dir)?;
    shown
}

async fn show_drain(sandbox: &Sandbox, data_dir: &std::path::Path, seconds: u64) -> anyhow::Result<()> {
    let relay = Relay::start(sandbox, data_dir, &[]).await?;
    let process = relay.child.id().unwrap_or_default();
    println!("relay at {} (gRPC) and {} (HTTP), process {process}", relay.addr, relay.http_addr);

    sandbox.always(Vendor::Amplitude, Some("20%reset-after".parse()?));
    sandbox.always(Vendor::Segment, Some("503".parse()?));
    println!("amplitude loses one answer in five; segment is down for a while\n");

    let longest = Duration::from_secs(seconds + 5);
    let sender = tokio::spawn(send(relay.client().await?, longest));
    let pages = tokio::spawn(send_pages(relay.http_addr.clone(), longest));
    let start = Instant::now();
    for second in 1..=seconds {
        sleep((start + Duration::from_secs(second)).saturating_duration_since(Instant::now())).await;
        println!("{second:>3} s  {}", received(sandbox));
        if second == seconds.div_ceil(2) {
            println!("       segment is back");
            sandbox.always(Vendor::Segment, None);
        }
    }

    println!("\nSIGTERM, with the senders still sending");
    relay.signal("TERM")?;
    let (accepted, pages) = (sender.await?, pages.await?);
    let (balances, code) = relay.ended().await?;
    println!("exit code {code:?}; answered OK {accepted} times over gRPC, {pages} over HTTP\n");
    let accepted = accepted + pages;
    let exact = print_balance(sandbox, &balances);
    let agrees = balances.iter().all(|balance| balance["accepted"] == accepted);
    print_examples(sandbox);
    anyhow::ensure!(exact && agrees && code == Some(0), "the balance is not exact");
    Ok(())
}

/// What the sandbox has got so far.
fn received(sandbox: &Sandbox) -> String {
    let taken = Vendor::ALL.map(|vendor| format!("{} {}", vendor.name(), sandbox.stats(vendor).taken));
    format!("received by {}", taken.join(", "))
}

/// Sends until the relay takes no more; returns how often it answered OK.
async fn send(mut client: AnalyticsServiceClient<Channel>, longest: Duration) -> u64 {
    let start = Instant::now();
    let mut accepted = 0;
    for number in 0_u32.. {
        let due = start + Duration::from_secs(1) * number / RATE;
        sleep(due.saturating_duration_since(Instant::now())).await;
        let answered = send_one(&mut client, number, String::new()).await;
        if answered.is_err() || start.elapsed() > longest {
            break;
        }
        accepted += 1;
    }
    accepted
}

/// The same over HTTP.
async fn send_pages(addr: String, longest: Duration) -> u64 {
    let client = http1_client(&addr).await;
    let Ok(mut client) = client else { return 0 };
    let (start, mut accepted) = (Instant::now(), 0);
    for number in 0_u32.. {
        let due = start + Duration::from_secs(1) * number / PAGE_RATE;
        sleep(due.saturating_duration_since(Instant::now())).await;
        let page = serde_json::json!({
            "userId": format!("user-{}", number % 50),
            "name": "Pricing",
            "properties": {"url": "https://shop.example/pricing"},
        });
        let call =
            Request::post("/v1/page").header("host", &addr).body(Full::new(Bytes::from(page.to_string())));
        let Ok(call) = call else { break };
        let answered = client.send_request(call).await;
        let is_ok = match answered {
            // Its end is waited for, or the connection could not be used again.
            Ok(answer) => answer.status().is_success() && answer.into_body().collect().await.is_ok(),
            Err(_) => false,
        };
        if !is_ok || start.elapsed() > longest {
            break;
        }
        accepted += 1;
    }
    accepted
}

async fn http1_client(addr: &str) -> anyhow::Result<SendRequest<Full<Bytes>>> {
    let stream = TokioIo::new(TcpStream::connect(addr).await?);
    let (client, connection) = hyper::client::conn::http1::handshake(stream).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// The relay's account beside the sandbox's. True if both agree.
fn print_balance(sandbox: &Sandbox, balances: &[Value]) -> bool {
    println!(
        "{:<10} {:>8} {:>8}   {:>9} {:>13} {:>7} {:>7}   {:>16} {:>9}",
        "provider",
        "accepted",
        "reloaded",
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
            "{:<10} {:>8} {:>8} = {:>9} {:>13} {:>7} {:>7}   {:>16} {:>9}",
            balance["provider"].as_str().unwrap_or_default(),
            number("accepted"),
            number("reloaded"),
            number("delivered"),
            number("dead_lettered"),
            number("spilled"),
            number("dropped"),
            taken.len(),
            doubles
        );
        let ended = number("delivered")
            + number("dead_lettered")
            + number("spilled")
            + number("dropped")
            + number("not_for");
        exact &= ended == number("accepted") + number("reloaded") && number("dropped") == 0;
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
