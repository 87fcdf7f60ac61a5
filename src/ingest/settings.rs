//! What the front doors are told.

use super::tls::TlsFiles;
use crate::{listener::Listen, settings::Reader};

/// How gRPC is served.
#[derive(Debug, Clone)]
pub struct GrpcSettings {
    /// Where to listen for callers.
    pub listen: Listen,
    /// Most connections of callers.
    pub connections_max: usize,
    /// What to serve TLS with; plaintext if nothing.
    pub tls: Option<TlsFiles>,
}

impl GrpcSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        Self {
            listen: Listen::read(reader, "GRPC_HOST", "GRPC_PORT"),
            connections_max: reader.number("GRPC_MAX_CONNECTIONS", 1..=100_000),
            tls: TlsFiles::read(reader),
        }
    }
}
