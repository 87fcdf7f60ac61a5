//! Answers questions about what the store keeps.
//!
//! ```text
//!  door ─► report: what is asked, checked ─► Query ─┬─► cache ─► answer
//!                                                   └─► flight: one for all who ask the same
//!                                                        ├─► Redis, if it is there
//!                                                        └─► turn, deadline ─► Store
//! ```
//!
//! An answer is kept for five minutes if its period was over, late events included, when the
//! store was asked, and for ten seconds if not. So a figure may lack what came in that time;
//! it never holds what was deleted: whoever deletes says so ([`Query::forget`]), and then
//! nothing is known any more, what is being asked at that moment included.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use analytics_relay_store::Store;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout, timeout_at},
};
use tracing::{error, warn};

mod cache;
pub(crate) mod event_count;
mod flights;
mod parameters;
mod period;
#[cfg(not(feature = "redis"))]
#[path = "no_redis.rs"]
mod redis;
#[cfg(feature = "redis")]
mod redis;
pub(crate) mod report;
pub(crate) mod settings;
pub(crate) mod unanswered;
pub(crate) mod user_count;
pub(crate) mod written;

pub(crate) use cache::Known;
pub(crate) use period::Period;
pub(crate) use report::{Answer, Question, Report, ReportName};
pub(crate) use unanswered::Unanswered;

use self::{
    cache::Cache,
    flights::{Flights, Landed},
    redis::{Found, SharedCache},
    settings::QuerySettings,
};
use crate::{
    telemetry::{OnceInAWhile, QueryMetrics},
    time::Clock,
};

/// So much of its time a question waits for its turn at most, in fifths: behind it, it would
/// have too little left.
const TURN_FIFTHS: u32 = 3;
/// How often it is said that the store does not answer.
const SAID_INTERVAL: Duration = Duration::from_secs(10);
/// How long after its end a period may get events that are late: what a caller keeps back,
/// a queue, a batch.
const LATE_MS: i64 = 5 * 60 * 1000;
/// How long an answer is true whose period was over,
const OVER_TTL: Duration = Duration::from_secs(5 * 60);
/// and one whose period was not. Also how long this process believes what others must be able
/// to take back.
const RUNNING_TTL: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(crate) struct Query {
    store: Option<StoreHandle>,
    kept: Mutex<Kept>,
    flights: Flights,
    shared: Option<SharedCache>,
    turns: Semaphore,
    deadline: Duration,
    clock: Clock,
    said: Mutex<OnceInAWhile>,
    metrics: QueryMetrics,
}

#[derive(Debug, Default)]
struct Kept {
    cache: Cache,
    /// How often something was deleted.
    deletions: u64,
}

struct StoreHandle(Arc<dyn Store>);

impl std::fmt::Debug for StoreHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

impl Query {
    /// Without a store every question is answered with how to get one.
    pub(crate) fn new(
        store: Option<Arc<dyn Store>>,
        settings: &QuerySettings,
        clock: Clock,
        metrics: QueryMetrics,
    ) -> Self {
        let shared = settings.redis_url.as_ref().filter(|_| store.is_some());
        let shared = shared.and_then(|url| SharedCache::new(url, metrics.shared.clone()));
        Self {
            store: store.map(StoreHandle),
            kept: Mutex::default(),
            flights: Flights::default(),
            shared,
            turns: Semaphore::new(settings.at_once_max),
            deadline: settings.deadline,
            clock,
            said: Mutex::new(OnceInAWhile::every(SAID_INTERVAL)),
            metrics,
        }
    }

    /// For tests of what asks nothing.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn of_nothing() -> Arc<Self> {
        let metrics = crate::telemetry::Telemetry::new(0).query();
        Arc::new(Self::new(None, &QuerySettings::default(), Clock::system(), metrics))
    }

    /// That there is something to ask, which is told before what is wrong with a question.
    pub(crate) fn check(&self) -> Result<(), Unanswered> {
        self.store.as_ref().map(drop).ok_or(Unanswered::NoStore)
    }

    /// Answers a question; whether the answer was known. Whoever asks what is being asked
    /// already waits for the same answer. When it is dropped, and nobody else waits, the work
    /// ends.
    pub(crate) async fn answer(
        self: &Arc<Self>,
        question: &Question,
    ) -> Result<(Arc<Known>, bool), Unanswered> {
        self.check()?;
        let key = question.key();
        if let Some(known) = self.kept().cache.get(&key, Instant::now()) {
            self.metrics.hits.inc();
            return Ok((known, true));
        }
        let mut is_first = false;
        let begin = || {
            is_first = true;
            let (query, question, key) = (self.clone(), question.clone(), key.clone());
            Box::pin(async move { query.find(&question, &key).await }) as _
        };
        let flight = self.flights.join(&key, begin);
        if is_first {
            self.metrics.misses.inc()
        } else {
            self.metrics.joined.inc()
        };
        flight?.await
    }

    /// Looks for an answer elsewhere, then asks the store.
    async fn find(&self, question: &Question, key: &str) -> Landed {
        let deadline = Instant::now() + self.deadline;
        let deletions = self.kept().deletions;
        let found = match &self.shared {
            Some(shared) => shared.get(question, key).await,
            None => None,
        };
        let (known, generation) = match found {
            Some(Found { known, generation }) => (known, Some(generation)),
            None => (None, None),
        };
        // One whose time is over is what a clock that differs leaves.
        let left = known.as_ref().and_then(|known| self.time_left(question, known));
        if let Some((known, left)) = known.zip(left) {
            let known = Arc::new(known);
            self.keep(key, &known, left, deletions);
            return Ok((known, true));
        }
        self.ask(question, key, deadline, deletions, generation).await
    }

    /// Asks the store when it is this one's turn, and keeps the answer.
    async fn ask(
        &self,
        question: &Question,
        key: &str,
        deadline: Instant,
        deletions: u64,
        generation: Option<String>,
    ) -> Landed {
        let Some(StoreHandle(store)) = &self.store else { return Err(Unanswered::NoStore) };
        let turn = timeout(self.deadline * TURN_FIFTHS / 5, self.turns.acquire()).await;
        let _turn = turn.map_err(|_| Unanswered::TooMany)?.map_err(|_| Unanswered::Defect)?;
        let (begun, as_of_ms) = (Instant::now(), self.clock.now_ms());
        let answered = timeout_at(deadline, question.ask(&**store)).await;
        self.metrics.asked(question.name().label(), begun.elapsed());
        let answer = answered.map_err(|_| Unanswered::Late).flatten().inspect_err(|why| self.say(why))?;
        let known = Arc::new(Known { answer, as_of_ms });
        let ttl = ttl(question, as_of_ms);
        if let (Some(shared), Some(generation)) = (&self.shared, generation) {
            shared.put(key, generation, &known, ttl);
        }
        self.keep(key, &known, ttl, deletions);
        Ok((known, false))
    }

    /// Says why there is no answer, if somebody has to know.
    fn say(&self, unanswered: &Unanswered) {
        let (why, is_damaged) = match unanswered {
            Unanswered::Unavailable(why) => (why, false),
            Unanswered::Damaged(why) => (why, true),
            _ => return,
        };
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        match said.takes(1, std::time::Instant::now()) {
            Some(questions) if is_damaged => error!(questions, why, "what is stored cannot be read"),
            Some(questions) => warn!(questions, why, "the store does not answer"),
            None => {}
        }
    }

    /// How long an answer that others have kept is still true.
    fn time_left(&self, question: &Question, known: &Known) -> Option<Duration> {
        let ttl = ttl(question, known.as_of_ms);
        let age_ms = u64::try_from(self.clock.now_ms().saturating_sub(known.as_of_ms)).unwrap_or(0);
        ttl.checked_sub(Duration::from_millis(age_ms)).filter(|left| !left.is_zero())
    }

    /// Keeps an answer, unless something was deleted since it was asked for.
    fn keep(&self, key: &str, known: &Arc<Known>, ttl: Duration, deletions: u64) {
        // Others may delete, and tell it where answers are shared.
        let ttl = if self.shared.is_some() { ttl.min(RUNNING_TTL) } else { ttl };
        let mut kept = self.kept();
        if kept.deletions == deletions {
            kept.cache.put(key, known.clone(), Instant::now() + ttl);
        }
    }

    /// Something of a tenant was deleted, or counts otherwise than before: what is known is
    /// not true any more, here at once and in relays that share answers within ten seconds.
    pub(crate) fn forget(&self, tenant: &str) {
        let mut kept = self.kept();
        kept.deletions += 1;
        kept.cache.clear();
        drop(kept);
        self.flights.forget();
        if let Some(shared) = &self.shared {
            shared.forget(tenant);
        }
    }

    /// Looks after what is shared, if answers are. Ends never.
    pub(crate) async fn tend(&self) -> std::convert::Infallible {
        match &self.shared {
            Some(shared) => shared.tend().await,
            None => std::future::pending().await,
        }
    }

    /// True if answers are shared with other relays.
    pub(crate) fn is_sharing(&self) -> bool {
        self.shared.is_some()
    }

    /// True while what is shared can be reached.
    pub(crate) fn is_connected(&self) -> bool {
        self.shared.as_ref().is_some_and(SharedCache::is_connected)
    }

    /// Unix milliseconds.
    pub(crate) fn now_ms(&self) -> i64 {
        self.clock.now_ms()
    }

    /// Memory of the answers that are kept.
    pub(crate) fn cached_bytes(&self) -> usize {
        self.kept().cache.bytes()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long an answer is true.
fn ttl(question: &Question, as_of_ms: i64) -> Duration {
    let is_over = question.period.range_ms.end <= as_of_ms.saturating_sub(LATE_MS);
    if is_over { OVER_TTL } else { RUNNING_TTL }
}

#[cfg(test)]
pub(crate) mod tests;
