//! What is known of a call beside its events.

use std::net::IpAddr;

use crate::address::{IpPolicy, stored_ip};

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

impl CallContext<'_> {
    /// The peer and the client, as far as they may be written down. Whoever calls over HTTP
    /// may be a user, unless it is a proxy of which it is known.
    pub(super) fn shown(&self, policy: IpPolicy) -> [Option<IpAddr>; 2] {
        let peer = self.peer.to_canonical();
        let is_users = self.door == Door::Http && self.client.is_none_or(|client| client == peer);
        let kept = |ip| stored_ip(ip, true, policy);
        [if is_users { kept(peer) } else { Some(peer) }, self.client.and_then(kept)]
    }
}

impl CallContext<'static> {
    /// Of a call over gRPC: from a server of the customer's, and of the version that its
    /// package names.
    pub(crate) const fn of_grpc(peer: IpAddr) -> Self {
        let (door, credential) = (Door::Grpc, Credential::None);
        Self { door, peer, client: None, credential, tenant: None, schema_version: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_of_an_address_is_told_than_is_kept() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let (user, proxy) = (ip("81.2.69.142"), ip("10.0.0.1"));
        let grpc = CallContext::of_grpc(user);
        let http = CallContext { door: Door::Http, ..grpc };
        let (cut, mapped) = (Some(ip("81.2.69.0")), ip("::ffff:81.2.69.142"));
        for (call, want) in [
            (CallContext { client: Some(user), ..http }, [cut, cut]),
            (CallContext { peer: mapped, client: Some(user), ..http }, [cut, cut]),
            (CallContext { peer: proxy, client: Some(user), ..http }, [Some(proxy), cut]),
            // Its context may say that it is a device.
            (http, [cut, None]),
            (grpc, [Some(user), None]),
        ] {
            assert_eq!(call.shown(IpPolicy::ByOrigin), want, "{call:?}");
        }
        let device = CallContext { client: Some(user), ..http };
        assert_eq!(device.shown(IpPolicy::None), [None, None]);
        assert_eq!(device.shown(IpPolicy::Full), [Some(user), Some(user)]);
    }
}
