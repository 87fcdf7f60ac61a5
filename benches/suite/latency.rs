//! How long a caller waits at a steady rate, beside TCP and a bare echo in the
//! same round. A round in which TCP itself was slow tells nothing and is repeated.

use bytes::Bytes;
use prost::Message;

use crate::{
    floors::Floor,
    open_loop::{Round, Timetable},
    report::{Report, median},
    sink::Sink,
    support::{Relay, reference_event},
};

const ROUNDS: usize = 5;
const TRIES: usize = 15;
const RATES: [u32; 2] = [10_000, 50_000];
const SECONDS: f64 = 2.0;
/// The slowest TCP of a round that counts.
const FLOOR_P99_MICROS: f64 = 1000.0;

pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    for rate in RATES {
        let mut rounds: Vec<[Round; 3]> = Vec::new();
        for _ in 0..TRIES {
            if rounds.len() < ROUNDS {
                let round = round(Timetable { rate, seconds: SECONDS }).await?;
                if round[0].micros(0.99) <= FLOOR_P99_MICROS {
                    rounds.push(round);
                }
            }
        }
        if rounds.is_empty() {
            report.not_run(&format!("open_{rate}"), "TCP alone had a p99 of over 1 ms each time");
            continue;
        }
        for (share, label) in [(0.5, "p50"), (0.99, "p99"), (0.999, "p999")] {
            let names = ["floor_tcp", "floor_echo", "relay"].map(|who| format!("{who}.{rate}.{label}"));
            for (place, name) in names.iter().enumerate() {
                let micros = median(rounds.iter().map(|round| round[place].micros(share)).collect());
                report.add_beside(name, micros, "us", &names[1]);
            }
            let ratios = rounds.iter().map(|round| round[2].micros(share) / round[1].micros(share)).collect();
            report.add(&format!("relay.{rate}.{label}.to_echo_of_the_round"), median(ratios), "ratio");
        }
        let late = |round: &[Round; 3]| round[2].late_micros(0.99);
        report.add(&format!("caller.{rate}.late_p99"), median(rounds.iter().map(late).collect()), "us");
    }
    Ok(())
}

/// TCP, the echo and the relay, one after the other.
async fn round(timetable: Timetable) -> anyhow::Result<[Round; 3]> {
    let tcp = Floor::start("tcp").await?;
    let over_tcp = timetable.over_tcp(&tcp.addr).await?;
    drop(tcp);
    let echo = Floor::start("echo").await?;
    let over_echo = timetable.over_grpc(&echo.addr, messages()).await?;
    drop(echo);

    let sink = Sink::start().await?;
    let data = tempfile::tempdir()?;
    let relay = Relay::start_pinned(&sink.url, data.path(), &[("ANALYTICS_PROVIDER", "segment")]).await?;
    let over_relay = timetable.over_grpc(&relay.grpc_addr, messages()).await?;
    let balance = relay.terminate().await?;
    anyhow::ensure!(balance["delivered"] == timetable.events(), "not all were delivered: {balance}");
    Ok([over_tcp, over_echo, over_relay])
}

/// Framed messages of a thousand users.
pub(crate) fn messages() -> Vec<Bytes> {
    let framed = |number| {
        let message = reference_event(number).encode_to_vec();
        let length = u32::try_from(message.len()).unwrap_or_default().to_be_bytes();
        [&[0], &length[..], &message].concat().into()
    };
    (0..1000).map(framed).collect()
}
