//! What the relay says of itself: log lines and metrics.
//!
//! Neither holds up what it speaks of: a counter is an atomic, and a log line is
//! left to a thread that writes it when somebody reads.

mod log_budget;
mod log_writer;
mod logs;
mod metrics;
mod stderr;

pub(crate) use log_budget::{HeldBack, LogBudget, OnceInAWhile};
pub(crate) use logs::init_logs_to_stderr;
pub use logs::{LogFormat, LogSettings, Logs, init_logs, parse_level};
pub(crate) use metrics::{
    AdmissionMetrics, CountedCall, EnrichMetrics, GeoMetrics, IngestMetrics, LaneFamilies, LaneMetrics,
    MethodMetrics, PrivacyMetrics, Probe, QueryMetrics, SharedCacheMetrics, SpoolMetrics, StoreMetrics,
};
pub use metrics::{METRICS, MetricInfo, Telemetry};
pub(crate) use stderr::say_on_stderr;

/// Version of the relay.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
