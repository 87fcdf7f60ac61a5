//! Headers that say where a call comes from.

use std::net::{IpAddr, Ipv4Addr};

use analytics_relay_providers::fuzzing::Input;
use hyper::{HeaderMap, header::HeaderValue};

use crate::ingest::client_address::{ClientAddressSettings, ForwardedHeader, client_of};

/// A proxy that is trusted, and whom it was called by.
const PROXY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
const CALLER: IpAddr = IpAddr::V4(Ipv4Addr::new(81, 2, 69, 142));

/// Whatever a caller writes, it is whom the proxy saw.
pub fn forwarded(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (list, name, added) = match input.below(4) {
        0 => (ForwardedHeader::XForwardedFor, "x-forwarded-for", "81.2.69.142"),
        1 => (ForwardedHeader::XForwardedFor, "x-forwarded-for", "81.2.69.142:4711, 10.0.0.7"),
        2 => (ForwardedHeader::Forwarded, "forwarded", "for=81.2.69.142"),
        _ => (ForwardedHeader::Forwarded, "forwarded", "proto=https;For=\"81.2.69.142:4711\";by=\"[::1]\""),
    };
    let is_own_line = input.flag();
    let lines: Vec<&[u8]> = input.rest().split(|byte| *byte == b'\n').collect();
    let trusted = vec!["10.0.0.0/8".parse().expect("it is a network")];
    let settings = ClientAddressSettings { trusted, forwarded: list, ..ClientAddressSettings::default() };

    let mut headers = HeaderMap::new();
    for line in &lines {
        headers.extend(HeaderValue::from_bytes(line).map(|value| (name.parse().ok(), value)));
    }
    let unasked = headers.is_empty().then_some(CALLER);
    assert_eq!(client_of(CALLER, &headers, &settings).ip, unasked, "who is not trusted is not asked");
    assert!(client_of(PROXY, &headers, &settings).ip.is_some());

    // And now the proxy adds whom it was called by.
    let last = headers.get_all(name).iter().next_back().cloned();
    let last = last.filter(|_| !is_own_line).map(|last| [last.as_bytes(), b", "].concat());
    if last.is_some() {
        let mut all: Vec<HeaderValue> = headers.get_all(name).iter().cloned().collect();
        all.pop();
        headers.clear();
        headers.extend(all.into_iter().map(|value| (name.parse().ok(), value)));
    }
    let line = [last.unwrap_or_default().as_slice(), added.as_bytes()].concat();
    let line = HeaderValue::from_bytes(&line).expect("its parts were values");
    headers.append(name, line);
    assert_eq!(client_of(PROXY, &headers, &settings).ip, Some(CALLER), "{headers:?}");
}
