//! The address of a page, taken apart as it stands. A parser that puts it right would change
//! the path, which is kept as it was sent.

use std::borrow::Cow;

use memchr::{memchr, memchr3, memrchr};

use super::host;

/// Most bytes that are looked at, whatever was sent.
const READ_BYTES_MAX: usize = 8 * 1024;

/// An address of the web in its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address<'a> {
    /// `http` or `https`.
    pub(super) scheme: &'static str,
    pub(super) host: Cow<'a, str>,
    /// From its first slash on; a slash if it has none.
    pub(super) path: &'a str,
    /// Without the `?`; empty if there is none.
    pub(super) query: &'a str,
    /// Without the `#`; empty if there is none.
    pub(super) fragment: &'a str,
}

impl<'a> Address<'a> {
    /// Of a text that is the address of a page; nothing if it is anything else. Who may log
    /// in and the port are left out.
    pub(super) fn of(text: &'a str) -> Option<Self> {
        let text = trimmed(text);
        let of_scheme = |(scheme, start)| Some((scheme, after(text, start)?));
        let (scheme, rest) = [("https", "https://"), ("http", "http://")].into_iter().find_map(of_scheme)?;
        Self::of_rest(scheme, rest)
    }

    /// Of what is behind the two slashes.
    pub(super) fn of_rest(scheme: &'static str, rest: &'a str) -> Option<Self> {
        let end = memchr3(b'/', b'?', b'#', rest.as_bytes()).unwrap_or(rest.len());
        let (authority, rest) = rest.split_at(end);
        let host_start = memrchr(b'@', authority.as_bytes()).map_or(0, |at| at + 1);
        let host = host::normal(without_port(&authority[host_start..])?)?;
        let (rest, fragment) = split_once(rest, b'#');
        let (path, query) = split_once(rest, b'?');
        let path = if path.is_empty() { "/" } else { path };
        Some(Self { scheme, host, path, query, fragment })
    }
}

/// What is before a sign in ASCII and what is behind it; nothing is behind it if it is not
/// there.
fn split_once(text: &str, sign: u8) -> (&str, &str) {
    memchr(sign, text.as_bytes()).map_or((text, ""), |at| (&text[..at], &text[at + 1..]))
}

/// What is behind a beginning, whatever its case.
pub(super) fn after<'a>(text: &'a str, beginning: &str) -> Option<&'a str> {
    let (before, rest) = text.split_at_checked(beginning.len())?;
    before.eq_ignore_ascii_case(beginning).then_some(rest)
}

/// A text of a bounded length without what is around it and says nothing.
pub(super) fn trimmed(text: &str) -> &str {
    let is_seen = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_graphic);
    if text.len() <= READ_BYTES_MAX && is_seen(text.as_bytes().first()) && is_seen(text.as_bytes().last()) {
        return text;
    }
    let is_around = |c: char| c.is_whitespace() || c.is_control();
    cut(text.trim_start_matches(is_around), READ_BYTES_MAX).trim_end_matches(is_around)
}

/// The first bytes of a text, up to the end of a character.
pub(super) fn cut(text: &str, bytes_max: usize) -> &str {
    if text.len() <= bytes_max {
        return text;
    }
    let end = (0..=bytes_max).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// Adds a text to another without its control characters.
pub(super) fn push_printable(to: &mut String, text: &str) {
    match is_printable(text) {
        true => to.push_str(text),
        false => to.extend(text.chars().filter(|c| !c.is_control())),
    }
}

/// True if there is no control character in a text, as far as its bytes say that.
pub(super) fn is_printable(text: &str) -> bool {
    // Those of one byte in UTF-8 and, behind 0xC2, those of two: a loop over words.
    let is_one = |byte: u8| byte < b' ' || byte == 0x7F || byte == 0xC2;
    !text.as_bytes().chunks(32).any(|bytes| bytes.iter().fold(false, |any, byte| any | is_one(*byte)))
}

fn without_port(authority: &str) -> Option<&str> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let end = rest.find(']')? + "[]".len();
            (
                &authority[..end],
                authority[end..].strip_prefix(':').or((end == authority.len()).then_some(""))?,
            )
        }
        None => split_once(authority, b':'),
    };
    port.bytes().all(|byte| byte.is_ascii_digit()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_apart_as_it_stands() {
        let of = |text| {
            let Address { scheme, host, path, query, fragment } = Address::of(text)?;
            Some(format!("{scheme} {host} {path} {query} {fragment}"))
        };
        for (text, want) in [
            ("https://x.example/a/../b//?q=1?2#f#g", "https x.example /a/../b// q=1?2 f#g"),
            (" HTTP://X.Example ", "http x.example /  "),
            ("https://me:pass@x.example:8443?q", "https x.example / q "),
            ("https://a@b@x.example#/p", "https x.example /  /p"),
            ("https://[::1]:3000/", "https [::1] /  "),
            ("https://x.example:/é%zz", "https x.example /é%zz  "),
        ] {
            assert_eq!(of(text).as_deref(), Some(want), "{text}");
        }
        for text in [
            "",
            "x.example",
            "/path",
            "//x.example/",
            "ftp://x.example/",
            "javascript://x.example/%0aalert(1)",
            "https:x.example",
            "https:/x.example",
            "https://",
            "https:///p",
            "https://?q",
            "https://x.example:80a/",
            "https://[::1/",
            "https://[::1]x/",
            "https://evil\\@x.example\\/",
            "https://a b/",
            "data:text/html,x",
            "about:blank",
            "file:///etc/passwd",
        ] {
            assert_eq!(of(text), None, "{text}");
        }
    }

    #[test]
    fn only_so_much_is_looked_at_and_no_character_is_cut() {
        let long = format!("https://x.example/{}", "é".repeat(READ_BYTES_MAX));
        let path = Address::of(&long).unwrap().path;
        assert!(path.len() < READ_BYTES_MAX && path.ends_with('é'));
        assert_eq!(cut("aé", 2), "a");
        let mut clean = String::new();
        push_printable(&mut clean, "a\u{0}\u{85}\u{7f}é\n©");
        assert_eq!(clean, "aé©");
    }
}
