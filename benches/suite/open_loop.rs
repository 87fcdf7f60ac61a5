//! A caller with a timetable: each event is due at its time, whatever became of
//! the others, and its latency counts from then. One thread that never sleeps,
//! because timers are coarser than what is measured; it tells how late it was
//! itself.

use std::{cell::RefCell, collections::BTreeMap, future::poll_fn, rc::Rc, time::Duration};

use anyhow::ensure;
use bytes::Bytes;
use h2::client;
use hdrhistogram::Histogram;
use hyper::Request;
use tokio::{
    net::TcpStream,
    task::{LocalSet, spawn_local, yield_now},
    time::Instant,
};

use crate::floors::TCP_BYTES;

/// Connections over which HTTP/2 calls are spread.
const CONNECTIONS: usize = 4;
/// Calls at once on each of them before the server has said how many it allows.
const STREAMS_AT_FIRST: usize = 100;
/// How long answers may take after the last event.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a round found, in nanoseconds.
pub(crate) struct Round {
    latencies: Histogram<u64>,
    /// How late events were sent.
    lateness: Histogram<u64>,
    /// Why calls failed, and how often.
    failures: BTreeMap<String, u64>,
}

impl Round {
    fn new() -> Self {
        let empty = || Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("legal bounds");
        Self { latencies: empty(), lateness: empty(), failures: BTreeMap::new() }
    }

    /// Microseconds that this share of the events took at most.
    pub(crate) fn micros(&self, share: f64) -> f64 {
        micros(&self.latencies, share)
    }

    /// Microseconds that this share of the events was late at most, by the caller's
    /// own fault.
    pub(crate) fn late_micros(&self, share: f64) -> f64 {
        micros(&self.lateness, share)
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures for a person")]
fn micros(nanos: &Histogram<u64>, share: f64) -> f64 {
    nanos.value_at_quantile(share) as f64 / 1000.0
}

/// What is called.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpenCall {
    path: &'static str,
    content_type: &'static str,
    /// They say how it ended.
    has_trailers: bool,
}

impl OpenCall {
    const TRACK_EVENT: Self = Self {
        path: "/analytics.v1.AnalyticsService/TrackEvent",
        content_type: "application/grpc",
        has_trailers: true,
    };

    /// A path that takes JSON.
    pub(crate) const fn json(path: &'static str) -> Self {
        Self { path, content_type: "application/json", has_trailers: false }
    }
}

/// So many events a second, for so long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timetable {
    pub(crate) rate: u32,
    pub(crate) seconds: f64,
}

impl Timetable {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some thousands")]
    pub(crate) fn events(self) -> u64 {
        (f64::from(self.rate) * self.seconds) as u64
    }

    fn due(self, start: Instant, number: u64) -> Instant {
        start + Duration::from_nanos(number * 1_000_000_000 / u64::from(self.rate))
    }

    /// Sends messages over bare TCP to `floors`.
    pub(crate) async fn over_tcp(self, addr: &str) -> anyhow::Result<Round> {
        let addr = addr.to_owned();
        on_own_thread(move || async move {
            let stream = TcpStream::connect(addr).await?;
            stream.set_nodelay(true)?;
            let (message, mut answers) = (vec![1; TCP_BYTES.0], vec![0; 1 << 16]);
            let (mut round, mut left) = (Round::new(), 0);
            let (start, mut sent, mut answered) = (Instant::now(), 0, 0);
            while answered < self.events() {
                let now = Instant::now();
                if sent < self.events() && self.due(start, sent) <= now {
                    round.lateness.saturating_record(nanos(self.due(start, sent)));
                    // A message is far smaller than the socket's buffer.
                    ensure!(stream.try_write(&message)? == message.len(), "the socket is full");
                    sent += 1;
                }
                if let Ok(read) = stream.try_read(&mut answers) {
                    left += read;
                    for _ in 0..left / TCP_BYTES.1 {
                        round.latencies.saturating_record(nanos(self.due(start, answered)));
                        answered += 1;
                    }
                    left %= TCP_BYTES.1;
                }
                ensure!(
                    now < self.due(start, self.events()) + PATIENCE,
                    "{answered} of {sent} were answered"
                );
                yield_now().await;
            }
            Ok(round)
        })
        .await
    }

    /// Makes unary calls, each with the next of the framed messages.
    pub(crate) async fn over_grpc(self, addr: &str, messages: Vec<Bytes>) -> anyhow::Result<Round> {
        self.over_h2(addr, OpenCall::TRACK_EVENT, messages).await
    }

    /// Makes calls, each with the next of the bodies.
    pub(crate) async fn over_h2(
        self,
        addr: &str,
        call: OpenCall,
        messages: Vec<Bytes>,
    ) -> anyhow::Result<Round> {
        let addr = addr.to_owned();
        on_own_thread(move || async move {
            let mut senders = Vec::new();
            for _ in 0..CONNECTIONS {
                let stream = TcpStream::connect(&addr).await?;
                stream.set_nodelay(true)?;
                // Answers that wait for this thread are no attack.
                let mut http = client::Builder::new();
                http.data_frame_budget(1 << 30).initial_connection_window_size(1 << 20);
                // A server refuses what comes above its limit before it could say it.
                http.initial_max_send_streams(STREAMS_AT_FIRST);
                let (sender, connection) = http.handshake(stream).await?;
                spawn_local(connection);
                senders.push(sender);
            }
            let request = Request::post(format!("http://{addr}{}", call.path))
                .header("content-type", call.content_type)
                .header("te", "trailers")
                .body(())?;
            let round = Rc::new(RefCell::new(Round::new()));
            let start = Instant::now();
            for (number, message) in (0..self.events()).zip(messages.iter().cycle()) {
                let due = self.due(start, number);
                while Instant::now() < due {
                    yield_now().await;
                }
                round.borrow_mut().lateness.saturating_record(nanos(due));
                let sender = &mut senders[usize::try_from(number)? % CONNECTIONS];
                poll_fn(|cx| sender.poll_ready(cx)).await?;
                let (answer, mut body) = sender.send_request(request.clone(), false)?;
                body.send_data(message.clone(), true)?;
                let round = round.clone();
                spawn_local(async move {
                    let answered = answered(answer, call).await;
                    let round = &mut *round.borrow_mut();
                    match answered {
                        Ok(()) => round.latencies.saturating_record(nanos(due)),
                        Err(error) => *round.failures.entry(error.to_string()).or_default() += 1,
                    }
                });
            }
            let last = Instant::now();
            while Rc::strong_count(&round) > 1 && last.elapsed() < PATIENCE {
                yield_now().await;
            }
            let round = round.replace(Round::new());
            let answered = round.latencies.len();
            ensure!(
                answered == self.events(),
                "{answered} of {} were answered OK: {:?}",
                self.events(),
                round.failures
            );
            Ok(round)
        })
        .await
    }
}

/// An error if it is anything else than OK.
async fn answered(answer: client::ResponseFuture, call: OpenCall) -> anyhow::Result<()> {
    let (head, mut body) = answer.await?.into_parts();
    ensure!(head.status == 200, "{}", head.status);
    while let Some(data) = body.data().await {
        body.flow_control().release_capacity(data?.len())?;
    }
    if !call.has_trailers {
        return Ok(());
    }
    // What is refused at once has its trailers for a head.
    let trailers = body.trailers().await?.unwrap_or(head.headers);
    let said = |name| trailers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
    ensure!(
        trailers.get("grpc-status").is_some_and(|status| status == "0"),
        "status {:?} {:?}",
        said("grpc-status"),
        said("grpc-message")
    );
    Ok(())
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// A runtime that looks at its sockets after every step.
async fn on_own_thread<F>(round: impl FnOnce() -> F + Send + 'static) -> anyhow::Result<Round>
where
    F: Future<Output = anyhow::Result<Round>> + 'static,
{
    let thread = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().event_interval(1).build()?;
        LocalSet::new().block_on(&runtime, round())
    };
    tokio::task::spawn_blocking(thread).await?
}
