//! The relay as a process, and a caller's events.

use std::{env, path::Path, process::Stdio};

use analytics_relay::{
    proto::v1::{
        IdentifyUserRequest, PropertyValue, TrackEventRequest,
        analytics_service_client::AnalyticsServiceClient, property_value::Value as Kind,
    },
    providers::sandbox::Sandbox,
};
use anyhow::Context;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::mpsc,
};
use tonic::{Status, transport::Channel};

/// The key that the sandbox takes.
pub(crate) const KEY: &str = "sandbox-key";

/// A relay that runs, and its logs.
pub(crate) struct Relay {
    pub(crate) child: Child,
    pub(crate) logs: mpsc::UnboundedReceiver<String>,
    pub(crate) addr: String,
    pub(crate) http_addr: String,
}

impl Relay {
    /// Starts a relay for the sandbox's three providers and waits until it
    /// listens.
    pub(crate) async fn start(
        sandbox: &Sandbox,
        data_dir: &Path,
        settings: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        // Beside the directory of this example.
        let me = env::current_exe()?;
        let binary =
            me.parent().and_then(|dir| dir.parent()).context("no target directory")?.join("analytics-relay");
        let mut command = Command::new(&binary);
        command.env("DATA_DIR", data_dir).env("LOG_FORMAT", "json").env("LOG_LEVEL", "info");
        command.env("GRPC_HOST", "127.0.0.1").env("GRPC_PORT", "0");
        command.env("HTTP_HOST", "127.0.0.1").env("HTTP_PORT", "0");
        command.env("METRICS_HOST", "127.0.0.1").env("METRICS_PORT", "0");
        command.env("TEST_MODE", "false").env("ANALYTICS_PROVIDER", "mixpanel,amplitude,segment");
        command.env("FLUSH_INTERVAL_SECONDS", "1").env("INITIAL_RETRY_DELAY_MS", "200");
        command.env("MAX_RETRY_ATTEMPTS", "20").env("MAX_RETRY_DELAY_MS", "1000");
        for (vendor, key) in [("MIXPANEL", "API_KEY"), ("AMPLITUDE", "API_KEY"), ("SEGMENT", "WRITE_KEY")] {
            command.env(format!("{vendor}_BASE_URL"), sandbox.url()).env(format!("{vendor}_{key}"), KEY);
        }
        command.envs(settings.iter().copied());
        let mut child = command
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}; `make` builds it first", binary.display()))?;
        let stdout = child.stdout.take().context("no output")?;
        let (sender, logs) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let _ = sender.send(line);
            }
        });
        let mut relay = Self { child, logs, addr: String::new(), http_addr: String::new() };
        let started = relay.wait_for("relay started").await?;
        relay.addr = started["grpc_addr"].as_str().context("no address")?.to_owned();
        relay.http_addr = started["http_addr"].as_str().context("no HTTP address")?.to_owned();
        Ok(relay)
    }

    async fn wait_for(&mut self, message: &str) -> anyhow::Result<Value> {
        while let Some(line) = self.logs.recv().await {
            let line: Value = serde_json::from_str(&line)?;
            if line["message"] == message {
                return Ok(line);
            }
        }
        anyhow::bail!("the relay ended before it said {message:?}")
    }

    pub(crate) async fn client(&self) -> anyhow::Result<AnalyticsServiceClient<Channel>> {
        let channel = Channel::from_shared(format!("http://{}", self.addr))?.connect().await?;
        Ok(AnalyticsServiceClient::new(channel))
    }

    /// Sends a signal: `TERM` or `KILL`.
    pub(crate) fn signal(&self, name: &str) -> anyhow::Result<()> {
        let pid = self.child.id().context("the relay has ended")?;
        let sent = std::process::Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status()?;
        anyhow::ensure!(sent.success(), "the signal could not be sent");
        Ok(())
    }

    /// Reads on until the relay has ended: the balances it prints, and its exit
    /// code.
    pub(crate) async fn ended(mut self) -> anyhow::Result<(Vec<Value>, Option<i32>)> {
        let mut balances = Vec::new();
        while let Some(line) = self.logs.recv().await {
            let line: Value = serde_json::from_str(&line).unwrap_or_default();
            match line["message"].as_str() {
                Some("balance") => balances.push(line),
                Some("drained") => println!("drained in {} ms, lost {}", line["took_ms"], line["lost"]),
                _ => {}
            }
        }
        Ok((balances, self.child.wait().await?.code()))
    }
}

pub(crate) fn is_identify(number: u32) -> bool {
    number.is_multiple_of(40)
}

/// Sends one event, an identify each forty; the relay gives it an id if
/// `event_id` is empty.
pub(crate) async fn send_one(
    client: &mut AnalyticsServiceClient<Channel>,
    number: u32,
    event_id: String,
) -> Result<(), Status> {
    let user_id = format!("user-{}", number % 50);
    let value = |kind| PropertyValue { value: Some(kind) };
    if is_identify(number) {
        let properties = [("plan".to_owned(), value(Kind::StringValue("pro".to_owned())))].into();
        let request = IdentifyUserRequest { user_id, properties, event_id, ..Default::default() };
        client.identify_user(request).await.map(|_| ())
    } else {
        let properties = [
            ("total".to_owned(), value(Kind::NumberValue(f64::from(number % 100) + 0.5))),
            ("sku".to_owned(), value(Kind::StringValue(format!("SKU-{}", number % 7)))),
        ]
        .into();
        let event_name = "Order Placed".to_owned();
        let request = TrackEventRequest { event_name, user_id, properties, event_id, ..Default::default() };
        client.track_event(request).await.map(|_| ())
    }
}
