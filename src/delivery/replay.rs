//! Sends dead letters again, through a lane like any other event.
//!
//! What the provider takes is noted, durably, so that it is never sent again;
//! what it does not take stays a dead letter, as it was.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use analytics_relay_providers::Provider;
use async_trait::async_trait;
use tokio::{task::spawn_blocking, time::interval};
use tracing::error;

use super::{
    LaneInbox,
    backlog::Waiting,
    dead_letter::{DeadLetter, ReplayedLog},
    gate::ProviderState,
    lane::{Lane, LaneObservers, LaneSettings, LaneSource, LaneStatus},
    recorder::{Recorder, count_by_reason},
};
use crate::{
    queue::{Place, Queued},
    reasons::{DeadLetterReason, DropReason},
    shutdown::Stop,
    telemetry::LaneMetrics,
    time::Clock,
};

/// How often it is looked whether the provider refuses everything.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// What a replay did.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct ReplayReport {
    /// Letters that the provider took.
    pub(crate) delivered: u64,
    /// Letters that it did not take again, by the new reason.
    pub(crate) failed: BTreeMap<DeadLetterReason, u64>,
    /// Letters that it took, which could not be noted: another replay would
    /// send them again.
    pub(crate) unnoted: u64,
    /// Identifies that were not asked for.
    pub(crate) skipped: u64,
    /// Letters that were not tried to the end.
    pub(crate) left: u64,
    /// The provider refuses our key, our address, or all that it was sent: its words.
    pub(crate) refused: Option<String>,
    /// It is the key or the address: no other letter can do better.
    pub(crate) unauthorized: bool,
}

impl ReplayReport {
    /// Adds another part of the same replay.
    pub(crate) fn add(&mut self, part: Self) {
        self.delivered += part.delivered;
        for (reason, letters) in part.failed {
            *self.failed.entry(reason).or_default() += letters;
        }
        self.unnoted += part.unnoted;
        self.skipped += part.skipped;
        self.left += part.left;
        self.refused = self.refused.take().or(part.refused);
        self.unauthorized |= part.unauthorized;
    }
}

/// Sends letters again, until each was tried to the end, the provider refuses
/// everything, or `stop` is forced.
pub(crate) async fn replay(
    provider: Arc<dyn Provider>,
    settings: LaneSettings,
    letters: Vec<DeadLetter>,
    log: &Arc<Mutex<ReplayedLog>>,
    metrics: LaneMetrics,
    stop: &Stop,
) -> ReplayReport {
    let recorder = Arc::new(ReplayRecorder::new(log));
    let status = Arc::new(LaneStatus::new(provider.name()));
    let stop = stop.child();
    // An answer that is not waited for would be a letter sent twice.
    let settings = LaneSettings { awaits_answers: true, ..settings };
    let (inbox, receiver) = LaneInbox::new(1);
    let lane = Lane::new(
        provider,
        settings,
        LaneSource::memory(receiver),
        LaneObservers { recorder: recorder.clone(), metrics, status: status.clone() },
        Clock::system(),
        stop.clone(),
    );

    let mut seen = HashSet::new();
    let first_copy = |letter: DeadLetter| {
        let event = letter.event;
        seen.insert(event.id().into_owned()).then_some(Queued { event, place: Place::MEMORY })
    };
    inbox.send(letters.into_iter().filter_map(first_copy).collect()).await;
    drop(inbox);

    let mut watch = interval(WATCH_INTERVAL);
    let running = lane.run();
    tokio::pin!(running);
    let leftover = loop {
        tokio::select! {
            leftover = &mut running => break leftover,
            _ = watch.tick() => {
                if status.state() >= ProviderState::Refusing {
                    stop.force();
                }
            }
        }
    };
    ReplayReport {
        delivered: recorder.delivered.load(Ordering::Relaxed),
        failed: recorder.failed.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        unnoted: recorder.unnoted.load(Ordering::Relaxed),
        skipped: 0,
        left: leftover.events.len() as u64,
        refused: status.trouble().filter(|_| status.state() >= ProviderState::Refusing),
        unauthorized: status.state() == ProviderState::Paused,
    }
}

struct ReplayRecorder {
    log: Arc<Mutex<ReplayedLog>>,
    delivered: AtomicU64,
    unnoted: AtomicU64,
    failed: Mutex<BTreeMap<DeadLetterReason, u64>>,
}

impl ReplayRecorder {
    fn new(log: &Arc<Mutex<ReplayedLog>>) -> Self {
        Self {
            log: log.clone(),
            delivered: AtomicU64::new(0),
            unnoted: AtomicU64::new(0),
            failed: Mutex::default(),
        }
    }
}

#[async_trait]
impl Recorder for ReplayRecorder {
    async fn delivered(&self, events: &[Waiting]) {
        let ids: Vec<_> = events.iter().map(|waiting| waiting.event.id().into_owned()).collect();
        let count = ids.len() as u64;
        let log = self.log.clone();
        let noted = spawn_blocking(move || log.lock().unwrap_or_else(PoisonError::into_inner).append(&ids));
        if !matches!(noted.await, Ok(Ok(()))) {
            self.unnoted.fetch_add(count, Ordering::Relaxed);
            error!(event_count = count, "replayed events could not be noted");
        }
        self.delivered.fetch_add(count, Ordering::Relaxed);
    }

    /// They are dead letters already.
    async fn dead_lettered(&self, letters: Vec<DeadLetter>) -> Result<(), DropReason> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        for (reason, count) in count_by_reason(&letters) {
            *failed.entry(reason).or_default() += count;
        }
        Ok(())
    }

    /// And stay so.
    fn dropped(&self, _: DropReason, _: usize) {}
}
