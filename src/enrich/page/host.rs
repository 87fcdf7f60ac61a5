//! Hosts as they are kept and compared: lower case, in the form that DNS has, without port
//! and without a dot at the end.

use std::{borrow::Cow, net::IpAddr};

use psl::{List, Psl, Type};
use url::Host;

/// Longest host that DNS knows, and longest label.
const HOST_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;

/// A host as it is kept; nothing if it is none.
pub(super) fn normal(host: &str) -> Option<Cow<'_, str>> {
    if host.len() > HOST_BYTES_MAX * 4 {
        return None;
    }
    let host = host.strip_suffix('.').unwrap_or(host);
    match plain(host) {
        Plain::Lower => return Some(host.into()),
        Plain::Mixed => return Some(host.to_ascii_lowercase().into()),
        Plain::Not => {}
    }
    // Addresses, other letters than ASCII's, escapes: seldom.
    let host = Host::parse(host).ok()?.to_string();
    let is_host = host.starts_with('[') || host.len() <= HOST_BYTES_MAX && host.split('.').all(is_label);
    is_host.then_some(host.into())
}

/// How plain a name is: in ASCII, and standing for nothing else than itself.
enum Plain {
    Lower,
    Mixed,
    Not,
}

fn plain(host: &str) -> Plain {
    let (mut label_bytes, mut has_upper, mut begins_with_digit) = (0, false, false);
    for (at, byte) in host.bytes().enumerate() {
        if byte == b'.' {
            if label_bytes == 0 {
                return Plain::Not;
            }
            label_bytes = 0;
            continue;
        }
        let stands_for_other_letters = || {
            label_bytes == 0 && host.get(at..at + 4).is_some_and(|start| start.eq_ignore_ascii_case("xn--"))
        };
        if !is_of_label(byte) || label_bytes == LABEL_BYTES_MAX || stands_for_other_letters() {
            return Plain::Not;
        }
        if label_bytes == 0 {
            begins_with_digit = byte.is_ascii_digit();
        }
        has_upper |= byte.is_ascii_uppercase();
        label_bytes += 1;
    }
    match has_upper {
        // A last label of digits makes an address.
        _ if label_bytes == 0 || begins_with_digit || host.len() > HOST_BYTES_MAX => Plain::Not,
        true => Plain::Mixed,
        false => Plain::Lower,
    }
}

fn is_label(label: &str) -> bool {
    (1..=LABEL_BYTES_MAX).contains(&label.len()) && label.bytes().all(is_of_label)
}

fn is_of_label(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// Without the `www.` that says nothing.
pub(super) fn without_www(host: &str) -> &str {
    host.strip_prefix("www.").filter(|rest| rest.contains('.')).unwrap_or(host)
}

/// A host and the domains above it, the longest first, without the top one.
pub(super) fn and_above(host: &str) -> impl Iterator<Item = &str> {
    with_ends(host).filter(|host| host.contains('.'))
}

/// Labels, then the same without the first one, and so on.
pub(super) fn with_ends(labels: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(labels), |labels| labels.split_once('.').map(|(_, end)| end))
}

/// True if a host is this domain or below it, by whole labels.
pub(super) fn is_of(host: &str, domain: &str) -> bool {
    host.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// True if both belong to whoever registered one domain.
pub(super) fn is_same_site(one: &str, other: &str) -> bool {
    let (one, other) = (without_www(one), without_www(other));
    one == other || registrable(one).is_some_and(|domain| registrable(other) == Some(domain))
}

/// The part of a host that somebody registers.
fn registrable(host: &str) -> Option<&str> {
    if is_address(host) { None } else { psl::domain_str(host) }
}

/// True for the machine that looks at itself.
pub(super) fn is_localhost(host: &str) -> bool {
    if !is_address(host) {
        return is_of(host, "localhost");
    }
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    ip.is_ok_and(|ip| ip.is_loopback() || ip.is_unspecified())
}

fn is_address(host: &str) -> bool {
    host.starts_with('[')
        || host.ends_with(|last: char| last.is_ascii_digit()) && host.parse::<IpAddr>().is_ok()
}

/// A host without the ending of a country, as `google` of `google.co.uk`; nothing if it has
/// none. `com` counts as one, for those who have that beside the countries'.
pub(super) fn without_country(host: &str) -> Option<&str> {
    let suffix = List.suffix(host.as_bytes()).filter(|suffix| suffix.typ() == Some(Type::Icann))?;
    let top_bytes = suffix.as_bytes().rsplit(|byte| *byte == b'.').next()?.len();
    if top_bytes != 2 && suffix.as_bytes() != b"com" {
        return None;
    }
    host.get(..host.len() - suffix.as_bytes().len())?.strip_suffix('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_kept_in_one_form() {
        let long = format!("{}.de", "a".repeat(64));
        for (host, want) in [
            ("www.Example.COM", Some("www.example.com")),
            ("example.com.", Some("example.com")),
            ("bücher.example", Some("xn--bcher-kva.example")),
            ("XN--BCHER-KVA.example", Some("xn--bcher-kva.example")),
            ("b%C3%BCcher.example", Some("xn--bcher-kva.example")),
            ("a_b.example", Some("a_b.example")),
            ("localhost", Some("localhost")),
            ("0x7f.1", Some("127.0.0.1")),
            ("[2001:DB8::1]", Some("[2001:db8::1]")),
            ("", None),
            (".", None),
            ("a..b", None),
            ("a b.example", None),
            ("a\\b.example", None),
            ("a%00b", None),
            ("1.2.3.256", None),
            ("[::1", None),
            (&long, None),
        ] {
            assert_eq!(normal(host).as_deref(), want, "{host}");
        }
    }

    #[test]
    fn whole_labels_are_compared() {
        assert!(is_of("semalt.com", "semalt.com") && is_of("a.semalt.com", "semalt.com"));
        assert!(!is_of("notsemalt.com", "semalt.com") && !is_of("semalt.com.evil.example", "semalt.com"));
        let above: Vec<_> = and_above("a.b.example.com").collect();
        assert_eq!(above, ["a.b.example.com", "b.example.com", "example.com"]);
        assert_eq!(and_above("localhost").count(), 0);
    }

    #[test]
    fn one_site_is_what_one_registers() {
        for (one, other, want) in [
            ("example.com", "www.example.com", true),
            ("shop.example.co.uk", "blog.example.co.uk", true),
            ("a.co.uk", "b.co.uk", false),
            // Theirs is what is below the suffix of a host of pages.
            ("a.github.io", "b.github.io", false),
            ("xn--bcher-kva.example", "shop.xn--bcher-kva.example", true),
            ("intranet", "intranet", true),
            ("1.2.3.4", "1.2.3.4", true),
            ("1.2.3.4", "9.2.3.4", false),
            ("[2001:db8::1]", "[2001:db8::1]", true),
            ("example.com", "notexample.com", false),
        ] {
            assert_eq!(is_same_site(one, other), want, "{one} {other}");
        }
        for host in ["localhost", "app.localhost", "127.0.0.1", "127.9.9.9", "[::1]", "0.0.0.0"] {
            assert!(is_localhost(host), "{host}");
        }
        for host in ["localhost.example", "notlocalhost", "10.0.0.1", "[2001:db8::1]"] {
            assert!(!is_localhost(host), "{host}");
        }
    }

    #[test]
    fn a_country_is_an_ending_that_is_one() {
        for (host, want) in [
            ("google.de", Some("google")),
            ("www.google.co.uk", Some("www.google")),
            ("google.com.br", Some("google")),
            ("google.com", Some("google")),
            ("google.xyz", None),
            ("google.github.io", None),
            ("google.evil", None),
            ("google", None),
            ("de", None),
            ("co.uk", None),
        ] {
            assert_eq!(without_country(host), want, "{host}");
        }
    }
}
