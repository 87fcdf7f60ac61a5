//! Names of properties whose values nobody should send to analytics: passwords, keys,
//! numbers of cards and papers.
//!
//! They are told while properties are written or checked, where each name passes anyway,
//! so that nobody has to look for them again. What is done about one that is found is not
//! decided here.
//!
//! The list is our own; Segment's privacy matchers and Sentry's scrubber, both by their
//! documentation, look for such names, too.

/// The names, as [`red_key`] compares them.
pub const RED_KEYS: [&str; 14] = [
    "password",
    "passwd",
    "secret",
    "token",
    "apikey",
    "authorization",
    "cookie",
    "privatekey",
    "creditcard",
    "cardnumber",
    "cvv",
    "iban",
    "ssn",
    "passport",
];

/// Bytes of the longest of them.
const BYTES_MAX: usize = 13;

/// The place of a name in [`RED_KEYS`], if it is one: as a whole, whatever its case, and
/// without the `_`, `-` and blanks in it.
pub fn red_key(key: &[u8]) -> Option<usize> {
    if may_be_red(key) { place_of(key) } else { None }
}

/// True for a byte that counts for nothing in a name.
pub fn is_separator(byte: u8) -> bool {
    matches!(byte, b'_' | b'-' | b' ')
}

/// False for nearly every name, by its first and its last byte: all that most names cost.
#[inline]
pub(crate) fn may_be_red(key: &[u8]) -> bool {
    let (Some(first), Some(last)) = (key.first(), key.last()) else { return false };
    BEGINS[usize::from(*first)] & ENDS[usize::from(*last)] != 0
}

#[cold]
fn place_of(key: &[u8]) -> Option<usize> {
    let mut plain = [0; BYTES_MAX];
    let mut bytes = 0;
    for byte in key.iter().filter(|byte| !is_separator(**byte)) {
        *plain.get_mut(bytes)? = byte.to_ascii_lowercase();
        bytes += 1;
    }
    RED_KEYS.iter().position(|red| red.as_bytes() == &plain[..bytes])
}

/// Of each first byte the names that begin with it, a bit each, and of each last byte those
/// that end with it. Behind or before a separator it may be any of them.
const BEGINS: [u16; 256] = names_by_a_byte(false);
const ENDS: [u16; 256] = names_by_a_byte(true);

const fn names_by_a_byte(last: bool) -> [u16; 256] {
    let mut names = [0; 256];
    let mut place = 0;
    while place < RED_KEYS.len() {
        let name = RED_KEYS[place].as_bytes();
        let byte = if last { name[name.len() - 1] } else { name[0] };
        names[byte as usize] |= 1 << place;
        names[byte.to_ascii_uppercase() as usize] |= 1 << place;
        place += 1;
    }
    names[b'_' as usize] = u16::MAX;
    names[b'-' as usize] = u16::MAX;
    names[b' ' as usize] = u16::MAX;
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_red_name_is_known_in_every_spelling() {
        for (place, name) in RED_KEYS.iter().enumerate() {
            assert!(name.len() <= BYTES_MAX && name.bytes().all(|byte| byte.is_ascii_lowercase()), "{name}");
            let (front, back) = name.split_at(name.len() / 2);
            for spelling in [
                (*name).to_owned(),
                name.to_uppercase(),
                format!("{front}_{back}"),
                format!("{front}-{}", back.to_uppercase()),
                format!("{front} {back}"),
                format!("_{front}--{back}_"),
            ] {
                assert_eq!(red_key(spelling.as_bytes()), Some(place), "{spelling}");
            }
        }
    }

    /// Whole names: what only holds one is somebody's ordinary property.
    #[test]
    fn a_part_of_a_name_is_none() {
        for name in [
            "",
            "_",
            "author",
            "authorizations",
            "passwordless",
            "password2",
            "my_password",
            "tokens",
            "page_token_count",
            "secretary",
            "cookies",
            "assn",
            "pass.word",
            "passwörd",
            "token\0",
            "ssn_ssn",
        ] {
            assert_eq!(red_key(name.as_bytes()), None, "{name:?}");
        }
    }
}
