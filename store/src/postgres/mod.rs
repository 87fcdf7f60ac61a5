//! The store on a PostgreSQL server, with TimescaleDB or without.

use std::{
    io::{BufRead, Write},
    sync::Arc,
    time::Duration,
};

use analytics_relay_providers::Event;
use async_trait::async_trait;
use deadpool_postgres::Pool;

use crate::{
    Appended, AsOf, Breakdown, Bucket, CountPoint, Deleted, Field, Funnel, FunnelAnswer, Identity, Limits,
    LogEntry, NamedPoint, NewVisitors, Operator, PageRow, Point, PropertyRow, Realtime, Scope, SessionRow,
    Store, StoreError, Subject, Summary, TenantScope, ValueRow,
    lines::{self, ExportReport, ImportReport, Wanted},
    model::KnownFact,
};

mod connect;
mod error;
mod tls;

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
    /// So many of the last events are known again by their ids alone, whatever their times.
    pub window: usize,
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
            window: 1_000_000,
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
            .field("window", &self.window)
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
    /// Days that have a partition.
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
    /// Statements that took over half a second.
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
        drop(pool.get().await?);
        Ok(Self { shared: Arc::new(Shared { settings, pool }) })
    }

    /// Ends what runs. Calls that come later fail.
    pub async fn close(&self) {
        self.shared.pool.close();
    }

    /// What is in the store, and what happened since it was opened.
    pub async fn stats(&self) -> Result<Stats, StoreError> {
        Err(StoreError::Closed)
    }

    /// Makes the partitions of the days to come, moves into them what came for a day that had
    /// none, and drops those that have nothing from `kept_from_ms` on.
    pub async fn upkeep(&self, _now_ms: i64, _kept_from_ms: Option<i64>) -> Result<Upkept, StoreError> {
        Err(StoreError::Closed)
    }

    /// Reads all events, and compares what is summed up with them.
    pub async fn check(&self) -> Result<CheckReport, StoreError> {
        Err(StoreError::Closed)
    }

    /// Writes what is wanted as lines: what was there when it began.
    pub async fn export(
        &self,
        _wanted: &Wanted,
        _out: impl Write + Send + 'static,
    ) -> Result<ExportReport, StoreError> {
        Err(StoreError::Closed)
    }

    /// Takes in what an export wrote: see [`lines::import`].
    pub async fn import(&self, lines: impl BufRead + Send + 'static) -> Result<ImportReport, StoreError> {
        lines::import(self, lines).await
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn append(&self, _batch: &[Event]) -> Result<Vec<Appended>, StoreError> {
        Err(StoreError::Closed)
    }

    async fn as_of(&self, _of: &TenantScope) -> Result<AsOf, StoreError> {
        Err(StoreError::Closed)
    }

    async fn counts(
        &self,
        _scope: &Scope,
        _bucket: Bucket,
        _zone: &str,
    ) -> Result<Vec<CountPoint>, StoreError> {
        Err(StoreError::Closed)
    }

    async fn summary(&self, _scope: &Scope) -> Result<Summary, StoreError> {
        Err(StoreError::Closed)
    }

    async fn series(&self, _scope: &Scope, _bucket: Bucket, _zone: &str) -> Result<Vec<Point>, StoreError> {
        Err(StoreError::Closed)
    }

    async fn series_by_name(
        &self,
        _scope: &Scope,
        _bucket: Bucket,
        _zone: &str,
    ) -> Result<Vec<NamedPoint>, StoreError> {
        Err(StoreError::Closed)
    }

    async fn breakdown(
        &self,
        _scope: &Scope,
        _by: &Field,
        _limit: usize,
    ) -> Result<Breakdown<ValueRow>, StoreError> {
        Err(StoreError::Closed)
    }

    async fn properties(&self, _scope: &Scope, _limit: usize) -> Result<Breakdown<PropertyRow>, StoreError> {
        Err(StoreError::Closed)
    }

    async fn sessions_by(
        &self,
        _scope: &Scope,
        _by: &Field,
        _limit: usize,
    ) -> Result<Breakdown<SessionRow>, StoreError> {
        Err(StoreError::Closed)
    }

    async fn pages(&self, _scope: &Scope, _limit: usize) -> Result<Breakdown<PageRow>, StoreError> {
        Err(StoreError::Closed)
    }

    async fn funnel(&self, _scope: &Scope, _funnel: &Funnel) -> Result<FunnelAnswer, StoreError> {
        Err(StoreError::Closed)
    }

    async fn realtime(&self, _scope: &Scope, _now_ms: i64) -> Result<Realtime, StoreError> {
        Err(StoreError::Closed)
    }

    async fn new_visitors(&self, _scope: &Scope) -> Result<NewVisitors, StoreError> {
        Err(StoreError::Closed)
    }

    async fn recent(
        &self,
        _scope: &Scope,
        _who: Option<&Subject>,
        _limit: usize,
    ) -> Result<Vec<Event>, StoreError> {
        Err(StoreError::Closed)
    }

    async fn identity(&self, _of: &TenantScope, _who: &Subject) -> Result<Option<Identity>, StoreError> {
        Err(StoreError::Closed)
    }

    async fn identity_log(
        &self,
        _of: &TenantScope,
        _who: &Subject,
        _limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        Err(StoreError::Closed)
    }

    async fn link(
        &self,
        _of: &TenantScope,
        _from: &str,
        _user: &str,
        _joined: bool,
        _by: &Operator,
    ) -> Result<(), StoreError> {
        Err(StoreError::Closed)
    }

    async fn know(&self, _facts: &[KnownFact]) -> Result<(), StoreError> {
        Err(StoreError::Closed)
    }

    async fn erase(&self, _of: &TenantScope, _who: &Subject) -> Result<Deleted, StoreError> {
        Err(StoreError::Closed)
    }

    async fn retain(&self, _of: &TenantScope, _from_ms: i64) -> Result<Deleted, StoreError> {
        Err(StoreError::Closed)
    }
}
