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
    time::{Instant, timeout},
};
use tonic::transport::{Channel, Endpoint};
use tracing::warn;
use uuid::Uuid;

use crate::{
    proto::v1::{
        AliasRequest, GroupRequest, IdentifyUserRequest, TrackBatchItem, TrackEventRequest, ViewRequest,
        track_batch_item::Item,
    },
    time::Clock,
};

mod connect;
mod seldom;
mod worker;

pub use connect::{ClientError, ClientIdentity, ClientTls};
use seldom::Seldom;
use worker::Worker;

/// Most events of a batch: as many as the relay takes.
const BATCH_EVENTS_MAX: usize = 1000;

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
    /// For an address with `https`: whom to believe, and who we are.
    pub tls: ClientTls,
}

impl Default for ClientSettings {
    /// 10,000 events and 16 MB; batches of 100, each 100 ms; 10 s; 10 s; the
    /// system's authorities.
    fn default() -> Self {
        Self {
            queue_events_max: 10_000,
            queue_bytes_max: 16 * 1024 * 1024,
            batch_events_max: 100,
            flush_interval: Duration::from_millis(100),
            call_timeout: Duration::from_secs(10),
            retry_delay_max: Duration::from_secs(10),
            tls: ClientTls::default(),
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
    /// Refused by the relay for good: they break a rule. Logged with id and name, one
    /// in ten seconds.
    pub refused: u64,
    /// Still waiting when the client was closed and its time was over, or when the
    /// program ended; logged. The relay may have taken those whose answer was still
    /// out.
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
/// [`close`](Self::close), or when its runtime ends, it abandons what waits, and
/// says how much; it never keeps a program from ending.
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
    dropped_told: Seldom,
}

/// An interval or patience beyond this is as good as none.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

impl BatchingClient {
    /// A client of the relay at `addr`, such as `http://relay:50054`, or `https` where
    /// the relay serves TLS. Connects when there is something to send, and again when
    /// the connection is lost. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// `addr` or what is to be used for TLS can never work.
    pub fn new(addr: &str, settings: ClientSettings) -> Result<Self, ClientError> {
        let endpoint = connect::endpoint(addr, &settings)?;
        let channel = endpoint.connect_lazy();
        Ok(Self::start(channel, Some(endpoint), settings))
    }

    /// The same over a channel of your own, with a balancer, say. `settings.tls` is
    /// the channel's own affair, and so is noticing that it is dead.
    pub fn over(channel: Channel, settings: ClientSettings) -> Self {
        Self::start(channel, None, settings)
    }

    fn start(channel: Channel, endpoint: Option<Endpoint>, mut settings: ClientSettings) -> Self {
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
            dropped_told: Seldom::default(),
        });
        let worker = Worker::new(channel, endpoint, settings, outlet, tally.clone());
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
        let event_id = stamped(&mut request.event_id, &mut request.timestamp_ms);
        self.queue(Item::Identify(request)).map(|()| event_id)
    }

    /// The same for a page that a user saw.
    ///
    /// # Errors
    ///
    /// The call is dropped, and counted.
    pub fn page(&self, mut request: ViewRequest) -> Result<String, NotQueued> {
        let event_id = stamped(&mut request.event_id, &mut request.timestamp_ms);
        self.queue(Item::Page(request)).map(|()| event_id)
    }

    /// The same for a screen that a user saw.
    ///
    /// # Errors
    ///
    /// The call is dropped, and counted.
    pub fn screen(&self, mut request: ViewRequest) -> Result<String, NotQueued> {
        let event_id = stamped(&mut request.event_id, &mut request.timestamp_ms);
        self.queue(Item::Screen(request)).map(|()| event_id)
    }

    /// The same for a user's group, and what is known about it.
    ///
    /// # Errors
    ///
    /// The call is dropped, and counted.
    pub fn group(&self, mut request: GroupRequest) -> Result<String, NotQueued> {
        let event_id = stamped(&mut request.event_id, &mut request.timestamp_ms);
        self.queue(Item::Group(request)).map(|()| event_id)
    }

    /// The same for the id that a user had before.
    ///
    /// # Errors
    ///
    /// The call is dropped, and counted.
    pub fn alias(&self, mut request: AliasRequest) -> Result<String, NotQueued> {
        let event_id = stamped(&mut request.event_id, &mut request.timestamp_ms);
        self.queue(Item::Alias(request)).map(|()| event_id)
    }

    /// What became of the events so far.
    pub fn counters(&self) -> Counters {
        self.tally.counters()
    }

    /// Sends what waits at once, and waits until all that was queued before has
    /// been answered, at most for `patience`. Returns whether it has been; what has
    /// not goes on waiting.
    pub async fn flush(&self, patience: Duration) -> bool {
        let queued = self.tally.queued.load(Ordering::SeqCst);
        self.tally.flush_to.fetch_max(queued, Ordering::SeqCst);
        self.tally.hurry.notify_one();
        let mut progress = self.tally.progress.subscribe();
        let ended = async {
            while self.tally.ended() < queued && *progress.borrow_and_update() {
                // The sender is in the tally.
                let _ = progress.changed().await;
            }
        };
        let in_time = timeout(patience.min(FOREVER), ended).await.is_ok();
        in_time && self.tally.abandoned.load(Ordering::SeqCst) == 0
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
                tally.dropped.fetch_add(1, Ordering::Relaxed);
                if let Some(more) = tally.dropped_told.may_tell() {
                    let (event_id, event_name) = id_and_name(&item);
                    warn!(event_id, event_name, more, reason = %not_queued, "an event is dropped");
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

/// How an event is told from others in the logs. A user's id is nobody's business
/// there.
fn id_and_name(item: &TrackBatchItem) -> (&str, &str) {
    match &item.item {
        Some(Item::Track(track)) => (&track.event_id, &track.event_name),
        Some(Item::Identify(identify)) => (&identify.event_id, "(identify)"),
        Some(Item::Page(page)) => (&page.event_id, "(page)"),
        Some(Item::Screen(screen)) => (&screen.event_id, "(screen)"),
        Some(Item::Group(group)) => (&group.event_id, "(group)"),
        Some(Item::Alias(alias)) => (&alias.event_id, "(alias)"),
        None => ("", ""),
    }
}

/// Gives an event the id and the time that it lacks, which it keeps however often it is
/// sent.
fn stamped(event_id: &mut String, timestamp_ms: &mut i64) -> String {
    if *timestamp_ms == 0 {
        *timestamp_ms = Clock::system().now_ms();
    }
    id_or_new(event_id)
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
