//! Which address a call comes from: that of its connection, or, behind proxies that the
//! operator names, the one that the first of them saw.
//!
//! Anybody can write any header. So what stands in one is believed only as far as a trusted
//! proxy wrote it: a list is read from its right end, where the proxy next to us has added
//! whom it was called by, and no further than the first address that is no trusted proxy's.
//! What stands to the left of that is the caller's own say.
//!
//! A call that says that it was passed on, by nobody who is named, has no address: that of
//! its connection is a proxy's, and taken for its users' it would put all of them in one
//! place and make one visitor of many.

use std::{fmt, net::IpAddr, str};

use hyper::{
    HeaderMap,
    header::{FORWARDED, HeaderName},
};
use ipnet::IpNet;

use crate::settings::Reader;

/// Most proxies that a call is followed through.
const HOPS_MAX: usize = 32;
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Whose word on where a call comes from is believed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientAddressSettings {
    /// Networks of the operator's own proxies; without any, no header is looked at.
    pub trusted: Vec<IpNet>,
    /// The header in which they write the one address of the user; nothing if it is to be
    /// found in a list.
    pub header: Option<HeaderName>,
    /// Which list.
    pub forwarded: ForwardedHeader,
    /// The header in which they write the user's country, if they do.
    pub country_header: Option<HeaderName>,
}

/// The lists of addresses that a call came by. One of them is read and never both: a proxy
/// that knows one of them passes the other on as its caller wrote it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ForwardedHeader {
    /// Addresses with commas between them, as most proxies write.
    #[default]
    XForwardedFor,
    /// That of RFC 7239.
    Forwarded,
}

impl ClientAddressSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        let trusted = read_networks(reader);
        let is_nobody_trusted = reader.lookup("TRUSTED_PROXIES").0.is_empty();
        let header = read_header(reader, "CLIENT_IP_HEADER", is_nobody_trusted);
        let forwarded = reader.one_of(
            "FORWARDED_HEADER",
            &[("x-forwarded-for", ForwardedHeader::XForwardedFor), ("forwarded", ForwardedHeader::Forwarded)],
        );
        let country_header = read_header(reader, "COUNTRY_HEADER", is_nobody_trusted);
        // Each address of a list would be a proxy's, and the caller's own say be taken.
        if header.is_none()
            && let Some(all) = trusted.iter().find(|network| network.prefix_len() == 0)
        {
            let want = "the networks of your proxies; all addresses only with CLIENT_IP_HEADER";
            reader.wrong("TRUSTED_PROXIES", &all.to_string(), want);
        }
        Self { trusted, header, forwarded, country_header }
    }

    fn trusts(&self, ip: IpAddr) -> bool {
        self.trusted.iter().any(|network| network.contains(&ip))
    }
}

/// True if a call says that a proxy has passed it on.
pub(super) fn is_passed_on(headers: &HeaderMap) -> bool {
    headers.contains_key(X_FORWARDED_FOR) || headers.contains_key(FORWARDED)
}

fn read_networks(reader: &mut Reader) -> Vec<IpNet> {
    let text = reader.text("TRUSTED_PROXIES");
    let mut networks = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let network = part.parse::<IpNet>().map(|network| network.trunc());
        match network.or_else(|_| part.parse::<IpAddr>().map(|ip| IpNet::from(ip.to_canonical()))) {
            Ok(network) => networks.push(network),
            Err(_) => {
                reader.wrong("TRUSTED_PROXIES", part, "networks as 10.0.0.0/8, with commas between them")
            }
        }
    }
    networks
}

/// The name of a header that holds one value. Nobody who is not trusted is asked for it.
fn read_header(reader: &mut Reader, setting: &str, is_nobody_trusted: bool) -> Option<HeaderName> {
    let text = reader.text(setting);
    if text.is_empty() {
        return None;
    }
    match text.parse::<HeaderName>() {
        Ok(name) if name == X_FORWARDED_FOR || name == FORWARDED => {
            reader.wrong(setting, &text, "a header with one value; a list is named by FORWARDED_HEADER");
        }
        Ok(_) if is_nobody_trusted => {
            reader.wrong(setting, &text, "TRUSTED_PROXIES too: from others the header is not believed");
        }
        Ok(name) => return Some(name),
        Err(_) => reader.wrong(setting, &text, "the name of a header"),
    }
    None
}

/// Whom a call comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Client {
    /// Nothing of a call that a proxy which is not trusted seems to have passed on.
    pub(crate) ip: Option<IpAddr>,
    /// Its country in two capital letters, as the proxy says it.
    pub(crate) country_hint: Option<[u8; 2]>,
}

/// Users' addresses are in no log line by accident.
impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("is_known", &self.ip.is_some()).finish_non_exhaustive()
    }
}

/// Whom a call comes from that a peer has brought.
pub(crate) fn client_of(peer: IpAddr, headers: &HeaderMap, settings: &ClientAddressSettings) -> Client {
    let peer = peer.to_canonical();
    if !settings.trusts(peer) {
        let ip = (!is_passed_on(headers)).then_some(peer);
        return Client { ip, country_hint: None };
    }
    let ip = match &settings.header {
        Some(name) => only_value(headers, name).and_then(address_in).unwrap_or(peer),
        None => first_untrusted(peer, headers, settings),
    };
    let country_hint =
        settings.country_header.as_ref().and_then(|name| country_in(only_value(headers, name)?));
    Client { ip: Some(ip), country_hint }
}

/// The first from the right that is no trusted proxy; where the list ends, or is not to be
/// understood, the last that was.
fn first_untrusted(peer: IpAddr, headers: &HeaderMap, settings: &ClientAddressSettings) -> IpAddr {
    let mut last = peer;
    for hop in hops(headers, settings.forwarded) {
        let Some(ip) = hop else { return last };
        last = ip;
        if !settings.trusts(ip) {
            break;
        }
    }
    last
}

/// What the proxies say whom they were called by, the nearest first; nothing for one that
/// does not say it.
fn hops(headers: &HeaderMap, list: ForwardedHeader) -> impl Iterator<Item = Option<IpAddr>> {
    let name = match list {
        ForwardedHeader::XForwardedFor => X_FORWARDED_FOR,
        ForwardedHeader::Forwarded => FORWARDED,
    };
    // Several lines are one, in their order.
    let lines = headers.get_all(name).iter().rev();
    let elements = lines.flat_map(|line| FromTheRight { left: Some(line.as_bytes()), separator: b',' });
    let elements = elements.take(HOPS_MAX).filter(|element| !element.trim_ascii().is_empty());
    elements.map(move |element| match list {
        ForwardedHeader::XForwardedFor => address_in(element),
        ForwardedHeader::Forwarded => address_in(value_of_for(element)?),
    })
}

/// The value of an element's `for`, of which there may be one.
fn value_of_for(element: &[u8]) -> Option<&[u8]> {
    let pairs = FromTheRight { left: Some(element), separator: b';' };
    let mut values = pairs.filter_map(|pair| {
        let equals = memchr::memchr(b'=', pair)?;
        let (name, value) = (&pair[..equals], &pair[equals + 1..]);
        name.trim_ascii().eq_ignore_ascii_case(b"for").then_some(value)
    });
    values.next().filter(|_| values.next().is_none())
}

/// The parts of a text, from the right. What is in quotes is no separator; and because it is
/// from the right that quotes are told, one that a caller left open at the left cannot reach
/// over what a proxy has added.
struct FromTheRight<'a> {
    left: Option<&'a [u8]>,
    separator: u8,
}

impl<'a> Iterator for FromTheRight<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let left = self.left.take()?;
        let mut is_quoted = false;
        for (at, byte) in left.iter().enumerate().rev() {
            match byte {
                b'"' if !(is_quoted && is_escaped(left, at)) => is_quoted = !is_quoted,
                byte if *byte == self.separator && !is_quoted => {
                    self.left = Some(&left[..at]);
                    return Some(&left[at + 1..]);
                }
                _ => {}
            }
        }
        Some(left)
    }
}

fn is_escaped(text: &[u8], at: usize) -> bool {
    text[..at].iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1
}

/// The value of a header that is there once.
fn only_value<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none()).map(|value| value.as_bytes())
}

/// The address that a text is: alone, with a port, in brackets, in quotes.
fn address_in(text: &[u8]) -> Option<IpAddr> {
    let text = str::from_utf8(text.trim_ascii()).ok()?;
    let text = text.strip_prefix('"').map_or(Some(text), |text| text.strip_suffix('"'))?.trim();
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(ip.to_canonical());
    }
    let (ip, port): (IpAddr, &str) = match text.strip_prefix('[') {
        Some(text) => {
            let (ip, behind) = text.split_once(']')?;
            (IpAddr::V6(ip.parse().ok()?), behind)
        }
        None => {
            let (ip, behind) = text.split_at(text.find(':')?);
            (IpAddr::V4(ip.parse().ok()?), behind)
        }
    };
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    (port.is_empty() || port.strip_prefix(':').is_some_and(is_port)).then(|| ip.to_canonical())
}

fn country_in(value: &[u8]) -> Option<[u8; 2]> {
    let letters: [u8; 2] = value.trim_ascii().try_into().ok()?;
    letters.iter().all(u8::is_ascii_alphabetic).then(|| letters.map(|letter| letter.to_ascii_uppercase()))
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const PROXY: &str = "10.0.0.1";
    const USER: &str = "81.2.69.142";

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn settings(forwarded: ForwardedHeader) -> ClientAddressSettings {
        let trusted = ["10.0.0.0/8", "2001:db8:1::/48"].map(|network| network.parse().unwrap()).into();
        ClientAddressSettings { trusted, forwarded, ..ClientAddressSettings::default() }
    }

    fn headers(lines: &[(&str, &[u8])]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(name.parse::<HeaderName>().unwrap(), HeaderValue::from_bytes(value).unwrap());
        }
        headers
    }

    fn of_list(list: ForwardedHeader, name: &str, lines: &[&str]) -> String {
        let lines: Vec<_> = lines.iter().map(|line| (name, line.as_bytes())).collect();
        let client = client_of(ip(PROXY), &headers(&lines), &settings(list));
        client.ip.unwrap().to_string()
    }

    fn of_x(lines: &[&str]) -> String {
        of_list(ForwardedHeader::XForwardedFor, "x-forwarded-for", lines)
    }

    fn of_rfc(lines: &[&str]) -> String {
        of_list(ForwardedHeader::Forwarded, "forwarded", lines)
    }

    /// The peer may be the user, or a proxy that nobody has named: that of one whose calls
    /// say that they were passed on is no user's.
    #[test]
    fn who_is_no_trusted_proxy_is_believed_in_nothing_and_no_proxy_is_taken_for_its_users() {
        let lies: [(&str, &[u8]); 3] =
            [("cf-connecting-ip", b"6.6.6.6"), ("x-real-ip", b"6.6.6.6"), ("cf-ipcountry", b"DE")];
        let passed_on: [[(&str, &[u8]); 1]; 3] =
            [[("x-forwarded-for", b"6.6.6.6")], [("x-forwarded-for", b"")], [("forwarded", b"for=6.6.6.6")]];
        let peer = Client { ip: Some(ip(USER)), country_hint: None };
        let nobody = Client { ip: None, ..peer };
        let mut full = settings(ForwardedHeader::XForwardedFor);
        full.header = Some(HeaderName::from_static("cf-connecting-ip"));
        full.country_header = Some(HeaderName::from_static("cf-ipcountry"));
        for settings in [
            ClientAddressSettings::default(),
            settings(ForwardedHeader::XForwardedFor),
            settings(ForwardedHeader::Forwarded),
            full,
        ] {
            assert!(client_of(ip(USER), &headers(&lies), &settings) == peer, "{settings:?}");
            assert!(client_of(ip("::ffff:81.2.69.142"), &headers(&lies), &settings) == peer);
            for passed_on in passed_on {
                let lies = headers(&[&lies[..], &passed_on].concat());
                assert!(client_of(ip(USER), &lies, &settings) == nobody, "{settings:?} {passed_on:?}");
            }
        }
    }

    #[test]
    fn a_list_is_read_from_its_right_end_and_the_callers_own_say_is_at_its_left() {
        for (lines, want) in [
            (&[USER][..], USER),
            (&["6.6.6.6, 81.2.69.142"], USER),
            (&["6.6.6.6", "7.7.7.7, 81.2.69.142"], USER),
            (&["6.6.6.6", "81.2.69.142", "10.0.0.2"], USER),
            (&["6.6.6.6, 81.2.69.142, 10.0.0.3,10.0.0.2"], USER),
            (&["81.2.69.142, 2001:db8:1::7"], USER),
            (&["81.2.69.142, ::ffff:10.0.0.9"], USER),
            (&["10.0.0.5, 10.0.0.4"], "10.0.0.5"),
            (&[" 81.2.69.142:4711\t"], USER),
            (&["\"81.2.69.142\""], USER),
            (&["[2001:218::1]:4711"], "2001:218::1"),
            (&["[2001:218::1]"], "2001:218::1"),
            (&["2001:218::1"], "2001:218::1"),
            (&["\"[2001:218::1]:4711\""], "2001:218::1"),
            (&["81.2.69.142, , ,"], USER),
            (&[], PROXY),
            (&[""], PROXY),
            (&["6.6.6.6\", 81.2.69.142"], USER),
            (&["\"6.6.6.6, ", "81.2.69.142"], USER),
        ] {
            assert_eq!(of_x(lines), want, "{lines:?}");
        }
    }

    #[test]
    fn what_is_not_to_be_understood_ends_the_list_at_the_last_proxy() {
        for bad in [
            "unknown",
            "_hidden",
            "81.2.69",
            "81.2.69.142:",
            "81.2.69.142:x",
            "[81.2.69.142]",
            "[2001:218::1",
            "2001:218::1]",
            "[2001:218::1]4711",
            "fe80::1%eth0",
            "\"81.2.69.142",
            "81.2.69.142\"",
            "81.2.69.142 6.6.6.6",
            "for=81.2.69.142",
            "é",
        ] {
            assert_eq!(of_x(&[bad]), PROXY, "{bad}");
            assert_eq!(of_x(&["6.6.6.6", bad, "10.0.0.2"]), "10.0.0.2", "{bad}");
        }
        let not_text: [(&str, &[u8]); 2] =
            [("x-forwarded-for", b"\xFF, 81.2.69.142"), ("x-forwarded-for", b"10.0.0.2")];
        let client = client_of(ip(PROXY), &headers(&not_text), &settings(ForwardedHeader::XForwardedFor));
        assert_eq!(client.ip, Some(ip(USER)), "what a caller wrote cannot hide what a proxy did");
    }

    #[test]
    fn a_list_is_followed_through_so_many_proxies_and_no_more() {
        let list = |proxies: usize| format!("81.2.69.142{}", ", 10.0.0.2".repeat(proxies));
        assert_eq!(of_x(&[&list(HOPS_MAX - 1)]), USER);
        assert_eq!(of_x(&[&list(HOPS_MAX)]), "10.0.0.2");
        assert_eq!(of_x(&[&",".repeat(8000)]), PROXY);
    }

    #[test]
    fn the_list_of_rfc_7239_is_read_alike() {
        for (lines, want) in [
            (&["for=81.2.69.142"][..], USER),
            (&["for=6.6.6.6, for=81.2.69.142;proto=https;by=10.0.0.1"], USER),
            (&["proto=http ; For = \"81.2.69.142:4711\""], USER),
            (&["for=\"[2001:218::1]:4711\""], "2001:218::1"),
            (&["for=\"[2001:218::1]\"", "for=10.0.0.2"], "2001:218::1"),
            (&["for=81.2.69.142;host=\"a,b;for=6.6.6.6\""], USER),
            (&["for=81.2.69.142;host=\"a\\\",for=6.6.6.6\""], USER),
            // Left open by the caller, to reach over what the proxy adds.
            (&["for=6.6.6.6;x=\", for=\"81.2.69.142:1\""], USER),
            (&["for=6.6.6.6, for=\", for=\"81.2.69.142:1\""], USER),
            (&["for=\"\\", "for=\"81.2.69.142\""], USER),
            (&["for=unknown"], PROXY),
            (&["for=6.6.6.6, for=_hidden, for=10.0.0.2"], "10.0.0.2"),
            (&["for=6.6.6.6;for=81.2.69.142"], PROXY),
            (&["for=6.6.6.6, proto=https"], PROXY),
            (&["81.2.69.142"], PROXY),
            (&["for"], PROXY),
        ] {
            assert_eq!(of_rfc(lines), want, "{lines:?}");
        }
        assert_eq!(of_list(ForwardedHeader::Forwarded, "x-forwarded-for", &["6.6.6.6"]), PROXY, "never both");
        assert_eq!(
            of_list(ForwardedHeader::XForwardedFor, "forwarded", &["for=6.6.6.6"]),
            PROXY,
            "never both"
        );
    }

    #[test]
    fn one_header_is_asked_where_the_proxies_write_one() {
        let mut settings = settings(ForwardedHeader::XForwardedFor);
        settings.header = Some(HeaderName::from_static("x-real-ip"));
        let list: (&str, &[u8]) = ("x-forwarded-for", b"6.6.6.6");
        let of = |lines: &[(&str, &[u8])]| {
            client_of(ip(PROXY), &headers(lines), &settings).ip.unwrap().to_string()
        };
        assert_eq!(of(&[list, ("x-real-ip", b"81.2.69.142")]), USER);
        assert_eq!(of(&[("x-real-ip", b"10.7.7.7")]), "10.7.7.7", "one of our own");
        for none in
            [&[list][..], &[list, ("x-real-ip", b"unknown")], &[list, ("x-real-ip", b"6.6.6.6, 7.7.7.7")]]
        {
            assert_eq!(of(none), PROXY, "the list is not asked");
        }
        let twice: [(&str, &[u8]); 2] = [("x-real-ip", b"6.6.6.6"), ("x-real-ip", b"81.2.69.142")];
        assert_eq!(of(&twice), PROXY, "one of the two is the caller's");
    }

    #[test]
    fn a_country_is_believed_of_a_trusted_proxy_in_the_header_that_is_named() {
        let mut settings = settings(ForwardedHeader::XForwardedFor);
        let of = |settings: &ClientAddressSettings, lines: &[(&str, &[u8])]| {
            client_of(ip(PROXY), &headers(lines), settings).country_hint
        };
        let country: (&str, &[u8]) = ("cf-ipcountry", b"de");
        assert_eq!(
            of(&settings, &[country]),
            None,
            "a proxy that does not know the header passes on anybody's"
        );
        settings.country_header = Some(HeaderName::from_static("cf-ipcountry"));
        assert_eq!(of(&settings, &[country]), Some(*b"DE"));
        assert_eq!(of(&settings, &[country, country]), None);
        for value in [&b"T1"[..], b"", b"D", b"DEU", b"\xC3\xA9"] {
            assert_eq!(of(&settings, &[("cf-ipcountry", value)]), None, "{value:?}");
        }
    }

    #[test]
    fn settings_that_would_believe_anybody_or_nobody_are_refused() {
        let read = |vars: &[(&str, &str)]| {
            let vars = vars.iter().map(|(name, value)| ((*name).into(), (*value).into()));
            let mut reader = Reader::new(vars, std::path::Path::new(""));
            let settings = ClientAddressSettings::read(&mut reader);
            reader.finish().map(|_| settings).map_err(|error| error.0)
        };
        assert_eq!(read(&[]), Ok(ClientAddressSettings::default()));
        let full = read(&[
            ("TRUSTED_PROXIES", "10.1.2.3/8, ::1,127.0.0.1 "),
            ("CLIENT_IP_HEADER", "CF-Connecting-IP"),
            ("FORWARDED_HEADER", "forwarded"),
            ("COUNTRY_HEADER", "CF-IPCountry"),
        ]);
        let full = full.unwrap();
        let shown: Vec<_> = full.trusted.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["10.0.0.0/8", "::1/128", "127.0.0.1/32"]);
        assert_eq!(full.header, Some(HeaderName::from_static("cf-connecting-ip")));
        assert_eq!(full.country_header, Some(HeaderName::from_static("cf-ipcountry")));
        assert_eq!(full.forwarded, ForwardedHeader::Forwarded);
        let proxies = ("TRUSTED_PROXIES", "10.0.0.0/8");
        for (vars, error) in [
            (
                &[("TRUSTED_PROXIES", "10.0.0.0/8, proxy")][..],
                "TRUSTED_PROXIES: got \"proxy\", want networks",
            ),
            (&[("TRUSTED_PROXIES", "10.0.0.0/33")], "TRUSTED_PROXIES: got \"10.0.0.0/33\", want networks"),
            (
                &[("TRUSTED_PROXIES", "::/0")],
                "TRUSTED_PROXIES: got \"::/0\", want the networks of your proxies",
            ),
            (
                &[("CLIENT_IP_HEADER", "x-real-ip")],
                "CLIENT_IP_HEADER: got \"x-real-ip\", want TRUSTED_PROXIES too",
            ),
            (
                &[("COUNTRY_HEADER", "x-country")],
                "COUNTRY_HEADER: got \"x-country\", want TRUSTED_PROXIES too",
            ),
            (
                &[proxies, ("CLIENT_IP_HEADER", "a b")],
                "CLIENT_IP_HEADER: got \"a b\", want the name of a header",
            ),
            (
                &[proxies, ("CLIENT_IP_HEADER", "X-Forwarded-For")],
                "CLIENT_IP_HEADER: got \"X-Forwarded-For\", want a header with one value",
            ),
            (
                &[proxies, ("FORWARDED_HEADER", "both")],
                "FORWARDED_HEADER: got \"both\", want x-forwarded-for or forwarded",
            ),
        ] {
            let errors = read(vars).unwrap_err();
            assert!(errors.len() == 1 && errors[0].starts_with(error), "{errors:?}");
        }
        assert!(read(&[("TRUSTED_PROXIES", "0.0.0.0/0"), ("CLIENT_IP_HEADER", "fly-client-ip")]).is_ok());
    }

    fn line() -> impl Strategy<Value = Vec<u8>> {
        let parts = prop_oneof![
            Just("6.6.6.6".to_owned()),
            Just("10.0.0.2".to_owned()),
            Just("[2001:218::1]:1".to_owned()),
            Just("for=".to_owned()),
            "[\",;=\\\\ :\\[\\]]{1,3}",
            "[ -~]{0,12}",
        ];
        let text = prop::collection::vec(parts, 0..8).prop_map(|parts| parts.concat().into_bytes());
        let bytes = prop::collection::vec(prop_oneof![32_u8..127, 128_u8..=255], 0..40);
        prop_oneof![4 => text, 1 => bytes]
    }

    proptest! {
        /// The one thing that must never go wrong.
        #[test]
        fn whatever_a_caller_writes_it_is_whom_the_trusted_proxy_saw(
            lines in prop::collection::vec(line(), 0..4),
            is_rfc in any::<bool>(),
            is_own_line in any::<bool>(),
            added in prop::sample::select(vec![USER, "\"81.2.69.142:1\""]),
        ) {
            let (list, name) = match is_rfc {
                true => (ForwardedHeader::Forwarded, "forwarded"),
                false => (ForwardedHeader::XForwardedFor, "x-forwarded-for"),
            };
            let added = if is_rfc { format!("for={added}") } else { added.to_owned() };
            let mut lines = lines;
            match lines.last_mut() {
                Some(last) if !is_own_line => last.extend([b", ", added.as_bytes()].concat()),
                _ => lines.push(added.into_bytes()),
            }
            let lines: Vec<_> = lines.iter().map(|line| (name, line.as_slice())).collect();
            prop_assert_eq!(client_of(ip(PROXY), &headers(&lines), &settings(list)).ip, Some(ip(USER)));
            prop_assert_eq!(client_of(ip("7.7.7.7"), &headers(&lines), &settings(list)).ip, None);
        }

        /// Of what nobody trusted has added, the answer is the proxy or something that stands there.
        #[test]
        fn the_answer_is_the_peer_or_one_of_the_hops(lines in prop::collection::vec(line(), 0..4), is_rfc in any::<bool>()) {
            let (list, name) = match is_rfc {
                true => (ForwardedHeader::Forwarded, "forwarded"),
                false => (ForwardedHeader::XForwardedFor, "x-forwarded-for"),
            };
            let lines: Vec<_> = lines.iter().map(|line| (name, line.as_slice())).collect();
            let headers = headers(&lines);
            let answer = client_of(ip(PROXY), &headers, &settings(list)).ip.unwrap();
            prop_assert!(answer == ip(PROXY) || hops(&headers, list).any(|hop| hop == Some(answer)));
        }
    }
}
