//! Gauges that show live values of the stages.

use std::sync::{Arc, atomic::Ordering};

use analytics_relay_store::sqlite::Stats;

use super::lanes::LaneHandle;
use crate::{
    batch_worker::Gathering,
    config::Config,
    delivery::{gate::ProviderState, lane::LaneStatus},
    ledger::Ledger,
    query::Query,
    queue::{
        memory::QueueSender,
        spool::{CursorStatus, SharedStatus, Spool},
    },
    reasons::STORE,
    shutdown::Stop,
    store::{
        OpenStore,
        status::{Connections, ServerStats},
    },
    telemetry::{Probe, Telemetry},
    time::Clock,
};

/// The queue against its limits.
pub(super) fn of_queue(telemetry: &mut Telemetry, queue: &QueueSender, stop: &Stop) {
    let limits = queue.limits();
    let (events, bytes, draining) = (queue.clone(), queue.clone(), stop.clone());
    telemetry.gauge("relay_queue_events", move || to_i64(events.events()));
    telemetry.gauge("relay_queue_bytes", move || to_i64(bytes.bytes()));
    telemetry.gauge("relay_queue_events_max", move || to_i64(limits.events_max));
    telemetry.gauge("relay_queue_bytes_max", move || to_i64(limits.bytes_max));
    telemetry.gauge("relay_draining", move || i64::from(draining.is_refusing()));
}

/// What is known of what the store said.
pub(super) fn of_query(telemetry: &mut Telemetry, query: &Arc<Query>) {
    let (kept, shared) = (query.clone(), query.clone());
    telemetry.gauge("relay_query_cache_bytes", move || to_i64(kept.cached_bytes()));
    telemetry.gauge("relay_redis_connected", move || i64::from(shared.is_connected()));
}

/// The log against its limits, and how far each provider has come in it.
pub(super) fn of_spool(telemetry: &mut Telemetry, config: &Config, spool: &Spool) {
    let live = |value: fn(&SharedStatus) -> u64| {
        let status = spool.status().clone();
        move || to_i64(value(&status))
    };
    telemetry.gauge("relay_spool_bytes", live(|status| status.bytes.load(Ordering::Relaxed)));
    telemetry.gauge("relay_spool_segments", live(|status| status.segments.load(Ordering::Relaxed)));
    telemetry
        .gauge("relay_spool_damaged_ranges", live(|status| status.damaged_ranges.load(Ordering::Relaxed)));
    telemetry.gauge(
        "relay_spool_quarantine_bytes",
        live(|status| status.quarantine_bytes.load(Ordering::Relaxed)),
    );
    telemetry.gauge(
        "relay_spool_unnamed_events",
        live(|status| status.unnamed().iter().map(|cursor| cursor.pending.load(Ordering::Relaxed)).sum()),
    );
    let bytes_max = config.spool.limits.bytes_max;
    telemetry.gauge("relay_spool_bytes_max", move || to_i64(bytes_max));
    let intake = spool.clone();
    telemetry.gauge("relay_spool_intake_events", move || to_i64(intake.intake_events()));
    let status = spool.status().clone();
    telemetry.spool_states(&SharedStatus::STATES, Box::new(move || status.state()));
}

/// Each lane, its account and its disk.
pub(super) fn of_lanes(
    telemetry: &mut Telemetry,
    config: &Config,
    lanes: &[LaneHandle],
    gathering: &Gathering,
    clock: &Clock,
    spool: Option<&Arc<SharedStatus>>,
) {
    let mut register = |name, probe: &dyn Fn(&LaneHandle) -> Probe<i64>| {
        let values = lanes.iter().map(|lane| (lane.status.provider, probe(lane))).collect();
        telemetry.provider_gauge(name, values);
    };
    let constant = |value: i64| move |_: &LaneHandle| -> Probe<i64> { Box::new(move || value) };
    register("relay_lane_events", &|lane| of_status(lane, LaneStatus::events));
    register("relay_lane_bytes", &|lane| of_status(lane, LaneStatus::bytes));
    register("relay_lane_events_max", &constant(to_i64(config.queue.events_max)));
    register("relay_lane_bytes_max", &constant(to_i64(config.queue.bytes_max)));
    register("relay_in_flight_events", &|lane| {
        let ledger = lane.ledger.clone();
        Box::new(move || in_flight(&ledger))
    });
    register("relay_events_at_risk", &|lane| {
        let (ledger, status, spool) = (lane.ledger.clone(), lane.status.clone(), spool.cloned());
        Box::new(move || match &spool {
            Some(spool) => to_i64(spool.events_at_risk()),
            // What was reloaded is on disk still.
            None => (in_flight(&ledger) - to_i64(status.reloaded())).max(0),
        })
    });
    register("relay_oldest_event_age_seconds", &|lane| {
        let (status, gathering, clock) = (lane.status.clone(), gathering.clone(), clock.clone());
        Box::new(move || oldest_age_seconds(&status, &gathering, clock.now_ms()))
    });
    register("relay_dead_letters_bytes", &|lane| {
        let bytes = lane.dead_letters_bytes();
        Box::new(move || to_i64(bytes()))
    });
    register("relay_dead_letters_bytes_max", &constant(to_i64(config.dead_letters.bytes_max)));
    if let Some(spool) = spool {
        let cursor = |lane: &LaneHandle, value: fn(&CursorStatus) -> u64| -> Probe<i64> {
            let (spool, provider) = (spool.clone(), lane.status.provider);
            let value =
                move || spool.cursors.iter().find(|cursor| cursor.provider == provider).map_or(0, value);
            Box::new(move || to_i64(value()))
        };
        register("relay_spool_backlog_events", &|lane| {
            cursor(lane, |cursor| cursor.pending.load(Ordering::Relaxed))
        });
        register("relay_spool_backlog_bytes", &|lane| {
            cursor(lane, |cursor| cursor.bytes.load(Ordering::Relaxed))
        });
        register("relay_spool_backlog_bytes_max", &|lane| cursor(lane, |cursor| cursor.bytes_max));
        register("relay_spool_filling", &|lane| {
            cursor(lane, |cursor| u64::from(cursor.is_filling.load(Ordering::Relaxed)))
        });
    }

    let state = |lane: &LaneHandle| -> (&'static str, Probe<&'static str>) {
        let status = lane.status.clone();
        (status.provider, Box::new(move || status.state().name()))
    };
    telemetry.provider_states(&ProviderState::NAMES, lanes.iter().map(state).collect());
}

/// The store: what is in it, and how far it is behind.
pub(super) fn of_store(telemetry: &mut Telemetry, store: &OpenStore, lanes: &[LaneHandle], clock: &Clock) {
    let status = &store.status;
    let live = |value: fn(&Stats) -> u64| {
        let status = status.clone();
        move || to_i64(value(&status.stats()))
    };
    telemetry.gauge("relay_store_hot_events", live(|stats| stats.hot_events));
    telemetry.gauge("relay_store_blocks", live(|stats| stats.blocks));
    telemetry.gauge("relay_store_free_bytes", live(|stats| stats.free_bytes));
    telemetry.gauge("relay_store_damaged", live(|stats| stats.damaged_batches + stats.damaged_reads));
    telemetry.gauge("relay_store_blocks_failed", live(|stats| stats.seals_failed));
    // What only a file has is 0 of a server, and the other way round.
    let both = |of_file: fn(&Stats) -> u64, of_server: fn(&ServerStats) -> u64| {
        let status = status.clone();
        move || to_i64(of_file(&status.stats()) + of_server(&status.server_stats()))
    };
    telemetry.gauge("relay_store_events", both(|stats| stats.events, |stats| stats.events));
    telemetry.gauge("relay_store_file_bytes", both(|stats| stats.file_bytes, |stats| stats.bytes));
    telemetry.gauge("relay_store_default_events", both(|_| 0, |stats| stats.default_events));
    telemetry
        .gauge("relay_store_links_refused", both(|stats| stats.links_refused, |stats| stats.links_refused));
    telemetry.gauge(
        "relay_store_aliases_refused",
        both(|stats| stats.aliases_refused, |stats| stats.aliases_refused),
    );
    telemetry.gauge(
        "relay_store_traits_refused",
        both(|stats| stats.traits_refused, |stats| stats.traits_refused),
    );
    telemetry.gauge(
        "relay_store_sources_refused",
        both(|stats| stats.sources_refused, |stats| stats.sources_refused),
    );
    telemetry.gauge("relay_store_slow", both(|_| 0, |stats| stats.slow));
    let connections = |value: fn(Connections) -> usize| {
        let store = store.clone();
        move || to_i64(value(store.connections()))
    };
    telemetry.gauge("relay_store_connections_in_use", connections(|now| now.in_use));
    telemetry.gauge("relay_store_connections_idle", connections(|now| now.idle));
    telemetry.gauge("relay_store_connections_waiting", connections(|now| now.waiting));
    let (open, aside) = (status.clone(), status.clone());
    telemetry.gauge("relay_store_open", move || i64::from(open.is_open()));
    telemetry.gauge("relay_store_set_aside", move || i64::from(aside.is_set_aside()));
    if let Some(lane) = lanes.iter().find(|lane| lane.status.provider == STORE) {
        let (kept, clock) = (status.clone(), clock.clone());
        let (ledger, lane) = (lane.ledger.clone(), lane.status.clone());
        telemetry.gauge("relay_store_lag_seconds", move || {
            let is_behind = in_flight(&ledger) > 0;
            kept.lag_ms(is_behind, lane.oldest_accepted_ms(), clock.now_ms()) / 1000
        });
    }
}

fn of_status(lane: &LaneHandle, value: fn(&LaneStatus) -> usize) -> Probe<i64> {
    let status: Arc<LaneStatus> = lane.status.clone();
    Box::new(move || to_i64(value(&status)))
}

fn in_flight(ledger: &Ledger) -> i64 {
    to_i64(ledger.balance().in_flight())
}

/// Age of the oldest event that a provider has not got, wherever it is.
fn oldest_age_seconds(status: &LaneStatus, gathering: &Gathering, now_ms: i64) -> i64 {
    let oldest_ms = status.oldest_accepted_ms().into_iter().chain(gathering.oldest_accepted_ms()).min();
    oldest_ms.map_or(0, |oldest_ms| (now_ms - oldest_ms).max(0) / 1000)
}

pub(super) fn to_i64(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}
