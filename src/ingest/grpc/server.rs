//! The server behind the gRPC front door, with every limit set.
//!
//! hyper serves each connection; tonic's own server closes an old connection
//! without a word, with the calls that are under way on it. Callers' deadlines
//! reach us as resets.

use std::{convert::Infallible, future::Future, pin::pin, sync::Arc, time::Duration};

use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::{server::NamedService, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};

use super::{
    front_door::FrontDoor,
    service::{AnalyticsService, STREAM_AGE_MAX},
};
use crate::{
    health::Health,
    ingest::{
        budget::Receiving,
        connections::{Behind, Door, Lifetime, Port, Tending},
    },
    listener::Connection,
    proto::v1::DESCRIPTOR_SET,
};

/// Largest head of a call that is read: more than its metadata may have, so that one
/// which is too large is told so. What is larger still HTTP/2 answers by itself, with
/// 431, which callers take for UNKNOWN.
const HEADER_BYTES_MAX: u32 = 32 * 1024;
/// Most calls at a time on one connection.
const STREAMS_MAX: u32 = 100;
/// What one call may have sent that is not read yet, and which part of what all calls
/// of its connection may: a stream that is held back must not keep the others from
/// being heard. For the connection's see [`ReceiveBudget`](crate::ingest::budget::ReceiveBudget).
const STREAM_WINDOW_BYTES_MAX: u32 = 256 * 1024;
const STREAM_WINDOW_SHARE: u32 = 4;
/// Largest message to a service that is not ours.
const OTHERS_BYTES_MAX: usize = 4 * 1024;
/// Answers of one call that wait for its caller to read them.
const SEND_BYTES_MAX: usize = 64 * 1024;
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

const LIFETIME: Lifetime = Lifetime {
    idle: Duration::from_secs(150),
    age_max: Duration::from_secs(30 * 60),
    grace: STREAM_AGE_MAX.saturating_add(Duration::from_secs(30)),
};

/// Serves until `stop`, then lets calls under way finish; unbounded, so the
/// caller sets a limit.
pub(crate) async fn serve(port: Port, behind: Behind, stop: impl Future<Output = ()>) {
    let Behind { admission, health, budget, query, metrics } = behind;
    let (reporter, standard_health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let others = move || {
        // Their messages are not counted against the budget, so they are small.
        let compiled = "the descriptors were compiled with the binary";
        let v1 = reflection().build_v1().expect(compiled);
        let v1alpha = reflection().build_v1alpha().expect(compiled);
        Routes::new(standard_health.max_decoding_message_size(OTHERS_BYTES_MAX))
            .add_service(v1.max_decoding_message_size(OTHERS_BYTES_MAX))
            .add_service(v1alpha.max_decoding_message_size(OTHERS_BYTES_MAX))
    };
    let front_door = FrontDoor::new(admission, health.clone(), query, metrics.read_slowly.clone());
    let service = AnalyticsService::new(front_door, others, metrics.clone());
    let door = GrpcDoor(Arc::new(service));
    tokio::select! {
        () = port.serve(door, LIFETIME, budget, &metrics, stop) => {}
        never = report_health(reporter, health) => match never {},
    }
}

#[derive(Clone)]
struct GrpcDoor(Arc<AnalyticsService>);

impl Door for GrpcDoor {
    async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        self,
        connection: Connection<S>,
        tending: Tending,
    ) {
        let Self(service) = self;
        let receiving = tending.receiving.clone();
        let http = http2_of(&receiving);
        let answer = service_fn(move |call| {
            let answer = service.clone().answer(call, receiving.begin_call());
            Box::pin(async move { Ok::<_, Infallible>(answer.await) })
        });
        let served = pin!(http.serve_connection(TokioIo::new(connection), answer));
        tending.until_over(served, |served| served.graceful_shutdown()).await;
    }
}

/// HTTP/2 with every limit set.
fn http2_of(receiving: &Receiving) -> http2::Builder<TokioExecutor> {
    let window = receiving.window();
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size((window / STREAM_WINDOW_SHARE).min(STREAM_WINDOW_BYTES_MAX))
        .initial_connection_window_size(window)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_header_list_size(HEADER_BYTES_MAX)
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_send_buf_size(SEND_BYTES_MAX)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .auto_date_header(false);
    http
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
    use std::{
        net::SocketAddr,
        sync::atomic::{AtomicBool, Ordering},
    };

    use prometheus_client::metrics::counter::Counter;
    use tokio::{net::TcpListener, time::sleep};
    use tonic::Code;

    use super::*;
    use crate::{
        address::IpPolicy,
        admission::Admission,
        ingest::budget::ReceiveBudget,
        listener::ConnectionLimits,
        proto::v1::{
            TrackBatchItem, TrackBatchRequest, TrackBatchResponse, TrackEventRequest,
            analytics_service_client::AnalyticsServiceClient, track_batch_item,
        },
        query::Query,
        queue::{Queue, QueueLimits, memory},
        shutdown::Stop,
        telemetry::{IngestMetrics, Telemetry},
        time::Clock,
    };

    const LIMITS: ConnectionLimits = ConnectionLimits { all: 10, of_peer: None };

    fn budget() -> Arc<ReceiveBudget> {
        ReceiveBudget::new(4 << 20, Counter::default())
    }

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
        let port = Port { listener, tls: None, limits: LIMITS, ip_policy: IpPolicy::default() };
        let query = Query::of_nothing();
        let behind = Behind { admission, health, budget: budget(), query, metrics: metrics.clone() };
        let server = serve(port, behind, std::future::pending());
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

    /// A door whose connections live so long, and what it counts.
    async fn serving(lifetime: Lifetime) -> (SocketAddr, IngestMetrics) {
        let telemetry = &mut Telemetry::new(0);
        let metrics = telemetry.ingest();
        let (queue, receiver) = memory::bounded(QueueLimits { events_max: 1000, bytes_max: 1 << 20 });
        let queue_of_admission = Queue::Memory(queue.clone(), telemetry.accepted());
        let admission = Arc::new(Admission::new(queue_of_admission, Clock::system(), telemetry.admission()));
        let health = Arc::new(Health::new(Stop::default(), queue, Vec::new(), None));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let door = FrontDoor::new(admission, health, Query::of_nothing(), Counter::default());
        let service = Arc::new(AnalyticsService::new(door, Routes::default, metrics.clone()));
        let port = Port { listener, tls: None, limits: LIMITS, ip_policy: IpPolicy::default() };
        let counts = metrics.clone();
        tokio::spawn(async move {
            // Nobody takes the events, and they find room.
            let _receiver = receiver;
            port.serve(GrpcDoor(service), lifetime, budget(), &counts, std::future::pending()).await;
        });
        (addr, metrics)
    }

    /// PINGs keep no connection: only calls do.
    #[tokio::test]
    async fn a_connection_without_calls_is_closed_and_one_with_a_call_is_not() {
        let minute = Duration::from_secs(60);
        let lifetime = Lifetime { idle: Duration::from_millis(50), age_max: minute, grace: minute };
        let (addr, metrics) = serving(lifetime).await;

        let mut client = AnalyticsServiceClient::connect(format!("http://{addr}")).await.unwrap();
        let (requests, stream) = tokio::sync::mpsc::channel(1);
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        let mut answers = client.track_stream(stream).await.unwrap().into_inner();
        let io = tokio::net::TcpStream::connect(addr).await.unwrap();
        let (_caller, mut connection) = h2::client::handshake(io).await.unwrap();
        let mut pings = connection.ping_pong().unwrap();
        let pinging = async { while pings.ping(h2::Ping::opaque()).await.is_ok() {} };
        let (_, closed) = tokio::join!(pinging, connection);
        assert!(closed.is_ok(), "{closed:?}");
        sleep(Duration::from_millis(200)).await;
        // The stream has brought nothing in all that time, and goes on.
        requests.send(TrackBatchRequest::default()).await.unwrap();
        assert_eq!(answers.message().await.unwrap(), Some(TrackBatchResponse::default()));
        assert_eq!(metrics.connections.get(), 1);
    }

    #[tokio::test]
    async fn an_old_connection_is_replaced_and_cuts_no_call_off() {
        let minute = Duration::from_secs(60);
        let lifetime = Lifetime { idle: minute, age_max: Duration::from_millis(100), grace: minute };
        let (addr, metrics) = serving(lifetime).await;

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
