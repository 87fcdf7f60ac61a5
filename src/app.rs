//! Builds each stage, and owns the order in which they start and stop.
//!
//! Starting goes against the data, so that nothing is accepted before it can be
//! delivered. Stopping goes with it, under one deadline:
//!
//! 1. Admission closes: calls get UNAVAILABLE, readiness is off.
//! 2. The queue closes and keeps what it holds; the batch worker flushes the
//!    short batch at once and ends.
//! 3. The lanes cut their waiting short and send what they have. While they
//!    do, the server goes on answering, so callers learn why.
//! 4. A little before the deadline, or at a second signal, requests under way
//!    are abandoned and what is left goes to spill files.
//! 5. The server stops, and the balance is taken.

use std::{io, sync::Arc, time::Duration};

use analytics_relay_providers::{
    Provider,
    registry::{self, BuildError},
};
use thiserror::Error;
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::{JoinHandle, JoinSet, spawn_blocking},
    time::{Instant, interval_at, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    admin,
    admission::Admission,
    batch_worker::{self, BatchGroup, BatchRule},
    config::{Config, DeliveryConfig, Listen},
    delivery::{
        LaneInbox,
        dead_letter::{DeadLetterDir, DeadLetterWriter},
        files::DataDirLock,
        lane::{Lane, LaneSettings, LaneStatus, Leftover},
        recorder::RelayRecorder,
        retry::{ProviderState, RetryRule},
        spill::SpillDir,
    },
    health::Health,
    ingest,
    outcome::Ledger,
    queue::{self, QueueLimits},
    shutdown::{DrainReport, Stop},
    telemetry::{LaneFamilies, Probe, Telemetry, VERSION},
    time::Clock,
};

/// Share of the drain timeout that is kept for writing what is left.
const SPILL_SHARE: f64 = 0.1;
/// Bounds of that time.
const SPILL_TIME: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long calls under way have to finish once everything else is done.
const SERVER_GRACE: Duration = Duration::from_millis(250);
/// How often a drain says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Why the relay did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// A vendor's client could not be built.
    #[error("{0}")]
    Provider(#[from] BuildError),
    /// There is nothing to deliver to.
    #[error("no provider: ANALYTICS_PROVIDER is \"none\" and the program adds none")]
    NoProvider,
    /// Two providers have the same name.
    #[error("two providers are named {0:?}, want each name once")]
    SameName(&'static str),
    /// An address is taken or not ours.
    #[error("{what}: cannot listen at {host}:{port}: {source}")]
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
    #[error("DATA_DIR {dir}: {source}")]
    DataDir {
        /// The directory.
        dir: String,
        /// What the system says.
        source: io::Error,
    },
}

/// A relay that is running.
#[derive(Debug)]
pub struct App {
    stop: Stop,
    admission: Arc<Admission>,
    grpc_addr: std::net::SocketAddr,
    metrics_addr: std::net::SocketAddr,
    drain_timeout: Duration,
    lanes: Vec<LaneHandle>,
    batch_worker: JoinHandle<()>,
    servers: JoinSet<()>,
    stop_servers: CancellationToken,
    /// Names of stages that have ended.
    ended: mpsc::UnboundedReceiver<&'static str>,
    clock: Clock,
    _lock: DataDirLock,
}

/// What the app holds of a lane.
#[derive(Debug)]
struct LaneHandle {
    status: Arc<LaneStatus>,
    ledger: Ledger,
    spill: SpillDir,
    running: JoinHandle<Leftover>,
}

impl App {
    /// Starts a relay to the vendors that the configuration names.
    pub async fn start(config: &Config) -> Result<Self, StartError> {
        Self::start_with(config, Vec::new()).await
    }

    /// Starts a relay to the vendors that the configuration names, and to
    /// providers of your own.
    pub async fn start_with(config: &Config, own: Vec<Arc<dyn Provider>>) -> Result<Self, StartError> {
        let providers = providers(config, own)?;
        let data_dir = |source| StartError::DataDir { dir: config.data_dir.display().to_string(), source };
        let lock = DataDirLock::acquire(&config.data_dir).map_err(data_dir)?;
        let connections_max = ingest::listener::connections_within_limits(config.grpc_connections_max);
        let clock = Clock::system();
        let stop = Stop::default();
        let (watch, ended) = StageWatch::new();
        let mut telemetry = Telemetry::new(clock.now_ms());

        let queue_limits =
            QueueLimits { events_max: config.queue_events_max, bytes_max: config.queue_bytes_max };
        let (queue_in, queue_out) = queue::bounded(queue_limits);
        let admission_metrics = telemetry.admission();
        let accepted = admission_metrics.accepted.clone();
        let admission = Arc::new(Admission::new(queue_in.clone(), clock.clone(), admission_metrics));

        let families = telemetry.lanes();
        let mut lanes = Vec::new();
        let mut groups: Vec<(BatchRule, Vec<LaneInbox>)> = Vec::new();
        let mut dead_letter_bytes: Vec<(&'static str, Probe<i64>)> = Vec::new();
        for (provider, delivery) in providers {
            let name = provider.name();
            let rule = BatchRule { events: delivery.batch_size, interval: delivery.flush_interval };
            let letters = DeadLetterWriter::open(
                &DeadLetterDir::new(&config.data_dir, name),
                config.dead_letters_bytes_max,
            )
            .map_err(data_dir)?;
            let bytes = letters.bytes();
            dead_letter_bytes
                .push((name, Box::new(move || to_i64(bytes.load(std::sync::atomic::Ordering::Relaxed)))));
            let ledger = families.ledger(name, accepted.clone());
            let (inbox, lane) =
                start_lane(config, provider, delivery, letters, &families, ledger, &clock, &stop, &watch)
                    .await
                    .map_err(data_dir)?;
            match groups.iter_mut().find(|(group, _)| *group == rule) {
                Some((_, lanes)) => lanes.push(inbox),
                None => groups.push((rule, vec![inbox])),
            }
            lanes.push(lane);
        }

        let groups = groups.into_iter().map(|(rule, lanes)| BatchGroup::new(rule, lanes)).collect();
        let worker = batch_worker::run(queue_out, groups, stop.drain_token());
        let batch_worker = tokio::spawn(watch.over("batch worker", worker));

        let statuses: Vec<_> = lanes.iter().map(|lane| lane.status.clone()).collect();
        let health = Arc::new(Health::new(stop.clone(), queue_in.clone(), statuses));
        let ingest_metrics = telemetry.ingest();
        telemetry.gauge("relay_connections_max", move || to_i64(connections_max));
        register_gauges(&mut telemetry, config, &queue_in, &lanes, dead_letter_bytes, &stop, &clock);

        let metrics_listener = listen("METRICS_HOST, METRICS_PORT", &config.metrics).await?;
        let grpc_listener = listen("GRPC_HOST, GRPC_PORT", &config.grpc).await?;
        let local = |listener: &TcpListener, what, at: &Listen| {
            listener.local_addr().map_err(|source| listen_error(what, at, source))
        };
        let metrics_addr = local(&metrics_listener, "METRICS_HOST, METRICS_PORT", &config.metrics)?;
        let grpc_addr = local(&grpc_listener, "GRPC_HOST, GRPC_PORT", &config.grpc)?;

        let stop_servers = CancellationToken::new();
        let mut servers = JoinSet::new();
        let stopped = stop_servers.clone().cancelled_owned();
        let admin = admin::serve(metrics_listener, Arc::new(telemetry), health.clone(), stopped);
        servers.spawn(watch.over("metrics server", log_failure(admin)));
        let stopped = stop_servers.clone().cancelled_owned();
        let grpc = ingest::server::serve(
            grpc_listener,
            connections_max,
            admission.clone(),
            health,
            ingest_metrics,
            stopped,
        );
        servers.spawn(watch.over("gRPC server", log_failure(grpc)));

        info!(version = VERSION, %grpc_addr, %metrics_addr, "relay started");
        Ok(Self {
            stop,
            admission,
            grpc_addr,
            metrics_addr,
            drain_timeout: config.drain_timeout,
            lanes,
            batch_worker,
            servers,
            stop_servers,
            ended,
            clock,
            _lock: lock,
        })
    }

    /// Where callers are listened for.
    pub fn grpc_addr(&self) -> std::net::SocketAddr {
        self.grpc_addr
    }

    /// Where scrapes and probes are listened for.
    pub fn metrics_addr(&self) -> std::net::SocketAddr {
        self.metrics_addr
    }

    /// Runs until the first of `signals`, then drains; a second one, or the
    /// deadline, ends the draining. A stage that ends by itself, which only a
    /// defect can make it do, counts as a signal.
    pub async fn run_until(mut self, mut signals: mpsc::Receiver<()>) -> DrainReport {
        let failed = tokio::select! {
            _ = signals.recv() => None,
            stage = self.ended.recv() => stage,
        };
        if let Some(stage) = failed {
            error!(stage, "a defect: a stage ended by itself, stopping");
        }
        self.drain(signals, failed.is_some()).await
    }

    async fn drain(mut self, mut signals: mpsc::Receiver<()>, failed: bool) -> DrainReport {
        let started = Instant::now();
        let spill_time = self.drain_timeout.mul_f64(SPILL_SHARE).clamp(SPILL_TIME.0, SPILL_TIME.1);
        let deadline = started + self.drain_timeout.saturating_sub(spill_time);
        let waiting: usize = self.lanes.iter().map(|lane| lane.status.events()).sum();
        info!(timeout_seconds = self.drain_timeout.as_secs_f64(), lane_events = waiting, "draining");

        self.admission.close();
        self.stop.drain();

        let stop = self.stop.clone();
        let statuses: Vec<_> = self.lanes.iter().map(|lane| lane.status.clone()).collect();
        let watcher = tokio::spawn(async move {
            tokio::select! {
                never = report_progress(&statuses, started) => match never {},
                _ = signals.recv() => warn!("second signal: what is left is spilled"),
                () = sleep_until(deadline) => warn!("drain deadline: what is left is spilled"),
            }
            stop.force();
        });

        if let Err(error) = (&mut self.batch_worker).await {
            error!(%error, "a defect: the batch worker failed");
        }
        let clock = self.clock.clone();
        for lane in &mut self.lanes {
            match (&mut lane.running).await {
                Ok(leftover) => {
                    let (spill, ledger, now_ms) = (lane.spill.clone(), lane.ledger.clone(), clock.now_ms());
                    let _ = spawn_blocking(move || leftover.spill(&spill, &ledger, now_ms)).await;
                }
                Err(error) => error!(provider = lane.status.provider, %error, "a defect: a lane failed"),
            }
        }
        watcher.abort();

        // Last, so that callers could be told until now.
        self.stop_servers.cancel();
        let grace = Instant::now() + SERVER_GRACE;
        while let Ok(Some(_)) = timeout_at(grace, self.servers.join_next()).await {}
        self.servers.shutdown().await;

        let balances = self.lanes.iter().map(|lane| lane.ledger.balance()).collect();
        let report = DrainReport { balances, took: started.elapsed(), failed };
        report.log();
        report
    }
}

/// Notices when a stage ends, by a panic too.
#[derive(Debug, Clone)]
struct StageWatch(mpsc::UnboundedSender<&'static str>);

impl StageWatch {
    fn new() -> (Self, mpsc::UnboundedReceiver<&'static str>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    fn over<F: Future>(&self, stage: &'static str, running: F) -> impl Future<Output = F::Output> + use<F> {
        struct Ended(&'static str, mpsc::UnboundedSender<&'static str>);
        impl Drop for Ended {
            fn drop(&mut self) {
                // Nobody listens any more once the relay drains.
                let _ = self.1.send(self.0);
            }
        }
        let ended = Ended(stage, self.0.clone());
        async move {
            let _ended = ended;
            running.await
        }
    }
}

async fn log_failure<E: std::fmt::Display>(server: impl Future<Output = Result<(), E>>) {
    if let Err(error) = server.await {
        error!(%error, "server failed");
    }
}

/// Says every second how many events each provider has not got.
async fn report_progress(lanes: &[Arc<LaneStatus>], started: Instant) -> std::convert::Infallible {
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
    if providers.is_empty() {
        return Err(StartError::NoProvider);
    }
    let mut names = std::collections::HashSet::new();
    match providers.iter().find(|(provider, _)| !names.insert(provider.name())) {
        Some((provider, _)) => Err(StartError::SameName(provider.name())),
        None => Ok(providers),
    }
}

/// How a lane delivers, from how it is configured.
pub(crate) fn lane_settings(config: &Config, delivery: DeliveryConfig) -> LaneSettings {
    LaneSettings {
        retry: RetryRule {
            attempts_max: delivery.retry_attempts_max,
            initial_delay: delivery.retry_delay_initial,
            max_delay: delivery.retry_delay_max,
        },
        capacity: QueueLimits { events_max: config.queue_events_max, bytes_max: config.queue_bytes_max },
        probe_events: delivery.batch_size,
    }
}

#[expect(clippy::too_many_arguments, reason = "wiring: one line for each thing that a lane is given")]
async fn start_lane(
    config: &Config,
    provider: Arc<dyn Provider>,
    delivery: DeliveryConfig,
    letters: DeadLetterWriter,
    families: &LaneFamilies,
    ledger: Ledger,
    clock: &Clock,
    stop: &Stop,
    watch: &StageWatch,
) -> io::Result<(LaneInbox, LaneHandle)> {
    let name = provider.name();
    let spill = SpillDir::open(&config.data_dir, name)?;
    let loading = spill.clone();
    let spilled = spawn_blocking(move || loading.load()).await.map_err(io::Error::other)??;
    if !spilled.events.is_empty() {
        info!(provider = name, event_count = spilled.events.len(), "spilled events reloaded");
        ledger.reloaded(spilled.events.len() as u64);
    }
    let status = Arc::new(LaneStatus::new(name));
    let mut lane = Lane::new(
        provider,
        lane_settings(config, delivery),
        Arc::new(RelayRecorder::new(ledger.clone(), letters, clock.clone())),
        families.of(name),
        status.clone(),
        clock.clone(),
        stop.clone(),
    );
    lane.reload(spilled);
    let (inbox, receiver) = LaneInbox::new();
    let running = tokio::spawn(watch.over(name, lane.run(receiver)));
    Ok((inbox, LaneHandle { status, ledger, spill, running }))
}

fn register_gauges(
    telemetry: &mut Telemetry,
    config: &Config,
    queue: &queue::QueueSender,
    lanes: &[LaneHandle],
    dead_letter_bytes: Vec<(&'static str, Probe<i64>)>,
    stop: &Stop,
    clock: &Clock,
) {
    let limits = queue.limits();
    let (events, bytes, draining) = (queue.clone(), queue.clone(), stop.clone());
    telemetry.gauge("relay_queue_events", move || to_i64(events.events()));
    telemetry.gauge("relay_queue_bytes", move || to_i64(bytes.bytes()));
    telemetry.gauge("relay_queue_events_max", move || to_i64(limits.events_max));
    telemetry.gauge("relay_queue_bytes_max", move || to_i64(limits.bytes_max));
    telemetry.gauge("relay_draining", move || i64::from(draining.is_draining()));

    let each = |value: fn(&LaneStatus, &Ledger, &Clock) -> i64| {
        lanes
            .iter()
            .map(|lane| {
                let (status, ledger, clock) = (lane.status.clone(), lane.ledger.clone(), clock.clone());
                let probe: Probe<i64> = Box::new(move || value(&status, &ledger, &clock));
                (lane.status.provider, probe)
            })
            .collect::<Vec<_>>()
    };
    telemetry.provider_gauge("relay_lane_events", each(|lane, _, _| to_i64(lane.events())));
    telemetry.provider_gauge("relay_lane_bytes", each(|lane, _, _| to_i64(lane.bytes())));
    telemetry.provider_gauge(
        "relay_oldest_event_age_seconds",
        each(|lane, _, clock| lane.oldest_age_ms(clock.now_ms()) / 1000),
    );
    telemetry
        .provider_gauge("relay_in_flight_events", each(|_, ledger, _| to_i64(ledger.balance().in_flight())));
    telemetry.provider_gauge(
        "relay_events_at_risk",
        each(|lane, ledger, _| to_i64(ledger.balance().in_flight()) - to_i64(lane.reloaded())),
    );
    let constant = |value: i64| {
        lanes
            .iter()
            .map(|lane| (lane.status.provider, Box::new(move || value) as Probe<i64>))
            .collect::<Vec<_>>()
    };
    telemetry.provider_gauge("relay_lane_events_max", constant(to_i64(limits.events_max)));
    telemetry.provider_gauge("relay_dead_letters_bytes", dead_letter_bytes);
    telemetry.provider_gauge("relay_dead_letters_bytes_max", constant(to_i64(config.dead_letters_bytes_max)));
    let states = lanes
        .iter()
        .map(|lane| {
            let status = lane.status.clone();
            let state: Probe<&'static str> = Box::new(move || status.state().name());
            (lane.status.provider, state)
        })
        .collect();
    telemetry.provider_states(&ProviderState::NAMES, states);
}

async fn listen(what: &'static str, at: &Listen) -> Result<TcpListener, StartError> {
    TcpListener::bind((at.host.as_str(), at.port)).await.map_err(|source| listen_error(what, at, source))
}

fn listen_error(what: &'static str, at: &Listen, source: io::Error) -> StartError {
    StartError::Listen { what, host: at.host.clone(), port: at.port, source }
}

fn to_i64(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}
