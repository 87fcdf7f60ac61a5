//! Handlers of HTTP that do the least with a body: one reads it, one parses it into
//! `serde_json::Value`. What a relay costs is told beside them.

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

/// What they do.
pub(crate) const FLOORS: [&str; 2] = ["http_read", "http_value"];
const ANSWER: &[u8] = b"{\"success\":true}";

/// Answers every call after it has read its body, or parsed it too, until SIGTERM.
pub(crate) async fn serve(kind: &str, listener: TcpListener) -> anyhow::Result<()> {
    let parses = kind == FLOORS[1];
    let mut terminate = signal(SignalKind::terminate())?;
    loop {
        let (stream, _) = tokio::select! {
            accepted = listener.accept() => accepted?,
            _ = terminate.recv() => return Ok(()),
        };
        stream.set_nodelay(true)?;
        let answer = move |request: Request<Incoming>| async move {
            let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            if parses {
                let value: Value = serde_json::from_slice(&body).unwrap_or_default();
                std::hint::black_box(&value);
            }
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(ANSWER))))
        };
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)));
    }
}
