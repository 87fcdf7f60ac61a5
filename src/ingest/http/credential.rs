//! Write keys: which are taken, and where a call says its own.

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use hyper::{HeaderMap, header::AUTHORIZATION};
use tracing::warn;

use super::reply::Problem;
use crate::telemetry::OnceInAWhile;

/// How often it is said that calls are refused for their keys.
const REFUSED_INTERVAL: Duration = Duration::from_secs(60);

/// The write keys that are taken.
#[derive(Debug)]
pub(super) struct WriteKeys {
    /// Nothing if any is, and none too.
    keys: Option<HashSet<String>>,
    refused: Mutex<OnceInAWhile>,
}

impl WriteKeys {
    pub(super) fn new(keys: &[String]) -> Self {
        let keys = (!keys.is_empty()).then(|| keys.iter().cloned().collect());
        Self { keys, refused: Mutex::new(OnceInAWhile::every(REFUSED_INTERVAL)) }
    }

    /// True if not every key is taken.
    pub(super) fn are_checked(&self) -> bool {
        self.keys.is_some()
    }

    /// Takes the key, or tells why not; whether there has to be one is not known before
    /// the body is read. The peer is told
    /// in the log, as much of it as may be; the path is a label: one of settings has a key in it.
    pub(super) fn check(
        &self,
        key: Option<&str>,
        peer: impl FnOnce() -> Option<IpAddr>,
        path: &str,
    ) -> Result<(), Problem> {
        let Some(keys) = &self.keys else { return Ok(()) };
        let why = match key {
            Some(key) if keys.contains(key) => return Ok(()),
            Some(_) => "the write key is none of HTTP_WRITE_KEYS",
            None => "want a write key: Authorization: Basic base64(key:), or writeKey in the body",
        };
        self.note_refused(why, peer, path);
        Err(Problem::Unauthorized(why))
    }

    /// Says it loudly, and who the last one is: SDKs take it for final and drop what they
    /// hold.
    fn note_refused(&self, why: &str, peer: impl FnOnce() -> Option<IpAddr>, path: &str) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(calls) = refused.takes(1, Instant::now()) {
            let peer = peer().map(tracing::field::display);
            warn!(
                calls,
                why, peer, path, "calls are refused for their write key, and SDKs drop their events"
            );
        }
    }
}

/// The key in a call's head: Basic with the key as the user, as SDKs send it, Bearer, or
/// `x-api-key`. An empty one is none: the body may have it.
pub(super) fn key_in(headers: &HeaderMap) -> Option<String> {
    stated_key_in(headers).filter(|key| !key.is_empty())
}

fn stated_key_in(headers: &HeaderMap) -> Option<String> {
    let text = |value: &hyper::header::HeaderValue| value.to_str().ok().map(str::to_owned);
    let Some(authorization) = headers.get(AUTHORIZATION).and_then(text) else {
        return headers.get("x-api-key").and_then(text);
    };
    let (scheme, credentials) = authorization.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(credentials.trim().to_owned());
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = BASE64_STANDARD.decode(credentials.trim()).ok()?;
    let user_and_password = String::from_utf8(decoded).ok()?;
    // Old SDKs leave the colon out.
    Some(user_and_password.split_once(':').map_or(user_and_password.as_str(), |(user, _)| user).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_wherever_sdks_put_it() {
        let key = |name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            key_in(&headers)
        };
        let some = Some("wk".to_owned());
        assert_eq!(key("authorization", "Basic d2s6"), some);
        assert_eq!(key("authorization", "basic d2s="), some);
        assert_eq!(key("authorization", "Basic d2s6cGFzcw=="), some);
        assert_eq!(key("authorization", "Bearer wk"), some);
        assert_eq!(key("x-api-key", "wk"), some);
        for value in ["Basic", "Basic ???", "Digest d2s6", "Basic /w==", "Basic Og==", "Bearer "] {
            assert_eq!(key("authorization", value), None, "{value}");
        }
    }

    #[test]
    fn without_keys_all_are_taken_and_with_some_those() {
        let check = |keys: &WriteKeys, key| keys.check(key, || None, "/v1/t");
        assert!(check(&WriteKeys::new(&[]), None).is_ok());
        let keys = WriteKeys::new(&["a".into(), "b".into()]);
        assert!(check(&keys, Some("b")).is_ok());
        for key in [None, Some("c"), Some("")] {
            assert!(matches!(check(&keys, key), Err(Problem::Unauthorized(_))));
        }
    }
}
