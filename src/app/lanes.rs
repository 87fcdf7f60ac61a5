//! Builds a lane with all that belongs to it, and finishes it.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use analytics_relay_providers::Provider;
use tokio::{
    sync::mpsc,
    task::{JoinHandle, spawn_blocking},
};
use tracing::{error, info, warn};

use super::watch::StageWatch;
use crate::{
    config::{Config, DeliveryConfig},
    delivery::{
        Batch, LaneInbox,
        dead_letter::{DeadLetterDir, DeadLetterWriter},
        lane::{Lane, LaneSettings, LaneStatus, Leftover},
        log_feed::LogFeed,
        recorder::RelayRecorder,
        retry::RetryRule,
        spill::SpillDir,
    },
    ledger::Ledger,
    queue::{QueueLimits, spool::LaneLog},
    shutdown::Stop,
    telemetry::LaneFamilies,
    time::Clock,
};

/// What all lanes are given.
pub(super) struct LaneBuilder<'a> {
    pub(super) config: &'a Config,
    pub(super) data_dir: &'a Path,
    pub(super) families: LaneFamilies,
    pub(super) clock: Clock,
    pub(super) stop: Stop,
}

/// A lane that is ready to run.
pub(super) struct BuiltLane {
    lane: Lane,
    receiver: mpsc::Receiver<Batch>,
    status: Arc<LaneStatus>,
    ledger: Ledger,
    dead_letters_bytes: Arc<AtomicU64>,
    spill: SpillDir,
    clock: Clock,
}

/// A lane that runs.
#[derive(Debug)]
pub(super) struct LaneHandle {
    pub(super) status: Arc<LaneStatus>,
    pub(super) ledger: Ledger,
    dead_letters_bytes: Arc<AtomicU64>,
    spill: SpillDir,
    clock: Clock,
    running: JoinHandle<Leftover>,
}

impl LaneBuilder<'_> {
    /// Builds a provider's lane, with what an earlier run has left.
    pub(super) async fn build(
        &self,
        provider: Arc<dyn Provider>,
        delivery: DeliveryConfig,
        ledger: Ledger,
        log: Option<LaneLog>,
    ) -> io::Result<(LaneInbox, BuiltLane)> {
        let name = provider.name();
        let dead_letters = DeadLetterDir::new(self.data_dir, name);
        let dead_letters = DeadLetterWriter::open(&dead_letters, self.config.dead_letters_bytes_max)?;
        let dead_letters_bytes = dead_letters.bytes();
        let spill = SpillDir::open(self.data_dir, name)?;
        let status = Arc::new(LaneStatus::new(name));
        let mut lane = Lane::new(
            provider,
            lane_settings(self.config, delivery),
            Arc::new(RelayRecorder::new(ledger.clone(), dead_letters, self.clock.clone())),
            self.families.of(name),
            status.clone(),
            self.clock.clone(),
            self.stop.clone(),
        );

        let loading = spill.clone();
        let spilled = spawn_blocking(move || loading.load()).await.map_err(io::Error::other)??;
        if !spilled.events.is_empty() {
            info!(provider = name, event_count = spilled.events.len(), "spilled events reloaded");
            ledger.reloaded(spilled.events.len() as u64);
        }
        lane.reload(spilled);

        if let Some(log) = log {
            let event_count = log.left();
            if event_count > 0 {
                info!(provider = name, event_count, "spooled events go on");
                ledger.reloaded(event_count);
            }
            lane.follow(LogFeed::new(log, self.config.spool.retention, self.clock.now_ms()));
        }

        let (inbox, receiver) = LaneInbox::new(delivery.batch_size);
        let clock = self.clock.clone();
        Ok((inbox, BuiltLane { lane, receiver, status, ledger, dead_letters_bytes, spill, clock }))
    }
}

impl BuiltLane {
    /// From here on events are sent.
    pub(super) fn run(self, watch: &StageWatch) -> LaneHandle {
        let Self { lane, receiver, status, ledger, dead_letters_bytes, spill, clock } = self;
        let running = tokio::spawn(watch.over(status.provider, lane.run(receiver)));
        LaneHandle { status, ledger, dead_letters_bytes, spill, clock, running }
    }
}

impl LaneHandle {
    /// Bytes of the provider's dead letters on disk.
    pub(super) fn dead_letters_bytes(&self) -> impl Fn() -> u64 + use<> {
        let bytes = self.dead_letters_bytes.clone();
        move || bytes.load(Ordering::Relaxed)
    }

    /// Waits until the lane has ended, and writes what it left to disk.
    pub(super) async fn finish(&mut self) {
        match (&mut self.running).await {
            Ok(leftover) => {
                let (spill, ledger, now_ms) = (self.spill.clone(), self.ledger.clone(), self.clock.now_ms());
                let spilled = spawn_blocking(move || leftover.spill(&spill, &ledger, now_ms));
                if let Err(error) = spilled.await {
                    error!(provider = self.status.provider, %error, "a defect: spilling failed");
                }
            }
            Err(error) => error!(provider = self.status.provider, %error, "a defect: a lane failed"),
        }
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
        awaits_answers: false,
    }
}

/// Says which spilled events stay on disk because no provider of that name is
/// there to get them.
pub(super) fn warn_of_forgotten_spill(data_dir: &Path, lanes: &[LaneHandle]) {
    for name in SpillDir::providers(data_dir).unwrap_or_default() {
        if !lanes.iter().any(|lane| lane.status.provider == name) {
            warn!(provider = name, "spilled events of a provider that is not named stay on disk");
        }
    }
}
