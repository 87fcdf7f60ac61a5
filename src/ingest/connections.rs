//! What the doors have in common: connections are taken, agree on TLS, live as long
//! as they may and are seen off.

use std::{
    error::Error,
    future::Future,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    task::JoinSet,
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{
    budget::{ReceiveBudget, Receiving},
    tls::{RENEWAL_INTERVAL, Tls},
};
use crate::{
    address::{IpPolicy, told_ip},
    admission::Admission,
    health::Health,
    listener::{Connection, ConnectionLimits, Connections},
    query::Query,
    telemetry::IngestMetrics,
};

/// Where a door is.
pub(crate) struct Port {
    pub(crate) listener: TcpListener,
    pub(crate) tls: Option<Tls>,
    pub(crate) limits: ConnectionLimits,
    /// What the log may tell of who connects.
    pub(crate) ip_policy: IpPolicy,
}

/// What all doors lead to and count with.
#[derive(Clone)]
pub(crate) struct Behind {
    pub(crate) admission: Arc<Admission>,
    pub(crate) health: Arc<Health>,
    pub(crate) budget: Arc<ReceiveBudget>,
    pub(crate) query: Arc<Query>,
    pub(crate) metrics: IngestMetrics,
}

/// How long a connection lives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lifetime {
    /// A connection that has had no call for so long, and up to twice, is told to
    /// close, whatever else comes on it.
    pub(super) idle: Duration,
    /// After this time its caller is told to make a new one, so that callers
    /// spread over relays that were added; a tenth more or less, so that those
    /// which came together do not go together.
    pub(super) age_max: Duration,
    /// And its calls have this long to finish.
    pub(super) grace: Duration,
}

/// Of a connection beyond the number, which is there for a probe.
const SPARE_LIFETIME: Lifetime =
    Lifetime { idle: Duration::from_secs(5), age_max: Duration::from_secs(5), grace: Duration::from_secs(2) };

/// Serves the calls of one connection.
pub(super) trait Door: Clone + Send + 'static {
    /// Serves until the caller closes the connection, or until it is old or idle or the
    /// server is closing: then it takes no more calls and ends with its last one.
    fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        self,
        connection: Connection<S>,
        tending: Tending,
    ) -> impl Future<Output = ()> + Send;
}

/// What a door's connections are served with.
#[derive(Clone)]
struct Entrance<D> {
    tls: Option<Arc<Tls>>,
    handshakes_failed: Counter,
    ip_policy: IpPolicy,
    budget: Arc<ReceiveBudget>,
    lifetime: Lifetime,
    door: D,
}

impl Port {
    /// Serves until `stop`, then lets calls under way finish; unbounded, so the caller
    /// sets a limit.
    pub(super) async fn serve(
        self,
        door: impl Door,
        lifetime: Lifetime,
        budget: Arc<ReceiveBudget>,
        metrics: &IngestMetrics,
        stop: impl Future<Output = ()>,
    ) {
        let (open, refused) = (metrics.connections.clone(), metrics.connections_refused.clone());
        let connections = Connections::new(self.listener, self.limits, open, refused);
        let handshakes_failed = metrics.handshakes_failed.clone();
        let (tls, ip_policy) = (self.tls.map(Arc::new), self.ip_policy);
        let entrance = Entrance { tls, handshakes_failed, ip_policy, budget, lifetime, door };
        entrance.serve(connections, stop).await;
    }
}

impl<D: Door> Entrance<D> {
    async fn serve(self, connections: Connections, stop: impl Future<Output = ()>) {
        let renewals = self.tls.clone();
        tokio::select! {
            () = self.serve_connections(connections, stop) => {}
            Some(never) = async { Some(renewals?.follow_renewals(RENEWAL_INTERVAL).await) } => match never {},
        }
    }

    async fn serve_connections(self, mut connections: Connections, stop: impl Future<Output = ()>) {
        let (mut open, closing) = (JoinSet::new(), CancellationToken::new());
        let mut stop = pin!(stop);
        loop {
            tokio::select! {
                (connection, peer) = connections.next() => {
                    open.spawn(self.clone().serve_one(connection, peer, closing.clone()));
                }
                Some(_) = open.join_next() => {}
                () = &mut stop => break,
            }
        }
        drop(connections);
        closing.cancel();
        while open.join_next().await.is_some() {}
    }

    async fn serve_one(self, connection: Connection, peer: SocketAddr, closing: CancellationToken) {
        let receiving = self.budget.connection(peer.ip(), connection.slot());
        let lifetime = if receiving.is_spare() { SPARE_LIFETIME } else { self.lifetime };
        let tending = Tending { receiving, lifetime, closing: closing.clone() };
        let Some(tls) = self.tls else { return self.door.serve(connection, tending).await };
        let secured = tokio::select! {
            secured = connection.upgrade(|stream| async move { tls.accept(stream).await }) => secured,
            () = closing.cancelled() => return,
        };
        match secured {
            Ok(connection) => self.door.serve(connection, tending).await,
            Err(error) => {
                self.handshakes_failed.inc();
                let peer = told_ip(peer.ip(), self.ip_policy).map(tracing::field::display);
                debug!(peer, %error, "TLS handshake failed");
            }
        }
    }
}

/// Sees to it that a connection ends.
pub(super) struct Tending {
    pub(super) receiving: Arc<Receiving>,
    lifetime: Lifetime,
    closing: CancellationToken,
}

impl Tending {
    /// Serves until the connection is over, which is told to `close` when it is time.
    pub(super) async fn until_over<C, E>(self, mut served: Pin<&mut C>, close: impl FnOnce(Pin<&mut C>))
    where
        C: Future<Output = Result<(), E>>,
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        let Self { receiving, lifetime, closing } = self;
        let idle = without_calls(receiving, lifetime.idle);
        let age_max = lifetime.age_max.mul_f64(0.9 + fastrand::f64() / 5.0);
        let ended = tokio::select! {
            ended = served.as_mut() => Some(ended),
            () = sleep(age_max) => None,
            () = idle => None,
            () = closing.cancelled() => None,
        };
        let ended = match ended {
            Some(ended) => ended,
            None => {
                close(served.as_mut());
                tokio::select! {
                    ended = served => ended,
                    () = sleep(lifetime.grace) => return debug!("an old connection was cut off"),
                }
            }
        };
        if let Err(error) = ended {
            let error = error.into();
            debug!(error = &*error as &dyn Error, "connection failed");
        }
    }
}

/// Ends when a connection has had no call for one interval at least.
async fn without_calls(receiving: Arc<Receiving>, interval: Duration) {
    /// Held here, and by what hands them out.
    const WITHOUT_CALLS: usize = 2;
    loop {
        let before = receiving.calls();
        sleep(interval).await;
        if receiving.calls() == before && Arc::strong_count(&receiving) <= WITHOUT_CALLS {
            return;
        }
    }
}
