//! What the front doors are told.

use super::{
    client_address::ClientAddressSettings,
    tls::{TlsDoor, TlsFiles},
};
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

/// How HTTP is served.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// Where to listen for callers; nowhere if nothing.
    pub listen: Option<Listen>,
    /// Most connections of callers.
    pub connections_max: usize,
    /// Most of them of one peer; nothing if a quarter, and without a limit for this
    /// machine's own.
    pub connections_of_peer_max: Option<usize>,
    /// The write keys that are taken; any, and none, if there are none.
    pub write_keys: Vec<String>,
    /// Whose word on where a call comes from is believed.
    pub clients: ClientAddressSettings,
    /// What to serve TLS with; plaintext if nothing.
    pub tls: Option<TlsFiles>,
}

impl HttpSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        let is_off = reader.lookup("HTTP_PORT").0.eq_ignore_ascii_case("off");
        let listen = if is_off {
            reader.text("HTTP_HOST");
            reader.text("HTTP_PORT");
            None
        } else {
            Some(Listen::read(reader, "HTTP_HOST", "HTTP_PORT"))
        };
        Self {
            listen,
            connections_max: reader.number("HTTP_MAX_CONNECTIONS", 1..=100_000),
            connections_of_peer_max: reader.number_if_set("HTTP_MAX_CONNECTIONS_PER_PEER", 1..=100_000),
            write_keys: write_keys(reader),
            clients: ClientAddressSettings::read(reader),
            tls: TlsFiles::read(reader, TlsDoor::HTTP),
        }
    }

    /// True if anybody who reaches the port can send.
    pub fn is_open(&self) -> bool {
        self.write_keys.is_empty() && self.listen.as_ref().is_some_and(|listen| !listen.is_loopback())
    }
}

fn write_keys(reader: &mut Reader) -> Vec<String> {
    let text = reader.secret("HTTP_WRITE_KEYS");
    let keys: Vec<String> =
        text.split(',').map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned).collect();
    // Without a key the door would take any.
    if keys.is_empty() && !text.trim().is_empty() {
        reader.wrong("HTTP_WRITE_KEYS", "a list without a key", "keys with commas between them, or nothing");
    }
    keys
}
