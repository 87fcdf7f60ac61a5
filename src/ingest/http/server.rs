//! The server behind the HTTP front door, with every limit set: HTTP/1.1 and HTTP/2 on
//! one port.

use std::{convert::Infallible, future::Future, pin::pin, sync::Arc, time::Duration};

use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::io::{AsyncRead, AsyncWrite};

use super::door::HttpDoor;
use crate::{
    ingest::{
        budget::Receiving,
        connections::{Behind, Door, Lifetime, Port, Tending},
        settings::HttpSettings,
    },
    listener::Connection,
    refused::RefusedKeeper,
};

/// Largest head of a call, and what is read ahead of a connection.
const HEADER_BYTES_MAX: usize = 32 * 1024;
const HEADERS_MAX: usize = 100;
/// Longest time for the head of a call, and so between two calls: longer than load
/// balancers keep a connection, so that they and not we close it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// Most calls at a time on one connection of HTTP/2.
const STREAMS_MAX: u32 = 100;
/// Most calls that their caller has reset and that we have not seen off yet
/// (CVE-2023-44487).
const RESETS_MAX: usize = 100;
const SEND_BYTES_MAX: usize = 64 * 1024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

const LIFETIME: Lifetime = Lifetime {
    idle: Duration::from_secs(150),
    age_max: Duration::from_secs(30 * 60),
    grace: Duration::from_secs(30),
};

/// Serves until `stop`, then lets calls under way finish; unbounded, so the caller sets a
/// limit. `providers` are the names of those that get events.
pub(crate) async fn serve(
    port: Port,
    behind: Behind,
    settings: &HttpSettings,
    providers: Vec<&'static str>,
    refused: Arc<RefusedKeeper>,
    stop: impl Future<Output = ()>,
) {
    let Behind { admission, health, budget, query, metrics } = behind;
    let is_tls = port.tls.is_some();
    let door = HttpDoor::new(admission, health, settings, providers, refused, query, metrics.clone());
    port.serve(ServedDoor { door: Arc::new(door), is_tls }, LIFETIME, budget, &metrics, stop).await;
}

#[derive(Clone)]
struct ServedDoor {
    door: Arc<HttpDoor>,
    is_tls: bool,
}

impl Door for ServedDoor {
    async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        self,
        connection: Connection<S>,
        tending: Tending,
    ) {
        let Self { door, is_tls } = self;
        let receiving = tending.receiving.clone();
        let http = http_of(&receiving);
        let answer = service_fn(move |call| {
            let (door, receiving) = (door.clone(), receiving.begin_call());
            Box::pin(async move { Ok::<_, Infallible>(door.answer(call, receiving, is_tls).await) })
        });
        let served = pin!(http.serve_connection(TokioIo::new(connection), answer));
        tending.until_over(served, |served| served.graceful_shutdown()).await;
    }
}

/// Both protocols with every limit set.
fn http_of(receiving: &Receiving) -> auto::Builder<TokioExecutor> {
    let window = receiving.window();
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEADER_BYTES_MAX)
        .keep_alive(true);
    http.http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(window / 4)
        .initial_connection_window_size(window)
        .max_header_list_size(u32::try_from(HEADER_BYTES_MAX).expect("it is small"))
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_send_buf_size(SEND_BYTES_MAX)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    http
}
