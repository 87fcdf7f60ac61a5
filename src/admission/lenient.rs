//! What must not cost the event: an address, a user agent or an id that is not as
//! it should be is read leniently, cut or left out, and that is counted.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use analytics_relay_providers::means_nobody;
use memchr::memmem;
use serde_json::value::{RawValue, to_raw_value};

use crate::{
    address::{IpPolicy, stored_ip},
    reasons::Mended,
};

/// What was mended of one event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Mends(u8);

impl Mends {
    pub(super) fn note_if(&mut self, is_so: bool, mended: Mended) {
        self.0 |= u8::from(is_so) << mended as u8;
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn each(self) -> impl Iterator<Item = Mended> {
        Mended::ALL.into_iter().filter(move |mended| self.0 >> *mended as u8 & 1 == 1)
    }
}

/// The address that a text holds, if it holds one.
#[inline]
pub(super) fn read_ip(text: &str, mends: &mut Mends) -> Option<IpAddr> {
    if text.is_empty() {
        return None;
    }
    text.parse().ok().or_else(|| find_ip(text, mends))
}

/// The first address of a list, as proxies write it: with a port, in brackets, with
/// a zone, with blanks or quotes around it.
#[cold]
fn find_ip(text: &str, mends: &mut Mends) -> Option<IpAddr> {
    let ip = text.split([',', ';']).find_map(ip_of_part);
    mends.note_if(ip.is_some(), Mended::IpFound);
    mends.note_if(ip.is_none(), Mended::IpLeftOut);
    ip
}

fn ip_of_part(part: &str) -> Option<IpAddr> {
    let is_around = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '"' | '\'');
    let part = part.trim_matches(is_around);
    // Of the header Forwarded.
    let part = match part.get(..4) {
        Some(name) if name.eq_ignore_ascii_case("for=") => part[4..].trim_matches(is_around),
        _ => part,
    };
    if let Ok(addr) = part.parse::<SocketAddr>() {
        return Some(addr.ip());
    }
    let part = part.strip_prefix('[').map_or(part, |part| part.split(']').next().unwrap_or(part));
    let part = part.split('%').next().unwrap_or(part);
    part.parse().ok()
}

/// A context in which no more is left of an address than the policy lets; nothing if it can
/// stay as it is. What holds no address is left out, and all of what cannot be read.
#[inline]
pub(crate) fn context_with_ip_cut(json: &str, is_connections: bool, policy: IpPolicy) -> Option<String> {
    if policy.keeps_all(is_connections) || !may_name_ip(json) {
        return None;
    }
    cut_in_context(json, is_connections, policy)
}

/// False if no name in it is `ip`. A name may be written with escapes.
pub(crate) fn may_name_ip(json: &str) -> bool {
    memmem::find(json.as_bytes(), b"\"ip\"").is_some() || memmem::find(json.as_bytes(), b"\\u").is_some()
}

#[cold]
fn cut_in_context(json: &str, is_connections: bool, policy: IpPolicy) -> Option<String> {
    let Ok(mut fields) = serde_json::from_str::<BTreeMap<String, Box<RawValue>>>(json) else {
        // Of an event it was checked before; of an item that was refused by nobody.
        return Some("{}".to_owned());
    };
    let said = fields.remove("ip")?;
    let said = serde_json::from_str::<String>(said.get()).unwrap_or_default();
    let kept = read_ip(&said, &mut Mends::default()).and_then(|ip| stored_ip(ip, is_connections, policy));
    if let Some(kept) = kept {
        fields.insert("ip".into(), to_raw_value(&kept).expect("an address is a text"));
    }
    Some(serde_json::to_string(&fields).expect("it was JSON"))
}

/// A text of at most so many bytes, cut between two characters; nothing if it is
/// empty.
#[inline]
pub(super) fn cut<'a>(text: &'a str, bytes_max: usize, mends: &mut Mends) -> Option<&'a str> {
    if text.len() <= bytes_max {
        return (!text.is_empty()).then_some(text);
    }
    mends.note_if(true, Mended::UserAgentCut);
    let end = (0..=bytes_max).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    Some(&text[..end])
}

/// An id, if it is given and means somebody. It is taken as it is.
#[inline]
pub(super) fn id_of_somebody<'a>(id: &'a str, left_out: Mended, mends: &mut Mends) -> Option<&'a str> {
    if id.is_empty() {
        return None;
    }
    let nobody = means_nobody(id);
    mends.note_if(nobody, left_out);
    (!nobody).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_found_in_what_proxies_write() {
        for (text, want) in [
            ("1.2.3.4", Some("1.2.3.4")),
            ("1.2.3.4, 10.0.0.1", Some("1.2.3.4")),
            ("unknown, 1.2.3.4", Some("1.2.3.4")),
            ("1.2.3.4:8080", Some("1.2.3.4")),
            ("[2001:db8::1]:443", Some("2001:db8::1")),
            ("[2001:db8::1]", Some("2001:db8::1")),
            ("fe80::1%eth0", Some("fe80::1")),
            ("  2001:db8::1\n", Some("2001:db8::1")),
            ("for=\"[2001:db8::1]:443\";proto=https", Some("2001:db8::1")),
            ("unknown", None),
            ("-", None),
            ("localhost", None),
            ("1.2.3", None),
            ("[", None),
            (" , ,", None),
            ("é", None),
        ] {
            let mut mends = Mends::default();
            assert_eq!(read_ip(text, &mut mends), want.map(|ip| ip.parse().unwrap()), "{text}");
            assert_eq!(mends.is_empty(), text == "1.2.3.4", "{text}");
        }
    }

    #[test]
    fn an_address_in_a_context_is_cut_however_it_is_written() {
        let cut = |json| context_with_ip_cut(json, true, IpPolicy::ByOrigin);
        for (json, want) in [
            (r#"{"ip":"81.2.69.142"}"#, r#"{"ip":"81.2.69.0"}"#),
            (r#"{"\u0069p" : "81.2.69.142, 10.0.0.1","n":1e2}"#, r#"{"ip":"81.2.69.0","n":1e2}"#),
            (r#"{"ip":["81.2.69.142"],"page":{"ip":1}}"#, r#"{"page":{"ip":1}}"#),
            (r#"{"ip":"1","ip":"81.2.69.142"}"#, r#"{"ip":"81.2.69.0"}"#),
            (r#"{"ip":"somewhere"}"#, "{}"),
            // What is not to be read holds whatever it likes.
            (r#"{"\ud800":1,"ip":"81.2.69.142"}"#, "{}"),
            (r#"{"ip":"81.2.69.142""#, "{}"),
            (r#"[{"ip":"81.2.69.142"}]"#, "{}"),
        ] {
            assert_eq!(cut(json).as_deref(), Some(want), "{json}");
        }
        for as_it_is in ["{}", r#"{"page":{"ip":"81.2.69.142"}}"#, r#"{"a":"\u0069p"}"#, "[1]"] {
            assert_eq!(cut(as_it_is), None, "{as_it_is}");
        }
        assert_eq!(context_with_ip_cut(r#"{"ip":"81.2.69.142"}"#, false, IpPolicy::ByOrigin), None);
    }
}
