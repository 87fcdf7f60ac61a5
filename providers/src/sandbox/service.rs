//! One request: who it is for, which fault it meets, what is taken, what is said.

use std::error::Error;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::read::GzEncoder;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_ENCODING, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION, RETRY_AFTER};
use hyper::{HeaderMap, Response, StatusCode};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::contract::{CONTENT_MAX_BYTES, Content, Judgement, Request, Terms, readable};
use super::fault::Fault;
use super::line::Line;
use super::record::Seen;
use super::reply::{Cut, ReplyBody};
use super::state::State;
use super::{amplitude, control, mixpanel, segment};
use crate::registry::Vendor;

/// A client that waits longer than this has no timeout worth testing.
const STALL: Duration = Duration::from_secs(120);
const JUNK: &str = "<html>\r\n<head><title>OK</title></head><body>upstream says hello</body></html>";
const JUNK_JSON_DEPTH: usize = 5000;

impl Vendor {
    fn of_path(path: &str) -> Option<Self> {
        match path {
            "/import" | "/engage" | "/groups" | "/track" => Some(Self::Mixpanel),
            "/batch" | "/2/httpapi" => Some(Self::Amplitude),
            "/v1/batch" => Some(Self::Segment),
            _ => None,
        }
    }

    fn judge(self, request: &Request<'_>, terms: &Terms<'_>) -> Judgement {
        match self {
            Self::Mixpanel => mixpanel::judge(request, terms),
            Self::Amplitude => amplitude::judge(request, terms),
            Self::Segment => segment::judge(request, terms),
        }
    }

    fn refusal(self, path: &str, status: u16) -> Value {
        match self {
            Self::Mixpanel => mixpanel::refusal(path, status),
            Self::Amplitude => amplitude::refusal(status),
            Self::Segment => segment::refusal(status),
        }
    }

    /// How the vendor says that a body is too large.
    fn too_large(self) -> u16 {
        if self == Self::Segment { 400 } else { 413 }
    }
}

/// Answers a request, or has its connection cut.
pub(super) async fn answer(
    state: Arc<State>,
    line: Arc<Line>,
    request: hyper::Request<Incoming>,
) -> Result<Response<ReplyBody>, Cut> {
    let (head, incoming) = request.into_parts();
    let path = head.uri.path();
    let query = head.uri.query().unwrap_or_default();
    if let Some(command) = path.strip_prefix("/_sandbox/") {
        return Ok(control::answer(&state, &head.method, command, query, incoming).await);
    }
    let Some(vendor) = Vendor::of_path(path) else {
        let reply = Reply::json(404, &json!({"code": 404, "error": "Invalid request path"}));
        return Ok(reply.into_response(ReplyBody::whole));
    };

    let at_ms = u64::try_from(state.uptime().as_millis()).unwrap_or(u64::MAX);
    let (fault, in_flight) = state.arrive(vendor, line.is_new_to(vendor));
    let content = read(incoming, &head.headers).await?;
    let request = Request { method: &head.method, path, query, headers: &head.headers, content: &content };
    let now_ms = jiff::Timestamp::now().as_millisecond();
    let terms = Terms { key: &state.options.key, now_ms, fault: fault.as_ref() };
    let judgement = vendor.judge(&request, &terms);

    let ticket = state.desk(vendor).record.see(Seen {
        path: path.to_owned(),
        status: None,
        events: judgement.events,
        body_bytes: content.bytes.len(),
        at_ms,
        fault: fault.as_ref().map(Fault::to_string),
        body: state.options.keep_bodies.then(|| readable(&content).into_owned()),
    });

    match fault {
        Some(Fault::Delay { millis }) => sleep(Duration::from_millis(millis)).await,
        Some(Fault::Stall) => {
            sleep(STALL).await;
            return Err(Cut);
        }
        Some(Fault::ResetBefore) => {
            line.reset();
            return Err(Cut);
        }
        _ => {}
    }

    let reply = match fault.as_ref().and_then(|fault| instead(fault, vendor, &request)) {
        Some(reply) => reply,
        None => {
            state.desk(vendor).record.take(judgement.taken, judgement.rejected);
            let reply = Reply::json(judgement.status, &judgement.body);
            match &fault {
                Some(Fault::Encoded { coding }) => reply.encoded(coding),
                _ => reply,
            }
        }
    };
    if fault == Some(Fault::ResetAfter) {
        line.reset();
        return Err(Cut);
    }

    state.desk(vendor).record.answered(ticket, reply.status.as_u16());
    let response = reply.into_response(|body| match fault {
        Some(Fault::Drip { millis }) => ReplyBody::drip(body, Duration::from_millis(millis)),
        Some(Fault::ResetMidReply) => ReplyBody::half(&body, line),
        Some(Fault::HugeBody { bytes }) => ReplyBody::filler(bytes),
        _ => ReplyBody::whole(body),
    });
    Ok(response.map(|body| body.holding(in_flight)))
}

/// The body; cut off if the client stops sending it.
async fn read(incoming: Incoming, headers: &HeaderMap) -> Result<Content, Cut> {
    match Limited::new(incoming, CONTENT_MAX_BYTES).collect().await {
        Ok(body) => Ok(Content::decode(headers, body.to_bytes())),
        Err(error) if is_length_limit(error.as_ref()) => Ok(Content::too_large()),
        Err(_) => Err(Cut),
    }
}

fn is_length_limit(error: &(dyn Error + Send + Sync + 'static)) -> bool {
    error.is::<LengthLimitError>()
}

/// The answer of a fault that takes nothing; None if the vendor's own applies.
fn instead(fault: &Fault, vendor: Vendor, request: &Request<'_>) -> Option<Reply> {
    let refusal = |status| Reply::json(status, &vendor.refusal(request.path, status));
    match fault {
        Fault::Status { code, retry_after, body } => {
            let reply = match body {
                Some(body) => Reply::text(*code, body.clone()),
                None => refusal(*code),
            };
            Some(reply.with(RETRY_AFTER, retry_after.as_deref()))
        }
        Fault::FailOnName { name } => {
            readable(request.content).contains(&Value::from(name.as_str()).to_string()).then(|| refusal(500))
        }
        // Amplitude names the users in its own answer; the others know none.
        Fault::ThrottleUsers { .. } | Fault::DailyQuota { .. } if vendor != Vendor::Amplitude => {
            Some(refusal(429))
        }
        Fault::BodyLimit { bytes } if request.content.exceeds(*bytes) => Some(refusal(vendor.too_large())),
        Fault::Junk => Some(Reply::text(200, JUNK.to_owned())),
        Fault::JunkJson => {
            let body = "[".repeat(JUNK_JSON_DEPTH) + &"]".repeat(JUNK_JSON_DEPTH);
            Some(Reply::text(200, body))
        }
        Fault::HugeBody { .. } => Some(Reply::text(200, String::new())),
        Fault::Redirect { location } => Some(refusal(307).with(LOCATION, Some(location))),
        _ => None,
    }
}

/// An answer before it is decided how to send it.
struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Reply {
    fn json(status: u16, body: &Value) -> Self {
        Self::text(status, body.to_string())
    }

    /// Any text: like a broken proxy, claims that it is JSON.
    fn text(status: u16, body: String) -> Self {
        // Below 200 hyper would wait for a final answer.
        let status = StatusCode::from_u16(status.max(200)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        let reply = Self { status, headers, body: body.into() };
        let allow = (status == StatusCode::METHOD_NOT_ALLOWED).then_some("POST");
        reply.with(ALLOW, allow)
    }

    /// Adds a header, unless its value cannot be sent.
    fn with(mut self, name: HeaderName, value: Option<&str>) -> Self {
        if let Some(value) = value.and_then(|value| HeaderValue::from_str(value).ok()) {
            self.headers.insert(name, value);
        }
        self
    }

    /// In an encoding; as it is in one that is not known here.
    fn encoded(mut self, coding: &str) -> Self {
        if coding == "gzip" {
            let mut body = Vec::new();
            let read = GzEncoder::new(&*self.body, Compression::fast()).read_to_end(&mut body);
            read.expect("memory can be read");
            self.body = body.into();
        }
        self.with(CONTENT_ENCODING, Some(coding))
    }

    fn into_response(self, body: impl FnOnce(Bytes) -> ReplyBody) -> Response<ReplyBody> {
        let mut response = Response::new(body(self.body));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}
