//! Builds a lane with all that belongs to it, and finishes it.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use analytics_relay_providers::Provider;
use tokio::{
    sync::{mpsc, watch},
    task::{JoinHandle, spawn_blocking},
};
use tracing::{error, info, warn};

use super::{Configured, watch::StageWatch};
use crate::{
    batch_worker::{BatchGroup, BatchRule},
    config::{Config, DeliveryConfig},
    delivery::{
        Batch, LaneInbox,
        dead_letter::DeadLetterDir,
        lane::{ASIDE_EVENTS_MAX, Lane, LaneObservers, LaneSettings, LaneSource, LaneStatus, Leftover},
        recorder::RelayRecorder,
        spill::{LoadError, SpillDir},
        suspension::Suspension,
        unnamed::Unnamed,
    },
    ledger::Ledger,
    letter_files::LetterWriter,
    privacy::suppression::Suppressed,
    queue::spool::{LaneLog, OpenedSpool},
    reasons::Outcome,
    sealing::Sealing,
    shutdown::Stop,
    telemetry::LaneFamilies,
    time::Clock,
};

/// What all lanes are given.
pub(super) struct LaneBuilder<'a> {
    pub(super) config: &'a Config,
    pub(super) data_dir: &'a Path,
    pub(super) families: LaneFamilies,
    pub(super) sealing: &'a Sealing,
    pub(super) clock: Clock,
    pub(super) stop: Stop,
    /// Providers that a person has stopped.
    pub(super) suspended: BTreeMap<String, Suspension>,
    /// Users of whom nothing is delivered.
    pub(super) suppressed: Arc<Suppressed>,
}

/// A lane that is ready to run.
pub(super) struct BuiltLane {
    lane: Lane,
    suspended: watch::Sender<bool>,
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
    /// Builds the lanes of all providers, in their order, and the batches that are gathered for
    /// those of one rule together.
    pub(super) async fn build_all(
        &self,
        providers: Vec<Configured>,
        ledgers: &[Ledger],
        spool: Option<&OpenedSpool>,
    ) -> Result<(Vec<BuiltLane>, Vec<BatchGroup>), LoadError> {
        let mut lanes = Vec::with_capacity(providers.len());
        let mut groups: Vec<(BatchRule, Vec<LaneInbox>)> = Vec::new();
        for (place, (provider, delivery)) in providers.into_iter().enumerate() {
            let log = spool.map(|spool| spool.lane_log(place));
            let (inbox, lane) = self.build(provider, delivery, ledgers[place].clone(), log).await?;
            lanes.push(lane);
            match groups.iter_mut().find(|(group, _)| *group == delivery.batch) {
                Some((_, inboxes)) => inboxes.push(inbox),
                None => groups.push((delivery.batch, vec![inbox])),
            }
        }
        let groups = groups.into_iter().map(|(rule, inboxes)| BatchGroup::new(rule, inboxes)).collect();
        Ok((lanes, groups))
    }

    /// Builds a provider's lane, with what an earlier run has left.
    async fn build(
        &self,
        provider: Arc<dyn Provider>,
        delivery: DeliveryConfig,
        ledger: Ledger,
        log: Option<LaneLog>,
    ) -> Result<(LaneInbox, BuiltLane), LoadError> {
        let name = provider.name();
        let dead_letters = DeadLetterDir::new(self.data_dir, name);
        let dead_letters =
            LetterWriter::open(&dead_letters, self.config.dead_letters.bytes_max)?.sealing(self.sealing);
        let dead_letters_bytes = dead_letters.bytes();
        let spill = SpillDir::open(self.data_dir, name)?.sealing(self.sealing);
        let status = Arc::new(LaneStatus::new(name));
        let (inbox, receiver) = LaneInbox::new(delivery.batch.events);
        let source = match log {
            Some(log) => self.followed(name, log, &ledger, receiver),
            None => LaneSource::memory(receiver),
        };
        let observers = LaneObservers {
            recorder: Arc::new(RelayRecorder::new(ledger.clone(), dead_letters, self.clock.clone())),
            metrics: self.families.of(name),
            status: status.clone(),
        };
        let mut lane = Lane::new(
            provider,
            lane_settings(self.config, delivery),
            source,
            observers,
            self.clock.clone(),
            self.stop.clone(),
        );

        let (loading, passes_unreadable) = (spill.clone(), self.config.sealing.quarantine_unreadable);
        let loaded = spawn_blocking(move || loading.load(passes_unreadable));
        let spilled = loaded.await.map_err(io::Error::other)??;
        for (why, event_count) in spilled.lost().into_iter().filter(|(_, events)| *events > 0) {
            error!(provider = name, event_count, reason = why.name(), "spilled events lost");
            ledger.reloaded(event_count);
            ledger.ended(Outcome::Dropped(why), event_count);
        }
        if !spilled.events.is_empty() {
            info!(provider = name, event_count = spilled.events.len(), "spilled events reloaded");
            ledger.reloaded(spilled.events.len() as u64);
        }
        lane.leave_out(self.suppressed.clone());
        lane.reload(spilled);

        if let Some(Suspension { note, .. }) = self.suspended.get(name) {
            warn!(provider = name, note, "provider is suspended: its events wait");
        }
        let suspended = watch::Sender::new(self.suspended.contains_key(name));
        lane.suspend_while(suspended.subscribe());
        let clock = self.clock.clone();
        Ok((inbox, BuiltLane { lane, suspended, status, ledger, dead_letters_bytes, spill, clock }))
    }

    /// A source whose events stand in the log, with what an earlier run has left there.
    fn followed(
        &self,
        provider: &'static str,
        log: LaneLog,
        ledger: &Ledger,
        inbox: mpsc::Receiver<Batch>,
    ) -> LaneSource {
        let event_count = log.left();
        if event_count > 0 {
            info!(provider, event_count, "spooled events go on");
            ledger.reloaded(event_count);
        }
        LaneSource::logged(inbox, log, self.config.spool.retention)
    }
}

impl BuiltLane {
    /// Stops the provider, and lets it go on.
    pub(super) fn switch(&self) -> (&'static str, watch::Sender<bool>) {
        (self.status.provider, self.suspended.clone())
    }

    /// From here on events are sent.
    pub(super) fn run(self, watch: &StageWatch) -> LaneHandle {
        let Self { lane, status, ledger, dead_letters_bytes, spill, clock, .. } = self;
        let running = tokio::spawn(watch.over(status.provider, lane.run()));
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
        retry: delivery.retry,
        capacity: config.queue,
        probe_events: delivery.batch.events,
        awaits_answers: false,
        convicts_at_once: false,
        aside_events_max: ASIDE_EVENTS_MAX,
    }
}

/// Those who look after what the log holds for providers that are not named.
pub(super) fn of_unnamed(builder: &LaneBuilder<'_>, spool: &OpenedSpool) -> Vec<Unnamed> {
    let status = spool.spool().status();
    let unnamed = status.unnamed().iter().enumerate().map(|(place, cursor)| {
        Unnamed::new(
            cursor.provider.clone(),
            spool.lane_log(status.named().len() + place),
            builder.data_dir,
            builder.config.dead_letters.bytes_max,
            builder.config.spool.retention,
            builder.clock.clone(),
        )
        .leave_out(builder.suppressed.clone())
        .sealing(builder.sealing)
    });
    unnamed.collect()
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
