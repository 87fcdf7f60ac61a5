//! The store as the rest of the relay has it: it may not be open yet, hides what is older
//! than its retention, and has its times measured.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use analytics_relay_providers::Event;
use analytics_relay_store::{
    Appended, AsOf, Breakdown, Bucket, CountPoint, Deleted, Field, Funnel, FunnelAnswer, Identity, LogEntry,
    NamedPoint, NewVisitors, Operator, PageRow, Point, PropertyRow, Realtime, Scope, SessionRow, Store,
    StoreError, Subject, Summary, TenantScope, ValueRow, model::KnownFact, sqlite, sqlite::SqliteStore,
};
use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use tokio::{task::spawn_blocking, time::Instant};
use tracing::{error, warn};

use super::{
    error::OpenError,
    server::{self, Server},
    settings::{StorePlace, StoreSettings},
    status::{Connections, StoreStatus},
};
use crate::{files, telemetry::StoreMetrics, time::Clock};

/// A process that ends, or a command that only looks, lets go of the file within this time.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What a store is, for what is done with it beside questions.
#[derive(Debug, Clone)]
pub(crate) enum Backend {
    /// A file.
    Embedded(SqliteStore),
    /// A PostgreSQL.
    Server(Server),
}

impl Backend {
    fn store(&self) -> Arc<dyn Store> {
        match self {
            Self::Embedded(embedded) => Arc::new(embedded.clone()),
            Self::Server(server) => server.store(),
        }
    }

    /// The tenants that have events before a time.
    pub(super) async fn tenants_before(&self, time_ms: i64) -> Result<Vec<String>, StoreError> {
        match self {
            Self::Embedded(embedded) => embedded.tenants_before(time_ms).await,
            Self::Server(server) => server.tenants_before(time_ms).await,
        }
    }

    /// Where a damaged file went.
    fn set_aside(&self) -> Option<PathBuf> {
        match self {
            Self::Embedded(embedded) => embedded.set_aside().map(Path::to_owned),
            Self::Server(_) => None,
        }
    }
}

/// A store that is open.
struct Opened {
    store: Arc<dyn Store>,
    backend: Backend,
}

/// See the module.
pub(crate) struct Front {
    settings: StoreSettings,
    data_dir: PathBuf,
    opened: ArcSwapOption<Opened>,
    metrics: StoreMetrics,
    status: Arc<StoreStatus>,
    clock: Clock,
    /// Told of which tenant something counts otherwise now.
    when_changed: Arc<OnceLock<WhenChanged>>,
}

type WhenChanged = Box<dyn Fn(&str) + Send + Sync>;

/// Says that something of a tenant counts otherwise, however what changes it ends: a part of
/// what failed may have been done.
struct Changed {
    tell: Arc<OnceLock<WhenChanged>>,
    tenant: String,
    /// It ended well and there was nothing to do.
    is_nothing: bool,
}

impl Changed {
    fn end(mut self, is_nothing: bool) {
        self.is_nothing = is_nothing;
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        if let Some(tell) = self.tell.get().filter(|_| !self.is_nothing) {
            tell(&self.tenant);
        }
    }
}

impl Front {
    pub(super) fn new(settings: StoreSettings, data_dir: &Path, metrics: StoreMetrics, clock: Clock) -> Self {
        Self {
            settings,
            data_dir: data_dir.to_owned(),
            opened: ArcSwapOption::empty(),
            metrics,
            status: Arc::default(),
            clock,
            when_changed: Arc::default(),
        }
    }

    /// Has somebody told, once, when events or links of a tenant were deleted or undone.
    pub(super) fn when_changed(&self, tell: impl Fn(&str) + Send + Sync + 'static) {
        let is_first = self.when_changed.set(Box::new(tell)).is_ok();
        debug_assert!(is_first, "one keeps answers");
    }

    /// Does something after which a tenant counts otherwise, and says so when it has ended;
    /// also when nobody waits for it any more, as it is done all the same.
    async fn changing<T: Send + 'static>(
        &self,
        of: &TenantScope,
        change: impl Future<Output = Result<T, StoreError>> + Send + 'static,
        is_nothing: fn(&T) -> bool,
    ) -> Result<T, StoreError> {
        let (tell, tenant) = (self.when_changed.clone(), of.tenant.clone());
        let changed = Changed { tell, tenant, is_nothing: false };
        let done = tokio::spawn(async move {
            let done = change.await;
            changed.end(done.as_ref().is_ok_and(is_nothing));
            done
        });
        done.await.unwrap_or_else(|error| Err(StoreError::Unavailable(format!("a defect: {error}"))))
    }

    /// Says that a tenant counts otherwise, after something beside the calls of [`Store`].
    pub(super) fn has_changed(&self, tenant: &str) {
        if let Some(tell) = self.when_changed.get() {
            tell(tenant);
        }
    }

    pub(super) fn status(&self) -> &Arc<StoreStatus> {
        &self.status
    }

    pub(super) fn settings(&self) -> &StoreSettings {
        &self.settings
    }

    pub(super) fn metrics(&self) -> &StoreMetrics {
        &self.metrics
    }

    /// What it is, once it was opened.
    pub(super) fn backend(&self) -> Option<Backend> {
        self.opened.load().as_ref().map(|opened| opened.backend.clone())
    }

    /// Connections to a server; none to a file.
    pub(super) fn connections(&self) -> Connections {
        match self.backend() {
            Some(Backend::Server(server)) => server.connections(),
            _ => Connections::default(),
        }
    }

    /// Looks whether a server that was there is there still. Each new reason why it is not is
    /// told once.
    pub(super) async fn look(&self) {
        let Some(Backend::Server(server)) = self.backend() else { return };
        match server.look().await {
            Ok(()) => self.status.opened(None),
            Err(StoreError::Closed) => {}
            Err(error) => {
                let (passes, why) = (matches!(error, StoreError::Unavailable(_)), server::why(error));
                match self.status.lost(&why) {
                    true if passes => {
                        warn!(error = why, "the store cannot be reached: what it is to get waits");
                    }
                    true => error!(error = why, "the store cannot be reached: what it is to get waits"),
                    false => {}
                }
            }
        }
    }

    /// Opens it, unless it is open. Each new reason why it cannot be is told once.
    pub(super) async fn open(&self) -> Result<(), OpenError> {
        if self.opened.load().is_some() {
            return Ok(());
        }
        let backend = match open(&self.settings, &self.data_dir).await {
            Ok(backend) => backend,
            Err(error) => {
                if self.status.cannot_open(error.why()) {
                    error!(error = error.why(), "the store cannot be opened now: what it is to get waits");
                }
                return Err(error);
            }
        };
        self.status.opened(backend.set_aside());
        self.opened.store(Some(Arc::new(Opened { store: backend.store(), backend })));
        Ok(())
    }

    /// Commits what is under way, and ends. Calls that come later fail.
    pub(super) async fn close(&self) {
        match self.backend() {
            Some(Backend::Embedded(embedded)) => embedded.close().await,
            Some(Backend::Server(server)) => server.close().await,
            None => {}
        }
    }

    fn store(&self) -> Result<Arc<dyn Store>, StoreError> {
        let opened = self.opened.load();
        let opened =
            opened.as_ref().ok_or_else(|| StoreError::Unavailable("it is not open yet".to_owned()))?;
        Ok(opened.store.clone())
    }

    /// What of a scope is young enough to be seen.
    fn seen(&self, scope: &Scope) -> Scope {
        let mut range = scope.range_ms.clone();
        if let Some(from_ms) = self.kept_from_ms(self.clock.now_ms()).filter(|from_ms| *from_ms > range.start)
        {
            // A range that is malformed stays so.
            range.start = from_ms.min(range.end).max(range.start);
        }
        scope.over(range)
    }

    /// Since when events are kept, if not for ever.
    pub(super) fn kept_from_ms(&self, now_ms: i64) -> Option<i64> {
        let retention = i64::try_from(self.settings.retention?.as_millis()).unwrap_or(i64::MAX);
        Some(now_ms.saturating_sub(retention))
    }

    /// Measures an answer under a name of a closed list.
    async fn timed<T>(
        &self,
        question: &'static str,
        answer: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let started = Instant::now();
        let answer = answer.await;
        self.metrics.question(question).observe(started.elapsed().as_secs_f64());
        answer
    }
}

async fn open(settings: &StoreSettings, data_dir: &Path) -> Result<Backend, OpenError> {
    match &settings.place {
        StorePlace::Nowhere => Err(OpenError::Wrong("got none, want a store".to_owned())),
        StorePlace::File(path) => {
            let settings = settings.embedded(&data_dir.join(path));
            let opening = spawn_blocking(move || open_embedded(settings));
            let embedded =
                opening.await.map_err(|error| OpenError::NotNow(format!("a defect: {error}")))??;
            Ok(Backend::Embedded(embedded))
        }
        StorePlace::Postgres(url) => Ok(Backend::Server(Server::open(settings, url).await?)),
    }
}

fn open_embedded(settings: sqlite::Settings) -> Result<SqliteStore, OpenError> {
    let path = settings.path.clone();
    let at = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    prepare(&path).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied
        | ErrorKind::NotADirectory
        | ErrorKind::IsADirectory
        | ErrorKind::AlreadyExists => OpenError::Wrong(at(&error)),
        _ => OpenError::NotNow(at(&error)),
    })?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match SqliteStore::open(settings.clone()) {
            Ok(store) => return Ok(store),
            Err(error) if sqlite::is_in_use(&path) => {
                if Instant::now() > until {
                    return Err(OpenError::Wrong(at(&error)));
                }
                thread::sleep(LOOK_AGAIN);
            }
            Err(error @ StoreError::Invalid { .. }) => return Err(OpenError::Wrong(at(&error))),
            Err(error) => return Err(OpenError::NotNow(at(&error))),
        }
    }
}

/// Makes the file for us alone; what SQLite puts beside it is made as it is.
fn prepare(path: &Path) -> io::Result<()> {
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        files::create_dir(dir)?;
    }
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => Err(ErrorKind::IsADirectory.into()),
        Err(error) if error.kind() == ErrorKind::NotFound => files::create_file(path).map(|_| ()),
        found => found.map(|_| ()),
    }
}

#[async_trait]
impl Store for Front {
    async fn append(&self, batch: &[Event]) -> Result<Vec<Appended>, StoreError> {
        let (store, started) = (self.store()?, Instant::now());
        let appended = store.append(batch).await;
        self.metrics.append.observe(started.elapsed().as_secs_f64());
        appended
    }

    async fn as_of(&self, of: &TenantScope) -> Result<AsOf, StoreError> {
        let store = self.store()?;
        self.timed("as_of", store.as_of(of)).await
    }

    async fn properties(&self, scope: &Scope, limit: usize) -> Result<Breakdown<PropertyRow>, StoreError> {
        let (store, scope) = (self.store()?, self.seen(scope));
        self.timed("properties", store.properties(&scope, limit)).await
    }

    async fn counts(&self, scope: &Scope, bucket: Bucket, zone: &str) -> Result<Vec<CountPoint>, StoreError> {
        let (store, scope) = (self.store()?, self.seen(scope));
        self.timed("counts", store.counts(&scope, bucket, zone)).await
    }

    async fn summary(&self, scope: &Scope) -> Result<Summary, StoreError> {
        let (store, scope) = (self.store()?, self.seen(scope));
        self.timed("summary", store.summary(&scope)).await
    }

    async fn series(&self, scope: &Scope, bucket: Bucket, zone: &str) -> Result<Vec<Point>, StoreError> {
        let (store, scope) = (self.store()?, self.seen(scope));
        self.timed("series", store.series(&scope, bucket, zone)).await
    }

    async fn series_by_name(
        &self,
        scope: &Scope,
        bucket: Bucket,
        zone: &str,
    ) -> Result<Vec<NamedPoint>, StoreError> {
        let (store, scope) = (self.store()?, self.seen(scope));
        self.timed("series_by_name", store.series_by_name(&scope, bucket, zone)).await
    }

    async fn breakdown(
        &self,
        scope: &Scope,
        by: &Field,
        limit: usize,
    ) -> Result<Breakdown<ValueRow>, StoreError> {
        let (store, scope) = (self.store()?, self.seen(scope));
        self.timed("breakdown", store.breakdown(&scope, by, limit)).await
    }

    async fn sessions_by(
        &self,
        scope: &Scope,
        by: &Field,
        limit: usize,
    ) -> Result<Breakdown<SessionRow>, StoreError> {
        let (store, scope) = (self.store()?, self.seen(scope));
        self.timed("sessions_by", store.sessions_by(&scope, by, limit)).await
    }

    async fn pages(&self, scope: &Scope, limit: usize) -> Result<Breakdown<PageRow>, StoreError> {
        let (store, scope) = (self.store()?, self.seen(scope));
        self.timed("pages", store.pages(&scope, limit)).await
    }

    async fn funnel(&self, scope: &Scope, funnel: &Funnel) -> Result<FunnelAnswer, StoreError> {
        let (store, scope) = (self.store()?, self.seen(scope));
        self.timed("funnel", store.funnel(&scope, funnel)).await
    }

    async fn realtime(&self, scope: &Scope, now_ms: i64) -> Result<Realtime, StoreError> {
        let store = self.store()?;
        self.timed("realtime", store.realtime(scope, now_ms)).await
    }

    async fn new_visitors(&self, scope: &Scope) -> Result<NewVisitors, StoreError> {
        let (store, scope) = (self.store()?, self.seen(scope));
        self.timed("new_visitors", store.new_visitors(&scope)).await
    }

    async fn recent(
        &self,
        scope: &Scope,
        who: Option<&Subject>,
        limit: usize,
    ) -> Result<Vec<Event>, StoreError> {
        let (store, scope) = (self.store()?, self.seen(scope));
        self.timed("recent", store.recent(&scope, who, limit)).await
    }

    async fn identity(&self, of: &TenantScope, who: &Subject) -> Result<Option<Identity>, StoreError> {
        let store = self.store()?;
        self.timed("identity", store.identity(of, who)).await
    }

    async fn identity_log(
        &self,
        of: &TenantScope,
        who: &Subject,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        let store = self.store()?;
        self.timed("identity_log", store.identity_log(of, who, limit)).await
    }

    async fn link(
        &self,
        of: &TenantScope,
        from: &str,
        user: &str,
        joined: bool,
        by: &Operator,
    ) -> Result<(), StoreError> {
        let (store, tenant, by) = (self.store()?, of.clone(), by.clone());
        let (from, user) = (from.to_owned(), user.to_owned());
        self.changing(of, async move { store.link(&tenant, &from, &user, joined, &by).await }, |()| false)
            .await
    }

    async fn know(&self, facts: &[KnownFact]) -> Result<u64, StoreError> {
        self.store()?.know(facts).await
    }

    async fn erase(&self, of: &TenantScope, who: &Subject) -> Result<Deleted, StoreError> {
        let (store, tenant, who) = (self.store()?, of.clone(), who.clone());
        self.changing(of, async move { store.erase(&tenant, &who).await }, |_| false).await
    }

    async fn retain(&self, of: &TenantScope, from_ms: i64) -> Result<Deleted, StoreError> {
        let (store, tenant) = (self.store()?, of.clone());
        let is_nothing = |deleted: &Deleted| (deleted.events, deleted.blocks) == (0, 0);
        self.changing(of, async move { store.retain(&tenant, from_ms).await }, is_nothing).await
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use analytics_relay_providers::{EventParts, event::EventId};
    use futures_util::FutureExt;
    use tokio::time::timeout;

    use super::*;
    use crate::{config::Config, delivery::test_support::track};

    pub(in crate::store) const DAY_MS: i64 = 24 * 60 * 60 * 1000;

    /// A front in a directory, by these settings, and the time that it believes in.
    pub(in crate::store) fn front(dir: &Path, vars: &[(&str, &str)]) -> (Front, Arc<AtomicI64>) {
        let own = [("ANALYTICS_PROVIDER", "none"), ("STORE_URL", "sqlite:")];
        let config = Config::from_vars(own.iter().chain(vars).copied()).unwrap();
        let now_ms = Arc::new(AtomicI64::new(1_767_225_600_000));
        let shown = now_ms.clone();
        let clock = Clock::from_fn(move || shown.load(Ordering::Relaxed));
        (Front::new(config.store, dir, StoreMetrics::default(), clock), now_ms)
    }

    pub(in crate::store) fn event_at(user: &str, time_ms: i64) -> Event {
        let event = crate::delivery::test_support::track_of("Order Placed", user);
        Event::pack(&EventParts { id: EventId::assign(), time_ms, ..event.parts() })
    }

    pub(in crate::store) async fn events_in(front: &Front, range_ms: std::ops::Range<i64>) -> u64 {
        front.summary(&Scope::new(TenantScope::tenant(""), range_ms)).await.unwrap().events
    }

    #[tokio::test]
    async fn before_it_is_open_everything_is_unavailable_and_afterwards_nothing_is() {
        let dir = tempfile::tempdir().unwrap();
        let (front, _) = front(dir.path(), &[]);
        let error = front.append(&[track("a")]).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        assert!(!front.status().is_open());
        front.open().await.unwrap();
        front.open().await.unwrap();
        assert!(front.status().is_open());
        assert_eq!(front.append(&[track("a")]).await.unwrap(), [Appended::New]);
        front.close().await;
        assert_eq!(front.append(&[track("a")]).await.unwrap_err(), StoreError::Closed);
    }

    #[tokio::test]
    async fn what_is_changed_for_somebody_who_left_is_told_when_it_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let (front, _) = front(dir.path(), &[]);
        front.open().await.unwrap();
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        front.when_changed(move |tenant| drop(tell.send(tenant.to_owned())));
        let (of, user) = (TenantScope::tenant("t"), Subject::User("u".to_owned()));
        let by = Operator::default();
        assert!(front.erase(&of, &user).now_or_never().is_none());
        assert!(front.retain(&of, 5).now_or_never().is_none());
        assert!(front.link(&of, "d", "u", false, &by).now_or_never().is_none());
        // Nothing was too old.
        for _ in 0..2 {
            let tenant = timeout(Duration::from_secs(20), told.recv()).await.unwrap();
            assert_eq!(tenant.as_deref(), Some("t"));
        }
        assert!(front.identity(&of, &user).await.unwrap().is_none());
        assert!(front.retain(&of, 5).await.is_ok() && told.try_recv().is_err());
        front.close().await;
        // What fails may have been done in part.
        front.retain(&of, 5).await.unwrap_err();
        assert_eq!(told.recv().await.as_deref(), Some("t"));
    }

    #[tokio::test]
    async fn the_file_is_ours_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (front, _) = front(dir.path(), &[("STORE_URL", "sqlite:deep/er/events.db")]);
        front.open().await.unwrap();
        front.append(&[track("a")]).await.unwrap();
        for end in ["", "-wal"] {
            let file = dir.path().join(format!("deep/er/events.db{end}"));
            assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600, "{end}");
        }
        front.close().await;
    }

    #[tokio::test]
    async fn what_a_person_must_mend_is_told_from_what_passes() {
        let dir = tempfile::tempdir().unwrap();
        let opened = async |url: &str| front(dir.path(), &[("STORE_URL", url)]).0.open().await;
        let wrong = |result, says: &str| match result {
            Err(OpenError::Wrong(why)) => assert!(why.contains(says), "{why}"),
            other => panic!("{other:?}"),
        };
        let (first, _) = front(dir.path(), &[]);
        first.open().await.unwrap();
        wrong(opened("sqlite:").await, "another process writes to it");
        wrong(opened("sqlite:store.db/x").await, "store.db/x");
        fs::create_dir(dir.path().join("dir")).unwrap();
        wrong(opened("sqlite:dir").await, "directory");
        first.close().await;
    }

    #[cfg(not(feature = "postgres"))]
    #[tokio::test]
    async fn without_postgresql_it_is_said_how_to_do_without() {
        let dir = tempfile::tempdir().unwrap();
        let (front, _) = front(dir.path(), &[("STORE_URL", "postgres://user:canary@localhost/x")]);
        let error = front.open().await.unwrap_err();
        assert!(matches!(&error, OpenError::Wrong(why) if why.contains("built without")), "{error}");
    }

    #[cfg(feature = "postgres")]
    #[tokio::test]
    async fn a_server_that_is_not_there_passes_and_a_url_that_is_none_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let opened = async |url: &str| front(dir.path(), &[("STORE_URL", url)]).0.open().await.unwrap_err();
        // Nothing listens at a port of the lowest number.
        let gone = opened("postgres://user:canary@127.0.0.1:1/x").await;
        assert!(
            matches!(&gone, OpenError::NotNow(why) if why.contains("postgres://***@127.0.0.1:1/x")),
            "{gone}"
        );
        let wrong = opened("postgres://user:canary@localhost:port/x").await;
        assert!(matches!(&wrong, OpenError::Wrong(_)), "{wrong}");
        for error in [gone, wrong] {
            assert!(!error.to_string().contains("canary"), "{error}");
        }
    }

    #[tokio::test]
    async fn what_is_older_than_the_retention_is_not_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (front, now) = front(dir.path(), &[("RETENTION_DAYS", "30")]);
        front.open().await.unwrap();
        let now_ms = now.load(Ordering::Relaxed);
        let days_ago = |days: i64| now_ms - days * DAY_MS;
        let batch = [event_at("a", days_ago(31)), event_at("a", days_ago(29)), event_at("a", days_ago(0))];
        front.append(&batch).await.unwrap();
        assert_eq!(events_in(&front, 0..now_ms + 1).await, 2);
        assert_eq!(events_in(&front, days_ago(40)..days_ago(31) + 1).await, 0);
        assert_eq!(events_in(&front, days_ago(29)..days_ago(28)).await, 1);
        let everything = Scope::new(TenantScope::tenant(""), 0..now_ms + 1);
        assert_eq!(front.recent(&everything, None, 10).await.unwrap().len(), 2);
        now.fetch_add(2 * DAY_MS, Ordering::Relaxed);
        assert_eq!(events_in(&front, 0..now_ms + 1).await, 1);
        // A question that is malformed is not made a good one.
        let malformed = Scope::new(TenantScope::tenant(""), std::ops::Range { start: 5, end: 1 });
        assert!(matches!(front.summary(&malformed).await, Err(StoreError::Invalid { .. })));
        front.close().await;
    }
}
