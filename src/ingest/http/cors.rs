//! What browsers ask and must be told: any page may send, for a write key is no secret
//! and no cookie is looked at.

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Response, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
        ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
        ACCESS_CONTROL_REQUEST_HEADERS, HeaderValue, ORIGIN, VARY,
    },
};

use super::reply::Reply;

const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, OPTIONS");
/// What SDKs send beside what any page may.
const HEADERS: HeaderValue = HeaderValue::from_static(
    "authorization, content-type, content-encoding, x-retry-count, x-api-key, x-schema-version, \
     anonymousid, x-anonymous-id",
);
const EXPOSED: HeaderValue =
    HeaderValue::from_static("retry-after, x-schema-version, deprecation, sunset, link");
const MAX_AGE: HeaderValue = HeaderValue::from_static("900");
const TRUE: HeaderValue = HeaderValue::from_static("true");

/// The answer to a preflight.
pub(super) fn preflight(asked: &HeaderMap) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::new()));
    *reply.status_mut() = StatusCode::NO_CONTENT;
    let headers = reply.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    // Whatever an SDK of next year sends.
    let wanted = asked.get(ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, wanted.unwrap_or(HEADERS));
    headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    reply
}

/// Lets the page that asks read the answer, whatever it is: a status that it cannot read
/// is a network error to it, and it would send again what is refused.
pub(super) fn allow(asked: &HeaderMap, reply: &mut Reply) {
    let headers = reply.headers_mut();
    // Also without one: what a cache keeps of that is no answer to a page.
    headers.append(VARY, HeaderValue::from_static("origin"));
    let Some(origin) = asked.get(ORIGIN) else { return };
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    // For sendBeacon, which always comes with credentials and takes no `*`.
    headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, TRUE);
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
}
