//! `analytics-relay check`.

use std::process::ExitCode;

use tracing::info;

use crate::{
    config::{Config, ConfigError},
    ingest::tls::Tls,
};

/// Prints every setting and where it came from, or everything that is wrong.
pub(super) fn check(config: Result<Config, ConfigError>) -> ExitCode {
    match config {
        Ok(config) => {
            for shown in &config.shown {
                let setting = format!("{}={}", shown.name, shown.value);
                println!("{setting:<56} # {}", shown.source);
            }
            for warning in &config.warnings {
                println!("warning: {warning}");
            }
            if let Some(Err(error)) = config.grpc.tls.as_ref().map(Tls::load) {
                return super::fail(&format_args!("{:#}", anyhow::Error::new(error)));
            }
            println!("ok");
            ExitCode::SUCCESS
        }
        Err(error) => super::fail(&error),
    }
}

/// Logs what differs from the defaults.
pub(super) fn log(config: &Config) {
    let providers: Vec<_> = config.providers.iter().map(|provider| provider.settings.vendor.name()).collect();
    let set: Vec<_> = config
        .shown
        .iter()
        .filter(|shown| shown.source != crate::config::Source::Default)
        .map(|shown| format!("{}={}", shown.name, shown.value))
        .collect();
    info!(
        version = crate::telemetry::VERSION,
        test_mode = config.test_mode,
        providers = providers.join(","),
        batch_size = config.delivery.batch.events,
        flush_interval_seconds = config.delivery.batch.interval.as_secs_f64(),
        queue_events_max = config.queue.events_max,
        queue_bytes_max = config.queue.bytes_max,
        drain_timeout_seconds = config.stop.drain_timeout.as_secs_f64(),
        data_dir = %config.data_dir.display(),
        settings = set.join(" "),
        "configuration"
    );
}
