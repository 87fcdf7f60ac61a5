//! What the doors need before anything else starts: ports, certificates, and how many
//! connections there is room for.

use std::net::SocketAddr;

use tokio::net::TcpListener;

use super::{HTTP_PORT, StartError, listen};
use crate::{
    config::Config,
    ingest::tls::Tls,
    listener::{self, ConnectionLimits},
};

/// The port of the HTTP door.
pub(super) struct HttpPort {
    pub(super) listener: TcpListener,
    pub(super) addr: SocketAddr,
    pub(super) tls: Option<Tls>,
}

impl HttpPort {
    /// Listens, if it is to be; nobody is answered yet.
    pub(super) async fn open(config: &Config) -> Result<Option<Self>, StartError> {
        let Some(at) = &config.http.listen else { return Ok(None) };
        let tls = config.http.tls.as_ref().map(Tls::load).transpose()?;
        let (listener, addr) = listen(HTTP_PORT, at).await?;
        Ok(Some(Self { listener, addr, tls }))
    }
}

/// Most connections of each door.
#[derive(Debug, Clone, Copy)]
pub(super) struct DoorConnections {
    pub(super) grpc: ConnectionLimits,
    pub(super) http: ConnectionLimits,
}

impl DoorConnections {
    /// As many as are set, or as the limit of open files leaves room for; then each door
    /// has its part of them.
    pub(super) fn within_limits(config: &Config) -> Self {
        let grpc = config.grpc.connections_max;
        let http = if config.http.listen.is_some() { config.http.connections_max } else { 0 };
        let room = listener::connections_within_limits(grpc + http);
        let part = |wanted: usize| (wanted * room / (grpc + http)).max(1);
        Self {
            grpc: ConnectionLimits { all: part(grpc), of_peer: config.grpc.connections_of_peer_max },
            http: ConnectionLimits { all: part(http), of_peer: config.http.connections_of_peer_max },
        }
    }
}
