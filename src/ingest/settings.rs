//! What the front doors are told.

use super::tls::{TlsDoor, TlsFiles};
use crate::{listener::Listen, settings::Reader};

/// How gRPC is served.
#[derive(Debug, Clone)]
pub struct GrpcSettings {
    /// Where to listen for callers.
    pub listen: Listen,
    /// Most connections of callers.
    pub connections_max: usize,
    /// Most of them of one peer; nothing if a quarter, and without a limit for this
    /// machine's own.
    pub connections_of_peer_max: Option<usize>,
    /// Most bytes of messages that are being received.
    pub receive_bytes_max: usize,
    /// What to serve TLS with; plaintext if nothing.
    pub tls: Option<TlsFiles>,
}

impl GrpcSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        Self {
            listen: Listen::read(reader, "GRPC_HOST", "GRPC_PORT"),
            connections_max: reader.number("GRPC_MAX_CONNECTIONS", 1..=100_000),
            connections_of_peer_max: reader.number_if_set("GRPC_MAX_CONNECTIONS_PER_PEER", 1..=100_000),
            receive_bytes_max: reader.number("GRPC_RECEIVE_MAX_BYTES", 4 << 20..=1 << 36),
            tls: TlsFiles::read(reader, TlsDoor::GRPC),
        }
    }
}
