//! A provider that counts and does nothing else, so that it costs little beside
//! the relay. What a vendor really takes is the sandbox's business.

use std::{
    convert::Infallible,
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use analytics_relay::providers::sandbox::Vendor;
use bytes::Bytes;
use flate2::read::GzDecoder;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use memchr::memmem;
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{Instant, sleep},
};

/// See the module.
pub(crate) struct Sink {
    pub(crate) url: String,
    shared: Arc<Shared>,
}

struct Shared {
    /// By vendor: events, and how long an answer takes.
    taken: [AtomicU64; 3],
    delay_ms: [AtomicU64; 3],
    /// Answer with 503.
    failing: AtomicBool,
    /// Answer nothing.
    hangs: watch::Sender<bool>,
}

impl Sink {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let shared = Arc::new(Shared {
            taken: Default::default(),
            delay_ms: Default::default(),
            failing: AtomicBool::new(false),
            hangs: watch::Sender::new(false),
        });
        let serving = shared.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let shared = serving.clone();
                let service = service_fn(move |request| take(request, shared.clone()));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Ok(Self { url, shared })
    }

    /// Events that a vendor has taken.
    pub(crate) fn taken(&self, vendor: Vendor) -> u64 {
        self.shared.taken[vendor as usize].load(Ordering::Relaxed)
    }

    /// Waits until a vendor has taken so many events.
    pub(crate) async fn wait_for(
        &self,
        vendor: Vendor,
        events: u64,
        patience: Duration,
    ) -> anyhow::Result<()> {
        let start = Instant::now();
        while self.taken(vendor) < events {
            anyhow::ensure!(start.elapsed() < patience, "{} of {events} events came", self.taken(vendor));
            sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    pub(crate) fn delay(&self, vendor: Vendor, delay_ms: u64) {
        self.shared.delay_ms[vendor as usize].store(delay_ms, Ordering::Relaxed);
    }

    pub(crate) fn fail(&self, failing: bool) {
        self.shared.failing.store(failing, Ordering::Relaxed);
    }

    pub(crate) fn hang(&self, hangs: bool) {
        self.shared.hangs.send_replace(hangs);
    }
}

async fn take(request: Request<Incoming>, shared: Arc<Shared>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (vendor, mark) = match request.uri().path() {
        "/import" => (Vendor::Mixpanel, "\"$insert_id\":"),
        "/batch" => (Vendor::Amplitude, "\"insert_id\":"),
        _ => (Vendor::Segment, "\"messageId\":"),
    };
    let is_zipped = request.headers().contains_key("content-encoding");
    let Ok(body) = request.into_body().collect().await else { return Ok(Response::default()) };
    let mut body = body.to_bytes();
    let _ = shared.hangs.subscribe().wait_for(|hangs| !hangs).await;
    let delay_ms = shared.delay_ms[vendor as usize].load(Ordering::Relaxed);
    if delay_ms > 0 {
        sleep(Duration::from_millis(delay_ms)).await;
    }
    if shared.failing.load(Ordering::Relaxed) {
        let mut answer = Response::default();
        *answer.status_mut() = hyper::StatusCode::SERVICE_UNAVAILABLE;
        return Ok(answer);
    }
    if is_zipped {
        let mut plain = Vec::new();
        let _ = GzDecoder::new(&body[..]).read_to_end(&mut plain);
        body = plain.into();
    }
    let events = memmem::find_iter(&body, mark).count();
    shared.taken[vendor as usize].fetch_add(events as u64, Ordering::Relaxed);
    let answer = match vendor {
        Vendor::Mixpanel => format!(r#"{{"code":200,"num_records_imported":{events},"status":"OK"}}"#),
        Vendor::Amplitude => format!(r#"{{"code":200,"events_ingested":{events}}}"#),
        Vendor::Segment => r#"{"success":true}"#.to_owned(),
    };
    Ok(Response::new(Full::new(answer.into())))
}
