//! What the relay says of itself when it is asked.

use std::sync::{Arc, atomic::Ordering};

use tokio::sync::watch;

use crate::{
    delivery::lane::LaneStatus,
    enrich::enricher::Enricher,
    privacy::suppression::Suppressed,
    queue::{
        memory::QueueSender,
        spool::{SharedStatus, WhenFull},
    },
    shutdown::Stop,
    store::status::StoreStatus,
};

/// Share of the queue's limits above which the relay calls itself degraded.
const QUEUE_SHARE_MAX: f64 = 0.9;

/// Looks at every stage that can be in trouble.
#[derive(Debug)]
pub(crate) struct Health {
    stop: Stop,
    queue: QueueSender,
    lanes: Vec<Arc<LaneStatus>>,
    spool: Option<Arc<SharedStatus>>,
    suppressed: Option<Arc<Suppressed>>,
    enricher: Option<Arc<Enricher>>,
    store: Option<Arc<StoreStatus>>,
}

impl Health {
    pub(crate) fn new(
        stop: Stop,
        queue: QueueSender,
        lanes: Vec<Arc<LaneStatus>>,
        spool: Option<Arc<SharedStatus>>,
    ) -> Self {
        Self { stop, queue, lanes, spool, suppressed: None, enricher: None, store: None }
    }

    /// Steps of enrichment that are switched off are told.
    pub(crate) fn with_enricher(self, enricher: Option<Arc<Enricher>>) -> Self {
        Self { enricher, ..self }
    }

    /// The list of erased users is looked at too.
    pub(crate) fn with_list(self, suppressed: Arc<Suppressed>) -> Self {
        Self { suppressed: Some(suppressed), ..self }
    }

    /// A store that is damaged, or not open, is told.
    pub(crate) fn with_store(self, store: Option<Arc<StoreStatus>>) -> Self {
        Self { store, ..self }
    }

    /// `SERVING`, `DRAINING` or `DEGRADED: <why>`.
    pub(crate) fn status(&self) -> String {
        if self.is_draining() {
            return "DRAINING".to_owned();
        }
        let troubles = self.troubles();
        if troubles.is_empty() { "SERVING".to_owned() } else { format!("DEGRADED: {}", troubles.join("; ")) }
    }

    /// True while the relay can take events, or will by itself.
    pub(crate) fn is_ready(&self) -> bool {
        let is_broken = |spool: &Arc<SharedStatus>| *spool.broken.borrow();
        !self.is_draining() && !self.spool.as_ref().is_some_and(is_broken)
    }

    /// True once the relay takes no more events.
    pub(crate) fn is_draining(&self) -> bool {
        self.stop.is_refusing()
    }

    /// Waits until the relay takes no more events.
    pub(crate) async fn draining(&self) {
        self.stop.refusing().await;
    }

    /// Changes when the disk of the log fails, or works again.
    pub(crate) fn spool_broken(&self) -> watch::Receiver<bool> {
        match &self.spool {
            Some(spool) => spool.broken.subscribe(),
            None => watch::Sender::new(false).subscribe(),
        }
    }

    fn troubles(&self) -> Vec<String> {
        let lanes = self.lanes.iter();
        let lanes = lanes.filter_map(|lane| Some(format!("{} {}", lane.provider, lane.trouble()?)));
        let full = self.lanes.iter().filter(|lane| lane.is_full());
        let full = full.map(|lane| format!("the lane of {} is full", lane.provider));
        let letters = self.lanes.iter().filter(|lane| lane.dead_letters_fail());
        let letters = letters.map(|lane| format!("dead letters of {} cannot be written", lane.provider));
        let unreadable = self.lanes.iter().filter(|lane| lane.cannot_read());
        let unreadable = unreadable.map(|lane| format!("the spool cannot be read for {}", lane.provider));
        lanes
            .chain(full)
            .chain(letters)
            .chain(unreadable)
            .chain(self.list_trouble())
            .chain(self.enrichment_trouble())
            .chain(self.store.iter().flat_map(|store| store.troubles()))
            .chain(self.queue_trouble())
            .chain(self.spool_trouble())
            .chain(self.spool_backlogs())
            .collect()
    }

    fn enrichment_trouble(&self) -> Option<String> {
        let off = self.enricher.as_ref()?.switched_off();
        (!off.is_empty()).then(|| format!("enrichment is switched off after panics: {}", off.join(", ")))
    }

    fn list_trouble(&self) -> Option<String> {
        let unreadable = self.suppressed.as_ref().is_some_and(|list| list.is_unreadable());
        unreadable.then(|| "the list of erased users cannot be read: the last one holds".to_owned())
    }

    fn spool_trouble(&self) -> Option<String> {
        let spool = self.spool.as_ref()?;
        let state = spool.state();
        (state != SharedStatus::WRITING).then(|| format!("the spool is {state}: events are refused"))
    }

    /// Who fills the log, and what can be done about it.
    fn spool_backlogs(&self) -> Vec<String> {
        let Some(spool) = &self.spool else { return Vec::new() };
        let filling = spool.named().iter().filter(|cursor| cursor.is_filling.load(Ordering::Relaxed));
        let then = match spool.when_full {
            WhenFull::Reject => "new events are refused when it is full",
            WhenFull::DeadLetterOldest => "its oldest events become dead letters when it is full",
        };
        let filling = filling.map(|cursor| {
            let share = cursor.share() * 100.0;
            format!("{} has used up {share:.0} % of its share of the spool: {then}", cursor.provider)
        });
        let unnamed = spool.unnamed().iter().filter_map(|cursor| {
            let (provider, events) = (&cursor.provider, cursor.pending.load(Ordering::Relaxed));
            (events > 0).then(|| {
                format!(
                    "the spool keeps {events} events of {provider}, which is not named: \
                     name it, or run analytics-relay spool forget {provider}"
                )
            })
        });
        filling.chain(unnamed).collect()
    }

    #[expect(clippy::cast_precision_loss, reason = "a share")]
    fn queue_trouble(&self) -> Option<String> {
        let limits = self.queue.limits();
        let events = self.queue.events() as f64 / limits.events_max as f64;
        let bytes = self.queue.bytes() as f64 / limits.bytes_max as f64;
        let share = events.max(bytes);
        (share > QUEUE_SHARE_MAX).then(|| format!("the queue is {:.0} % full", share * 100.0))
    }
}
