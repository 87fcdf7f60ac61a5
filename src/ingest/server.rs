//! The server behind the gRPC front door, with every limit set.
//!
//! hyper serves each connection; tonic's own server closes an old connection
//! without a word, with the calls that are under way on it. Callers' deadlines
//! reach us as resets.

use std::{convert::Infallible, future::Future, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prometheus_client::metrics::counter::Counter;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    task::JoinSet,
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tonic::{server::NamedService, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::debug;

use super::{
    grpc::FrontDoor,
    service::{AnalyticsService, STREAM_AGE_MAX},
    tls::{RENEWAL_INTERVAL, Tls},
};
use crate::{
    admission::Admission,
    health::Health,
    listener::{Connection, Connections},
    proto::v1::DESCRIPTOR_SET,
    telemetry::IngestMetrics,
};

/// Largest head of a call.
const HEADER_BYTES_MAX: u32 = 8 * 1024;
/// Most calls at a time on one connection.
const STREAMS_MAX: u32 = 100;
/// What one call, and all calls of a connection, may have sent that is not read
/// yet. A stream that is held back must not keep the others from being heard.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// Largest piece of a message: from callers that heed it, a batch of the usual size
/// comes in one and need not be put together.
const FRAME_BYTES_MAX: u32 = 64 * 1024;
/// Most calls of one connection that its caller has reset and we have not seen
/// off yet (CVE-2023-44487): as many as a caller can have open whose deadlines
/// all pass at once.
const RESETS_MAX: usize = STREAMS_MAX as usize;
/// A silent connection is asked whether it is alive,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
/// and closed if it does not answer.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a connection lives.
#[derive(Debug, Clone, Copy)]
struct Lifetime {
    /// After this time its caller is told to make a new one, so that callers
    /// spread over relays that were added; a tenth more or less, so that those
    /// which came together do not go together.
    age_max: Duration,
    /// And its calls have this long to finish.
    grace: Duration,
}

const LIFETIME: Lifetime = Lifetime {
    age_max: Duration::from_secs(30 * 60),
    grace: STREAM_AGE_MAX.saturating_add(Duration::from_secs(30)),
};

/// Serves until `stop`, then lets calls under way finish; unbounded, so the
/// caller sets a limit.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    connections_max: usize,
    admission: Arc<Admission>,
    health: Arc<Health>,
    metrics: IngestMetrics,
    stop: impl Future<Output = ()>,
) {
    let connections = Connections::new(listener, connections_max, metrics.connections.clone());
    let (reporter, standard_health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let others = move || {
        Routes::new(standard_health)
            .add_service(reflection().build_v1().expect("the descriptors were compiled with the binary"))
            .add_service(reflection().build_v1alpha().expect("the descriptors were compiled with the binary"))
    };
    let handshakes_failed = metrics.handshakes_failed.clone();
    let service = Arc::new(AnalyticsService::new(FrontDoor::new(admission, health.clone()), others, metrics));
    let tls = tls.map(Arc::new);
    let renewals = tls.clone();
    let door = Door { tls, handshakes_failed, service, lifetime: LIFETIME };
    tokio::select! {
        () = serve_connections(connections, door, stop) => {}
        never = report_health(reporter, health) => match never {},
        Some(never) = async { Some(renewals?.follow_renewals(RENEWAL_INTERVAL).await) } => match never {},
    }
}

/// What every connection is served with.
#[derive(Clone)]
struct Door {
    tls: Option<Arc<Tls>>,
    handshakes_failed: Counter,
    service: Arc<AnalyticsService>,
    lifetime: Lifetime,
}

async fn serve_connections(mut connections: Connections, door: Door, stop: impl Future<Output = ()>) {
    let (mut open, closing) = (JoinSet::new(), CancellationToken::new());
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            (connection, peer) = connections.next() => {
                open.spawn(door.clone().serve(connection, peer, closing.clone()));
            }
            Some(_) = open.join_next() => {}
            () = &mut stop => break,
        }
    }
    drop(connections);
    closing.cancel();
    while open.join_next().await.is_some() {}
}

impl Door {
    async fn serve(self, connection: Connection, peer: SocketAddr, closing: CancellationToken) {
        let Some(tls) = self.tls else {
            return serve_calls(connection, self.service, self.lifetime, closing).await;
        };
        let secured = tokio::select! {
            secured = connection.upgrade(|stream| async move { tls.accept(stream).await }) => secured,
            () = closing.cancelled() => return,
        };
        match secured {
            Ok(connection) => serve_calls(connection, self.service, self.lifetime, closing).await,
            Err(error) => {
                self.handshakes_failed.inc();
                debug!(%peer, %error, "TLS handshake failed");
            }
        }
    }
}

/// Serves a connection until its caller closes it, or until it is old or the
/// server is `closing`: then it takes no more calls and ends with its last one.
async fn serve_calls<S: AsyncRead + AsyncWrite + Unpin>(
    connection: Connection<S>,
    service: Arc<AnalyticsService>,
    lifetime: Lifetime,
    closing: CancellationToken,
) {
    let answer = service_fn(move |call| {
        let answer = service.clone().answer(call);
        Box::pin(async move { Ok::<_, Infallible>(answer.await) })
    });
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_header_list_size(HEADER_BYTES_MAX)
        .max_pending_accept_reset_streams(RESETS_MAX)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .auto_date_header(false);
    let mut served = pin!(http.serve_connection(TokioIo::new(connection), answer));
    let age_max = lifetime.age_max.mul_f64(0.9 + fastrand::f64() / 5.0);
    let ended = tokio::select! {
        ended = served.as_mut() => Some(ended),
        () = sleep(age_max) => None,
        () = closing.cancelled() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            served.as_mut().graceful_shutdown();
            tokio::select! {
                ended = served => ended,
                () = sleep(lifetime.grace) => return debug!("an old connection was cut off"),
            }
        }
    };
    if let Err(error) = ended {
        debug!(error = &error as &dyn std::error::Error, "connection failed");
    }
}

/// Keeps the standard health service in step with ours.
async fn report_health(reporter: HealthReporter, health: Arc<Health>) -> Infallible {
    let mut broken = health.spool_broken();
    loop {
        let status = if health.is_ready() { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in [AnalyticsService::NAME, ""] {
            reporter.set_service_status(service, status).await;
        }
        tokio::select! {
            () = health.draining(), if !health.is_draining() => {}
            Ok(()) = broken.changed() => {}
            else => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tonic::Code;

    use super::*;
    use crate::{
        proto::v1::{
            TrackBatchItem, TrackBatchRequest, TrackBatchResponse, TrackEventRequest,
            analytics_service_client::AnalyticsServiceClient, track_batch_item,
        },
        queue::{Queue, QueueLimits, memory},
        shutdown::Stop,
        telemetry::Telemetry,
        time::Clock,
    };

    #[tokio::test]
    async fn a_panic_in_a_handler_is_internal_for_that_caller_and_counted() {
        let broken = Arc::new(AtomicBool::new(true));
        let is_broken = broken.clone();
        let clock = Clock::from_fn(move || {
            assert!(!is_broken.load(Ordering::SeqCst), "a defect");
            1_767_225_600_000
        });
        let mut telemetry = Telemetry::new(0);
        let metrics = telemetry.ingest();
        let (queue, _receiver) = memory::bounded(QueueLimits { events_max: 10, bytes_max: 1 << 20 });
        let admission = Arc::new(Admission::new(
            Queue::Memory(queue.clone(), telemetry.accepted()),
            clock,
            telemetry.admission(),
        ));
        let health = Arc::new(Health::new(Stop::default(), queue, Vec::new(), None));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let server = serve(listener, None, 10, admission, health, metrics.clone(), std::future::pending());
        tokio::spawn(server);

        let mut client = AnalyticsServiceClient::connect(format!("http://{addr}")).await.unwrap();
        let request = || TrackEventRequest { event_name: "x".into(), ..Default::default() };
        let status = client.track_event(request()).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal);
        assert!(!status.message().contains("assert"), "no inner detail: {status:?}");
        assert_eq!(metrics.panics.get(), 1);
        let batch = TrackBatchRequest {
            items: vec![TrackBatchItem { item: Some(track_batch_item::Item::Track(request())) }],
        };
        let mut answers = client.track_stream(tokio_stream::iter([batch])).await.unwrap().into_inner();
        assert_eq!(answers.message().await.unwrap_err().code(), Code::Internal);
        assert_eq!(metrics.panics.get(), 2);
        // The same connection goes on.
        broken.store(false, Ordering::SeqCst);
        assert!(client.track_event(request()).await.unwrap().into_inner().success);
        let page = telemetry.encode().unwrap();
        assert!(page.contains(r#"relay_requests_total{method="TrackEvent",code="INTERNAL"} 1"#), "{page}");
    }

    #[tokio::test]
    async fn an_old_connection_is_replaced_and_cuts_no_call_off() {
        let telemetry = &mut Telemetry::new(0);
        let metrics = telemetry.ingest();
        let (queue, _receiver) = memory::bounded(QueueLimits { events_max: 1000, bytes_max: 1 << 20 });
        let admission = Arc::new(Admission::new(
            Queue::Memory(queue.clone(), telemetry.accepted()),
            Clock::system(),
            telemetry.admission(),
        ));
        let health = Arc::new(Health::new(Stop::default(), queue, Vec::new(), None));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let connections = Connections::new(listener, 10, metrics.connections.clone());
        let door = FrontDoor::new(admission, health);
        let service = Arc::new(AnalyticsService::new(door, Routes::default, metrics.clone()));
        let lifetime = Lifetime { age_max: Duration::from_millis(100), grace: Duration::from_secs(60) };
        let handshakes_failed = metrics.handshakes_failed.clone();
        let door = Door { tls: None, handshakes_failed, service, lifetime };
        tokio::spawn(serve_connections(connections, door, std::future::pending()));

        let mut client = AnalyticsServiceClient::connect(format!("http://{addr}")).await.unwrap();
        let (requests, stream) = tokio::sync::mpsc::channel(1);
        requests.send(TrackBatchRequest::default()).await.unwrap();
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        let mut answers = client.track_stream(stream).await.unwrap().into_inner();
        assert_eq!(answers.message().await.unwrap(), Some(TrackBatchResponse::default()));
        let request = || TrackEventRequest { event_name: "x".into(), ..Default::default() };
        let start = tokio::time::Instant::now();
        // A second connection shows that the first takes no calls any more.
        while metrics.connections.get() < 2 {
            assert!(start.elapsed() < Duration::from_secs(20));
            // hyper's client gives up a call that it had for the old connection.
            if let Err(status) = client.track_event(request()).await {
                assert_eq!(status.code(), Code::Cancelled);
            }
            sleep(Duration::from_millis(5)).await;
        }
        assert!(start.elapsed() >= Duration::from_millis(90));
        requests.send(TrackBatchRequest::default()).await.unwrap();
        assert_eq!(answers.message().await.unwrap(), Some(TrackBatchResponse::default()));
        drop(requests);
        assert_eq!(answers.message().await.unwrap(), None);
    }
}
