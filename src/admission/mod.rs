//! Validates, normalises, assigns id and time: the only way into the queue.
//!
//! Every front door hands over a [`Draft`] and turns the answer into a reply.
//! Nothing here waits, but for the disk if the event is to be durable. The rules
//! are in [`validate`], what is mended rather than refused in [`lenient`], and the
//! words for callers in [`denied`].

use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use analytics_relay_providers::{Event, EventId};
use prometheus_client::metrics::counter::Counter;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

use crate::{
    address::IpPolicy,
    privacy::suppression::{Ids, Suppressed},
    queue::{Durability, Queue, Refused, Row, Taken},
    reasons::RefusalReason,
    telemetry::AdmissionMetrics,
    time::{CheckedClock, Clock},
};

pub(crate) mod context;
pub(crate) mod denied;
pub(crate) mod draft;
pub(crate) mod input;
pub(crate) mod lenient;
pub(crate) mod shaping;
mod validate;

use context::CallContext;
use denied::{Denied, Violation};
use draft::Draft;
use input::{InputRules, InputSettings, Suspicions};
use lenient::Mends;
use shaping::{ENRICHED_BYTES, Found, Shaping};

/// How long a stream is not read on when the queue is full: a caller is held back
/// rather than turned away, but learns in time that nothing moves.
const FULL_PATIENCE: Duration = Duration::from_secs(5);
/// Longest wait for the disk: a caller is told why, and need not guess.
const DISK_PATIENCE: Duration = Duration::from_secs(8);

/// The event that a draft would become, which is not taken; or every rule that it breaks.
pub(crate) fn event_of(draft: &Draft<'_>, shaping: &Shaping, now_ms: i64) -> Result<Event, Vec<Violation>> {
    let edge = draft.more.as_ref().map(|more| more.edge).unwrap_or_default();
    let packed = validate::check(draft, None, now_ms, || true, |parts| shaping.pack(parts, &edge).0);
    packed.map(|(event, _)| event)
}

/// An event that was admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Accepted {
    pub(crate) event_id: EventId<'static>,
    /// What the answer promises.
    pub(crate) durability: Durability,
}

/// Events that were put, or denied and counted so, and wait for their answers.
#[derive(Debug)]
pub(crate) struct PutBatch(Vec<Result<(EventId<'static>, Taken), Denied>>);

impl PutBatch {
    /// Those that break rules, by their places: the first rule of each.
    pub(crate) fn invalid(&self) -> impl Iterator<Item = (usize, &Violation)> {
        self.0.iter().enumerate().filter_map(|(place, put)| match put {
            Err(Denied::Invalid(violations)) => Some((place, &violations[0])),
            _ => None,
        })
    }
}

/// An event that breaks no rule, and what it is to become.
#[derive(Debug)]
struct Checked {
    event: Event,
    /// How durable it has to be.
    wanted: Durability,
    mends: Mends,
    /// What is counted of it.
    found: Found,
    suspicions: Suspicions,
}

/// The gate before the queue.
#[derive(Debug)]
pub(crate) struct Admission {
    queue: Queue,
    clock: CheckedClock,
    metrics: AdmissionMetrics,
    shaping: Shaping,
    input: InputRules,
    closed: AtomicBool,
    /// Users of whom nothing is taken.
    suppressed: Option<Arc<Suppressed>>,
}

impl Admission {
    pub(crate) fn new(queue: Queue, clock: Clock, metrics: AdmissionMetrics) -> Self {
        Self {
            queue,
            clock: CheckedClock::new(clock),
            metrics,
            shaping: Shaping::default(),
            input: InputRules::default(),
            closed: AtomicBool::new(false),
            suppressed: None,
        }
    }

    /// Takes nothing of those who are suppressed.
    pub(crate) fn without(self, suppressed: Arc<Suppressed>) -> Self {
        Self { suppressed: Some(suppressed), ..self }
    }

    /// With what becomes of events before they are kept.
    pub(crate) fn with_shaping(self, shaping: Shaping) -> Self {
        Self { shaping, ..self }
    }

    /// How much of users' addresses is kept.
    pub(crate) fn ip_policy(&self) -> IpPolicy {
        self.shaping.ip_policy
    }

    /// About what is added to each event of a user's device.
    pub(crate) fn enriched_bytes(&self) -> usize {
        if self.shaping.enricher.is_some() { ENRICHED_BYTES } else { 0 }
    }

    /// True if events of users who decline go to nobody.
    pub(crate) fn drops_declined(&self) -> bool {
        self.shaping.drops_declined
    }

    /// The same with rules that are not every relay's.
    pub(crate) fn with_input(self, settings: InputSettings) -> Self {
        Self { input: InputRules::new(settings), ..self }
    }

    /// Admits an event into the queue, or says why not. Waits for the disk, if
    /// the event is to be durable, and for nothing else. If the future is
    /// dropped, the event may be admitted all the same.
    pub(crate) fn admit(
        &self,
        draft: Draft<'_>,
        call: &CallContext<'_>,
    ) -> impl Future<Output = Result<Accepted, Denied>> + use<'_> {
        let put = self.check(&draft, call, self.clock.now_ms()).and_then(|checked| self.put(checked, None));
        self.accepted(put.map_err(|denied| self.denied_to(denied, call)), None)
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
        call: &CallContext<'_>,
    ) -> PutBatch {
        let (mut no_room, mut row, now_ms) = (None, Row::default(), self.clock.now_ms());
        let mut put_next = |draft: Result<Draft<'_>, Violation>| {
            let checked = self.checked(&draft, call, now_ms)?;
            if let Some(denied) = &no_room {
                return Err(Denied::clone(denied));
            }
            let put = self.put(checked, Some(&mut row));
            no_room = put.as_ref().err().cloned();
            put
        };
        // Counted here: who is refused may not wait for its answer.
        PutBatch(drafts.map(|draft| put_next(draft).map_err(|denied| self.denied_to(denied, call))).collect())
    }

    /// Puts a batch whose caller sends all of it again if it is told to wait. So none of it
    /// is taken if there is no room for all; others may take that room meanwhile, and one
    /// that is larger than half of the queue has to go in piece by piece: then its rest
    /// waits, in a bounded time. So many bytes is about what its events will hold.
    pub(crate) async fn put_whole_batch<'a>(
        &self,
        drafts: impl ExactSizeIterator<Item = Result<Draft<'a>, Violation>> + Send,
        bytes: usize,
        call: &CallContext<'_>,
    ) -> PutBatch {
        let events = drafts.len();
        if !self.queue.has_room_for(events, bytes) {
            let full = || Err(self.denied_to(Refused::Full.into(), call));
            return PutBatch((0..events).map(|_| full()).collect());
        }
        let patience_ends = Instant::now() + FULL_PATIENCE;
        let (mut no_room, mut row, now_ms) = (None, Row::default(), self.clock.now_ms());
        let mut puts = Vec::with_capacity(events);
        for draft in drafts {
            let mut put = self.checked(&draft, call, now_ms).and_then(|checked| match &no_room {
                Some(denied) => Err(Denied::clone(denied)),
                None => self.put(checked, Some(&mut row)),
            });
            if no_room.is_none() && matches!(put, Err(Denied::Full { .. })) {
                put = self.put_when_room(&draft, call, &mut row, patience_ends).await;
            }
            no_room = no_room
                .or_else(|| put.as_ref().err().filter(|denied| denied.retry_delay().is_some()).cloned());
            puts.push(put.map_err(|denied| self.denied_to(denied, call)));
        }
        PutBatch(puts)
    }

    /// Puts an event that found no room as soon as enough has left the queue, or denies it
    /// when it is time. Asks once for each time that some has left.
    async fn put_when_room(
        &self,
        draft: &Result<Draft<'_>, Violation>,
        call: &CallContext<'_>,
        row: &mut Row,
        patience_ends: Instant,
    ) -> Result<(EventId<'static>, Taken), Denied> {
        loop {
            let mut some_left = pin!(self.queue.room().some_left());
            some_left.as_mut().enable();
            let checked = self.checked(draft, call, self.clock.now_ms())?;
            let put = self.put(checked, Some(row));
            let is_full = matches!(put, Err(Denied::Full { .. }));
            if !is_full || timeout_at(patience_ends, some_left).await.is_err() {
                return put;
            }
        }
    }

    fn checked(
        &self,
        draft: &Result<Draft<'_>, Violation>,
        call: &CallContext<'_>,
        now_ms: i64,
    ) -> Result<Checked, Denied> {
        match draft {
            Ok(draft) => self.check(draft, call, now_ms),
            Err(violation) => Err(Denied::Invalid(vec![violation.clone()])),
        }
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

    /// The counter of one reason, for what is refused before it comes here.
    pub(crate) fn refusals(&self, reason: RefusalReason) -> &Counter {
        self.metrics.refused(reason)
    }

    /// The time by which events are admitted: Unix time in milliseconds.
    pub(crate) fn now_ms(&self) -> i64 {
        self.clock.now_ms()
    }

    /// True once everything is refused.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Refuses everything from now on.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// True if the relay's clock can be believed now; else no event is refused for
    /// its time.
    pub(crate) fn trusts_its_clock(&self) -> bool {
        self.clock.is_trusted()
    }

    /// The event that a draft becomes, and how durable it is to be.
    fn check(&self, draft: &Draft<'_>, call: &CallContext<'_>, now_ms: i64) -> Result<Checked, Denied> {
        if self.is_closed() {
            return Err(Denied::Draining);
        }
        let is_trusted = || self.clock.is_trusted();
        let edge = draft.more.as_ref().map(|more| more.edge).unwrap_or_default();
        let checked =
            validate::check(draft, call.tenant, now_ms, is_trusted, |parts| self.shaping.pack(parts, &edge));
        let strict = self.input.violations(draft, call.door);
        let wanted = self.check_durability(draft.durability);
        match checked {
            Ok(((event, _), _)) if self.is_suppressed(&event) => {
                Err(Denied::Invalid(vec![Violation::of_suppressed_user()]))
            }
            Ok(((event, found), mends)) if strict.is_empty() => {
                let wanted = wanted.map_err(|violation| Denied::Invalid(vec![violation]))?;
                Ok(Checked { event, wanted, mends, found, suspicions: self.input.suspicions(draft) })
            }
            checked => {
                let violations = checked.err().into_iter().flatten().chain(strict);
                Err(Denied::Invalid(violations.chain(wanted.err()).collect()))
            }
        }
    }

    #[inline]
    fn is_suppressed(&self, event: &Event) -> bool {
        self.suppressed.as_ref().is_some_and(|list| list.covers_event(event))
    }

    /// True if one of these ids is of a user who is erased.
    pub(crate) fn suppresses(&self, ids: Ids<'_>) -> bool {
        self.suppressed.as_ref().is_some_and(|list| list.covers(ids))
    }

    fn put(&self, checked: Checked, row: Option<&mut Row>) -> Result<(EventId<'static>, Taken), Denied> {
        let Checked { event, wanted, mends, found, suspicions } = checked;
        let event_id = event.id().into_owned();
        let taken = self.queue.put(event, wanted, row)?;
        if !mends.is_empty() {
            mends.each().for_each(|mended| {
                self.metrics.mended(mended).inc();
            });
        }
        self.shaping.count(found);
        if !suspicions.is_empty() {
            suspicions.each().for_each(|kind| {
                self.metrics.suspicious(kind).inc();
            });
        }
        Ok((event_id, taken))
    }

    /// The answer to an event that was put, or denied and counted, when the disk has it;
    /// the patience begins now if it is not given.
    async fn accepted(
        &self,
        put: Result<(EventId<'static>, Taken), Denied>,
        patience_ends: Option<Instant>,
    ) -> Result<Accepted, Denied> {
        let (event_id, taken) = put?;
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

    /// Counts the denial of an event of a call, and says at the level of debugging whose, as
    /// far as that is kept.
    pub(crate) fn denied_to(&self, denied: Denied, call: &CallContext<'_>) -> Denied {
        let CallContext { door, credential, schema_version, .. } = call;
        let [peer, client] = call.shown(self.ip_policy()).map(|ip| ip.map(tracing::field::display));
        let (door, reason) = (door.name(), denied.reason().name());
        debug!(door, peer, client, ?credential, schema_version, reason, "event refused");
        self.counted(denied)
    }

    /// Counts a denial of which no more is known than why.
    pub(crate) fn denied(&self, denied: Denied) -> Denied {
        debug!(reason = denied.reason().name(), "event refused");
        self.counted(denied)
    }

    fn counted(&self, denied: Denied) -> Denied {
        self.metrics.refused(denied.reason()).inc();
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

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use analytics_relay_providers::Properties;

    use super::{denied::FULL_RETRY_DELAY, draft::DraftKind, *};
    use crate::queue::{
        QueueLimits,
        memory::{self, QueueReceiver},
    };

    const NOW_MS: i64 = 1_767_225_600_000;
    const CALL: CallContext<'static> = CallContext::of_grpc(IpAddr::V4(Ipv4Addr::LOCALHOST));

    pub(super) fn draft() -> Draft<'static> {
        Draft {
            kind: DraftKind::Track { event_name: "Order Placed".into() },
            event_id: "".into(),
            user_id: "user-1".into(),
            anonymous_id: "".into(),
            time_ms: None,
            ip: "".into(),
            user_agent: "".into(),
            properties: Ok(Properties::empty()),
            more: None,
            durability: Ok(None),
        }
    }

    fn admission(events_max: usize) -> (Admission, QueueReceiver) {
        let (sender, receiver) = memory::bounded(QueueLimits { events_max, bytes_max: usize::MAX });
        let queue = Queue::Memory(sender, Counter::default());
        (Admission::new(queue, Clock::from_fn(|| NOW_MS), AdmissionMetrics::default()), receiver)
    }

    #[tokio::test]
    async fn an_id_and_a_time_are_assigned_when_the_caller_gives_none() {
        let (admission, mut receiver) = admission(10);
        let accepted = admission.admit(draft(), &CALL).await.unwrap();
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
        admission.admit(draft(), &CALL).await.unwrap();
        assert_eq!(
            admission.admit(draft(), &CALL).await,
            Err(Denied::Full { retry_delay: FULL_RETRY_DELAY })
        );
        // A handler that passed the gate before it closed meets the closed queue.
        receiver.close();
        receiver.recv_many(&mut Vec::new(), 10).await;
        assert_eq!(admission.admit(draft(), &CALL).await, Err(Denied::Draining));
        admission.close();
        assert_eq!(admission.admit(draft(), &CALL).await, Err(Denied::Draining));
    }

    #[tokio::test]
    async fn a_relay_without_a_log_refuses_to_promise_one() {
        let (admission, _receiver) = admission(10);
        for (asked, got) in [(Ok(Some(Durability::Synced)), "SYNCED"), (Err(9), "9")] {
            let denied = admission.admit(Draft { durability: asked, ..draft() }, &CALL).await.unwrap_err();
            let Denied::Invalid(violations) = &denied else { panic!("{denied:?}") };
            assert_eq!((violations[0].field.as_str(), violations[0].got.as_str()), ("durability", got));
            assert_eq!(denied.reason(), RefusalReason::DurabilityUnavailable);
        }
        let queued = Draft { durability: Ok(Some(Durability::Queued)), ..draft() };
        assert_eq!(admission.admit(queued, &CALL).await.unwrap().durability, Durability::Queued);
    }

    #[test]
    fn reasons_have_distinct_names() {
        let names: std::collections::HashSet<_> = RefusalReason::ALL.map(RefusalReason::name).into();
        assert_eq!(names.len(), RefusalReason::ALL.len());
    }
}
