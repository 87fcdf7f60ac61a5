//! The routes of `analytics.v1.AnalyticsService`, each with its limit. Written by
//! hand because the generated router has one limit for all methods.

use std::{
    convert::Infallible,
    future::{Future, ready},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::FutureExt;
use prost::Message;
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    codegen::{self, StdError, http},
    server::{Grpc, NamedService},
};
use tower::{Service, service_fn};

use super::{
    codec::{FromWire, MessageCodec},
    grpc::FrontDoor,
    observe::observe_stream,
};
use crate::telemetry::IngestMetrics;

/// Largest message with one event, in bytes.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Largest message with a batch, in bytes.
const BATCH_BYTES_MAX: usize = 1024 * 1024;
/// A stream is ended after this time, so that its connection can be closed when
/// it is old without cutting an answer off.
pub(super) const STREAM_AGE_MAX: Duration = Duration::from_secs(5 * 60);

/// Hands each call to the [`FrontDoor`].
#[derive(Debug, Clone)]
pub(crate) struct AnalyticsService {
    front_door: Arc<FrontDoor>,
    metrics: IngestMetrics,
}

impl AnalyticsService {
    pub(crate) fn new(front_door: FrontDoor, metrics: IngestMetrics) -> Self {
        Self { front_door: Arc::new(front_door), metrics }
    }
}

impl NamedService for AnalyticsService {
    const NAME: &'static str = "analytics.v1.AnalyticsService";
}

/// The answer to a call, in time.
type Answering = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

impl<B> Service<http::Request<B>> for AnalyticsService
where
    B: codegen::Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Answering {
        let door = self.front_door.clone();
        let method = request.uri().path().strip_prefix('/').and_then(|path| path.strip_prefix(Self::NAME));
        match method {
            Some("/TrackEvent") => {
                let answer = async move |message| door.track_event(message).await;
                unary(request, MESSAGE_BYTES_MAX, answer)
            }
            Some("/IdentifyUser") => {
                let answer = async move |message| door.identify_user(message).await;
                unary(request, MESSAGE_BYTES_MAX, answer)
            }
            Some("/TrackBatch") => {
                let answer = async move |message| door.track_batch(message).await;
                unary(request, BATCH_BYTES_MAX, answer)
            }
            Some("/TrackStream") => stream(request, door, self.metrics.clone()),
            Some("/GetEventCount") => {
                unary(request, MESSAGE_BYTES_MAX, |message| ready(FrontDoor::get_event_count(message)))
            }
            Some("/GetUserCount") => {
                unary(request, MESSAGE_BYTES_MAX, |message| ready(FrontDoor::get_user_count(message)))
            }
            Some("/HealthCheck") => {
                unary(request, MESSAGE_BYTES_MAX, move |message| ready(Ok(door.health_check(message))))
            }
            _ => Box::pin(ready(Ok(Status::unimplemented("no such method").into_http()))),
        }
    }
}

/// A call with one message and one answer.
fn unary<B, Q, A, F>(
    request: http::Request<B>,
    bytes_max: usize,
    answer: impl FnOnce(Q) -> F + Send + 'static,
) -> Answering
where
    B: codegen::Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
    Q: FromWire + Send + 'static,
    A: Message + Send + 'static,
    F: Future<Output = Result<A, Status>> + Send + 'static,
{
    Box::pin(async move {
        // Called once; the trait does not know that.
        let mut answer = Some(answer);
        let service = service_fn(move |request: Request<Q>| {
            let answer = answer.take().expect("a call has one message");
            answer(request.into_inner()).map(|answer| answer.map(Response::new))
        });
        let mut grpc = Grpc::new(MessageCodec::<A, Q>::default()).max_decoding_message_size(bytes_max);
        Ok(grpc.unary(service, request).await)
    })
}

fn stream<B>(request: http::Request<B>, door: Arc<FrontDoor>, metrics: IngestMetrics) -> Answering
where
    B: codegen::Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    Box::pin(async move {
        let service = service_fn(move |request: Request<Streaming<_>>| {
            let answers = door.clone().track_stream(request.into_inner(), STREAM_AGE_MAX);
            ready(Ok::<_, Status>(Response::new(observe_stream(answers, metrics.clone()))))
        });
        let mut grpc = Grpc::new(MessageCodec::default()).max_decoding_message_size(BATCH_BYTES_MAX);
        Ok(grpc.streaming(service, request).await)
    })
}
