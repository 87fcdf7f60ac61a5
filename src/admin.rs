//! What an operator's machines ask: `/metrics`, `/healthz`, `/readyz`. On a port
//! of its own.

use std::{future::Future, io, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::net::TcpListener;

use crate::{
    health::Health,
    listener::{ConnectionLimits, Connections, Listen},
    settings::Reader,
    telemetry::Telemetry,
};

/// Most connections at a time: a few scrapers and probes. Beyond, the newest gets
/// through and the oldest beyond is closed: who holds them all keeps no probe out.
const LIMITS: ConnectionLimits = ConnectionLimits { all: 32, of_peer: Some(usize::MAX) };
/// Longest silence of a connection. Scrapers and probes connect again.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// The media type of the text format that the metrics are written in.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the metrics port is told.
#[derive(Debug, Clone)]
pub struct AdminSettings {
    /// Where to listen for scrapes and probes.
    pub listen: Listen,
}

impl AdminSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        Self { listen: Listen::read(reader, "METRICS_HOST", "METRICS_PORT") }
    }
}

#[derive(Clone)]
struct Admin {
    telemetry: Arc<Telemetry>,
    health: Arc<Health>,
}

/// Serves until `stop`.
pub(crate) async fn serve(
    listener: TcpListener,
    telemetry: Arc<Telemetry>,
    health: Arc<Health>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(Admin { telemetry, health });
    let connections = Connections::new(listener, LIMITS, Gauge::default(), Counter::default())
        .with_idle_timeout(IDLE_TIMEOUT);
    axum::serve(connections, router).with_graceful_shutdown(stop).await
}

async fn metrics(State(admin): State<Admin>) -> impl IntoResponse {
    match admin.telemetry.encode() {
        Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, OPENMETRICS)], text),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], error.to_string())
        }
    }
}

/// The process works; whether it should get traffic is another question.
async fn healthz(State(admin): State<Admin>) -> String {
    admin.health.status()
}

/// Whether the relay should get traffic: yes, until it drains, or its disk
/// fails. A provider in trouble is no reason to send events elsewhere.
async fn readyz(State(admin): State<Admin>) -> (StatusCode, String) {
    let status = admin.health.status();
    let code = if admin.health.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, status)
}
