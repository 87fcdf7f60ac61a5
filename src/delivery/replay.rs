//! Sends dead letters again, through a lane like any other event.
//!
//! What the provider takes is noted, durably, so that it is never sent again;
//! what it does not take stays a dead letter, as it was. So one that is refused alone
//! has failed at once, and stands in nobody's way; nothing but a refused key or
//! address ends a replay before each letter was tried.
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

use analytics_relay_providers::{Event, EventId, NotFor, Provider};
use async_trait::async_trait;
use tokio::{task::spawn_blocking, time::interval};
use tracing::error;

use super::{
    LaneInbox,
    backlog::Waiting,
    dead_letter::{DeadLetter, ReplayedLog},
    gate::ProviderState,
    lane::{Lane, LaneObservers, LaneSettings, LaneSource, LaneStatus},
    recorder::{Recorder, WritePermit},
};
use crate::{
    letter_files::NotWritten,
    privacy::suppression::Suppressed,
    queue::{Place, Queued},
    reasons::{DeadLetterReason, DropReason},
    shutdown::Stop,
    telemetry::LaneMetrics,
    time::Clock,
};

/// How often it is looked whether the provider refuses our key.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);
/// For how long it has to, in every probe: something on the way may answer a single
/// letter as the provider answers a wrong key, and the others get through.
const REFUSED_PATIENCE: Duration = Duration::from_secs(10);

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
    /// Letters that were not sent because their users are erased.
    pub(crate) erased: u64,
    /// Letters that were not sent because they are copies of one that was.
    pub(crate) copies: u64,
    /// Those that were not sent because another event with their id was.
    pub(crate) others: Vec<EventId<'static>>,
    /// Letters that were not tried to the end.
    pub(crate) left: u64,
    /// The provider refuses our key or our address, so that no other letter can do
    /// better: its words.
    pub(crate) refused: Option<String>,
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
        self.erased += part.erased;
        self.copies += part.copies;
        self.others.extend(part.others);
        self.left += part.left;
        self.refused = self.refused.take().or(part.refused);
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
    (event.user_id(), event.anonymous_id()).hash(&mut hasher);
    format!("{:?}", (event.kind(), event.parts().more)).hash(&mut hasher);
    event.properties().json().hash(&mut hasher);
    hasher.finish()
}

/// Sends letters again, until each was tried to the end, the provider refuses our
/// key, or `stop` is forced. `sent` is what earlier parts of the same replay
/// have delivered, and is added to.
#[expect(clippy::too_many_arguments, reason = "what a lane needs, each of it once")]
pub(crate) async fn replay(
    provider: Arc<dyn Provider>,
    settings: LaneSettings,
    letters: Vec<DeadLetter>,
    sent: &mut Sent,
    log: &Arc<Mutex<ReplayedLog>>,
    metrics: LaneMetrics,
    suppressed: &Arc<Suppressed>,
    stop: &Stop,
) -> ReplayReport {
    let recorder = Arc::new(ReplayRecorder::new(log));
    let status = Arc::new(LaneStatus::new(provider.name()));
    let stop = stop.child();
    // An answer that is not waited for would be a letter sent twice.
    let settings = LaneSettings { awaits_answers: true, convicts_at_once: true, ..settings };
    let (inbox, receiver) = LaneInbox::new(1);
    let mut lane = Lane::new(
        provider,
        settings,
        LaneSource::memory(receiver),
        LaneObservers { recorder: recorder.clone(), metrics, status: status.clone() },
        Clock::system(),
        stop.clone(),
    );

    lane.leave_out(suppressed.clone());

    let mut report = ReplayReport::default();
    let (events, mut taken) = sent.take_first(letters, &mut report);
    inbox.send(events.into_iter().map(|event| Queued { event, place: Place::MEMORY }).collect()).await;
    drop(inbox);

    let mut watch = interval(WATCH_INTERVAL);
    let mut refused_since = None;
    let running = lane.run();
    tokio::pin!(running);
    let leftover = loop {
        tokio::select! {
            leftover = &mut running => break leftover,
            now = watch.tick() => {
                // Who is erased meanwhile is left out, too; while that cannot be seen, all wait.
                if suppressed.look().is_err() {
                    stop.force();
                }
                let is_refused = status.state() == ProviderState::Paused;
                refused_since = is_refused.then(|| refused_since.unwrap_or(now));
                if refused_since.is_some_and(|since| now - since >= REFUSED_PATIENCE) {
                    stop.force();
                }
            }
        }
    };
    let delivered = std::mem::take(&mut *recorder.delivered.lock().unwrap_or_else(PoisonError::into_inner));
    report.delivered = delivered.len() as u64;
    sent.0.extend(delivered.into_iter().filter_map(|id| taken.0.remove_entry(&id)));
    report.failed.clone_from(&recorder.failed.lock().unwrap_or_else(PoisonError::into_inner));
    report.erased = recorder.erased.load(Ordering::Relaxed);
    report.unnoted = recorder.unnoted.load(Ordering::Relaxed);
    report.left = leftover.events.len() as u64 + recorder.left.load(Ordering::Relaxed);
    report.refused = status.trouble().filter(|_| status.state() == ProviderState::Paused);
    report
}

struct ReplayRecorder {
    log: Arc<Mutex<ReplayedLog>>,
    delivered: Mutex<Vec<EventId<'static>>>,
    unnoted: AtomicU64,
    failed: Mutex<BTreeMap<DeadLetterReason, u64>>,
    left: AtomicU64,
    erased: AtomicU64,
}

impl ReplayRecorder {
    fn new(log: &Arc<Mutex<ReplayedLog>>) -> Self {
        Self {
            log: log.clone(),
            delivered: Mutex::default(),
            unnoted: AtomicU64::new(0),
            failed: Mutex::default(),
            left: AtomicU64::new(0),
            erased: AtomicU64::new(0),
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

    /// And stay so: the end came before it was noted why, or their users are erased.
    fn dropped(&self, why: DropReason, events: usize) {
        let counter = if why == DropReason::Erased { &self.erased } else { &self.left };
        counter.fetch_add(events as u64, Ordering::Relaxed);
    }

    fn not_for(&self, _: NotFor, events: usize) {
        self.left.fetch_add(events as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use analytics_relay_providers::{BatchLimits, Rejection, SendError, Verdict};
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::{
        delivery::{
            dead_letter::DeadLetterDir,
            retry::RetryRule,
            test_support::{accepted_at, track, track_of},
        },
        letter_files::LetterWriter,
        privacy::{
            secret::DataSecret,
            suppression::{IdSort, SuppressionDir},
        },
        queue::QueueLimits,
        telemetry::LaneFamilies,
    };

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

    type Rule = fn(&[Event]) -> Result<Vec<Verdict>, SendError>;

    /// Answers by a rule, and takes its time.
    struct Ruled(Rule);

    #[async_trait]
    impl Provider for Ruled {
        fn name(&self) -> &'static str {
            "p"
        }

        fn limits(&self) -> BatchLimits {
            BatchLimits { events_max: 100, body_bytes_max: 1 << 20, requests_max: 2 }
        }

        async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
            sleep(Duration::from_millis(100)).await;
            (self.0)(batch)
        }
    }

    /// Delivers one event after the other, and does something else while the first is sent.
    struct Meanwhile<F>(Mutex<Option<F>>);

    #[async_trait]
    impl<F: FnOnce() + Send + 'static> Provider for Meanwhile<F> {
        fn name(&self) -> &'static str {
            "p"
        }

        fn limits(&self) -> BatchLimits {
            BatchLimits { events_max: 1, body_bytes_max: 1 << 20, requests_max: 1 }
        }

        async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
            let first = self.0.lock().unwrap().take();
            if let Some(meanwhile) = first {
                meanwhile();
            }
            sleep(10 * WATCH_INTERVAL).await;
            deliver(batch)
        }
    }

    fn is_bad(event: &Event) -> bool {
        event.name() == Some("bad")
    }

    fn deliver(batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        Ok(vec![Verdict::Delivered; batch.len()])
    }

    /// Replays so many bad letters and, behind them, so many good ones.
    async fn replay_by(rule: Rule, bad: usize, good: usize) -> ReplayReport {
        let data = tempfile::tempdir().unwrap();
        let names = std::iter::repeat_n("bad", bad).chain(std::iter::repeat_n("good", good));
        replay_to(Arc::new(Ruled(rule)), names.map(track), data.path()).await
    }

    /// Replays events to a provider, with the list of a data directory.
    async fn replay_to(
        provider: Arc<dyn Provider>,
        events: impl Iterator<Item = Event>,
        data: &Path,
    ) -> ReplayReport {
        let dir = DeadLetterDir::new(data, "p");
        LetterWriter::open(&dir, 0).unwrap();
        let settings = LaneSettings {
            retry: RetryRule {
                attempts_max: 5,
                initial_delay: Duration::from_millis(500),
                max_delay: Duration::from_secs(30),
            },
            capacity: QueueLimits { events_max: usize::MAX, bytes_max: usize::MAX },
            probe_events: 50,
            awaits_answers: false,
            convicts_at_once: false,
            aside_events_max: 0,
        };
        let letters = events.map(letter).collect();
        let log = Arc::new(Mutex::new(dir.open_replayed().unwrap()));
        let (mut sent, metrics) = (Sent::default(), LaneFamilies::default().of("p"));
        let (stop, secret) = (Stop::default(), DataSecret::open(data).unwrap());
        let suppressed = Arc::new(Suppressed::open(data, &secret).unwrap());
        let report = replay(provider, settings, letters, &mut sent, &log, metrics, &suppressed, &stop).await;
        assert_eq!(dir.replayed().unwrap().len() as u64, report.delivered);
        report
    }

    /// However the provider says it, bad letters keep no good one from being delivered.
    #[tokio::test(start_paused = true)]
    async fn a_replay_of_letters_that_are_mostly_bad_tries_each_of_them() {
        let unnamed: Rule = |batch| match batch.iter().any(is_bad) {
            true => Err(SendError::Refused { detail: "400 no".into() }),
            false => deliver(batch),
        };
        let named: Rule = |batch| {
            let verdict = |event: &Event| match is_bad(event) {
                true => Verdict::Rejected { reason: Rejection::Invalid, detail: "400 no".into() },
                false => Verdict::Delivered,
            };
            Ok(batch.iter().map(verdict).collect())
        };
        for rule in [unnamed, named] {
            for (bad, good) in [(60, 40), (300, 1), (300, 0), (1, 0), (0, 100)] {
                let report = replay_by(rule, bad, good).await;
                let failed: u64 = report.failed.values().sum();
                assert_eq!((failed, report.delivered, report.left), (bad as u64, good as u64, 0));
                assert_eq!(report.refused, None);
            }
        }
    }

    /// A refused key stops a replay soon; what is answered like that on the way, to a single
    /// letter, does not.
    #[tokio::test(start_paused = true)]
    async fn a_replay_gives_up_when_the_key_is_refused_and_not_for_one_letter() {
        let start = Instant::now();
        let wrong_key: Rule = |_| Err(SendError::Unauthorized { detail: "401 who".into() });
        let report = replay_by(wrong_key, 0, 40).await;
        assert_eq!((report.delivered, report.failed.len(), report.left), (0, 0, 40));
        assert_eq!(report.refused.unwrap(), "refuses its key: 401 who");
        assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());

        let firewall: Rule = |batch| match batch.iter().any(is_bad) {
            true => Err(SendError::Unauthorized { detail: "403 blocked".into() }),
            false => deliver(batch),
        };
        let report = replay_by(firewall, 1, 49).await;
        let failed: u64 = report.failed.values().sum();
        assert_eq!((report.delivered, failed + report.left), (49, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_erased_during_a_replay_is_sent_nothing_more() {
        let data = tempfile::tempdir().unwrap();
        let list = SuppressionDir::open(data.path(), &DataSecret::open(data.path()).unwrap());
        let erase = move || {
            list.add(&[(IdSort::User, "erased")], 5).unwrap();
        };
        let provider = Arc::new(Meanwhile(Mutex::new(Some(erase))));
        let events = ["stays", "erased", "stays", "erased"].map(|user| track_of("x", user));
        let report = replay_to(provider, events.into_iter(), data.path()).await;
        assert_eq!((report.delivered, report.erased, report.left), (2, 2, 0));
    }

    /// Whom it leaves out cannot be seen any more.
    #[tokio::test(start_paused = true)]
    async fn a_replay_stops_when_the_list_of_erased_users_cannot_be_read() {
        let data = tempfile::tempdir().unwrap();
        let list = data.path().join("suppressed.json");
        let damage = move || std::fs::write(list, "{").unwrap();
        let provider = Arc::new(Meanwhile(Mutex::new(Some(damage))));
        let events = ["a", "b", "c", "d"].map(track);
        let report = replay_to(provider, events.into_iter(), data.path()).await;
        assert!(report.delivered <= 1 && report.left >= 3, "{report:?}");
        assert_eq!(report.delivered + report.left, 4, "{report:?}");
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
