//! A lane that follows a log, in simulated time: outages of a day, retention,
//! a clock that is set. The log is a real one, in a directory of its own.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicI64, AtomicU64},
};

use tempfile::TempDir;
use tokio::task::spawn_blocking;

use super::*;
use crate::{
    delivery::{spill::Spilled, test_support::accepted_at},
    privacy::{
        secret::DataSecret,
        suppression::{IdSort, Suppressed, SuppressionDir},
    },
    queue::{
        Durability,
        memory::{self, QueueReceiver},
        spool::{
            OpenedSpool, Spool, SpoolSettings, SpoolThread, WhenFull,
            log::{LogKeys, LogLimits},
        },
    },
    telemetry::SpoolMetrics,
};

const START_MS: i64 = 1_767_225_600_000;
const HOUR: Duration = Duration::from_secs(3600);
/// Whose identifies come in turn.
const USERS: usize = 40;

/// Works from a given time on, and never for a batch with a "poison" in it.
/// Counts what it is sent.
struct Outage {
    up_from: Mutex<Instant>,
    /// What it says to a batch with an identify in it, instead.
    refuses_identifies: Mutex<Option<SendError>>,
    /// When each request came, its events, and how many requests were under way.
    requests: Mutex<Vec<(Instant, usize)>>,
    under_way: AtomicU64,
    most_events_under_way: Mutex<Vec<(Instant, u64)>>,
    takes: Duration,
    /// In a request.
    events_max: usize,
    /// The events that it took, in their order, and the first of them as they stand in files.
    taken: Mutex<Vec<String>>,
    taken_json: Mutex<Vec<String>>,
}

#[async_trait]
impl Provider for Outage {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits { events_max: self.events_max, body_bytes_max: 1 << 20, requests_max: 4 }
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let now = Instant::now();
        let under_way = self.under_way.fetch_add(batch.len() as u64, Ordering::SeqCst) + batch.len() as u64;
        self.most_events_under_way.lock().unwrap().push((now, under_way));
        self.requests.lock().unwrap().push((now, batch.len()));
        sleep(self.takes).await;
        self.under_way.fetch_sub(batch.len() as u64, Ordering::SeqCst);
        let refusal = self.refuses_identifies.lock().unwrap().clone();
        if let Some(refusal) = refusal.filter(|_| batch.iter().any(Event::is_identify)) {
            return Err(refusal);
        }
        let is_poisoned = batch.iter().any(is_poison);
        if is_poisoned || now < *self.up_from.lock().unwrap() {
            return Err(SendError::Unavailable { retry_after: None, detail: "503".into() });
        }
        self.taken.lock().unwrap().extend(batch.iter().map(|event| event.id().to_string()));
        let json = batch.iter().map(|event| String::from_utf8(event.to_json()).unwrap());
        self.taken_json.lock().unwrap().extend(json.take(10));
        Ok(vec![Verdict::Delivered; batch.len()])
    }
}

fn is_poison(event: &Event) -> bool {
    event.name() == Some("poison")
}

/// What is special about a lane.
struct Options {
    queue: QueueLimits,
    /// In a request.
    events_max: usize,
    aside_events_max: usize,
    /// Of an earlier run in memory mode.
    spilled: Option<Event>,
    is_suspended: bool,
    suppressed: Option<Arc<Suppressed>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queue: QueueLimits { events_max: 1, bytes_max: 1 },
            events_max: 1000,
            aside_events_max: ASIDE_EVENTS_MAX,
            spilled: None,
            is_suspended: false,
            suppressed: None,
        }
    }
}

/// Hands on what the queue holds.
async fn bring(mut queue: QueueReceiver, inbox: LaneInbox) {
    let mut events = Vec::new();
    while queue.recv_many(&mut events, 50).await > 0 {
        inbox.send(events.drain(..).collect()).await;
    }
}

/// A lane, its log, and a clock that goes with tokio's and can be set.
struct Durable {
    provider: Arc<Outage>,
    kept: Arc<Kept>,
    status: Arc<LaneStatus>,
    stop: Stop,
    spool: Spool,
    thread: SpoolThread,
    clock: Clock,
    set_by_ms: Arc<AtomicI64>,
    lane: JoinHandle<Leftover>,
    /// Brings what the queue has room for.
    worker: JoinHandle<()>,
    _dir: TempDir,
}

impl Durable {
    /// With a queue that has no room: the lane gets everything from the log.
    fn start(down_for: Duration, retention: Duration) -> Self {
        Self::start_with(down_for, retention, Options::default())
    }

    fn start_with(down_for: Duration, retention: Duration, options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let set_by_ms = Arc::new(AtomicI64::new(0));
        let clock = {
            let set_by_ms = set_by_ms.clone();
            Clock::from_fn(move || {
                let elapsed_ms = i64::try_from(start.elapsed().as_millis()).unwrap();
                START_MS + elapsed_ms + set_by_ms.load(Ordering::SeqCst)
            })
        };
        let settings = SpoolSettings {
            dir: dir.path().join("spool"),
            default_level: Durability::Written,
            keys: LogKeys::default(),
            limits: LogLimits { segment_bytes: 1 << 20, bytes_max: 1 << 30 },
            provider_bytes_max: vec![1 << 30],
            when_full: WhenFull::Reject,
            retention,
            group_window: Duration::ZERO,
            group_bytes: 1 << 20,
            intake: QueueLimits { events_max: 10_000, bytes_max: 1 << 26 },
        };
        let opened = OpenedSpool::open(settings, &["scripted"], START_MS).unwrap();
        let log = opened.lane_log(0);
        let spool = opened.spool().clone();
        let (queue, queue_end) = memory::bounded(options.queue);
        let thread = opened.run(queue, Vec::new(), SpoolMetrics::default(), Clock::system(), ()).unwrap();

        let provider = Arc::new(Outage {
            up_from: Mutex::new(start + down_for),
            refuses_identifies: Mutex::default(),
            requests: Mutex::default(),
            under_way: AtomicU64::new(0),
            most_events_under_way: Mutex::default(),
            takes: Duration::from_millis(100),
            events_max: options.events_max,
            taken: Mutex::default(),
            taken_json: Mutex::default(),
        });
        let kept = Arc::new(Kept::default());
        let status = Arc::new(LaneStatus::new("scripted"));
        let stop = Stop::default();
        let (inbox, receiver_of_lane) = LaneInbox::new(50);
        let mut lane = Lane::new(
            provider.clone(),
            LaneSettings { aside_events_max: options.aside_events_max, ..SETTINGS },
            LaneSource::logged(receiver_of_lane, log, retention),
            LaneObservers {
                recorder: kept.clone(),
                metrics: LaneFamilies::default().of("scripted"),
                status: status.clone(),
            },
            clock.clone(),
            stop.clone(),
        );
        if let Some(suppressed) = options.suppressed {
            lane.leave_out(suppressed);
        }
        let old: Vec<Event> = options.spilled.into_iter().collect();
        lane.reload(Spilled { events: old, ..Spilled::default() });
        let suspended = watch::Sender::new(options.is_suspended);
        lane.suspend_while(suspended.subscribe());
        let lane = tokio::spawn(lane.run());
        let worker = tokio::spawn(bring(queue_end, inbox));
        Self { provider, kept, status, stop, spool, thread, clock, set_by_ms, lane, worker, _dir: dir }
    }

    /// Accepts events, one after the other, `every` so often.
    async fn accept(&self, events: usize, every: Duration) {
        self.accept_named("x", events, every).await;
    }

    async fn accept_named(&self, name: &str, events: usize, every: Duration) {
        for _ in 0..events {
            self.accept_event(&track(name)).await;
            sleep(every).await;
        }
    }

    /// Accepts an identify of one of [`USERS`], in turn; returns its id.
    async fn accept_identify(&self, number: usize) -> String {
        let event = identify(&format!("user-{}", number % USERS));
        self.accept_event(&event).await;
        event.id().to_string()
    }

    /// What the provider took; fails if an identify of these, accepted one after the other,
    /// came after a newer one of its user.
    fn taken_in_order(&self, accepted: &[String]) -> Vec<String> {
        let places: HashMap<&String, usize> =
            accepted.iter().enumerate().map(|(place, id)| (id, place)).collect();
        let taken = self.provider.taken.lock().unwrap().clone();
        let mut last = [None; USERS];
        for place in taken.iter().filter_map(|id| places.get(id).copied()) {
            let before = last[place % USERS].replace(place);
            assert!(before < Some(place), "{place} of its user came after {before:?}");
        }
        taken
    }

    async fn accept_event(&self, event: &Event) {
        let event = accepted_at(event, self.clock.now_ms());
        // Time must stand still while a real thread is at work; it does for a task that
        // blocks. The log's thread answers when it has told the lane and the worker: else
        // it could be held up between that it marks them as woken and that it wakes them,
        // and time would go on without them.
        let runtime = tokio::runtime::Handle::current();
        let taken = self.spool.append(event, Durability::Written, None).unwrap();
        let append = move || runtime.block_on(taken.durable());
        spawn_blocking(append).await.unwrap().unwrap();
    }

    /// Waits until so many events have ended.
    async fn ended(&self, events: usize) {
        let start = Instant::now();
        while self.delivered() + self.dead() < events {
            assert!(start.elapsed() < HOUR * 24 * 7, "{} and {} ended", self.delivered(), self.dead());
            sleep(Duration::from_millis(500)).await;
        }
    }

    fn delivered(&self) -> usize {
        self.kept.delivered.lock().unwrap().len()
    }

    fn dead(&self) -> usize {
        self.kept.dead.lock().unwrap().len()
    }

    /// Stops the lane and the log; returns the events that are left in it.
    async fn stop(self) -> u64 {
        self.stop.drain();
        self.worker.abort();
        assert!(self.lane.await.unwrap().events.is_empty(), "what is in the log is not spilled");
        self.thread.close().await.unwrap()[0]
    }
}

/// A day without the provider: it is only probed, nothing expires, nothing
/// becomes a dead letter, and afterwards everything arrives once.
#[tokio::test(start_paused = true)]
async fn an_outage_of_a_day_costs_probes_and_no_event() {
    let day = HOUR * 24;
    let durable = Durable::start(day, HOUR * 72);
    let start = Instant::now();
    // In its first hour: a paused clock may jump over a timer while threads come and go
    // which it does not rule, as the log's.
    durable.accept(7_000, Duration::from_millis(500)).await;
    assert!(start.elapsed() < HOUR);
    sleep(start + HOUR - Instant::now()).await;
    let since = Instant::now();
    sleep(start + day - Duration::from_secs(60) - since).await;
    assert_eq!((durable.delivered(), durable.dead()), (0, 0));
    let mut down: Vec<_> = durable.provider.requests.lock().unwrap().clone();
    down.retain(|(at, _)| *at > since);
    let gaps: Vec<Duration> = down.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    let late: Vec<_> = gaps.iter().filter(|gap| **gap > Duration::from_secs(31)).collect();
    assert!(late.is_empty(), "a probe at least each 30 s: {late:?} of {}", gaps.len());
    assert!(down.iter().all(|(_, events)| *events <= 50), "only probes");
    let per_hour = down.len() as f64 / 23.0;
    assert!((100.0..260.0).contains(&per_hour), "{per_hour} probes an hour");
    assert_eq!(durable.status.state(), ProviderState::Failing);

    durable.ended(7_000).await;
    let recovered = start.elapsed();
    // A probe's wait, and what the log's thread takes of real time meanwhile.
    assert!(recovered < day + Duration::from_secs(120), "{recovered:?}");
    assert_eq!((durable.delivered(), durable.dead()), (7_000, 0));
    let ids: HashSet<String> = durable.kept.delivered.lock().unwrap().iter().cloned().collect();
    assert_eq!(ids.len(), 7_000, "each once");
    assert_eq!(durable.stop().await, 0);
}

/// A short outage ends with the provider's return.
#[tokio::test(start_paused = true)]
async fn a_provider_that_was_down_for_a_while_is_noticed_soon() {
    // Many events, and one that has to be each probe itself.
    for (seconds, events) in [(30, 500), (300, 500), (300, 1)] {
        let outage = Duration::from_secs(seconds);
        let durable = Durable::start(outage, HOUR * 72);
        let back = Instant::now() + outage;
        durable.accept(events, Duration::from_millis(10)).await;
        durable.ended(events).await;
        let requests = durable.provider.requests.lock().unwrap().clone();
        let noticed = requests.iter().map(|(at, _)| *at).find(|at| *at >= back).unwrap() - back;
        // A request that was under way fails yet, and the log's thread lives in real time.
        let noticed_max = outage / 30 + Duration::from_secs(1);
        assert!(noticed <= noticed_max, "after {seconds} s noticed {noticed:?} late");
        let probes = requests.iter().filter(|(at, _)| *at < back).count();
        assert!((10..130).contains(&probes), "{probes} requests in {seconds} s");
        durable.stop().await;
    }
}

/// A provider that comes back gets what has waited in growing amounts.
#[tokio::test(start_paused = true)]
async fn what_has_waited_is_drained_at_a_growing_pace() {
    let durable = Durable::start(HOUR, HOUR * 72);
    let up_at = Instant::now() + HOUR;
    durable.accept(4_000, Duration::from_millis(1)).await;
    durable.ended(4_000).await;
    let under_way: Vec<u64> = durable
        .provider
        .most_events_under_way
        .lock()
        .unwrap()
        .iter()
        .filter(|(at, _)| *at >= up_at)
        .map(|(_, events)| *events)
        .collect();
    assert_eq!(under_way[0], 1, "a probe first, which has shrunk");
    for (request, events) in under_way.iter().enumerate() {
        assert!(*events <= 50 << request.min(12), "request {request}: {events} of {under_way:?}");
    }
    assert!(under_way.iter().max().unwrap() >= &800, "and it does grow: {under_way:?}");
    assert_eq!(durable.stop().await, 0);
}

#[tokio::test(start_paused = true)]
async fn events_expire_at_their_retention_and_not_before() {
    let durable = Durable::start(HOUR * 1000, HOUR * 10);
    durable.accept(100, Duration::from_secs(1)).await;
    sleep(HOUR * 10 - Duration::from_secs(200)).await;
    assert_eq!(durable.dead(), 0, "not before");
    sleep(Duration::from_secs(400)).await;
    assert_eq!((durable.dead(), durable.delivered()), (100, 0));
    let dead = durable.kept.dead.lock().unwrap().clone();
    assert!(dead.iter().all(|letter| letter.reason == DeadLetterReason::Expired));
    assert_eq!(durable.stop().await, 0);
}

/// A clock that is set forward by two years, or back by an hour, expires
/// nothing; when it is right again retention goes on.
#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_expires_nothing() {
    for jump in [HOUR * 24 * 730, HOUR] {
        for sign in [1, -1] {
            let durable = Durable::start(HOUR * 1000, HOUR * 2);
            durable.accept(20, Duration::from_millis(10)).await;
            let jump_ms = sign * i64::try_from(jump.as_millis()).unwrap();
            durable.set_by_ms.store(jump_ms, Ordering::SeqCst);
            durable.accept(20, Duration::from_millis(10)).await;
            sleep(HOUR).await;
            assert_eq!(durable.dead(), 0, "expired early after {jump_ms} ms");
            durable.set_by_ms.store(0, Ordering::SeqCst);
            // Those that were accepted under the wrong clock keep their time: two years
            // ahead is beyond all that this test waits for.
            let stay = if sign > 0 && jump > HOUR { 20 } else { 0 };
            durable.ended(40 - stay).await;
            sleep(HOUR * 3).await;
            assert_eq!((durable.dead(), durable.delivered()), (40 - stay, 0), "{jump_ms} ms");
            assert_eq!(durable.stop().await, stay as u64, "{jump_ms} ms");
        }
    }
}

/// A drain gives each event that is in memory one prompt attempt and leaves the
/// rest in the log.
#[tokio::test(start_paused = true)]
async fn a_drain_leaves_the_rest_in_the_log() {
    let durable = Durable::start(HOUR * 1000, HOUR * 72);
    durable.accept(300, Duration::from_millis(10)).await;
    let start = Instant::now();
    assert_eq!(durable.stop().await, 300);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

/// A provider fails on one event and does not say on which: the others get
/// through although nothing else is sent, and that one waits alone.
#[tokio::test(start_paused = true)]
async fn a_poison_holds_up_what_came_with_it_for_minutes_and_no_longer() {
    let durable = Durable::start(Duration::ZERO, HOUR * 10);
    // One batch, all of it in the lane before its first request ends.
    durable.accept(1, Duration::ZERO).await;
    durable.accept(30, Duration::ZERO).await;
    durable.accept_named("poison", 1, Duration::ZERO).await;
    durable.accept(68, Duration::ZERO).await;
    let start = Instant::now();
    durable.ended(99).await;
    assert!(start.elapsed() < Duration::from_secs(15 * 60), "{:?}", start.elapsed());
    let requests = durable.provider.requests.lock().unwrap().clone();
    assert!(requests.iter().any(|(_, events)| *events > 30), "they did go together: {requests:?}");
    assert!(requests.len() < 60, "{requests:?}");
    assert_eq!((durable.delivered(), durable.dead()), (99, 0));
    assert_eq!(durable.stop().await, 1, "the poison stays in the log");
}

/// What stands in the log is not dropped when dead letters have used up their bytes,
/// or cannot be written: it ends when there is room again.
#[tokio::test(start_paused = true)]
async fn an_event_in_the_log_waits_for_the_disk_of_the_dead_letters() {
    for why in [DropReason::DeadLettersFull, DropReason::DeadLetterFailed] {
        let durable = Durable::start(HOUR * 1000, HOUR);
        *durable.kept.disk.lock().unwrap() = Disk::Fails(why);
        durable.accept(30, Duration::from_secs(1)).await;
        sleep(HOUR * 2).await;
        assert_eq!((durable.delivered(), durable.dead()), (0, 0));
        assert!(durable.status.dead_letters_fail());
        assert!(durable.kept.dropped.lock().unwrap().is_empty(), "{why:?}");
        *durable.kept.disk.lock().unwrap() = Disk::Writes;
        durable.ended(30).await;
        assert_eq!((durable.delivered(), durable.dead()), (0, 30));
        assert_eq!(durable.stop().await, 0);
    }
}

/// Identifies are refused for hours, in many more than the lane has room for: tracks are
/// read on and delivered. Identifies wait in the log, and arrive once and in order when
/// they are taken again.
#[tokio::test(start_paused = true)]
async fn a_kind_that_is_refused_stays_in_the_log_and_the_others_are_read_on() {
    let durable = Durable::start(Duration::ZERO, HOUR * 72);
    let refusal = SendError::Refused { detail: "400 no profiles".into() };
    *durable.provider.refuses_identifies.lock().unwrap() = Some(refusal);
    let mut identifies = Vec::new();
    for user in 0..2000 {
        let event = identify(&format!("user-{user}"));
        durable.accept_event(&event).await;
        identifies.push(event.id().to_string());
        durable.accept(1, Duration::from_millis(100)).await;
    }
    durable.ended(2000).await;
    sleep(HOUR).await;
    assert_eq!((durable.delivered(), durable.dead()), (2000, 0), "every track");
    assert_eq!(durable.status.state(), ProviderState::Refusing);
    assert!((400..=600).contains(&durable.status.events()), "{} in memory", durable.status.events());
    durable.accept(50, Duration::from_secs(1)).await;
    sleep(HOUR).await;
    assert_eq!((durable.delivered(), durable.dead()), (2050, 0), "late ones, too");

    *durable.provider.refuses_identifies.lock().unwrap() = None;
    durable.ended(4050).await;
    assert_eq!((durable.delivered(), durable.dead()), (4050, 0));
    assert_eq!(durable.status.state(), ProviderState::Sending);
    let delivered: HashSet<String> = durable.kept.delivered.lock().unwrap().iter().cloned().collect();
    assert_eq!(delivered.len(), 4050, "each once");
    assert!(identifies.iter().all(|id| delivered.contains(id)));
    assert_eq!(durable.stop().await, 0);
}

/// Nobody reads them again for a user who was erased meanwhile, and those in memory go.
#[tokio::test(start_paused = true)]
async fn what_was_left_aside_of_an_erased_user_is_dropped_when_it_is_read() {
    let data = tempfile::tempdir().unwrap();
    let secret = DataSecret::open(data.path()).unwrap();
    let list = SuppressionDir::open(data.path(), &secret);
    let suppressed = Arc::new(Suppressed::open(data.path(), &secret).unwrap());
    let options =
        Options { queue: SETTINGS.capacity, suppressed: Some(suppressed.clone()), ..Options::default() };
    let durable = Durable::start_with(Duration::ZERO, HOUR * 72, options);
    let refusal = SendError::Refused { detail: "400 no profiles".into() };
    *durable.provider.refuses_identifies.lock().unwrap() = Some(refusal);
    let mut identifies = Vec::new();
    for _ in 0..2000 {
        identifies.push(durable.accept_identify(identifies.len()).await);
        durable.accept(1, Duration::from_millis(100)).await;
    }
    sleep(HOUR).await;
    assert!(durable.status.events() < 1000, "most of them lie aside");

    let generation = list.add(&[(IdSort::User, "user-0")], 1).unwrap();
    assert!(suppressed.look().unwrap());
    sleep(Duration::from_secs(60)).await;
    assert_eq!(durable.status.keeps_to(), generation);
    *durable.provider.refuses_identifies.lock().unwrap() = None;
    let theirs: HashSet<&String> = identifies.iter().step_by(USERS).collect();
    durable.ended(4000 - theirs.len()).await;
    let delivered: HashSet<String> = durable.kept.delivered.lock().unwrap().iter().cloned().collect();
    assert!(theirs.iter().all(|id| !delivered.contains(*id)), "not one of an erased user");
    let dropped: usize = durable.kept.dropped.lock().unwrap().iter().map(|(_, events)| events).sum();
    assert_eq!((dropped, delivered.len()), (theirs.len(), 4000 - theirs.len()));
    assert_eq!(durable.stop().await, 0);
}

/// New ones that the queue brings while others of their kind stand in the log yet wait
/// until these are read.
#[tokio::test(start_paused = true)]
async fn what_the_queue_brings_does_not_overtake_what_is_left_aside_in_the_log() {
    // With requests so small that the lane reads less than it has room for.
    let options = Options { queue: SETTINGS.capacity, events_max: 50, ..Options::default() };
    let durable = Durable::start_with(Duration::ZERO, HOUR * 72, options);
    let refusal = SendError::Refused { detail: "400 no profiles".into() };
    *durable.provider.refuses_identifies.lock().unwrap() = Some(refusal);
    let mut accepted: Vec<String> = Vec::new();
    for _ in 0..3000 {
        accepted.push(durable.accept_identify(accepted.len()).await);
        durable.accept(1, Duration::from_millis(100)).await;
    }
    durable.ended(3000).await;
    sleep(HOUR).await;
    assert_eq!((durable.delivered(), durable.dead()), (3000, 0), "every track");

    *durable.provider.refuses_identifies.lock().unwrap() = None;
    // Of those that came while they got through again, and some were in the log yet.
    let mut late = 0;
    while durable.delivered() < 3000 + accepted.len() || late == 0 {
        let in_the_log = 3000 + accepted.len() - durable.delivered() - durable.status.events();
        late += usize::from(in_the_log > 0 && durable.delivered() > 3000);
        accepted.push(durable.accept_identify(accepted.len()).await);
        assert!(accepted.len() < 30_000, "{} delivered", durable.delivered());
        sleep(Duration::from_millis(20)).await;
        if in_the_log == 0 {
            sleep(Duration::from_secs(1)).await;
        }
    }
    assert!(late > 20, "only {late} came meanwhile");
    let taken = durable.taken_in_order(&accepted);
    let ids: HashSet<&String> = taken.iter().collect();
    assert_eq!((ids.len(), taken.len(), durable.dead()), (taken.len(), 3000 + accepted.len(), 0));
    assert_eq!(durable.stop().await, 0);
}

/// It is no damage: a newer relay wrote it, and was stopped for this one.
#[tokio::test(start_paused = true)]
async fn a_kind_that_only_a_newer_relay_knows_is_read_from_the_log_as_it_stands() {
    let durable = Durable::start(Duration::ZERO, HOUR);
    let json = format!(
        r#"{{"id":"new","kind":"purchase","time_ms":1,"accepted_ms":{START_MS},"basket":[1],"properties":{{}}}}"#
    );
    let event = Event::from_json(json.as_bytes()).unwrap();
    let taken = durable.spool.append(event, Durability::Written, None).unwrap();
    let runtime = tokio::runtime::Handle::current();
    spawn_blocking(move || runtime.block_on(taken.durable())).await.unwrap().unwrap();
    durable.accept(3, Duration::from_secs(1)).await;
    durable.ended(4).await;
    assert_eq!(durable.provider.taken.lock().unwrap()[0], "new");
    assert_eq!(durable.provider.taken_json.lock().unwrap()[0], json);
    assert_eq!(durable.stop().await, 0);
}

/// In the log, too: they stand there for others, and end at this provider, whether it
/// gets them from the queue or reads them.
#[tokio::test(start_paused = true)]
async fn what_is_not_for_the_provider_is_passed_over_in_the_log() {
    for queue in [SETTINGS.capacity, QueueLimits { events_max: 1, bytes_max: 1 }] {
        let durable = Durable::start_with(Duration::ZERO, HOUR, Options { queue, ..Options::default() });
        for _ in 0..100 {
            durable.accept_event(&only_for(&track("x"), Audience::Only("elsewhere".into()))).await;
            durable.accept(1, Duration::from_millis(10)).await;
        }
        durable.ended(100).await;
        sleep(Duration::from_secs(10)).await;
        assert_eq!((durable.delivered(), durable.dead()), (100, 0));
        let passed_over: usize = durable.kept.not_for.lock().unwrap().iter().map(|(_, events)| events).sum();
        assert_eq!(passed_over, 100);
        assert_eq!(durable.stop().await, 0, "nothing is left in the log");
    }
}

/// However many are left aside: none is taken in before them, and reading stops when they
/// are too many.
#[tokio::test(start_paused = true)]
async fn at_the_limit_of_what_is_left_aside_none_overtakes_another() {
    let options = Options { aside_events_max: 300, ..Options::default() };
    let durable = Durable::start_with(HOUR, HOUR * 72, options);
    let refusal = SendError::Refused { detail: "400 no profiles".into() };
    *durable.provider.refuses_identifies.lock().unwrap() = Some(refusal);
    let mut accepted: Vec<String> = Vec::new();
    for _ in 0..2000 {
        accepted.push(durable.accept_identify(accepted.len()).await);
        durable.accept(1, Duration::from_millis(100)).await;
    }
    sleep(HOUR * 3).await;
    let delivered = durable.delivered();
    assert!(delivered > 0 && delivered < 2000, "{delivered}: the limit was reached");
    *durable.provider.refuses_identifies.lock().unwrap() = None;
    durable.ended(4000).await;
    durable.taken_in_order(&accepted);
    assert_eq!(durable.stop().await, 0);
}

/// An event that is older than the retention and not in the log, in a lane that cannot
/// send it: it waits, and the lane sleeps.
#[tokio::test(start_paused = true)]
async fn an_old_event_that_is_not_in_the_log_keeps_no_lane_awake() {
    let old = accepted_at(&track("old"), START_MS - 1000 * 3_600_000);
    let options = Options { spilled: Some(old), is_suspended: true, ..Options::default() };
    let durable = Durable::start_with(HOUR * 1000, HOUR * 72, options);
    // In simulated time, which stands still while a lane turns round and round.
    let looked = tokio::time::timeout(HOUR, sleep(Duration::from_secs(1800)));
    assert!(looked.await.is_ok());
    assert_eq!((durable.delivered(), durable.dead(), durable.status.events()), (0, 0, 1));
}

/// What was left aside expires like what is in memory.
#[tokio::test(start_paused = true)]
async fn what_is_left_aside_in_the_log_expires_in_its_time() {
    let durable = Durable::start(Duration::ZERO, HOUR * 10);
    let refusal = SendError::Misdirected { detail: "404 where is it".into() };
    *durable.provider.refuses_identifies.lock().unwrap() = Some(refusal);
    for user in 0..1500 {
        durable.accept_event(&identify(&format!("user-{user}"))).await;
        durable.accept(1, Duration::from_millis(100)).await;
    }
    durable.ended(1500).await;
    sleep(HOUR * 9).await;
    assert_eq!((durable.delivered(), durable.dead()), (1500, 0));
    sleep(HOUR * 2).await;
    assert_eq!((durable.delivered(), durable.dead()), (1500, 1500));
    let dead = durable.kept.dead.lock().unwrap().clone();
    assert!(dead.iter().all(|letter| letter.reason == DeadLetterReason::Expired));
    assert_eq!(durable.status.state(), ProviderState::Sending, "nothing is refused any more");
    assert_eq!(durable.stop().await, 0);
}

/// Trouble when hardly anything comes in: an event in the log is not given up because
/// there are too few to compare it with.
#[tokio::test(start_paused = true)]
async fn trouble_with_few_events_costs_none_that_stands_in_the_log() {
    let durable = Durable::start(Duration::ZERO, HOUR * 72);
    let refusal = SendError::Refused { detail: "400 nope".into() };
    *durable.provider.refuses_identifies.lock().unwrap() = Some(refusal);
    for user in 0..12 {
        durable.accept_event(&identify(&format!("user-{user}"))).await;
        sleep(Duration::from_secs(600)).await;
        assert_eq!(durable.dead(), 0, "event {user}");
    }
    assert_eq!(durable.status.state(), ProviderState::Refusing);
    *durable.provider.refuses_identifies.lock().unwrap() = None;
    durable.ended(12).await;
    assert_eq!((durable.delivered(), durable.dead()), (12, 0));
    assert_eq!(durable.stop().await, 0);
}

/// One that nothing can be compared with ends after an hour.
#[tokio::test(start_paused = true)]
async fn a_lone_event_that_is_refused_ends_after_an_hour() {
    let durable = Durable::start(Duration::ZERO, HOUR * 72);
    let refusal = SendError::Refused { detail: "400 nope".into() };
    *durable.provider.refuses_identifies.lock().unwrap() = Some(refusal);
    durable.accept_event(&identify("ann")).await;
    sleep(HOUR - Duration::from_secs(60)).await;
    assert_eq!((durable.delivered(), durable.dead()), (0, 0));
    sleep(Duration::from_secs(120)).await;
    assert_eq!((durable.delivered(), durable.dead()), (0, 1));
    assert_eq!(durable.stop().await, 0);
}

/// A write of letters hangs when the lane is forced to stop: their events stay in the log
/// and have not ended, whether or not the disk takes the letters in the end.
#[tokio::test(start_paused = true)]
async fn an_event_in_the_log_stays_there_when_the_write_of_its_letter_is_given_up() {
    // Those of the first write, which may not be all of them.
    for (disk, on_disk) in
        [(Disk::Slow(HOUR * 3), 1..=30), (Disk::Late(HOUR * 3), 0..=0), (Disk::Hangs, 0..=0)]
    {
        let durable = Durable::start(HOUR * 1000, HOUR);
        *durable.kept.disk.lock().unwrap() = disk;
        durable.accept(30, Duration::ZERO).await;
        sleep(HOUR * 2).await;
        let kept = durable.kept.clone();
        durable.stop.force();
        assert_eq!(durable.stop().await, 30, "{disk:?}");
        sleep(HOUR * 4).await;
        let counted = kept.dead_lettered.load(Ordering::SeqCst);
        let (delivered, dead) = kept.counts();
        assert_eq!((delivered, counted), (0, 0), "{disk:?}");
        assert!(on_disk.contains(&dead), "{disk:?}: {dead}");
        assert!(kept.dropped.lock().unwrap().is_empty());
    }
}
