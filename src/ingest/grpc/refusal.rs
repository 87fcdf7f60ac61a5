//! Turns a denial into a gRPC status that a program and a person can read.

use std::{collections::HashMap, fmt::Display, time::Duration};

use tonic::{Code, Status, codegen::http::HeaderValue};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::{
    admission::denied::{Denied, Violation, shown},
    ingest::limits::METADATA_BYTES_MAX,
    reasons::RefusalReason,
};

/// The domain of the reasons in `google.rpc.ErrorInfo`.
pub(super) const DOMAIN: &str = "analytics-relay";

impl From<Denied> for Status {
    fn from(denied: Denied) -> Self {
        let reason = denied.reason().name();
        let is_suppressed = denied.is_of_suppressed_user();
        let (code, message, mut details) = match denied {
            Denied::Invalid(violations) => {
                let message = violations.iter().map(said).collect::<Vec<_>>().join("; ");
                let violations: Vec<_> = violations.iter().map(field_violation).collect();
                let code = if is_suppressed { Code::PermissionDenied } else { Code::InvalidArgument };
                (code, message, ErrorDetails::with_bad_request(violations))
            }
            Denied::Full { retry_delay } => {
                let details = ErrorDetails::with_retry_info(Some(retry_delay));
                (Code::ResourceExhausted, "the queue is full".to_owned(), details)
            }
            Denied::SpoolFull { retry_delay } => {
                let details = ErrorDetails::with_retry_info(Some(retry_delay));
                (Code::ResourceExhausted, "the spool is full".to_owned(), details)
            }
            Denied::ReceivingTooMuch { retry_delay } => {
                let details = ErrorDetails::with_retry_info(Some(retry_delay));
                (Code::ResourceExhausted, "too many messages are being received".to_owned(), details)
            }
            Denied::SpoolFailed => {
                let message = "the spool cannot be written; whether the event was accepted is not known";
                (Code::Unavailable, message.to_owned(), ErrorDetails::new())
            }
            Denied::Draining => (Code::Unavailable, "the relay is stopping".to_owned(), ErrorDetails::new()),
        };
        details.set_error_info(reason, DOMAIN, HashMap::new());
        Self::with_error_details(code, message, details)
    }
}

/// A message that is no message: it never came to admission, so it counts as a
/// request and not as an event.
pub(super) fn malformed(error: impl Display) -> Status {
    let reason = RefusalReason::MessageMalformed.name();
    let error = said_shortly(error);
    let description = format!("got bytes that cannot be decoded ({error}), want a protobuf message");
    let violation = FieldViolation { reason: reason.to_owned(), ..FieldViolation::new("", &description) };
    let mut details = ErrorDetails::with_bad_request(vec![violation]);
    details.set_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(Code::InvalidArgument, description, details)
}

/// Metadata that is too large, and always will be.
pub(super) fn metadata_too_large(bytes: usize) -> Status {
    let message = format!("got {bytes} bytes of metadata, want at most {METADATA_BYTES_MAX}");
    let reason = RefusalReason::MetadataTooLarge.name();
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::<String, String>::new());
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

/// A schema version that this package does not have.
pub(super) fn schema_unsupported(version: &HeaderValue) -> Status {
    let got = shown(&String::from_utf8_lossy(version.as_bytes()));
    let message = format!("x-schema-version: got {got}, want 1, which analytics.v1 has");
    let reason = RefusalReason::SchemaNewer.name();
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::<String, String>::new());
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// A call on a connection over the number, which is there for probes only.
pub(super) fn no_connection_left() -> Status {
    let reason = RefusalReason::NoConnectionLeft.name();
    let mut details = ErrorDetails::with_retry_info(Some(Duration::from_secs(1)));
    details.set_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(Code::Unavailable, "all connections are taken", details)
}

/// A decoder's error. It names every level of nesting, and must fit a caller's
/// limit of headers twice.
pub(super) fn said_shortly(error: impl Display) -> String {
    const CHARS_MAX: usize = 300;
    error.to_string().chars().take(CHARS_MAX).collect()
}

fn said(violation: &Violation) -> String {
    format!("{}: got {}, want {}", violation.field, violation.got, violation.want)
}

fn field_violation(violation: &Violation) -> FieldViolation {
    FieldViolation {
        field: violation.field.clone(),
        description: format!("got {}, want {}", violation.got, violation.want),
        reason: violation.reason.name().to_owned(),
        localized_message: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_event_names_field_value_rule_and_reason() {
        let violation = Violation {
            reason: RefusalReason::IdTooLong,
            field: "user_id".into(),
            got: "300 bytes".into(),
            want: "at most 255 bytes".into(),
        };
        let status = Status::from(Denied::Invalid(vec![violation]));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "user_id: got 300 bytes, want at most 255 bytes");
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        assert_eq!((violations[0].field.as_str(), violations[0].reason.as_str()), ("user_id", "ID_TOO_LONG"));
        assert_eq!(details.error_info().unwrap().reason, "ID_TOO_LONG");
    }

    #[test]
    fn a_full_queue_says_when_to_come_back() {
        let status = Status::from(Denied::Full { retry_delay: Duration::from_millis(500) });
        assert_eq!(status.code(), Code::ResourceExhausted);
        let details = status.get_error_details();
        assert_eq!(details.retry_info().unwrap().retry_delay, Some(Duration::from_millis(500)));
    }

    /// Callers take 8 KiB of headers, and details travel in base64.
    #[test]
    fn a_message_nested_beyond_all_limits_gets_an_answer_that_fits_into_headers() {
        let mut message = Vec::new();
        for _ in 0..4000 {
            // A list in a value in a list: each a field of length-delimited bytes.
            let length = message.len();
            let mut outer = vec![(5 << 3) | 2];
            prost::encoding::encode_varint(length as u64, &mut outer);
            outer.append(&mut message);
            message = vec![(1 << 3) | 2];
            prost::encoding::encode_varint(outer.len() as u64, &mut message);
            message.append(&mut outer);
        }
        let error = <crate::proto::v1::PropertyList as prost::Message>::decode(&*message).unwrap_err();
        assert!(error.to_string().len() > 1000, "the decoder tells every level");
        let status = malformed(&error);
        assert!(status.message().len() + status.details().len() * 4 / 3 < 4096, "{}", status.details().len());
    }

    #[test]
    fn a_draining_relay_is_unavailable() {
        assert_eq!(Status::from(Denied::Draining).code(), Code::Unavailable);
    }
}
