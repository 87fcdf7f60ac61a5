//! Answers, in the words of each form.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Response, StatusCode,
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde::Serialize;

use super::route::Form;
use crate::{
    admission::{
        Accepted,
        denied::{Denied, Violation},
    },
    query::Unanswered,
    reasons::RefusalReason,
};

pub(super) type Reply = Response<Full<Bytes>>;

/// What is wrong with every refused event of website analytics, to its caller.
pub(super) const INVALID_EVENT: &str = "INVALID_EVENT";

/// Why a call as a whole is not served.
#[derive(Debug)]
pub(super) enum Problem {
    /// There is nothing at this path.
    NotFound,
    /// It is called with another method than this.
    MethodNotAllowed(&'static str),
    /// The body is of a type that is not read.
    UnsupportedType(String),
    /// The body is compressed with what is not known.
    UnsupportedEncoding(String),
    /// The body, or what it inflates to, has more than so many bytes.
    TooLarge(usize),
    /// It is no JSON, or not what the form wants.
    Malformed { field: &'static str, message: String },
    /// It did not come in time.
    Late,
    /// It has no write key, or one that is not taken.
    Unauthorized(&'static str),
    /// Its event was not admitted.
    Denied(Denied),
    /// It asks what it may not read.
    MayNotRead { why: &'static str, has_key: bool },
    /// Its question has no answer.
    Unanswered(Unanswered),
    /// All connections are taken, and this one is for probes.
    NoConnectionLeft,
    /// A defect of the relay.
    Defect,
}

impl Problem {
    pub(super) fn malformed(field: &'static str, message: impl Into<String>) -> Self {
        Self::Malformed { field, message: message.into() }
    }

    pub(super) fn status(&self, form: Form) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::UnsupportedType(_) | Self::UnsupportedEncoding(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            // Segment's own choice, which its SDKs know.
            Self::TooLarge(_) if form == Form::Segment => StatusCode::BAD_REQUEST,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Denied(denied) if denied.is_of_suppressed_user() => StatusCode::FORBIDDEN,
            Self::Malformed { .. } | Self::Denied(Denied::Invalid(_)) => StatusCode::BAD_REQUEST,
            Self::Late => StatusCode::REQUEST_TIMEOUT,
            Self::Unauthorized(_) | Self::MayNotRead { .. } => StatusCode::UNAUTHORIZED,
            Self::Unanswered(why) => status_of(why),
            Self::Denied(Denied::SpoolFailed | Denied::Draining) | Self::NoConnectionLeft => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Denied(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Defect => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The name in the form's own words.
    fn code(&self, form: Form) -> &'static str {
        let (of_segment, of_ingestion) = match self {
            Self::NotFound => ("not_found", "NOT_FOUND"),
            Self::MethodNotAllowed(_) => ("method_not_allowed", "METHOD_NOT_ALLOWED"),
            Self::UnsupportedType(_) => ("unsupported_media_type", "UNSUPPORTED_MEDIA_TYPE"),
            Self::UnsupportedEncoding(_) => ("unsupported_encoding", "UNSUPPORTED_ENCODING"),
            Self::TooLarge(_) => ("payload_too_large", "PAYLOAD_TOO_LARGE"),
            Self::Malformed { .. } => ("invalid_request", "INVALID_REQUEST"),
            Self::Late => ("request_timeout", "REQUEST_TIMEOUT"),
            Self::Unauthorized(_) => ("invalid_write_key", "INVALID_WRITE_KEY"),
            Self::MayNotRead { has_key: false, .. } => ("read_key_missing", "KEY_MISSING"),
            Self::MayNotRead { has_key: true, .. } => ("read_key_invalid", "KEY_INVALID"),
            Self::Unanswered(why) => ("unanswered", why.reason()),
            Self::Denied(denied @ Denied::Invalid(violations)) => {
                let of_segment = match violations[0].reason {
                    RefusalReason::EventTooLarge => "payload_too_large",
                    RefusalReason::SchemaNewer => "schema_version_unsupported",
                    _ => "invalid_request",
                };
                (of_segment, denied.reason().name())
            }
            Self::Denied(denied @ (Denied::SpoolFailed | Denied::Draining)) => {
                ("unavailable", denied.reason().name())
            }
            Self::Denied(denied) => ("rate_limited", denied.reason().name()),
            Self::NoConnectionLeft => ("unavailable", RefusalReason::NoConnectionLeft.name()),
            Self::Defect => ("internal", "INTERNAL"),
        };
        match form {
            Form::Segment => of_segment,
            Form::Website if matches!(self, Self::Denied(Denied::Invalid(_))) => INVALID_EVENT,
            Form::Ingestion | Form::Website => of_ingestion,
        }
    }

    fn field(&self, form: Form) -> &str {
        match self {
            Self::Denied(Denied::Invalid(violations)) if form == Form::Website => {
                name_in_website(&violations[0].field)
            }
            Self::Malformed { field, .. } => field,
            Self::Unauthorized(_) => "writeKey",
            Self::Unanswered(Unanswered::Invalid(faults)) => {
                faults.first().map_or("", |fault| fault.field.as_str())
            }
            Self::Denied(Denied::Invalid(violations)) => name_here(&violations[0].field),
            _ => "",
        }
    }

    fn message(&self, form: Form) -> String {
        match self {
            Self::Denied(Denied::Invalid(violations)) if form == Form::Website => {
                format!("{}: {}", name_in_website(&violations[0].field), described(&violations[0]))
            }
            Self::NotFound => {
                "there is nothing at this path, see docs/integration.md for those there are".into()
            }
            Self::MethodNotAllowed(allowed) => format!("want {allowed}"),
            Self::UnsupportedType(got) => {
                format!("content-type: got {got:?}, want application/json or text/plain")
            }
            Self::UnsupportedEncoding(got) => format!("content-encoding: got {got:?}, want gzip or none"),
            Self::TooLarge(bytes_max) => {
                format!("the body: got more than {bytes_max} bytes, want at most that")
            }
            Self::Malformed { message, .. } => message.clone(),
            Self::Late => "the body did not come in time".into(),
            Self::Unauthorized(why) | Self::MayNotRead { why, .. } => (*why).into(),
            Self::Unanswered(why) => why.message(),
            Self::Denied(denied) => said(denied),
            Self::NoConnectionLeft => "all connections are taken".into(),
            Self::Defect => "a defect of the relay; the event may or may not have been accepted".into(),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Denied(denied) => denied.retry_delay(),
            Self::Unanswered(why) => why.retry_delay(),
            Self::NoConnectionLeft | Self::Late => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// The answer in the form's words.
    pub(super) fn reply(&self, form: Form) -> Reply {
        let (code, message, field) = (self.code(form), self.message(form), self.field(form));
        let field = Some(field).filter(|field| !field.is_empty());
        let status = self.status(form);
        let error = ErrorBody { code, message, field };
        let mut reply = match form {
            Form::Segment => json(status, &Failed { success: false, error: None, said: Some(error) }),
            Form::Ingestion => json(status, &Failed { success: false, error: Some(error), said: None }),
            Form::Website => json(status, &FailedText { error: error.message, code, field }),
        };
        let headers = reply.headers_mut();
        if let Some(delay) = self.retry_after() {
            headers.insert(RETRY_AFTER, whole_seconds(delay));
        }
        if let Self::MethodNotAllowed(allowed) = self {
            headers.insert(ALLOW, HeaderValue::from_static(allowed));
        }
        if let Self::MayNotRead { .. } = self {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        reply
    }
}

fn status_of(unanswered: &Unanswered) -> StatusCode {
    match unanswered {
        Unanswered::Invalid(_) => StatusCode::BAD_REQUEST,
        Unanswered::NoStore => StatusCode::NOT_IMPLEMENTED,
        Unanswered::TooExpensive(_) => StatusCode::UNPROCESSABLE_ENTITY,
        Unanswered::Late => StatusCode::GATEWAY_TIMEOUT,
        Unanswered::TooMany => StatusCode::TOO_MANY_REQUESTS,
        Unanswered::Unavailable(_) | Unanswered::Draining => StatusCode::SERVICE_UNAVAILABLE,
        Unanswered::Damaged(_) | Unanswered::Defect => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// A wait in whole seconds, as the header says it: at least one.
pub(super) fn whole_seconds(delay: Duration) -> HeaderValue {
    (delay.as_millis().div_ceil(1000).max(1) as u64).into()
}

#[derive(Serialize)]
struct Failed<'a> {
    success: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorBody<'a>>,
    #[serde(flatten)]
    said: Option<ErrorBody<'a>>,
}

/// Of website analytics: there an error is a text.
#[derive(Serialize)]
struct FailedText<'a> {
    error: String,
    code: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<&'a str>,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    code: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<&'a str>,
}

/// An answer that is JSON.
pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Reply {
    let body = serde_json::to_vec(body).expect("an answer has names that are texts");
    bytes(status, "application/json", body)
}

pub(super) fn bytes(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(body.into()));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    reply
}

/// Segment's answer to what was taken.
pub(super) fn success() -> Reply {
    bytes(StatusCode::OK, "application/json", &b"{\"success\":true}"[..])
}

/// The ingestion API's answer to one event that was taken.
pub(super) fn queued(accepted: &Accepted, warning: Option<&str>) -> Reply {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Queued<'a> {
        success: bool,
        event_id: &'a str,
        status: String,
        warnings: Vec<&'a str>,
    }
    let status = accepted.durability.name().to_ascii_uppercase();
    let event_id = accepted.event_id.as_str();
    let warnings = warning.into_iter().collect();
    json(StatusCode::ACCEPTED, &Queued { success: true, event_id, status, warnings })
}

/// The name that a rule's field has in JSON.
pub(super) fn name_here(field: &str) -> &str {
    match field {
        "event_name" => "event",
        "event_id" => "messageId",
        "user_id" => "userId",
        "anonymous_id" => "anonymousId",
        "group_id" => "groupId",
        "previous_id" => "previousId",
        "session_id" => "sessionId",
        other => other,
    }
}

/// The name that it has in the form of website analytics.
pub(super) fn name_in_website(field: &str) -> &str {
    match name_here(field) {
        "event" => "event_type",
        "anonymousId" => "visitor_id",
        "userId" => "user_id",
        "sessionId" => "session_id",
        "messageId" => "event_id",
        other => other,
    }
}

/// A violation in words.
pub(super) fn described(violation: &Violation) -> String {
    format!("got {}, want {}", violation.got, violation.want)
}

fn said(denied: &Denied) -> String {
    match denied {
        Denied::Invalid(violations) => {
            let said = |violation: &Violation| match name_here(&violation.field) {
                "" => described(violation),
                field => format!("{field}: {}", described(violation)),
            };
            violations.iter().map(said).collect::<Vec<_>>().join("; ")
        }
        Denied::Full { .. } => "the queue is full".into(),
        Denied::ReceivingTooMuch { .. } => "too many messages are being received".into(),
        Denied::SpoolFull { .. } => "the spool is full".into(),
        Denied::SpoolFailed => {
            "the spool cannot be written; whether the event was accepted is not known".into()
        }
        Denied::Draining => "the relay is stopping".into(),
    }
}
