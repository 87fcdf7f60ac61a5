//! One call, from its head to its answer: which method it is, how large its
//! message may be and how long it may take, what its panic costs, what is counted.
//!
//! Written by hand, because the generated router has one limit for all methods
//! and boxes a call several times.

use std::{
    any::Any,
    future::{Future, ready},
    panic::AssertUnwindSafe,
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use prost::Message;
use tokio::time::timeout;
use tonic::{
    Code, Status,
    codec::{EncodeBody, SingleMessageCompressionOverride},
    codegen::http,
    server::NamedService,
    service::Routes,
};
use tower::ServiceExt;
use tracing::error;

use super::{
    answer::{AnswerBody, answer_of_stream, answer_with},
    codec::MessageEncoder,
    front_door::FrontDoor,
    message::{MESSAGE_TIMEOUT, Rules, late, messages, read_message},
    observe::{code_of, label, observe_stream},
    refusal::{malformed, metadata_too_large, no_connection_left, schema_unsupported},
};
use crate::{
    admission::context::CallContext,
    ingest::{
        budget::{Held, Receiving},
        call_body::CallBody,
        limits::{BATCH_BYTES_MAX, MESSAGE_BYTES_MAX, METADATA_BYTES_MAX, metadata_bytes},
    },
    telemetry::{CountedCall, IngestMetrics, MethodMetrics},
};

/// A stream is ended after this time, so that its connection can be closed when
/// it is old without cutting an answer off.
pub(super) const STREAM_AGE_MAX: Duration = Duration::from_secs(5 * 60);

/// Where a call can say its schema version, which its package's name says already.
const SCHEMA_VERSION: &str = "x-schema-version";
const SCHEMA_OF_PACKAGE: &str = "1";

/// What is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    TrackEvent,
    IdentifyUser,
    TrackBatch,
    TrackStream,
    GetEventCount,
    GetUserCount,
    HealthCheck,
    /// A method that this service does not have.
    Unknown,
    /// Of another service: health, reflection.
    Other,
}

impl Method {
    /// In the order of their numbers, each with its label.
    const ALL: [(Self, &'static str); 9] = [
        (Self::TrackEvent, "TrackEvent"),
        (Self::IdentifyUser, "IdentifyUser"),
        (Self::TrackBatch, "TrackBatch"),
        (Self::TrackStream, "TrackStream"),
        (Self::GetEventCount, "GetEventCount"),
        (Self::GetUserCount, "GetUserCount"),
        (Self::HealthCheck, "HealthCheck"),
        (Self::Unknown, "other"),
        (Self::Other, "other"),
    ];

    fn of_path(path: &str) -> Self {
        let name = path.strip_prefix('/').and_then(|path| path.strip_prefix(AnalyticsService::NAME));
        let Some(name) = name.and_then(|name| name.strip_prefix('/')) else { return Self::Other };
        let is_named = |(_, label): &&(Self, &str)| *label == name && name != "other";
        Self::ALL.iter().find(is_named).map_or(Self::Unknown, |(method, _)| *method)
    }
}

/// Hands each call to the [`FrontDoor`], or to a service of tonic's.
#[derive(Debug)]
pub(crate) struct AnalyticsService {
    front_door: Arc<FrontDoor>,
    /// Made for the first such call: descriptors in memory are worth more than an idle
    /// relay's own state.
    others: LazyLock<Routes, Box<dyn FnOnce() -> Routes + Send>>,
    metrics: IngestMetrics,
    /// By [`Method`].
    methods: [Arc<MethodMetrics>; Method::ALL.len()],
}

impl NamedService for AnalyticsService {
    const NAME: &'static str = "analytics.v1.AnalyticsService";
}

impl AnalyticsService {
    /// `others` makes what answers calls of any other service.
    pub(crate) fn new(
        front_door: FrontDoor,
        others: impl FnOnce() -> Routes + Send + 'static,
        metrics: IngestMetrics,
    ) -> Self {
        let others = LazyLock::new(Box::new(others) as Box<dyn FnOnce() -> Routes + Send>);
        let methods = Method::ALL.map(|(_, label)| Arc::new(metrics.method(label)));
        Self { front_door: Arc::new(front_door), others, metrics, methods }
    }

    /// Answers a call, whatever it is, and counts it.
    pub(crate) async fn answer<B: CallBody>(
        self: Arc<Self>,
        call: http::Request<B>,
        receiving: Arc<Receiving>,
    ) -> http::Response<AnswerBody> {
        let method = Method::of_path(call.uri().path());
        let mut counted = CountedCall::begin(&*self.methods[method as usize], label(Code::Cancelled));
        let answer = match AssertUnwindSafe(self.dispatch(method, call, receiving)).catch_unwind().await {
            Ok(Ok(answer)) => answer,
            Ok(Err(status)) => status.into_http(),
            Err(panic) => panicked(&self.metrics, panic).into_http(),
        };
        let code = code_of(answer.headers());
        // A stream that has begun is counted when it ends.
        if method == Method::TrackStream && code == Code::Ok {
            counted.forget();
        } else {
            counted.code = label(code);
        }
        answer
    }

    async fn dispatch<B: CallBody>(
        &self,
        method: Method,
        call: http::Request<B>,
        receiving: Arc<Receiving>,
    ) -> Result<http::Response<AnswerBody>, Status> {
        let door = &self.front_door;
        let metadata_bytes = metadata_bytes(call.headers());
        if metadata_bytes > METADATA_BYTES_MAX {
            return Err(metadata_too_large(metadata_bytes));
        }
        if let Some(version) =
            call.headers().get(SCHEMA_VERSION).filter(|version| *version != SCHEMA_OF_PACKAGE)
        {
            return Err(schema_unsupported(version));
        }
        if receiving.is_spare() && !matches!(method, Method::HealthCheck | Method::Other) {
            return Err(no_connection_left());
        }
        let (head, body) = call.into_parts();
        if method == Method::Other {
            let held = receiving.hold_call()?;
            let call = http::Request::from_parts(head, body);
            return in_time(Box::pin(self.other(call, held))).await;
        }
        let bytes_max = match method {
            Method::TrackBatch | Method::TrackStream => BATCH_BYTES_MAX,
            _ => MESSAGE_BYTES_MAX,
        };
        let context = CallContext::of_grpc(receiving.address());
        let rules = Rules { bytes_max, metadata: head.headers, receiving };
        match method {
            Method::TrackEvent => unary(body, rules, |message| door.track_event(message, context)).await,
            Method::IdentifyUser => unary(body, rules, |message| door.identify_user(message, context)).await,
            Method::TrackBatch => unary(body, rules, |message| door.track_batch(message, context)).await,
            Method::TrackStream => {
                let held = rules.receiving.hold_call()?;
                Ok(self.stream(body, rules, held, context))
            }
            Method::GetEventCount => {
                // What waits for the store.
                let _held = rules.receiving.hold_call()?;
                let answer = async |message| door.get_event_count(decoded(message)?).await;
                unary(body, rules, answer).await
            }
            Method::GetUserCount => {
                let _held = rules.receiving.hold_call()?;
                let answer = async |message| door.get_user_count(decoded(message)?).await;
                unary(body, rules, answer).await
            }
            Method::HealthCheck => {
                let answer = |message| ready(decoded(message).map(|request| door.health_check(request)));
                unary(body, rules, answer).await
            }
            Method::Unknown | Method::Other => Err(Status::unimplemented("no such method")),
        }
    }

    fn stream<B: CallBody>(
        &self,
        body: B,
        rules: Rules,
        held: Held,
        context: CallContext<'static>,
    ) -> http::Response<AnswerBody> {
        let answers = self.front_door.clone().track_stream(messages(body, rules), STREAM_AGE_MAX, context);
        let metrics = self.metrics.clone();
        // The stream ends with its first error, and so with a panic.
        let answers = AssertUnwindSafe(answers)
            .catch_unwind()
            .map(move |answer| answer.unwrap_or_else(|panic| Err(panicked(&metrics, panic))));
        let metrics = self.methods[Method::TrackStream as usize].clone();
        let answers = observe_stream(answers, metrics);
        let encoded = EncodeBody::new_server(
            MessageEncoder::default(),
            answers,
            None,
            SingleMessageCompressionOverride::default(),
            None,
        );
        answer_of_stream(tonic::body::Body::new(encoded), held)
    }

    async fn other<B: CallBody>(&self, call: http::Request<B>, held: Held) -> http::Response<AnswerBody> {
        match self.others.clone().oneshot(call).await {
            Ok(answer) => answer.map(|body| AnswerBody::Stream { body, _held: held }),
            Err(never) => match never {},
        }
    }
}

fn panicked(metrics: &IngestMetrics, panic: Box<dyn Any + Send>) -> Status {
    drop(panic);
    metrics.panics.inc();
    error!("a defect: a call's handler panicked; its caller got INTERNAL");
    Status::internal("a defect of the relay; the event may or may not have been accepted")
}

/// A call with one message and one answer.
async fn unary<B: CallBody, A, F>(
    body: B,
    rules: Rules,
    answer: impl FnOnce(Bytes) -> F,
) -> Result<http::Response<AnswerBody>, Status>
where
    A: Message,
    F: Future<Output = Result<A, Status>>,
{
    let message = in_time(read_message(body, &rules)).await??;
    drop(rules.metadata);
    Ok(answer_with(&answer(message).await?))
}

/// What waits for the rest of a message, but not for ever. What comes behind it waits
/// for the disk at most, and that has a limit of its own.
async fn in_time<T>(reading: impl Future<Output = T>) -> Result<T, Status> {
    timeout(MESSAGE_TIMEOUT, reading).await.map_err(|_| late())
}

fn decoded<Q: Message + Default>(message: Bytes) -> Result<Q, Status> {
    Q::decode(message).map_err(malformed)
}

#[cfg(test)]
mod tests {
    use http_body::Frame;
    use http_body_util::StreamBody;

    use super::*;
    use crate::{ingest::grpc::message::tests::rules, proto::v1::TrackEventResponse};

    #[tokio::test(start_paused = true)]
    async fn a_message_that_does_not_come_is_not_waited_for_for_ever() {
        let half = futures_util::stream::iter([Ok::<_, Status>(Frame::data(Bytes::from_static(&[0, 0])))]);
        let body = StreamBody::new(half.chain(futures_util::stream::pending()));
        let answer = |_| ready(Ok(TrackEventResponse::default()));
        let answered = timeout(2 * MESSAGE_TIMEOUT, unary(body, rules(100, ""), answer)).await;
        let status = answered.expect("it is given up before").unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
    }

    #[test]
    fn only_our_own_methods_have_a_label() {
        let label = |path: &str| Method::ALL[Method::of_path(path) as usize];
        for (method, name) in &Method::ALL[..7] {
            assert_eq!(label(&format!("/analytics.v1.AnalyticsService/{name}")), (*method, *name));
        }
        for path in ["/analytics.v1.AnalyticsService/Anything", "/analytics.v1.AnalyticsService/other"] {
            assert_eq!(label(path), (Method::Unknown, "other"));
        }
        for path in ["/grpc.health.v1.Health/Check", "/", "", "/analytics.v1.AnalyticsServiceX/TrackEvent"] {
            assert_eq!(label(path), (Method::Other, "other"));
        }
    }
}
