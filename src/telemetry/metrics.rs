//! Every metric's name, unit and meaning in one place.
//!
//! [`METRICS`] is the list; registering, `docs/operations.md` and a test follow
//! it. Labels come from closed sets: what a caller chooses, an event's name
//! above all, is never a label.

use std::{fmt, ops::Deref, sync::OnceLock, time::Duration};

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use tokio::time::Instant;

use super::{VERSION, log_writer};
use crate::{
    ledger::Ledger,
    reasons::{Mended, Outcome, PII_FIELDS, Redaction, RefusalReason, Step, Suspicion},
};

/// One metric: its name as it is scraped, its unit, and what it says.
#[derive(Debug, Clone, Copy)]
pub struct MetricInfo {
    /// Name in `/metrics`, with the suffix of its kind.
    pub name: &'static str,
    /// Labels, comma separated.
    pub labels: &'static str,
    /// What one step of its value is.
    pub unit: &'static str,
    /// What it says.
    pub help: &'static str,
}

const fn metric(
    name: &'static str,
    labels: &'static str,
    unit: &'static str,
    help: &'static str,
) -> MetricInfo {
    MetricInfo { name, labels, unit, help }
}

/// Every metric.
pub const METRICS: [MetricInfo; 96] = [
    metric("relay_build_info", "version", "1", "Version of the relay"),
    metric("relay_start_time_seconds", "", "Unix seconds", "When the relay started"),
    metric("relay_draining", "", "0 or 1", "1 from the first signal on"),
    metric(
        "relay_log_lines_lost_total",
        "",
        "lines",
        "Log lines that nobody read in time, or that could not be written",
    ),
    metric(
        "relay_requests_total",
        "method,code",
        "calls",
        "Calls answered, by method or path and by status; CANCELLED is a caller that had gone",
    ),
    metric(
        "relay_schema_calls_total",
        "version",
        "calls",
        "Calls with events over HTTP, by the version that they say",
    ),
    metric(
        "relay_refused_items_kept_total",
        "",
        "items",
        "Refused items of batches that are kept in DATA_DIR/refused",
    ),
    metric(
        "relay_refused_items_lost_total",
        "",
        "items",
        "Refused items of batches that could not be kept there",
    ),
    metric("relay_accept_duration_seconds", "method", "seconds", "Time from a call's head to its answer"),
    metric("relay_handler_panics_total", "", "panics", "Calls that a defect answered with INTERNAL"),
    metric("relay_connections", "", "connections", "Open connections of callers"),
    metric("relay_connections_max", "", "connections", "Most connections of callers"),
    metric(
        "relay_connections_refused_total",
        "",
        "connections",
        "Connections of callers beyond a limit: closed at once, or left to a probe for a moment",
    ),
    metric("relay_tls_handshakes_failed_total", "", "handshakes", "TLS handshakes of callers that failed"),
    metric(
        "relay_events_accepted_total",
        "",
        "events",
        "Events accepted: answered OK, or in the spool although the answer was lost",
    ),
    metric("relay_refusals_total", "reason", "events", "Events refused, by the first reason"),
    metric(
        "relay_events_read_slowly_total",
        "",
        "events",
        "Events whose message the quick reader left to the general one: unusual, or wrong",
    ),
    metric(
        "relay_events_mended_total",
        "reason",
        "events",
        "Events accepted of which a part was mended or left out",
    ),
    metric(
        "relay_pii_keys_total",
        "field",
        "events",
        "Events accepted with a property of such a name: a password's, a key's, a card's",
    ),
    metric(
        "relay_privacy_fields_total",
        "action",
        "values",
        "Values of events accepted that the rules dropped, hashed or cut before the log",
    ),
    metric(
        "relay_privacy_reload_failed_total",
        "",
        "tries",
        "Times that PRIVACY_FILE could not be read or was bad, so that the rules stayed as they were",
    ),
    metric(
        "relay_enrich_missed_total",
        "step",
        "events",
        "Events accepted that a step of enrichment failed on: they lack its fields and nothing else",
    ),
    metric(
        "relay_bot_events_total",
        "",
        "events",
        "Events accepted that a machine sent, by what it says of itself",
    ),
    metric(
        "relay_declined_events_total",
        "",
        "events",
        "Events accepted of users whose browser says, with Sec-GPC or DNT, that they decline to be followed",
    ),
    metric(
        "relay_visitor_salt_gone_total",
        "",
        "events",
        "Events accepted of visitors without an id who got none, because the salt of their day is gone",
    ),
    metric(
        "relay_sessions_full_total",
        "",
        "events",
        "Events accepted without a session because SESSIONS_MAX visitors are known",
    ),
    metric("relay_sessions_visitors", "", "visitors", "Visitors whose sessions are known now"),
    metric(
        "relay_suspicious_total",
        "kind",
        "events",
        "Events accepted that look like an attack on whoever would use them carelessly; counted with INPUT_SUSPICIOUS=count",
    ),
    metric(
        "relay_clock_trusted",
        "",
        "0 or 1",
        "0 while the wall clock was set or is plainly wrong: no event is refused for its time, and none expires",
    ),
    metric(
        "relay_geo_database_age_seconds",
        "",
        "seconds",
        "Age of the database that says where addresses are; 0 without one",
    ),
    metric(
        "relay_geo_reload_failed_total",
        "",
        "files",
        "Newer geo databases that cannot be used: the one before is used on",
    ),
    metric(
        "relay_geo_bad_records_total",
        "",
        "lookups",
        "Addresses of which the geo database holds a record that cannot be read",
    ),
    metric("relay_queue_events", "", "events", "Events in the queue"),
    metric("relay_queue_events_max", "", "events", "Most events in the queue"),
    metric("relay_queue_bytes", "", "bytes", "Memory that the events in the queue hold"),
    metric("relay_queue_bytes_max", "", "bytes", "Most memory that events in the queue may hold"),
    metric("relay_lane_events", "provider", "events", "Events in a provider's lane, under way included"),
    metric("relay_lane_bytes", "provider", "bytes", "Memory that the events in a provider's lane hold"),
    metric(
        "relay_in_flight_events",
        "provider",
        "events",
        "Accepted or reloaded, and not ended: the open side of the balance",
    ),
    metric(
        "relay_events_at_risk",
        "provider",
        "events",
        "Accepted and only in memory: what SIGKILL or a power cut would lose; with a spool: not yet synced, what a power cut would lose",
    ),
    metric(
        "relay_oldest_event_age_seconds",
        "provider",
        "seconds",
        "Age of the oldest event that the provider has not got; 0 if none",
    ),
    metric(
        "relay_provider_state",
        "provider,state",
        "0 or 1",
        "1 for the state the provider is in: sending, failing (no request gets through), refusing (it answers and takes nothing), paused (it refuses our key or address) or suspended (by a person)",
    ),
    metric(
        "relay_batches_total",
        "provider,outcome",
        "requests",
        "Requests to the provider, by what came of them",
    ),
    metric("relay_attempts_total", "provider", "events", "Events sent to the provider, each time counted"),
    metric("relay_retries_total", "provider", "events", "Events that will be sent again after a failure"),
    metric(
        "relay_events_total",
        "provider,outcome,reason",
        "events",
        "Events that ended, by outcome and reason",
    ),
    metric(
        "relay_events_reloaded_total",
        "provider",
        "events",
        "Events that an earlier run has left on disk",
    ),
    metric(
        "relay_delivery_duration_seconds",
        "provider",
        "seconds",
        "Time from accepting an event to its delivery",
    ),
    metric("relay_request_duration_seconds", "provider", "seconds", "Time of one request to the provider"),
    metric("relay_dead_letters_bytes", "provider", "bytes", "Bytes of dead letters on disk"),
    metric("relay_dead_letters_bytes_max", "provider", "bytes", "Most bytes of dead letters on disk"),
    metric(
        "relay_lane_events_max",
        "provider",
        "events",
        "Most events in a provider's lane; beyond, they become dead letters, or wait in the spool",
    ),
    metric(
        "relay_lane_bytes_max",
        "provider",
        "bytes",
        "Most memory that the events in a provider's lane may hold",
    ),
    metric(
        "relay_duplicate_risk_total",
        "provider",
        "events",
        "Events delivered more than 24 hours after they were accepted and not at the first attempt: the provider may not recognise a copy",
    ),
    metric("relay_spool_bytes", "", "bytes", "Bytes of the spool's segments on disk"),
    metric("relay_spool_bytes_max", "", "bytes", "Most bytes of the spool's segments"),
    metric("relay_spool_segments", "", "segments", "Segments of the spool"),
    metric(
        "relay_spool_backlog_events",
        "provider",
        "events",
        "Events in the spool that have not ended at the provider",
    ),
    metric(
        "relay_spool_backlog_bytes",
        "provider",
        "bytes",
        "Bytes of the spool from the provider's oldest event that has not ended",
    ),
    metric(
        "relay_spool_backlog_bytes_max",
        "provider",
        "bytes",
        "Most bytes of the provider's share of the spool",
    ),
    metric("relay_spool_groups_total", "", "groups", "Groups of events that were written together"),
    metric(
        "relay_spool_sync_duration_seconds",
        "",
        "seconds",
        "Time of writing and syncing a group in which somebody waits for the disk",
    ),
    metric(
        "relay_spool_intake_events",
        "",
        "events",
        "Events that wait to be written to the spool, those under way included",
    ),
    metric(
        "relay_spool_damaged_ranges",
        "",
        "ranges",
        "Damaged ranges of the spool that are kept in quarantine",
    ),
    metric("relay_spool_quarantine_bytes", "", "bytes", "Bytes of all that is in quarantine"),
    metric(
        "relay_spool_quarantine_removed_total",
        "",
        "ranges",
        "Copies of damaged ranges that were removed from quarantine, because it was full",
    ),
    metric(
        "relay_spool_filling",
        "provider",
        "0 or 1",
        "1 while the provider's backlog takes more than half of its share of the spool",
    ),
    metric(
        "relay_spool_unnamed_events",
        "",
        "events",
        "Events in the spool that have not ended at providers which are not named any more",
    ),
    metric(
        "relay_spool_unnamed_ended_total",
        "outcome,reason",
        "events",
        "Events that ended at providers which are not named any more",
    ),
    metric(
        "relay_spool_state",
        "state",
        "0 or 1",
        "1 for the state the spool is in: writing, full (events are refused) or failed (the disk fails, events are refused)",
    ),
    metric("relay_store_open", "", "0 or 1", "1 while the store is open, and its server takes events"),
    metric("relay_store_events", "", "events", "Events in the store"),
    metric("relay_store_hot_events", "", "events", "Those of them that are in no block yet"),
    metric("relay_store_blocks", "", "blocks", "Blocks of the embedded store"),
    metric(
        "relay_store_file_bytes",
        "",
        "bytes",
        "Bytes of the embedded store's file, without its log; of a PostgreSQL's tables and indexes",
    ),
    metric("relay_store_free_bytes", "", "bytes", "Those of them that are used again before the file grows"),
    metric(
        "relay_store_default_events",
        "",
        "events",
        "Events in a PostgreSQL for whose day there is no partition yet; counted up to a million",
    ),
    metric(
        "relay_store_connections_in_use",
        "",
        "connections",
        "Connections to a PostgreSQL that are used just now",
    ),
    metric("relay_store_connections_idle", "", "connections", "Connections to a PostgreSQL that are free"),
    metric(
        "relay_store_connections_waiting",
        "",
        "waiters",
        "Batches and questions that wait for a connection to a PostgreSQL",
    ),
    metric(
        "relay_store_lag_seconds",
        "",
        "seconds",
        "How far the newest event in the store is behind now, while events are accepted that it has not got",
    ),
    metric(
        "relay_store_append_duration_seconds",
        "",
        "seconds",
        "Time of keeping a batch, from handing it over to its commit",
    ),
    metric(
        "relay_store_question_duration_seconds",
        "question",
        "seconds",
        "Time of a question to the store, from asking to the answer",
    ),
    metric(
        "relay_store_duplicates_total",
        "",
        "events",
        "Events that the store had already, by their ids: they count as delivered",
    ),
    metric(
        "relay_store_damaged",
        "",
        "reads",
        "Batches and reads of blocks that were damaged since the start: what they hold is in no figure",
    ),
    metric(
        "relay_store_set_aside",
        "",
        "0 or 1",
        "1 if the file was damaged at the start, and was set aside",
    ),
    metric(
        "relay_store_blocks_failed",
        "",
        "blocks",
        "Blocks that could not be written since the start: their events stay as they came for now",
    ),
    metric(
        "relay_store_links_refused",
        "",
        "links",
        "Links of devices and users that the store did not note since the start, as one had too many",
    ),
    metric(
        "relay_store_aliases_refused",
        "",
        "aliases",
        "Aliases that the store did not note since the start, as too many users would have been one",
    ),
    metric(
        "relay_store_traits_refused",
        "",
        "traits",
        "Keys of traits that the store did not keep since the start, as somebody had too much of them",
    ),
    metric(
        "relay_store_sources_refused",
        "",
        "events",
        "Events whose website the store did not keep since the start, as their tenant had too many",
    ),
    metric(
        "relay_store_slow",
        "",
        "times",
        "What a PostgreSQL took over half a second for since the start, of what the store asked of it",
    ),
    metric(
        "relay_query_cache_total",
        "cache,outcome",
        "questions",
        "Questions by whether an answer was known in the process or in Redis: hit, miss, joined (somebody was asking the same), error or away (not connected)",
    ),
    metric("relay_query_cache_bytes", "", "bytes", "Memory of the answers that are known"),
    metric("relay_query_duration_seconds", "report", "seconds", "Time of one question to the store"),
    metric("relay_redis_connected", "", "0 or 1", "1 while answers are shared in Redis"),
];

type Labels<const N: usize> = [(&'static str, &'static str); N];
/// Tells a live value.
pub(crate) type Probe<T> = Box<dyn Fn() -> T + Send + Sync>;

/// All metrics of one relay. Not global: each relay has its own, so that tests
/// can be exact.
pub struct Telemetry {
    registry: Registry,
    /// Set gauges from the live values, before each scrape.
    probes: Vec<Probe<()>>,
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Telemetry")
    }
}

impl Telemetry {
    /// Starts with the metrics that never change.
    pub(crate) fn new(start_time_ms: i64) -> Self {
        let mut telemetry = Self { registry: Registry::default(), probes: Vec::new() };
        let build: Family<Labels<1>, Gauge> = telemetry.register("relay_build_info");
        build.get_or_create(&[("version", VERSION)]).set(1);
        telemetry.register::<Gauge>("relay_start_time_seconds").set(start_time_ms / 1000);
        telemetry.register_as("relay_log_lines_lost_total", log_writer::lines_lost());
        telemetry
    }

    /// Registers a metric of [`METRICS`].
    fn register<M>(&mut self, name: &'static str) -> M
    where
        M: Default + Clone + prometheus_client::registry::Metric,
    {
        self.register_as(name, M::default())
    }

    fn register_as<M>(&mut self, name: &'static str, metric: M) -> M
    where
        M: Clone + prometheus_client::registry::Metric,
    {
        let info = METRICS.iter().find(|info| info.name == name).expect("every metric is in METRICS");
        // The encoding appends the suffix of a counter and a period by itself.
        let name = info.name.strip_suffix("_total").unwrap_or(info.name);
        self.registry.register(name, info.help, metric.clone());
        metric
    }

    /// Registers a gauge that shows a live value.
    pub(crate) fn gauge(&mut self, name: &'static str, value: impl Fn() -> i64 + Send + Sync + 'static) {
        let gauge: Gauge = self.register(name);
        self.probes.push(Box::new(move || {
            gauge.set(value());
        }));
    }

    /// Registers what the front doors count.
    pub(crate) fn ingest(&mut self) -> IngestMetrics {
        IngestMetrics {
            requests: self.register("relay_requests_total"),
            duration: self.register_as("relay_accept_duration_seconds", Family::new_with_constructor(fast)),
            panics: self.register("relay_handler_panics_total"),
            connections: self.register("relay_connections"),
            connections_refused: self.register("relay_connections_refused_total"),
            read_slowly: self.register("relay_events_read_slowly_total"),
            schemas: self.register("relay_schema_calls_total"),
            refused_kept: self.register("relay_refused_items_kept_total"),
            refused_lost: self.register("relay_refused_items_lost_total"),
            handshakes_failed: self.register("relay_tls_handshakes_failed_total"),
        }
    }

    /// Registers what admission counts.
    pub(crate) fn admission(&mut self) -> AdmissionMetrics {
        AdmissionMetrics::of(
            self.register("relay_refusals_total"),
            self.register("relay_events_mended_total"),
            self.register("relay_suspicious_total"),
        )
    }

    /// Registers what the privacy rules count.
    pub(crate) fn privacy(&mut self) -> PrivacyMetrics {
        let pii_keys: Family<Labels<1>, Counter> = self.register("relay_pii_keys_total");
        let fields: Family<Labels<1>, Counter> = self.register("relay_privacy_fields_total");
        // From the start on, so that a rise from nothing shows.
        PrivacyMetrics {
            pii_keys: PII_FIELDS.map(|field| pii_keys.get_or_create_owned(&[("field", field)])),
            fields: Redaction::ALL.map(|action| fields.get_or_create_owned(&[("action", action.name())])),
            reload_failed: self.register("relay_privacy_reload_failed_total"),
        }
    }

    /// Registers what is counted while events are enriched.
    pub(crate) fn enrichment(&mut self) -> EnrichMetrics {
        EnrichMetrics {
            missed: of_steps(&self.register("relay_enrich_missed_total")),
            bots: self.register("relay_bot_events_total"),
            declined: self.register("relay_declined_events_total"),
            salt_gone: self.register("relay_visitor_salt_gone_total"),
            sessions_full: self.register("relay_sessions_full_total"),
        }
    }

    /// Registers what is counted of questions.
    pub(crate) fn query(&mut self) -> QueryMetrics {
        QueryMetrics::of(
            &self.register("relay_query_cache_total"),
            self.register_as("relay_query_duration_seconds", Family::new_with_constructor(slow)),
        )
    }

    /// Registers what is counted while addresses are looked up.
    pub(crate) fn geo(&mut self, metrics: &GeoMetrics) {
        self.register_as("relay_geo_reload_failed_total", metrics.reload_failed.clone());
        self.register_as("relay_geo_bad_records_total", metrics.bad_records.clone());
    }

    /// Registers what the queue takes: the events that are accepted.
    pub(crate) fn accepted(&mut self) -> Counter {
        self.register("relay_events_accepted_total")
    }

    /// Registers what the spool's thread counts.
    pub(crate) fn spool(&mut self, accepted: Counter) -> SpoolMetrics {
        let metrics = SpoolMetrics {
            accepted,
            groups: self.register("relay_spool_groups_total"),
            sync_duration: self.register_as("relay_spool_sync_duration_seconds", fast()),
            quarantine_removed: self.register("relay_spool_quarantine_removed_total"),
            unnamed_ended: self.register("relay_spool_unnamed_ended_total"),
        };
        // From the start on, so that a rise from nothing shows.
        for outcome in Outcome::all().filter(|outcome| *outcome != Outcome::Spilled) {
            metrics.unnamed_ended(outcome, 0);
        }
        metrics
    }

    /// Registers the state of the spool, one gauge for each.
    pub(crate) fn spool_states(&mut self, states: &'static [&'static str], value: Probe<&'static str>) {
        let family: Family<Labels<1>, Gauge> = self.register("relay_spool_state");
        let gauges: Vec<_> =
            states.iter().map(|state| (*state, family.get_or_create_owned(&[("state", *state)]))).collect();
        self.probes.push(Box::new(move || {
            let current = value();
            for (state, gauge) in &gauges {
                gauge.set(i64::from(*state == current));
            }
        }));
    }

    /// Registers what lanes count; one call for all providers.
    pub(crate) fn lanes(&mut self) -> LaneFamilies {
        LaneFamilies {
            batches: self.register("relay_batches_total"),
            attempts: self.register("relay_attempts_total"),
            retries: self.register("relay_retries_total"),
            ended: self.register("relay_events_total"),
            reloaded: self.register("relay_events_reloaded_total"),
            duplicate_risk: self.register("relay_duplicate_risk_total"),
            delivery: self.register_as("relay_delivery_duration_seconds", Family::new_with_constructor(slow)),
            request: self.register_as("relay_request_duration_seconds", Family::new_with_constructor(slow)),
        }
    }

    /// Registers what is counted of the store.
    pub(crate) fn store(&mut self) -> StoreMetrics {
        StoreMetrics {
            append: self.register_as("relay_store_append_duration_seconds", fast()),
            questions: self
                .register_as("relay_store_question_duration_seconds", Family::new_with_constructor(slow)),
            duplicates: self.register("relay_store_duplicates_total"),
        }
    }

    /// Registers gauges that show a live value for each provider.
    pub(crate) fn provider_gauge(&mut self, name: &'static str, values: Vec<(&'static str, Probe<i64>)>) {
        let family: Family<Labels<1>, Gauge> = self.register(name);
        for (provider, value) in values {
            let gauge = family.get_or_create_owned(&[("provider", provider)]);
            self.probes.push(Box::new(move || {
                gauge.set(value());
            }));
        }
    }

    /// Registers the state of each provider, one gauge for each state.
    pub(crate) fn provider_states(
        &mut self,
        states: &'static [&'static str],
        values: Vec<(&'static str, Probe<&'static str>)>,
    ) {
        let family: Family<Labels<2>, Gauge> = self.register("relay_provider_state");
        for (provider, value) in values {
            let gauges: Vec<_> = states
                .iter()
                .map(|state| {
                    (*state, family.get_or_create_owned(&[("provider", provider), ("state", state)]))
                })
                .collect();
            self.probes.push(Box::new(move || {
                let current = value();
                for (state, gauge) in &gauges {
                    gauge.set(i64::from(*state == current));
                }
            }));
        }
    }

    /// All metrics in the text format of OpenMetrics.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        for probe in &self.probes {
            probe();
        }
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Buckets for what should take less than a millisecond.
fn fast() -> Histogram {
    Histogram::new([
        0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5,
        1.0,
    ])
}

/// Buckets for what waits for a provider.
fn slow() -> Histogram {
    Histogram::new([
        0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 300.0, 1800.0,
    ])
}

/// What the front doors count.
#[derive(Debug, Clone)]
pub(crate) struct IngestMetrics {
    requests: Family<Labels<2>, Counter>,
    duration: Family<Labels<1>, Histogram, fn() -> Histogram>,
    pub(crate) panics: Counter,
    pub(crate) connections: Gauge,
    pub(crate) connections_refused: Counter,
    pub(crate) handshakes_failed: Counter,
    pub(crate) read_slowly: Counter,
    schemas: Family<Labels<1>, Counter>,
    pub(crate) refused_kept: Counter,
    pub(crate) refused_lost: Counter,
}

impl IngestMetrics {
    /// What is counted of the calls of one method. The label comes from a closed
    /// set.
    pub(crate) fn method(&self, label: &'static str) -> MethodMetrics {
        MethodMetrics { label, families: self.clone(), ok: OnceLock::new(), duration: OnceLock::new() }
    }

    /// Counts calls of one schema version. The label comes from a closed set.
    pub(crate) fn of_schema(&self, version: &'static str) -> Counter {
        self.schemas.get_or_create_owned(&[("version", version)])
    }
}

/// What is counted of the calls of one method.
#[derive(Debug)]
pub(crate) struct MethodMetrics {
    label: &'static str,
    families: IngestMetrics,
    /// Found once, and from the first call on, so that a method that nobody calls
    /// does not show.
    ok: OnceLock<Counter>,
    duration: OnceLock<Histogram>,
}

impl MethodMetrics {
    /// Counts a call that was answered. The code comes from a closed set.
    fn answered(&self, code: &'static str, seconds: f64) {
        let count = || self.families.requests.get_or_create_owned(&[("method", self.label), ("code", code)]);
        if code == "OK" {
            self.ok.get_or_init(count).inc();
        } else {
            count().inc();
        }
        let duration = || self.families.duration.get_or_create_owned(&[("method", self.label)]);
        self.duration.get_or_init(duration).observe(seconds);
    }
}

/// A call, or a stream, which is counted when it is over.
#[derive(Debug)]
pub(crate) struct CountedCall<M: Deref<Target = MethodMetrics>> {
    /// Of its answer.
    pub(crate) code: &'static str,
    started: Instant,
    of: Option<M>,
}

impl<M: Deref<Target = MethodMetrics>> CountedCall<M> {
    /// Begins one of a method; it has that code if its caller goes before it gets another.
    pub(crate) fn begin(of: M, code: &'static str) -> Self {
        Self { code, started: Instant::now(), of: Some(of) }
    }

    /// It is not counted here.
    pub(crate) fn forget(mut self) {
        self.of = None;
    }
}

impl<M: Deref<Target = MethodMetrics>> Drop for CountedCall<M> {
    fn drop(&mut self) {
        if let Some(of) = &self.of {
            of.answered(self.code, self.started.elapsed().as_secs_f64());
        }
    }
}

/// What admission counts.
#[derive(Debug, Clone)]
pub(crate) struct AdmissionMetrics {
    refusals: Vec<Counter>,
    mended: [Counter; Mended::ALL.len()],
    suspicious: [Counter; Suspicion::ALL.len()],
}

impl AdmissionMetrics {
    fn of(
        refusals: Family<Labels<1>, Counter>,
        mended: Family<Labels<1>, Counter>,
        suspicious: Family<Labels<1>, Counter>,
    ) -> Self {
        let counter = |reason: RefusalReason| refusals.get_or_create_owned(&[("reason", reason.name())]);
        let mended = Mended::ALL.map(|reason| mended.get_or_create_owned(&[("reason", reason.name())]));
        let suspicious = Suspicion::ALL.map(|kind| suspicious.get_or_create_owned(&[("kind", kind.name())]));
        Self { refusals: RefusalReason::ALL.into_iter().map(counter).collect(), mended, suspicious }
    }

    /// The counter of events that look so.
    pub(crate) fn suspicious(&self, kind: Suspicion) -> &Counter {
        &self.suspicious[kind as usize]
    }

    /// The counter of events of which this was mended.
    pub(crate) fn mended(&self, reason: Mended) -> &Counter {
        &self.mended[reason as usize]
    }

    /// The counter of one reason.
    pub(crate) fn refused(&self, reason: RefusalReason) -> &Counter {
        &self.refusals[reason as usize]
    }
}

#[cfg(test)]
impl Default for AdmissionMetrics {
    fn default() -> Self {
        Self::of(Family::default(), Family::default(), Family::default())
    }
}

/// What the privacy rules count.
#[derive(Debug, Clone, Default)]
pub(crate) struct PrivacyMetrics {
    /// In the order of [`PII_FIELDS`].
    pub(crate) pii_keys: [Counter; PII_FIELDS.len()],
    /// In the order of [`Redaction::ALL`].
    pub(crate) fields: [Counter; Redaction::ALL.len()],
    pub(crate) reload_failed: Counter,
}

/// What is counted while events are enriched.
#[derive(Debug, Clone)]
pub(crate) struct EnrichMetrics {
    /// In the order of [`Step::ALL`].
    missed: [Counter; Step::ALL.len()],
    pub(crate) bots: Counter,
    pub(crate) declined: Counter,
    pub(crate) salt_gone: Counter,
    pub(crate) sessions_full: Counter,
}

impl EnrichMetrics {
    /// The counter of events that a step failed on.
    pub(crate) fn missed(&self, step: Step) -> &Counter {
        &self.missed[step as usize]
    }
}

impl Default for EnrichMetrics {
    fn default() -> Self {
        let [bots, declined, salt_gone, sessions_full] = Default::default();
        Self { missed: of_steps(&Family::default()), bots, declined, salt_gone, sessions_full }
    }
}

fn of_steps(family: &Family<Labels<1>, Counter>) -> [Counter; Step::ALL.len()] {
    Step::ALL.map(|step| family.get_or_create_owned(&[("step", step.name())]))
}

/// What is counted while addresses are looked up.
#[derive(Debug, Clone, Default)]
pub(crate) struct GeoMetrics {
    pub(crate) reload_failed: Counter,
    pub(crate) bad_records: Counter,
}

/// What is counted of questions.
#[derive(Debug, Clone)]
pub(crate) struct QueryMetrics {
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) joined: Counter,
    pub(crate) shared: SharedCacheMetrics,
    duration: Family<Labels<1>, Histogram, fn() -> Histogram>,
}

/// What is counted of the answers that relays share.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "only Redis has use for it"))]
pub(crate) struct SharedCacheMetrics {
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) errors: Counter,
    pub(crate) away: Counter,
}

impl QueryMetrics {
    fn of(
        cache: &Family<Labels<2>, Counter>,
        duration: Family<Labels<1>, Histogram, fn() -> Histogram>,
    ) -> Self {
        let of = |place, outcome| cache.get_or_create_owned(&[("cache", place), ("outcome", outcome)]);
        let [hits, misses, joined] = ["hit", "miss", "joined"].map(|outcome| of("process", outcome));
        let shared = SharedCacheMetrics {
            hits: of("redis", "hit"),
            misses: of("redis", "miss"),
            errors: of("redis", "error"),
            away: of("redis", "away"),
        };
        Self { hits, misses, joined, shared, duration }
    }

    /// Notes how long the store took for a report.
    pub(crate) fn asked(&self, report: &'static str, took: Duration) {
        self.duration.get_or_create_owned(&[("report", report)]).observe(took.as_secs_f64());
    }
}

#[cfg(test)]
impl Default for QueryMetrics {
    fn default() -> Self {
        Self::of(&Family::default(), Family::new_with_constructor(slow))
    }
}

/// What the spool's thread counts.
#[derive(Debug, Clone)]
pub(crate) struct SpoolMetrics {
    pub(crate) accepted: Counter,
    pub(crate) groups: Counter,
    pub(crate) sync_duration: Histogram,
    pub(crate) quarantine_removed: Counter,
    unnamed_ended: Family<Labels<2>, Counter>,
}

impl SpoolMetrics {
    /// Counts events that ended at a provider that is not named; its name may be
    /// anything, so it is no label.
    pub(crate) fn unnamed_ended(&self, outcome: Outcome, events: u64) {
        let label = [("outcome", outcome.name()), ("reason", outcome.reason())];
        self.unnamed_ended.get_or_create_owned(&label).inc_by(events);
    }
}

#[cfg(test)]
impl Default for SpoolMetrics {
    fn default() -> Self {
        Telemetry::new(0).spool(Counter::default())
    }
}

/// What is counted of the store.
#[derive(Debug, Clone)]
pub(crate) struct StoreMetrics {
    pub(crate) append: Histogram,
    questions: Family<Labels<1>, Histogram, fn() -> Histogram>,
    pub(crate) duplicates: Counter,
}

impl StoreMetrics {
    /// The times of a question, whose name is of a closed list.
    pub(crate) fn question(&self, question: &'static str) -> Histogram {
        self.questions.get_or_create_owned(&[("question", question)])
    }
}

impl Default for StoreMetrics {
    fn default() -> Self {
        Telemetry::new(0).store()
    }
}

/// What lanes count, for all providers.
#[derive(Debug, Clone)]
pub(crate) struct LaneFamilies {
    batches: Family<Labels<2>, Counter>,
    attempts: Family<Labels<1>, Counter>,
    retries: Family<Labels<1>, Counter>,
    ended: Family<Labels<3>, Counter>,
    reloaded: Family<Labels<1>, Counter>,
    duplicate_risk: Family<Labels<1>, Counter>,
    delivery: Family<Labels<1>, Histogram, fn() -> Histogram>,
    request: Family<Labels<1>, Histogram, fn() -> Histogram>,
}

#[cfg(test)]
impl Default for LaneFamilies {
    fn default() -> Self {
        Telemetry::new(0).lanes()
    }
}

impl LaneFamilies {
    /// What one lane counts, without the ledger.
    pub(crate) fn of(&self, provider: &'static str) -> LaneMetrics {
        let label = [("provider", provider)];
        LaneMetrics {
            provider,
            batches: self.batches.clone(),
            attempts: self.attempts.get_or_create_owned(&label),
            retries: self.retries.get_or_create_owned(&label),
            duplicate_risk: self.duplicate_risk.get_or_create_owned(&label),
            delivery: self.delivery.get_or_create_owned(&label),
            request: self.request.get_or_create_owned(&label),
        }
    }

    /// The ledger of one provider, whose counters are metrics.
    pub(crate) fn ledger(&self, provider: &'static str, accepted: Counter) -> Ledger {
        let reloaded = self.reloaded.get_or_create_owned(&[("provider", provider)]);
        Ledger::new(provider, accepted, reloaded, |outcome: Outcome| {
            let labels = [("provider", provider), ("outcome", outcome.name()), ("reason", outcome.reason())];
            self.ended.get_or_create_owned(&labels)
        })
    }
}

/// What one lane counts.
#[derive(Debug, Clone)]
pub(crate) struct LaneMetrics {
    provider: &'static str,
    batches: Family<Labels<2>, Counter>,
    pub(crate) attempts: Counter,
    pub(crate) retries: Counter,
    pub(crate) duplicate_risk: Counter,
    pub(crate) delivery: Histogram,
    pub(crate) request: Histogram,
}

impl LaneMetrics {
    /// Counts a request by what came of it, from a closed list.
    pub(crate) fn batch(&self, outcome: &'static str) {
        self.batches.get_or_create(&[("provider", self.provider), ("outcome", outcome)]).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_conventions_of_their_kind() {
        for info in METRICS {
            assert!(info.name.starts_with("relay_"), "{}", info.name);
            assert!(!info.help.is_empty() && !info.unit.is_empty(), "{}", info.name);
        }
    }

    #[test]
    fn every_metric_is_documented_for_operators() {
        let page = include_str!("../../docs/operations.md");
        for info in METRICS {
            let row = page.lines().find(|line| line.starts_with(&format!("| `{}`", info.name)));
            let row = row.unwrap_or_else(|| panic!("{} is not in docs/operations.md", info.name));
            assert!(row.contains(info.unit) && row.contains(info.help), "{row} differs from {info:?}");
        }
    }
}
