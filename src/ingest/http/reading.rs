//! Who may read over HTTP.
//!
//! The port is open to browsers, and a write key stands in every page: neither makes a reader.
//! One who knows a key of `READ_KEYS` reads. Without any such key nobody does, but in test mode
//! and where the port is this machine's own: there nothing is asked of a call that neither a
//! page nor a proxy can have brought. A page that somebody there looks at can neither read an
//! answer (no header allows it to) nor have its own name resolved to this machine (the name
//! that is called must be one that no page can have), and what a proxy passes on comes from
//! elsewhere.

use std::{
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use analytics_relay_providers::Secret;
use analytics_relay_store::TenantScope;
use hyper::{
    HeaderMap, Uri,
    header::{AUTHORIZATION, HOST},
};
use ring::digest::{SHA256, digest};
use tracing::warn;

use super::reply::Problem;
use crate::{ingest::client_address::is_passed_on, telemetry::OnceInAWhile};

/// How often it is said that somebody may not read.
const REFUSED_INTERVAL: Duration = Duration::from_secs(60);
const NO_KEYS: &str = "READ_KEYS is not set, and without keys only calls of this machine to a port of its own are \
                       answered";

/// Who may read.
#[derive(Debug)]
pub(super) struct Readers {
    /// Hashes, so that all are of one length.
    keys: Vec<[u8; 32]>,
    /// Without keys nobody is asked for one.
    is_open: bool,
    refused: Mutex<OnceInAWhile>,
}

impl Readers {
    /// With `is_open` whoever is here may read, as long as there are no keys.
    pub(super) fn new(keys: &[Secret], is_open: bool) -> Self {
        let keys: Vec<_> = keys.iter().map(|key| hashed(key.expose())).collect();
        let is_open = is_open && keys.is_empty();
        Self { keys, is_open, refused: Mutex::new(OnceInAWhile::every(REFUSED_INTERVAL)) }
    }

    /// What the caller may read, or why nothing.
    pub(super) fn check(&self, headers: &HeaderMap, uri: &Uri, peer: IpAddr) -> Result<TenantScope, Problem> {
        let key = bearer(headers);
        let why = match key {
            _ if self.is_open => match self.why_not_here(headers, uri) {
                None => return Ok(of_relay()),
                Some(why) => why,
            },
            _ if self.keys.is_empty() => NO_KEYS,
            Some(key) if self.knows(key) => return Ok(of_relay()),
            Some(_) => "the key is none of READ_KEYS",
            None => "want Authorization: Bearer <a key of READ_KEYS>",
        };
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(calls) = refused.takes(1, Instant::now()) {
            warn!(calls, why, %peer, "calls that may not read are refused");
        }
        Err(Problem::MayNotRead { why, has_key: key.is_some() })
    }

    /// Takes the same time whichever key it is, and if it is none.
    fn knows(&self, key: &str) -> bool {
        let key = hashed(key);
        let differs = |known: &[u8; 32]| known.iter().zip(&key).fold(0, |bits, (a, b)| bits | (a ^ b));
        self.keys.iter().fold(false, |knows, known| knows | (differs(known) == 0))
    }

    fn why_not_here(&self, headers: &HeaderMap, uri: &Uri) -> Option<&'static str> {
        if is_passed_on(headers) {
            return Some("a proxy has passed the call on: set READ_KEYS");
        }
        let host = headers.get(HOST).and_then(|host| host.to_str().ok());
        let host = uri.authority().map(hyper::http::uri::Authority::as_str).or(host);
        (!host.is_some_and(is_of_no_page))
            .then_some("the call names a host that a page may have: set READ_KEYS")
    }
}

/// There is one tenant, and no key names a part of it.
fn of_relay() -> TenantScope {
    TenantScope::tenant("")
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

/// True of an address and of a name without a dot, which no page on the Internet has.
fn is_of_no_page(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    };
    let is_address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok();
    is_address || !host.is_empty() && !host.contains(['.', '@', ':'])
}

fn hashed(key: &str) -> [u8; 32] {
    digest(&SHA256, key.as_bytes()).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef";

    fn check(readers: &Readers, headers: &[(&'static str, &str)]) -> Result<(), bool> {
        let headers = headers
            .iter()
            .map(|(name, value)| (hyper::header::HeaderName::from_static(name), value.parse().unwrap()));
        let uri = Uri::from_static("/api/v1/events/count");
        match readers.check(&headers.collect(), &uri, [127, 0, 0, 1].into()) {
            Ok(of) => {
                assert_eq!(of, TenantScope::tenant(""));
                Ok(())
            }
            Err(Problem::MayNotRead { has_key, .. }) => Err(has_key),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn who_knows_a_key_reads_and_nobody_else() {
        let keys = ["another-key-0123", KEY].map(Secret::new);
        for is_open in [false, true] {
            let readers = Readers::new(&keys, is_open);
            for value in ["Bearer 0123456789abcdef", "bearer  0123456789abcdef ", "Bearer another-key-0123"] {
                assert_eq!(check(&readers, &[("authorization", value)]), Ok(()), "{value}");
            }
            for value in ["Bearer 0123456789abcdeg", "Bearer 0123456789abcde", "Bearer 0123456789abcdef0"] {
                assert_eq!(check(&readers, &[("authorization", value)]), Err(true), "{value}");
            }
            // As write keys come.
            for headers in [
                &[][..],
                &[("authorization", "Basic MDEyMzQ1Njc4OWFiY2RlZjo=")],
                &[("x-api-key", KEY), ("host", "localhost")],
                &[("authorization", KEY)],
            ] {
                assert_eq!(check(&readers, headers), Err(false), "{headers:?}");
            }
        }
    }

    #[test]
    fn without_keys_nobody_reads_but_who_is_here() {
        assert_eq!(check(&Readers::new(&[], false), &[("host", "localhost")]), Err(false));
        assert_eq!(check(&Readers::new(&[], false), &[("authorization", "Bearer ")]), Err(true));
        let here = Readers::new(&[], true);
        for host in ["localhost:8080", "127.0.0.1:8080", "[::1]:8080", "10.0.0.7", "relay:8080", "LOCALHOST"]
        {
            assert_eq!(check(&here, &[("host", host)]), Ok(()), "{host}");
        }
        // What a page can be called, whose name was made one of this machine; and a proxy's.
        for host in
            ["evil.example:8080", "localhost.evil.example", "", ":8080", "a@b", "127.0.0.1.nip.example"]
        {
            assert_eq!(check(&here, &[("host", host)]), Err(false), "{host}");
        }
        assert_eq!(check(&here, &[]), Err(false));
        for name in ["x-forwarded-for", "forwarded"] {
            assert_eq!(check(&here, &[("host", "localhost"), (name, "203.0.113.9")]), Err(false), "{name}");
        }
    }
}
