//! What is known of a call beside its events.

use std::net::IpAddr;

/// The door that a call came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    Grpc,
    Http,
}

impl Door {
    /// Its name in logs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Http => "http",
        }
    }
}

/// What a call showed to say who it is. Never the secret itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Credential {
    None,
    /// A write key that is taken.
    WriteKey,
}

/// Goes with each draft to admission, which says of a refusal where it came from and gives
/// an event its tenant.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallContext<'a> {
    pub(crate) door: Door,
    /// Where the connection comes from.
    pub(crate) peer: IpAddr,
    /// The user's own address, if it is the user's own device that calls.
    pub(crate) client: Option<IpAddr>,
    pub(crate) credential: Credential,
    /// Whose the events are; nobody's in particular where a relay has one tenant.
    pub(crate) tenant: Option<&'a str>,
    /// Of the call; an item may have its own.
    pub(crate) schema_version: u32,
}

impl CallContext<'static> {
    /// Of a call over gRPC: from a server of the customer's, and of the version that its
    /// package names.
    pub(crate) const fn of_grpc(peer: IpAddr) -> Self {
        let (door, credential) = (Door::Grpc, Credential::None);
        Self { door, peer, client: None, credential, tenant: None, schema_version: 1 }
    }
}
