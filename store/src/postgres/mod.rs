//! The store on a PostgreSQL server, with TimescaleDB or without.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::{BufRead, Write},
    ops::{Deref, DerefMut},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use analytics_relay_providers::Event;
use async_trait::async_trait;
use deadpool_postgres::{Object, Pool, Transaction};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_postgres::IsolationLevel;

use crate::{
    Appended, AsOf, Breakdown, Bucket, CountPoint, Deleted, Field, Funnel, FunnelAnswer, Identity, Limits,
    LogEntry, NamedPoint, NewVisitors, Operator, PageRow, Point, PropertyRow, Realtime, Scope, SessionRow,
    Store, StoreError, Subject, Summary, TenantScope, ValueRow,
    lines::{self, ExportReport, ImportReport, Wanted},
    model::{Buckets, DAY_MS, FactLimits, Keys, KnownFact},
    scan::{
        answer, funnels, lone, names,
        owners::OwnerMap,
        seam::{Patience, waiting},
    },
};

mod connect;
mod error;
mod facts;
mod look;
mod owners;
mod rows;
mod scan;
mod schema;
mod slow;
mod time;
mod timescale;
mod tls;
mod upkeep;
mod write;

#[cfg(test)]
mod tests;

use facts::{FactTables, Known, Refused};
use owners::Owners;
use scan::PgScan;
use schema::Opened;
use slow::Slow;
use upkeep::Behind;

/// Questions that wait for their turn; more are refused.
const WAITING_MAX: usize = 64;
/// So often a batch is tried at which others were in the way.
const CONFLICTS_MAX: usize = 5;
/// So many events of a day in one batch are worth a partition, of so many days back.
const ROWS_OF_A_DAY: usize = 100;
const DAYS_BACK: i64 = 800;
/// After partitions could not be made soon, it is not tried again for a batch so long.
const DAYS_REST: Duration = Duration::from_secs(300);
/// How the text of an error ends that says that a statement took too long.
const CANCELLED: &str = "(SQLSTATE 57014)";

pub use look::{Connections, look};

/// How the store is kept.
#[derive(Clone)]
pub struct Settings {
    /// Where, as `postgres://user:password@host:5432/database?sslmode=verify-full`.
    pub url: String,
    /// Connections of this process.
    pub connections_max: usize,
    /// Questions that are answered at once.
    pub readers: usize,
    /// A question that takes longer is given up.
    pub deadline: Duration,
    /// What an answer may take.
    pub limits: Limits,
    /// Websites and apps of a tenant. Events of more that their callers name, and no key, are
    /// kept as such that name none.
    pub sites_max: usize,
    /// How much is noted of who is who.
    pub fact_limits: FactLimits,
    /// So many of the last events are known again by their ids alone, whatever their times.
    pub window: usize,
    /// What the server takes as long for is told in the log and counted.
    pub slow: Duration,
}

impl Settings {
    /// The defaults, for a URL.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            connections_max: 8,
            readers: 2,
            deadline: Duration::from_secs(5),
            limits: Limits::default(),
            sites_max: 1_000,
            fact_limits: FactLimits::default(),
            window: 1_000_000,
            slow: Duration::from_millis(500),
        }
    }
}

/// Without the URL, which has a password.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings")
            .field("connections_max", &self.connections_max)
            .field("readers", &self.readers)
            .field("deadline", &self.deadline)
            .field("limits", &self.limits)
            .field("sites_max", &self.sites_max)
            .field("fact_limits", &self.fact_limits)
            .field("window", &self.window)
            .field("slow", &self.slow)
            .finish_non_exhaustive()
    }
}

/// What is in the store, and what happened since it was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Events, of all who write to it.
    pub events: u64,
    /// Websites and apps.
    pub sites: u64,
    /// The time of the earliest event: Unix milliseconds.
    pub first_ms: Option<i64>,
    /// The time of the latest.
    pub last_ms: Option<i64>,
    /// Bytes of the tables of the store with their indexes.
    pub bytes: u64,
    /// Days that have a partition, or a chunk of TimescaleDB's.
    pub partitions: u64,
    /// Events of days that have none.
    pub default_events: u64,
    /// What the server says it is.
    pub server_version: String,
    /// The version of TimescaleDB, where it is used.
    pub timescaledb: Option<String>,
    /// Connections of this process.
    pub connections: u64,
    /// Of those, free.
    pub idle_connections: u64,
    /// Events that were kept since the store was opened.
    pub appended: u64,
    /// Links of devices and users that were not noted: one had too many.
    pub links_refused: u64,
    /// Aliases that were not noted: too many ids would have been one.
    pub aliases_refused: u64,
    /// Keys of traits that were not kept: somebody had too much of them.
    pub traits_refused: u64,
    /// Events of websites of which their tenant had too many, kept as such that name none.
    pub sources_refused: u64,
    /// What the server took long for.
    pub slow: u64,
}

/// What upkeep did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Upkept {
    /// Partitions that were made.
    pub made: u64,
    /// Events that were moved into them.
    pub moved: u64,
    /// Partitions that were dropped, as all in them is too old.
    pub dropped: u64,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Events that were read.
    pub events: u64,
    /// What is wrong, a line each.
    pub wrong: Vec<String>,
}

impl CheckReport {
    /// True if nothing is wrong.
    pub fn is_whole(&self) -> bool {
        self.wrong.is_empty()
    }
}

/// The store on a server. A clone is the same store.
#[derive(Clone)]
pub struct PostgresStore {
    shared: Arc<Shared>,
}

struct Shared {
    settings: Settings,
    pool: Pool,
    opened: Opened,
    keys: Keys,
    /// For telling texts apart.
    secret: [u8; 16],
    owners: Owners,
    counters: Counters,
    slow: Slow,
    /// Days that have a partition.
    days: Mutex<BTreeSet<i64>>,
    /// Until when none is made for a batch, after one could not be.
    days_rest_until: Mutex<Option<Instant>>,
    /// One batch of this process after the other.
    writing: tokio::sync::Mutex<Known>,
    /// What is known may be of a server that is lost.
    is_known_old: AtomicBool,
    turns: Arc<Semaphore>,
    waiting: Semaphore,
}

/// What happened since the store was opened.
#[derive(Debug, Default)]
struct Counters {
    appended: AtomicU64,
    links_refused: AtomicU64,
    aliases_refused: AtomicU64,
    traits_refused: AtomicU64,
    sources_refused: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresStore").field("settings", &self.shared.settings).finish_non_exhaustive()
    }
}

impl PostgresStore {
    /// Connects, and makes the tables or brings them up. [`StoreError::Unavailable`] while the
    /// server is not there or starts: try again; any other error is for a person.
    pub async fn open(settings: Settings) -> Result<Self, StoreError> {
        let pool = connect::pool(&settings)?;
        let mut connection = Lent::of(pool.get().await?);
        let opened = async {
            let transaction = connection.transaction().await?;
            let opened = schema::open(&transaction).await?;
            transaction.commit().await?;
            Ok(opened)
        };
        let opened: Opened = give_back(opened.await, connection)?;
        let (key, secret) = opened.secrets.split_at(16);
        let halves = (key.try_into(), secret.try_into());
        let (Ok(key), Ok(secret)) = halves else {
            return Err(StoreError::Damaged("its secret is too short".into()));
        };
        let readers = settings.readers.max(1);
        let store = Self {
            shared: Arc::new(Shared {
                pool,
                keys: Keys::new(key),
                secret,
                owners: Owners::default(),
                counters: Counters::default(),
                slow: Slow::after(settings.slow),
                days: Mutex::new(opened.days.clone()),
                days_rest_until: Mutex::default(),
                writing: Default::default(),
                is_known_old: AtomicBool::default(),
                turns: Arc::new(Semaphore::new(readers)),
                waiting: Semaphore::new(WAITING_MAX),
                opened,
                settings,
            }),
        };
        store.make_days_ahead().await;
        Ok(store)
    }

    /// Makes the partitions of the days to come. A start does not wait for whoever reads all
    /// there is, as a dump does: events have their place without.
    async fn make_days_ahead(&self) {
        let known = lock(&self.shared.days).clone();
        let due: Vec<i64> = schema::days_ahead(now_ms()).filter(|day| !known.contains(day)).collect();
        if due.is_empty() || self.shared.opened.timescaledb.is_some() {
            return;
        }
        let made = async {
            let mut connection = self.connection().await?;
            let made = schema::make_soon(&mut connection, &due, &self.shared.slow).await;
            give_back(made, connection)
        };
        self.made_days(made.await);
    }

    /// Notes which days have a partition; or that none is made for a batch for a while.
    fn made_days(&self, made: Result<BTreeSet<i64>, StoreError>) {
        match made {
            Ok(days) => *lock(&self.shared.days) = days,
            Err(error) => {
                tracing::warn!(%error, "partitions cannot be made now: events of their days go to events_default");
                *lock(&self.shared.days_rest_until) = Some(Instant::now() + DAYS_REST);
            }
        }
    }

    /// Ends what runs. Calls that come later fail.
    pub async fn close(&self) {
        self.shared.pool.close();
    }

    async fn connection(&self) -> Result<Lent, StoreError> {
        Ok(Lent::of(self.shared.pool.get().await?))
    }

    /// Waits for a turn to ask.
    async fn turn(&self, deadline: Instant) -> Result<OwnedSemaphorePermit, StoreError> {
        let _waiting =
            self.shared.waiting.try_acquire().map_err(|_| {
                StoreError::Unavailable(format!("{WAITING_MAX} questions wait for their turn"))
            })?;
        let turn = self.shared.turns.clone().acquire_owned();
        let turn = tokio::time::timeout_at(deadline.into(), turn).await;
        let turn = turn
            .map_err(|_| StoreError::Unavailable("its turn did not come in time; others are asked".into()))?;
        turn.map_err(|_| StoreError::Closed)
    }

    /// Asks one moment of the store, in a thread that may wait.
    async fn ask<T: Send + 'static>(
        &self,
        what: &'static str,
        of: &TenantScope,
        ask: impl FnOnce(&mut PgScan<'_>, &Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let deadline = Instant::now() + self.shared.settings.deadline;
        let turn = self.turn(deadline).await?;
        // Whoever drops this waits no more.
        let (waiting, gone) = waiting();
        let (shared, of, handle) = (self.shared.clone(), of.clone(), Handle::current());
        let run = move || {
            let _turn = turn;
            shared.ask(what, &handle, of, Patience::new(deadline, gone), ask)
        };
        let answer = tokio::task::spawn_blocking(run).await;
        drop(waiting);
        answer.map_err(|_| StoreError::Unavailable("it panicked".into()))?
    }

    async fn ask_scope<T: Send + 'static>(
        &self,
        what: &'static str,
        scope: &Scope,
        ask: impl FnOnce(&mut PgScan<'_>, &Scope, &Limits) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        scope.check()?;
        let scope = scope.clone();
        self.ask(what, &scope.of.clone(), move |scan, shared| ask(scan, &scope, &shared.settings.limits))
            .await
    }

    /// Keeps a batch, or none of it.
    async fn append_once(&self, batch: &[Event], known: &mut Known) -> Result<Vec<Appended>, StoreError> {
        let shared = &self.shared;
        let (events, keys) = (batch.to_vec(), shared.keys);
        let rows = tokio::task::spawn_blocking(move || write::rows_of(&events, keys)).await;
        let mut rows = rows.map_err(|_| StoreError::Unavailable("reading the events panicked".into()))?;
        // What was noted by who was dropped in the middle was not committed.
        known.ended(false);
        let mut connection = self.connection().await?;
        let done = async {
            self.make_days(&mut connection, &write::days_of(&rows)).await;
            let transaction = connection.transaction().await?;
            schema::lock(&transaction).await?;
            let _asked = shared.slow.watch("append");
            let sites_max = shared.settings.sites_max;
            let without_source = write::bound_sites(&transaction, batch, &mut rows, sites_max).await?;
            let kept = write::append(&transaction, batch, &rows, shared.settings.window).await?;
            let mut refused = Refused::default();
            for (tenant, events) in &kept.new {
                let facts = FactTables::new(&transaction, tenant, shared);
                refused.add(facts.note(events, known).await?);
            }
            transaction.commit().await?;
            Ok((kept.verdicts, refused, without_source))
        };
        let (verdicts, refused, without_source) = give_back(done.await, connection)?;
        let new = verdicts.iter().filter(|verdict| **verdict == Appended::New).count();
        shared.counters.appended.fetch_add(new as u64, Ordering::Relaxed);
        shared.counters.refused(refused);
        shared.counters.sources_refused.fetch_add(without_source, Ordering::Relaxed);
        Ok(verdicts)
    }

    /// Makes the partitions of days that many of a batch's events are of. What cannot be made
    /// soon, as somebody reads all there is, is not tried again for a while: events have their
    /// place without.
    async fn make_days(&self, connection: &mut Object, days: &HashMap<i64, usize>) {
        if lock(&self.shared.days_rest_until).is_some_and(|until| Instant::now() < until) {
            return;
        }
        let today = now_ms().div_euclid(DAY_MS);
        let is_due = |(day, count): &(&i64, &usize)| {
            **count >= ROWS_OF_A_DAY && (today - DAYS_BACK..=today).contains(*day)
        };
        let known = lock(&self.shared.days).clone();
        let due: Vec<i64> =
            days.iter().filter(is_due).map(|(day, _)| *day).filter(|day| !known.contains(day)).collect();
        if due.is_empty() || self.shared.opened.timescaledb.is_some() {
            return;
        }
        self.made_days(schema::make_soon(connection, &due, &self.shared.slow).await);
    }

    /// What is in the store, and what happened since it was opened.
    pub async fn stats(&self) -> Result<Stats, StoreError> {
        let connection = self.connection().await?;
        let stats = upkeep::stats(&connection, &self.shared).await;
        let (shared, status) = (&self.shared, self.shared.pool.status());
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Ok(Stats {
            server_version: shared.opened.server_version.clone(),
            timescaledb: shared.opened.timescaledb.clone(),
            connections: status.size as u64,
            idle_connections: status.available as u64,
            appended: count(&shared.counters.appended),
            links_refused: count(&shared.counters.links_refused),
            aliases_refused: count(&shared.counters.aliases_refused),
            traits_refused: count(&shared.counters.traits_refused),
            sources_refused: count(&shared.counters.sources_refused),
            slow: shared.slow.count(),
            ..give_back(stats, connection)?
        })
    }

    /// Makes the partitions of the days to come, moves into them what came for a day that had
    /// none, and drops those that have nothing from `kept_from_ms` on. What is left of events
    /// that are too old is for [`Store::retain`].
    pub async fn upkeep(&self, now_ms: i64, kept_from_ms: Option<i64>) -> Result<Upkept, StoreError> {
        let mut connection = self.connection().await?;
        let done = upkeep::upkeep(&mut connection, &self.shared, now_ms, kept_from_ms).await;
        let (upkept, days) = give_back(done, connection)?;
        *lock(&self.shared.days) = days;
        Ok(upkept)
    }

    /// The tenants that have events before a time.
    pub async fn tenants_before(&self, time_ms: i64) -> Result<Vec<String>, StoreError> {
        let connection = self.connection().await?;
        give_back(upkeep::tenants_before(&connection, time_ms).await, connection)
    }

    /// Reads all events, and compares what is summed up with them.
    pub async fn check(&self) -> Result<CheckReport, StoreError> {
        let mut connection = self.connection().await?;
        let done = upkeep::check(&mut connection, &self.shared).await;
        give_back(done, connection)
    }

    /// Writes what is wanted as lines: what was there when it began.
    pub async fn export(
        &self,
        wanted: &Wanted,
        out: impl Write + Send + 'static,
    ) -> Result<ExportReport, StoreError> {
        let mut connection = self.connection().await?;
        let done = upkeep::export(&mut connection, wanted, out, &self.shared.slow).await;
        give_back(done, connection)
    }

    /// Takes in what an export wrote: see [`lines::import`].
    pub async fn import(&self, lines: impl BufRead + Send + 'static) -> Result<ImportReport, StoreError> {
        lines::import(self, lines).await
    }
}

/// A connection that is used. Whoever is dropped with one may leave it in the middle of
/// something: it is closed then, and is given back by [`give_back`] alone.
struct Lent(Option<Object>);

impl Lent {
    fn of(connection: Object) -> Self {
        Self(Some(connection))
    }
}

impl Deref for Lent {
    type Target = Object;

    fn deref(&self) -> &Object {
        self.0.as_ref().expect("it is taken out by who has it as a whole")
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Object {
        self.0.as_mut().expect("it is taken out by who has it as a whole")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(Object::take(connection));
        }
    }
}

/// Gives a connection back; one that something went wrong with is closed, as nobody knows what
/// is wrong: the next goes to whoever is the server then.
fn give_back<T>(done: Result<T, StoreError>, mut connection: Lent) -> Result<T, StoreError> {
    let is_doubtful = |error: &StoreError| {
        matches!(error, StoreError::Unavailable(_) | StoreError::Damaged(_) | StoreError::TooExpensive(_))
    };
    if !done.as_ref().is_err_and(is_doubtful) {
        drop(connection.0.take());
    }
    done
}

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

impl Counters {
    fn refused(&self, refused: Refused) {
        self.links_refused.fetch_add(refused.links, Ordering::Relaxed);
        self.aliases_refused.fetch_add(refused.aliases, Ordering::Relaxed);
        self.traits_refused.fetch_add(refused.traits, Ordering::Relaxed);
    }
}

impl Shared {
    fn ask<T>(
        &self,
        what: &'static str,
        handle: &Handle,
        of: TenantScope,
        patience: Patience,
        ask: impl FnOnce(&mut PgScan<'_>, &Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut connection = Lent::of(handle.block_on(self.pool.get())?);
        let _asked = self.slow.watch(what);
        let answer = (|| {
            patience.check()?;
            let begun = patience.wait(handle, self.begin(&mut connection, &of.tenant, &patience));
            let (transaction, owners) = begun?;
            let (keys, secret) = (self.keys, self.secret);
            let handle = handle.clone();
            ask(&mut PgScan { handle, transaction: &transaction, of, owners, patience, keys, secret }, self)
        })();
        let answer = give_back(answer, connection);
        answer.map_err(|error| match error {
            StoreError::Unavailable(why) if why.ends_with(CANCELLED) => {
                StoreError::TooExpensive("it took too long; ask for a shorter range".into())
            }
            error => error,
        })
    }

    /// Begins to read one moment.
    async fn begin<'c>(
        &self,
        connection: &'c mut Object,
        tenant: &str,
        patience: &Patience,
    ) -> Result<(Transaction<'c>, Arc<OwnerMap>), StoreError> {
        let transaction =
            connection.build_transaction().isolation_level(IsolationLevel::RepeatableRead).read_only(true);
        let transaction = transaction.start().await?;
        transaction.batch_execute(&scan::bounds(self.settings.deadline)).await?;
        let owners = self.owners.get(&transaction, tenant, patience).await?;
        Ok((transaction, owners))
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn append(&self, batch: &[Event]) -> Result<Vec<Appended>, StoreError> {
        let mut known = self.shared.writing.lock().await;
        if self.shared.is_known_old.swap(false, Ordering::Relaxed) {
            known.clear();
        }
        for _ in 0..CONFLICTS_MAX {
            match self.append_once(batch, &mut known).await {
                Err(error) if error::is_conflict(&error) => known.clear(),
                done => {
                    known.ended(done.is_ok());
                    if matches!(done, Err(StoreError::Unavailable(_))) {
                        // Who answers next may be another server, that lost the last commits.
                        known.clear();
                        self.shared.owners.clear();
                    }
                    return done;
                }
            }
        }
        Err(StoreError::Unavailable("others who write were in the way".into()))
    }

    async fn as_of(&self, of: &TenantScope) -> Result<AsOf, StoreError> {
        let connection = self.connection().await?;
        let _asked = self.shared.slow.watch("as_of");
        give_back(upkeep::as_of(&connection, of).await, connection)
    }

    async fn counts(&self, scope: &Scope, bucket: Bucket, zone: &str) -> Result<Vec<CountPoint>, StoreError> {
        scope.check()?;
        let buckets = Buckets::new(&scope.range_ms, bucket, zone)?;
        self.ask_scope("counts", scope, move |scan, scope, limits| match scope.filters.is_empty() {
            true => scan.counts(scope, &buckets, limits),
            false => answer::counts(scan, scope, &buckets, limits),
        })
        .await
    }

    async fn summary(&self, scope: &Scope) -> Result<Summary, StoreError> {
        self.ask_scope("summary", scope, |scan, scope, limits| answer::summary(scan, scope, limits)).await
    }

    async fn series(&self, scope: &Scope, bucket: Bucket, zone: &str) -> Result<Vec<Point>, StoreError> {
        scope.check()?;
        let buckets = Buckets::new(&scope.range_ms, bucket, zone)?;
        self.ask_scope("series", scope, move |scan, scope, limits| {
            answer::series(scan, scope, &buckets, limits)
        })
        .await
    }

    async fn series_by_name(
        &self,
        scope: &Scope,
        bucket: Bucket,
        zone: &str,
    ) -> Result<Vec<NamedPoint>, StoreError> {
        scope.check()?;
        let buckets = Buckets::new(&scope.range_ms, bucket, zone)?;
        self.ask_scope("series_by_name", scope, move |scan, scope, limits| {
            answer::series_by_name(scan, scope, &buckets, limits)
        })
        .await
    }

    async fn breakdown(
        &self,
        scope: &Scope,
        by: &Field,
        limit: usize,
    ) -> Result<Breakdown<ValueRow>, StoreError> {
        let by = by.clone();
        self.ask_scope("breakdown", scope, move |scan, scope, limits| {
            answer::breakdown(scan, scope, &by, limit, limits)
        })
        .await
    }

    async fn properties(&self, scope: &Scope, limit: usize) -> Result<Breakdown<PropertyRow>, StoreError> {
        self.ask_scope("properties", scope, move |scan, scope, limits| {
            names::properties(scan, scope, limit, limits)
        })
        .await
    }

    async fn sessions_by(
        &self,
        scope: &Scope,
        by: &Field,
        limit: usize,
    ) -> Result<Breakdown<SessionRow>, StoreError> {
        let by = by.clone();
        self.ask_scope("sessions_by", scope, move |scan, scope, limits| {
            answer::sessions_by(scan, scope, &by, limit, limits)
        })
        .await
    }

    async fn pages(&self, scope: &Scope, limit: usize) -> Result<Breakdown<PageRow>, StoreError> {
        self.ask_scope("pages", scope, move |scan, scope, limits| answer::pages(scan, scope, limit, limits))
            .await
    }

    async fn funnel(&self, scope: &Scope, funnel: &Funnel) -> Result<FunnelAnswer, StoreError> {
        let funnel = funnel.clone();
        self.ask_scope("funnel", scope, move |scan, scope, limits| {
            funnels::answer(scan, scope, &funnel, limits)
        })
        .await
    }

    async fn realtime(&self, scope: &Scope, now_ms: i64) -> Result<Realtime, StoreError> {
        self.ask_scope("realtime", scope, move |scan, scope, limits| {
            answer::realtime(scan, scope, now_ms, limits)
        })
        .await
    }

    async fn new_visitors(&self, scope: &Scope) -> Result<NewVisitors, StoreError> {
        self.ask_scope("new_visitors", scope, |scan, scope, limits| answer::new_visitors(scan, scope, limits))
            .await
    }

    async fn recent(
        &self,
        scope: &Scope,
        who: Option<&Subject>,
        limit: usize,
    ) -> Result<Vec<Event>, StoreError> {
        let (who, keys) = (who.cloned(), self.shared.keys);
        self.ask_scope("recent", scope, move |scan, scope, _| {
            answer::recent(scan, scope, who.as_ref(), limit, keys)
        })
        .await
    }

    async fn identity(&self, of: &TenantScope, who: &Subject) -> Result<Option<Identity>, StoreError> {
        of.whole()?;
        let who = who.clone();
        self.ask("identity", of, move |scan, shared| {
            let known = scan.handle.block_on(async {
                FactTables::new(scan.transaction, &scan.of.tenant, shared).identity(&who).await
            })?;
            lone::with_times(scan, known, &who, shared.keys)
        })
        .await
    }

    async fn identity_log(
        &self,
        of: &TenantScope,
        who: &Subject,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        answer::check_limit(limit)?;
        of.whole()?;
        let who = who.clone();
        self.ask("identity_log", of, move |scan, shared| {
            scan.handle.block_on(async {
                FactTables::new(scan.transaction, &scan.of.tenant, shared).identity_log(&who, limit).await
            })
        })
        .await
    }

    async fn link(
        &self,
        of: &TenantScope,
        from: &str,
        user: &str,
        joined: bool,
        by: &Operator,
    ) -> Result<(), StoreError> {
        let tenant = of.whole()?;
        let _writing = self.shared.writing.lock().await;
        let mut connection = self.connection().await?;
        let done = async {
            let transaction = connection.transaction().await?;
            schema::lock(&transaction).await?;
            let _asked = self.shared.slow.watch("link");
            FactTables::new(&transaction, tenant, &self.shared).link(from, user, joined, by).await?;
            Ok(transaction.commit().await?)
        };
        give_back(done.await, connection)
    }

    async fn know(&self, facts: &[KnownFact]) -> Result<u64, StoreError> {
        let mut known = self.shared.writing.lock().await;
        let mut by_tenant: BTreeMap<&str, Vec<&KnownFact>> = BTreeMap::new();
        let (keepable, unstorable): (Vec<_>, Vec<_>) =
            facts.iter().partition(|fact| facts::is_keepable(fact));
        keepable.into_iter().for_each(|fact| by_tenant.entry(&fact.tenant).or_default().push(fact));
        let mut connection = self.connection().await?;
        let done = async {
            let transaction = connection.transaction().await?;
            schema::lock(&transaction).await?;
            let _asked = self.shared.slow.watch("know");
            let mut refused = Refused::default();
            for (tenant, facts) in by_tenant {
                refused.add(FactTables::new(&transaction, tenant, &self.shared).know(&facts).await?);
            }
            transaction.commit().await?;
            Ok(refused)
        };
        let refused = give_back(done.await, connection)?;
        self.shared.counters.refused(refused);
        // What gave way is not known any more.
        known.clear();
        if !unstorable.is_empty() {
            let facts = unstorable.len();
            tracing::warn!(facts, "facts about who is who are not kept: an id in them is too long for a key");
        }
        Ok(unstorable.len() as u64)
    }

    async fn erase(&self, of: &TenantScope, who: &Subject) -> Result<Deleted, StoreError> {
        let tenant = of.whole()?;
        let mut known = self.shared.writing.lock().await;
        let mut connection = self.connection().await?;
        let done = upkeep::erase(&mut connection, tenant, who, &self.shared).await;
        known.clear();
        give_back(done, connection)
    }

    async fn retain(&self, of: &TenantScope, from_ms: i64) -> Result<Deleted, StoreError> {
        let tenant = of.whole()?;
        let (mut deleted, mut behind) = (Deleted::default(), Behind::default());
        loop {
            // Others write in between.
            let _writing = self.shared.writing.lock().await;
            let mut connection = self.connection().await?;
            let done = upkeep::retain(&mut connection, tenant, from_ms, &self.shared, &mut behind).await;
            let (events, is_last) = give_back(done, connection)?;
            deleted.events += events;
            if is_last {
                return Ok(deleted);
            }
        }
    }
}
