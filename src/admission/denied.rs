//! Why an event was not admitted, in words for its caller.

use std::time::Duration;

use analytics_relay_providers::properties::PropertyFault;

use super::draft::BadProperties;
use crate::{queue::Refused, reasons::RefusalReason};

/// How long a caller should wait when the queue is full: long enough for many
/// batches to leave, short enough that a caller's own buffer lasts.
pub(super) const FULL_RETRY_DELAY: Duration = Duration::from_millis(500);
/// How long a caller should wait when the spool is full: until a provider comes
/// back, or a person has made room.
const SPOOL_FULL_RETRY_DELAY: Duration = Duration::from_secs(5);
/// How long a caller should wait for a relay that stops, or whose disk fails: by
/// then a load balancer should know.
const UNAVAILABLE_RETRY_DELAY: Duration = Duration::from_secs(1);
/// Most characters of a refused text that are shown to its sender.
const SHOWN_CHARS_MAX: usize = 40;

/// Why an event was not admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Denied {
    /// It breaks rules, at least one, and always will.
    Invalid(Vec<Violation>),
    /// There is no room in the queue now.
    Full { retry_delay: Duration },
    /// Too many bytes of messages are being received now.
    ReceivingTooMuch { retry_delay: Duration },
    /// There is no room in the spool now.
    SpoolFull { retry_delay: Duration },
    /// The disk fails or hangs. Whether the event will be delivered is not known.
    SpoolFailed,
    /// The relay is stopping.
    Draining,
}

/// One rule that an event breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) reason: RefusalReason,
    /// The request's field, as in `properties.cart.total`.
    pub(crate) field: String,
    /// What came.
    pub(crate) got: String,
    /// What is allowed.
    pub(crate) want: String,
}

impl Violation {
    /// Of an event whose user is erased. Whose it is, nobody is told again.
    pub(super) fn of_suppressed_user() -> Self {
        Self {
            reason: RefusalReason::UserSuppressed,
            field: "user_id".into(),
            got: "an id that is erased and suppressed".into(),
            want: "one that is not".into(),
        }
    }
}

impl Denied {
    /// True if the event's user is erased.
    pub(crate) fn is_of_suppressed_user(&self) -> bool {
        self.reason() == RefusalReason::UserSuppressed
    }

    /// A message for which there is no room while it is being received.
    pub(crate) fn receiving_too_much() -> Self {
        Self::ReceivingTooMuch { retry_delay: FULL_RETRY_DELAY }
    }

    /// The reason that stands for the denial in logs and metrics: of several
    /// violations the first.
    pub(crate) fn reason(&self) -> RefusalReason {
        match self {
            Self::Invalid(violations) => violations[0].reason,
            Self::Full { .. } => RefusalReason::QueueFull,
            Self::ReceivingTooMuch { .. } => RefusalReason::ReceivingTooMuch,
            Self::SpoolFull { .. } => RefusalReason::SpoolFull,
            Self::SpoolFailed => RefusalReason::SpoolFailed,
            Self::Draining => RefusalReason::Draining,
        }
    }

    /// How long to wait before the event is sent again; nothing if it never will
    /// be admitted.
    pub(crate) fn retry_delay(&self) -> Option<Duration> {
        match self {
            Self::Invalid(_) => None,
            Self::Full { retry_delay }
            | Self::ReceivingTooMuch { retry_delay }
            | Self::SpoolFull { retry_delay } => Some(*retry_delay),
            Self::SpoolFailed | Self::Draining => Some(UNAVAILABLE_RETRY_DELAY),
        }
    }
}

impl From<Refused> for Denied {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full => Self::Full { retry_delay: FULL_RETRY_DELAY },
            Refused::SpoolFull => Self::SpoolFull { retry_delay: SPOOL_FULL_RETRY_DELAY },
            Refused::SpoolFailed => Self::SpoolFailed,
            Refused::Closed => Self::Draining,
        }
    }
}

/// The rule that properties break.
pub(super) fn properties_violation(bad: &BadProperties) -> Violation {
    let (field, error) = match bad {
        BadProperties::Faulty { field, error } => (field, error),
        BadProperties::Twice { field, other } => {
            return Violation {
                reason: RefusalReason::PropertiesTwice,
                field: (*field).to_owned(),
                got: format!("properties here and in {other}"),
                want: "one of the two".into(),
            };
        }
    };
    let text = error.fault.to_string();
    let (got, want) = text.split_once(", want ").unwrap_or((&text, "a JSON object"));
    let joint = if error.path.is_empty() || error.path.starts_with('[') { "" } else { "." };
    Violation {
        reason: match error.fault {
            PropertyFault::TooLarge { .. } => RefusalReason::PropertiesTooLarge,
            PropertyFault::TooManyKeys(_) => RefusalReason::PropertiesTooManyKeys,
            PropertyFault::TooDeep(_) => RefusalReason::PropertiesTooDeep,
            PropertyFault::EmptyKey => RefusalReason::PropertyKeyEmpty,
            PropertyFault::NonFinite(_) => RefusalReason::PropertyNumberNotFinite,
            PropertyFault::NotJson(_) => RefusalReason::PropertiesMalformed,
        },
        field: format!("{field}{joint}{}", error.path),
        got: got.trim_start_matches("got ").to_owned(),
        want: want.to_owned(),
    }
}

/// The rule that a context breaks: the same ones, under one reason.
pub(super) fn context_violation(bad: &BadProperties) -> Violation {
    Violation { reason: RefusalReason::ContextInvalid, ..properties_violation(bad) }
}

/// A caller's text, short and quoted, so that it can stand in a message.
pub(crate) fn shown(text: &str) -> String {
    let cut: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    let dots = if cut.len() < text.len() { "…" } else { "" };
    format!("{cut:?}{dots}")
}

/// A caller's value in such a message. Of one that holds others only what it is: it is kept
/// with an item that was refused, and in it may be what must not be.
pub(crate) fn shown_value(json: &str) -> String {
    match json.as_bytes().first() {
        Some(b'{') => "an object".to_owned(),
        Some(b'[') => "a list".to_owned(),
        _ => shown(json),
    }
}

#[cfg(test)]
mod tests {
    use analytics_relay_providers::properties::PropertyError;

    use super::*;

    #[test]
    fn of_a_value_that_holds_others_it_is_told_what_it_is_and_nothing_in_it() {
        for (json, want) in [
            (r#"{"email":"a@b"}"#, "an object"),
            (r#"["a@b"]"#, "a list"),
            ("1.50", r#""1.50""#),
            ("true", r#""true""#),
        ] {
            assert_eq!(shown_value(json), want);
        }
    }

    #[test]
    fn a_violation_says_what_came_and_what_is_allowed() {
        let error =
            PropertyError { path: "cart[2].price".into(), fault: PropertyFault::NonFinite("NaN".into()) };
        let violation = properties_violation(&BadProperties::Faulty { field: "properties", error });
        assert_eq!(violation.field, "properties.cart[2].price");
        assert_eq!((violation.got.as_str(), violation.want.as_str()), ("NaN", "a finite number"));
    }
}
