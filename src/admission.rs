//! Validates, normalises, assigns id and time: the only way into the queue.
//!
//! Every front door hands over a [`Draft`] and turns the answer into a reply.
//! Nothing here waits, but for the disk if the event is to be durable.

use std::{
    borrow::Cow,
    future::Future,
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use analytics_relay_providers::{
    Event, EventId, EventKind, EventParts, Properties,
    event::{ID_BYTES_MAX, NAME_BYTES_MAX, USER_AGENT_BYTES_MAX},
    properties::{PropertyError, PropertyFault},
};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

use crate::{
    queue::{Durability, Queue, Refused, Row, Taken},
    reasons::RefusalReason,
    telemetry::AdmissionMetrics,
    time::{Clock, rfc_3339},
};

/// 2000-01-01T00:00:00Z, the earliest time of an event.
const TIME_MS_MIN: i64 = 946_684_800_000;
/// How far ahead of our clock an event's time may be.
const AHEAD_MS_MAX: i64 = 24 * 3600 * 1000;
/// How long a caller should wait when the queue is full: long enough for many
/// batches to leave, short enough that a caller's own buffer lasts.
const FULL_RETRY_DELAY: Duration = Duration::from_millis(500);
/// How long a stream is not read on when the queue is full: a caller is held back
/// rather than turned away, but learns in time that nothing moves.
const FULL_PATIENCE: Duration = Duration::from_secs(5);
/// How long a caller should wait when the spool is full: until a provider comes
/// back, or a person has made room.
const SPOOL_FULL_RETRY_DELAY: Duration = Duration::from_secs(5);
/// How long a caller should wait for a relay that stops, or whose disk fails: by
/// then a load balancer should know.
const UNAVAILABLE_RETRY_DELAY: Duration = Duration::from_secs(1);
/// Longest wait for the disk: a caller is told why, and need not guess.
const DISK_PATIENCE: Duration = Duration::from_secs(8);
/// Most characters of a refused text that are shown to its sender.
const SHOWN_CHARS_MAX: usize = 40;

/// An event as it came, checked by nobody yet. Empty texts mean "not given".
#[derive(Debug)]
pub(crate) struct Draft<'a> {
    pub(crate) kind: DraftKind<'a>,
    pub(crate) event_id: Cow<'a, str>,
    pub(crate) user_id: Cow<'a, str>,
    pub(crate) anonymous_id: Cow<'a, str>,
    /// The front door's field and its time in Unix milliseconds, if given.
    pub(crate) time_ms: Option<(&'static str, i64)>,
    pub(crate) ip: Cow<'a, str>,
    pub(crate) user_agent: Cow<'a, str>,
    /// Encoded by the front door, which alone knows their form on the wire.
    pub(crate) properties: Result<Properties<'a>, BadProperties>,
    /// How durable it has to be before the answer, if it says; a number that
    /// means nothing.
    pub(crate) durability: Result<Option<Durability>, i32>,
}

/// Why a draft has no properties.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BadProperties {
    /// Those in the front door's `field` break a rule.
    Faulty { field: &'static str, error: PropertyError },
    /// Two of the front door's fields hold some.
    Twice { field: &'static str, other: &'static str },
}

/// What kind of event is to be admitted.
#[derive(Debug)]
pub(crate) enum DraftKind<'a> {
    Track { event_name: Cow<'a, str> },
    Identify,
}

/// An event that was admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Accepted {
    pub(crate) event_id: EventId<'static>,
    /// What the answer promises.
    pub(crate) durability: Durability,
}

/// Events that were put, or denied, and wait for their answers.
#[derive(Debug)]
pub(crate) struct PutBatch(Vec<Result<(EventId<'static>, Taken), Denied>>);

/// Why an event was not admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Denied {
    /// It breaks rules, at least one, and always will.
    Invalid(Vec<Violation>),
    /// There is no room in the queue now.
    Full { retry_delay: Duration },
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

/// The gate before the queue.
#[derive(Debug)]
pub(crate) struct Admission {
    queue: Queue,
    clock: Clock,
    metrics: AdmissionMetrics,
    closed: AtomicBool,
}

impl Admission {
    pub(crate) fn new(queue: Queue, clock: Clock, metrics: AdmissionMetrics) -> Self {
        Self { queue, clock, metrics, closed: AtomicBool::new(false) }
    }

    /// Admits an event into the queue, or says why not. Waits for the disk, if
    /// the event is to be durable, and for nothing else. If the future is
    /// dropped, the event may be admitted all the same.
    pub(crate) fn admit(&self, draft: Draft<'_>) -> impl Future<Output = Result<Accepted, Denied>> + use<'_> {
        let put = self.check(&draft, self.clock.now_ms()).and_then(|checked| self.put(checked, None));
        self.accepted(put, None)
    }

    /// Waits until so many events may find room in the queue, but not for long: then
    /// they are denied, and their caller knows why. Bytes are those of memory.
    pub(crate) async fn room_for(&self, events: usize, bytes: usize) {
        let _ = timeout(FULL_PATIENCE, self.queue.room_for(events, bytes)).await;
    }

    /// Puts events into the queue, one after the other, or denies them. From the
    /// first that there is no room for, none is taken: sent again together they
    /// keep their order. The answers are [`Self::answers`].
    pub(crate) fn put_batch<'a>(
        &self,
        drafts: impl Iterator<Item = Result<Draft<'a>, Violation>>,
    ) -> PutBatch {
        let (mut no_room, mut row, now_ms) = (None, Row::default(), self.clock.now_ms());
        let put_next = |draft: Result<Draft<'_>, Violation>| {
            let checked = draft
                .map_err(|violation| Denied::Invalid(vec![violation]))
                .and_then(|draft| self.check(&draft, now_ms))?;
            if let Some(denied) = &no_room {
                return Err(Denied::clone(denied));
            }
            let put = self.put(checked, Some(&mut row));
            no_room = put.as_ref().err().cloned();
            put
        };
        PutBatch(drafts.map(put_next).collect())
    }

    /// An answer for each event that was put. Waits for the disk, if it has to.
    pub(crate) async fn answers(&self, PutBatch(puts): PutBatch) -> Vec<Result<Accepted, Denied>> {
        let patience_ends = Some(Instant::now() + DISK_PATIENCE);
        let mut answers = Vec::with_capacity(puts.len());
        for put in puts {
            answers.push(self.accepted(put, patience_ends).await);
        }
        answers
    }

    /// True once everything is refused.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Refuses everything from now on.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// The event that a draft becomes, and how durable it is to be.
    fn check(&self, draft: &Draft<'_>, now_ms: i64) -> Result<(Event, Durability), Denied> {
        if self.is_closed() {
            return Err(Denied::Draining);
        }
        match (check(draft, now_ms), self.check_durability(draft.durability)) {
            (Ok(event), Ok(wanted)) => Ok((event, wanted)),
            (Ok(_), Err(violation)) => Err(Denied::Invalid(vec![violation])),
            (Err(violations), wanted) => {
                Err(Denied::Invalid(violations.into_iter().chain(wanted.err()).collect()))
            }
        }
    }

    fn put(
        &self,
        (event, wanted): (Event, Durability),
        row: Option<&mut Row>,
    ) -> Result<(EventId<'static>, Taken), Denied> {
        let event_id = event.id().into_owned();
        let taken = self.queue.put(event, wanted, row)?;
        Ok((event_id, taken))
    }

    /// The answer to an event that was put, when the disk has it; the patience
    /// begins now if it is not given.
    async fn accepted(
        &self,
        put: Result<(EventId<'static>, Taken), Denied>,
        patience_ends: Option<Instant>,
    ) -> Result<Accepted, Denied> {
        let (event_id, taken) = put.map_err(|denied| self.denied(denied))?;
        let durable = match taken {
            // Waiting for memory needs no timer.
            Taken::Done => taken.durable().await,
            Taken::Appended(_) => {
                let patience_ends = patience_ends.unwrap_or_else(|| Instant::now() + DISK_PATIENCE);
                timeout_at(patience_ends, taken.durable()).await.unwrap_or(Err(Refused::SpoolFailed))
            }
        };
        let durability = durable.map_err(|refused| self.denied(refused.into()))?;
        debug!(%event_id, %durability, queue_size = self.queue.events(), "event queued");
        Ok(Accepted { event_id, durability })
    }

    /// Counts a denial.
    pub(crate) fn denied(&self, denied: Denied) -> Denied {
        let reason = denied.reason();
        self.metrics.refused(reason).inc();
        debug!(reason = reason.name(), "event refused");
        denied
    }

    /// The level that an event gets: the one that was asked for, or else the
    /// relay's own.
    fn check_durability(&self, asked: Result<Option<Durability>, i32>) -> Result<Durability, Violation> {
        let highest = self.queue.highest_level();
        let unavailable = |got: String| Violation {
            reason: RefusalReason::DurabilityUnavailable,
            field: "durability".into(),
            got,
            want: match highest {
                Durability::Queued => "none or QUEUED (this relay runs DURABILITY=memory)".into(),
                _ => "none, QUEUED, WRITTEN or SYNCED".into(),
            },
        };
        match asked {
            Ok(None) => Ok(self.queue.default_level()),
            Ok(Some(level)) if level <= highest => Ok(level),
            Ok(Some(level)) => Err(unavailable(level.name().to_ascii_uppercase())),
            Err(number) => Err(unavailable(number.to_string())),
        }
    }
}

impl Denied {
    /// The reason that stands for the denial in logs and metrics: of several
    /// violations the first.
    pub(crate) fn reason(&self) -> RefusalReason {
        match self {
            Self::Invalid(violations) => violations[0].reason,
            Self::Full { .. } => RefusalReason::QueueFull,
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
            Self::Full { retry_delay } | Self::SpoolFull { retry_delay } => Some(*retry_delay),
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

/// Turns a draft into an event, or names every rule that it breaks.
fn check(draft: &Draft<'_>, now_ms: i64) -> Result<Event, Vec<Violation>> {
    let mut violations = Vec::new();
    let mut note = |violation: Option<Violation>| violations.extend(violation);

    let kind = match &draft.kind {
        DraftKind::Track { event_name } => {
            note(check_event_name(event_name));
            EventKind::Track { name: event_name }
        }
        DraftKind::Identify => {
            note(draft.user_id.is_empty().then(|| Violation {
                reason: RefusalReason::UserIdMissing,
                field: "user_id".into(),
                got: "\"\"".into(),
                want: format!("1 to {ID_BYTES_MAX} bytes"),
            }));
            EventKind::Identify
        }
    };
    note(too_long(RefusalReason::IdTooLong, "user_id", &draft.user_id, ID_BYTES_MAX));
    note(too_long(RefusalReason::IdTooLong, "anonymous_id", &draft.anonymous_id, ID_BYTES_MAX));
    let id = if draft.event_id.is_empty() { Ok(EventId::assign()) } else { EventId::new(&*draft.event_id) };
    note(id.as_ref().err().map(|error| Violation {
        reason: RefusalReason::EventIdInvalid,
        field: "event_id".into(),
        got: shown(&draft.event_id),
        want: error.to_string().trim_start_matches("want ").to_owned(),
    }));
    note(draft.time_ms.and_then(|(field, time_ms)| check_time(field, time_ms, now_ms)));
    let ip = (!draft.ip.is_empty()).then(|| draft.ip.parse::<IpAddr>());
    note(matches!(ip, Some(Err(_))).then(|| Violation {
        reason: RefusalReason::IpInvalid,
        field: "context.ip".into(),
        got: shown(&draft.ip),
        want: "an IPv4 or IPv6 address without a port".into(),
    }));
    let user_agent = &draft.user_agent;
    note(too_long(RefusalReason::UserAgentTooLong, "context.user_agent", user_agent, USER_AGENT_BYTES_MAX));
    note(draft.properties.as_ref().err().map(properties_violation));

    match (id, &draft.properties) {
        (Ok(id), Ok(properties)) if violations.is_empty() => Ok(Event::pack(&EventParts {
            id,
            kind,
            user_id: given(&draft.user_id),
            anonymous_id: given(&draft.anonymous_id),
            time_ms: draft.time_ms.map_or(now_ms, |(_, time_ms)| time_ms),
            accepted_ms: now_ms,
            ip: ip.and_then(Result::ok),
            user_agent: given(user_agent),
            properties: properties.borrowed(),
        })),
        _ => Err(violations),
    }
}

fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

fn check_event_name(name: &str) -> Option<Violation> {
    if name.is_empty() {
        return Some(Violation {
            reason: RefusalReason::EventNameEmpty,
            field: "event_name".into(),
            got: "\"\"".into(),
            want: format!("1 to {NAME_BYTES_MAX} bytes"),
        });
    }
    too_long(RefusalReason::EventNameTooLong, "event_name", name, NAME_BYTES_MAX)
}

#[inline]
fn too_long(reason: RefusalReason, field: &str, text: &str, bytes_max: usize) -> Option<Violation> {
    (text.len() > bytes_max).then(|| Violation {
        reason,
        field: field.to_owned(),
        got: format!("{} bytes", text.len()),
        want: format!("at most {bytes_max} bytes"),
    })
}

#[inline]
fn check_time(field: &str, time_ms: i64, now_ms: i64) -> Option<Violation> {
    let latest_ms = now_ms.saturating_add(AHEAD_MS_MAX);
    (!(TIME_MS_MIN..=latest_ms).contains(&time_ms)).then(|| Violation {
        reason: RefusalReason::TimeOutOfRange,
        field: field.to_owned(),
        got: rfc_3339(time_ms),
        want: format!("{} to {} (24 hours ahead of the relay)", rfc_3339(TIME_MS_MIN), rfc_3339(latest_ms)),
    })
}

fn properties_violation(bad: &BadProperties) -> Violation {
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
            PropertyFault::TooLarge(_) => RefusalReason::PropertiesTooLarge,
            PropertyFault::TooManyKeys => RefusalReason::PropertiesTooManyKeys,
            PropertyFault::TooDeep => RefusalReason::PropertiesTooDeep,
            PropertyFault::EmptyKey => RefusalReason::PropertyKeyEmpty,
            PropertyFault::NonFinite(_) => RefusalReason::PropertyNumberNotFinite,
            PropertyFault::NotJson(_) => RefusalReason::PropertiesMalformed,
        },
        field: format!("{field}{joint}{}", error.path),
        got: got.trim_start_matches("got ").to_owned(),
        want: want.to_owned(),
    }
}

/// A caller's text, short and quoted, so that it can stand in a message.
fn shown(text: &str) -> String {
    let cut: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    let dots = if cut.len() < text.len() { "…" } else { "" };
    format!("{cut:?}{dots}")
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;
    use crate::queue::{
        QueueLimits,
        memory::{self, QueueReceiver},
    };

    const NOW_MS: i64 = 1_767_225_600_000;

    fn draft() -> Draft<'static> {
        Draft {
            kind: DraftKind::Track { event_name: "Order Placed".into() },
            event_id: "".into(),
            user_id: "user-1".into(),
            anonymous_id: "".into(),
            time_ms: None,
            ip: "".into(),
            user_agent: "".into(),
            properties: Ok(Properties::empty()),
            durability: Ok(None),
        }
    }

    fn admission(events_max: usize) -> (Admission, QueueReceiver) {
        let (sender, receiver) = memory::bounded(QueueLimits { events_max, bytes_max: usize::MAX });
        let queue = Queue::Memory(sender, Counter::default());
        (Admission::new(queue, Clock::from_fn(|| NOW_MS), AdmissionMetrics::default()), receiver)
    }

    fn violations(change: impl FnOnce(&mut Draft<'static>)) -> Vec<(RefusalReason, String)> {
        let mut draft = draft();
        change(&mut draft);
        match check(&draft, NOW_MS) {
            Ok(_) => Vec::new(),
            Err(violations) => violations.into_iter().map(|v| (v.reason, v.field)).collect(),
        }
    }

    #[test]
    fn each_limit_holds_at_n_and_breaks_at_n_plus_one() {
        type Change = fn(&mut Draft<'static>, i64);
        let rows: [(Change, i64, i64, RefusalReason, &str); 7] = [
            (
                |d, n| d.kind = DraftKind::Track { event_name: "x".repeat(n as usize).into() },
                255,
                256,
                RefusalReason::EventNameTooLong,
                "event_name",
            ),
            (|d, n| d.user_id = "x".repeat(n as usize).into(), 255, 256, RefusalReason::IdTooLong, "user_id"),
            (
                |d, n| d.anonymous_id = "x".repeat(n as usize).into(),
                255,
                256,
                RefusalReason::IdTooLong,
                "anonymous_id",
            ),
            (
                |d, n| d.event_id = "x".repeat(n as usize).into(),
                100,
                101,
                RefusalReason::EventIdInvalid,
                "event_id",
            ),
            (
                |d, n| d.user_agent = "x".repeat(n as usize).into(),
                1024,
                1025,
                RefusalReason::UserAgentTooLong,
                "context.user_agent",
            ),
            (
                |d, n| d.time_ms = Some(("timestamp", n)),
                TIME_MS_MIN,
                TIME_MS_MIN - 1,
                RefusalReason::TimeOutOfRange,
                "timestamp",
            ),
            (
                |d, n| d.time_ms = Some(("timestamp_ms", n)),
                NOW_MS + AHEAD_MS_MAX,
                NOW_MS + AHEAD_MS_MAX + 1,
                RefusalReason::TimeOutOfRange,
                "timestamp_ms",
            ),
        ];
        for (change, good, bad, reason, field) in rows {
            assert_eq!(violations(|draft| change(draft, good)), [], "{field} {good}");
            assert_eq!(violations(|draft| change(draft, bad)), [(reason, field.to_owned())], "{field} {bad}");
        }
    }

    #[test]
    fn bytes_are_counted_and_not_characters() {
        let name = "é".repeat(128);
        assert_eq!(
            violations(|draft| draft.kind = DraftKind::Track { event_name: name.into() }),
            [(RefusalReason::EventNameTooLong, "event_name".to_owned())]
        );
    }

    #[test]
    fn every_broken_rule_is_named_at_once() {
        let found = violations(|draft| {
            draft.kind = DraftKind::Identify;
            draft.user_id = "".into();
            draft.event_id = "tab\t".into();
            draft.ip = "1.2.3.4:80".into();
            draft.time_ms = Some(("timestamp_ms", i64::MIN));
            draft.properties = Properties::parse(r#"{"":1}"#)
                .map_err(|error| BadProperties::Faulty { field: "properties", error });
        });
        let reasons: Vec<_> = found.into_iter().map(|(reason, _)| reason.name()).collect();
        assert_eq!(
            reasons,
            ["USER_ID_MISSING", "EVENT_ID_INVALID", "TIME_OUT_OF_RANGE", "IP_INVALID", "PROPERTY_KEY_EMPTY"]
        );
    }

    #[test]
    fn a_violation_says_what_came_and_what_is_allowed() {
        let error =
            PropertyError { path: "cart[2].price".into(), fault: PropertyFault::NonFinite("NaN".into()) };
        let violation = properties_violation(&BadProperties::Faulty { field: "properties", error });
        assert_eq!(violation.field, "properties.cart[2].price");
        assert_eq!((violation.got.as_str(), violation.want.as_str()), ("NaN", "a finite number"));
    }

    #[tokio::test]
    async fn an_id_and_a_time_are_assigned_when_the_caller_gives_none() {
        let (admission, mut receiver) = admission(10);
        let accepted = admission.admit(draft()).await.unwrap();
        let mut events = Vec::new();
        receiver.recv_many(&mut events, 10).await;
        let event = &events[0].event;
        assert_eq!(event.id(), accepted.event_id);
        assert_eq!(accepted.durability, Durability::Queued);
        assert_eq!(accepted.event_id.as_str().len(), 36);
        assert_eq!((event.time_ms(), event.accepted_ms()), (NOW_MS, NOW_MS));
    }

    #[tokio::test]
    async fn a_full_queue_and_a_closed_gate_are_answered_at_once() {
        let (admission, mut receiver) = admission(1);
        admission.admit(draft()).await.unwrap();
        assert_eq!(admission.admit(draft()).await, Err(Denied::Full { retry_delay: FULL_RETRY_DELAY }));
        // A handler that passed the gate before it closed meets the closed queue.
        receiver.close();
        receiver.recv_many(&mut Vec::new(), 10).await;
        assert_eq!(admission.admit(draft()).await, Err(Denied::Draining));
        admission.close();
        assert_eq!(admission.admit(draft()).await, Err(Denied::Draining));
    }

    #[tokio::test]
    async fn a_relay_without_a_log_refuses_to_promise_one() {
        let (admission, _receiver) = admission(10);
        for (asked, got) in [(Ok(Some(Durability::Synced)), "SYNCED"), (Err(9), "9")] {
            let denied = admission.admit(Draft { durability: asked, ..draft() }).await.unwrap_err();
            let Denied::Invalid(violations) = &denied else { panic!("{denied:?}") };
            assert_eq!((violations[0].field.as_str(), violations[0].got.as_str()), ("durability", got));
            assert_eq!(denied.reason(), RefusalReason::DurabilityUnavailable);
        }
        let queued = Draft { durability: Ok(Some(Durability::Queued)), ..draft() };
        assert_eq!(admission.admit(queued).await.unwrap().durability, Durability::Queued);
    }

    #[test]
    fn reasons_have_distinct_names() {
        let names: std::collections::HashSet<_> = RefusalReason::ALL.map(RefusalReason::name).into();
        assert_eq!(names.len(), RefusalReason::ALL.len());
    }
}
