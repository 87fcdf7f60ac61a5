//! Counts and times every call, whatever answers it.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Instant,
};

use futures_util::{Stream, StreamExt, stream};
use pin_project_lite::pin_project;
use tonic::{Code, Status, codegen::http};
use tower::{Layer, Service};

use crate::telemetry::IngestMetrics;

/// Methods that have a label of their own.
const METHODS: [&str; 7] =
    ["TrackEvent", "IdentifyUser", "TrackBatch", STREAM, "GetEventCount", "GetUserCount", "HealthCheck"];
/// The one whose answer is a stream.
const STREAM: &str = "TrackStream";
const SERVICE: &str = "/analytics.v1.AnalyticsService/";

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct ObserveLayer(pub(crate) IngestMetrics);

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;

    fn layer(&self, inner: S) -> Observe<S> {
        Observe { inner, metrics: self.0.clone() }
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Observe<S> {
    inner: S,
    metrics: IngestMetrics,
}

impl<S, B, R> Service<http::Request<B>> for Observe<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Observed<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let method = method_label(request.uri().path());
        Observed {
            started: Instant::now(),
            method,
            inner: self.inner.call(request),
            metrics: self.metrics.clone(),
        }
    }
}

pin_project! {
    /// A call under way.
    pub(crate) struct Observed<F> {
        started: Instant,
        method: &'static str,
        #[pin]
        inner: F,
        metrics: IngestMetrics,
    }
}

impl<F, E, R> Future for Observed<F>
where
    F: Future<Output = Result<http::Response<R>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let call = self.project();
        let answer = ready!(call.inner.poll(cx));
        let code = answer.as_ref().map_or(Code::Unknown, |response| code_of(response.headers()));
        // A stream that has begun is counted when it ends.
        if *call.method != STREAM || code != Code::Ok {
            call.metrics.answered(call.method, code_label(code), call.started.elapsed().as_secs_f64());
        }
        Poll::Ready(answer)
    }
}

/// Counts a stream when it ends: with OK, with the status that is its last item,
/// or, dropped before, as cancelled by its caller.
pub(super) fn observe_stream<T: Send>(
    answers: impl Stream<Item = Result<T, Status>> + Send,
    metrics: IngestMetrics,
) -> impl Stream<Item = Result<T, Status>> + Send {
    let end = StreamEnd { started: Instant::now(), code: Code::Cancelled, metrics };
    stream::unfold((Box::pin(answers), end), async |(mut answers, mut end)| {
        let answer = answers.next().await;
        match &answer {
            Some(Ok(_)) => {}
            Some(Err(status)) => end.code = status.code(),
            None => end.code = Code::Ok,
        }
        Some((answer?, (answers, end)))
    })
}

struct StreamEnd {
    started: Instant,
    code: Code,
    metrics: IngestMetrics,
}

impl Drop for StreamEnd {
    fn drop(&mut self) {
        self.metrics.answered(STREAM, code_label(self.code), self.started.elapsed().as_secs_f64());
    }
}

fn method_label(path: &str) -> &'static str {
    let name = path.strip_prefix(SERVICE);
    METHODS.into_iter().find(|method| name == Some(method)).unwrap_or("other")
}

/// The status of a call that failed stands in the head of its answer; that of
/// one that succeeded follows after the body.
fn code_of(headers: &http::HeaderMap) -> Code {
    headers.get("grpc-status").map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

fn code_label(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_methods_have_a_label() {
        assert_eq!(method_label("/analytics.v1.AnalyticsService/TrackEvent"), "TrackEvent");
        assert_eq!(method_label("/analytics.v1.AnalyticsService/Anything"), "other");
        assert_eq!(method_label("/grpc.health.v1.Health/Check"), "other");
    }
}
