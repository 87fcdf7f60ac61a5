//! A relay inside of another program: what the library's users see.

use std::sync::Arc;

use analytics_relay::{
    app::{App, StartError},
    config::Config,
    providers::{BatchLimits, Event, Provider, SendError, Verdict},
};
use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::harness::reqwest_client;

struct Nowhere(&'static str);

#[async_trait]
impl Provider for Nowhere {
    fn name(&self) -> &'static str {
        self.0
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits { events_max: 10, body_bytes_max: 1 << 20, requests_max: 1 }
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        Ok(vec![Verdict::Delivered; batch.len()])
    }
}

async fn start(names: &[&'static str]) -> (tempfile::TempDir, Result<App, StartError>) {
    let data = tempfile::tempdir().unwrap();
    let config = Config::from_vars([
        ("ANALYTICS_PROVIDER", "none"),
        ("GRPC_HOST", "127.0.0.1"),
        ("GRPC_PORT", "0"),
        ("METRICS_HOST", "127.0.0.1"),
        ("METRICS_PORT", "0"),
        ("DATA_DIR", data.path().to_str().unwrap()),
    ])
    .unwrap();
    let own = names.iter().map(|name| Arc::new(Nowhere(name)) as Arc<dyn Provider>).collect();
    (data, App::start_with(&config, own).await)
}

#[tokio::test]
async fn a_relay_without_a_provider_or_with_two_of_one_name_does_not_start() {
    let (_data, started) = start(&[]).await;
    assert!(matches!(started, Err(StartError::NoProvider)), "{started:?}");
    let (_data, started) = start(&["one", "other", "one"]).await;
    assert!(matches!(started, Err(StartError::SameName("one"))), "{started:?}");
}

/// The program that holds the relay keeps the other end of its signals.
#[tokio::test]
async fn it_says_where_it_listens_and_what_became_of_everything() {
    let (_data, started) = start(&["one", "other"]).await;
    let app = started.unwrap();
    let url = format!("http://{}/healthz", app.metrics_addr());
    let (signal, signals) = mpsc::channel(1);
    let running = tokio::spawn(app.run_until(signals));
    assert_eq!(reqwest_client().get(url).send().await.unwrap().text().await.unwrap(), "SERVING");
    signal.send(()).await.unwrap();
    let report = running.await.unwrap();
    assert_eq!((report.exit_code(), report.balances.len()), (0, 2));
    let printed = report.to_string();
    let starts: Vec<_> = printed.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(starts, ["one", "other"], "{printed}");
}
