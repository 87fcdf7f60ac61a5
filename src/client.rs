//! A batching client for services in Rust: never waits, sends in batches,
//! retries by the relay's own answers, and says what became of every event.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use analytics_relay::{
//!     client::{BatchingClient, ClientSettings},
//!     proto::v1::TrackEventRequest,
//! };
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let analytics = BatchingClient::new("http://127.0.0.1:50054", ClientSettings::default())?;
//! analytics.track(TrackEventRequest {
//!     event_name: "Order Placed".into(),
//!     user_id: "user-4821".into(),
//!     ..TrackEventRequest::default()
//! })?;
//! // When the service stops:
//! let counters = analytics.close(Duration::from_secs(5)).await;
//! assert_eq!(counters.abandoned, 0);
//! # Ok(())
//! # }
//! ```
//!
//! Events keep their order. Each gets an id and a time when it is handed over,
//! if it has none, so that it can be sent again after an answer was lost:
//! providers drop the second copy by them.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use prost::Message;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tracing::{debug, warn};
use uuid::Uuid;

use crate::{
    proto::v1::{
        IdentifyUserRequest, TrackBatchItem, TrackBatchRequest, TrackBatchResponse, TrackEventRequest,
        analytics_service_client::AnalyticsServiceClient, track_batch_answer::Answer, track_batch_item::Item,
    },
    time::Clock,
};

/// Most events of a batch: as many as the relay takes.
const BATCH_EVENTS_MAX: usize = 1000;
/// Most bytes of a batch: half of what the relay takes.
const BATCH_BYTES_MAX: usize = 512 * 1024;
/// Longest wait after the first failure; doubles with each further one.
const RETRY_DELAY_FIRST: Duration = Duration::from_millis(100);
/// A connection with a call under way is asked so often whether it is alive,
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// and given up if it does not answer.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How a [`BatchingClient`] works.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// Most events that wait; what comes beyond is dropped and counted.
    pub queue_events_max: usize,
    /// Most bytes of them, as protobuf.
    pub queue_bytes_max: usize,
    /// A batch is sent when it has so many events, at most 1,000,
    pub batch_events_max: usize,
    /// or when its first has waited so long.
    pub flush_interval: Duration,
    /// Longest wait for an answer. Then the batch is sent again.
    pub call_timeout: Duration,
    /// Longest wait between two attempts; what the relay asks for is kept to.
    pub retry_delay_max: Duration,
}

impl Default for ClientSettings {
    /// 10,000 events and 16 MB; batches of 100, each 100 ms; 10 s; 10 s.
    fn default() -> Self {
        Self {
            queue_events_max: 10_000,
            queue_bytes_max: 16 * 1024 * 1024,
            batch_events_max: 100,
            flush_interval: Duration::from_millis(100),
            call_timeout: Duration::from_secs(10),
            retry_delay_max: Duration::from_secs(10),
        }
    }
}

/// What became of the events. At any moment: queued = accepted + refused +
/// abandoned + waiting.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Handed over and taken.
    pub queued: u64,
    /// Accepted by the relay.
    pub accepted: u64,
    /// Refused by the relay for good: they break a rule. Each is logged.
    pub refused: u64,
    /// Still waiting when the client was closed and its time was over. The relay
    /// may have taken those whose answer was still out.
    pub abandoned: u64,
    /// Waiting, or under way.
    pub waiting: u64,
    /// Not taken: the queue was full or closed. Not in `queued`.
    pub dropped: u64,
    /// Batches that were sent again, in whole or in part.
    pub retries: u64,
}

/// Why an event was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotQueued {
    /// As many events wait as may. The relay is away, or slower than this
    /// service.
    #[error("the client's queue is full")]
    Full,
    /// The client is closed.
    #[error("the client is closed")]
    Closed,
}

/// See the module. Share it behind an `Arc`. Dropped without
/// [`close`](Self::close), it abandons what waits.
#[derive(Debug)]
pub struct BatchingClient {
    inlet: mpsc::Sender<Entry>,
    tally: Arc<Tally>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

/// An event that waits.
#[derive(Debug)]
struct Entry {
    item: TrackBatchItem,
    bytes: usize,
}

#[derive(Debug)]
struct Tally {
    queued: AtomicU64,
    accepted: AtomicU64,
    refused: AtomicU64,
    abandoned: AtomicU64,
    dropped: AtomicU64,
    retries: AtomicU64,
    waiting_bytes: AtomicUsize,
    bytes_max: usize,
    /// So many ended events does a flush wait for: batches are not waited for.
    flush_to: AtomicU64,
    /// A flush has begun: no interval and no delay is waited for now.
    hurry: Notify,
    /// When to give up; none while the client is open.
    closes_at: watch::Sender<Option<Instant>>,
    /// Changes with every batch that is done; false when none will be any more.
    progress: watch::Sender<bool>,
}

/// An interval or patience beyond this is as good as none.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

impl BatchingClient {
    /// A client of the relay at `addr`, such as `http://relay:50054`. Connects
    /// when there is something to send, and again when the connection is lost.
    /// Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// `addr` is no address.
    pub fn new(addr: &str, settings: ClientSettings) -> Result<Self, tonic::transport::Error> {
        let channel = Endpoint::from_shared(addr.to_owned())?
            .connect_timeout(settings.call_timeout)
            .tcp_nodelay(true)
            // A relay that vanished without a word is noticed.
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .connect_lazy();
        Ok(Self::over(channel, settings))
    }

    /// The same over a channel of your own, with TLS or a balancer, say.
    pub fn over(channel: Channel, mut settings: ClientSettings) -> Self {
        settings.batch_events_max = settings.batch_events_max.clamp(1, BATCH_EVENTS_MAX);
        let (inlet, outlet) = mpsc::channel(settings.queue_events_max.max(1));
        let tally = Arc::new(Tally {
            queued: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            waiting_bytes: AtomicUsize::new(0),
            bytes_max: settings.queue_bytes_max,
            flush_to: AtomicU64::new(0),
            hurry: Notify::new(),
            closes_at: watch::Sender::new(None),
            progress: watch::Sender::new(true),
        });
        let worker = Worker {
            client: AnalyticsServiceClient::new(channel),
            events_max: settings.batch_events_max,
            settings,
            outlet,
            pending: VecDeque::new(),
            failures: 0,
            tally: tally.clone(),
        };
        Self { inlet, tally, worker: Mutex::new(Some(tokio::spawn(worker.run()))) }
    }

    /// Hands an event over and returns its id. Never waits.
    ///
    /// # Errors
    ///
    /// The event is dropped, and counted.
    pub fn track(&self, mut request: TrackEventRequest) -> Result<String, NotQueued> {
        let event_id = id_or_new(&mut request.event_id);
        if request.timestamp_ms == 0 && request.timestamp == 0 {
            request.timestamp_ms = Clock::system().now_ms();
        }
        self.queue(Item::Track(request)).map(|()| event_id)
    }

    /// The same for what is known about a user.
    ///
    /// # Errors
    ///
    /// The call is dropped, and counted.
    pub fn identify(&self, mut request: IdentifyUserRequest) -> Result<String, NotQueued> {
        let event_id = id_or_new(&mut request.event_id);
        if request.timestamp_ms == 0 {
            request.timestamp_ms = Clock::system().now_ms();
        }
        self.queue(Item::Identify(request)).map(|()| event_id)
    }

    /// What became of the events so far.
    pub fn counters(&self) -> Counters {
        self.tally.counters()
    }

    /// Sends what waits at once, and waits until all that was queued before has
    /// been answered. Without a relay that may be never.
    pub async fn flush(&self) {
        let mut progress = self.tally.progress.subscribe();
        let queued = self.tally.queued.load(Ordering::SeqCst);
        self.tally.flush_to.fetch_max(queued, Ordering::SeqCst);
        self.tally.hurry.notify_one();
        while self.tally.ended() < queued && *progress.borrow_and_update() {
            // The sender is in the tally.
            let _ = progress.changed().await;
        }
    }

    /// Takes nothing more, sends what waits, and returns when it is done or
    /// `patience` is over. What has not been accepted by then is abandoned.
    pub async fn close(&self, patience: Duration) -> Counters {
        self.tally.closes_at.send_replace(Some(Instant::now() + patience.min(FOREVER)));
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = worker {
            // It ends by itself; a panic of it leaves its events waiting.
            let _ = worker.await;
        }
        self.tally.counters()
    }

    fn queue(&self, item: Item) -> Result<(), NotQueued> {
        let item = TrackBatchItem { item: Some(item) };
        let bytes = item.encoded_len();
        let tally = &self.tally;
        let before = tally.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        let place = match self.inlet.try_reserve() {
            _ if tally.closes_at.borrow().is_some() => Err(NotQueued::Closed),
            Ok(_) | Err(mpsc::error::TrySendError::Full(())) if before + bytes > tally.bytes_max => {
                Err(NotQueued::Full)
            }
            Ok(place) => Ok(place),
            Err(mpsc::error::TrySendError::Full(())) => Err(NotQueued::Full),
            Err(mpsc::error::TrySendError::Closed(())) => Err(NotQueued::Closed),
        };
        match place {
            Ok(place) => {
                // Counted first: it may be answered before this returns.
                tally.queued.fetch_add(1, Ordering::SeqCst);
                place.send(Entry { item, bytes });
                Ok(())
            }
            Err(not_queued) => {
                tally.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
                if tally.dropped.fetch_add(1, Ordering::Relaxed) == 0 {
                    warn!(reason = %not_queued, "the first event is dropped; the counters tell of the others");
                }
                Err(not_queued)
            }
        }
    }
}

impl Drop for BatchingClient {
    fn drop(&mut self) {
        // The worker must not outlive its client; after `close` it has ended.
        self.tally.closes_at.send_if_modified(|at| {
            let is_open = at.is_none();
            at.get_or_insert_with(Instant::now);
            is_open
        });
    }
}

fn id_or_new(event_id: &mut String) -> String {
    if event_id.is_empty() {
        *event_id = Uuid::now_v7().to_string();
    }
    event_id.clone()
}

impl Tally {
    /// Waits until the client is closed; returns when to give up.
    async fn closing(&self) -> Instant {
        let at = self.closes_at.subscribe().wait_for(Option::is_some).await.ok().and_then(|at| *at);
        // The sender is in the tally.
        at.unwrap_or_else(Instant::now)
    }

    fn ended(&self) -> u64 {
        let ended = [&self.accepted, &self.refused, &self.abandoned];
        ended.into_iter().map(|count| count.load(Ordering::SeqCst)).sum()
    }

    fn counters(&self) -> Counters {
        // Ended before queued, so that the difference is never negative.
        let (accepted, refused, abandoned) = (
            self.accepted.load(Ordering::SeqCst),
            self.refused.load(Ordering::SeqCst),
            self.abandoned.load(Ordering::SeqCst),
        );
        let queued = self.queued.load(Ordering::SeqCst);
        Counters {
            queued,
            accepted,
            refused,
            abandoned,
            waiting: queued - accepted - refused - abandoned,
            dropped: self.dropped.load(Ordering::Relaxed),
            retries: self.retries.load(Ordering::Relaxed),
        }
    }
}

/// Sends one batch at a time, so that order is kept.
struct Worker {
    client: AnalyticsServiceClient<Channel>,
    settings: ClientSettings,
    /// Fewer than the settings say while the relay calls batches too large.
    events_max: usize,
    outlet: mpsc::Receiver<Entry>,
    /// The next batch, and what did not fit into it.
    pending: VecDeque<Entry>,
    /// Calls that failed in a row.
    failures: u32,
    tally: Arc<Tally>,
}

impl Worker {
    async fn run(mut self) {
        let tally = self.tally.clone();
        let closing = async {
            sleep_until(tally.closing().await).await;
        };
        tokio::select! {
            () = self.send_all() => {}
            () = closing => {}
        }
        self.outlet.close();
        while let Ok(entry) = self.outlet.try_recv() {
            self.pending.push_back(entry);
        }
        let left = std::mem::take(&mut self.pending);
        if !left.is_empty() {
            warn!(event_count = left.len(), "closed before the relay had taken all events: they are lost");
        }
        for entry in left {
            self.ended(&entry, &self.tally.abandoned);
        }
        self.tally.progress.send_replace(false);
    }

    /// Returns when the client is closed and all is sent.
    async fn send_all(&mut self) {
        while self.gather().await {
            let entries = self.batch_len();
            let items = self.pending.iter().take(entries).map(|entry| entry.item.clone()).collect();
            let call = self.client.track_batch(TrackBatchRequest { items });
            let answer = match timeout(self.settings.call_timeout, call).await {
                Ok(answer) => answer.map(tonic::Response::into_inner),
                Err(_) => Err(Status::deadline_exceeded("no answer in time")),
            };
            let delay = match answer {
                Ok(response) if response.answers.len() == entries => self.settle(response),
                Ok(response) => {
                    let answers = response.answers.len();
                    self.failed(entries, &Status::internal(format!("{answers} answers to {entries} items")))
                }
                Err(status) => self.failed(entries, &status),
            };
            self.tally.progress.send_replace(true);
            if !delay.is_zero() {
                self.tally.retries.fetch_add(1, Ordering::Relaxed);
                let is_open = self.tally.closes_at.borrow().is_none();
                tokio::select! {
                    () = sleep(delay) => {}
                    () = self.tally.hurry.notified() => {}
                    // One attempt more, at once.
                    _ = self.tally.closing(), if is_open => {}
                }
            }
        }
    }

    /// Waits until a batch is full or has waited long enough. False if nothing
    /// will come any more.
    async fn gather(&mut self) -> bool {
        if self.pending.is_empty() {
            tokio::select! {
                biased;
                entry = self.outlet.recv() => match entry {
                    Some(entry) => self.pending.push_back(entry),
                    None => return false,
                },
                _ = self.tally.closing() => {
                    // What is in the queue now is the last.
                    self.outlet.close();
                    match self.outlet.recv().await {
                        Some(entry) => self.pending.push_back(entry),
                        None => return false,
                    }
                }
            }
        }
        let flushes = self.tally.ended() < self.tally.flush_to.load(Ordering::SeqCst);
        let interval = if flushes { Duration::ZERO } else { self.settings.flush_interval.min(FOREVER) };
        let mut due = Instant::now() + interval;
        let mut bytes: usize = self.pending.iter().map(|entry| entry.bytes).sum();
        while self.pending.len() < self.events_max && bytes < BATCH_BYTES_MAX {
            tokio::select! {
                biased;
                entry = self.outlet.recv() => match entry {
                    Some(entry) => {
                        bytes += entry.bytes;
                        self.pending.push_back(entry);
                    }
                    None => break,
                },
                () = self.tally.hurry.notified() => due = Instant::now(),
                () = sleep_until(due) => break,
                _ = self.tally.closing() => break,
            }
        }
        true
    }

    /// How many of the pending make the next batch: at least one.
    fn batch_len(&self) -> usize {
        let mut bytes = 0;
        let fits = |entry: &&Entry| {
            bytes += entry.bytes;
            bytes <= BATCH_BYTES_MAX
        };
        self.pending.iter().take(self.events_max).take_while(fits).count().max(1)
    }

    /// Takes out what was answered for good. Returns how long to wait before the
    /// rest is sent again; zero if there is none.
    fn settle(&mut self, response: TrackBatchResponse) -> Duration {
        self.failures = 0;
        self.events_max = self.settings.batch_events_max;
        let later = self.pending.split_off(response.answers.len());
        let mut deferred = VecDeque::new();
        for (entry, answer) in std::mem::take(&mut self.pending).into_iter().zip(response.answers) {
            match answer.answer {
                Some(Answer::Accepted(_)) => self.ended(&entry, &self.tally.accepted),
                Some(Answer::Refused(refused)) => {
                    let violation = refused.violations.first().cloned().unwrap_or_default();
                    warn!(
                        reason = violation.reason,
                        field = violation.field,
                        detail = violation.description,
                        "the relay refuses an event"
                    );
                    self.ended(&entry, &self.tally.refused);
                }
                Some(Answer::Deferred(_)) | None => deferred.push_back(entry),
            }
        }
        let delay = match u64::try_from(response.retry_delay_ms) {
            _ if deferred.is_empty() => Duration::ZERO,
            Ok(delay_ms) => Duration::from_millis(delay_ms).max(Duration::from_millis(1)),
            Err(_) => RETRY_DELAY_FIRST,
        };
        deferred.extend(later);
        self.pending = deferred;
        delay
    }

    /// Nothing of the batch was answered. Returns how long to wait.
    fn failed(&mut self, entries: usize, status: &Status) -> Duration {
        self.failures = self.failures.saturating_add(1);
        match status.code() {
            // The batch as a whole breaks a limit, of the relay or of something
            // on the way: fewer at a time, and a lone event is to blame.
            Code::OutOfRange | Code::InvalidArgument if entries > 1 => {
                self.events_max = entries.div_ceil(2);
                return Duration::from_millis(1);
            }
            Code::OutOfRange | Code::InvalidArgument => {
                warn!(error = status.message(), "the relay refuses an event");
                if let Some(entry) = self.pending.pop_front() {
                    self.ended(&entry, &self.tally.refused);
                }
                return Duration::ZERO;
            }
            Code::Unimplemented | Code::Unauthenticated | Code::PermissionDenied => {
                warn!(code = ?status.code(), error = status.message(), "the relay does not take batches");
            }
            code if self.failures == 1 => {
                warn!(?code, error = status.message(), "the relay does not take events: they wait");
            }
            code => debug!(?code, error = status.message(), "the relay does not take events"),
        }
        let limit = RETRY_DELAY_FIRST
            .saturating_mul(1 << self.failures.min(16))
            .min(self.settings.retry_delay_max)
            .max(Duration::from_millis(1));
        limit.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    fn ended(&self, entry: &Entry, count: &AtomicU64) {
        self.tally.waiting_bytes.fetch_sub(entry.bytes, Ordering::Relaxed);
        count.fetch_add(1, Ordering::SeqCst);
    }
}
