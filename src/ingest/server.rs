//! The server behind the gRPC front door, with every limit set.

use std::{any::Any, future::Future, sync::Arc, time::Duration};

use tokio::net::TcpListener;
use tonic::{Status, server::NamedService, transport::Server};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::error;

use super::{
    grpc::FrontDoor,
    observe::ObserveLayer,
    service::{AnalyticsService, STREAM_AGE_MAX},
};
use crate::{
    admission::Admission, health::Health, listener::Connections, proto::v1::DESCRIPTOR_SET,
    telemetry::IngestMetrics,
};

/// Largest head of a call.
const HEADER_BYTES_MAX: u32 = 8 * 1024;
/// Most calls at a time on one connection.
const STREAMS_MAX: u32 = 100;
/// Most calls of one connection that its caller has reset and we have not seen
/// off yet (CVE-2023-44487): as many as a caller can have open whose deadlines
/// all pass at once.
const RESETS_MAX: usize = STREAMS_MAX as usize;
/// Longest time from a call's head to its answer, or to the beginning of its
/// answers; only a caller that sends its message slowly comes near it.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection is closed after this time, so that callers spread over relays
/// that were added.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(30 * 60);
/// And its calls have this long to finish.
const CONNECTION_AGE_GRACE: Duration = STREAM_AGE_MAX.saturating_add(Duration::from_secs(30));
/// A silent connection is asked whether it is alive,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
/// and closed if it does not answer.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Serves until `stop`, then lets calls under way finish; unbounded, so the
/// caller sets a limit.
pub(crate) async fn serve(
    listener: TcpListener,
    connections_max: usize,
    admission: Arc<Admission>,
    health: Arc<Health>,
    metrics: IngestMetrics,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let panics = metrics.panics.clone();
    let on_panic = move |panic: Box<dyn Any + Send>| {
        drop(panic);
        panics.inc();
        error!("a defect: a call's handler panicked; its caller got INTERNAL");
        Status::internal("a defect of the relay; the event may or may not have been accepted")
            .into_http::<tonic::body::Body>()
    };
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };

    let (reporter, standard_health) = tonic_health::server::health_reporter();
    let incoming = Connections::new(listener, connections_max, metrics.connections.clone()).into_stream();
    let server = Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(RESETS_MAX))
        .max_connection_age(CONNECTION_AGE_MAX)
        .max_connection_age_grace(CONNECTION_AGE_GRACE)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .timeout(CALL_TIMEOUT)
        .layer(ObserveLayer(metrics.clone()))
        .layer(CatchPanicLayer::custom(on_panic))
        .add_service(AnalyticsService::new(FrontDoor::new(admission, health.clone()), metrics))
        .add_service(standard_health)
        .add_service(reflection().build_v1().expect("the descriptors were compiled with the binary"))
        .add_service(reflection().build_v1alpha().expect("the descriptors were compiled with the binary"))
        .serve_with_incoming_shutdown(incoming, stop);

    tokio::select! {
        served = server => served,
        never = report_health(reporter, health) => match never {},
    }
}

/// Keeps the standard health service in step with ours.
async fn report_health(reporter: HealthReporter, health: Arc<Health>) -> std::convert::Infallible {
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
        proto::v1::{TrackEventRequest, analytics_service_client::AnalyticsServiceClient},
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
        let server = serve(listener, 10, admission, health, metrics.clone(), std::future::pending());
        tokio::spawn(server);

        let mut client = AnalyticsServiceClient::connect(format!("http://{addr}")).await.unwrap();
        let request = || TrackEventRequest { event_name: "x".into(), ..Default::default() };
        let status = client.track_event(request()).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal);
        assert!(!status.message().contains("assert"), "no inner detail: {status:?}");
        assert_eq!(metrics.panics.get(), 1);
        // The same connection goes on.
        broken.store(false, Ordering::SeqCst);
        assert!(client.track_event(request()).await.unwrap().into_inner().success);
        let page = telemetry.encode().unwrap();
        assert!(page.contains(r#"relay_requests_total{method="TrackEvent",code="INTERNAL"} 1"#), "{page}");
    }
}
