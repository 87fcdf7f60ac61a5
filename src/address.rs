//! Addresses of users: which of them are anywhere in the world, and how much of one is
//! written down.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::settings::Reader;

/// How many bits of an address are left when it is cut: those that a household shares with
/// others.
const V4_BITS_KEPT: u32 = 24;
const V6_BITS_KEPT: u32 = 48;
/// The first 16 bits of an address that has one of IPv4 behind them (6to4, RFC 3056).
const SIX_TO_FOUR: u16 = 0x2002;

/// How much of a user's address is kept. What is not kept is gone before the event is in the
/// queue: it is in no file and goes to no provider.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum IpPolicy {
    /// An address that was read off a connection is cut, for nobody was asked; one that a
    /// server said stays as it is.
    #[default]
    ByOrigin,
    /// Each is cut: of IPv4 to 24 bits, of IPv6 to 48.
    Truncate,
    /// Each stays as it is.
    Full,
    /// None is kept.
    None,
}

impl IpPolicy {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        let names = [
            ("default", Self::ByOrigin),
            ("truncate", Self::Truncate),
            ("full", Self::Full),
            ("none", Self::None),
        ];
        reader.one_of("IP_STORE", &names)
    }

    /// True if an address stays as it is.
    pub(crate) fn keeps_all(self, is_connections: bool) -> bool {
        match self {
            Self::ByOrigin => !is_connections,
            Self::Full => true,
            Self::Truncate | Self::None => false,
        }
    }
}

/// What is kept of an address, which was read off a connection or said by a server.
pub(crate) fn stored_ip(ip: IpAddr, is_connections: bool, policy: IpPolicy) -> Option<IpAddr> {
    match policy {
        IpPolicy::None => None,
        _ if policy.keeps_all(is_connections) => Some(ip),
        _ => Some(cut(ip)),
    }
}

/// What a line of the log may tell of a connection's other end: of an address on the Internet,
/// which may be a user's, what may be kept of it; one inside is a machine's.
pub(crate) fn told_ip(ip: IpAddr, policy: IpPolicy) -> Option<IpAddr> {
    if is_public(ip.to_canonical()) { stored_ip(ip, true, policy) } else { Some(ip) }
}

fn cut(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() & (u32::MAX << (32 - V4_BITS_KEPT))).into(),
        IpAddr::V6(ip) => {
            // Of the address of IPv4 in it no more than of any.
            let is_of_v4 = ip.segments()[0] == SIX_TO_FOUR;
            let kept = if is_of_v4 { 16 + V4_BITS_KEPT } else { V6_BITS_KEPT };
            Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << (128 - kept))).into()
        }
    }
}

/// False if an address is nowhere in particular: of a private network, of one machine or
/// link, of a provider's own network, of many receivers, of documentation, of tests. (What
/// the standard library has for it is not stable.) From the registries of IANA for special
/// purposes.
pub(crate) fn is_public(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    let is_of_protocols = (a, b, c) == (192, 0, 0);
    let is_of_carrier = a == 100 && b & 0xC0 == 64;
    let is_of_benchmarks = a == 198 && b & 0xFE == 18;
    // Broadcast among them.
    let is_reserved = a == 0 || a >= 240;
    !(ip.is_private()
        || ip.is_loopback()
        || ip.is_link_local()
        || ip.is_multicast()
        || ip.is_documentation()
        || is_of_protocols
        || is_of_carrier
        || is_of_benchmarks
        || is_reserved)
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    let [a, b, c, d, ..] = ip.segments();
    let is_documentation = (a, b) == (0x2001, 0x0DB8) || a == 0x3FFF && b & 0xF000 == 0;
    let is_discarded = (a, b, c, d) == (0x0100, 0, 0, 0);
    let is_of_own_translator = (a, b, c) == (0x0064, 0xFF9B, 1);
    // What was meant for IPv4 once, the unspecified address and this machine's among it.
    let is_low = (a, b, c, d) == (0, 0, 0, 0);
    // Of sites, as fc00::/7 was called before.
    let is_site_local = a & 0xFFC0 == 0xFEC0;
    !(ip.is_unique_local()
        || ip.is_unicast_link_local()
        || ip.is_multicast()
        || is_documentation
        || is_discarded
        || is_of_own_translator
        || is_low
        || is_site_local)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_log_is_told_of_who_connects_what_may_be_kept_of_users() {
        let told = |text, policy| told_ip(ip(text), policy).map(|ip| ip.to_string());
        for (policy, want) in [
            (IpPolicy::ByOrigin, Some("81.2.69.0")),
            (IpPolicy::Truncate, Some("81.2.69.0")),
            (IpPolicy::Full, Some("81.2.69.142")),
            (IpPolicy::None, None),
        ] {
            assert_eq!(told("81.2.69.142", policy).as_deref(), want, "{policy:?}");
            assert_eq!(told("10.1.2.3", policy).as_deref(), Some("10.1.2.3"), "{policy:?}");
        }
        assert_eq!(told("::ffff:81.2.69.142", IpPolicy::ByOrigin).as_deref(), Some("81.2.69.0"));
    }

    #[test]
    fn what_was_read_off_a_connection_is_cut_and_what_a_server_said_is_not() {
        for (said, cut) in [
            ("81.2.69.142", "81.2.69.0"),
            ("255.255.255.255", "255.255.255.0"),
            ("2001:218:1:2:3:4:5:6", "2001:218:1::"),
            ("::ffff:81.2.69.142", "81.2.69.0"),
            // 81.2.69.142 in the first bits, and it may not come through in them.
            ("2002:5102:458e:1::1", "2002:5102:4500::"),
        ] {
            let (said, cut) = (ip(said), ip(cut));
            for (is_connections, policy, kept) in [
                (true, IpPolicy::ByOrigin, Some(cut)),
                (false, IpPolicy::ByOrigin, Some(said)),
                (true, IpPolicy::Truncate, Some(cut)),
                (false, IpPolicy::Truncate, Some(cut)),
                (true, IpPolicy::Full, Some(said)),
                (false, IpPolicy::Full, Some(said)),
                (true, IpPolicy::None, None),
                (false, IpPolicy::None, None),
            ] {
                assert_eq!(stored_ip(said, is_connections, policy), kept, "{said} {policy:?}");
                assert_eq!(policy.keeps_all(is_connections), kept == Some(said), "{said} {policy:?}");
            }
            assert_eq!(stored_ip(cut, true, IpPolicy::Truncate), Some(cut), "once is enough");
        }
    }

    #[test]
    fn an_address_that_is_nowhere_is_told_from_one_that_is_somewhere() {
        for nowhere in [
            "0.0.0.0",
            "0.1.2.3",
            "10.1.2.3",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "169.254.1.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.9",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:10.1.2.3",
            "64:ff9b:1::1",
            "100::1",
            "2001:db8::1",
            "3fff:fff::1",
            "fc00::1",
            "fdff::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(!is_public(ip(nowhere)), "{nowhere}");
        }
        for somewhere in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "::ffff:1.1.1.1",
            "2001:218::1",
            "2001:db9::1",
            "2a00:1450::1",
            "3ffe::1",
            "3fff:1000::1",
        ] {
            assert!(is_public(ip(somewhere)), "{somewhere}");
        }
    }
}
