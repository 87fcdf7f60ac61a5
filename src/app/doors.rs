//! What the doors need before anything else starts: ports, certificates, and how many
//! connections there is room for.

use std::net::SocketAddr;

use super::{StartError, listen};
use crate::{
    config::Config,
    ingest::{connections::Port, tls::Tls},
    listener::{self, ConnectionLimits},
};

/// The settings of the ports, for errors.
const GRPC_PORT: &str = "GRPC_HOST, GRPC_PORT";
const HTTP_PORT: &str = "HTTP_HOST, HTTP_PORT";

/// The ports of the doors, and where they are. Nobody is answered yet.
pub(super) struct DoorPorts {
    pub(super) grpc: Port,
    pub(super) grpc_addr: SocketAddr,
    /// Nothing if it is off.
    pub(super) http: Option<Port>,
    pub(super) http_addr: Option<SocketAddr>,
    /// Most connections of both.
    pub(super) connections_max: usize,
}

impl DoorPorts {
    /// Listens; each door gets its part of the connections that are set, or that the
    /// limit of open files leaves room for.
    pub(super) async fn open(config: &Config) -> Result<Self, StartError> {
        let (grpc, http) = (&config.grpc, &config.http);
        let grpc_tls = grpc.tls.as_ref().map(Tls::load).transpose()?;
        let http_tls = http.tls.as_ref().map(Tls::load).transpose()?;
        let (grpc_listener, grpc_addr) = listen(GRPC_PORT, &grpc.listen).await?;
        let http_listener = match &http.listen {
            Some(at) => Some(listen(HTTP_PORT, at).await?),
            None => None,
        };

        let of_http = http_listener.as_ref().map_or(0, |_| http.connections_max);
        let wanted = grpc.connections_max + of_http;
        let connections_max = listener::connections_within_limits(wanted);
        let part = |of_door: usize, of_peer| ConnectionLimits {
            all: (of_door * connections_max / wanted).max(1),
            of_peer,
        };
        let grpc_limits = part(grpc.connections_max, grpc.connections_of_peer_max);
        let http_limits = part(of_http, http.connections_of_peer_max);
        let port = |listener, tls, limits| Port { listener, tls, limits, ip_policy: config.ip_policy };
        let http_addr = http_listener.as_ref().map(|(_, addr)| *addr);
        Ok(Self {
            grpc: port(grpc_listener, grpc_tls, grpc_limits),
            grpc_addr,
            http: http_listener.map(|(listener, _)| port(listener, http_tls, http_limits)),
            http_addr,
            connections_max,
        })
    }
}
