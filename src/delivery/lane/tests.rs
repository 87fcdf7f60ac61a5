//! What a lane makes of a provider's answers, with a provider that answers by
//! script and a clock that is paused.

use std::{
    collections::VecDeque,
    sync::{Mutex, OnceLock, atomic::AtomicI64},
};

use analytics_relay_providers::{BatchLimits, Rejection};
use async_trait::async_trait;
use tokio::{task::JoinHandle, time::sleep};

use super::*;
use crate::{
    delivery::{
        LaneInbox,
        dead_letter::DeadLetter,
        test_support::{accepted_at, identify, track, track_of},
    },
    telemetry::LaneFamilies,
};

mod durable;

const SETTINGS: LaneSettings = LaneSettings {
    retry: RetryRule {
        attempts_max: 5,
        initial_delay: Duration::from_secs(1),
        max_delay: Duration::from_secs(30),
    },
    capacity: QueueLimits { events_max: 1000, bytes_max: usize::MAX },
    probe_events: 50,
    awaits_answers: false,
};

type Answer = Box<dyn FnOnce(&[Event]) -> Result<Vec<Verdict>, SendError> + Send>;

/// Answers by script; when that has run out, delivers.
#[derive(Default)]
struct Scripted {
    answers: Mutex<VecDeque<Answer>>,
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

    fn endpoint(&self, event: &Event) -> Endpoint {
        Endpoint(u8::from(event.is_identify()))
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let ids = batch.iter().map(|event| event.id().to_string()).collect();
        self.requests.lock().unwrap().push((Instant::now(), ids));
        let answer = self.answers.lock().unwrap().pop_front();
        match answer {
            Some(answer) => answer(batch),
            None => Ok(vec![Verdict::Delivered; batch.len()]),
        }
    }
}

/// Keeps what ended.
#[derive(Default)]
struct Kept {
    delivered: Mutex<Vec<String>>,
    dead: Mutex<Vec<DeadLetter>>,
}

#[async_trait]
impl Recorder for Kept {
    async fn delivered(&self, events: &[Waiting]) {
        self.delivered.lock().unwrap().extend(events.iter().map(|waiting| waiting.event.id().to_string()));
    }

    async fn dead_lettered(&self, letters: Vec<DeadLetter>) -> Result<(), DropReason> {
        self.dead.lock().unwrap().extend(letters);
        Ok(())
    }

    fn dropped(&self, _: DropReason, _: usize) {}
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
        let provider = Arc::new(Scripted { answers: Mutex::new(answers.into()), ..Scripted::default() });
        let kept = Arc::new(Kept::default());
        let status = Arc::new(LaneStatus::new("scripted"));
        let stop = Stop::default();
        let lane = Lane::new(
            provider.clone(),
            SETTINGS,
            kept.clone(),
            LaneFamilies::default().of("scripted"),
            status.clone(),
            Clock::system(),
            stop.clone(),
        );
        let (inbox, receiver) = LaneInbox::new(50);
        let lane = tokio::spawn(lane.run(receiver));
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

fn answer(answer: impl FnOnce(&[Event]) -> Result<Vec<Verdict>, SendError> + Send + 'static) -> Answer {
    Box::new(answer)
}

fn unavailable(retry_after: Option<Duration>) -> Answer {
    answer(move |_| Err(SendError::Unavailable { retry_after, detail: "503".into() }))
}

fn tracks(count: usize) -> Vec<Event> {
    (0..count).map(|_| track("x")).collect()
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
async fn a_refused_key_counts_no_attempt_and_is_probed_every_thirty_seconds() {
    let refuse = || answer(|_| Err(SendError::Unauthorized { detail: "401".into() }));
    let lane = Running::start((0..10).map(|_| refuse()).collect());
    lane.send(&tracks(20)).await;
    sleep(Duration::from_secs(5)).await;
    assert_eq!(lane.status.state(), ProviderState::Paused);
    let status = lane.status.clone();
    let (provider, kept) = lane.finish().await;
    assert_eq!((kept.delivered.lock().unwrap().len(), kept.dead.lock().unwrap().len()), (20, 0));
    assert_eq!(status.state(), ProviderState::Sending);
    for pair in provider.requests.lock().unwrap().windows(2) {
        assert_eq!((pair[1].0 - pair[0].0).as_secs(), 30);
    }
}

/// As behind a proxy that forwards only one of a vendor's paths.
#[tokio::test(start_paused = true)]
async fn an_endpoint_that_refuses_us_does_not_stop_the_other() {
    let refuse = || answer(|_| Err(SendError::Unauthorized { detail: "404".into() }));
    let lane = Running::start(vec![refuse()]);
    lane.send(&[identify("ann")]).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(lane.status.state(), ProviderState::Paused);
    lane.send(&tracks(3)).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(lane.kept.delivered.lock().unwrap().len(), 3);
    assert_eq!(lane.status.state(), ProviderState::Paused, "the worst of its endpoints");
    let (_, kept) = lane.finish().await;
    assert_eq!(kept.delivered.lock().unwrap().len(), 4);
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
    let running = Running::start(Vec::new());
    let lane = Lane::new(
        Arc::new(Never),
        SETTINGS,
        running.kept.clone(),
        LaneFamilies::default().of("never"),
        running.status.clone(),
        Clock::system(),
        running.stop.clone(),
    );
    let (inbox, receiver) = LaneInbox::new(50);
    let lane = tokio::spawn(lane.run(receiver));
    let queued = |event: Event| Queued { event, place: Place::MEMORY };
    inbox.send(tracks(25).into_iter().map(queued).collect()).await;
    sleep(Duration::from_secs(1)).await;
    running.stop.force();
    drop(inbox);
    assert_eq!(lane.await.unwrap().events.len(), 25);
}
