//! `analytics-relay providers`: stops sending to a provider, and lets it go on.

use std::process::ExitCode;

use anyhow::Context;

use crate::{
    config::Config,
    delivery::suspension::{Suspension, Suspensions},
    time::{Clock, rfc_3339},
};

/// Prints the providers that are stopped.
pub(super) fn list(config: &Config) -> anyhow::Result<ExitCode> {
    let data_dir = &config.data_dir;
    let suspended = Suspensions::new(data_dir).list().with_context(|| data_dir.display().to_string())?;
    if suspended.is_empty() {
        println!("no provider is suspended in {}", data_dir.display());
    }
    for (provider, Suspension { since_ms, note }) in suspended {
        let since = if since_ms == 0 { String::new() } else { format!(" since {}", rfc_3339(since_ms)) };
        let note = if note.is_empty() { note } else { format!(": {}", super::terminal::words(&note)) };
        println!("{provider:<12} suspended{since}{note}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Stops a provider, now or when the relay starts.
pub(super) fn suspend(config: &Config, provider: &str, note: String) -> anyhow::Result<ExitCode> {
    let data_dir = &config.data_dir;
    let suspension = Suspension { since_ms: Clock::system().now_ms(), note };
    Suspensions::new(data_dir)
        .suspend(provider, &suspension)
        .with_context(|| data_dir.display().to_string())?;
    println!(
        "{provider:<12} suspended in {}: within a second nothing is sent to it, and its events wait",
        data_dir.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// Lets a provider go on.
pub(super) fn resume(config: &Config, provider: &str) -> anyhow::Result<ExitCode> {
    let data_dir = &config.data_dir;
    let resumed = Suspensions::new(data_dir).resume(provider);
    if resumed.with_context(|| data_dir.display().to_string())? {
        println!("{provider:<12} goes on within a second");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{provider:<12} is not suspended in {}", data_dir.display());
    Ok(ExitCode::FAILURE)
}
