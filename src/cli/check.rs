//! `analytics-relay check`.

use std::{process::ExitCode, time::Duration};

use analytics_relay_providers::{Finding, Step, registry};
use anyhow::{bail, ensure};
use futures_util::future::join_all;
use tokio::time::timeout;
use tracing::info;

use super::privacy;
use crate::{
    config::{Config, ConfigError, ProviderConfig},
    enrich::{geo::Geo, page::Pages, senders::Agents},
    ingest::tls::Tls,
    sealing::Kek,
    store,
};

/// Longest time for one provider: more than its own limits add up to.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(60);

/// Prints every setting and where it came from; fails with everything that is wrong.
pub(super) fn check(config: Result<Config, ConfigError>) -> anyhow::Result<Config> {
    let config = config?;
    for shown in &config.shown {
        let setting = format!("{}={}", shown.name, shown.value);
        println!("{setting:<56} # {}", shown.source);
    }
    for warning in &config.warnings {
        println!("warning: {warning}");
    }
    for files in config.grpc.tls.iter().chain(&config.http.tls) {
        Tls::load(files)?;
    }
    Geo::new(&config.geo)?;
    Agents::new(&config.agents)?;
    Pages::new(config.pages.clone())?;
    privacy::describe(&config)?;
    if let Some(keyring) = config.sealing.load()? {
        let writes_with = keyring.writer().map_or("none of them", Kek::kid);
        println!("keys to seal files with: {}; new files: {writes_with}", keyring.kids());
    }
    println!("ok");
    Ok(config)
}

/// Tries the way to each provider, all at once, and prints each step.
pub(super) async fn connect(config: Config) -> anyhow::Result<ExitCode> {
    ensure!(!config.test_mode, "TEST_MODE=true: nothing is sent, so there is nothing to connect to");
    if config.provider_names().next().is_none() {
        println!("no provider is named: nothing to connect to");
        return Ok(ExitCode::SUCCESS);
    }
    let tries = join_all(config.providers.iter().map(try_provider)).await;
    let of_store = store::look(&config.store, &config.data_dir).await;
    let mut failed = 0;
    for (name, steps) in config.provider_names().zip(tries.into_iter().chain([of_store])) {
        for Step { what, finding, why } in steps {
            let how = match finding {
                Finding::Ok => "ok",
                Finding::Failed => "failed",
                Finding::Unknown => "could not find out",
            };
            failed += usize::from(finding == Finding::Failed);
            println!("{name:<10} {what:<14} {how:<18}  {why}");
        }
    }
    match failed {
        0 => println!("connected: no step failed, and no event was sent"),
        _ => bail!("{failed} step(s) failed; no event was sent"),
    }
    Ok(ExitCode::SUCCESS)
}

async fn try_provider(provider: &ProviderConfig) -> Vec<Step> {
    let provider = match registry::build(&provider.settings) {
        Ok(provider) => provider,
        Err(error) => return vec![Step::failed("client", format!("{:#}", anyhow::Error::new(error)))],
    };
    let in_vain = |_| vec![Step::failed("connection", format!("nothing in {CONNECT_TIME_MAX:?}"))];
    timeout(CONNECT_TIME_MAX, provider.probe()).await.unwrap_or_else(in_vain)
}

/// Logs what differs from the defaults.
pub(super) fn log(config: &Config) {
    let providers: Vec<_> = config.provider_names().collect();
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
