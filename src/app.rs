//! Builds each stage, and owns the order in which they start and stop.
//!
//! Starting goes against the data, so that nothing is accepted before it can be
//! delivered; the ports are bound and the files read first, so that a start
//! which must fail sends nothing. Stopping goes with it, under one deadline:
//!
//! 1. Admission closes: calls get UNAVAILABLE, readiness is off.
//! 2. The queue closes and keeps what it holds; the batch worker flushes the
//!    short batch at once and ends.
//! 3. The lanes cut their waiting short and send what they have. While they
//!    do, the server goes on answering, so callers learn why.
//! 4. A little before the deadline, or at a second signal, requests under way
//!    are abandoned and what is left goes to spill files.
//! 5. The log is closed, if there is one: what it holds is delivered after the
//!    next start. So is the store.
//! 6. The server stops, and the balance is taken.
//!
//! If any of this hangs, a thread beside it ends the process two seconds after
//! the deadline.

use std::{
    collections::HashSet,
    convert::Infallible,
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use analytics_relay_providers::{
    Provider,
    registry::{self, BuildError},
};
use analytics_relay_store::Store;
use thiserror::Error;
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::{JoinHandle, JoinSet, spawn_blocking},
    time::{Instant, interval_at, sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    admin,
    admission::Admission,
    batch_worker::{self, Gathering},
    config::{Config, ConfigError, DeliveryConfig, NoKeys, SpoolConfig},
    control::{self, Control, socket::ControlSocket},
    delivery::{
        dead_letter::DeadLetterDir, lane::LaneStatus, spill::LoadError, suspension::Suspensions,
        unnamed::Unnamed,
    },
    enrich::{geo::GeoError, page::SourcesError},
    files::DataDirLock,
    health::Health,
    ingest::{self, budget::ReceiveBudget, connections::Behind, tls::TlsError},
    ledger::Ledger,
    listener::{self, Listen},
    privacy::{Named, Privacy, PrivacyError, secret::DataSecret, suppression::Suppressed},
    query::Query,
    queue::{
        Durability, Queue, memory,
        spool::{
            OpenedSpool, SharedStatus, SpoolError, SpoolSettings, SpoolThread, inspect::SpoolDir,
            log::LogKeys,
        },
    },
    reasons::{Outcome, RefusalReason, STORE},
    refused::{RefusedDir, RefusedKeeper},
    sealing::{Kek, Sealing},
    shutdown::{DrainReport, Signals, Stop},
    store::{OpenError, OpenStore},
    telemetry::{PrivacyMetrics, Telemetry, VERSION},
    time::Clock,
    watched::{self, Reload},
};

mod accounts;
mod doors;
pub(crate) mod edge;
mod erasing;
mod gauges;
mod keeping;
mod lanes;
mod watch;
mod watchdog;

use accounts::Accounts;
use doors::DoorPorts;
use edge::Edge;
pub(crate) use lanes::lane_settings;
use lanes::{BuiltLane, LaneBuilder, LaneHandle};
use watch::StageWatch;
pub(crate) use watchdog::Watchdog;

/// Share of the drain timeout that is kept for writing what is left.
const SPILL_SHARE: f64 = 0.2;
/// Bounds of that time.
const SPILL_TIME: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long past the drain timeout a disk may keep us: `docker stop` gives ten
/// seconds, and the default timeout is eight.
const DISK_OVERTIME: Duration = Duration::from_millis(1500);
/// How long events that were handed over have to come to disk.
const INTAKE_GRACE: Duration = Duration::from_secs(2);
/// How long calls under way have to finish once everything else is done.
const SERVER_GRACE: Duration = Duration::from_millis(250);
/// How long past all this the log has to be closed, and the servers have to stop.
const CLOSE_MIN: Duration = Duration::from_millis(100);
/// How often a drain says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// The settings of the port, for errors.
const METRICS_PORT: &str = "METRICS_HOST, METRICS_PORT";

/// Why the relay did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// A vendor's client could not be built.
    #[error(transparent)]
    Provider(#[from] BuildError),
    /// There is nothing to deliver to.
    #[error(
        "no provider: ANALYTICS_PROVIDER is \"none\", STORE_URL names no store, and the program adds none"
    )]
    NoProvider,
    /// The store cannot be opened without a person.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// Two providers have the same name.
    #[error("two providers are named {0:?}, want each name once")]
    SameName(&'static str),
    /// An address is taken or not ours.
    #[error("{what}: cannot listen at {host}:{port}")]
    Listen {
        /// The settings that name the address.
        what: &'static str,
        /// The address,
        host: String,
        /// and its port.
        port: u16,
        /// What the system says.
        source: io::Error,
    },
    /// The data directory cannot be used.
    #[error("DATA_DIR {dir} cannot be used")]
    DataDir {
        /// The directory.
        dir: String,
        /// What the system says.
        source: io::Error,
    },
    /// The privacy rules cannot be read.
    #[error(transparent)]
    Privacy(#[from] PrivacyError),
    /// TLS cannot be served.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The rules of user agents, or a list of bots, cannot be used.
    #[error(transparent)]
    Agents(#[from] ConfigError),
    /// A table of sources cannot be used.
    #[error(transparent)]
    Sources(#[from] SourcesError),
    /// It cannot be looked up where addresses are.
    #[error(transparent)]
    Geo(#[from] GeoError),
    /// The log cannot be used.
    #[error("SPOOL_DIR")]
    Spool(#[from] SpoolError),
    /// There are no keys, and settings say that there are.
    #[error(transparent)]
    Keys(#[from] NoKeys),
    /// A file is sealed, and the key is not there.
    #[error(
        "{path}: {locked}. `serve --quarantine-unreadable` starts without it: such files are set aside, and \
their events count as lost"
    )]
    Locked {
        /// Which file.
        path: String,
        /// Why it cannot be opened.
        locked: String,
    },
}

/// The log of a durable relay.
#[derive(Debug)]
struct RunningSpool {
    thread: SpoolThread,
    status: Arc<SharedStatus>,
}

/// A relay that is running.
#[derive(Debug)]
pub struct App {
    stop: Stop,
    admission: Arc<Admission>,
    query: Arc<Query>,
    grpc_addr: SocketAddr,
    http_addr: Option<SocketAddr>,
    metrics_addr: SocketAddr,
    drain_timeout: Duration,
    lanes: Vec<LaneHandle>,
    spool: Option<RunningSpool>,
    store: Option<OpenStore>,
    /// They look after what the log holds for providers that are not named.
    unnamed: JoinSet<()>,
    batch_worker: JoinHandle<()>,
    servers: JoinSet<()>,
    stop_servers: CancellationToken,
    /// Names of stages that have ended.
    ended: mpsc::UnboundedReceiver<&'static str>,
    edge: Edge,
    _lock: DataDirLock,
}

impl App {
    /// Starts a relay to the vendors that the configuration names.
    pub async fn start(config: &Config) -> Result<Self, StartError> {
        Self::start_with(config, Vec::new()).await
    }

    /// Starts a relay to the vendors that the configuration names, and to
    /// providers of your own.
    pub async fn start_with(config: &Config, own: Vec<Arc<dyn Provider>>) -> Result<Self, StartError> {
        Self::start_with_store(config, own, None).await
    }

    /// The same, and questions are answered by a store of your own, which one of the providers
    /// fills; whoever deletes from it says so ([`App::forget_answers`]).
    pub async fn start_with_store(
        config: &Config,
        own: Vec<Arc<dyn Provider>>,
        own_store: Option<Arc<dyn Store>>,
    ) -> Result<Self, StartError> {
        let mut providers = providers(config, own)?;
        let data_dir = &config.data_dir;
        let unusable = |source| StartError::DataDir { dir: data_dir.display().to_string(), source };
        let lock = DataDirLock::acquire(data_dir).map_err(unusable)?;
        let sealing = load_keys(config).await?;
        let (metrics_listener, metrics_addr) = listen(METRICS_PORT, &config.metrics.listen).await?;
        let doors = DoorPorts::open(config).await?;
        let (grpc_addr, http_addr, connections_max) =
            (doors.grpc_addr, doors.http_addr, doors.connections_max);

        let clock = Clock::system();
        let stop = Stop::default();
        let (watch, ended) = StageWatch::new();
        let mut telemetry = Telemetry::new(clock.now_ms());
        let store = keeping::open(config, &mut telemetry, &clock).await?;
        providers.extend(store.iter().map(|store| (store.provider(), config.store_delivery())));
        let privacy = open_privacy(config, &providers, &sealing, telemetry.privacy())?;
        let providers = guarded(providers, privacy.as_ref());

        let (queue_in, queue_out) = memory::bounded(config.queue);
        let accepted = telemetry.accepted();
        let families = telemetry.lanes();
        let ledgers: Vec<Ledger> = providers
            .iter()
            .map(|(provider, _)| families.ledger(provider.name(), accepted.clone()))
            .collect();
        let names = providers.iter().map(|(provider, _)| provider.name()).collect();
        let opened = open_spool(config, &providers, &sealing, clock.now_ms()).await?;

        warn_of_locked_letters(data_dir, &sealing);
        let secret = DataSecret::open(data_dir).map_err(unusable)?;
        let suppressed = Arc::new(Suppressed::open(data_dir, &secret).map_err(unusable)?);
        let suspensions = Suspensions::new(data_dir);
        let suspended = suspensions.list().map_err(unusable)?;
        let builder = LaneBuilder {
            config,
            data_dir,
            families,
            sealing: &sealing,
            clock: clock.clone(),
            stop: stop.clone(),
            suspended,
            suppressed: suppressed.clone(),
        };
        let (lanes, groups) =
            builder.build_all(providers, &ledgers, opened.as_ref()).await.map_err(|error| match error {
                LoadError::File(source) => unusable(source),
                LoadError::Locked { path, locked } => {
                    StartError::Locked { path: path.display().to_string(), locked: locked.to_string() }
                }
            })?;
        let unnamed = opened.as_ref().map(|spool| lanes::of_unnamed(&builder, spool)).unwrap_or_default();
        let (queue, spool) = match opened {
            None => (Queue::Memory(queue_in.clone(), accepted), None),
            Some(opened) => {
                let (spool, metrics) = (opened.spool().clone(), telemetry.spool(accepted));
                let status = spool.status().clone();
                gauges::of_spool(&mut telemetry, config, &spool);
                let thread =
                    opened.run(queue_in.clone(), ledgers, metrics, clock.clone(), watch.guard("spool"));
                let thread = thread.map_err(unusable)?;
                (Queue::Spool(spool), Some(RunningSpool { thread, status }))
            }
        };
        let admission = Admission::new(queue, clock.clone(), telemetry.admission());
        let (edge, mut files) = Edge::open(config, data_dir, &secret, &mut telemetry, &clock)?;
        let shaping = edge.shaping(config, privacy.as_ref());
        let admission = admission.with_input(config.input).with_shaping(shaping).without(suppressed.clone());
        let admission = Arc::new(admission);
        // Only now that nothing can fail any more.
        let switches = lanes.iter().map(BuiltLane::switch).collect();
        let lanes: Vec<_> = lanes.into_iter().map(|lane| lane.run(&watch)).collect();
        lanes::warn_of_forgotten_spill(data_dir, &lanes);
        let looks_after = |unnamed: Unnamed| watch.over("unnamed provider", unnamed.run(stop.clone()));
        let unnamed = unnamed.into_iter().map(looks_after).collect();

        let gathering = Gathering::default();
        let worker = batch_worker::run(queue_out, groups, gathering.clone(), stop.drain_token());
        let batch_worker = tokio::spawn(watch.over("batch worker", worker));

        let statuses: Vec<_> = lanes.iter().map(|lane| lane.status.clone()).collect();
        let spool_status = spool.as_ref().map(|spool| spool.status.clone());
        let health = Health::new(stop.clone(), queue_in.clone(), statuses.clone(), spool_status.clone());
        let health = health.with_list(suppressed.clone()).with_enricher(edge.enricher.clone());
        let health = Arc::new(health.with_store(store.as_ref().map(|store| store.status.clone())));
        let ingest_metrics = telemetry.ingest();
        let messages_refused = admission.refusals(RefusalReason::ReceivingTooMuch).clone();
        let budget = ReceiveBudget::new(config.grpc.receive_bytes_max, messages_refused);
        // From now on a clock that is set is noticed.
        admission.trusts_its_clock();
        let gate = admission.clone();
        telemetry.gauge("relay_clock_trusted", move || i64::from(gate.trusts_its_clock()));
        telemetry.gauge("relay_connections_max", move || gauges::to_i64(connections_max));
        gauges::of_queue(&mut telemetry, &queue_in, &stop);
        gauges::of_lanes(&mut telemetry, config, &lanes, &gathering, &clock, spool_status.as_ref());
        if let Some(store) = &store {
            gauges::of_store(&mut telemetry, store, &lanes, &clock);
        }

        let asked = own_store.or_else(|| store.as_ref().map(|store| store.store.clone()));
        let query = Arc::new(Query::new(asked, &config.query, clock.clone(), telemetry.query()));
        gauges::of_query(&mut telemetry, &query);
        if let Some(store) = &store {
            let query = query.clone();
            store.when_changed(move |tenant| query.forget(tenant));
        }

        let stop_servers = CancellationToken::new();
        let mut servers = JoinSet::new();
        let stopped = stop_servers.clone().cancelled_owned();
        let admin = admin::serve(metrics_listener, Arc::new(telemetry), health.clone(), stopped);
        servers.spawn(watch.over("metrics server", async move {
            if let Err(error) = admin.await {
                error!(%error, "server failed");
            }
        }));
        let stopped = stop_servers.clone().cancelled_owned();
        let refused = RefusedKeeper::new(
            data_dir,
            config.dead_letters.bytes_max,
            privacy.clone(),
            &sealing,
            ingest_metrics.refused_kept.clone(),
            ingest_metrics.refused_lost.clone(),
        );
        servers.spawn(
            watch.over("suppression", erasing::keep_to(suppressed.clone(), statuses, refused.clone())),
        );
        if query.is_sharing() {
            let query = query.clone();
            // Not watched over: whatever ends it costs hits, and not the relay.
            servers.spawn(async move { match query.tend().await {} });
        }
        let behind = Behind {
            admission: admission.clone(),
            health,
            budget,
            query: query.clone(),
            metrics: ingest_metrics,
        };
        let grpc = ingest::grpc::server::serve(doors.grpc, behind.clone(), stopped);
        servers.spawn(watch.over("gRPC server", grpc));
        if let Some(port) = doors.http {
            let stopped = stop_servers.clone().cancelled_owned();
            let settings = config.http.clone();
            servers.spawn(watch.over("HTTP server", async move {
                ingest::http::server::serve(port, behind, &settings, names, refused, stopped).await;
            }));
        }
        if let Some(store) = &store
            && let Some(socket) = ControlSocket::open(data_dir)
        {
            let control = Control {
                open: store.clone(),
                file: config.store.file(data_dir),
                suppressed: Some(suppressed.clone()),
                draining: stop.drain_token(),
                clock: clock.clone(),
            };
            let stopped = stop_servers.clone().cancelled_owned();
            servers.spawn(watch.over("control socket", socket.serve(control::router(control), stopped)));
        }
        if let Some(store) = &store {
            let kept = store.keep(data_dir, clock.clone(), config.enrich.time_zone.clone(), stop.clone());
            servers.spawn(watch.over("store upkeep", kept));
        }
        servers.spawn(watch.over("suspensions", suspensions.watch(switches)));
        if let Some(keeping) = edge.keep_salts(&clock) {
            servers.spawn(watch.over("salts of visitors", async { match keeping.await {} }));
        }
        files.extend(privacy.map(|privacy| privacy as Arc<dyn Reload>));
        if !files.is_empty() {
            let following = watched::follow(files, watched::LOOK_INTERVAL);
            servers.spawn(watch.over("data files", async { match following.await {} }));
        }

        if let Some(files) = &config.grpc.tls {
            info!(client_certificates = files.client_ca.is_some(), "gRPC is served over TLS");
        }
        if config.http.is_read_openly() {
            warn!(
                "READ_KEYS is not set: whoever reaches the HTTP port in test mode can read what the store says"
            );
        }
        if config.http.is_open() {
            warn!("HTTP_WRITE_KEYS is not set: whoever reaches the HTTP port can send events");
        }
        let shown = http_addr.map_or("off".to_owned(), |addr| addr.to_string());
        info!(version = VERSION, %grpc_addr, http_addr = shown, %metrics_addr, "relay started");
        Ok(Self {
            stop,
            admission,
            query,
            grpc_addr,
            http_addr,
            metrics_addr,
            drain_timeout: config.stop.drain_timeout,
            lanes,
            spool,
            store,
            unnamed,
            batch_worker,
            servers,
            stop_servers,
            ended,
            edge,
            _lock: lock,
        })
    }

    /// Something was deleted from a store of your own: what it said before is not told any
    /// more.
    pub fn forget_answers(&self) {
        self.query.forget("");
    }

    /// Where callers are listened for.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.grpc_addr
    }

    /// Where callers of HTTP are listened for, if they are.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http_addr
    }

    /// Where scrapes and probes are listened for.
    pub fn metrics_addr(&self) -> SocketAddr {
        self.metrics_addr
    }

    /// Runs until the first of `signals`, then drains; a second one, or the
    /// deadline, ends the draining. A stage that ends by itself, which only a
    /// defect can make it do, counts as a signal.
    ///
    /// If the drain hangs, in a provider's code say, the process is ended two
    /// seconds after the deadline, with the exit code that says whether events
    /// are lost.
    pub async fn run_until(self, signals: impl Into<Signals>) -> DrainReport {
        self.run_watched_until(signals.into()).await.0
    }

    /// As [`App::run_until`]; what watched over the drain can watch on.
    pub(crate) async fn run_watched_until(mut self, mut signals: Signals) -> (DrainReport, Watchdog) {
        let accounts = Accounts::new(&self.lanes, self.spool.as_ref().map(|spool| spool.status.clone()));
        let watchdog = Watchdog::over_the_run(signals.first(), self.drain_timeout, accounts.clone());
        let failed = tokio::select! {
            Some(()) = signals.recv() => None,
            stage = self.ended.recv() => stage,
        };
        if let Some(stage) = failed {
            watchdog.note_failure();
            error!(stage, "a defect: a stage ended by itself, stopping");
        }
        let started = Instant::from_std(signals.first().note());
        (self.drain(signals, started, &accounts, failed.is_some()).await, watchdog)
    }

    async fn drain(
        mut self,
        signals: Signals,
        started: Instant,
        accounts: &Accounts,
        failed: bool,
    ) -> DrainReport {
        // Readiness first: no load balancer sends anybody who would be refused.
        self.stop.refuse();
        self.admission.close();
        let lane_events: usize = self.lanes.iter().map(|lane| lane.status.events()).sum();
        info!(timeout_seconds = self.drain_timeout.as_secs_f64(), lane_events, "draining");
        if let Some(spool) = &self.spool {
            // What was handed over is on disk and in the queue before it closes.
            let _ = timeout_at(started + INTAKE_GRACE, spool.thread.close_intake()).await;
        }
        self.stop.drain();

        let watcher = tokio::spawn(self.force_when_due(signals, started));
        // The lanes keep to the deadline by themselves; a disk that hangs must
        // not keep the balance from being told.
        let deadline = started + self.drain_timeout + DISK_OVERTIME;
        match timeout_at(deadline, self.empty()).await {
            Ok(()) => info!("final flush completed"),
            Err(_) => error!("the drain did not end in time: what is only in memory is lost"),
        }
        watcher.abort();
        self.close_spool(deadline).await;
        keeping::close(self.store.take(), deadline).await;
        self.edge.save().await;

        // Last, so that callers could be told until now.
        self.stop_servers.cancel();
        let grace = (Instant::now() + SERVER_GRACE).min(deadline + 2 * CLOSE_MIN);
        while let Ok(Some(_)) = timeout_at(grace, self.servers.join_next()).await {}
        let _ = timeout(CLOSE_MIN, self.servers.shutdown()).await;

        let report = DrainReport { balances: accounts.balances(), took: started.elapsed(), failed };
        report.log();
        report
    }

    /// Closes the log. What it holds is delivered after the next start.
    async fn close_spool(&mut self, deadline: Instant) {
        let Some(RunningSpool { thread, status }) = self.spool.take() else { return };
        let left = timeout_at(deadline.max(Instant::now() + CLOSE_MIN), thread.close()).await;
        let left = left.ok().flatten().unwrap_or_else(|| {
            error!("the spool could not be closed: what is in it was counted before");
            status.cursors.iter().map(|cursor| cursor.pending.load(Ordering::Relaxed)).collect()
        });
        for (lane, left) in self.lanes.iter().zip(left) {
            lane.ledger.ended(Outcome::Spilled, left);
        }
    }

    /// Forces the lanes to stop at a second signal, or a little before the
    /// deadline; says how far the drain is until then.
    fn force_when_due(&self, mut signals: Signals, started: Instant) -> impl Future<Output = ()> + use<> {
        let spill_time = self.drain_timeout.mul_f64(SPILL_SHARE).clamp(SPILL_TIME.0, SPILL_TIME.1);
        let deadline = started + self.drain_timeout.saturating_sub(spill_time);
        let statuses: Vec<_> = self.lanes.iter().map(|lane| lane.status.clone()).collect();
        let stop = self.stop.clone();
        async move {
            tokio::select! {
                never = report_progress(&statuses, started) => match never {},
                Some(()) = signals.recv() => warn!("second signal: what is left is spilled"),
                () = sleep_until(deadline) => warn!("drain deadline: what is left is spilled"),
            }
            stop.force();
        }
    }

    /// Waits until the batch worker has flushed and each lane is empty, or has
    /// stopped and what it had is on disk.
    async fn empty(&mut self) {
        if let Err(error) = (&mut self.batch_worker).await {
            error!(%error, "a defect: the batch worker failed");
        }
        futures_util::future::join_all(self.lanes.iter_mut().map(LaneHandle::finish)).await;
        while self.unnamed.join_next().await.is_some() {}
    }
}

/// Reads the keys that files are sealed with.
async fn load_keys(config: &Config) -> Result<Sealing, NoKeys> {
    let settings = config.sealing.clone();
    let loading = spawn_blocking(move || settings.load());
    let keyring = loading.await.expect("reading keys does not panic")?;
    if let Some(keyring) = &keyring {
        let writes_with = keyring.writer().map_or("none", Kek::kid);
        info!(writes_with, keys = keyring.kids(), "what is kept on disk is sealed");
    }
    Ok(Sealing::new(keyring))
}

/// Says which dead letters and refused items nobody could send again. That is no reason not to
/// start.
fn warn_of_locked_letters(data_dir: &Path, sealing: &Sealing) {
    let providers = DeadLetterDir::providers(data_dir).unwrap_or_default();
    let letters =
        providers.iter().filter_map(|name| DeadLetterDir::new(data_dir, name).locked(sealing).ok()?);
    let refused = RefusedDir::new(data_dir).locked(sealing).ok().flatten();
    for (path, locked) in letters.chain(refused) {
        warn!(file = %path.display(), %locked, "dead letters cannot be read");
    }
}

/// Opens the log of a durable relay.
async fn open_spool(
    config: &Config,
    providers: &[Configured],
    sealing: &Sealing,
    now_ms: i64,
) -> Result<Option<OpenedSpool>, StartError> {
    let SpoolConfig { durability, limits, when_full, retention, group_window, group_bytes, .. } =
        config.spool;
    let dir = config.spool.dir.clone();
    if durability == Durability::Queued {
        warn_of_forgotten_log(&dir);
        return Ok(None);
    }
    let settings = SpoolSettings {
        dir,
        default_level: durability,
        keys: LogKeys { sealing: sealing.clone(), passes_unreadable: config.sealing.quarantine_unreadable },
        limits,
        provider_bytes_max: providers.iter().map(|(_, delivery)| delivery.spool_bytes_max).collect(),
        when_full,
        retention,
        group_window,
        group_bytes,
        intake: config.queue,
    };
    let names: Vec<&'static str> = providers.iter().map(|(provider, _)| provider.name()).collect();
    let opening = spawn_blocking(move || OpenedSpool::open(settings, &names, now_ms));
    match opening.await.expect("opening the spool does not panic") {
        Ok(opened) => Ok(Some(opened)),
        Err(SpoolError::Locked { path, locked }) => {
            Err(StartError::Locked { path, locked: locked.to_string() })
        }
        Err(error) => Err(error.into()),
    }
}

/// Says which events stay in a log that this relay does not use.
fn warn_of_forgotten_log(dir: &Path) {
    let overview = SpoolDir::open(dir).map(|log| log.overview());
    let Some(Ok(overview)) = overview else { return };
    for file in &overview.cursors {
        let event_count = file.cursor.as_ref().map_or(0, |cursor| cursor.pending(overview.next_seq));
        if event_count > 0 {
            let provider = &file.provider;
            warn!(provider, event_count, "DURABILITY is memory: events in the spool stay there undelivered");
        }
    }
}

/// A provider, and how events go to it.
type Configured = (Arc<dyn Provider>, DeliveryConfig);

fn providers(config: &Config, own: Vec<Arc<dyn Provider>>) -> Result<Vec<Configured>, StartError> {
    let mut providers = Vec::new();
    for vendor in &config.providers {
        let provider = if config.test_mode {
            registry::build_test_mode(&vendor.settings)
        } else {
            registry::build(&vendor.settings)?
        };
        providers.push((provider, vendor.delivery));
    }
    providers.extend(own.into_iter().map(|provider| (provider, config.delivery)));
    if providers.is_empty() && !config.store.is_on() {
        return Err(StartError::NoProvider);
    }
    let mut names: HashSet<&str> = config.store.is_on().then_some(STORE).into_iter().collect();
    match providers.iter().find(|(provider, _)| !names.insert(provider.name())) {
        Some((provider, _)) => Err(StartError::SameName(provider.name())),
        None => Ok(providers),
    }
}

/// The privacy rules, if there are any; says what is odd about them.
fn open_privacy(
    config: &Config,
    providers: &[Configured],
    sealing: &Sealing,
    metrics: PrivacyMetrics,
) -> Result<Option<Arc<Privacy>>, StartError> {
    let names = Named::only(providers.iter().map(|(provider, _)| provider.name()));
    let privacy = Privacy::open(&config.privacy, names, sealing, metrics)?;
    let warnings = privacy.as_ref().map(|privacy| privacy.describe().1).unwrap_or_default();
    warnings.iter().for_each(|warning| warn!("PRIVACY_FILE: {warning}"));
    Ok(privacy)
}

/// Providers that get no more than the rules leave for them.
fn guarded(providers: Vec<Configured>, privacy: Option<&Arc<Privacy>>) -> Vec<Configured> {
    let Some(privacy) = privacy else { return providers };
    providers.into_iter().map(|(provider, delivery)| (privacy.guard(provider), delivery)).collect()
}

async fn listen(what: &'static str, at: &Listen) -> Result<(TcpListener, SocketAddr), StartError> {
    let bound = async {
        let listener = listener::listen(&at.host, at.port).await?;
        let addr = listener.local_addr()?;
        Ok((listener, addr))
    };
    bound.await.map_err(|source| StartError::Listen { what, host: at.host.clone(), port: at.port, source })
}

/// Says every second how many events each provider has not got.
async fn report_progress(lanes: &[Arc<LaneStatus>], started: Instant) -> Infallible {
    let mut ticks = interval_at(started + PROGRESS_INTERVAL, PROGRESS_INTERVAL);
    loop {
        ticks.tick().await;
        for lane in lanes {
            info!(
                provider = lane.provider,
                events_left = lane.events(),
                state = lane.state().name(),
                elapsed_seconds = started.elapsed().as_secs(),
                "drain in progress"
            );
        }
    }
}
