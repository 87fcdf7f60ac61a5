//! The embedded store: one SQLite file, in which events stand as blocks of columns that
//! are scanned here. SQLite keeps pages whole, and nothing else is left to it.
//!
//! ```text
//! append ─► writer ─► hot, seen, facts: one transaction ─► acknowledged
//!             │ tables of 32k rows, in memory as they came
//!             ▼
//!          sealer: encodes, off the transaction ─► writer: block, col; hot rows go
//!
//! question ─► reader ─► snapshot: blocks of the file, tables in memory ─► fold ─► answer
//! ```
//!
//! | file | what it holds |
//! |---|---|
//! | `schema` | the tables, opening, setting aside what is damaged |
//! | `writer` | the one that writes: batches, blocks |
//! | `hot` | what came lately, and the door at which readers and the writer meet |
//! | `memo` | what questions have found out about blocks |
//! | `late`, `sought` | whether an event that is remembered no more is in a block |
//! | `facts`, `identity_log` | who is who, and why |
//! | `codec` | the bytes of a column |
//! | `block` | a block of the file, and how a column of it is read |
//! | `chunk`, `snapshot` | what questions, which stand in `scan`, read |
//! | `upkeep`, `facts_file` | erasing, retention, merging, checking, backup, export, import |

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc as threads,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use analytics_relay_providers::Event;
use async_trait::async_trait;
use rusqlite::Connection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::{
    Appended, AsOf, Breakdown, Bucket, CountPoint, Deleted, Field, Funnel, FunnelAnswer, Identity, Limits,
    LogEntry, NamedPoint, NewVisitors, Operator, PageRow, Point, PropertyRow, Realtime, Scope, SessionRow,
    Store, StoreError, Subject, Summary, TenantScope, ValueRow,
    model::{Buckets, FactLimits, Keys, KnownFact},
    scan::{
        answer, funnels, lone, names,
        owners::OwnerCache,
        seam::{Patience, waiting},
    },
};

mod block;
mod chunk;
mod codec;
mod facts;
mod facts_file;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod hot;
mod identity_log;
mod late;
mod memo;
mod schema;
mod snapshot;
mod sought;
mod upkeep;
mod writer;

#[cfg(test)]
mod tests;

use block::BlockMeta;
use facts::FactTables;
use hot::Closed;
use memo::Memo;
use snapshot::{Env, Snapshot};
use writer::Writer;

pub use schema::is_in_use;
pub use upkeep::{CheckReport, backup, check, export, look, unfinished};

pub use crate::lines::{ExportReport, ImportReport, Wanted};

/// Batches that wait for the writer.
const JOBS_MAX: usize = 2;
/// Questions that wait for their turn; more are refused.
const WAITING_MAX: usize = 64;
/// Tables that wait for the sealer: more are handed over when it is done with one.
const SEALS_MAX: usize = 1;

/// How the store is kept.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The file; beside it stand its log, its lock and those that were set aside.
    pub path: PathBuf,
    /// Rows of a block.
    pub block_rows: usize,
    /// Bytes of memory at which events become a block, however few they are.
    pub block_bytes: usize,
    /// Rows that wait in memory to become blocks, over all sites.
    pub hot_rows_max: usize,
    /// Bytes of memory that they may take.
    pub hot_bytes_max: usize,
    /// Websites and apps of a tenant. Events of more that their callers name, and no key, are
    /// kept as such that name none.
    pub sites_max: usize,
    /// How much is noted of who is who.
    pub fact_limits: FactLimits,
    /// So many of the last events are known again by their ids alone, whatever their times.
    pub window: usize,
    /// Questions that are answered at once; one that is alone uses two threads.
    pub readers: usize,
    /// A question that takes longer is given up.
    pub deadline: Duration,
    /// What an answer may take.
    pub limits: Limits,
}

impl Settings {
    /// The defaults, for a file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            block_rows: 32_768,
            block_bytes: 16 << 20,
            hot_rows_max: 200_000,
            hot_bytes_max: 64 << 20,
            sites_max: 1_000,
            fact_limits: FactLimits::default(),
            window: 1_000_000,
            readers: 2,
            deadline: Duration::from_secs(5),
            limits: Limits::default(),
        }
    }
}

/// What happened since the store was opened.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    appended: AtomicU64,
    sealed: AtomicU64,
    seals_failed: AtomicU64,
    merged: AtomicU64,
    damaged_reads: AtomicU64,
    damaged_batches: AtomicU64,
    links_refused: AtomicU64,
    aliases_refused: AtomicU64,
    traits_refused: AtomicU64,
    sources_refused: AtomicU64,
    /// Blocks that could not be read: what they had may come again.
    lost: Mutex<BTreeMap<i64, BlockMeta>>,
}

impl Counters {
    /// Notes that a block cannot be read.
    fn lost(&self, meta: &BlockMeta) {
        self.damaged_reads.fetch_add(1, Ordering::Relaxed);
        lock(&self.lost).insert(meta.id, meta.clone());
    }

    fn refused(&self, refused: facts::Refused) {
        self.links_refused.fetch_add(refused.links, Ordering::Relaxed);
        self.aliases_refused.fetch_add(refused.aliases, Ordering::Relaxed);
        self.traits_refused.fetch_add(refused.traits, Ordering::Relaxed);
    }
}

/// What is in the store, and what happened since it was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Events.
    pub events: u64,
    /// Of those, not in blocks yet.
    pub hot_events: u64,
    /// Blocks.
    pub blocks: u64,
    /// Websites and apps.
    pub sites: u64,
    /// Bytes of the file, without its log.
    pub file_bytes: u64,
    /// Of those, free: they are used again before the file grows.
    pub free_bytes: u64,
    /// Bytes of memory that events take which are not in blocks yet.
    pub hot_bytes: u64,
    /// The time of the earliest event.
    pub first_ms: Option<i64>,
    /// The time of the latest.
    pub last_ms: Option<i64>,
    /// Events that were kept since the store was opened.
    pub appended: u64,
    /// Blocks that were written.
    pub sealed: u64,
    /// Blocks that could not be written, for now.
    pub seals_failed: u64,
    /// Small blocks that were merged into others.
    pub merged: u64,
    /// Times that a block could not be read for a question.
    pub damaged_reads: u64,
    /// Batches that could not be read when the store was opened.
    pub damaged_batches: u64,
    /// Links of devices and users that were not noted: one had too many.
    pub links_refused: u64,
    /// Aliases that were not noted: too many ids would have been one.
    pub aliases_refused: u64,
    /// Keys of traits that were not kept: somebody had too much of them.
    pub traits_refused: u64,
    /// Events whose source was not kept: the tenant had too many.
    pub sources_refused: u64,
}

type Job = Box<dyn FnOnce(&mut Writer) + Send>;

/// The embedded store. A clone is the same store.
#[derive(Clone)]
pub struct SqliteStore {
    shared: Arc<Shared>,
}

struct Shared {
    settings: Settings,
    door: Arc<hot::Door>,
    owners: OwnerCache,
    counters: Arc<Counters>,
    memo: Arc<Memo>,
    keys: Keys,
    readers: Mutex<Vec<Connection>>,
    turns: Arc<Semaphore>,
    waiting: Semaphore,
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    set_aside: Option<PathBuf>,
}

impl std::fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqliteStore").field("path", &self.shared.settings.path).finish_non_exhaustive()
    }
}

impl SqliteStore {
    /// Opens the store, or makes it; reads what is no block yet, which is up to four times
    /// [`Settings::hot_rows_max`] events and takes about ten microseconds each, and who is who.
    /// Blocks the thread meanwhile. A file that cannot be read is set aside, and an empty one
    /// begun; of one of which only who is who cannot be, that alone begins anew.
    pub fn open(settings: Settings) -> Result<Self, StoreError> {
        let counters = Arc::new(Counters::default());
        let (sealer, closed) = threads::sync_channel(SEALS_MAX);
        let (writer, set_aside) = writer::open(&settings, counters.clone(), sealer)?;
        // Before any thread has the file: what fails here leaves it at once.
        let readers = settings.readers.max(1);
        let connections =
            (0..=readers).map(|_| schema::open_reader(&settings.path)).collect::<Result<_, _>>()?;
        let (door, keys) = (writer.door.clone(), writer.keys);
        let (jobs, queue) = mpsc::channel(JOBS_MAX);
        let weak = jobs.downgrade();
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into());
            thread.spawn(run).map_err(|error| StoreError::Unavailable(format!("no thread: {error}")))
        };
        let handles = vec![
            spawn("store-writer", Box::new(move || write(writer, queue)))?,
            spawn("store-sealer", {
                let door = door.clone();
                Box::new(move || seal(&closed, &door, &weak))
            })?,
        ];
        Ok(Self {
            shared: Arc::new(Shared {
                settings,
                door,
                owners: OwnerCache::default(),
                counters,
                memo: Arc::default(),
                keys,
                readers: Mutex::new(connections),
                turns: Arc::new(Semaphore::new(readers)),
                waiting: Semaphore::new(WAITING_MAX),
                jobs: Mutex::new(Some(jobs)),
                threads: Mutex::new(handles),
                set_aside,
            }),
        })
    }

    /// Where a file went that could not be read when the store was opened.
    pub fn set_aside(&self) -> Option<&Path> {
        self.shared.set_aside.as_deref()
    }

    /// Ends what runs, and waits for it. Calls that come later fail.
    pub async fn close(&self) {
        drop(lock(&self.shared.jobs).take());
        // The last connection that is closed cuts the log.
        lock(&self.shared.readers).clear();
        let threads = std::mem::take(&mut *lock(&self.shared.threads));
        let ended =
            tokio::task::spawn_blocking(move || threads.into_iter().all(|thread| thread.join().is_ok()));
        if !ended.await.unwrap_or(false) {
            tracing::error!("a thread of the store panicked");
        }
        // Who asks gives its connections back; none goes on for longer than its deadline, but for
        // what an operator has begun.
        let all = u32::try_from(self.shared.settings.readers.max(1)).unwrap_or(u32::MAX);
        let _turns =
            tokio::time::timeout(self.shared.settings.deadline, self.shared.turns.acquire_many(all)).await;
        lock(&self.shared.readers).clear();
    }

    /// Does something that writes, on the writer's thread.
    async fn write<T: Send + 'static>(
        &self,
        write: impl FnOnce(&mut Writer) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |writer| {
            // Whoever asked may have gone.
            let _ = reply.send(writer.attempt(write));
        });
        let jobs = lock(&self.shared.jobs).clone().ok_or(StoreError::Closed)?;
        jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Unavailable("it panicked".into()))?
    }

    /// Deletes events, and forgets what is remembered of them.
    async fn delete(
        &self,
        delete: impl FnOnce(&mut Writer) -> Result<Deleted, StoreError> + Send + 'static,
    ) -> Result<Deleted, StoreError> {
        let memo = self.shared.memo.clone();
        self.write(move |writer| {
            let deleted = delete(writer)?;
            if deleted.blocks > 0 {
                memo.forget();
            }
            Ok(deleted)
        })
        .await
    }

    /// Waits for a turn to read, until a deadline if there is one.
    async fn turn(&self, deadline: Option<Instant>) -> Result<OwnedSemaphorePermit, StoreError> {
        let turn = self.shared.turns.clone().acquire_owned();
        let turn = match deadline {
            None => turn.await,
            Some(deadline) => {
                let waiting = self.shared.waiting.try_acquire();
                let _waiting = waiting.map_err(|_| {
                    StoreError::Unavailable(format!("{WAITING_MAX} questions wait for their turn"))
                })?;
                tokio::time::timeout_at(deadline.into(), turn).await.map_err(|_| {
                    StoreError::Unavailable("its turn did not come in time; others are asked".into())
                })?
            }
        };
        turn.map_err(|_| StoreError::Closed)
    }

    /// Does something that reads, off the asynchronous threads.
    async fn read<T: Send + 'static>(
        &self,
        deadline: Option<Instant>,
        read: impl FnOnce(&Shared, &mut Readers) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let turn = self.turn(deadline).await?;
        // One that is alone may use two threads.
        let second = self.shared.turns.clone().try_acquire_owned().ok();
        let shared = self.shared.clone();
        let run = move || {
            let mut readers = Readers::take(&shared, turn, second)?;
            let answer = read(&shared, &mut readers);
            readers.give_back(&shared);
            answer
        };
        tokio::task::spawn_blocking(run).await.map_err(|_| StoreError::Unavailable("it panicked".into()))?
    }

    /// Asks a snapshot.
    async fn ask<T: Send + 'static>(
        &self,
        of: &TenantScope,
        ask: impl FnOnce(&mut Snapshot<'_>, &Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let of = of.clone();
        let deadline = Instant::now() + self.shared.settings.deadline;
        // Whoever drops this waits no more.
        let (waiting, gone) = waiting();
        let answer = self.read(Some(deadline), move |shared, readers| {
            let patience = Patience::new(deadline, gone);
            let Shared { door, owners, counters, memo, .. } = shared;
            let env = Env { door, owners, counters, memo, patience };
            let Readers { first, second, .. } = readers;
            snapshot::with_snapshot(first, second.as_mut(), &of, &env, |snapshot| ask(snapshot, shared))
        });
        let answer = answer.await;
        drop(waiting);
        answer
    }

    async fn ask_scope<T: Send + 'static>(
        &self,
        scope: &Scope,
        ask: impl Fn(&mut Snapshot<'_>, &Scope, &Limits) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        scope.check()?;
        let scope = scope.clone();
        self.ask(&scope.of.clone(), move |snapshot, shared| {
            snapshot.without_damage(|snapshot| ask(snapshot, &scope, &shared.settings.limits))
        })
        .await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Connections of one question.
struct Readers {
    first: Connection,
    second: Option<Connection>,
    _turns: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
}

impl Readers {
    fn take(
        shared: &Shared,
        turn: OwnedSemaphorePermit,
        second_turn: Option<OwnedSemaphorePermit>,
    ) -> Result<Self, StoreError> {
        let (first, second) = {
            let mut readers = lock(&shared.readers);
            (readers.pop(), second_turn.as_ref().and_then(|_| readers.pop()))
        };
        if lock(&shared.jobs).is_none() {
            return Err(StoreError::Closed);
        }
        // One that was lost with a question that panicked is opened anew.
        let first = first.map_or_else(|| schema::open_reader(&shared.settings.path), Ok)?;
        Ok(Self { first, second, _turns: (turn, second_turn) })
    }

    fn give_back(self, shared: &Shared) {
        let mut readers = lock(&shared.readers);
        readers.push(self.first);
        readers.extend(self.second);
    }
}

/// The writer's thread.
fn write(mut writer: Writer, mut jobs: mpsc::Receiver<Job>) {
    while let Some(job) = jobs.blocking_recv() {
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(&mut writer)));
        if done.is_err() {
            writer.doubt();
            tracing::error!("a write to the store panicked; what is in memory is read again");
        }
    }
}

/// The sealer's thread: makes blocks of tables. What it was given and is not there any more
/// it leaves alone.
fn seal(closed: &threads::Receiver<Closed>, door: &hot::Door, jobs: &mpsc::WeakSender<Job>) {
    while let Ok(closed) = closed.recv() {
        let is_there = door.read().has(&closed);
        let encode = || is_there.then(|| codec::encode(&closed.table.table)).transpose();
        let made = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(encode)) {
            Ok(made) => made.map_err(StoreError::from),
            Err(_) => Err(StoreError::Unavailable("making a block panicked".into())),
        };
        let Some(jobs) = jobs.upgrade() else { return };
        let job: Job = Box::new(move |writer| writer.take_block(&closed, made));
        if jobs.blocking_send(job).is_err() {
            return;
        }
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn append(&self, batch: &[Event]) -> Result<Vec<Appended>, StoreError> {
        let batch = batch.to_vec();
        self.write(move |writer| writer.append(&batch)).await
    }

    async fn as_of(&self, of: &TenantScope) -> Result<AsOf, StoreError> {
        self.ask(of, |snapshot, _| Ok(snapshot.as_of())).await
    }

    async fn counts(&self, scope: &Scope, bucket: Bucket, zone: &str) -> Result<Vec<CountPoint>, StoreError> {
        scope.check()?;
        let buckets = Buckets::new(&scope.range_ms, bucket, zone)?;
        self.ask_scope(scope, move |snapshot, scope, limits| {
            answer::counts(snapshot, scope, &buckets, limits)
        })
        .await
    }

    async fn summary(&self, scope: &Scope) -> Result<Summary, StoreError> {
        self.ask_scope(scope, |snapshot, scope, limits| answer::summary(snapshot, scope, limits)).await
    }

    async fn series(&self, scope: &Scope, bucket: Bucket, zone: &str) -> Result<Vec<Point>, StoreError> {
        scope.check()?;
        let buckets = Buckets::new(&scope.range_ms, bucket, zone)?;
        self.ask_scope(scope, move |snapshot, scope, limits| {
            answer::series(snapshot, scope, &buckets, limits)
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
        let ask = move |snapshot: &mut Snapshot<'_>, scope: &Scope, limits: &Limits| {
            answer::series_by_name(snapshot, scope, &buckets, limits)
        };
        self.ask_scope(scope, ask).await
    }

    async fn breakdown(
        &self,
        scope: &Scope,
        by: &Field,
        limit: usize,
    ) -> Result<Breakdown<ValueRow>, StoreError> {
        let by = by.clone();
        self.ask_scope(scope, move |snapshot, scope, limits| {
            answer::breakdown(snapshot, scope, &by, limit, limits)
        })
        .await
    }

    async fn properties(&self, scope: &Scope, limit: usize) -> Result<Breakdown<PropertyRow>, StoreError> {
        self.ask_scope(scope, move |snapshot, scope, limits| {
            names::properties(snapshot, scope, limit, limits)
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
        let ask = move |snapshot: &mut Snapshot<'_>, scope: &Scope, limits: &Limits| {
            answer::sessions_by(snapshot, scope, &by, limit, limits)
        };
        self.ask_scope(scope, ask).await
    }

    async fn pages(&self, scope: &Scope, limit: usize) -> Result<Breakdown<PageRow>, StoreError> {
        self.ask_scope(scope, move |snapshot, scope, limits| answer::pages(snapshot, scope, limit, limits))
            .await
    }

    async fn funnel(&self, scope: &Scope, funnel: &Funnel) -> Result<FunnelAnswer, StoreError> {
        let funnel = funnel.clone();
        self.ask_scope(scope, move |snapshot, scope, limits| {
            funnels::answer(snapshot, scope, &funnel, limits)
        })
        .await
    }

    async fn realtime(&self, scope: &Scope, now_ms: i64) -> Result<Realtime, StoreError> {
        self.ask_scope(scope, move |snapshot, scope, limits| {
            answer::realtime(snapshot, scope, now_ms, limits)
        })
        .await
    }

    async fn new_visitors(&self, scope: &Scope) -> Result<NewVisitors, StoreError> {
        self.ask_scope(scope, |snapshot, scope, limits| answer::new_visitors(snapshot, scope, limits)).await
    }

    async fn recent(
        &self,
        scope: &Scope,
        who: Option<&Subject>,
        limit: usize,
    ) -> Result<Vec<Event>, StoreError> {
        let (who, keys) = (who.cloned(), self.shared.keys);
        self.ask_scope(scope, move |snapshot, scope, _| {
            answer::recent(snapshot, scope, who.as_ref(), limit, keys)
        })
        .await
    }

    async fn identity(&self, of: &TenantScope, who: &Subject) -> Result<Option<Identity>, StoreError> {
        of.whole()?;
        let who = who.clone();
        self.ask(of, move |snapshot, shared| {
            let Some(facts) = snapshot.facts(shared.keys) else { return Ok(None) };
            let known = facts.identity(&who)?;
            snapshot.without_damage(|snapshot| lone::with_times(snapshot, known.clone(), &who, shared.keys))
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
        self.ask(of, move |snapshot, shared| match snapshot.facts(shared.keys) {
            Some(facts) => facts.identity_log(&who, limit),
            None => Ok(Vec::new()),
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
        let (tenant, from, user, by) = (of.whole()?.to_owned(), from.to_owned(), user.to_owned(), by.clone());
        self.write(move |writer| {
            let (tenant, keys) = (writer.tenant_or_new(&tenant)?, writer.keys);
            let limits = writer.settings.fact_limits;
            let (transaction, n) = writer.begin()?;
            let tables = FactTables { connection: &transaction, tenant, keys, limits, n };
            tables.link(&from, &user, joined, &by)?;
            Ok(transaction.commit()?)
        })
        .await
    }

    async fn know(&self, facts: &[KnownFact]) -> Result<u64, StoreError> {
        let facts = facts.to_vec();
        self.write(move |writer| upkeep::know(writer, &facts)).await.map(|()| 0)
    }

    async fn erase(&self, of: &TenantScope, who: &Subject) -> Result<Deleted, StoreError> {
        let (tenant, who) = (of.whole()?.to_owned(), who.clone());
        self.delete(move |writer| upkeep::erase(writer, &tenant, &who)).await
    }

    async fn retain(&self, of: &TenantScope, from_ms: i64) -> Result<Deleted, StoreError> {
        let tenant = of.whole()?.to_owned();
        self.delete(move |writer| upkeep::retain(writer, &tenant, from_ms)).await
    }
}
