//! Sends events at a steady rate, or as fast as the relay answers, and says how
//! long the answers took.
//!
//! ```sh
//! cargo run --release --example load -- --rate 2000 --seconds 10
//! ```
//!
//! At a rate, a latency counts from the moment at which the event was due, so a
//! stall of the relay is not hidden by the events that it kept from being sent.

use std::time::{Duration, Instant};

use analytics_relay::proto::v1::{
    PropertyValue, TrackEventRequest, analytics_service_client::AnalyticsServiceClient, property_value::Value,
};
use clap::Parser;
use hdrhistogram::Histogram;
use tokio::{
    sync::mpsc,
    time::{interval, sleep_until},
};
use tonic::{Code, transport::Channel};

/// Sends events to a relay.
#[derive(Debug, Clone, Parser)]
struct Args {
    /// The relay
    #[arg(long, default_value = "http://127.0.0.1:50054")]
    addr: String,
    /// Events a second; 0 means as fast as the relay answers
    #[arg(long, default_value_t = 1000)]
    rate: u64,
    /// How long
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Connections
    #[arg(long, default_value_t = 4)]
    connections: usize,
    /// Calls under way on each connection
    #[arg(long, default_value_t = 16)]
    in_flight: usize,
    /// Distinct users
    #[arg(long, default_value_t = 1000)]
    users: u64,
}

/// One answer.
struct Answer {
    latency: Duration,
    code: Code,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (answers, mut received) = mpsc::unbounded_channel();
    let start = Instant::now();
    let workers = (args.connections * args.in_flight) as u64;
    for connection in 0..args.connections {
        let channel = Channel::from_shared(args.addr.clone())?.connect().await?;
        for slot in 0..args.in_flight {
            let worker = (connection * args.in_flight + slot) as u64;
            tokio::spawn(send(channel.clone(), args.clone(), worker, workers, start, answers.clone()));
        }
    }
    drop(answers);

    let mut latencies = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3)?;
    let (mut accepted, mut refused, mut failed) = (0_u64, 0_u64, 0_u64);
    let mut progress = interval(Duration::from_secs(1));
    progress.tick().await;
    loop {
        tokio::select! {
            answer = received.recv() => match answer {
                Some(Answer { latency, code }) => {
                    latencies.saturating_record(u64::try_from(latency.as_micros())?);
                    match code {
                        Code::Ok => accepted += 1,
                        Code::ResourceExhausted | Code::Unavailable => refused += 1,
                        _ => failed += 1,
                    }
                }
                None => break,
            },
            _ = progress.tick() => {
                println!("{:>4} s  accepted {accepted}  refused {refused}  failed {failed}", start.elapsed().as_secs());
            }
        }
    }

    let millis =
        |share: f64| Duration::from_micros(latencies.value_at_quantile(share)).as_secs_f64() * 1000.0;
    #[expect(clippy::cast_precision_loss, reason = "a rate for a person")]
    let rate = accepted as f64 / start.elapsed().as_secs_f64();
    println!("accepted {accepted} ({rate:.0}/s), refused {refused}, failed {failed}");
    println!(
        "latency ms: p50 {:.3}  p95 {:.3}  p99 {:.3}  p99.9 {:.3}  max {:.3}",
        millis(0.5),
        millis(0.95),
        millis(0.99),
        millis(0.999),
        millis(1.0)
    );
    Ok(())
}

/// Sends every `workers`-th event.
async fn send(
    channel: Channel,
    args: Args,
    worker: u64,
    workers: u64,
    start: Instant,
    answers: mpsc::UnboundedSender<Answer>,
) {
    let mut client = AnalyticsServiceClient::new(channel);
    let end = start + Duration::from_secs(args.seconds);
    for turn in 0_u64.. {
        let number = turn * workers + worker;
        let due = match Duration::from_secs(number).checked_div(u32::try_from(args.rate).unwrap_or(u32::MAX))
        {
            Some(offset) => start + offset,
            None => Instant::now(),
        };
        if due >= end {
            return;
        }
        sleep_until(due.into()).await;
        let code = match client.track_event(event(number, args.users)).await {
            Ok(_) => Code::Ok,
            Err(status) => status.code(),
        };
        if answers.send(Answer { latency: due.elapsed(), code }).is_err() {
            return;
        }
    }
}

fn event(number: u64, users: u64) -> TrackEventRequest {
    let property = |value| PropertyValue { value: Some(value) };
    TrackEventRequest {
        event_name: "Order Placed".to_owned(),
        user_id: format!("user-{}", number % users.max(1)),
        properties: [
            ("sku", property(Value::StringValue(format!("SKU-{}", number % 100)))),
            ("total", property(Value::NumberValue(19.5))),
            ("quantity", property(Value::IntegerValue(3))),
            ("gift", property(Value::BoolValue(false))),
            ("currency", property(Value::StringValue("EUR".to_owned()))),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into(),
        ..TrackEventRequest::default()
    }
}
