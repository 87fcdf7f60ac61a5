//! Answers of the store, over HTTP.

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Response, StatusCode,
    header::{ALLOW, CONTENT_DISPOSITION, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS},
};

use super::reply::{Reply, bytes};
use crate::query::{
    Known, Question,
    written::{Format, Written},
};

const CROSS_ORIGIN_RESOURCE_POLICY: HeaderName = HeaderName::from_static("cross-origin-resource-policy");

/// An answer in the form that was asked for.
pub(super) fn reply(question: &Question, known: &Known, cached: bool, format: Format) -> Reply {
    let meta = question.meta(known.as_of_ms, cached);
    let Written { content_type, body, file } = question.write(&known.answer, &meta, format);
    let mut reply = bytes(StatusCode::OK, content_type, body);
    let disposition = file.and_then(|file| format!("attachment; filename=\"{file}\"").parse().ok());
    if let Some(disposition) = disposition {
        reply.headers_mut().insert(CONTENT_DISPOSITION, disposition);
    }
    reply
}

/// How a report can be called. A page that asks is told nothing more.
pub(super) fn options() -> Reply {
    let mut reply = Response::new(Full::new(Bytes::new()));
    *reply.status_mut() = StatusCode::NO_CONTENT;
    reply.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD, OPTIONS"));
    reply
}

/// No page of another origin may have it, not even as something else than it is.
pub(super) fn keep_from_pages(reply: &mut Reply) {
    let headers = reply.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CROSS_ORIGIN_RESOURCE_POLICY, HeaderValue::from_static("same-origin"));
}
