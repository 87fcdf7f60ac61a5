//! What is counted of a call.

use std::sync::Arc;

use futures_util::{Stream, StreamExt, stream};
use tonic::{Code, Status, codegen::http};

use crate::telemetry::{CountedCall, MethodMetrics};

/// Counts a stream when it ends: with OK, with the status that is its last item,
/// or, dropped before, as cancelled by its caller.
pub(super) fn observe_stream<T: Send>(
    answers: impl Stream<Item = Result<T, Status>> + Send,
    metrics: Arc<MethodMetrics>,
) -> impl Stream<Item = Result<T, Status>> + Send {
    let counted = CountedCall::begin(metrics, label(Code::Cancelled));
    stream::unfold((Box::pin(answers), counted), async |(mut answers, mut counted)| {
        let answer = answers.next().await;
        match &answer {
            Some(Ok(_)) => {}
            Some(Err(status)) => counted.code = label(status.code()),
            None => counted.code = label(Code::Ok),
        }
        Some((answer?, (answers, counted)))
    })
}

/// The status of a call that failed stands in the head of its answer; that of
/// one that succeeded follows after the body.
pub(super) fn code_of(headers: &http::HeaderMap) -> Code {
    headers.get("grpc-status").map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

/// The label of a status.
pub(super) fn label(code: Code) -> &'static str {
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
