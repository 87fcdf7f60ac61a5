//! Gathers events into batches and hands each batch to the lanes.
//!
//! One task. A batch leaves when it is full, or when its first event has waited
//! for the interval, whichever is first. The rule is a pure value; the loop
//! below it shows all the control flow.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use analytics_relay_providers::registry::Vendor;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    delivery::{Batch, LaneInbox},
    queue::{Queued, memory::QueueReceiver},
    settings::{Reader, name_for},
    telemetry::{HeldBack, LogBudget},
};

/// When a batch leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchRule {
    /// With this many events.
    pub events: usize,
    /// Or this long after its first event.
    pub interval: Duration,
}

impl BatchRule {
    pub(crate) fn read(reader: &mut Reader, vendor: Option<Vendor>) -> Self {
        Self {
            events: reader.number(&name_for(vendor, "BATCH_SIZE"), 1..=2000),
            interval: reader.seconds(&name_for(vendor, "FLUSH_INTERVAL_SECONDS"), 0.01..=3600.0),
        }
    }
}

/// Why a batch left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trigger {
    Full,
    Interval,
    Drain,
}

/// Lanes that share a rule, and the batch that is being gathered for them.
pub(crate) struct BatchGroup {
    rule: BatchRule,
    lanes: Vec<LaneInbox>,
    events: Vec<Queued>,
    /// When the first of `events` came; meaningless without any.
    first_at: Instant,
}

impl BatchGroup {
    pub(crate) fn new(rule: BatchRule, lanes: Vec<LaneInbox>) -> Self {
        Self { rule, lanes, events: Vec::with_capacity(rule.events), first_at: Instant::now() }
    }

    fn push(&mut self, event: Queued, now: Instant) {
        if self.events.is_empty() {
            self.first_at = now;
        }
        self.events.push(event);
    }

    /// Events that fit until the batch is full.
    fn room(&self) -> usize {
        self.rule.events - self.events.len()
    }

    fn deadline(&self) -> Option<Instant> {
        (!self.events.is_empty()).then(|| self.first_at + self.rule.interval)
    }

    fn trigger(&self, now: Instant) -> Option<Trigger> {
        if self.room() == 0 {
            Some(Trigger::Full)
        } else if self.deadline().is_some_and(|deadline| deadline <= now) {
            Some(Trigger::Interval)
        } else {
            None
        }
    }

    /// Hands the batch to the lanes, which take it in at once: they wait neither for
    /// their provider nor for their disk.
    async fn flush(&mut self, trigger: Trigger, lines: &mut LogBudget) {
        let batch: Batch = self.events.drain(..).collect();
        if lines.takes(batch.len(), Instant::now().into_std()) {
            info!(event_count = batch.len(), trigger = ?trigger, "flushing batch");
        }
        for lane in &self.lanes {
            lane.send(batch.clone()).await;
        }
    }
}

/// When the oldest event of the batches that are being gathered was accepted;
/// shared with the metric.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gathering(Arc<AtomicI64>);

impl Gathering {
    /// In Unix milliseconds.
    pub(crate) fn oldest_accepted_ms(&self) -> Option<i64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|oldest_ms| *oldest_ms != 0)
    }

    fn publish(&self, groups: &[BatchGroup]) {
        let oldest = groups.iter().filter_map(|group| Some(group.events.first()?.event.accepted_ms())).min();
        self.0.store(oldest.unwrap_or(0), Ordering::Relaxed);
    }
}

/// Runs until the queue is empty after `closing`, then flushes what is left and
/// lets go of the lanes.
pub(crate) async fn run(
    mut queue: QueueReceiver,
    mut groups: Vec<BatchGroup>,
    gathering: Gathering,
    closing: CancellationToken,
) {
    info!(
        batch_size = groups.first().map(|group| group.rule.events),
        flush_interval_seconds = groups.first().map(|group| group.rule.interval.as_secs_f64()),
        "batch worker started"
    );
    let mut closed = false;
    let mut incoming = Vec::new();
    let mut lines = LogBudget::default();
    loop {
        let room = groups.iter().map(BatchGroup::room).min().unwrap_or(1);
        let summed_up_at = lines.due_at().map(Instant::from_std);
        let deadline = groups.iter().filter_map(BatchGroup::deadline).chain(summed_up_at).min();
        tokio::select! {
            received = queue.recv_many(&mut incoming, room) => {
                if received == 0 {
                    break;
                }
            }
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {}
            () = closing.cancelled(), if !closed => {
                closed = true;
                queue.close();
            }
        }

        let now = Instant::now();
        for event in incoming.drain(..) {
            for group in &mut groups {
                group.push(event.clone(), now);
            }
        }
        for group in &mut groups {
            if let Some(trigger) = group.trigger(now) {
                group.flush(trigger, &mut lines).await;
            }
        }
        sum_up(lines.due(now.into_std()));
        gathering.publish(&groups);
    }
    for group in groups.iter_mut().filter(|group| !group.events.is_empty()) {
        group.flush(Trigger::Drain, &mut lines).await;
    }
    sum_up(lines.rest());
    gathering.publish(&groups);
}

/// The line that stands for those which were too many in their second.
fn sum_up(held: Option<HeldBack>) {
    if let Some(HeldBack { lines, events }) = held {
        info!(event_count = events, lines, "flushing batch");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        delivery::test_support::{inbox, queued},
        queue::{
            QueueLimits,
            memory::{self, QueueSender},
        },
    };

    const INTERVAL: Duration = Duration::from_secs(10);

    struct Worker {
        queue: QueueSender,
        lanes: Vec<mpsc::Receiver<Batch>>,
        closing: CancellationToken,
    }

    fn start(rules: &[BatchRule]) -> Worker {
        let (sender, receiver) = memory::bounded(QueueLimits { events_max: 10_000, bytes_max: usize::MAX });
        let (groups, lanes) = rules
            .iter()
            .map(|rule| {
                let (inbox, lane) = inbox();
                (BatchGroup::new(*rule, vec![inbox]), lane)
            })
            .unzip();
        let closing = CancellationToken::new();
        tokio::spawn(run(receiver, groups, Gathering::default(), closing.clone()));
        Worker { queue: sender, lanes, closing }
    }

    fn rule(events: usize) -> BatchRule {
        BatchRule { events, interval: INTERVAL }
    }

    async fn sizes(lane: &mut mpsc::Receiver<Batch>) -> Vec<usize> {
        let mut sizes = Vec::new();
        while let Some(batch) = lane.recv().await {
            sizes.push(batch.len());
        }
        sizes
    }

    #[tokio::test(start_paused = true)]
    async fn the_fiftieth_event_flushes_at_once() {
        let mut worker = start(&[rule(50)]);
        let start = Instant::now();
        for _ in 0..50 {
            worker.queue.offer(queued("a")).unwrap();
        }
        assert_eq!(worker.lanes[0].recv().await.unwrap().len(), 50);
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_short_batch_leaves_an_interval_after_its_first_event() {
        let mut worker = start(&[rule(50)]);
        let start = Instant::now();
        worker.queue.offer(queued("a")).unwrap();
        tokio::time::sleep(Duration::from_secs(7)).await;
        worker.queue.offer(queued("b")).unwrap();
        assert_eq!(worker.lanes[0].recv().await.unwrap().len(), 2);
        let elapsed = start.elapsed();
        assert!(elapsed >= INTERVAL && elapsed < INTERVAL + Duration::from_millis(5), "{elapsed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_worker_flushes_nothing() {
        let mut worker = start(&[rule(50)]);
        tokio::time::sleep(INTERVAL * 5).await;
        assert!(worker.lanes[0].try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn closing_flushes_the_short_batch_at_once_and_ends() {
        let mut worker = start(&[rule(50)]);
        let start = Instant::now();
        for _ in 0..120 {
            worker.queue.offer(queued("a")).unwrap();
        }
        worker.closing.cancel();
        assert_eq!(sizes(&mut worker.lanes[0]).await, [50, 50, 20]);
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert!(worker.queue.offer(queued("late")).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn each_group_follows_its_own_rule() {
        let quick = BatchRule { events: 100, interval: Duration::from_secs(1) };
        let mut worker = start(&[rule(2), quick]);
        for _ in 0..5 {
            worker.queue.offer(queued("a")).unwrap();
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        worker.closing.cancel();
        assert_eq!(sizes(&mut worker.lanes[0]).await, [2, 2, 1]);
        assert_eq!(sizes(&mut worker.lanes[1]).await, [5]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the arrivals: no batch is over its size, none is empty,
        /// nothing is lost or sent twice, the order is kept, and no event waits
        /// longer than the interval.
        #[test]
        fn the_rule_holds_for_any_arrivals(size in 1_usize..20, gaps in prop::collection::vec(0_u64..15_000, 1..60)) {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .unwrap();
            runtime.block_on(async {
                let mut worker = start(&[rule(size)]);
                let mut lane = worker.lanes.remove(0);
                let arrivals = tokio::spawn(async move {
                    for (index, gap) in gaps.iter().enumerate() {
                        tokio::time::sleep(Duration::from_millis(*gap)).await;
                        worker.queue.offer(queued(&index.to_string())).unwrap();
                    }
                    tokio::time::sleep(INTERVAL * 2).await;
                    worker.closing.cancel();
                    gaps
                });
                let mut seen = Vec::new();
                let start = Instant::now();
                while let Some(batch) = lane.recv().await {
                    assert!(!batch.is_empty() && batch.len() <= size);
                    seen.extend(batch.iter().map(|queued| (queued.event.name().unwrap().to_owned(), start.elapsed())));
                }
                let gaps = arrivals.await.unwrap();
                let mut arrived = Duration::ZERO;
                assert_eq!(seen.len(), gaps.len());
                for (index, (name, left)) in seen.iter().enumerate() {
                    arrived += Duration::from_millis(gaps[index]);
                    assert_eq!(name, &index.to_string());
                    let waited = left.saturating_sub(arrived);
                    // tokio's timers are exact to a millisecond each.
                    assert!(waited <= INTERVAL + Duration::from_millis(70), "{waited:?}");
                }
            });
        }
    }
}
