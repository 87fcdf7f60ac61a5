//! Answers that relays share, in Redis. It may be away, hang, be slow or full, or hold
//! anything: that costs the hit and nothing else.
//!
//! Nobody who asks connects or writes: a task of its own does, and who asks finds a connection
//! or none. A read has [`READ_TIME`]; after [`FAILURES_MAX`] that failed in a row, or one for
//! which the connection broke, there is none until the task has made another, after a pause
//! that grows.
//!
//! An erased user must not live on in figures. When something is deleted, the tenant's
//! generation is set to something new: what was kept under another is not believed any more,
//! by any relay. The generation outlives all that was kept before it, so it may go then.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    fmt,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use ::redis::{
    AsyncConnectionConfig, Client, Cmd, FromRedisValue, Pipeline, RedisError, aio::MultiplexedConnection,
    cmd, pipe,
};
use analytics_relay_providers::Secret;
use arc_swap::ArcSwapOption;
use futures_util::FutureExt;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};

use super::{
    cache::Known,
    report::{Answer, Question, generation_key},
};
use crate::telemetry::{OnceInAWhile, SharedCacheMetrics};

/// Longest time that a question waits for what may be kept.
const READ_TIME: Duration = Duration::from_millis(50);
/// Longest time for a write, for which nobody waits.
const WRITE_TIME: Duration = Duration::from_millis(500);
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// So many failures in a row, and it is left alone.
const FAILURES_MAX: u32 = 3;
/// Between two attempts to connect; doubles.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// A connection that was good for so long begins with the short pause again.
const GOOD_FOR: Duration = Duration::from_secs(60);
/// Largest value that is kept or read.
const VALUE_BYTES_MAX: usize = 256 * 1024;
const GENERATION_BYTES_MAX: usize = 64;
/// How long a generation is known: longer than any answer.
const GENERATION_SECONDS: u64 = 600;
/// Answers that wait to be written; one more is not kept.
const WRITES_MAX: usize = 64;
/// How often it is said that it is not there.
const SAID_INTERVAL: Duration = Duration::from_secs(60);

/// What was found for a question.
pub(super) struct Found {
    pub(super) known: Option<Known>,
    /// Under which an answer is to be kept.
    pub(super) generation: String,
}

/// An answer to be kept.
struct Write {
    key: String,
    value: Vec<u8>,
    for_: Duration,
}

/// As a value is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Value<A> {
    generation: String,
    as_of_ms: i64,
    answer: A,
}

/// See the module.
pub(super) struct SharedCache {
    client: Client,
    connection: ArcSwapOption<MultiplexedConnection>,
    /// In a row.
    failures: AtomicU32,
    broken: Notify,
    writes: mpsc::Sender<Write>,
    /// Until the task has it.
    waiting: Mutex<Option<mpsc::Receiver<Write>>>,
    /// Tenants of which something was deleted and nobody was told yet: until then nothing is
    /// believed.
    owed: Mutex<BTreeSet<String>>,
    is_owed: Notify,
    metrics: SharedCacheMetrics,
}

impl fmt::Debug for SharedCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedCache").field("connected", &self.is_connected()).finish_non_exhaustive()
    }
}

impl SharedCache {
    /// At an address that was checked; [`Self::tend`] connects.
    pub(super) fn new(url: &Secret, metrics: SharedCacheMetrics) -> Option<Self> {
        let client = Client::open(url.expose()).ok()?;
        let (writes, waiting) = mpsc::channel(WRITES_MAX);
        Some(Self {
            client,
            connection: ArcSwapOption::empty(),
            failures: AtomicU32::new(0),
            broken: Notify::new(),
            writes,
            waiting: Mutex::new(Some(waiting)),
            owed: Mutex::default(),
            is_owed: Notify::new(),
            metrics,
        })
    }

    /// True while there is a connection.
    pub(super) fn is_connected(&self) -> bool {
        self.connection.load().is_some()
    }

    /// What is kept for a question, within a moment; nothing if nobody can say.
    pub(super) async fn get(&self, question: &Question, key: &str) -> Option<Found> {
        let connection = self.connection.load_full().filter(|_| lock(&self.owed).is_empty());
        let Some(connection) = connection else {
            self.metrics.away.inc();
            return None;
        };
        let mut both = pipe();
        // Never more than so much, whatever somebody has put there.
        both.cmd("GETRANGE").arg(question.generation_key()).arg(0).arg(GENERATION_BYTES_MAX);
        both.cmd("GETRANGE").arg(key).arg(0).arg(VALUE_BYTES_MAX);
        let (generation, value): (Vec<u8>, Vec<u8>) =
            self.within(READ_TIME, ask_both(&connection, &both)).await?;
        let Ok(generation) = String::from_utf8(generation) else {
            self.metrics.errors.inc();
            return None;
        };
        let known = self.read(question, &generation, &value);
        Some(Found { known, generation })
    }

    fn read(&self, question: &Question, generation: &str, value: &[u8]) -> Option<Known> {
        if value.is_empty() {
            self.metrics.misses.inc();
            return None;
        }
        let read = serde_json::from_slice::<Value<Answer>>(value).ok();
        let Some(read) = read.filter(|read| question.fits(&read.answer)) else {
            self.metrics.errors.inc();
            return None;
        };
        if read.generation != generation {
            self.metrics.misses.inc();
            return None;
        }
        self.metrics.hits.inc();
        Some(Known { answer: read.answer, as_of_ms: read.as_of_ms })
    }

    /// Has an answer kept. Waits for nothing.
    pub(super) fn put(&self, key: &str, generation: String, known: &Known, for_: Duration) {
        if !self.is_connected() || known.answer.bytes() > VALUE_BYTES_MAX {
            return;
        }
        let value = Value { generation, as_of_ms: known.as_of_ms, answer: &known.answer };
        let value = serde_json::to_vec(&value).expect("an answer has names that are texts");
        if value.len() < VALUE_BYTES_MAX {
            // One that finds no room is asked for again.
            let _ = self.writes.try_send(Write { key: key.to_owned(), value, for_ });
        }
    }

    /// Lets nobody believe any more what is kept of a tenant.
    pub(super) fn forget(&self, tenant: &str) {
        lock(&self.owed).insert(tenant.to_owned());
        self.is_owed.notify_one();
    }

    /// Connects, writes, connects again. Ends never.
    pub(super) async fn tend(&self) -> Infallible {
        let Some(mut writes) = lock(&self.waiting).take() else { return std::future::pending().await };
        let mut said = OnceInAWhile::every(SAID_INTERVAL);
        let mut pause = PAUSE.0;
        loop {
            match self.connect().await {
                Ok(connection) => {
                    let since = Instant::now();
                    info!("answers are shared in Redis");
                    self.serve(&connection, &mut writes).await;
                    self.connection.store(None);
                    if since.elapsed() >= GOOD_FOR {
                        pause = PAUSE.0;
                    }
                    warn!("Redis does not answer in time: answers are not shared for now");
                }
                Err(why) => {
                    if let Some(attempts) = said.takes(1, std::time::Instant::now()) {
                        warn!(attempts, why, "Redis cannot be reached: answers are not shared for now");
                    }
                }
            }
            sleep(pause.mul_f64(0.75 + 0.5 * fastrand::f64())).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    async fn connect(&self) -> Result<MultiplexedConnection, String> {
        let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        let connecting = async {
            let mut connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
            // Also a server that only accepts is none.
            cmd("PING").query_async::<()>(&mut connection).await?;
            Ok::<_, RedisError>(connection)
        };
        match timeout(CONNECT_TIME, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            // Its text may name the address.
            Ok(Err(error)) => Err(format!("{:?}", error.kind())),
            Err(_) => Err("it did not answer in time".to_owned()),
        }
    }

    /// Writes until the connection is given up.
    async fn serve(&self, connection: &MultiplexedConnection, writes: &mut mpsc::Receiver<Write>) {
        self.failures.store(0, Ordering::Relaxed);
        // What was said of the connection before this one.
        let _ = self.broken.notified().now_or_never();
        self.pay(connection).await;
        if !lock(&self.owed).is_empty() {
            return;
        }
        while writes.try_recv().is_ok() {
            // It waited for a connection before this one.
        }
        self.connection.store(Some(connection.clone().into()));
        loop {
            tokio::select! {
                biased;
                () = self.broken.notified() => return,
                () = self.is_owed.notified() => self.pay(connection).await,
                Some(Write { key, value, for_ }) = writes.recv() => {
                    let mut set = cmd("SET");
                    let millis = u64::try_from(for_.as_millis()).unwrap_or(u64::MAX).max(1);
                    set.arg(key).arg(value).arg("PX").arg(millis);
                    self.within(WRITE_TIME, ask::<()>(connection, &set)).await;
                }
            }
        }
    }

    /// Tells what was deleted.
    async fn pay(&self, connection: &MultiplexedConnection) {
        let owed = lock(&self.owed).clone();
        for tenant in owed {
            let mut set = cmd("SET");
            let generation = format!("{:032x}", fastrand::u128(..));
            set.arg(generation_key(&tenant)).arg(generation).arg("EX").arg(GENERATION_SECONDS);
            if self.within(WRITE_TIME, ask::<()>(connection, &set)).await.is_none() {
                // Also one that is only full is connected to anew, so that it is tried again.
                self.give_up();
                return;
            }
            lock(&self.owed).remove(&tenant);
        }
    }

    /// Does something with the connection, in time; counts what fails.
    async fn within<T>(&self, time: Duration, ask: impl Future<Output = Result<T, RedisError>>) -> Option<T> {
        let (failures, is_broken) = match timeout(time, ask).await {
            Ok(Ok(value)) => {
                self.failures.store(0, Ordering::Relaxed);
                return Some(value);
            }
            // It answers, and what is wrong is what was asked: a value of another type, no room.
            Ok(Err(error)) if !error.is_io_error() && !error.is_unrecoverable_error() => (0, false),
            Ok(Err(_)) => (0, true),
            Err(_) => (self.failures.fetch_add(1, Ordering::Relaxed) + 1, false),
        };
        self.metrics.errors.inc();
        if is_broken || failures >= FAILURES_MAX {
            self.give_up();
        }
        None
    }

    fn give_up(&self) {
        self.connection.store(None);
        self.broken.notify_one();
    }
}

async fn ask<T: FromRedisValue>(connection: &MultiplexedConnection, cmd: &Cmd) -> Result<T, RedisError> {
    cmd.query_async(&mut connection.clone()).await
}

async fn ask_both<T: FromRedisValue>(
    connection: &MultiplexedConnection,
    both: &Pipeline,
) -> Result<T, RedisError> {
    both.query_async(&mut connection.clone()).await
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
