//! h2load, of nghttp2: a client that nobody here wrote, for how much goes through.
//! It counts HTTP statuses only, so what was accepted is read from the relay.

use std::{path::Path, process::Stdio};

use anyhow::Context;
use prost::Message;
use tokio::process::Command;

use crate::report::Report;

/// True if it is on this machine; else tells what is left out.
pub(crate) async fn is_here(report: &Report, what: &str) -> bool {
    let version = Command::new("h2load").arg("--version").output().await;
    let is_here = version.is_ok_and(|output| output.status.success());
    if !is_here {
        report.not_run(what, "h2load is not installed (Debian: nghttp2-client)");
    }
    is_here
}

/// What it calls.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    path: &'static str,
    options: &'static [&'static str],
}

impl Call {
    // Methods of gRPC, with framed messages.
    pub(crate) const TRACK_EVENT: Self = Self::grpc("/analytics.v1.AnalyticsService/TrackEvent");
    pub(crate) const TRACK_BATCH: Self = Self::grpc("/analytics.v1.AnalyticsService/TrackBatch");
    pub(crate) const TRACK_STREAM: Self = Self::grpc("/analytics.v1.AnalyticsService/TrackStream");

    const fn grpc(path: &'static str) -> Self {
        Self { path, options: &["-H", "content-type: application/grpc", "-H", "te: trailers"] }
    }

    /// A path that is posted to over HTTP/1.1, with JSON.
    pub(crate) const fn http1(path: &'static str) -> Self {
        Self { path, options: &["--h1", "-H", "content-type: application/json"] }
    }
}

/// How it calls.
#[derive(Debug, Clone, Copy)]
pub(crate) struct H2load {
    pub(crate) call: Call,
    pub(crate) connections: u32,
    /// Calls under way on each connection.
    pub(crate) in_flight: u32,
    /// For so long, a second to warm up not counted; or until so many calls are
    /// answered.
    pub(crate) until: Until,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Until {
    Seconds(u32),
    Calls(u64),
}

impl H2load {
    /// Calls with the bytes of a file and returns the calls that were
    /// answered in a second.
    pub(crate) async fn run(self, url: &str, messages: &Path) -> anyhow::Result<f64> {
        let mut command = Command::new("h2load");
        match self.until {
            Until::Seconds(seconds) => command.arg("-D").arg(seconds.to_string()).arg("--warm-up-time=1"),
            Until::Calls(calls) => command.arg("-n").arg(calls.to_string()),
        };
        command.arg("-c").arg(self.connections.to_string()).arg("-m").arg(self.in_flight.to_string());
        command.arg("-d").arg(messages).args(self.call.options).arg(format!("{url}{}", self.call.path));
        let output = command.stdin(Stdio::null()).output().await?;
        let said = String::from_utf8_lossy(&output.stdout);
        let rate = said
            .lines()
            .find_map(|line| line.strip_prefix("finished in ")?.split(", ").nth(1)?.strip_suffix(" req/s"))
            .with_context(|| format!("h2load does not say how fast it was: {said}"))?;
        let is_clean = said.contains(" 0 failed, 0 errored, 0 timeout");
        anyhow::ensure!(is_clean, "calls failed: {said}");
        Ok(rate.parse()?)
    }
}

/// Writes messages as gRPC frames them.
pub(crate) fn write_framed<M: Message>(
    path: &Path,
    messages: impl IntoIterator<Item = M>,
) -> anyhow::Result<()> {
    let mut bytes = Vec::new();
    for message in messages {
        let message = message.encode_to_vec();
        bytes.push(0);
        bytes.extend(u32::try_from(message.len())?.to_be_bytes());
        bytes.extend(message);
    }
    Ok(std::fs::write(path, bytes)?)
}
