//! A relay inside of another program: what the library's users see.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use analytics_relay::{
    app::{App, StartError},
    config::Config,
    proto::v1::analytics_service_client::AnalyticsServiceClient,
    providers::{BatchLimits, Event, Provider, Rejection, SendError, Verdict},
};
use async_trait::async_trait;
use tokio::{sync::mpsc, time::timeout};

use crate::harness::{Observer, reqwest_client};

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

/// Refuses an event and panics where nobody reckons with it: its lane dies of that.
#[derive(Default)]
struct Deadly {
    has_refused: AtomicBool,
}

#[async_trait]
impl Provider for Deadly {
    fn name(&self) -> &'static str {
        assert!(!self.has_refused.swap(false, Ordering::SeqCst), "a defect");
        "deadly"
    }

    fn limits(&self) -> BatchLimits {
        Nowhere("").limits()
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        self.has_refused.store(true, Ordering::SeqCst);
        let verdict = Verdict::Rejected { reason: Rejection::Invalid, detail: "no".into() };
        Ok(vec![verdict; batch.len()])
    }
}

fn nowhere(names: &[&'static str]) -> Vec<Arc<dyn Provider>> {
    names.iter().map(|name| Arc::new(Nowhere(name)) as Arc<dyn Provider>).collect()
}

async fn start(own: Vec<Arc<dyn Provider>>) -> (tempfile::TempDir, Result<App, StartError>) {
    let data = tempfile::tempdir().unwrap();
    let config = Config::from_vars([
        ("ANALYTICS_PROVIDER", "none"),
        ("GRPC_HOST", "127.0.0.1"),
        ("GRPC_PORT", "0"),
        ("METRICS_HOST", "127.0.0.1"),
        ("HTTP_PORT", "off"),
        ("METRICS_PORT", "0"),
        ("BATCH_SIZE", "1"),
        ("MAX_RETRY_ATTEMPTS", "1"),
        ("DATA_DIR", data.path().to_str().unwrap()),
    ])
    .unwrap();
    (data, App::start_with(&config, own).await)
}

#[tokio::test]
async fn a_relay_without_a_provider_or_with_two_of_one_name_does_not_start() {
    let (_data, started) = start(nowhere(&[])).await;
    assert!(matches!(started, Err(StartError::NoProvider)), "{started:?}");
    let (_data, started) = start(nowhere(&["one", "other", "one"])).await;
    assert!(matches!(started, Err(StartError::SameName("one"))), "{started:?}");
}

/// The program that holds the relay keeps the other end of its signals.
#[tokio::test]
async fn it_says_where_it_listens_and_what_became_of_everything() {
    let (_data, started) = start(nowhere(&["one", "other"])).await;
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

/// Nobody has to ask it to stop; the others get what they are owed, and what the dead
/// stage had is counted.
#[tokio::test]
async fn a_stage_that_dies_ends_the_relay_and_its_loss_is_told() {
    let mut own = nowhere(&["other"]);
    own.push(Arc::<Deadly>::default());
    let (_data, started) = start(own).await;
    let app = started.unwrap();
    let addr = format!("http://{}", app.grpc_addr());
    let (_signal, signals) = mpsc::channel(1);
    let running = tokio::spawn(app.run_until(signals));
    let mut client = AnalyticsServiceClient::connect(addr).await.unwrap();
    let mut observer = Observer::default();
    while observer.accepted.len() < 500 && observer.track(&mut client, "x", "u").await.is_none() {}
    let report = timeout(Duration::from_secs(30), running).await.expect("it ends by itself").unwrap();
    assert!(report.failed);
    let [other, deadly] = &report.balances[..] else { panic!("{report}") };
    assert_eq!((other.delivered, other.lost()), (other.accepted, 0), "{report}");
    assert!(deadly.lost() > 0 && deadly.delivered == 0, "{report}");
    assert_eq!(deadly.lost(), deadly.accepted, "{report}");
    assert_eq!(report.exit_code(), 2);
}
