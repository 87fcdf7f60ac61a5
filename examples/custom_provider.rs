//! A provider of your own: a signed webhook, in a relay of its own.
//!
//! Each event becomes one POST, signed as Standard Webhooks 1.0 says, so that
//! the receiver can tell that it came from us and drop a second copy.
//!
//! ```sh
//! WEBHOOK_URL=http://127.0.0.1:9999/hook \
//! WEBHOOK_SECRET=whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8= \
//! ANALYTICS_PROVIDER=none cargo run --example custom_provider
//! ```
//!
//! `ANALYTICS_PROVIDER` may name vendors too: they get every event as well.

use std::{
    env,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use analytics_relay::{
    app::App,
    config::Config,
    providers::{BatchLimits, Event, EventKind, Provider, Rejection, SendError, Verdict},
    shutdown, telemetry,
};
use anyhow::{Context, ensure};
use async_trait::async_trait;
use base64::{Engine, prelude::BASE64_STANDARD};
use reqwest::StatusCode;
use ring::hmac;
use serde_json::json;

/// Posts each event to one address.
struct Webhook {
    url: reqwest::Url,
    key: hmac::Key,
    client: reqwest::Client,
}

impl Webhook {
    /// `secret` is `whsec_` and the base64 of 24 to 64 bytes.
    fn new(url: &str, secret: &str, timeout: Duration) -> anyhow::Result<Self> {
        let encoded = secret.strip_prefix("whsec_").context("the secret does not start with whsec_")?;
        let bytes = BASE64_STANDARD.decode(encoded).context("the secret is not base64")?;
        ensure!((24..=64).contains(&bytes.len()), "the secret has {} bytes, want 24 to 64", bytes.len());
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .timeout(timeout)
            // A receiver that moved must not make us post events elsewhere.
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .build()?;
        Ok(Self { url: url.parse()?, key: hmac::Key::new(hmac::HMAC_SHA256, &bytes), client })
    }

    /// The signature of one message, over its id, the time of this attempt and
    /// its body.
    fn sign(&self, id: &str, timestamp: u64, body: &str) -> String {
        let signed = hmac::sign(&self.key, format!("{id}.{timestamp}.{body}").as_bytes());
        format!("v1,{}", BASE64_STANDARD.encode(signed))
    }

    fn body(event: &Event) -> String {
        let kind = match event.kind() {
            EventKind::Track { name } => name.to_owned(),
            kind => kind.name().to_owned(),
        };
        let time = jiff::Timestamp::from_millisecond(event.time_ms()).unwrap_or_default();
        let data = json!({
            "user_id": event.user_id(),
            "anonymous_id": event.anonymous_id(),
            "properties": event.properties(),
        });
        json!({ "type": kind, "timestamp": format!("{time:.3}"), "data": data }).to_string()
    }
}

#[async_trait]
impl Provider for Webhook {
    fn name(&self) -> &'static str {
        "webhook"
    }

    /// One event a message: its id is then the message's, at each attempt.
    fn limits(&self) -> BatchLimits {
        BatchLimits { events_max: 1, body_bytes_max: 64 * 1024, requests_max: 8 }
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let mut verdicts = Vec::with_capacity(batch.len());
        for event in batch {
            verdicts.push(self.post(event).await?);
        }
        Ok(verdicts)
    }
}

impl Webhook {
    async fn post(&self, event: &Event) -> Result<Verdict, SendError> {
        // A full stop would end the id in what is signed.
        let id = event.id().namespaced().to_string();
        let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let body = Self::body(event);
        let answer = self
            .client
            .post(self.url.clone())
            .header("content-type", "application/json")
            .header("webhook-id", &id)
            .header("webhook-timestamp", timestamp)
            .header("webhook-signature", self.sign(&id, timestamp, &body))
            .body(body)
            .send()
            .await
            .map_err(|error| SendError::Unavailable {
                retry_after: None,
                detail: error.without_url().to_string(),
            })?;
        let detail = answer.status().to_string();
        match answer.status() {
            status if status.is_success() => Ok(Verdict::Delivered),
            StatusCode::GONE | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(SendError::Unauthorized { detail })
            }
            StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => {
                Ok(Verdict::Rejected { reason: Rejection::Invalid, detail })
            }
            StatusCode::PAYLOAD_TOO_LARGE => Err(SendError::TooLarge { detail }),
            _ => Err(SendError::Unavailable { retry_after: None, detail }),
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config::from_env()?;
    let logs = telemetry::init_logs(&config.logs.level, config.logs.format);
    let url = env::var("WEBHOOK_URL").context("WEBHOOK_URL is not set")?;
    let secret = env::var("WEBHOOK_SECRET").context("WEBHOOK_SECRET is not set")?;
    let webhook = Webhook::new(&url, &secret, config.delivery.request_timeout)?;

    let signals = shutdown::signals()?;
    let app = App::start_with(&config, vec![Arc::new(webhook)]).await?;
    let report = app.run_until(signals).await;
    // The last lines are written before the end; the end waits for nothing else.
    drop(logs);
    std::process::exit(report.exit_code().into());
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use analytics_relay::proto::v1::{TrackEventRequest, analytics_service_client::AnalyticsServiceClient};
    use axum::{Router, extract::State, http::HeaderMap, routing::post};
    use tokio::{net::TcpListener, sync::mpsc};

    use super::*;

    const SECRET: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

    fn webhook(url: &str) -> Webhook {
        Webhook::new(url, SECRET, Duration::from_secs(5)).unwrap()
    }

    #[test]
    fn the_signature_is_that_of_standard_webhooks() {
        let body = r#"{"type":"Order Placed","timestamp":"2026-01-01T00:00:00.000Z","data":{"total":19.5}}"#;
        let signature = webhook("http://localhost").sign("msg_01J0RELAYTEST", 1_767_225_600, body);
        assert_eq!(signature, "v1,lWMP7IILUlBQTkLaD6WWHUkCTHOIHVhxOqmflt+K5Zo=");
    }

    #[test]
    fn a_weak_secret_is_refused() {
        for secret in ["whsec_AAAA", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", "whsec_%"] {
            assert!(Webhook::new("http://localhost", secret, Duration::from_secs(1)).is_err());
        }
    }

    type Received = Arc<Mutex<Vec<(HeaderMap, String)>>>;

    /// Fails the first request, so that there is a retry to compare.
    async fn receive(State(received): State<Received>, headers: HeaderMap, body: String) -> StatusCode {
        let mut received = received.lock().unwrap();
        received.push((headers, body));
        if received.len() == 1 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
    }

    #[tokio::test]
    async fn events_of_a_relay_of_its_own_arrive_signed_and_with_one_id() {
        let received = Received::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let router = Router::new().route("/hook", post(receive)).with_state(received.clone());
        tokio::spawn(async { axum::serve(listener, router).await });

        let data = tempfile::tempdir().unwrap();
        let config = Config::from_vars([
            ("ANALYTICS_PROVIDER", "none"),
            ("GRPC_HOST", "127.0.0.1"),
            ("GRPC_PORT", "0"),
            ("METRICS_HOST", "127.0.0.1"),
            ("HTTP_PORT", "off"),
            ("METRICS_PORT", "0"),
            ("BATCH_SIZE", "1"),
            ("INITIAL_RETRY_DELAY_MS", "10"),
            ("DATA_DIR", data.path().to_str().unwrap()),
        ])
        .unwrap();
        let app = App::start_with(&config, vec![Arc::new(webhook(&url))]).await.unwrap();
        let addr = format!("http://{}", app.grpc_addr());
        let (signal, signals) = mpsc::channel(1);
        let running = tokio::spawn(app.run_until(signals));

        let mut client = AnalyticsServiceClient::connect(addr).await.unwrap();
        let request = TrackEventRequest { event_name: "Order Placed".into(), ..Default::default() };
        client.track_event(request).await.unwrap();
        while received.lock().unwrap().len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        signal.send(()).await.unwrap();
        let report = running.await.unwrap();
        assert_eq!((report.exit_code(), report.balances[0].delivered), (0, 1));

        let received = received.lock().unwrap();
        let header = |attempt: usize, name: &str| received[attempt].0[name].to_str().unwrap().to_owned();
        assert_eq!(header(0, "webhook-id"), header(1, "webhook-id"));
        assert_eq!(received[0].1, received[1].1);
        for attempt in 0..2 {
            let timestamp = header(attempt, "webhook-timestamp").parse().unwrap();
            let signature =
                webhook(&url).sign(&header(attempt, "webhook-id"), timestamp, &received[attempt].1);
            assert_eq!(header(attempt, "webhook-signature"), signature);
        }
    }
}
