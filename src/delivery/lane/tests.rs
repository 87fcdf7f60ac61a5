//! What a lane makes of a provider's answers, with a provider that answers by
//! script and a clock that is paused.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
};

use analytics_relay_providers::{
    BatchLimits, Event, EventParts, MoreParts, NotFor, Rejection, event::Audience,
};
use async_trait::async_trait;
use tokio::{task::JoinHandle, time::sleep};

use super::*;
use crate::{
    delivery::{
        LaneInbox,
        dead_letter::DeadLetter,
        recorder::WritePermit,
        test_support::{accepted_at, identify, track, track_of},
    },
    letter_files::NotWritten,
    queue::{Place, Queued},
    reasons::{DeadLetterReason, DropReason},
    telemetry::LaneFamilies,
};

mod durable;
mod letters;
mod refusing;

const SETTINGS: LaneSettings = LaneSettings {
    retry: RetryRule {
        attempts_max: 5,
        initial_delay: Duration::from_secs(1),
        max_delay: Duration::from_secs(30),
    },
    capacity: QueueLimits { events_max: 1000, bytes_max: usize::MAX },
    probe_events: 50,
    awaits_answers: false,
    convicts_at_once: false,
    aside_events_max: ASIDE_EVENTS_MAX,
};

type Answer = Box<dyn FnOnce(&[Event]) -> Result<Vec<Verdict>, SendError> + Send>;
type Rule = Box<dyn Fn(&[Event]) -> Result<Vec<Verdict>, SendError> + Send + Sync>;

/// Answers by script; when that has run out, by its rule.
struct Scripted {
    answers: Mutex<VecDeque<Answer>>,
    rule: Rule,
    /// Identifies go elsewhere than tracks.
    two_endpoints: bool,
    /// How long it takes over an answer.
    takes: Duration,
    /// When each request came, and the ids in it.
    requests: Mutex<Vec<(Instant, Vec<String>)>>,
}

#[async_trait]
impl Provider for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits { events_max: 100, body_bytes_max: 1 << 20, requests_max: 2 }
    }

    fn endpoint(&self, event: &Event) -> Result<Endpoint, NotFor> {
        Ok(Endpoint(u8::from(self.two_endpoints && event.is_identify())))
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let ids = batch.iter().map(|event| event.id().to_string()).collect();
        self.requests.lock().unwrap().push((Instant::now(), ids));
        if !self.takes.is_zero() {
            sleep(self.takes).await;
        }
        let answer = self.answers.lock().unwrap().pop_front();
        match answer {
            Some(answer) => answer(batch),
            None => (self.rule)(batch),
        }
    }
}

fn deliver(batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
    Ok(vec![Verdict::Delivered; batch.len()])
}

/// What the disk makes of dead letters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Disk {
    #[default]
    Writes,
    Fails(DropReason),
    /// There is room for so many more letters.
    Fits(usize),
    Hangs,
    /// The write takes so long, once it has begun.
    Slow(Duration),
    /// It begins so late.
    Late(Duration),
}

/// Keeps what ended.
#[derive(Default)]
struct Kept {
    delivered: Mutex<Vec<String>>,
    /// What is on disk, counted or not.
    dead: Mutex<Vec<DeadLetter>>,
    dead_lettered: AtomicUsize,
    dropped: Mutex<Vec<(DropReason, usize)>>,
    not_for: Mutex<Vec<(NotFor, usize)>>,
    disk: Mutex<Disk>,
}

#[async_trait]
impl Recorder for Kept {
    async fn delivered(&self, events: &[Waiting]) {
        self.delivered.lock().unwrap().extend(events.iter().map(|waiting| waiting.event.id().to_string()));
    }

    async fn write_letters(
        &self,
        mut letters: Vec<DeadLetter>,
        permit: WritePermit,
    ) -> Result<(), NotWritten> {
        let disk = *self.disk.lock().unwrap();
        if let Disk::Late(by) = disk {
            sleep(by).await;
        }
        if !permit.begin() {
            return Err(NotWritten::ANY);
        }
        let mut room = letters.len();
        match disk {
            Disk::Writes | Disk::Late(_) => {}
            Disk::Fits(letters) => room = letters.min(room),
            Disk::Fails(why) => return Err(NotWritten { written: 0, why }),
            Disk::Slow(takes) => sleep(takes).await,
            Disk::Hangs => std::future::pending().await,
        }
        let is_full = room < letters.len();
        letters.truncate(room);
        self.dead.lock().unwrap().extend(letters);
        if let Disk::Fits(letters) = &mut *self.disk.lock().unwrap() {
            *letters -= room;
        }
        if is_full {
            return Err(NotWritten { written: room, why: DropReason::DeadLettersFull });
        }
        Ok(())
    }

    fn dead_lettered(&self, _: DeadLetterReason, events: usize) {
        self.dead_lettered.fetch_add(events, Ordering::SeqCst);
    }

    fn dropped(&self, reason: DropReason, events: usize) {
        self.dropped.lock().unwrap().push((reason, events));
    }

    fn not_for(&self, reason: NotFor, events: usize) {
        self.not_for.lock().unwrap().push((reason, events));
    }
}

impl Kept {
    fn counts(&self) -> (usize, usize) {
        (self.delivered.lock().unwrap().len(), self.dead.lock().unwrap().len())
    }
}

struct Running {
    provider: Arc<Scripted>,
    kept: Arc<Kept>,
    status: Arc<LaneStatus>,
    stop: Stop,
    inbox: LaneInbox,
    lane: JoinHandle<Leftover>,
}

impl Running {
    fn start(answers: Vec<Answer>) -> Self {
        Self::start_by(answers, Box::new(deliver), true)
    }

    /// With a provider that answers by a rule.
    fn start_by(answers: Vec<Answer>, rule: Rule, two_endpoints: bool) -> Self {
        Self::start_with(answers, rule, two_endpoints, Duration::ZERO, watch::Sender::new(false).subscribe())
    }

    /// With one that takes its time.
    fn start_slow(rule: Rule, takes: Duration) -> Self {
        Self::start_with(Vec::new(), rule, true, takes, watch::Sender::new(false).subscribe())
    }

    /// With a provider that takes everything, if a person lets it.
    fn start_suspended(suspended: watch::Receiver<bool>) -> Self {
        Self::start_with(Vec::new(), Box::new(deliver), true, Duration::ZERO, suspended)
    }

    fn start_with(
        answers: Vec<Answer>,
        rule: Rule,
        two_endpoints: bool,
        takes: Duration,
        suspended: watch::Receiver<bool>,
    ) -> Self {
        let kept = Arc::new(Kept::default());
        let (answers, requests) = (Mutex::new(answers.into()), Mutex::default());
        let provider = Arc::new(Scripted { answers, rule, two_endpoints, takes, requests });
        Self::start_recorded(provider, kept.clone(), kept, suspended)
    }

    /// With another recorder than the one that keeps.
    fn start_recorded(
        provider: Arc<Scripted>,
        recorder: Arc<dyn Recorder>,
        kept: Arc<Kept>,
        suspended: watch::Receiver<bool>,
    ) -> Self {
        let status = Arc::new(LaneStatus::new("scripted"));
        let stop = Stop::default();
        let (inbox, mut lane) = lane_to(provider.clone(), recorder, status.clone(), stop.clone());
        lane.suspend_while(suspended);
        let lane = tokio::spawn(lane.run());
        Self { provider, kept, status, stop, inbox, lane }
    }

    async fn send(&self, events: &[Event]) {
        let queued = |event: &Event| Queued { event: event.clone(), place: Place::MEMORY };
        self.inbox.send(events.iter().map(queued).collect()).await;
    }

    /// Closes the inbox and waits until all has ended.
    async fn finish(self) -> (Arc<Scripted>, Arc<Kept>) {
        drop(self.inbox);
        assert!(self.lane.await.unwrap().events.is_empty());
        (self.provider, self.kept)
    }
}

/// A lane without a log, and the way into it.
fn lane_to(
    provider: Arc<dyn Provider>,
    recorder: Arc<dyn Recorder>,
    status: Arc<LaneStatus>,
    stop: Stop,
) -> (LaneInbox, Lane) {
    let (inbox, receiver) = LaneInbox::new(50);
    let metrics = LaneFamilies::default().of(provider.name());
    let observers = LaneObservers { recorder, metrics, status };
    let lane = Lane::new(provider, SETTINGS, LaneSource::memory(receiver), observers, Clock::system(), stop);
    (inbox, lane)
}

fn answer(answer: impl FnOnce(&[Event]) -> Result<Vec<Verdict>, SendError> + Send + 'static) -> Answer {
    Box::new(answer)
}

fn unavailable(retry_after: Option<Duration>) -> Answer {
    answer(move |_| Err(SendError::Unavailable { retry_after, detail: "503".into() }))
}

fn tracks(count: usize) -> Vec<Event> {
    (0..count).map(|_| track("x")).collect()
}

/// The same event for some providers only.
fn only_for(event: &Event, audience: Audience<'_>) -> Event {
    let parts = event.parts();
    let more = MoreParts { audience, ..MoreParts::default() };
    Event::pack(&EventParts { more: more.if_any(), ..parts })
}

/// Those that are not for the provider are counted, and neither sent nor lost.
#[tokio::test(start_paused = true)]
async fn what_is_not_for_the_provider_ends_at_once_and_is_counted() {
    let lane = Running::start(Vec::new());
    lane.send(&[
        track("a"),
        only_for(&track("b"), Audience::AllBut("scripted".into())),
        only_for(&track("c"), Audience::Only("elsewhere".into())),
        only_for(&track("d"), Audience::Only("elsewhere,scripted".into())),
    ])
    .await;
    let (provider, kept) = lane.finish().await;
    let sent: usize = provider.requests.lock().unwrap().iter().map(|(_, events)| events.len()).sum();
    assert_eq!((sent, kept.counts()), (2, (2, 0)));
    let passed_over: usize = kept.not_for.lock().unwrap().iter().map(|(_, events)| events).sum();
    assert_eq!(passed_over, 2);
    assert!(kept.not_for.lock().unwrap().iter().all(|(why, _)| *why == NotFor::Audience));
}

/// While a request is under way its events wait, for whoever asks how long.
#[tokio::test(start_paused = true)]
async fn the_oldest_age_counts_what_is_out() {
    let (status, seen_ms) = (Arc::new(OnceLock::<Arc<LaneStatus>>::new()), Arc::new(AtomicI64::new(0)));
    let (asked, sees) = (status.clone(), seen_ms.clone());
    let look = answer(move |batch| {
        let oldest_ms = asked.get().unwrap().oldest_accepted_ms();
        sees.store(oldest_ms.unwrap_or(0), Ordering::Relaxed);
        Ok(vec![Verdict::Delivered; batch.len()])
    });
    let lane = Running::start(vec![look]);
    let status = status.get_or_init(|| lane.status.clone()).clone();
    lane.send(&[accepted_at(&track("a"), 40), accepted_at(&track("b"), 50)]).await;
    lane.finish().await;
    assert_eq!(seen_ms.load(Ordering::Relaxed), 40);
    assert_eq!(status.oldest_accepted_ms(), None);
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_provider_costs_that_batch_an_attempt_and_nothing_else() {
    let lane = Running::start(vec![answer(|_| panic!("the provider's own defect"))]);
    lane.send(&tracks(3)).await;
    sleep(Duration::from_secs(1)).await;
    lane.send(&tracks(2)).await;
    let (provider, kept) = lane.finish().await;
    assert_eq!(kept.delivered.lock().unwrap().len(), 5);
    assert_eq!(provider.requests.lock().unwrap().iter().filter(|(_, ids)| ids.len() == 3).count(), 2);
}

#[tokio::test(start_paused = true)]
async fn five_attempts_with_growing_waits_and_then_a_dead_letter() {
    let lane = Running::start((0..5).map(|_| unavailable(None)).collect());
    lane.send(&tracks(1)).await;
    let (provider, kept) = lane.finish().await;
    let dead = kept.dead.lock().unwrap();
    assert_eq!((dead.len(), dead[0].reason, dead[0].attempts), (1, DeadLetterReason::RetriesExhausted, 5));
    let requests = provider.requests.lock().unwrap();
    assert_eq!(requests.len(), 5);
    for (attempt, pair) in requests.windows(2).enumerate() {
        let waited = pair[1].0 - pair[0].0;
        assert!(
            waited <= Duration::from_secs(1 << attempt) + Duration::from_millis(10),
            "{attempt}: {waited:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_asks_for_time_gets_it_and_is_sent_nothing_else_meanwhile() {
    let lane = Running::start(vec![unavailable(Some(Duration::from_secs(120)))]);
    lane.send(&tracks(1)).await;
    sleep(Duration::from_secs(10)).await;
    lane.send(&tracks(1)).await;
    let (provider, _) = lane.finish().await;
    let requests = provider.requests.lock().unwrap();
    assert_eq!(requests.len(), 2, "what waited goes together");
    assert!(requests[1].0 - requests[0].0 >= Duration::from_secs(120));
}

#[tokio::test(start_paused = true)]
async fn a_failing_provider_is_probed_one_small_request_at_a_time() {
    let lane = Running::start((0..8).map(|_| unavailable(None)).collect());
    for _ in 0..10 {
        lane.send(&tracks(60)).await;
        sleep(Duration::from_millis(10)).await;
    }
    sleep(Duration::from_millis(500)).await;
    assert_ne!(lane.status.state(), ProviderState::Sending);
    let (provider, kept) = lane.finish().await;
    assert_eq!(kept.delivered.lock().unwrap().len() + kept.dead.lock().unwrap().len(), 600);
    let requests = provider.requests.lock().unwrap();
    for pair in requests[4..8].windows(2) {
        assert!(pair[1].1.len() <= 50, "a probe is no bigger than a batch");
    }
    assert!(requests.len() < 30, "an outage ends without a storm: {}", requests.len());
}

#[tokio::test(start_paused = true)]
async fn verdicts_are_taken_event_by_event() {
    let events = ["a", "b", "c", "d"].map(|user| track_of("x", user));
    let verdicts = vec![
        Verdict::Delivered,
        Verdict::Rejected { reason: Rejection::QuotaExceeded, detail: "429".into() },
        Verdict::Resend,
        Verdict::Hold { after: Duration::from_secs(15), detail: "429".into() },
    ];
    let lane = Running::start(vec![answer(move |_| Ok(verdicts))]);
    lane.send(&events).await;
    let (provider, kept) = lane.finish().await;
    let id = |index: usize| events[index].id().to_string();
    let requests = provider.requests.lock().unwrap();
    assert_eq!(requests[1].1, [id(2)], "it is sent again at once");
    assert_eq!(requests[1].0, requests[0].0);
    assert_eq!(requests[2].1, [id(3)], "it waits as long as the provider says");
    assert!(requests[2].0 - requests[0].0 >= Duration::from_secs(15));
    assert_eq!(*kept.delivered.lock().unwrap(), [id(0), id(2), id(3)]);
    assert_eq!(kept.dead.lock().unwrap()[0].reason, DeadLetterReason::QuotaExceeded);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_cannot_be_acted_upon_is_a_failed_attempt() {
    let lane = Running::start(vec![
        answer(|_| Ok(vec![Verdict::Delivered])),
        answer(|batch| Ok(vec![Verdict::Resend; batch.len()])),
    ]);
    lane.send(&tracks(3)).await;
    let (provider, kept) = lane.finish().await;
    assert_eq!(kept.delivered.lock().unwrap().len(), 3);
    assert_eq!(provider.requests.lock().unwrap().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_identify_never_follows_a_newer_one_that_was_delivered() {
    let events = [identify("ann"), identify("ann"), identify("bob")];
    let hold = Verdict::Hold { after: Duration::from_secs(1), detail: String::new() };
    let verdicts = vec![hold.clone(), Verdict::Delivered, hold];
    let lane = Running::start(vec![answer(move |_| Ok(verdicts))]);
    lane.send(&events).await;
    let (_, kept) = lane.finish().await;
    let dead = kept.dead.lock().unwrap();
    assert_eq!((dead.len(), dead[0].reason), (1, DeadLetterReason::Superseded));
    assert_eq!(dead[0].event.id(), events[0].id());
    assert_eq!(kept.delivered.lock().unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn forced_to_stop_a_lane_gives_back_everything_in_order() {
    let lane = Running::start(vec![unavailable(Some(Duration::from_secs(600)))]);
    let events = tracks(5);
    lane.send(&events[..2]).await;
    sleep(Duration::from_millis(10)).await;
    lane.send(&events[2..]).await;
    sleep(Duration::from_millis(10)).await;
    lane.stop.force();
    drop(lane.inbox);
    let leftover = lane.lane.await.unwrap();
    let ids: Vec<_> = leftover.events.iter().map(|waiting| waiting.event.id()).collect();
    assert_eq!(ids, events.iter().map(|event| event.id()).collect::<Vec<_>>());
}

/// A request that never ends must not keep its events.
#[tokio::test(start_paused = true)]
async fn forced_to_stop_a_lane_gives_back_what_is_under_way() {
    struct Never;
    #[async_trait]
    impl Provider for Never {
        fn name(&self) -> &'static str {
            "never"
        }
        fn limits(&self) -> BatchLimits {
            BatchLimits { events_max: 10, body_bytes_max: 1 << 20, requests_max: 2 }
        }
        async fn send(&self, _: &[Event]) -> Result<Vec<Verdict>, SendError> {
            std::future::pending().await
        }
    }
    let stop = Stop::default();
    let status = Arc::new(LaneStatus::new("never"));
    let (inbox, lane) = lane_to(Arc::new(Never), Arc::new(Kept::default()), status, stop.clone());
    let lane = tokio::spawn(lane.run());
    let queued = |event: Event| Queued { event, place: Place::MEMORY };
    inbox.send(tracks(25).into_iter().map(queued).collect()).await;
    sleep(Duration::from_secs(1)).await;
    stop.force();
    drop(inbox);
    assert_eq!(lane.await.unwrap().events.len(), 25);
}
