//! What the vendors' contracts have in common: the request as they read it, the
//! judgement they return, and the checks more than one of them makes.

use std::borrow::Cow;
use std::io::Read;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use hyper::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE};
use hyper::{HeaderMap, Method};
use serde_json::{Map, Value};

use super::fault::Fault;
use super::record::Arrival;

/// Above every vendor's own limit: what is larger is too large for each of them,
/// and need not be held.
pub(super) const CONTENT_MAX_BYTES: usize = 32 * 1024 * 1024;

/// A request, complete.
pub(super) struct Request<'a> {
    pub(super) method: &'a Method,
    pub(super) path: &'a str,
    pub(super) query: &'a str,
    pub(super) headers: &'a HeaderMap,
    pub(super) content: &'a Content,
}

/// What a request is judged by, beside its vendor's rules.
pub(super) struct Terms<'a> {
    /// The only key accepted.
    pub(super) key: &'a str,
    /// The vendor's clock, in Unix milliseconds.
    pub(super) now_ms: i64,
    /// Consulted for the faults that concern single events.
    pub(super) fault: Option<&'a Fault>,
}

/// What a vendor makes of a request.
pub(super) struct Judgement {
    pub(super) status: u16,
    pub(super) body: Value,
    /// Events in the request, as far as it could be read.
    pub(super) events: usize,
    /// The events taken.
    pub(super) taken: Vec<Arrival>,
    /// Events refused or discarded one by one.
    pub(super) rejected: u64,
}

impl Judgement {
    /// Nothing taken, and no event blamed.
    pub(super) fn refuse(status: u16, body: Value) -> Self {
        Self { status, body, events: 0, taken: Vec::new(), rejected: 0 }
    }
}

/// A body after decompression.
pub(super) struct Content {
    pub(super) bytes: Bytes,
    pub(super) coding: Coding,
}

/// What the body was before decompression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    Identity,
    Gzip,
    /// Says gzip and is not, or an encoding none of the vendors reads.
    Unreadable,
    /// More than [`CONTENT_MAX_BYTES`]; `bytes` is empty.
    TooLarge,
}

impl Content {
    /// Decompresses `raw`, and stops at [`CONTENT_MAX_BYTES`].
    pub(super) fn decode(headers: &HeaderMap, raw: Bytes) -> Self {
        Self::decode_up_to(CONTENT_MAX_BYTES, headers, raw)
    }

    fn decode_up_to(max_bytes: usize, headers: &HeaderMap, raw: Bytes) -> Self {
        let coding = headers.get(CONTENT_ENCODING).map_or("identity", |value| value.to_str().unwrap_or("?"));
        if coding.eq_ignore_ascii_case("identity") {
            return Self::bounded(max_bytes, raw, Coding::Identity);
        }
        if !coding.eq_ignore_ascii_case("gzip") {
            return Self { bytes: raw, coding: Coding::Unreadable };
        }
        let mut bytes = Vec::new();
        // One byte more than allowed tells "too large" from "just fits".
        let mut decoder = MultiGzDecoder::new(raw.as_ref()).take(max_bytes as u64 + 1);
        match decoder.read_to_end(&mut bytes) {
            Ok(_) => Self::bounded(max_bytes, bytes.into(), Coding::Gzip),
            Err(_) => Self { bytes: raw, coding: Coding::Unreadable },
        }
    }

    /// A body that was larger than the sandbox reads.
    pub(super) fn too_large() -> Self {
        Self { bytes: Bytes::new(), coding: Coding::TooLarge }
    }

    /// Whether it exceeds the limit, however much.
    pub(super) fn exceeds(&self, limit_bytes: usize) -> bool {
        self.coding == Coding::TooLarge || self.bytes.len() > limit_bytes
    }

    fn bounded(max_bytes: usize, bytes: Bytes, coding: Coding) -> Self {
        if bytes.len() > max_bytes { Self::too_large() } else { Self { bytes, coding } }
    }
}

impl Request<'_> {
    /// Whether it carries Basic credentials of `key` and an empty password.
    pub(super) fn has_basic_key(&self, key: &str) -> bool {
        self.basic_user().is_some_and(|user| user == key.as_bytes())
    }

    /// The user name of Basic credentials with an empty password.
    pub(super) fn basic_user(&self) -> Option<Vec<u8>> {
        let credentials = self.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let (scheme, encoded) = credentials?.split_once(' ')?;
        let decoded = STANDARD.decode(encoded).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
        decoded.strip_suffix(b":").map(<[u8]>::to_vec)
    }

    /// Whether its content type is JSON, with or without parameters.
    pub(super) fn is_json(&self) -> bool {
        self.is_of("application/json")
    }

    /// Whether its content type is that of a form.
    pub(super) fn is_form(&self) -> bool {
        self.is_of("application/x-www-form-urlencoded")
    }

    fn is_of(&self, media_type: &str) -> bool {
        let content_type =
            self.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let essence = content_type.split_once(';').map_or(content_type, |(essence, _)| essence);
        essence.trim().eq_ignore_ascii_case(media_type)
    }

    /// The first value of a query parameter.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        parameter(self.query, name)
    }
}

/// The first value of a parameter in a query string. Nothing the sandbox reads
/// needs percent-decoding.
pub(super) fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

/// How many objects and arrays are inside one another; 0 for a plain value.
pub(super) fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(members) => 1 + members.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// A member that is there and not null.
pub(super) fn present<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    object.get(name).filter(|value| !value.is_null())
}

/// A member that is a string, or "".
pub(super) fn text<'a>(object: &'a Map<String, Value>, name: &str) -> &'a str {
    object.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// The body as text, for people to read.
pub(super) fn readable(content: &Content) -> Cow<'_, str> {
    String::from_utf8_lossy(&content.bytes)
}

#[cfg(test)]
pub(super) mod testing {
    //! Requests without a socket.

    use super::*;

    pub(crate) const KEY: &str = "sandbox-key";
    pub(crate) const NOW_MS: i64 = 1_767_225_600_000;

    /// A request as the relay should send it; the fields are for spoiling.
    pub(crate) struct Sample {
        pub(crate) method: Method,
        pub(crate) target: String,
        pub(crate) headers: HeaderMap,
        pub(crate) body: Bytes,
        pub(crate) fault: Option<Fault>,
    }

    impl Sample {
        pub(crate) fn new(target: &str, body: impl ToString) -> Self {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, "application/json".parse().unwrap());
            let basic = format!("Basic {}", STANDARD.encode(format!("{KEY}:")));
            headers.insert(AUTHORIZATION, basic.parse().unwrap());
            let body = Bytes::from(body.to_string());
            Self { method: Method::POST, target: target.to_owned(), headers, body, fault: None }
        }

        pub(crate) fn header(mut self, name: &'static str, value: &str) -> Self {
            self.headers.insert(name, value.parse().unwrap());
            self
        }

        pub(crate) fn gzip(mut self) -> Self {
            let mut body = Vec::new();
            flate2::read::GzEncoder::new(self.body.as_ref(), flate2::Compression::fast())
                .read_to_end(&mut body)
                .unwrap();
            self.body = body.into();
            self.header("content-encoding", "gzip")
        }

        pub(crate) fn fault(mut self, text: &str) -> Self {
            self.fault = Some(text.parse().unwrap());
            self
        }

        pub(crate) fn judge(&self, judge: fn(&Request<'_>, &Terms<'_>) -> Judgement) -> Judgement {
            let (path, query) = self.target.split_once('?').unwrap_or((&self.target, ""));
            let content = &Content::decode(&self.headers, self.body.clone());
            let request = Request { method: &self.method, path, query, headers: &self.headers, content };
            judge(&request, &Terms { key: KEY, now_ms: NOW_MS, fault: self.fault.as_ref() })
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::testing::Sample;
    use super::*;

    #[test]
    fn a_bomb_is_too_large_and_costs_no_more_than_the_bound() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_ENCODING, "gzip".parse().unwrap());
        let mut bomb = Vec::new();
        let zeros = std::io::repeat(0).take(1_000_001);
        flate2::read::GzEncoder::new(zeros, flate2::Compression::fast()).read_to_end(&mut bomb).unwrap();
        assert_eq!(Content::decode_up_to(1_000_001, &headers, bomb.clone().into()).bytes.len(), 1_000_001);
        let content = Content::decode_up_to(1_000_000, &headers, bomb.into());
        assert_eq!(content.coding, Coding::TooLarge);
        assert!(content.exceeds(usize::MAX));
    }

    #[test]
    fn what_is_not_gzip_or_is_cut_short_is_unreadable() {
        let sample = Sample::new("/", "{}").gzip();
        let decode = |body: Bytes| Content::decode(&sample.headers, body).coding;
        assert_eq!(decode(sample.body.clone()), Coding::Gzip);
        assert_eq!(decode(sample.body.slice(..sample.body.len() - 1)), Coding::Unreadable);
        assert_eq!(decode(Bytes::from_static(b"{}")), Coding::Unreadable);
        assert_eq!(decode([sample.body.as_ref(), b"x"].concat().into()), Coding::Unreadable);
    }

    #[test]
    fn depth_counts_objects_and_arrays() {
        assert_eq!(depth(&json!(1)), 0);
        assert_eq!(depth(&json!({})), 1);
        assert_eq!(depth(&json!({"a": [{"b": 1}], "c": {}})), 3);
    }
}
