//! Sends dead letters again, through a lane like any other event.
//!
//! What the provider takes is noted, durably, so that it is never sent again;
//! what it does not take stays a dead letter, as it was.
//!
//! Letters with one id are one event to the provider, so the first of them is
//! sent. The others are told: those that are copies, and those that are other
//! events, which is the caller's mistake.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use analytics_relay_providers::{Event, EventId, Provider};
use async_trait::async_trait;
use tokio::{task::spawn_blocking, time::interval};
use tracing::error;

use super::{
    LaneInbox,
    backlog::Waiting,
    dead_letter::{DeadLetter, NotWritten, ReplayedLog},
    gate::ProviderState,
    lane::{Lane, LaneObservers, LaneSettings, LaneSource, LaneStatus},
    recorder::{Recorder, WritePermit},
};
use crate::{
    queue::{Place, Queued},
    reasons::{DeadLetterReason, DropReason},
    shutdown::Stop,
    telemetry::LaneMetrics,
    time::Clock,
};

/// How often it is looked whether the provider refuses everything.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// What a replay did.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct ReplayReport {
    /// Letters that the provider took.
    pub(crate) delivered: u64,
    /// Letters that it did not take again, by the new reason.
    pub(crate) failed: BTreeMap<DeadLetterReason, u64>,
    /// Letters that it took, which could not be noted: another replay would
    /// send them again.
    pub(crate) unnoted: u64,
    /// Identifies that were not asked for.
    pub(crate) skipped: u64,
    /// Letters that were not sent because they are copies of one that was.
    pub(crate) copies: u64,
    /// Those that were not sent because another event with their id was.
    pub(crate) others: Vec<EventId<'static>>,
    /// Letters that were not tried to the end.
    pub(crate) left: u64,
    /// The provider refuses our key, our address, or all that it was sent: its words.
    pub(crate) refused: Option<String>,
    /// It is the key or the address: no other letter can do better.
    pub(crate) unauthorized: bool,
}

impl ReplayReport {
    /// Adds another part of the same replay.
    pub(crate) fn add(&mut self, part: Self) {
        self.delivered += part.delivered;
        for (reason, letters) in part.failed {
            *self.failed.entry(reason).or_default() += letters;
        }
        self.unnoted += part.unnoted;
        self.skipped += part.skipped;
        self.copies += part.copies;
        self.others.extend(part.others);
        self.left += part.left;
        self.refused = self.refused.take().or(part.refused);
        self.unauthorized |= part.unauthorized;
    }
}

/// Events that this replay has delivered: what they say, by their ids.
#[derive(Debug, Default)]
pub(crate) struct Sent(HashMap<EventId<'static>, u64>);

impl Sent {
    /// Takes the first letter of each id that was not delivered, and notes the
    /// others in the report.
    fn take_first(&self, letters: Vec<DeadLetter>, report: &mut ReplayReport) -> (Vec<Event>, Self) {
        let mut taken = Self::default();
        let mut events = Vec::new();
        for DeadLetter { event, .. } in letters {
            let (id, content) = (event.id().into_owned(), content_of(&event));
            match self.0.get(&id).or_else(|| taken.0.get(&id)) {
                None => {
                    taken.0.insert(id, content);
                    events.push(event);
                }
                Some(sent) if *sent == content => report.copies += 1,
                Some(_) => report.others.push(id),
            }
        }
        (events, taken)
    }
}

/// Tells events from each other by what their callers said. A caller that asks
/// again says the same, at another time.
fn content_of(event: &Event) -> u64 {
    let mut hasher = DefaultHasher::new();
    (event.is_identify(), event.name(), event.user_id(), event.anonymous_id()).hash(&mut hasher);
    event.properties().json().hash(&mut hasher);
    hasher.finish()
}

/// Sends letters again, until each was tried to the end, the provider refuses
/// everything, or `stop` is forced. `sent` is what earlier parts of the same replay
/// have delivered, and is added to.
pub(crate) async fn replay(
    provider: Arc<dyn Provider>,
    settings: LaneSettings,
    letters: Vec<DeadLetter>,
    sent: &mut Sent,
    log: &Arc<Mutex<ReplayedLog>>,
    metrics: LaneMetrics,
    stop: &Stop,
) -> ReplayReport {
    let recorder = Arc::new(ReplayRecorder::new(log));
    let status = Arc::new(LaneStatus::new(provider.name()));
    let stop = stop.child();
    // An answer that is not waited for would be a letter sent twice.
    let settings = LaneSettings { awaits_answers: true, ..settings };
    let (inbox, receiver) = LaneInbox::new(1);
    let lane = Lane::new(
        provider,
        settings,
        LaneSource::memory(receiver),
        LaneObservers { recorder: recorder.clone(), metrics, status: status.clone() },
        Clock::system(),
        stop.clone(),
    );

    let mut report = ReplayReport::default();
    let (events, mut taken) = sent.take_first(letters, &mut report);
    inbox.send(events.into_iter().map(|event| Queued { event, place: Place::MEMORY }).collect()).await;
    drop(inbox);

    let mut watch = interval(WATCH_INTERVAL);
    let running = lane.run();
    tokio::pin!(running);
    let leftover = loop {
        tokio::select! {
            leftover = &mut running => break leftover,
            _ = watch.tick() => {
                if status.state() >= ProviderState::Refusing {
                    stop.force();
                }
            }
        }
    };
    let delivered = std::mem::take(&mut *recorder.delivered.lock().unwrap_or_else(PoisonError::into_inner));
    report.delivered = delivered.len() as u64;
    sent.0.extend(delivered.into_iter().filter_map(|id| taken.0.remove_entry(&id)));
    report.failed.clone_from(&recorder.failed.lock().unwrap_or_else(PoisonError::into_inner));
    report.unnoted = recorder.unnoted.load(Ordering::Relaxed);
    report.left = leftover.events.len() as u64 + recorder.left.load(Ordering::Relaxed);
    report.refused = status.trouble().filter(|_| status.state() >= ProviderState::Refusing);
    report.unauthorized = status.state() == ProviderState::Paused;
    report
}

struct ReplayRecorder {
    log: Arc<Mutex<ReplayedLog>>,
    delivered: Mutex<Vec<EventId<'static>>>,
    unnoted: AtomicU64,
    failed: Mutex<BTreeMap<DeadLetterReason, u64>>,
    left: AtomicU64,
}

impl ReplayRecorder {
    fn new(log: &Arc<Mutex<ReplayedLog>>) -> Self {
        Self {
            log: log.clone(),
            delivered: Mutex::default(),
            unnoted: AtomicU64::new(0),
            failed: Mutex::default(),
            left: AtomicU64::new(0),
        }
    }
}

#[async_trait]
impl Recorder for ReplayRecorder {
    async fn delivered(&self, events: &[Waiting]) {
        let ids: Vec<_> = events.iter().map(|waiting| waiting.event.id().into_owned()).collect();
        let count = ids.len() as u64;
        let (log, noting) = (self.log.clone(), ids.clone());
        let noted =
            spawn_blocking(move || log.lock().unwrap_or_else(PoisonError::into_inner).append(&noting));
        if !matches!(noted.await, Ok(Ok(()))) {
            self.unnoted.fetch_add(count, Ordering::Relaxed);
            error!(event_count = count, "replayed events could not be noted");
        }
        self.delivered.lock().unwrap_or_else(PoisonError::into_inner).extend(ids);
    }

    /// They are dead letters already.
    async fn write_letters(&self, _: Vec<DeadLetter>, _: WritePermit) -> Result<(), NotWritten> {
        Ok(())
    }

    fn dead_lettered(&self, reason: DeadLetterReason, events: usize) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        *failed.entry(reason).or_default() += events as u64;
    }

    /// And stay so: the end came before it was noted why.
    fn dropped(&self, _: DropReason, events: usize) {
        self.left.fetch_add(events as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::test_support::{accepted_at, track};

    fn letter(event: Event) -> DeadLetter {
        let (provider, detail) = ("p".to_owned(), String::new());
        DeadLetter {
            dead_since_ms: 1,
            provider,
            reason: DeadLetterReason::Expired,
            attempts: 1,
            detail,
            event,
        }
    }

    #[test]
    fn of_letters_with_one_id_the_first_is_sent_and_the_others_are_told_apart() {
        let first = track("x");
        let parts = first.parts();
        let other = Event::pack(&analytics_relay_providers::EventParts { user_id: Some("another"), ..parts });
        let again = accepted_at(&first, 5);
        let letters = || [&first, &again, &other, &track("y")].map(|event| letter(event.clone())).into();
        let mut report = ReplayReport::default();
        let (events, taken) = Sent::default().take_first(letters(), &mut report);
        assert_eq!((events.len(), report.copies, report.others.len()), (2, 1, 1));
        // The next file of the same replay.
        let mut report = ReplayReport::default();
        let (events, _) = taken.take_first(letters(), &mut report);
        assert_eq!((events.len(), report.copies, report.others.len()), (1, 2, 1), "another y");
    }
}
